"""What a head's network is told of a sampler's grid of noise levels, made once: its clock and the norms' rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.engine.layers import Modulation
from vla.engine.weights import modulations
from vla.expert import ActionExpert
from vla.heads.base import ActionHead
from vla.heads.flow import FlowHead
from vla.heads.time import Clock


@dataclass(frozen=True)
class Grid:
    """Tables over S + 1 noise levels: those of the sampler's steps, and that of data."""

    clock: Clock  # (S + 1, ...)
    modulations: Tensor | None  # (S + 1, 2L+1, 3, W) of adaptive norms

    @classmethod
    def of(cls, head: ActionHead, expert: ActionExpert, device: torch.device) -> "Grid":
        levels = [head.time(index) for index in range(head.steps)]
        clock = head.clock(torch.tensor([*levels, 0.0], device=device))
        if expert.config.norm != "adarms":
            return cls(clock, None)
        assert clock.rows is not None
        return cls(clock, modulations(expert, clock.rows))

    def clock_at(self, index: int, held: Tensor | None) -> Clock:
        """Of sampler step `index`; of data for the steps in `held` (B, G, H) bool."""
        clock = self.clock.at(index)
        return clock if held is None else clock.where(held, self.clock.at(-1))

    def modulations_at(self, index: int, held: Tensor | None) -> Sequence[Modulation] | None:
        """By norm; `held` (R,) bool of the expert's tokens gives rows (R, W), None one row (W,) for all."""
        if self.modulations is None:
            return None
        rows = self.modulations[index]
        if held is not None:
            rows = torch.where(held[:, None, None, None], self.modulations[-1], rows)
        return [norm.unbind(-2) for norm in rows.unbind(-3)]  # pyright: ignore[reportReturnType] (three each)


class Embedding:
    """The head's `tokens`."""

    def __init__(self, head: ActionHead) -> None:
        self.head = head

    def prepared(self, clock: Clock) -> Clock:
        """A grid's clock as this reads it."""
        return clock

    def __call__(self, state: Tensor, clock: Clock) -> Tensor:
        """State (B, G, H, ...) -> (B, G, T, W)."""
        return self.head.tokens(state, clock)[0]


class FoldedFlow(Embedding):
    """A flow head's action projection and its time MLP's first layer as one matrix, its bias and the time in rows."""

    def __init__(self, head: FlowHead) -> None:
        super().__init__(head)
        into, first = head.action_in_proj, head.time_input.mlp_in.weight[:, : head.time_input.width]
        self.weight = (first @ into.weight).detach().T.contiguous()
        self.bias = (first @ into.bias).detach()
        self.second = head.time_input.mlp_out

    def prepared(self, clock: Clock) -> Clock:
        assert clock.rows is not None
        return replace(clock, rows=clock.rows + self.bias)

    def __call__(self, state: Tensor, clock: Clock) -> Tensor:
        assert clock.rows is not None
        rows = clock.rows if clock.rows.dim() == 1 else clock.rows.flatten(0, 2)
        hidden = torch.addmm(rows, state.flatten(0, 2), self.weight)
        return self.second(F.silu(hidden)).view(*state.shape[:3], -1)


def embedding(head: ActionHead) -> Embedding:
    if isinstance(head, FlowHead) and head.config.time == "concat":
        return FoldedFlow(head)
    return Embedding(head)
