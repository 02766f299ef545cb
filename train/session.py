"""One run from start or resume to end: checkpoints, log and loop. Fine-tuning and post-training share it."""

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train import training_state
from train.distributed import Cluster
from train.loop import Hooks, Loop, LoopConfig
from train.metrics import Log
from train.train_config import LogConfig
from train.training_state import Learner, Manifest
from vla.batch import Batch
from vla.config import digest

PACKAGES = ("tandem-vla", "torch", "transformers", "accelerate", "numpy", "safetensors")


@dataclass(frozen=True)
class Session:
    """Where a run lives and what it is made from."""

    output: Path
    config: Mapping[str, Any]  # complete configuration as plain data
    data: list[dict[str, Any]]  # {"recipe", "revision", "episodes", "frames"} of each member
    log: LogConfig
    keep: int  # checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def resumed(self) -> tuple[Path, Manifest] | None:
        """The checkpoint to continue from, if there is one and it is of this run.

        Raises:
            UsageError, DataError: it is of another run (`training_state.require_same_run`).
        """
        folder = training_state.last(self.checkpoints)
        if folder is None:
            return None
        manifest = training_state.read_manifest(folder)
        training_state.require_same_run(manifest, self.config, self.data, self.output)
        return folder, manifest


@dataclass(frozen=True)
class Work:
    """What a run does."""

    loop: LoopConfig
    batches: Callable[[int], Generator[tuple[int, list[Batch]]]]  # first step -> micro-batches of each step
    write_policy: Callable[[Path, dict[str, Tensor]], None]  # (folder, weights) -> a policy folder
    validate: Callable[[], float]  # the validation loss of the learner as it stands


def train(session: Session, work: Work, learner: Learner, cluster: Cluster) -> None:
    """Run, or continue, until the last step.

    Raises:
        TandemError, Interrupted: as `train.loop.Loop.run`.
    """
    begun = time.monotonic()
    resumed = session.resumed()
    done = 0
    if resumed:
        folder, manifest = resumed
        if manifest.step >= work.loop.steps:
            print(f"{session.output} is complete: {manifest.step} steps. Nothing to do.", file=sys.stderr)
            return
        training_state.restore(folder, manifest, learner, cluster)
        done = manifest.step
    log = Log(session.output, session.log, work.loop.steps, session.config) if cluster.is_main else None
    try:
        if log:
            log.rewind(done)
            log.event("start", **_start(session, learner, cluster.size, done if resumed else None))
        hooks = Hooks(
            save=lambda step: _save(session, work, learner, cluster, step),
            validate=lambda _: _validate(work, learner),
            log=log,
        )
        with closing(work.batches(done)) as batches:
            Loop(work.loop, learner, cluster, hooks, session.output).run(batches, done)
        if log:
            log.event("end", step=work.loop.steps, wall_s=time.monotonic() - begun)
    finally:
        if log:
            log.close()


def _save(session: Session, work: Work, learner: Learner, cluster: Cluster, step: int) -> Path:
    manifest = Manifest(
        step=step,
        config=session.config,
        data=session.data,
        optimizer_steps=training_state.optimizer_steps(learner),
        layout="sharded" if cluster.sharded else "whole",
    )
    return training_state.save(session.checkpoints, manifest, learner, work.write_policy, cluster, session.keep)


@torch.no_grad()
def _validate(work: Work, learner: Learner) -> float:
    if learner.ema is None:
        return work.validate()
    with learner.ema.applied(learner.module):
        return work.validate()


def _start(session: Session, learner: Learner, processes: int, resumed_from: int | None) -> dict[str, Any]:
    parameters = list(learner.module.parameters())
    return {
        "version": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config_digest": digest(session.config),
        "versions": {name: _version(name) for name in PACKAGES},
        "data": session.data,
        "parameters": {
            "total": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        },
        "processes": processes,
        "resumed_from": resumed_from,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
