"""The training loop. It knows losses, not policies: fine-tuning and post-training share it.

One step: gradients of every micro-batch, clipped, one optimiser update, one update of the weight average.
`batch.loss_scale` makes the sum over micro-batches and processes the loss of the global batch.
"""

import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.distributed import Cluster
from train.metrics import Log
from train.optim import learning_rate, set_learning_rate
from train.run_folder import usable
from train.train_config import OptimConfig, ScheduleConfig
from train.training_state import Learner
from vla.batch import Batch
from vla.cli import Interrupted
from vla.errors import TandemError

RANKS = 4096  # more processes than any run has; keeps their random streams apart
NEVER = 2**31


@dataclass(frozen=True)
class LoopConfig:
    seed: int
    steps: int
    global_batch: int  # rows a step, over all processes and micro-batches
    optim: OptimConfig
    schedule: ScheduleConfig
    log_every: int  # steps
    checkpoint_every: int  # steps; the last step is always saved
    validate_every: int  # steps; 0: never


@dataclass(frozen=True)
class Hooks:
    """What the loop calls; each takes the number of steps done. All processes call them together."""

    save: Callable[[int], Path]
    validate: Callable[[int], float]
    log: Log | None  # in the main process only


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step, so that dropout and the like need not be saved."""
    torch.manual_seed(((seed * 1_000_003 + step) * RANKS + rank) % 2**63)


class Loop:
    """Runs steps until the configured number, an error, or a signal."""

    def __init__(self, config: LoopConfig, learner: Learner, cluster: Cluster, hooks: Hooks, output: Path) -> None:
        self._config, self._learner, self._cluster, self._hooks = config, learner, cluster, hooks
        self._output = output
        self._parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
        self._window = Window(cluster.device)

    def run(self, batches: Iterable[tuple[int, Sequence[Batch]]], first_step: int) -> None:
        """Train from 0-based `first_step` on.

        Args:
            batches: (step, this process's micro-batches of it), one step after the other.

        Raises:
            TandemError: the loss is not finite, memory or disk is full.
            Interrupted: a signal came; the step was finished and a checkpoint written.
        """
        source = iter(batches)
        with stop_signals() as stop:
            for step in range(first_step, self._config.steps):
                micro_batches = self._next(source, step)
                self._guarded_step(step, micro_batches)
                interrupted = self._cluster.any(stop)
                self._after(step + 1, must_save=interrupted)
                if interrupted:
                    raise Interrupted(stop[0] if stop else "a signal to another process")

    def _next(self, source: Iterator[tuple[int, Sequence[Batch]]], step: int) -> Sequence[Batch]:
        start = time.monotonic()
        got, micro_batches = next(source)
        self._window.wait_s += time.monotonic() - start
        if got != step:
            raise ValueError(f"the loader gave step {got} where step {step} was due")
        return micro_batches

    def _guarded_step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        try:
            self._step(step, micro_batches)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _out_of_memory(error):
                raise
            rows = len(micro_batches[0].rows)
            raise TandemError(
                f"Out of memory on {self._cluster.device} in step {step + 1}, with {rows} rows a micro-batch. Raise "
                f"batch.accumulation above {len(micro_batches)} (the result stays the same), use compute.precision="
                "bf16, or spread the run over more devices. The same command then resumes from the last checkpoint."
            ) from error

    def _step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        config, cluster = self._config, self._cluster
        lr = learning_rate(step, config.optim.lr, config.schedule, config.steps)
        set_learning_rate(self._learner.optimizer, lr)
        seed_step(config.seed, step, cluster.rank)
        for i, batch in enumerate(micro_batches):
            with cluster.accumulating("last" if i + 1 == len(micro_batches) else "more follow"):
                out = cluster.forward(batch.to(cluster.device))
                weight = batch.loss_scale / len(micro_batches)
                (out.total * weight).backward()
            self._window.add_loss(out.total.detach() * weight, {k: v.detach() * weight for k, v in out.terms.items()})
        norm = cluster.clip(self._parameters, config.optim.clip)
        self._learner.optimizer.step()
        self._learner.optimizer.zero_grad(set_to_none=True)
        if self._learner.ema:
            self._learner.ema.update(self._learner.module, step)
        self._window.end_step(step, lr, norm)

    def _after(self, done: int, *, must_save: bool) -> None:
        config = self._config
        logs = done % config.log_every == 0 or done == config.steps
        saves = must_save or done % config.checkpoint_every == 0 or done == config.steps
        validates = config.validate_every > 0 and (done % config.validate_every == 0 or done == config.steps)
        if logs or saves or validates or self._cluster.device.type == "cpu":  # elsewhere it would stall the device
            self._require_finite()
        if logs:
            self._report(done)
        paused = time.monotonic()
        if validates:
            loss = self._hooks.validate(done)
            if self._hooks.log:
                self._hooks.log.event("validation", step=done, loss=loss)
        if saves:
            self._require_finite_weights(done)
            folder = self._hooks.save(done)
            if self._hooks.log:
                self._hooks.log.event("checkpoint", step=done, path=str(folder))
        self._window.start_s += time.monotonic() - paused

    def _require_finite(self) -> None:
        """Raise unless every loss and gradient so far was finite. The step it names is exact, however late this is."""
        first = int(self._window.first_bad.item())
        anywhere = self._cluster.any(first != NEVER)
        if not anywhere:
            return
        if first == NEVER:
            raise TandemError("Training broke down in another process; see its message.")
        values = zip(("loss", *self._window.names, "gradient norm"), self._window.bad.tolist(), strict=True)
        names = ", ".join(f"{k} {v:.4g}" for k, v in values)
        raise TandemError(
            f"Training broke down in step {first + 1}, which is not finite: {names}. {usable(self._output)}; nothing "
            "was written since then. Lower optim.lr or optim.clip, lengthen schedule.warmup, or look for broken "
            "numbers with: vla-data check RECIPE.yaml"
        )

    def _require_finite_weights(self, done: int) -> None:
        """An update can overflow where loss and gradient did not; what is saved must be usable."""
        if not torch.isfinite(self._cluster.norm(self._parameters)):
            raise TandemError(
                f"The weights after step {done} are not finite. {usable(self._output)}; nothing was written since "
                "then. Lower optim.lr."
            )

    def _report(self, done: int) -> None:
        window = self._window
        sums = self._cluster.total(window.sums()) / self._cluster.size / window.steps
        elapsed = time.monotonic() - window.start_s
        if self._hooks.log:
            losses = sums.tolist()
            self._hooks.log.step(
                {
                    "step": done,
                    "loss": losses[0],
                    "terms": dict(zip(window.names, losses[1:], strict=True)),
                    "lr": window.lr,
                    "grad_norm": float(window.norm),
                    "samples_per_s": self._config.global_batch * window.steps / elapsed,
                    "data_wait_share": window.wait_s / elapsed,
                    "wall_s": time.monotonic() - window.begun_s,
                    "memory_mb": memory_mb(self._cluster.device),
                }
            )
        window.restart()


class Window:
    """What happened since the last line of the log. Sums stay on the device: reading them would stall it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.names: list[str] = []
        self.begun_s = time.monotonic()
        self.first_bad = torch.tensor(NEVER, device=device)  # first step whose loss or gradient was not finite
        self.bad = torch.zeros(0, device=device)  # (terms + 2,), loss, terms and gradient norm of that step
        self._step = torch.zeros(0, device=device)
        self.restart()

    def restart(self) -> None:
        self.steps, self.wait_s, self.start_s = 0, 0.0, time.monotonic()
        self._total = torch.zeros(0, device=self._device)

    def add_loss(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        """One micro-batch, already weighted."""
        self.names = list(terms)
        values = torch.stack([total, *terms.values()]).float()
        self._step = values if len(self._step) == 0 else self._step + values

    def end_step(self, step: int, lr: float, norm: Tensor) -> None:
        self.lr, self.norm = lr, norm
        values = torch.cat((self._step, norm.float().view(1)))
        is_first = ~torch.isfinite(values).all() & (self.first_bad == NEVER)
        self.first_bad = torch.where(is_first, step, self.first_bad)
        self.bad = values if len(self.bad) == 0 else torch.where(is_first, values, self.bad)
        self._total = self._step if len(self._total) == 0 else self._total + self._step
        self._step = self._step[:0]
        self.steps += 1

    def sums(self) -> Tensor:
        """(1 + terms,) sums over the window of the loss and its terms, this process's part."""
        return self._total


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Inside the block SIGINT and SIGTERM only leave their name in the list; a second one ends the process."""
    seen: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(signum: int, _: Any) -> None:
        seen.append(signal.Signals(signum).name)
        signal.signal(signum, signal.SIG_DFL)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
