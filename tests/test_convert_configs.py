"""The configurations in configs/ take what `vla-convert` makes of the public checkpoints, by their real sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy import convert_pi, convert_smolvla
from deploy.convert_plan import Given, Plan
from deploy.convert_source import Weights
from train import sft
from train.train_config import TrainConfig
from train.training_state import differences
from vla import config

ROOT = Path(__file__).parents[1]
CAMERAS = ("a", "b", "c")
SMOLVLA = {  # lerobot/smolvla_base
    "type": "smolvla",
    "chunk_size": 50,
    "n_action_steps": 50,
    "max_state_dim": 32,
    "max_action_dim": 32,
    "tokenizer_max_length": 48,
    "num_steps": 10,
    "resize_imgs_with_padding": [512, 512],
    "normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    "train_expert_only": True,
    "freeze_vision_encoder": True,
    "self_attn_every_n_layers": 2,
    "attention_mode": "cross_attn",
    "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
}
SMOLVLM2 = {  # its config.json, as far as it is read
    "model_type": "smolvlm",
    "text_config": {"hidden_size": 960, "num_attention_heads": 15, "num_hidden_layers": 32, "rms_norm_eps": 1e-5},
    "vision_config": {"image_size": 512, "patch_size": 16},
}
PI = {  # lerobot/pi0_base and lerobot/pi05_base
    "chunk_size": 50,
    "n_action_steps": 50,
    "max_state_dim": 32,
    "max_action_dim": 32,
    "num_inference_steps": 10,
    "image_resolution": [224, 224],
}
PI_NORMS = {"pi0": ("MEAN_STD", 48), "pi05": ("QUANTILES", 200)}


def weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Names and shapes alone, without a file."""
    stub = Weights.__new__(Weights)
    stub.folder, stub.shapes, stub._dtypes = Path("nowhere"), shapes, dict.fromkeys(shapes, "BF16")
    return stub


def smolvla_plan(folder: Path) -> Plan:
    (folder / "config.json").write_text(json.dumps(SMOLVLM2))
    text, expert = "vlm_with_expert.vlm.model.text_model.", "vlm_with_expert.lm_expert."
    shapes: dict[str, tuple[int, ...]] = {
        "action_in_proj.weight": (720, 32),
        "vlm_with_expert.vlm.model.vision_model.embeddings.position_embedding.weight": (1024, 768),
        f"{text}norm.weight": (960,),
    }
    for i in range(16):
        shapes |= {f"{text}layers.{i}.mlp.gate_proj.weight": (2560, 960)}
        shapes |= {f"{expert}layers.{i}.mlp.gate_proj.weight": (2048, 720)}
    return convert_smolvla.plan(dict(SMOLVLA), weights(shapes), CAMERAS, folder, Given())


def pi_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        convert_pi.EMBEDDING: (257_152, 2048),
        "action_in_proj.weight": (1024, 32),
        f"{convert_pi.VISION}embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{convert_pi.VISION}embeddings.position_embedding.weight": (256, 1152),
    }
    if kind == "pi05":
        shapes["time_mlp_in.weight"] = (1024, 1024)
    for i in range(27):
        shapes[f"{convert_pi.VISION}encoder.layers.{i}.mlp.fc1.weight"] = (4304, 1152)
    for i in range(18):
        layer = f"{convert_pi.VLM}model.language_model.layers.{i}."
        shapes[f"{layer}self_attn.q_proj.weight"] = (2048, 2048)
        shapes[f"{layer}self_attn.k_proj.weight"] = (256, 2048)
        shapes[f"{layer}mlp.gate_proj.weight"] = (16_384, 2048)
        shapes[f"{convert_pi.EXPERT}model.layers.{i}.mlp.gate_proj.weight"] = (4096, 1024)
    return shapes


def pi_plan(kind: str) -> Plan:
    norms, words = PI_NORMS[kind]
    mapping = {"STATE": norms, "ACTION": norms}
    declared: dict[str, Any] = PI | {"type": kind, "tokenizer_max_length": words, "normalization_mapping": mapping}
    return convert_pi.lerobot_plan(declared, weights(pi_shapes(kind)), CAMERAS, Given())


def plan_of(kind: str, folder: Path) -> Plan:
    return smolvla_plan(folder) if kind == "smolvla" else pi_plan(kind)


@pytest.mark.parametrize("robot", ["so101", "libero"])
@pytest.mark.parametrize(("kind", "name"), [("smolvla", "smolvlm2"), ("pi0", "pi0"), ("pi05", "pi05")])
def test_training_may_start_from_the_public_weights(kind: str, name: str, robot: str, tmp_path: Path) -> None:
    ours = config.load(TrainConfig, ROOT / f"configs/sft_{robot}_{name}_flow.yaml").policy
    given = plan_of(kind, tmp_path).policy
    free = (*sft.FREE_AT_INIT, *sft.ADDED_AT_INIT, "normalization")
    different = [
        (key, there, here)
        for key, there, here in differences(config.to_data(given), config.to_data(ours))
        if not any(key == f or key.startswith(f"{f}.") for f in free)
    ]
    assert not different


def test_real_sizes(tmp_path: Path) -> None:
    text, vision = (pi_plan("pi05").backbone[part] for part in ("text_config", "vision_config"))
    assert (text["head_dim"], text["num_key_value_heads"], text["num_hidden_layers"]) == (256, 1, 18)
    assert (vision["image_size"], vision["num_hidden_layers"]) == (224, 27)
    mixing = pi_shapes("pi05") | {"gate_out_proj.weight": (1, 1024)}
    moh = convert_pi.openpi_plan({}, weights(mixing), CAMERAS, Given(horizons=(3, 6, 9)))
    assert moh.policy.expert.first_position == 3 * 256 + 200
    backbone = smolvla_plan(tmp_path)
    assert backbone.backbone["text_config"]["num_hidden_layers"] == 16
    assert backbone.policy.backbone.dtype == "bf16", "frozen, and stored so"
