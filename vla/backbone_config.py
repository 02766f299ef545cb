"""Which VLM encodes the observation, from where, and what of it learns. No torch."""

from dataclasses import dataclass
from typing import Literal

from vla.errors import UsageError


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
    freeze: tuple[Literal["vision", "connector", "text"], ...]

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.tiny is None):
            raise UsageError("policy.backbone: give either 'weights' (folder or hub id) or 'tiny' (sizes), not both.")


BackboneConfig = SmolVLMConfig
