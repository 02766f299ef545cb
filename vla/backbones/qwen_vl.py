"""Qwen2.5-VL and Qwen3-VL as they were trained: causal, with rotary positions of time, row and column.

Axes: R pictures that are there, G side of a picture in tokens, M = G*G tokens of a picture, N = M + 2 with its marks.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vla.backbone_config import BackboneConfig, TinyQwenVL
from vla.backbones.base import Backbone, Prefix, Reads, dtype_of, present, scatter
from vla.cache import positions_of
from vla.errors import UsageError

# model_type -> mean and standard deviation of pixels in 0..1, as the public files' processors say.
PIXELS = {
    "qwen2_5_vl": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "qwen3_vl": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}


class QwenVL(Backbone):
    """Pictures between their start and end marks, then text; every token sees the valid ones before it.

    A picture's tokens share one time and count their rows and columns from it; what follows continues after the
    largest position. In Qwen3-VL features of earlier vision layers are added after the first text layers.
    """

    def __init__(self, model: nn.Module, lm_head: nn.Linear | None, settings: BackboneConfig, reads: Reads) -> None:
        super().__init__(model, lm_head, settings, reads)
        for merger in self._mergers():
            merger.register_forward_pre_hook(_to_own_dtype)

    @property
    def text(self) -> Any:
        return self.model.language_model

    def parts(self) -> dict[str, nn.Module]:
        visual = self.model.visual
        positions = [visual.pos_embed] if hasattr(visual, "pos_embed") else []
        vision = nn.ModuleList([visual.patch_embed, *positions, visual.blocks])
        return {"vision": vision, "connector": nn.ModuleList(self._mergers()), "text": self._text_part()}

    def vision_blocks(self) -> Iterable[nn.Module]:
        return self.model.visual.blocks

    def require_image_size(self, image_size: int) -> None:
        vision = self.hf_config.vision_config
        step = vision.patch_size * vision.spatial_merge_size
        if image_size % step:
            raise UsageError(f"policy.image_size is {image_size}; this Qwen-VL takes multiples of {step}.")

    def _mergers(self) -> list[nn.Module]:
        """What brings vision features to the text model's width: the last layer's, then deepstack's."""
        visual = self.model.visual
        return [visual.merger, *getattr(visual, "deepstack_merger_list", ())]

    def _unused(self) -> Iterable[nn.Parameter]:
        yield from super()._unused()
        for merger in self._mergers()[len(self.text.layers) :]:  # added after layers that are not there
            yield from merger.parameters()

    def _prefix(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Prefix:
        text = self.embed_tokens(tokens)
        seen, additions, side = text[:, :0], [], 0
        if image_mask.shape[1]:
            features, side = self._embed_images(images, image_mask)
            marks = torch.tensor([self.hf_config.vision_start_token_id, self.hf_config.vision_end_token_id])
            start, end = self.embed_tokens(marks.to(tokens.device))
            seen = self._between(features[0], image_mask, start, end).to(text.dtype)
            nothing = torch.zeros_like(start)
            additions = [
                F.pad(self._between(x, image_mask, nothing, nothing).to(text.dtype), (0, 0, 0, text.shape[1]))
                for x in features[1:]
            ]
        count = seen.shape[1] // max(image_mask.shape[1], 1)
        valid = torch.cat((image_mask.repeat_interleave(count, dim=1), token_mask), dim=1)
        length = valid.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=valid.device)  # padding too: attending to nothing is NaN
        taken = image_mask.sum(dim=1) * (side + 2)  # positions, by the pictures
        text_positions = (taken[:, None] + positions_of(token_mask)).expand(3, -1, -1)
        return Prefix(
            embeddings=torch.cat((seen, text), dim=1),
            valid=valid,
            mask=(before & valid[:, None, None, :]) | itself,
            positions=torch.cat((picture_positions(image_mask, side), text_positions), dim=2),
            next_position=taken + token_mask.sum(dim=1),
            additions=additions,
        )

    def _embed_images(self, images: Tensor, image_mask: Tensor) -> tuple[list[Tensor], int]:
        """Features (R, M, E) of the last vision layer and of deepstack's, and G."""
        vision = self.hf_config.vision_config
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in PIXELS[self.hf_config.model_type])
        pixels = (present(images, image_mask).float() / 255 - mean) / std
        count, cells = len(pixels), pixels.shape[-1] // vision.patch_size
        patches = to_patches(pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        grid = torch.tensor([[1, cells, cells]], device=images.device).expand(count, 3)
        out = self.model.visual(patches.to(dtype_of(self.model.visual.patch_embed)), grid_thw=grid)
        features = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        return [x.unflatten(0, (count, -1)) for x in features], cells // vision.spatial_merge_size

    def _between(self, features: Tensor, image_mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Features (R, M, E) and marks (E,) -> (B, V*N, E)."""
        rows, cameras = image_mask.shape
        everywhere = scatter(features, image_mask).unflatten(1, (cameras, -1))  # (B, V, M, E)
        first, last = (x.to(everywhere.dtype).expand(rows, cameras, 1, -1) for x in (start, end))
        return torch.cat((first, everywhere, last), dim=2).flatten(1, 2)

    def _tables(self, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return super()._tables(embeddings, positions if positions.ndim == 3 else positions.expand(3, -1, -1))

    def _key_tables(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if tables[0].ndim == 3:  # Qwen3-VL mixes time, row and column when it makes the tables
            return tables
        sections = self.text.config.rope_parameters["mrope_section"] * 2
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))], dim=-1) for table in tables
        )
        return cos, sin


def to_patches(pixels: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """(R, 3, h, w) -> (R * patches, 3 * frames * patch * patch), the patches of one token behind one another.

    A picture is a film of `frames` equal frames, as the vision tower was trained.
    """
    cells = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))  # (R, 3, G, m, p, G, m, p)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (R, G, G, m, m, 3, p, p)
    return cells.unsqueeze(6).expand(*(-1,) * 6, frames, -1, -1).flatten(5).flatten(0, 4)


def picture_positions(image_mask: Tensor, side: int) -> Tensor:
    """Cameras that are there (B, V) -> time, row and column (3, B, V*N) of each camera's marks and G x G tokens.

    A camera takes G + 2 positions, none when it is absent.
    """
    device = image_mask.device
    cell = torch.arange(side, device=device)
    grid = torch.stack(
        (
            torch.zeros(side * side, dtype=torch.int64, device=device),
            cell.repeat_interleave(side),
            cell.repeat(side),
        )
    )
    mark = torch.zeros(3, 1, dtype=torch.int64, device=device)
    within = torch.cat((mark, grid + 1, mark + side + 1), dim=1)  # (3, N)
    start = (image_mask.long().cumsum(dim=1) - image_mask.long()) * (side + 2)  # (B, V)
    return (start[None, :, :, None] + within[:, None, None, :]).flatten(2)


def _to_own_dtype(merger: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype_of(merger)) for x in args)


def tiny_hf_config(tiny: TinyQwenVL, image_size: int, vocab_size: int) -> Qwen2_5_VLConfig | Qwen3VLConfig:
    """A Qwen-VL of the given sizes; its four special ids stand behind the tokenizer's."""
    merge, head_dim = 2, tiny.width // tiny.heads
    if image_size % (tiny.patch * merge) or tiny.width % (4 * tiny.heads) or tiny.heads % tiny.kv_heads:
        raise UsageError(
            f"policy.backbone.tiny: image_size {image_size} must be a multiple of 2 x patch ({tiny.patch * merge}), "
            f"width {tiny.width} of 4 x heads, and heads {tiny.heads} of kv_heads {tiny.kv_heads}."
        )
    third = head_dim // 6
    own: dict[str, Any] = {
        "qwen2_5_vl": {"window_size": 2 * merge * tiny.patch, "fullatt_block_indexes": [tiny.vision_layers - 1]},
        "qwen3_vl": {
            "num_position_embeddings": (image_size // tiny.patch) ** 2,
            "deepstack_visual_indexes": list(range(min(tiny.vision_layers, tiny.text_layers) - 1)),
        },
    }
    config: type[Any] = {"qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}[tiny.model]
    return config.from_dict(
        dict(
            vision_config={
                "depth": tiny.vision_layers,
                "hidden_size": tiny.width,
                "intermediate_size": tiny.mlp,
                "num_heads": tiny.heads,
                "patch_size": tiny.patch,
                "spatial_merge_size": merge,
                "out_hidden_size": tiny.width,
                **own[tiny.model],
            },
            text_config={
                "hidden_size": tiny.width,
                "intermediate_size": tiny.mlp,
                "num_hidden_layers": tiny.text_layers,
                "num_attention_heads": tiny.heads,
                "num_key_value_heads": tiny.kv_heads,
                "head_dim": head_dim,
                "vocab_size": vocab_size + 4,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [head_dim // 2 - 2 * third, third, third],
                },
            },
            vision_start_token_id=vocab_size,
            vision_end_token_id=vocab_size + 1,
            image_token_id=vocab_size + 2,
            video_token_id=vocab_size + 3,
            tie_word_embeddings=True,
        )
    )
