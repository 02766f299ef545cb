"""Which VLM encodes the observation, from where, and what of it learns. No torch."""

from dataclasses import dataclass
from typing import Literal, Protocol

from vla.errors import UsageError

Part = Literal["vision", "connector", "text"]
Dtype = Literal["fp32", "bf16"]  # of the frozen parts' weights; what trains is held in fp32


class _Settings(Protocol):
    @property
    def weights(self) -> str | None: ...
    @property
    def tiny(self) -> object: ...
    @property
    def freeze(self) -> tuple[Part, ...]: ...
    @property
    def dtype(self) -> Dtype: ...


def _require_consistent(settings: _Settings) -> None:
    if (settings.weights is None) == (settings.tiny is None):
        raise UsageError("policy.backbone: give either 'weights' (folder or hub id) or 'tiny' (sizes), not both.")
    if settings.dtype == "bf16" and not settings.freeze:
        raise UsageError(
            "policy.backbone.dtype 'bf16' is for frozen parts and policy.backbone.freeze is empty: name parts to "
            "freeze or say 'fp32'. Compute in bf16 with fp32 weights is compute.precision."
        )


@dataclass(frozen=True)
class TinyVLM:
    """Sizes of a small SmolVLM built from random weights: same classes, nothing downloaded."""

    width: int  # of the vision tower and of the text model
    vision_layers: int
    text_layers: int
    heads: int  # query heads; one key-value head for each
    mlp: int
    patch: int  # pixels
    pixel_shuffle: int  # a square of this side of patches becomes one token


@dataclass(frozen=True)
class SmolVLMConfig:
    """SmolVLM2 as prefix encoder (SmolVLA's layout: images, then text, bidirectional)."""

    kind: Literal["smolvlm"]
    weights: str | None  # checkpoint folder or hub id with weights and tokenizer; null: `tiny` at random
    tiny: TinyVLM | None  # sizes used when `weights` is null
    text_layers: int | None  # keep this many text layers of a pretrained model; null: all
    freeze: tuple[Part, ...]
    gradient_checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    dtype: Dtype = "fp32"  # of the frozen parts' weights

    def __post_init__(self) -> None:
        _require_consistent(self)


@dataclass(frozen=True)
class TinyPaliGemma:
    """Sizes of a small PaliGemma built from random weights."""

    text: Literal["gemma", "gemma2"]  # PaliGemma 1 or 2
    width: int  # of the vision tower and of the text model
    vision_layers: int
    text_layers: int
    heads: int  # query heads; one key-value head
    head_dim: int
    mlp: int
    patch: int  # pixels


@dataclass(frozen=True)
class PaliGemmaConfig:
    """PaliGemma 1 or 2 as prefix encoder (pi0's layout: images, then text, bidirectional)."""

    kind: Literal["paligemma"]
    weights: str | None  # as in SmolVLMConfig, and so below
    tiny: TinyPaliGemma | None
    text_layers: int | None
    freeze: tuple[Part, ...]
    gradient_checkpointing: bool = False
    dtype: Dtype = "fp32"

    def __post_init__(self) -> None:
        _require_consistent(self)


@dataclass(frozen=True)
class TinyQwenVL:
    """Sizes of a small Qwen-VL built from random weights."""

    model: Literal["qwen2_5_vl", "qwen3_vl"]
    width: int  # of the vision tower and of the text model
    vision_layers: int
    text_layers: int
    heads: int
    kv_heads: int  # of the text model
    mlp: int
    patch: int  # pixels; a square of 2 x 2 patches becomes one token


@dataclass(frozen=True)
class QwenVLConfig:
    """Qwen2.5-VL or Qwen3-VL as prefix encoder: images, then text, causal as they were trained."""

    kind: Literal["qwen_vl"]
    weights: str | None
    tiny: TinyQwenVL | None
    text_layers: int | None
    freeze: tuple[Part, ...]
    gradient_checkpointing: bool = False
    dtype: Dtype = "fp32"

    def __post_init__(self) -> None:
        _require_consistent(self)


BackboneConfig = SmolVLMConfig | PaliGemmaConfig | QwenVLConfig
