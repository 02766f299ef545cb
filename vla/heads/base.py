"""What every action head offers.

A head says what the expert's action tokens are: how a chunk is corrupted for training, how the corrupted
chunk becomes tokens, what the hidden states predict, and how sampling advances. The expert, the prefix and
the packing of groups are the same for all.

Axes: B batch, G groups (draws or samples sharing one prefix), H steps, A action dims, T = G*H, W width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla.expert import ActionExpert, Context
from vla.losses import LossOut


@dataclass(frozen=True)
class Target:
    """The chunk to learn, in model units."""

    actions: Tensor  # (B, H, A) float32
    valid: Tensor  # (B, H) bool, false beyond the episode's end
    dim_mask: Tensor  # (B, A) bool, false for padded dimensions


@dataclass(frozen=True)
class Draws:
    """Where a training step's randomness comes from.

    Numbers are drawn for the whole global batch and each rank or accumulation step takes its own rows, so a
    step does not depend on how the global batch was divided.
    """

    seed: int
    global_size: int
    rows: Tensor  # (B,) int64

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """(B, *shape) standard normal draws of these rows, on the CPU."""
        return torch.randn((self.global_size, *shape), generator=generator)[self.rows.cpu()]

    def uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """(B, *shape) draws from [0, 1) of these rows, on the CPU."""
        return torch.rand((self.global_size, *shape), generator=generator)[self.rows.cpu()]


def grouped_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(B, G, ...) standard normal draws, group by group: the first of n samples is the one sample of n = 1."""
    batch, groups, *rest = shape
    return torch.stack([torch.randn((batch, *rest), generator=generator) for _ in range(groups)], dim=1)


def grouped_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """As `grouped_normal`, from [0, 1)."""
    batch, groups, *rest = shape
    return torch.stack([torch.rand((batch, *rest), generator=generator) for _ in range(groups)], dim=1)


class ActionHead(ABC, nn.Module):
    """Primitives of training and sampling; a state is whatever the head denoises (actions, token ids, ...)."""

    steps: int  # sampler steps

    @abstractmethod
    def token_count(self, chunk: int) -> int:
        """Action tokens of one chunk of `chunk` steps."""

    @abstractmethod
    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        """Condition of the fresh tokens (B, F, W), or None if the expert's norms take none."""

    @abstractmethod
    def loss(self, expert: ActionExpert, context: Context, target: Target, draws: Draws) -> LossOut: ...

    @abstractmethod
    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        """The state that sampling starts from, for chunks of `shape` (B, G, H, A)."""

    @abstractmethod
    def predict(self, state: Tensor, index: int, call: "ExpertCall") -> Tensor:
        """What the network says of `state` in sampler step `index`, counted from 0."""

    @abstractmethod
    def advance(self, state: Tensor, out: Tensor, index: int, generator: torch.Generator) -> Tensor:
        """`state` after sampler step `index`."""

    @abstractmethod
    def decode(self, state: Tensor) -> Tensor:
        """The final state as actions (B, G, H, A) in model units."""

    def sample(self, call: "ExpertCall", shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """Draw chunks (B, G, H, A) in model units: init, then `steps` times predict and advance, then decode."""
        state = self.init(shape, generator, call.context.valid.device)
        for index in range(self.steps):
            state = self.advance(state, self.predict(state, index, call), index, generator)
        return self.decode(state)


class ExpertCall:
    """The expert bound to a context and to the packing of groups: tokens (B, G, H, W) in, hidden out.

    Masks and rotary tables are made here, once for all denoising steps.
    """

    def __init__(self, expert: ActionExpert, context: Context, groups: int, steps: int) -> None:
        self.expert, self.context = expert, context
        self.layout = expert.layout(context, groups, steps)

    def __call__(self, tokens: Tensor, cond: Tensor | None) -> Tensor:
        """(B, G, H, W), cond (B, G, H, W) or None -> (B, G, H, W)."""
        flat_cond = None if cond is None else cond.flatten(1, 2)
        hidden = self.expert(tokens.flatten(1, 2), flat_cond, self.context, self.layout)
        return hidden.view(tokens.shape)
