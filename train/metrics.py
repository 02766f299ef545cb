"""What a run reports: JSON lines always, dashboards on request, a progress bar or plain lines."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from train.run_folder import write_error
from train.train_config import Backend, LogConfig
from vla.errors import MissingDependency
from vla.files import append_json_line, read_json_lines, write_text


class Dashboard(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<output>/tensorboard`."""

    def __init__(self, output: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = SummaryWriter(str(output / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """Hugging Face's local dashboard (`trackio show`)."""

    def __init__(self, output: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("trackio") from error
        self._trackio = trackio
        trackio.init(project=project, name=output.name, config=dict(config), resume="allow")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


class WandB:
    """Weights & Biases; a resumed run continues the same curve."""

    def __init__(self, output: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("wandb") from error
        run_id = output / "wandb_run_id"
        if not run_id.exists():
            write_text(run_id, wandb.util.generate_id())
        self._run = wandb.init(
            project=project,
            name=output.name,
            config=dict(config),
            dir=str(output),
            id=run_id.read_text(),
            resume="allow",
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


DASHBOARDS: dict[Backend, type[TensorBoard] | type[Trackio] | type[WandB]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


def _missing(name: Backend) -> MissingDependency:
    return MissingDependency(
        f"log.backends asks for {name!r}, which is not installed. Install it with: uv sync --extra {name}, or take it "
        "out of log.backends; metrics.jsonl is written in any case."
    )


class Log:
    """The record of one run, kept by its main process."""

    def __init__(self, output: Path, config: LogConfig, steps: int, run_config: Mapping[str, Any]) -> None:
        self._output, self.path = output, output / "metrics.jsonl"
        self._steps = steps
        self._dashboards: list[Dashboard] = [DASHBOARDS[b](output, config.project, run_config) for b in config.backends]
        self._display = BarDisplay(steps) if sys.stderr.isatty() else LineDisplay()

    def rewind(self, step: int) -> None:
        """Forget what an interrupted run logged after `step`, where it now continues."""
        kept = [line for line in read_json_lines(self.path) if line.get("step", 0) <= step]
        with self._writing():
            write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def event(self, name: str, **values: Any) -> None:
        """One line that is no step: start, validation, checkpoint, end."""
        with self._writing():
            append_json_line(self.path, {"event": name} | values)
        if name == "validation":
            self._scalars(values["step"], {"validation/loss": values["loss"]})
        self._display.event(name, values)

    def step(self, values: Mapping[str, Any]) -> None:
        """One line of `event: step`; `values` as in the schema of metrics.jsonl."""
        with self._writing():
            append_json_line(self.path, {"event": "step"} | dict(values))
        names = ("loss", "lr", "grad_norm", "samples_per_s", "data_wait_share", "memory_mb")
        scalars = {f"train/{k}": values[k] for k in names}
        self._scalars(values["step"], scalars | {f"train/terms/{k}": v for k, v in values["terms"].items()})
        self._display.step(values, self._steps)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error("log", self.path, self._output, error) from error

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for dashboard in self._dashboards:
            dashboard.scalars(step, values)

    def close(self) -> None:
        self._display.close()
        for dashboard in self._dashboards:
            dashboard.close()


class LineDisplay:
    """Plain lines on stderr, for logs and pipes."""

    def __init__(self) -> None:
        self._pace = Pace()

    def step(self, values: Mapping[str, Any], steps: int) -> None:
        self._say(f"step {values['step']}/{steps}  {summary(values)}  ETA {self._pace.eta(values['step'], steps)}")

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        if text := describe(name, values):
            self._say(text)

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class BarDisplay:
    """A progress bar on a terminal."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("training", total=steps, summary="")
        self._bar.start()

    def step(self, values: Mapping[str, Any], steps: int) -> None:
        self._bar.update(self._task, completed=values["step"], summary=summary(values))

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        if text := describe(name, values):
            self._bar.console.print(text, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Pace:
    """Remaining time from the pace since the first step seen."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def eta(self, step: int, steps: int) -> str:
        now = time.monotonic()
        if self._first is None or step == self._first[0]:
            self._first = self._first or (step, now)
            return "?"
        per_step = (now - self._first[1]) / (step - self._first[0])
        minutes, seconds = divmod(round(per_step * (steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def summary(values: Mapping[str, Any]) -> str:
    """The numbers of a step that a person watches."""
    return (
        f"loss {values['loss']:.4f}  lr {values['lr']:.1e}  {values['samples_per_s']:.0f} samples/s  "
        f"data wait {100 * values['data_wait_share']:.0f} %"
    )


def describe(name: str, values: Mapping[str, Any]) -> str:
    """An event as a line for people; "" for those that need none."""
    if name == "start":
        begun = f"resumed at step {values['resumed_from']}" if values["resumed_from"] else "started"
        data = ", ".join(f"{d['recipe']}: {d['episodes']} episodes, {d['frames']} frames" for d in values["data"])
        millions = values["parameters"]["trainable"] / 1e6
        return f"{begun}: {millions:.2f} M trainable parameters; {data}"
    if name == "validation":
        return f"validation at step {values['step']}: loss {values['loss']:.4f}"
    if name == "checkpoint":
        return f"checkpoint {values['path']}"
    if name == "end":
        return f"done: {values['step']} steps in {values['wall_s']:.0f} s"
    return ""
