"""Attention for the text models of transformers that reads from and writes to a prefix cache.

Axes: B batch, K key-value heads, P tokens before, T tokens now, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vla.layers import attend

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


def _recording_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    recorder: Recorder = kwargs["recorder"]
    keys, values = recorder.add(module.layer_idx, key, value)
    return attend(query, keys, values, attention_mask, kwargs["scaling"], kwargs.get("softcap")), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _recording_attention)
