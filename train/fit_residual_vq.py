"""Training of a residual-VQ action tokenizer on the chunks of a data set."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vla.action_tokens.base import ChunkShape
from vla.action_tokens.residual_vq import ChunkAutoencoder, ResidualVQConfig, ResidualVQTokenizer
from vla.errors import DataError, UsageError

COMMITMENT = 0.25  # beta (VQ-VAE, CARP)
ALL_LEVELS = 0.5  # share of chunks rebuilt from all levels; the others from a random number of them


@dataclass(frozen=True)
class ResidualVQTraining:
    """How long and how fast."""

    steps: int
    batch: int  # chunks
    lr: float  # at the start; falls to 0 along a cosine
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0:
            raise UsageError(f"Training needs at least one step, one chunk a batch and a positive rate, got {self}.")


def fit(
    chunks: np.ndarray,
    chunk: ChunkShape,
    config: ResidualVQConfig,
    training: ResidualVQTraining,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> ResidualVQTokenizer:
    """Train on `chunks` (N, H, A) float32, model units. The same arguments give the same weights.

    A part of each batch is rebuilt from fewer levels than all (SoundStream's quantiser dropout), so that the
    first levels alone make the best chunk that they can.

    Args:
        progress: called with the step and the loss of its batch.

    Raises:
        DataError: the loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        net = ChunkAutoencoder(chunk, config).train()
        data = torch.from_numpy(np.ascontiguousarray(chunks, np.float32))
        optimizer = torch.optim.AdamW(net.parameters(), lr=training.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / training.steps))
        )
        for step in range(training.steps):
            rows = torch.randint(len(data), (training.batch,))
            kept = torch.randint(1, config.levels + 1, (training.batch,))
            kept[torch.rand(training.batch) < ALL_LEVELS] = config.levels
            loss = net.loss(data[rows], kept, COMMITMENT)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if not math.isfinite(value := loss.item()):
                raise DataError(f"The loss is {value} at step {step}: look for wild actions with vla-data check.")
            progress(step, value)
    return ResidualVQTokenizer(chunk, config, net)
