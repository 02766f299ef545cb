"""What steers the expert without a new encoding: how old the encoding is, the behaviour mode, an intent.

Each is an embedding added to every action token. All start at zero, so a public checkpoint behaves as before.

Axes: B batch, G groups, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla.errors import UsageError
from vla.heads.base import Draws
from vla.layers import time_embedding
from vla.policy_config import ConditionConfig, FastSlowConfig


@dataclass(frozen=True)
class Steering:
    """The values that `Conditions` embeds; None where the policy has no such condition."""

    age: Tensor | None = None  # (B,) float32, control steps between the encoding and the state
    mode: Tensor | None = None  # (B,) int64, 0 forward, 1 rollback, 2 advance
    intent: Tensor | None = None  # (B, G) int64; -1 hides it


def trained_intent(config: ConditionConfig | None, intent: Tensor | None, draws: Draws, groups: int) -> Tensor | None:
    """(B, G) int64 for training: the rows' intents (B,), of which a share `config.drop` of the chunks sees -1, none.

    Raises:
        UsageError: the policy is to learn intents, and the rows have none.
    """
    if config is None or not config.intents:
        return None
    if intent is None:
        raise UsageError(
            f"policy.conditions.intents is {config.intents}, and the rows of this data say nothing of their intent "
            "(Batch.intent). Set it to 0, or train from rows that do."
        )
    chance = draws.uniform((groups,), draws.generator(purpose=3)).to(intent.device)
    return intent[:, None].expand(-1, groups).masked_fill(chance < config.drop, -1)


class Conditions(nn.Module):
    """(B, G, W) to add to the action tokens, or None if the policy has no conditions."""

    def __init__(self, conditions: ConditionConfig | None, fast_slow: FastSlowConfig | None, width: int) -> None:
        super().__init__()
        modes, intents = (conditions.modes, conditions.intents) if conditions else (0, 0)
        self.width, self.max_age = width, fast_slow.max_age if fast_slow else 0
        self.age = nn.Linear(width, width) if fast_slow else None
        self.mode = nn.Embedding(modes, width) if modes else None
        self.intent = nn.Embedding(intents + 1, width) if intents else None  # the last row: hidden
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, given: Steering, batch: int, groups: int) -> Tensor | None:
        parts: list[Tensor] = []
        if self.age is not None:
            age = torch.zeros(batch, device=self.age.weight.device) if given.age is None else given.age
            scaled = age.clamp(max=self.max_age) / max(self.max_age, 1)  # older than trained counts as the oldest
            embedding = time_embedding(scaled, self.width).to(self.age.weight.dtype)
            parts.append(self.age(embedding)[:, None])
        if self.mode is not None:
            mode = _default(given.mode, (batch,), 0, self.mode)
            parts.append(self.mode(mode)[:, None])
        if self.intent is not None:
            intent = _default(given.intent, (batch, groups), -1, self.intent)
            parts.append(self.intent(intent % self.intent.num_embeddings))
        if not parts:
            return None
        return sum(parts[1:], parts[0]).expand(batch, groups, -1)


def _default(ids: Tensor | None, shape: tuple[int, ...], value: int, table: nn.Embedding) -> Tensor:
    return torch.full(shape, value, device=table.weight.device) if ids is None else ids
