"""Converted pi0 and pi0.5 compute what LeRobot's own classes compute, on random weights.

Then the same weights as openpi names them, and with a gate over horizons.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deploy import convert
from vla import checkpoint, tokenizer
from vla.batch import Batch
from vla.cache import PrefixCache
from vla.fresh import Fresh
from vla.heads.base import Draws, Target
from vla.policy import VLAPolicy
from vla.stats import Moments, Statistics
from vla.types import ActionSpec

CHUNK, STATE, ACTION, SIDE, ROWS = 6, 4, 3, 32, 3
KEYS = ["observation.images.top", "observation.images.wrist"]
LENGTHS = (7, 4, 2)  # of the prompts
SIZES = {"gemma_2b": (64, 2, 128, 8, 1, 16), "gemma_300m": (32, 2, 64, 8, 1, 16)}
HORIZONS = (2, 4, 6)


def shrink(patch: pytest.MonkeyPatch, module: Any) -> None:
    """LeRobot's classes at sizes of a test; their own constants are those of the real models."""
    vlm_class, expert_class = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def paligemma() -> Any:
        made = CONFIG_MAPPING["paligemma"]()
        made.vision_config.num_hidden_layers, made.vision_config.hidden_size = 2, 32
        made.vision_config.patch_size, made.vision_config.num_attention_heads = 8, 16
        return made

    def small_vlm(config: Any) -> Any:
        config.text_config.vocab_size = 300
        config.vision_config.intermediate_size, config.vision_config.projection_dim = 48, 64
        config.projection_dim = 64
        return vlm_class(config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = 300
        return expert_class(config)

    patch.setattr(module, "get_gemma_config", lambda variant: module.GemmaConfig(*SIZES[variant]))
    patch.setattr(module, "CONFIG_MAPPING", {"paligemma": paligemma, "gemma": CONFIG_MAPPING["gemma"]})
    patch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm)
    patch.setattr(module, "PiGemmaForCausalLM", small_expert)


def randomise(module: nn.Module) -> None:
    """Weights that make every part matter; adaRMS starts at zero and would hide a broken time."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.dim() > 1 and "embed" not in name
        parameter.data = noise / parameter[0].numel() ** 0.5 if matrix else 0.3 * noise


def lerobot_policy(kind: str) -> Any:
    """A pi0 or pi05; its `model` has the forward passes that the tests compare with."""
    inputs = {key: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for key in KEYS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE,))
    module, config_class = {"pi0": (modeling_pi0, PI0Config), "pi05": (modeling_pi05, PI05Config)}[kind]
    policy_class = {"pi0": modeling_pi0.PI0Policy, "pi05": modeling_pi05.PI05Policy}[kind]
    settings = config_class(
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        device="cpu",
        dtype="float32",
        chunk_size=CHUNK,
        n_action_steps=4,
        max_state_dim=8,
        max_action_dim=6,
        num_inference_steps=4,
        image_resolution=(SIDE, SIDE),
    )
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, module)
        policy = policy_class(settings)
    randomise(policy)
    return policy.eval()


def spec(dim: int) -> ActionSpec:
    names = tuple(f"j{i}" for i in range(dim))
    return ActionSpec(names, ("rad",) * dim, ("absolute",) * dim, (-9.0,) * dim, (9.0,) * dim, 20.0)


def statistics() -> Statistics:
    rows = (0.1, 2.0, -9.0, 9.0, -5.0, -2.0, 0.0, 2.0, 5.0)
    state, action = (Moments(9, *(np.full(dim, v) for v in rows)) for dim in (STATE, ACTION))
    return Statistics(spec(STATE), spec(ACTION), state, action, "made up")


class Case:
    """LeRobot's policy, ours made from it, and where both are."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind, self.root = kind, root
        self.theirs = lerobot_policy(kind)
        self.theirs.save_pretrained(root / "source")
        tokenizer.byte_level().save(root / "tokenizer")
        (root / "statistics.json").write_text(json.dumps(statistics().to_json()))
        self.ours = self.convert("source", "ours")

    def convert(self, source: str, target: str, *options: str) -> VLAPolicy:
        command = [self.root / source, self.root / target, "--tokenizer", self.root / "tokenizer"]
        command += ["--statistics", self.root / "statistics.json"]
        assert convert.main([*map(str, command), *options]) == 0
        return checkpoint.load(self.root / target)

    def state(self, given: dict[str, Tensor]) -> list[Tensor]:
        """What LeRobot's suffix takes before the noisy actions."""
        return [given["state"]] if self.kind == "pi0" else []


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def inputs(dims: int = 8) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "images": torch.randint(0, 256, (ROWS, 2, SIDE, SIDE, 3), dtype=torch.uint8, generator=g),
        "image_mask": torch.tensor([[True, True], [True, False], [True, True]]),
        "tokens": torch.randint(0, 257, (ROWS, max(LENGTHS)), generator=g),
        "token_mask": torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None],
        "state": pad(torch.randn(ROWS, STATE, generator=g), (0, dims - STATE)),
    }


