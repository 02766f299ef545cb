"""`vla-convert`: nothing is guessed, nothing is left out silently, nothing is written by halves."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deploy import convert
from vla import checkpoint, config
from vla.backbone_config import SmolVLMConfig, TinyVLM
from vla.head_config import FlowConfig
from vla.policy import VLAPolicy
from vla.policy_config import ExpertConfig, PolicyConfig
from vla.stats import Moments, Statistics
from vla.types import ActionSpec, Observation

CONFIG = PolicyConfig(
    chunk=5,
    execute=3,
    state_dim=6,
    action_dim=4,
    cameras=("top", "wrist"),
    image_size=32,
    max_tokens=24,
    normalization="mean_std",
    state="prefix",
    backbone=SmolVLMConfig("smolvlm", None, TinyVLM(32, 1, 2, 4, 48, 8, 2), None, ()),
    expert=ExpertConfig(24, 2, 32, ("joint", "cross"), "rms", "causal"),
    head=FlowConfig("flow", "concat", 4, 1.0, 1),
)
DECLARED = {
    "type": "smolvla",
    "chunk_size": 5,
    "n_action_steps": 3,
    "max_state_dim": 6,
    "max_action_dim": 4,
    "tokenizer_max_length": 24,
    "num_steps": 4,
    "resize_imgs_with_padding": [32, 32],
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    "train_expert_only": False,
    "freeze_vision_encoder": False,
    "self_attn_every_n_layers": 2,
    "attention_mode": "cross_attn",
    "vlm_model_name": "somebody/small-vlm",
    "input_features": {
        "observation.images.front": {"type": "VISUAL", "shape": [3, 32, 32]},
        "observation.state": {"type": "STATE", "shape": [3]},
        "observation.images.hand": {"type": "VISUAL", "shape": [3, 32, 32]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 32, 32]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
}
LEROBOT_NAMES = (
    (r"^backbone\.model\.", "model.vlm_with_expert.vlm.model."),
    (r"^expert\.(layers\.\d+)\.([qkvo]_proj)", r"model.vlm_with_expert.lm_expert.\1.self_attn.\2"),
    (r"^expert\.", "model.vlm_with_expert.lm_expert."),
    (r"^fresh\.", "model."),
    (r"^head\.time_input\.mlp_", "model.action_time_mlp_"),
    (r"^head\.", "model."),
)


def spec(dim: int) -> ActionSpec:
    names = tuple("abcdef"[:dim])
    return ActionSpec(names, ("1",) * dim, ("absolute",) * dim, (-9.0,) * dim, (9.0,) * dim, 20.0)


def moments(dim: int, shift: float = 0.0) -> Moments:
    rows = [np.full(dim, v) + shift for v in (0.1, 2.0, -9.0, 9.0, -5.0, -2.0, 0.0, 2.0, 5.0)]
    return Moments(100, *rows)


STATISTICS = Statistics(spec(3), spec(2), moments(3), moments(2), "made up")


def lerobot_name(name: str) -> str:
    for pattern, replacement in LEROBOT_NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


@pytest.fixture(scope="module")
def model() -> VLAPolicy:
    return VLAPolicy.build(CONFIG, STATISTICS, seed=0)


@pytest.fixture
def root(model: VLAPolicy, tmp_path: Path) -> Path:
    """A folder as LeRobot writes it, and what belongs to it."""
    source = tmp_path / "source"
    source.mkdir()
    weights = {lerobot_name(k): v for k, v in model.state_dict().items()}
    save_file(weights | {"model.vlm_with_expert.vlm.lm_head.weight": torch.zeros(4, 4)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(DECLARED))
    numbers = {
        f"{key}.{kind}": torch.as_tensor(np.atleast_1d(value), dtype=torch.float32)
        for key, side in (("observation.state", moments(3, 1.0)), ("action", moments(2, 1.0)))
        for kind, value in asdict(side).items()
    }
    save_file(numbers, source / "numbers.safetensors")
    steps = [{"registry_name": "normalizer_processor", "state_file": "numbers.safetensors"}]
    (source / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    model.backbone.hf_config.save_pretrained(tmp_path / "vlm")
    model.processor.tokenizer.save(tmp_path / "vlm")
    (tmp_path / "recipe.yaml").write_text(config.dump(recipe()))
    (tmp_path / "statistics.json").write_text(json.dumps(STATISTICS.to_json()))
    return tmp_path


def recipe() -> dict[str, Any]:
    return {
        "cameras": {"wrist": "observation.images.hand", "top": "observation.images.front"},
        "state": {"key": "observation.state", "spec": spec(3).to_json()},
        "action": {"key": "action", "spec": spec(2).to_json()},
    }


def run(root: Path, **options: str | None) -> int:
    given = {"vlm": "vlm", "recipe": "recipe.yaml"} | options
    words = [w for k, v in given.items() if v is not None for w in (f"--{k}", str(root / v))]
    return convert.main([str(root / "source"), str(root / "ours"), *words])


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def reweigh(root: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = {k: v.clone() for k, v in load_file(root / "source/model.safetensors").items()}
    change(weights)
    save_file(weights, root / "source/model.safetensors")


def test_every_weight_arrives(root: Path, model: VLAPolicy, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root) == 0
    loaded = checkpoint.load(root / "ours")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.config.cameras == ("top", "wrist"), "the policy's order, the recipe's names"
    assert loaded.processor.codec.statistics.state.mean.tolist() == pytest.approx([1.1] * 3)
    table = capsys.readouterr().out
    assert {word for word in ("renamed", "dropped", "set") if word in table} == {"renamed", "dropped", "set"}
    assert f"wrote {root / 'ours'}" in table


def test_what_statistics_lack_is_filled_up(root: Path) -> None:
    path = root / "source/numbers.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("q01")}, path)
    assert run(root, statistics="statistics.json") == 0
    numbers = checkpoint.load(root / "ours").processor.codec.statistics
    assert numbers.action.mean.tolist() == pytest.approx([1.1] * 2), "the source's own"
    assert numbers.action.q01.tolist() == [-5.0] * 2, "the given file's"
    assert numbers.source == f"{root / 'source'} and made up"


def test_cameras_are_named_after_the_source_without_a_recipe(root: Path) -> None:
    assert run(root, recipe=None, statistics="statistics.json") == 0
    assert checkpoint.load(root / "ours").config.cameras == ("front", "hand")


def test_a_frozen_backbone_keeps_its_format(root: Path) -> None:
    def half(weights: dict[str, Tensor]) -> None:
        weights.update({k: v.bfloat16() for k, v in weights.items() if "vlm.model." in k})

    reweigh(root, half)
    declare(train_expert_only=True)(root)
    assert run(root) == 0
    loaded = checkpoint.load(root / "ours")
    assert (loaded.config.backbone.dtype, loaded.config.backbone.freeze) == ("bf16", ("vision", "connector", "text"))
    assert {p.dtype for p in loaded.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.expert.parameters()} == {torch.float32}
    images = {name: np.zeros((32, 32, 3), np.uint8) for name in ("top", "wrist")}
    assert np.isfinite(loaded.infer(Observation(0.0, images, np.zeros(3, np.float32), "go")).actions).all()
    (root / "options").mkdir()
    words = ["--vlm", str(root / "vlm"), "--recipe", str(root / "recipe.yaml"), "--freeze"]
    assert convert.main([str(root / "source"), str(root / "options/ours"), *words]) == 0
    loaded = checkpoint.load(root / "options/ours")
    assert (loaded.config.backbone.dtype, loaded.config.backbone.freeze) == ("fp32", ())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def cut(root: Path) -> None:
    path = root / "source/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rename(weights: dict[str, Tensor]) -> None:
    weights["model.state_projection.weight"] = weights.pop("model.state_proj.weight")


def spoil(weights: dict[str, Tensor]) -> None:
    weights["model.state_proj.weight"][0, 0] = float("nan")


def foreign_camera(root: Path) -> None:
    blocks = recipe()
    blocks["cameras"]["top"] = "observation.images.side"
    (root / "recipe.yaml").write_text(config.dump(blocks))


def with_state_of(dim: int) -> Callable[[Path], None]:
    blocks = recipe() | {"state": {"key": "observation.state", "spec": spec(dim).to_json()}}

    def write(root: Path) -> None:
        (root / "recipe.yaml").write_text(config.dump(blocks))

    return write


def declare(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / "source/config.json", lambda data: data.update(changes))


DAMAGE = {  # what is done to the folder, and what the one message must say
    "truncated": (cut, r"model\.safetensors cannot be read: .*It is truncated"),
    "renamed": (lambda r: reweigh(r, rename), r"1 weights that this kind .*state_projection\.weight"),
    "missing": (
        lambda r: reweigh(r, lambda w: w.pop("model.action_out_proj.bias")),
        r"1 missing: head\.action_out",
    ),
    "spoiled": (lambda r: reweigh(r, spoil), r"state_proj\.weight .*not finite"),
    "no weights": (lambda r: (r / "source/model.safetensors").unlink(), r"has no model\.safetensors"),
    "no tokenizer": (lambda r: (r / "vlm/tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "other vlm": (
        lambda r: edit(r / "vlm/config.json", lambda d: d["text_config"].update(hidden_size=40)),
        r"VLM of width 32 .* has 40 .* Give somebody/small-vlm",
    ),
    "other shape": (declare(max_state_dim=7), r"1 of another shape: fresh\.state_proj\.weight"),
    "other kind": (declare(type="act"), r"type 'act'; smolvla, pi0, pi05 can be converted"),
    "no kind": (lambda r: edit(r / "source/config.json", lambda d: d.pop("type")), r"no checkpoint that is known"),
    "not json": (lambda r: (r / "source/config.json").write_text("{"), r"config\.json cannot be read"),
    "not ours": (declare(adapt_to_pi_aloha=True), r"adapt_to_pi_aloha is True, and only False"),
    "two norms": (
        declare(normalization_mapping={"STATE": "MEAN_STD", "ACTION": "QUANTILES"}),
        r"State and action need the same one of MEAN_STD, QUANTILES, IDENTITY",
    ),
    "oblong": (declare(resize_imgs_with_padding=[32, 48]), r"resize_imgs_with_padding is \[32, 48\], and only squares"),
    "old config": (lambda r: edit(r / "source/config.json", lambda d: d.pop("chunk_size")), r"has no 'chunk_size'"),
    "foreign camera": (foreign_camera, r"name \['observation\.images\.side'\], and the policy has"),
    "larger arm": (with_state_of(4), r"The source's state has 3 dimensions, the recipe's 4"),
    "smaller arm": (with_state_of(2), r"The source's state has 3 dimensions, the recipe's 2"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_bad_source_is_one_clear_message(root: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGE[what]
    damage(root)
    assert run(root) in (1, 2)
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (root / "ours").exists()
    assert sorted(p.name for p in root.iterdir()) == ["recipe.yaml", "source", "statistics.json", "vlm"]


ABSENT = {  # option that is not given -> what the message asks for
    "vlm": r"config\.json and tokenizer\.json of somebody/small-vlm .*--vlm DIR",
    "recipe": r"does not say what its numbers mean\. Give --recipe",
}


@pytest.mark.parametrize("option", ABSENT)
def test_what_is_missing_is_asked_for(root: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, **{option: None}) == 2
    assert re.search(ABSENT[option], capsys.readouterr().err)


def test_statistics_and_tokenizer_are_asked_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "source/policy_preprocessor.json").unlink()
    assert run(root) == 2
    assert re.search(r"statistics of the state lack \['count', 'mean'.*--statistics FILE", capsys.readouterr().err)
    assert run(root, statistics="statistics.json", recipe=None, tokenizer="nowhere") == 1
    assert "nowhere has no tokenizer.json" in capsys.readouterr().err


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main([str(tmp_path / "nothing"), str(tmp_path / "ours")]) == 1
    assert "No such folder" in capsys.readouterr().err
