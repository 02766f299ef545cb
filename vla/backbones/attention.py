"""Attention for the text models of transformers that reads from and writes to a prefix cache.

Axes: B batch, N query heads, K key-value heads, T queries, S keys, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "tandem_prefix"


class Recorder:
    """Keys and values of the tokens before, by text layer, and those of all tokens once the layers have run.

    A type of its own, since FSDP2 hands a layer a copy of a plain dict. A cache object of transformers would be
    dropped under gradient checkpointing; this works there too, since a recomputation merely writes equal values again.
    """

    def __init__(self, before: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.before = before  # one (B, K, P, D) pair a layer, or nothing
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Record a layer's rotated keys and values (B, K, T, D); returns all there are to attend to."""
        if self.before:
            before_keys, before_values = self.before[layer]
            keys, values = torch.cat((before_keys, keys), dim=2), torch.cat((before_values, values), dim=2)
        self.pairs[layer] = keys, values
        return keys, values

    def collected(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of all layers, in their order."""
        layers = range(len(self.pairs))
        return tuple(self.pairs[i][0] for i in layers), tuple(self.pairs[i][1] for i in layers)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(B, N, T, D), (B, K, S, D) twice, mask (B, 1, T or 1, S) bool -> (B, N, T, D).

    Args:
        scale: of the scores, before the cap.
        softcap: scores are bent to `softcap * tanh(score / softcap)` (Gemma 2); None: they are not.
    """
    grouped = keys.shape[1] != query.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
    folded = query.unflatten(1, (keys.shape[1], -1))  # (B, K, N/K, T, D)
    scores = torch.einsum("bkgtd,bksd->bkgts", folded, keys) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask[:, :, None], float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.einsum("bkgts,bksd->bkgtd", weights, values).flatten(1, 2)


def _recording_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    recorder: Recorder = kwargs["recorder"]
    keys, values = recorder.add(module.layer_idx, key, value)
    out = attend(query, keys, values, attention_mask, kwargs["scaling"], kwargs.get("softcap"))
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _recording_attention)
