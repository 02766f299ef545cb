"""The slow path's own word for a chunk: action tokens, one after another behind the prefix.

The backbone learns actions in its own form, next-token prediction (pi0-FAST), while the action expert's loss
need not reach it (knowledge insulation). The tokens have an embedding and a classifier of their own, so the
language vocabulary stays as it is. Action tokens and the expert's tokens do not see one another: both only
read the prefix.

Axes: B batch, H steps, A real action dims, L tokens, E backbone width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.action_tokens.base import ActionTokenizer
from vla.backbones.base import Backbone
from vla.cache import PrefixCache
from vla.losses import batch_mean


class ChunkTokens(nn.Module):
    """Embedding and classifier of a tokenizer's ids; id `vocab_size` begins and ends a sequence."""

    def __init__(self, tokenizer: ActionTokenizer, width: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.embedding = nn.Embedding(tokenizer.vocab_size + 1, width)
        self.classifier = nn.Linear(width, tokenizer.vocab_size + 1)
        nn.init.normal_(self.embedding.weight, std=0.5)

    @property
    def edge(self) -> int:
        return self.tokenizer.vocab_size

    def loss(self, backbone: Backbone, cache: PrefixCache, actions: Tensor, valid: Tensor, entries: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, over rows whose chunk lies wholly inside its episode.

        Args:
            actions: (B, H, A) model units.
            valid: (B, H) bool.
            entries: (B,), weight of each row, as in the head's loss.
        """
        sequences = self.tokenizer.encode(actions.detach().float().cpu().numpy())
        ids = pad(sequences, self.edge).to(actions.device)  # (B, L + 1), ended and padded by `edge`
        real = (
            torch.arange(ids.shape[1], device=ids.device)
            <= torch.tensor([len(s) for s in sequences], device=ids.device)[:, None]
        )
        given = F.pad(ids[:, :-1], (1, 0), value=self.edge)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        _, hidden = backbone.extend(cache, self.embedding(given), causal, real)
        logits = self.classifier(hidden).float()
        errors = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        asked = real & valid.all(1, keepdim=True)
        return batch_mean(((errors * asked).sum(1) / asked.sum(1).clamp(min=1))[:, None], entries)

    @torch.no_grad()
    def generate(self, backbone: Backbone, cache: PrefixCache, limit: int) -> list[np.ndarray]:
        """The most probable ids of each row, (L,) int64 each, one by one; at most `limit`."""
        alone = torch.ones(1, 1, dtype=torch.bool, device=cache.valid.device)
        ids = torch.full((cache.batch, 1), self.edge, device=cache.valid.device)
        open_rows, found = torch.ones(cache.batch, dtype=torch.bool, device=ids.device), []
        for _ in range(limit):
            cache, hidden = backbone.extend(cache, self.embedding(ids), alone, open_rows[:, None])
            ids = self.classifier(hidden).argmax(-1)
            open_rows = open_rows & (ids[:, 0] != self.edge)
            if not open_rows.any():
                break
            found.append(torch.where(open_rows, ids[:, 0], self.edge))
        columns = torch.stack(found, 1).cpu().numpy() if found else np.zeros((cache.batch, 0), np.int64)
        return [row[row != self.edge] for row in columns]


def pad(sequences: list[np.ndarray], edge: int) -> Tensor:
    """Sequences (L,) -> (B, longest + 1) int64, filled up with `edge`, of which each row has one at least."""
    ids = np.full((len(sequences), max(map(len, sequences), default=0) + 1), edge, np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(ids)
