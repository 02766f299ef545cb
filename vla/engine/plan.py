"""One chunk's worth of work on buffers of fixed sizes.

Axes: B rows, G groups (samples), N horizons, H steps, T = tokens_per_step * H, W width, A action dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vla.denoiser import Prediction
from vla.engine.embedding import Embedding, Grid
from vla.engine.layers import Scoring, normed, run
from vla.engine.memory import Memory, Sizes, Span
from vla.engine.recorded import Recorded
from vla.engine.weights import FusedLayer
from vla.expert import ActionExpert
from vla.heads.base import ActionHead
from vla.horizons import HorizonGate, gate_weights
from vla.rtc import Committed
from vla.sampling import Sampled, Start, denoise


@dataclass(frozen=True)
class Model:
    """The network, and all that follows from its weights and its sampler's settings."""

    head: ActionHead
    expert: ActionExpert
    gate: HorizonGate | None
    real_dim: int  # action dimensions that are not padding
    layers: Sequence[FusedLayer]
    embedding: Embedding
    grid: Grid
    scoring: Scoring
    activation: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What changes from chunk to chunk, beside the prefix."""

    fresh: Tensor  # (B, F, W), F may be 0
    condition: Tensor | None  # (B, G, W) added to the action tokens
    start: Start
    committed: Committed | None


class Plan:
    """`groups` chunks of each row, for a prefix of at most `bucket` tokens; records itself where there is a GPU.

    Args:
        fresh: how many fresh tokens a row has.
        steps: H.
    """

    def __init__(self, model: Model, rows: int, groups: int, *, bucket: int, fresh: int, steps: int) -> None:
        self.model, self.groups = model, groups
        horizons = (steps,) if model.gate is None else model.gate.horizons
        per_step = model.head.tokens_per_step
        lengths = [h * per_step for h in horizons] * groups
        self.memory = Memory(model.expert, model.layers, Sizes(rows, bucket, fresh, tuple(lengths)))
        device = self.memory.keys[0].device
        self._spread = torch.arange(steps * groups, device=device).repeat_interleave(per_step)  # tokens' steps
        self._pack = self._unpack = None
        if model.gate is not None:
            self._pack, self._unpack = (x.to(device) for x in _packing(horizons, groups, per_step))
        self._recorded: Recorded[Inputs, Sampled] | None = None

    def __call__(self, inputs: Inputs) -> Sampled:
        """Chunks behind the prefix that `memory` holds."""
        if inputs.fresh.device.type != "cuda":
            return self._sample(inputs)
        with torch.cuda.device(inputs.fresh.device):
            if self._recorded is None:
                self._recorded = Recorded(self._sample, inputs)
            return self._recorded(inputs)

    def _sample(self, inputs: Inputs) -> Sampled:
        model, committed = self.model, inputs.committed
        if inputs.fresh.shape[1]:
            self._run(inputs.fresh.flatten(0, 1), self.memory.fresh, index=-1)
        held = None if committed is None else self._packed(committed.held(self.groups).flatten(1)[:, self._spread])
        step = partial(self._step, inputs.condition, None if held is None else held.flatten())
        return denoise(model.head, step, inputs.start, model.real_dim, committed)

    def _step(
        self, condition: Tensor | None, held_tokens: Tensor | None, state: Tensor, index: int, held: Tensor | None
    ) -> Prediction:
        tokens = self.model.embedding(state, self.model.grid.clock_at(index, held))
        if condition is not None:
            tokens = tokens + condition[:, :, None]
        packed = self._packed(tokens.flatten(1, 2))
        hidden = self._run(packed.flatten(0, 1), self.memory.actions, index, held_tokens)
        return self._read(hidden.unflatten(0, packed.shape[:2]))

    def _run(self, x: Tensor, span: Span, index: int, held: Tensor | None = None) -> Tensor:
        """Tokens (R, W) -> hidden states (R, W)."""
        model = self.model
        rows = model.grid.modulations_at(index, held)
        x = run(x, self.memory, span, rows, model.activation, model.scoring)
        if rows is None:
            return model.expert.norm(x, None)[0]
        return normed(x, model.expert.norm.eps, rows[-1])

    def _packed(self, tokens: Tensor) -> Tensor:
        """(B, G*T, ...) -> (B, G * tokens of all horizons, ...)."""
        return tokens if self._pack is None else tokens.index_select(1, self._pack)

    def _read(self, hidden: Tensor) -> Prediction:
        """Hidden states of the packed tokens -> what the network says; each is read once, then laid out."""
        head, gate = self.model.head, self.model.gate
        if gate is None or self._unpack is None:
            return Prediction(head.read(hidden.unflatten(1, (self.groups, -1))))
        per_step = hidden.unflatten(1, (-1, head.tokens_per_step)).mean(2)
        shape = (self.groups, len(gate.horizons), -1)
        branches = head.read(hidden).index_select(1, self._unpack).unflatten(1, shape)
        scores = gate.scores(per_step).index_select(1, self._unpack).unflatten(1, shape)
        weights = gate_weights(scores, gate.reach)
        return Prediction(head.fuse(branches, weights), branches, weights)


def _packing(horizons: Sequence[int], groups: int, per_step: int) -> tuple[Tensor, Tensor]:
    """Which of G*T tokens stands where when the horizons are packed; which packed step is (g, n, h).

    Beyond a horizon's reach the second names its last step, which means nothing there.
    """
    longest, total = horizons[-1], sum(horizons)
    tokens = torch.cat([torch.arange(h * per_step) for h in horizons])
    steps, first = [], 0
    for h in horizons:
        steps.append(first + torch.arange(longest).clamp(max=h - 1))
        first += h
    group = torch.arange(groups)[:, None]
    pack, unpack = group * longest * per_step + tokens, group * total + torch.cat(steps)
    return pack.flatten(), unpack.flatten()
