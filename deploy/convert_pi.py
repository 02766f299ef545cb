"""pi0 and pi0.5: LeRobot's folders, openpi's PyTorch export, and the released mixture of horizons on it.

All share their weights' names. The PaliGemma is described by the weights' shapes: every release has eight query
heads, and its vision tower sixteen.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.convert_lerobot import freeze_of, normalization_of, require, square
from deploy.convert_plan import Given, Plan, Rule
from deploy.convert_source import Weights
from vla.backbone_config import PaliGemmaConfig, Part
from vla.errors import CheckpointError, UsageError
from vla.head_config import FlowConfig
from vla.policy_config import ExpertConfig, MixtureConfig, PolicyConfig

HEADS, VISION_HEADS, EPS = 8, 16, 1e-6
OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # always three places, absent ones masked
VLM, EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
EMBEDDING, LM_HEAD = f"{VLM}model.language_model.embed_tokens.weight", f"{VLM}lm_head.weight"
VISION = f"{VLM}model.vision_tower.vision_model."
WEIGHTS = "google/paligemma-3b-pt-224"
_VLM, _EXPERT = VLM.replace(".", r"\."), EXPERT.replace(".", r"\.")

_NORMS = rf"{_EXPERT}model\.((?:layers\.\d+\.(?:input|post_attention)_layernorm|norm)\.weight)"
RULES = (
    Rule(rf"{_VLM}model\.(.+)", r"backbone.model.\1"),
    Rule(rf"{_EXPERT}model\.(layers\.\d+)\.self_attn\.(.+)", r"expert.\1.\2"),
    Rule(rf"{_EXPERT}model\.(layers\.\d+\.mlp\..+)", r"expert.\1"),
    Rule(r"(action_(?:in|out)_proj)\.(weight|bias)", r"head.\1.\2"),
    Rule(r"(?:action_)?time_mlp_(in|out)\.(weight|bias)", r"head.time_input.mlp_\1.\2"),
    Rule(r"(gate_out_proj|gate_noise_layer)\.(weight|bias)", r"gate.\1.\2"),
    Rule(rf"{_EXPERT}lm_head\.weight", None, "the expert writes no text"),
)
PI0 = (
    Rule(_NORMS, r"expert.\1", "the norm multiplies by 1 + w there, by w here", "one_plus"),
    Rule(r"state_proj\.(weight|bias)", r"fresh.state_proj.\1"),
)
PI05 = (
    Rule(rf"{_EXPERT}model\.(.+\.dense\.(?:weight|bias))", r"expert.\1"),
    Rule(_NORMS, None, "pi0.5 norms by the time, and has no such weight"),
    Rule(r"state_proj\.(weight|bias)", None, "pi0.5 reads the state in its prompt"),
)
TIED = Rule(LM_HEAD.replace(".", r"\."), None, "the policy writes no text")
UNTIED = Rule(LM_HEAD.replace(".", r"\."), "backbone.model.language_model.embed_tokens.weight", "one matrix, two names")

DEFAULTS: dict[str, Any] = {  # what config.json leaves out
    "use_relative_actions": False,
    "train_expert_only": False,
    "freeze_vision_encoder": False,
    "min_period": 4e-3,
    "max_period": 4.0,
}


def lerobot_plan(declared: Mapping[str, Any], weights: Weights, cameras: Sequence[str], given: Given) -> Plan:
    """What becomes of a LeRobot folder of type pi0 or pi05, `declared` being its config.json.

    Raises:
        CheckpointError: it uses what this policy does not have.
    """
    declared = DEFAULTS | dict(declared)
    for key, allowed in (("use_relative_actions", (False,)), ("min_period", (4e-3,)), ("max_period", (4.0,))):
        require(declared, key, allowed)
    adaptive = declared["type"] == "pi05"
    _require_form(weights, adaptive)
    backbone = _backbone(weights)
    policy = PolicyConfig(
        chunk=declared["chunk_size"],
        execute=given.execute or declared["n_action_steps"],
        state_dim=declared["max_state_dim"],
        action_dim=declared["max_action_dim"],
        cameras=tuple(cameras),
        image_size=square(declared["image_resolution"], "image_resolution"),
        max_tokens=declared["tokenizer_max_length"],
        normalization=normalization_of(declared),
        state="prompt" if adaptive else "suffix",
        backbone=_settings(weights, freeze_of(declared, given)),
        expert=_expert(weights, adaptive=adaptive, first_position=None),
        head=FlowConfig("flow", "adarms" if adaptive else "concat", declared["num_inference_steps"], 1.0, 1),
    )
    return Plan(policy, backbone, _rules(weights, adaptive))


def openpi_plan(declared: Mapping[str, Any], weights: Weights, cameras: Sequence[str], given: Given) -> Plan:
    """What becomes of openpi's PyTorch export, or of a mixture of horizons trained in it.

    Args:
        declared: config.json of the export; {} of a training run, which writes none.

    Raises:
        UsageError: the source does not say how long its chunks are, or which horizons it mixes.
    """
    adaptive = "time_mlp_in.weight" in weights.shapes
    mixing = "gate_out_proj.weight" in weights.shapes
    backbone = _backbone(weights)
    vision = backbone["vision_config"]
    max_tokens = 200 if adaptive else 48
    padded = len(OPENPI_CAMERAS) * (vision["image_size"] // vision["patch_size"]) ** 2 + max_tokens
    chunk = _chunk(declared, given, mixing=mixing)
    mixture = None
    if mixing:
        noise = "learned" if "gate_noise_layer.weight" in weights.shapes else "none"
        mixture = MixtureConfig(given.horizons, noise, 1.0, 1e-3, None)
    time = "adarms" if adaptive else "concat"
    policy = PolicyConfig(
        chunk=chunk,
        execute=given.execute or chunk,
        state_dim=32,
        action_dim=weights.shape("action_in_proj.weight")[1],
        cameras=tuple(cameras),
        image_size=vision["image_size"],
        max_tokens=max_tokens,
        normalization="quantile" if adaptive else "mean_std",
        state=(given.state or "prompt") if adaptive else "suffix",
        backbone=_settings(weights, given.freeze or ()),
        expert=_expert(weights, adaptive=adaptive, first_position=padded if mixing else None),
        head=FlowConfig("flow", time, 10, 1.0, 1),
        mixture=mixture,
    )
    counted = f"its code counts the padded prefix, {padded} tokens, before the first action"
    return Plan(
        policy, backbone, _rules(weights, adaptive), (("first_position of the expert", counted),) if mixing else ()
    )


def _chunk(declared: Mapping[str, Any], given: Given, *, mixing: bool) -> int:
    if mixing and not given.horizons:
        raise UsageError("The weights hold a gate over horizons, but not which: give them, as in --horizons 3,6,9,12.")
    if given.horizons and not mixing:
        raise UsageError("--horizons is for a mixture of horizons, and the weights hold no gate over any.")
    chunk = declared.get("action_horizon") or given.chunk or (given.horizons[-1] if given.horizons else None)
    if chunk is None:
        raise UsageError("The source has no config.json that says how many steps a chunk has: give --chunk N.")
    return int(chunk)


def _require_form(weights: Weights, adaptive: bool) -> None:  # noqa: FBT001
    has = "time_mlp_in.weight" in weights.shapes or f"{EXPERT}model.norm.dense.weight" in weights.shapes
    if has != adaptive:
        said, found = ("pi05", "pi0") if adaptive else ("pi0", "pi05")
        raise CheckpointError(f"config.json says {said!r}, the weights are those of a {found!r}.")


def _rules(weights: Weights, adaptive: bool) -> tuple[Rule, ...]:  # noqa: FBT001
    text = TIED if EMBEDDING in weights.shapes else UNTIED
    return (*RULES, text, *(PI05 if adaptive else PI0))


def _settings(weights: Weights, freeze: tuple[Part, ...]) -> PaliGemmaConfig:
    frozen = freeze and weights.are_bf16(f"{VLM}model.")
    return PaliGemmaConfig("paligemma", WEIGHTS, None, None, freeze, dtype="bf16" if frozen else "fp32")


def _expert(weights: Weights, *, adaptive: bool, first_position: int | None) -> ExpertConfig:
    return ExpertConfig(
        width=weights.shape("action_in_proj.weight")[0],
        layers=weights.layers(f"{EXPERT}model.layers."),
        mlp=weights.shape(f"{EXPERT}model.layers.0.mlp.gate_proj.weight")[0],
        attention=("joint",),
        norm="adarms" if adaptive else "rms",
        action_attention="bidirectional",
        activation="gelu_tanh",
        norm_eps=EPS,
        first_position=first_position,
    )


def _backbone(weights: Weights) -> dict[str, Any]:
    """config.json of the PaliGemma whose weights have these shapes."""
    layer = f"{VLM}model.language_model.layers.0."
    vocabulary, width = weights.shape(EMBEDDING if EMBEDDING in weights.shapes else LM_HEAD)
    head_dim = weights.shape(f"{layer}self_attn.q_proj.weight")[0] // HEADS
    patches = weights.shape(f"{VISION}embeddings.patch_embedding.weight")
    side = math.isqrt(weights.shape(f"{VISION}embeddings.position_embedding.weight")[0]) * patches[-1]
    text = {
        "model_type": "gemma",
        "hidden_size": width,
        "num_hidden_layers": weights.layers(f"{VLM}model.language_model.layers."),
        "intermediate_size": weights.shape(f"{layer}mlp.gate_proj.weight")[0],
        "num_attention_heads": HEADS,
        "num_key_value_heads": weights.shape(f"{layer}self_attn.k_proj.weight")[0] // head_dim,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "vocab_size": vocabulary,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": patches[0],
        "num_hidden_layers": weights.layers(f"{VISION}encoder.layers."),
        "intermediate_size": weights.shape(f"{VISION}encoder.layers.0.mlp.fc1.weight")[0],
        "num_attention_heads": VISION_HEADS,
        "image_size": side,
        "patch_size": patches[-1],
        "vision_use_head": False,
    }
    return {
        "model_type": "paligemma",
        "text_config": text,
        "vision_config": vision,
        "projection_dim": width,
        "hidden_size": width,
        "image_token_index": vocabulary,
        "tie_word_embeddings": True,
    }
