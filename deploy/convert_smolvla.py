"""LeRobot's SmolVLA: `config.json` says the policy, the VLM's own `config.json` its backbone."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from deploy.convert_lerobot import freeze_of, normalization_of, require, square
from deploy.convert_plan import Given, Plan, Rule
from deploy.convert_source import Weights
from vla.backbone_config import SmolVLMConfig
from vla.errors import CheckpointError, UsageError
from vla.head_config import FlowConfig
from vla.policy_config import ExpertConfig, PolicyConfig

CROSS: tuple[Literal["cross"], ...] = ("cross",)
ROPE_THETA = 10_000.0  # LeRobot turns the VLM's own layers by this base, whatever the VLM's config.json says
DEFAULTS: dict[str, Any] = {  # what config.json leaves out
    "add_image_special_tokens": False,
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "min_period": 4e-3,
    "max_period": 4.0,
}
RULES = (
    Rule(r"vlm_with_expert\.vlm\.model\.(.+)", r"backbone.model.\1"),
    Rule(r"vlm_with_expert\.lm_expert\.(layers\.\d+)\.self_attn\.(.+)", r"expert.\1.\2"),
    Rule(r"vlm_with_expert\.lm_expert\.((?:layers\.\d+\.(?:mlp|\w+norm)\..+)|norm\.weight)", r"expert.\1"),
    Rule(r"state_proj\.(weight|bias)", r"fresh.state_proj.\1"),
    Rule(r"(action_(?:in|out)_proj)\.(weight|bias)", r"head.\1.\2"),
    Rule(r"action_time_mlp_(in|out)\.(weight|bias)", r"head.time_input.mlp_\1.\2"),
    Rule(r"vlm_with_expert\.vlm\.lm_head\.weight", None, "the policy writes no text"),
    Rule(
        r"(?:normalize_inputs|normalize_targets|unnormalize_outputs)\..+",
        None,
        "statistics as early LeRobot kept them: they come from --statistics",
    ),
)


def plan(declared: dict[str, Any], weights: Weights, cameras: Sequence[str], vlm: Path | None, given: Given) -> Plan:
    """What becomes of a SmolVLA folder.

    Args:
        declared: its config.json.
        vlm: folder with the config.json of the VLM that it was made from.

    Raises:
        UsageError: `vlm` is not given.
        CheckpointError: it uses what this policy does not have.
    """
    declared = DEFAULTS | declared
    _require_known(declared)
    every = declared["self_attn_every_n_layers"]
    crossing = "cross" in declared["attention_mode"] and every != 1
    backbone = _backbone(declared, weights, vlm)
    layers = weights.layers("vlm_with_expert.lm_expert.layers.")
    text_layers, freeze = backbone["text_config"]["num_hidden_layers"], freeze_of(declared, given)
    if layers != text_layers:
        raise CheckpointError(f"The expert has {layers} layers, the VLM {text_layers}: only as many as that are read.")
    policy = PolicyConfig(
        chunk=declared["chunk_size"],
        execute=given.execute or declared["n_action_steps"],
        state_dim=declared["max_state_dim"],
        action_dim=declared["max_action_dim"],
        cameras=tuple(cameras),
        image_size=square(declared["resize_imgs_with_padding"], "resize_imgs_with_padding"),
        max_tokens=declared["tokenizer_max_length"],
        normalization=normalization_of(declared),
        state="prefix",
        backbone=SmolVLMConfig(
            kind="smolvlm",
            weights=declared["vlm_model_name"],
            tiny=None,
            text_layers=text_layers,
            freeze=freeze,
            dtype="bf16" if freeze and weights.are_bf16("vlm_with_expert.vlm.model.") else "fp32",
        ),
        expert=ExpertConfig(
            width=weights.shape("action_in_proj.weight")[0],
            layers=layers,
            mlp=weights.shape("vlm_with_expert.lm_expert.layers.0.mlp.gate_proj.weight")[0],
            attention=("joint", *CROSS * (every - 1)) if crossing else ("joint",),
            norm="rms",
            action_attention="causal",
            norm_eps=backbone["text_config"].get("rms_norm_eps", 1e-6),
        ),
        head=FlowConfig("flow", "concat", declared["num_steps"], 1.0, 1),
        bars="top_left",
    )
    turned = f"policies of this kind turn all positions by {ROPE_THETA:g}, not as the VLM was trained"
    return Plan(policy, backbone, RULES, (("rope_theta of the backbone", turned),))


def _require_known(declared: Mapping[str, Any]) -> None:
    for key, allowed in (
        ("adapt_to_pi_aloha", (False,)),
        ("use_delta_joint_actions_aloha", (False,)),
        ("add_image_special_tokens", (False,)),
        ("attention_mode", ("cross_attn", "self_attn")),
        ("min_period", (4e-3,)),
        ("max_period", (4.0,)),
    ):
        require(declared, key, allowed)


def _backbone(declared: Mapping[str, Any], weights: Weights, vlm: Path | None) -> dict[str, Any]:
    name = declared["vlm_model_name"]
    if vlm is None:
        raise UsageError(
            f"A SmolVLA folder does not describe its VLM. Get config.json and tokenizer.json of {name} and give "
            "their folder: --vlm DIR."
        )
    try:
        data = json.loads((vlm / "config.json").read_text(encoding="utf-8"))
        text, vision = dict(data["text_config"]), data["vision_config"]
        width, head_dim = text["hidden_size"], text.get("head_dim")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{vlm / 'config.json'} is no description of a SmolVLM ({error!r}): --vlm DIR."
        ) from error
    seen = "vlm_with_expert.vlm.model.vision_model.embeddings.position_embedding.weight"
    side = math.isqrt(weights.shape(seen)[0]) * vision.get("patch_size", 1)
    made_for = weights.shape("vlm_with_expert.vlm.model.text_model.norm.weight")[0]
    if made_for != width or side != vision.get("image_size", side):
        raise CheckpointError(
            f"The weights were made from a VLM of width {made_for} for pictures of {side} pixels; that of --vlm {vlm} "
            f"has {width} and {vision.get('image_size')}. Give {name}."
        )
    for old in ("rope_theta", "rope_scaling"):
        text.pop(old, None)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_THETA}
    text["num_hidden_layers"] = weights.layers("vlm_with_expert.vlm.model.text_model.layers.")
    text["head_dim"] = head_dim or width // text["num_attention_heads"]
    return data | {"text_config": text}
