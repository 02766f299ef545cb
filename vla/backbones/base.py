"""Images and an instruction -> PrefixCache, by a Hugging Face VLM: what all families share.

Axes: B batch, V cameras, P prefix tokens, M tokens after the prefix, T text tokens, E embedding width,
K key-value heads, D head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbone_config import BackboneConfig
from vla.backbones.attention import NAME, Recorder
from vla.cache import CacheShape, PrefixCache, positions_of, rotate
from vla.errors import CheckpointError

Reads = Literal["cache", "hidden", "tokens"]
"""What a policy takes from a backbone: keys and values only, final hidden states too (`extend`), or token logits too.

It decides which weights of the last layers are trained: those that nothing reads would get no gradient.
"""

# The weights of the last text layer that `encode` uses.
ENCODING = ("input_layernorm.", "self_attn.k_proj.", "self_attn.v_proj.", "self_attn.k_norm.")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Prefix:
    """The tokens of one batch of observations, ready for the text model."""

    embeddings: Tensor  # (B, P, E)
    valid: Tensor  # (B, P) bool, false for padding and absent cameras
    mask: Tensor  # (B, 1, P or 1, P) bool: which tokens each token sees
    positions: Tensor  # (B, P) int64, or (3, B, P): time, row and column
    next_position: Tensor  # (B,) int64
    additions: Sequence[Tensor] = ()  # (B, P, E) each, added after text layer 0, 1, ... (Qwen3-VL's deepstack)


class Backbone(nn.Module, ABC):
    """A VLM whose text layers leave their keys and values for an action expert.

    In `encode` the last text layer contributes only its keys and values; its attention output and MLP are never
    computed. `extend` runs further tokens through all layers.

    Parts named in `settings.freeze` do not train and are held in `settings.dtype`; whatever trains is held in
    float32, since an optimizer's small steps vanish in bfloat16.
    """

    model: Any  # transformers' own annotations do not cover its parts

    def __init__(self, model: nn.Module, lm_head: nn.Linear | None, settings: BackboneConfig, reads: Reads) -> None:
        """`lm_head` is None where the logits use the embedding matrix, or nothing reads them."""
        super().__init__()
        self.model = model
        self.hf_config: Any = self.model.config
        self.reads: Reads = reads
        if lm_head is not None:
            self.lm_head = lm_head
        self._require_plain_rope()
        self._truncate(settings.text_layers)
        self.text.set_attn_implementation(NAME)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.freeze_unused()
        for name in settings.freeze:
            for parameter in self.parts()[name].parameters():  # not buffers: rotary frequencies stay float32
                parameter.requires_grad = False
                parameter.data = parameter.data.to(DTYPES[settings.dtype])

    @property
    @abstractmethod
    def text(self) -> Any:
        """The text model: `embed_tokens`, `layers`, `norm`, `rotary_emb`."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Parts that can be frozen or given their own learning rate: "vision", "connector", "text"."""

    @abstractmethod
    def vision_blocks(self) -> Iterable[nn.Module]:
        """The layers of the vision tower."""

    @abstractmethod
    def require_image_size(self, image_size: int) -> None:
        """Raise `UsageError` unless square pictures of this side can be encoded."""

    @abstractmethod
    def _prefix(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Prefix:
        """Embed; arguments as `encode`, without cameras that no row has (V may be 0)."""

    @property
    def width(self) -> int:
        """E, of embeddings and hidden states."""
        return self.text.config.hidden_size

    @property
    def shape(self) -> CacheShape:
        text = self.text.config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return CacheShape(
            layers=len(self.text.layers),
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            rope_theta=float(text.rope_parameters["rope_theta"]),
            scale=float(self.text.layers[0].self_attn.scaling),
            softcap=getattr(text, "attn_logit_softcapping", None),
        )

    def blocks(self) -> list[nn.Module]:
        """Modules whose weights are used only inside their own `forward`, so that FSDP2 may free them outside it.

        The last text layer gives its keys and values outside of it and stays in the root unit.
        """
        return [*self.vision_blocks(), *self.text.layers[:-1]]

    def encode(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Encode one observation per row.

        Args:
            images: (B, V, h, w, 3) uint8 RGB, squares of a side that `require_image_size` allows.
            image_mask: (B, V) bool; absent cameras are not encoded, and a camera that no row has takes no tokens.
            tokens: (B, T) int64.
            token_mask: (B, T) bool.
        """
        there = image_mask.any(dim=0)
        if not bool(there.all()):
            images, image_mask = images[:, there], image_mask[:, there]
        prefix = self._prefix(images, image_mask, tokens, token_mask)
        recorder, last = Recorder(), self.text.layers[-1]
        tables = self._tables(prefix.embeddings, prefix.positions)
        hidden = prefix.embeddings
        for i, layer in enumerate(self.text.layers[:-1]):
            hidden = layer(hidden, attention_mask=prefix.mask, position_embeddings=tables, recorder=recorder)
            if i < len(prefix.additions):
                hidden = hidden + prefix.additions[i]
        keys, values = self._keys_and_values(last.self_attn, last.input_layernorm(hidden), tables)
        recorder.add(len(self.text.layers) - 1, keys, values)
        keys, values = recorder.collected()
        return PrefixCache(keys, values, prefix.valid, prefix.next_position)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """(B, M) int64 -> (B, M, E), scaled as this family's text is."""
        return self.text.embed_tokens(ids)

    def extend(self, cache: PrefixCache, embeddings: Tensor, own: Tensor, valid: Tensor) -> tuple[PrefixCache, Tensor]:
        """Run more tokens after what is cached, through all layers.

        Args:
            embeddings: (B, M, E).
            own: (M, M) bool; entry (i, j): token i sees token j. Each sees itself and every valid entry of the cache.
            valid: (B, M) bool; false entries are padding, which no other token sees.

        Returns:
            The cache with these tokens behind its own, and their final hidden states (B, M, E), normed.
        """
        embeddings = embeddings.to(dtype_of(self.text))
        count, within = valid.shape[1], positions_of(valid)
        itself = torch.eye(count, dtype=torch.bool, device=valid.device)
        among = (own & valid[:, None, None, :]) | itself
        mask = torch.cat((cache.valid[:, None, None, :].expand(-1, -1, count, -1), among), dim=-1)
        both = torch.cat((cache.valid, valid), dim=1)
        behind = (cache.valid.sum(dim=1, keepdim=True) + within)[:, :, None] - positions_of(both)[:, None, :]
        tables = self._tables(embeddings, cache.next_position[:, None] + within)
        recorder, hidden = Recorder(tuple(zip(cache.keys, cache.values, strict=True))), embeddings
        for i, layer in enumerate(self.text.layers):
            window = self._window(i)
            seen = mask if window is None else mask & (behind < window)[:, None]
            hidden = layer(hidden, attention_mask=seen, position_embeddings=tables, recorder=recorder)
        keys, values = recorder.collected()
        next_position = cache.next_position + valid.sum(dim=1)
        return replace(cache, keys=keys, values=values, valid=both, next_position=next_position), self.text.norm(hidden)

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (B, M, E) -> scores of the next token (B, M, vocabulary)."""
        if self.reads != "tokens":
            raise ValueError(f"this backbone was built to give {self.reads!r}, not 'tokens'")
        if self.hf_config.tie_word_embeddings:
            return F.linear(hidden, self.text.embed_tokens.weight)
        return self.lm_head(hidden)

    def _tables(self, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.text.rotary_emb(embeddings, position_ids=positions)

    def _key_tables(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin (B, P, D) that rotate the keys, from what `_tables` gives."""
        return tables

    def _window(self, layer: int) -> int | None:
        """How many tokens back this text layer sees, itself included; None: all."""
        return None

    def _keys_and_values(self, attention: Any, hidden: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        split = (*hidden.shape[:-1], -1, attention.head_dim)
        keys = attention.k_proj(hidden).view(split)
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        values = attention.v_proj(hidden).view(split).transpose(1, 2)
        return rotate(keys.transpose(1, 2), self._key_tables(tables)), values

    def _require_plain_rope(self) -> None:
        kind = self.text.config.rope_parameters.get("rope_type", "default")
        if kind != "default":
            raise CheckpointError(
                f"This backbone stretches its rotary positions by the rule {kind!r}, which the action expert does not "
                "follow. Use a configuration with rope_type 'default': a prefix is far shorter than the trained length."
            )

    def _truncate(self, text_layers: int | None) -> None:
        there = len(self.text.layers)
        if text_layers is None or text_layers == there:
            return
        if not 1 <= text_layers <= there:
            raise CheckpointError(
                f"policy.backbone.text_layers is {text_layers}; this backbone has {there}: choose 1..{there}."
            )
        self.text.layers = self.text.layers[:text_layers]
        for config in (self.text.config, self.hf_config.text_config):
            config.num_hidden_layers = text_layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:text_layers]

    def freeze_unused(self) -> None:
        """Mark what nothing reads as not to be trained; again after modules were put in (adapters)."""
        for parameter in self._unused():
            parameter.requires_grad = False

    def _unused(self) -> Iterable[nn.Parameter]:
        """Weights that no gradient ever reaches."""
        if self.reads == "cache":
            for name, parameter in self.text.layers[-1].named_parameters():
                if not name.startswith(ENCODING):
                    yield parameter
            yield from self.text.norm.parameters()

    def _text_part(self) -> nn.Module:
        return nn.ModuleList([self.text, self.lm_head]) if hasattr(self, "lm_head") else self.text


def dtype_of(part: nn.Module) -> torch.dtype:
    """Of a part's weights: parts may differ, so what enters one is cast to its own."""
    return next(part.parameters()).dtype


def present(images: Tensor, image_mask: Tensor) -> Tensor:
    """(B, V, h, w, 3) uint8 and (B, V) bool -> the pictures that are there, (R, 3, h, w) in 0..255."""
    return images.flatten(0, 1)[image_mask.flatten()].permute(0, 3, 1, 2)


def scatter(features: Tensor, image_mask: Tensor) -> Tensor:
    """Tokens (R, M, E) of the pictures that are there -> (B, V*M, E), zeros for those that are not."""
    rows, cameras = image_mask.shape
    everywhere = features.new_zeros(rows * cameras, *features.shape[1:])
    everywhere[image_mask.flatten()] = features
    return everywhere.view(rows, cameras * features.shape[1], features.shape[2])


def bidirectional(image_tokens: Tensor, image_mask: Tensor, text: Tensor, token_mask: Tensor) -> Prefix:
    """Images (B, V*M, E), then text (B, T, E): every token sees every valid token; positions count the valid ones."""
    per_camera = image_tokens.shape[1] // max(image_mask.shape[1], 1)
    valid = torch.cat((image_mask.repeat_interleave(per_camera, dim=1), token_mask), dim=1)
    return Prefix(
        embeddings=torch.cat((image_tokens.to(text.dtype), text), dim=1),
        valid=valid,
        mask=valid[:, None, None, :],
        positions=positions_of(valid),
        next_position=valid.sum(dim=1),
    )