def pictures(given: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    images = [given["images"][:, i].permute(0, 3, 1, 2).float() / 127.5 - 1 for i in range(2)]
    return images, [given["image_mask"][:, i] for i in range(2)]


def lerobot_prefix(policy: Any, given: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """LeRobot's cache of the prefix, and which of its tokens are valid."""
    model = policy.model
    embeddings, valid, blocks = model.embed_prefix(*pictures(given), given["tokens"], given["token_mask"])
    model.paligemma_with_expert.paligemma.model.language_model.config._attn_implementation = "eager"
    _, cache = model.paligemma_with_expert.forward(
        attention_mask=prepare_attention_masks_4d(make_att_2d_masks(valid, blocks)),
        position_ids=torch.cumsum(valid, dim=1) - 1,
        inputs_embeds=[embeddings, None],
        use_cache=True,
    )
    return cache, valid


def ours_prefix(policy: VLAPolicy, given: dict[str, Tensor]) -> PrefixCache:
    return policy.encode(given["images"], given["image_mask"], given["tokens"], given["token_mask"])


def velocity(policy: VLAPolicy, given: dict[str, Tensor], noisy: Tensor, time: float) -> Tensor:
    denoise = policy._fast.denoiser(ours_prefix(policy, given), Fresh(given["state"]), 1)
    return denoise(noisy[:, None], torch.full((ROWS, 1, CHUNK), time)).out[:, 0]


def noisy_actions(dims: int = 6) -> Tensor:
    return torch.randn(ROWS, CHUNK, dims, generator=torch.Generator().manual_seed(4))


def close(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_the_folder_says_what_lerobots_said(case: Case) -> None:
    found, adaptive = case.ours.config, case.kind == "pi05"
    assert (found.state, found.normalization) == (("prompt", "quantile") if adaptive else ("suffix", "mean_std"))
    assert (found.expert.norm, found.max_tokens) == (("adarms", 200) if adaptive else ("rms", 48))
    assert (found.cameras, found.execute, found.expert.activation) == (("top", "wrist"), 4, "gelu_tanh")


@torch.no_grad()
def test_prefix(case: Case) -> None:
    given = inputs()
    expected, valid = lerobot_prefix(case.theirs, given)
    cache = ours_prefix(case.ours, given)
    assert torch.equal(cache.valid, valid)
    for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        layer = expected.layers[i]
        close(keys.transpose(1, 2)[valid], layer.keys.transpose(1, 2)[valid], 1e-5)
        close(values.transpose(1, 2)[valid], layer.values.transpose(1, 2)[valid], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("time", [1.0, 0.7, 0.1])
def test_velocity(case: Case, time: float) -> None:
    given, noisy = inputs(), noisy_actions()
    cache, valid = lerobot_prefix(case.theirs, given)
    known = {"prefix_pad_masks": valid, "past_key_values": cache, "x_t": noisy, "timestep": torch.full((ROWS,), time)}
    if case.kind == "pi0":
        known["state"] = given["state"]
    close(velocity(case.ours, given, noisy, time), case.theirs.model.denoise_step(**known), 1e-5)


@torch.no_grad()
def test_sample(case: Case) -> None:
    given = inputs()
    noise = case.ours.head.init((ROWS, 1, CHUNK, 6), torch.Generator().manual_seed(5), torch.device("cpu"))
    words = (given["tokens"], given["token_mask"], *case.state(given))
    expected = case.theirs.model.sample_actions(*pictures(given), *words, noise=noise[:, 0])
    generator = torch.Generator().manual_seed(5)
    drawn = case.ours.sample(ours_prefix(case.ours, given), Fresh(given["state"]), 1, generator)
    close(drawn.actions[:, 0], expected, 1e-4)


def training_batch(given: dict[str, Tensor]) -> Batch:
    actions = torch.randn(ROWS, CHUNK, ACTION, generator=torch.Generator().manual_seed(6))
    rows = torch.arange(ROWS)
    return Batch(
        **given,
        observation=rows,
        age=torch.zeros(ROWS),
        fast_images=torch.zeros(ROWS, 0, 0, 0, 3, dtype=torch.uint8),
        fast_image_mask=torch.zeros(ROWS, 0, dtype=torch.bool),
        history=torch.zeros(ROWS, 0, 8),
        actions=pad(actions, (0, 6 - ACTION)),
        valid=torch.ones(ROWS, CHUNK, dtype=torch.bool),  # LeRobot's pi0 and pi0.5 score padded steps too
        dim_mask=(torch.arange(6) < ACTION).expand(ROWS, 6),
        rows=rows,
        global_size=ROWS,
        noise_seed=11,
        loss_scale=1.0,
    )


def test_loss_and_gradients(case: Case) -> None:
    given = inputs()
    batch = training_batch(given)
    draws = Draws(batch.noise_seed, batch.global_size, batch.rows)
    held = torch.zeros(ROWS, 1, CHUNK, dtype=torch.bool)
    drawn = case.ours.head.corrupt(Target(batch.actions, batch.valid, batch.dim_mask), draws, held)
    noise, time = drawn.answer[:, 0] + batch.actions, drawn.time[:, 0, 0]
    words = (given["tokens"], given["token_mask"], *case.state(given))
    errors = case.theirs.model.forward(*pictures(given), *words, batch.actions, noise, time)
    expected = errors[..., :ACTION].mean()
    loss = case.ours.loss(batch).total
    close(loss, expected, 1e-5)
    case.theirs.zero_grad()
    case.ours.zero_grad()
    expected.backward()
    loss.backward()
    there, here = dict(case.theirs.named_parameters()), dict(case.ours.named_parameters())
    norm = {"pi0": "input_layernorm.weight", "pi05": "input_layernorm.dense.weight"}[case.kind]
    names = {
        "gemma_expert.model.layers.1.self_attn.k_proj.weight": "expert.layers.1.k_proj.weight",
        f"gemma_expert.model.layers.0.{norm}": f"expert.layers.0.{norm}",
        "paligemma.model.language_model.layers.0.mlp.up_proj.weight": "",
        "paligemma.model.multi_modal_projector.linear.weight": "",
    }
    for name, own in names.items():
        gradient = there[f"model.paligemma_with_expert.{name}"].grad
        ours = here[own or name.replace("paligemma.", "backbone.")].grad
        assert gradient is not None
        assert ours is not None
        assert gradient.abs().max() > 1e-4
        close(ours, gradient, 1e-4)


def as_openpi(case: Case, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The same weights in openpi's layout: no `model.`, one of the two names of the embedding, no config.json."""
    weights = {k.removeprefix("model."): v for k, v in load_file(case.root / "source/model.safetensors").items()}
    embedding = weights.pop("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
    weights["paligemma_with_expert.paligemma.lm_head.weight"] = embedding
    g = torch.Generator().manual_seed(9)
    for part, dims in (("state_proj", (0, 32 - 8)), ("action_in_proj", (0, 32 - 6))):
        if f"{part}.weight" in weights:
            weights[f"{part}.weight"] = pad(weights[f"{part}.weight"], dims)  # openpi has 32 of each
    out = weights["action_out_proj.weight"]
    weights["action_out_proj.weight"] = torch.cat((out, torch.randn(26, out.shape[1], generator=g)))
    weights["action_out_proj.bias"] = pad(weights["action_out_proj.bias"], (0, 26))
    change(weights)
    (case.root / name).mkdir()
    save_file({k: v.contiguous() for k, v in weights.items()}, case.root / name / "model.safetensors")


@torch.no_grad()
def test_openpi_layout(case: Case) -> None:
    as_openpi(case, "openpi", lambda _: None)
    ours = case.convert("openpi", "from_openpi", "--chunk", str(CHUNK))
    assert ours.config.cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    given, noisy = inputs(), noisy_actions()
    wide = given | {"state": pad(given["state"], (0, 24))}
    close(velocity(ours, wide, pad(noisy, (0, 26)), 0.4)[..., :6], velocity(case.ours, given, noisy, 0.4), 1e-6)


def gated(weights: dict[str, Tensor]) -> None:
    g = torch.Generator().manual_seed(10)
    for part in ("gate_out_proj", "gate_noise_layer"):
        weights[f"{part}.weight"], weights[f"{part}.bias"] = torch.randn(1, 32, generator=g), torch.zeros(1)


@torch.no_grad()
def test_mixture_of_horizons(case: Case) -> None:
    """Against the released sampler's step, written out row by row on LeRobot's classes."""
    as_openpi(case, "moh", gated)
    ours = case.convert("moh", "from_moh", "--horizons", ",".join(map(str, HORIZONS)))
    words = {"pi0": 48, "pi05": 200}[case.kind]
    padded = 3 * 16 + words
    assert ours.config.expert.first_position == padded
    given, noisy, gate = inputs(), noisy_actions(), ours.gate
    assert gate is not None
    votes, scores = [], []
    for horizon in HORIZONS:
        hidden = released_step(case, given, noisy[:, :horizon], padded)
        votes.append(pad(case.theirs.model.action_out_proj(hidden), (0, 0, 0, CHUNK - horizon)))
        logits = nn.functional.linear(hidden, gate.gate_out_proj.weight, gate.gate_out_proj.bias)[..., 0]
        scores.append(pad(logits, (0, CHUNK - horizon), value=-torch.inf))
    shares = torch.stack(scores, dim=1).softmax(dim=1)
    expected = (torch.stack(votes, dim=1) * shares[..., None]).sum(dim=1)
    wide = given | {"state": pad(given["state"], (0, 24))}
    close(velocity(ours, wide, pad(noisy, (0, 26)), 0.4)[..., :6], expected, 1e-5)


def test_statistics_of_openpi(case: Case) -> None:
    as_openpi(case, "with_numbers", lambda _: None)
    folder = case.root / "with_numbers/assets/somewhere/arm"
    folder.mkdir(parents=True)
    side = {"mean": 0.25, "std": 1.5, "q01": -3.0, "q99": 4.0}
    numbers = {name: {k: [v] * dim for k, v in side.items()} for name, dim in (("state", STATE), ("actions", ACTION))}
    numbers["actions"] = {k: [*v, 0.0, 0.0] for k, v in numbers["actions"].items()}  # padded
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": numbers}))
    found = case.convert("with_numbers", "numbered", "--chunk", "6", "--execute", "2").processor.codec.statistics
    assert (found.action.mean.tolist(), found.action.q99.tolist()) == ([0.25] * ACTION, [4.0] * ACTION)
    assert found.state.q50.tolist() == [0.0] * STATE, "from --statistics"
    assert checkpoint.load(case.root / "numbered").config.execute == 2


ASKED = {  # layout, options -> what the message asks for
    ("openpi_again",): r"how many steps a chunk has: give --chunk N",
    ("openpi_again", "--chunk", "6", "--horizons", "2,6"): r"--horizons is for a mixture of horizons",
    ("moh_again", "--chunk", "6"): r"give them, as in --horizons 3,6,9,12",
}


def test_what_openpi_does_not_say_is_asked_for(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    as_openpi(case, "openpi_again", lambda _: None)
    as_openpi(case, "moh_again", gated)
    for (name, *options), message in ASKED.items():
        known = ["--tokenizer", str(case.root / "tokenizer"), "--statistics", str(case.root / "statistics.json")]
        assert convert.main([str(case.root / name), str(case.root / "none"), *known, *options]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (case.root / "none").exists()


def test_tokenizer_is_asked_for(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    known = ["--statistics", str(case.root / "statistics.json")]
    assert convert.main([str(case.root / "source"), str(case.root / "none"), *known]) == 2
    assert "does not carry its tokenizer" in capsys.readouterr().err


def test_weights_of_the_other_kind(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = case.root / "wrong"
    shutil.copytree(case.root / "source", wrong)
    said = {"pi0": "pi05", "pi05": "pi0"}[case.kind]
    declared = json.loads((wrong / "config.json").read_text()) | {"type": said}
    (wrong / "config.json").write_text(json.dumps(declared))
    known = ["--tokenizer", str(case.root / "tokenizer"), "--statistics", str(case.root / "statistics.json")]
    assert convert.main([str(wrong), str(case.root / "none"), *known]) == 1
    assert f"config.json says '{said}', the weights are those of a '{case.kind}'" in capsys.readouterr().err


def released_step(case: Case, given: dict[str, Tensor], noisy: Tensor, padded: int) -> Tensor:
    """Hidden states (B, h, W) of one horizon's actions at time 0.4, counted after the padded prefix."""
    model, horizon = case.theirs.model, noisy.shape[1]
    cache, valid = lerobot_prefix(case.theirs, given)
    whole, model.config = model.config, SimpleNamespace(chunk_size=horizon, min_period=4e-3, max_period=4.0)
    tokens, present, blocks, condition = model.embed_suffix(*case.state(given), noisy, torch.full((ROWS,), 0.4))
    model.config = whole
    count = tokens.shape[1]
    seen = torch.cat((valid[:, None].expand(-1, count, -1), make_att_2d_masks(present, blocks)), dim=2)
    model.paligemma_with_expert.gemma_expert.model.config._attn_implementation = "eager"
    (_, hidden), _ = model.paligemma_with_expert.forward(
        attention_mask=prepare_attention_masks_4d(seen),
        position_ids=torch.arange(padded, padded + count).expand(ROWS, -1),
        past_key_values=cache,
        inputs_embeds=[None, tokens],
        use_cache=False,
        adarms_cond=[None, condition],
    )
    return hidden[:, -horizon:]
