"""Checkpoints of a run, from which it continues bit for bit.

    checkpoints/last                 the name of the newest complete one
    checkpoints/<step>/policy/       averaged weights; a complete policy folder (vla.checkpoint)
    checkpoints/<step>/training/     state.json and *.safetensors: raw weights, optimiser, average

Nothing else needs to be saved: learning rate, data order and random draws are functions of (seed, step).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train import sharded_files
from train.distributed import Cluster
from train.optim import Ema
from train.run_folder import POINTER, last_name, write_error
from vla.errors import CheckpointError, DataError, UsageError
from vla.files import whole_folder, write_json, write_text

VERSION = 1
WHOLE = "state.safetensors"
# What may differ between the run that wrote a checkpoint and the one that continues it. The rest decides the result.
FREE = (
    "output",
    "log",
    "checkpoint",
    "validation",
    "batch.accumulation",
    "compute.device",
    "compute.parallel",
    "data.prefetch",
    "data.threads",
    "data.cache",
)


@dataclass(frozen=True)
class Learner:
    """What training changes."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None

    def policy_weights(self) -> dict[str, Tensor]:
        """The weights to use: averaged where there is an average. Names as in `module.state_dict()`."""
        average = self.ema.shadow if self.ema else {}
        return self.module.state_dict() | average


@dataclass(frozen=True)
class Manifest:
    """`training/state.json`."""

    step: int  # steps done
    config: Mapping[str, Any]  # the run's complete configuration
    data: list[dict[str, Any]]  # recipe and revision of each member of the mixture
    optimizer_steps: Mapping[str, int]  # parameter -> updates it has had
    layout: str  # "whole": one file; "sharded": one file a process
    version: int = VERSION


def last(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None when there is none yet.

    Raises:
        CheckpointError: `last` names a folder that is gone.
    """
    name, pointer = last_name(checkpoints.parent), checkpoints / POINTER
    if name is None:
        return None
    folder = checkpoints / name
    if not (folder / "training" / "state.json").is_file():
        raise CheckpointError(
            f"{pointer} names {folder.name!r}, which is not a complete checkpoint. Write the name of another folder "
            f"of {checkpoints} into it, or choose a new output folder."
        )
    return folder


def save(
    checkpoints: Path,
    manifest: Manifest,
    learner: Learner,
    write_policy: Callable[[Path, dict[str, Tensor]], None],
    cluster: Cluster,
    keep: int,
) -> Path:
    """Write checkpoints/<step> whole or not at all, point `last` to it, remove all but the newest `keep`.

    Every process of the run calls it.

    Args:
        write_policy: (folder, weights) -> writes a policy folder; called in the main process.

    Raises:
        TandemError: it could not be written. What was there before is untouched.
    """
    folder = checkpoints / f"{manifest.step:08d}"
    weights = cluster.gathered(learner.policy_weights())
    try:
        with _shared_folder(folder, checkpoints, cluster) as partial:
            failure = _attempt(partial / "training", learner, cluster)
            if cluster.is_main and failure is None:
                write_json(partial / "training" / "state.json", vars(manifest))
                write_policy(partial / "policy", weights)
            if cluster.any(failure):
                raise write_error("checkpoint", folder, checkpoints.parent, failure)
        failure = _publish(folder, checkpoints, keep) if cluster.is_main else None
        if cluster.any(failure):  # asked of all: none goes on, or leaves the group, before the checkpoint is whole
            raise write_error("checkpoint", folder, checkpoints.parent, failure)
    except (OSError, SafetensorError) as error:
        raise write_error("checkpoint", folder, checkpoints.parent, error) from error
    return folder


def _publish(folder: Path, checkpoints: Path, keep: int) -> OSError | None:
    try:
        write_text(checkpoints / POINTER, folder.name + "\n")
        _prune(checkpoints, keep)
    except OSError as error:
        return error
    return None


@contextmanager
def _shared_folder(folder: Path, checkpoints: Path, cluster: Cluster) -> Iterator[Path]:
    """`vla.files.whole_folder`, made by the main process and written into by all."""
    with ExitStack() as stack:
        failure, path = None, ""
        if cluster.is_main:
            try:
                partial = stack.enter_context(whole_folder(folder))
                (partial / "training").mkdir()
                path = str(partial)
            except OSError as error:
                failure = error
        path = cluster.shared_text(path)  # empty: the others must not wait for a folder that never comes
        if not path:
            raise write_error("checkpoint", folder, checkpoints.parent, failure) from failure
        yield Path(path)


def _attempt(folder: Path, learner: Learner, cluster: Cluster) -> Exception | None:
    """Write this process's tensors; an error is returned, so that all processes can agree on it."""
    state = _state(learner)
    try:
        if cluster.sharded:
            sharded_files.write(folder, state)
        elif cluster.is_main:
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WHOLE)
    except (OSError, SafetensorError) as error:
        return error
    return None


