"""SmolVLM and SmolVLM2 in SmolVLA's layout."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import SmolVLMConfig as HFConfig

from vla.backbone_config import TinyVLM
from vla.backbones.base import Backbone, Prefix, bidirectional, dtype_of, present, scatter
from vla.errors import UsageError


class SmolVLM(Backbone):
    """Image tokens, then text, all seeing one another.

    Image and text embeddings are scaled by sqrt(width), as the public SmolVLA weights expect.
    """

    @property
    def text(self) -> Any:
        return self.model.text_model

    def parts(self) -> dict[str, nn.Module]:
        return {"vision": self.model.vision_model, "connector": self.model.connector, "text": self._text_part()}

    def vision_blocks(self) -> Iterable[nn.Module]:
        return self.model.vision_model.encoder.layers

    def require_image_size(self, image_size: int) -> None:
        vision = self.hf_config.vision_config
        step = vision.patch_size * self.hf_config.scale_factor
        if image_size % step or image_size > vision.image_size:
            raise UsageError(
                f"policy.image_size is {image_size}; this SmolVLM takes multiples of {step} up to {vision.image_size}."
            )

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self.text.embed_tokens(ids) * math.sqrt(self.width)

    def _prefix(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Prefix:
        text = self.embed_tokens(tokens)
        image_tokens = self._embed_images(images, image_mask) if image_mask.shape[1] else text[:, :0]
        return bidirectional(image_tokens * math.sqrt(self.width), image_mask, text, token_mask)

    def _embed_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        vision, connector = self.model.vision_model, self.model.connector
        pixels = present(images, image_mask).to(dtype_of(vision)) / 127.5 - 1.0  # SigLIP's range
        seen = vision(pixel_values=pixels).last_hidden_state
        return scatter(connector(seen.to(dtype_of(connector))), image_mask)


def tiny_hf_config(tiny: TinyVLM, image_size: int, vocab_size: int) -> HFConfig:
    """A SmolVLM of the given sizes. Padding and image ids stand in both configs, as the classes expect."""
    if image_size % (tiny.patch * tiny.pixel_shuffle) or tiny.width % tiny.heads:
        raise UsageError(
            f"policy.backbone.tiny: image_size {image_size} must be a multiple of patch x pixel_shuffle "
            f"({tiny.patch * tiny.pixel_shuffle}), and width {tiny.width} of heads {tiny.heads}."
        )
    common = {"hidden_size": tiny.width, "num_attention_heads": tiny.heads, "intermediate_size": tiny.mlp}
    return HFConfig.from_dict(
        dict(
            vision_config={
                **common,
                "num_hidden_layers": tiny.vision_layers,
                "image_size": image_size,
                "patch_size": tiny.patch,
            },
            text_config={
                **common,
                "model_type": "llama",
                "num_hidden_layers": tiny.text_layers,
                "num_key_value_heads": tiny.heads,
                "head_dim": tiny.width // tiny.heads,
                "vocab_size": vocab_size,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": None,
            },
            scale_factor=tiny.pixel_shuffle,
            image_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )
