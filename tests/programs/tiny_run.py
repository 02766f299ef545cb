"""A training run of a tiny module, as a program: started by tests, in one process or in several.

python tiny_run.py OUTPUT STEPS [key=value ...]      keys: the fields of Options
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from train.distributed import Cluster
from train.loop import LoopConfig
from train.optim import Ema, freeze, make_optimizer
from train.session import Session, Work, train
from train.train_config import ComputeConfig, EmaConfig, LogConfig, OptimConfig, ScheduleConfig
from train.training_state import Learner
from vla.batch import Batch
from vla.cli import run
from vla.config import to_data
from vla.losses import LossOut, batch_mean, chunk_mean

STATE, ACTION, HORIZON, VOCABULARY = 5, 3, 4, 11


@dataclass(frozen=True)
class Options:
    global_batch: int = 12
    accumulation: int = 1
    signal_at: int = -1  # 0-based step in which SIGTERM comes
    dropout: float = 0.0
    checkpoint_every: int = 2
    validate_every: int = 0
    log_every: int = 1
    keep: int = 2
    nan_at: int = -1  # 0-based step whose data are broken
    huge_at: int = -1  # 0-based step that asks for more memory than there is
    pause_s: float = 0.0  # per step
    lr: float = 1e-2
    revision: str = "r1"
    parallel: str = "ddp"
    precision: str = "fp32"
    expert_scale: float = 1.0
    clip: float = 1.0


class Tiny(nn.Module):
    """Embedding, matrices, norm and biases; two parts."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.text = nn.Embedding(VOCABULARY, 8)
        self.trunk = nn.Sequential(nn.Linear(STATE + 8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(16, HORIZON * ACTION)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"text": list(self.text.parameters()), "expert": [*self.trunk.parameters(), *self.head.parameters()]}

    def forward(self, batch: Batch) -> LossOut:
        if batch.noise_seed < 0:
            torch.empty(2**50)
        hidden = self.trunk(torch.cat((batch.state, self.text(batch.tokens).mean(dim=1)), dim=1))
        error = (self.head(hidden).view(-1, HORIZON, ACTION).float() - batch.actions) ** 2
        asked = batch.valid[:, None, :, None] & batch.dim_mask[:, None, None]
        loss = batch_mean(chunk_mean(error[:, None], asked), asked.sum((1, 2, 3)).float())
        return LossOut(total=loss, terms={"error": loss.detach(), "twice": 2 * loss.detach()})


def global_batch(step: int, options: Options) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1000 + step)
    rows = options.global_batch
    state = torch.randn(rows, STATE, generator=draw)
    if step == options.nan_at:
        state[rows // 2] = torch.nan
    length = torch.randint(1, HORIZON + 1, (rows,), generator=draw)
    return {
        "images": torch.zeros(rows, 1, 1, 1, 3, dtype=torch.uint8),
        "image_mask": torch.ones(rows, 1, dtype=torch.bool),
        "tokens": torch.randint(0, VOCABULARY, (rows, 3), generator=draw),
        "token_mask": torch.ones(rows, 3, dtype=torch.bool),
        "state": state,
        "actions": state[:, None, :ACTION] * torch.arange(1.0, HORIZON + 1)[:, None] / HORIZON,
        "valid": torch.arange(HORIZON) < length[:, None],
        "dim_mask": torch.ones(rows, ACTION, dtype=torch.bool),
        "age": torch.zeros(rows),
        "history": torch.zeros(rows, 0, STATE),
        "fast_images": torch.zeros(rows, 0, 0, 0, 3, dtype=torch.uint8),
        "fast_image_mask": torch.zeros(rows, 0, dtype=torch.bool),
    }


def micro_batches(step: int, options: Options, cluster: Cluster) -> list[Batch]:
    whole = global_batch(step, options)
    parts = options.accumulation * cluster.size
    rows = torch.arange(options.global_batch).view(parts, -1)
    batches = []
    for i in range(options.accumulation):
        here = rows[i * cluster.size + cluster.rank]
        scale = float(whole["valid"][here].sum() * parts / whole["valid"].sum())
        fields: dict[str, Any] = {k: v[here] for k, v in whole.items()} | {"observation": torch.arange(len(here))}
        seed = -1 if step == options.huge_at else step
        batches.append(Batch(**fields, rows=here, global_size=options.global_batch, noise_seed=seed, loss_scale=scale))
    return batches


def whole_batch(step: int, options: Options) -> Batch:
    """The global batch in one piece."""
    fields: dict[str, Any] = global_batch(step, options)
    rows = options.global_batch
    every = torch.arange(rows)
    return Batch(**fields, observation=every, rows=every, global_size=rows, noise_seed=step, loss_scale=1.0)


def stream(first: int, options: Options, cluster: Cluster) -> Generator[tuple[int, list[Batch]]]:
    step = first
    while True:
        time.sleep(options.pause_s)
        if step == options.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        yield step, micro_batches(step, options, cluster)
        step += 1


def new_learner(options: Options, cluster: Cluster) -> tuple[Learner, OptimConfig]:
    torch.manual_seed(0)
    module = Tiny(options.dropout)
    optim = OptimConfig(
        lr=options.lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=options.clip,
        lr_scale={"text": 0.5, "expert": options.expert_scale},
    )
    freeze(module, optim.lr_scale)
    cluster.place(module, [module.trunk] if cluster.sharded else [])
    ema = Ema(module, EmaConfig(decay=0.9, power=0.75))
    return Learner(module, make_optimizer(module, module.parameter_groups(), optim), ema), optim


def train_tiny(output: Path, steps: int, options: Options) -> Learner:
    parallel: Any = options.parallel
    precision: Any = options.precision
    cluster = Cluster(ComputeConfig(device="cpu", precision=precision, parallel=parallel))
    learner, optim = new_learner(options, cluster)
    session = Session(
        output=output,
        config=to_data({"steps": steps, "optim": optim}),
        data=[{"recipe": "tiny", "revision": options.revision, "episodes": 1, "frames": 12}],
        log=LogConfig(every=options.log_every, backends=(), project="tiny"),
        keep=options.keep,
    )

    def validate() -> float:
        parts = micro_batches(10_000, options, cluster)
        losses = torch.stack([cluster.forward(batch).total * batch.loss_scale for batch in parts])
        return float(cluster.total(losses.mean()) / cluster.size)

    def write_policy(folder: Path, weights: dict[str, Tensor]) -> None:
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")

    work = Work(
        loop=LoopConfig(
            seed=7,
            steps=steps,
            global_batch=options.global_batch,
            optim=optim,
            schedule=ScheduleConfig(warmup=2, floor=0.1),
            log_every=options.log_every,
            checkpoint_every=options.checkpoint_every,
            validate_every=options.validate_every,
        ),
        batches=lambda first: stream(first, options, cluster),
        write_policy=write_policy,
        validate=validate,
    )
    try:
        train(session, work, learner, cluster)
    finally:
        cluster.close()
    return learner


def parse(overrides: list[str]) -> Options:
    values: dict[str, Any] = {k: yaml.safe_load(v) for k, v in (item.split("=", 1) for item in overrides)}
    return dataclasses.replace(Options(), **values)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(lambda: train_tiny(Path(sys.argv[1]), int(sys.argv[2]), parse(sys.argv[3:])) and None))
