"""PaliGemma 1 and 2 in pi0's layout."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PaliGemmaConfig as HFConfig

from vla.backbone_config import TinyPaliGemma
from vla.backbones.base import Backbone, Prefix, bidirectional, dtype_of, present, scatter
from vla.errors import UsageError


class PaliGemma(Backbone):
    """Image tokens, then text, all seeing one another, numbered from 0 as in pi0.

    Text is scaled by sqrt(width) inside the embedding module of transformers, images are not scaled. What extends
    the prefix of a PaliGemma 2 sees only as far back as each layer's sliding window; the prefix itself sees all.
    """

    @property
    def text(self) -> Any:
        return self.model.language_model

    def parts(self) -> dict[str, nn.Module]:
        vision, connector = self.model.vision_tower, self.model.multi_modal_projector
        return {"vision": vision, "connector": connector, "text": self._text_part()}

    def vision_blocks(self) -> Iterable[nn.Module]:
        return self.model.vision_tower.vision_model.encoder.layers

    def require_image_size(self, image_size: int) -> None:
        side = self.hf_config.vision_config.image_size
        if image_size != side:
            raise UsageError(f"policy.image_size is {image_size}; this PaliGemma takes pictures of {side} pixels only.")

    def _prefix(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Prefix:
        text = self.embed_tokens(tokens)
        image_tokens = self._embed_images(images, image_mask) if image_mask.shape[1] else text[:, :0]
        return bidirectional(image_tokens, image_mask, text, token_mask)

    def _embed_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        vision, connector = self.model.vision_tower, self.model.multi_modal_projector
        pixels = present(images, image_mask).to(dtype_of(vision)) / 127.5 - 1.0  # SigLIP's range
        return scatter(connector(vision(pixels).last_hidden_state.to(dtype_of(connector))), image_mask)

    def _window(self, layer: int) -> int | None:
        kinds = getattr(self.text.config, "layer_types", None)
        return self.text.config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None


def tiny_hf_config(tiny: TinyPaliGemma, image_size: int, vocab_size: int) -> HFConfig:
    """A PaliGemma of the given sizes; the image id stands outside the tokenizer's vocabulary, as in the real one."""
    if image_size % tiny.patch or tiny.width % tiny.heads:
        raise UsageError(
            f"policy.backbone.tiny: image_size {image_size} must be a multiple of patch ({tiny.patch}), and width "
            f"{tiny.width} of heads {tiny.heads}."
        )
    common = {"hidden_size": tiny.width, "num_attention_heads": tiny.heads, "intermediate_size": tiny.mlp}
    return HFConfig.from_dict(
        dict(
            vision_config={
                **common,
                "model_type": "siglip_vision_model",
                "num_hidden_layers": tiny.vision_layers,
                "image_size": image_size,
                "patch_size": tiny.patch,
                "vision_use_head": False,
            },
            text_config={
                **common,
                "model_type": tiny.text,
                "num_hidden_layers": tiny.text_layers,
                "num_key_value_heads": 1,
                "head_dim": tiny.head_dim,
                "vocab_size": vocab_size + 1,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": None,
                **({"query_pre_attn_scalar": tiny.head_dim} if tiny.text == "gemma2" else {}),
            },
            projection_dim=tiny.width,
            hidden_size=tiny.width,
            image_token_index=vocab_size,
            tie_word_embeddings=True,
        )
    )
