"""Prompts, as LeRobot's own processors write them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot.lerobot_types import TransitionKey
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import TokenizerProcessorStep
from lerobot.processor.converters import create_transition
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from vla.backbone_config import SmolVLMConfig, TinyVLM
from vla.codec import Codec
from vla.errors import TandemError
from vla.head_config import FlowConfig
from vla.policy_config import ExpertConfig, PolicyConfig
from vla.processor import Processor, prompt_with_state
from vla.stats import Moments, Statistics
from vla.tokenizer import Tokenizer, byte_level
from vla.types import ActionSpec

CONFIG = PolicyConfig(
    chunk=5,
    execute=2,
    state_dim=8,
    action_dim=8,
    cameras=("top",),
    image_size=32,
    max_tokens=120,
    normalization="quantile",
    state="prompt",
    backbone=SmolVLMConfig("smolvlm", None, TinyVLM(8, 1, 1, 1, 8, 16, 2), None, ()),
    expert=ExpertConfig(8, 1, 8, ("joint",), "rms", "bidirectional"),
    head=FlowConfig("flow", "concat", 2, 0.0, 1),
)
TASKS = ["pick up the_cup", " open\nthe drawer ", "stop"]


def beginning_tokenizer() -> str:
    """Byte-level, with a mark before each text as PaliGemma's has."""
    fast = FastTokenizer.from_str(byte_level()._fast.to_str())
    fast.add_special_tokens(["<bos>"])
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", fast.token_to_id("<bos>"))]
    )
    return fast.to_str()


def processor(config: PolicyConfig) -> Processor:
    names = ("a", "b", "c")
    spec = ActionSpec(names, ("1",) * 3, ("absolute",) * 3, (-9.0,) * 3, (9.0,) * 3, 10.0)
    rows = [np.array([k, 0.3 * k, -k], float) for k in (0.1, 1.0, -4.0, 4.0)]
    quantiles = [np.array([0.2, -1.0, 3.0]) + d for d in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    moments = Moments(100, *rows, *quantiles)
    codec = Codec(Statistics(spec, spec, moments, moments, "made up"), config.normalization, 8, 8)
    return Processor(config, Tokenizer(beginning_tokenizer()), codec)


def lerobot_ids(tasks: list[str], states: np.ndarray, step: object, config: PolicyConfig) -> list[list[int]]:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=FastTokenizer.from_str(beginning_tokenizer()), pad_token="<pad>", bos_token="<bos>"
    )
    tokenize = TokenizerProcessorStep(
        tokenizer=fast, max_length=config.max_tokens, padding_side="right", padding="max_length"
    )
    transition = create_transition(
        observation={"observation.state": torch.from_numpy(states)}, complementary_data={"task": list(tasks)}
    )
    observation = tokenize(step(transition))[TransitionKey.OBSERVATION]  # pyright: ignore[reportCallIssue]
    tokens, mask = observation["observation.language.tokens"], observation["observation.language.attention_mask"]
    return [t[m].tolist() for t, m in zip(tokens, mask, strict=True)]


def test_state_in_the_prompt_is_lerobots() -> None:
    ours, rng = processor(CONFIG), np.random.default_rng(0)
    states = (np.array([0.2, -1.0, 3.0]) + rng.uniform(-2.5, 2.5, (3, 3))).astype(np.float32)
    units = ours.codec.encode_state(states)[:, :3]
    assert (units < -1).any() or (units > 1).any(), "values outside the quantiles belong to the test"
    expected = lerobot_ids(TASKS, units, Pi05PrepareStateTokenizerProcessorStep(), CONFIG)
    pairs = [ours.text(task, state) for task, state in zip(TASKS, states, strict=True)]
    assert [ids[mask].tolist() for ids, mask in pairs] == expected


def test_known_prompt() -> None:
    text = prompt_with_state(" lift_it ", np.array([-1.01, -1.0, 0.0, 0.999, 1.0, 3.0], np.float32))
    assert text == "Task: lift it, State: -1 0 128 255 255 255;\nAction: "


def test_plain_prompt_is_lerobots() -> None:
    config = replace(CONFIG, state="suffix")
    tasks = ["pick up the cup", "stop"]
    expected = lerobot_ids(tasks, np.zeros((2, 3), np.float32), Pi0NewLineProcessor(), config)
    pairs = [processor(config).text(task, np.zeros(3, np.float32)) for task in tasks]
    assert [ids[mask].tolist() for ids, mask in pairs] == expected
    assert processor(config).text("stop")[0].tolist() == processor(config).text(" stop ")[0].tolist()


def test_prompt_is_never_cut() -> None:
    with pytest.raises(TandemError, match=r"Raise policy\.max_tokens"):
        processor(replace(CONFIG, max_tokens=20)).text("stop", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="needs the state"):
        processor(CONFIG).text("stop")