def _state(learner: Learner) -> dict[str, Tensor]:
    """Everything training changes, under flat names."""
    tensors = {f"raw.{k}": v.detach() for k, v in learner.module.state_dict().items()}
    for name, parameter in learner.module.named_parameters():
        for slot, value in learner.optimizer.state.get(parameter, {}).items():
            if slot != "step":
                tensors[f"optim.{slot}.{name}"] = value
    if learner.ema:
        tensors |= {f"ema.{k}": v for k, v in learner.ema.shadow.items()}
    return tensors


def optimizer_steps(learner: Learner) -> dict[str, int]:
    """How many updates each parameter has had; parameters without a gradient so far are absent."""
    states = ((k, learner.optimizer.state.get(p)) for k, p in learner.module.named_parameters())
    return {k: int(state["step"]) for k, state in states if state}


def read_manifest(folder: Path) -> Manifest:
    """Raises `CheckpointError` when it is damaged or of another release."""
    path = folder / "training" / "state.json"
    try:
        data = json.loads(path.read_text())
        manifest = Manifest(**data)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Choose a new output folder.") from error
    if manifest.version != VERSION:
        raise CheckpointError(f"{path} has version {manifest.version}; this release reads {VERSION}.")
    return manifest


def require_same_run(manifest: Manifest, config: Mapping[str, Any], data: list[dict[str, Any]], output: Path) -> None:
    """Refuse to continue a run under a configuration or on data that would change its result.

    Raises:
        UsageError: naming each key that differs.
        DataError: a data set has changed since.
    """
    different = [
        f"  {key}: {there!r} there, {here!r} now"
        for key, there, here in differences(manifest.config, config)
        if not any(key == free or key.startswith(free + ".") for free in FREE)
    ]
    if different:
        raise UsageError(
            f"{output} holds a run of {manifest.step} steps with another configuration:\n" + "\n".join(different) + "\n"
            "Restore these values to continue it, or choose another output folder."
        )
    changed = [
        f"  {there['recipe']}: {key} {was!r} there, {now!r} now"
        for there, here in zip(manifest.data, data, strict=True)
        for key, was, now in differences(there, here)
    ]
    if changed:
        raise DataError(
            f"{output} was trained on other data:\n" + "\n".join(changed) + "\n"
            "Restore the data or the recipe to continue the run, or choose another output folder."
        )


def differences(a: Any, b: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) of every leaf in which two nested mappings differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}.{k}" if where else str(k))]
    return [] if a == b else [(where, a, b)]


def restore(folder: Path, manifest: Manifest, learner: Learner, cluster: Cluster) -> None:
    """Put the state of a checkpoint into `learner`, whose tensors are already in place and sharded.

    Raises:
        CheckpointError: a file is missing or damaged, or holds another model.
    """
    _make_slots(learner, manifest.optimizer_steps)
    state = _state(learner)
    training = folder / "training"
    try:
        if manifest.layout == "sharded" or cluster.sharded:
            sharded_files.read(training, state)
        else:
            _copy_strict(load_file(training / WHOLE), state, training / WHOLE)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{training} cannot be read: {error}. Write the name of an older folder of {folder.parent} into "
            f"{folder.parent / POINTER}, or choose a new output folder."
        ) from error


def _make_slots(learner: Learner, steps: Mapping[str, int]) -> None:
    """Give the optimiser the state it had, with empty moments, so that a load can fill them in place."""
    for name, parameter in learner.module.named_parameters():
        if name in steps:
            learner.optimizer.state[parameter] = {
                "step": torch.tensor(float(steps[name]), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


@torch.no_grad()
def _copy_strict(source: Mapping[str, Tensor], target: Mapping[str, Tensor], path: Path) -> None:
    if source.keys() != target.keys():
        raise CheckpointError(
            f"{path} holds the state of another model: {sorted(source.keys() ^ target.keys())[:3]} are in one only."
        )
    for name, value in target.items():
        value.copy_(source[name])


def _prune(checkpoints: Path, keep: int) -> None:
    complete = sorted(p for p in checkpoints.iterdir() if p.is_dir() and p.name.isdecimal())
    for folder in complete[: max(0, len(complete) - keep)]:
        shutil.rmtree(folder)
