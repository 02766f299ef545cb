"""Reads the folders that a report is made from: recordings, training runs, evaluations, quickstart runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robot import results
from robot.eval_config import WITHOUT_EFFECT
from vla.config import dump as yaml_text
from vla.config import read as config_file
from vla.errors import TandemError, UsageError
from vla.files import read_json_lines
from vla.types import Result

Role = Literal["evaluation", "swap", "realtime"]
STATE, METRICS, RECORD = "state.json", "metrics.jsonl", "tandem_record.json"
# No part of the protocol: which policy, where it runs, and how many episodes, since only equal ones are compared.
NO_PROTOCOL = (*WITHOUT_EFFECT, "policy.path", "policy.device", "threads", "episodes", "first_seed")


@dataclass(frozen=True)
class Recording:
    """A data set folder: LeRobot v3, with `tandem_record.json` where we recorded it."""

    folder: Path
    info: Mapping[str, Any]  # meta/info.json
    record: Mapping[str, Any]  # tandem_record.json, {} when absent
    config: str  # the recorder's configuration as YAML, "" when unknown
    picture: Path | None = None  # PNG made by `vla-data inspect`


@dataclass(frozen=True)
class Training:
    folder: Path
    start: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]  # events "step", in order, each step once
    validations: tuple[Mapping[str, Any], ...]
    end: Mapping[str, Any] | None
    wall_s: float  # all sessions of a resumed run together
    resumed: int  # how often
    config: str  # YAML


@dataclass(frozen=True)
class Evaluation:
    folder: Path
    role: Role
    episodes: tuple[Result, ...]
    summary: Mapping[str, Any]  # {} while the evaluation is unfinished
    config: str  # YAML
    settings: Mapping[str, Any]  # the same, flat: "robot.kind" -> value

    @property
    def judged(self) -> list[Result]:
        return [e for e in self.episodes if e.error is None]

    @property
    def protocol(self) -> dict[str, Any]:
        """What decides the meaning of the success rate: all settings but the policy and the place of files."""
        return {k: v for k, v in self.settings.items() if not _below(k, NO_PROTOCOL)}


@dataclass(frozen=True)
class Bundle:
    """Everything one report is about, in the order it was given."""

    recordings: tuple[Recording, ...] = ()
    trainings: tuple[Training, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)  # state.json of a quickstart run

    checked: str = ""  # what `vla-data check` printed in a quickstart run

    def of(self, role: Role) -> list[Evaluation]:
        return [e for e in self.evaluations if e.role == role]


def read(folders: Sequence[Path]) -> Bundle:
    """Read run folders of any kind.

    Raises:
        UsageError: a folder is absent or holds nothing a report can show.
        TandemError: a file in it is damaged.
    """
    bundle = Bundle()
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"No such folder: {folder}. Give the output folders of runs.")
        found = _read(folder)
        bundle = Bundle(
            bundle.recordings + found.recordings,
            bundle.trainings + found.trainings,
            bundle.evaluations + found.evaluations,
            bundle.state or found.state,
            bundle.checked or found.checked,
        )
    return bundle


def _read(folder: Path) -> Bundle:
    if (folder / STATE).is_file():
        return _quickstart(folder)
    if (folder / results.RESULTS).is_file():
        return Bundle(evaluations=(evaluation(folder),))
    if (folder / METRICS).is_file():
        return Bundle(trainings=(training(folder),))
    if (folder / "meta" / "info.json").is_file():
        return Bundle(recordings=(recording(folder),))
    raise UsageError(
        f"{folder} holds nothing to report. A report is made from: an evaluation ({results.RESULTS}), a training run "
        f"({METRICS}), a LeRobot data set (meta/info.json), a quickstart run ({STATE})."
    )


def _quickstart(folder: Path) -> Bundle:
    checked = _text(folder / "logs" / "check.log").partition("\n")[2].strip()  # without the command itself
    bundle = Bundle(state=read_json(folder / STATE), checked=checked)
    for child in sorted(folder.iterdir(), key=lambda p: p.name):
        if child.is_dir() and (child / results.RESULTS).is_file():
            bundle = _replace(bundle, evaluations=(*bundle.evaluations, evaluation(child)))
        elif child.is_dir() and (child / METRICS).is_file():
            bundle = _replace(bundle, trainings=(*bundle.trainings, training(child)))
        elif child.is_dir() and (child / "meta" / "info.json").is_file():
            bundle = _replace(bundle, recordings=(*bundle.recordings, recording(child)))
    return bundle


def _replace(bundle: Bundle, **changed: Any) -> Bundle:
    return Bundle(**{**bundle.__dict__, **changed})


def recording(folder: Path) -> Recording:
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    drawn = folder.parent / "inspect" / "inspect.png"  # beside it in a quickstart run
    return Recording(
        folder=folder,
        info=read_json(folder / "meta" / "info.json"),
        record=record,
        config=yaml_text(record["config"]) if "config" in record else "",
        picture=drawn if drawn.is_file() else None,
    )


def training(folder: Path) -> Training:
    """A training run; of a step logged twice after a resume, the later line counts."""
    lines = read_json_lines(folder / METRICS)
    starts = [line for line in lines if line.get("event") == "start"]
    if not starts:
        raise TandemError(f"{folder / METRICS} has no start line: it was not written by vla-train, or it was cut.")
    steps = {line["step"]: line for line in lines if line.get("event") == "step"}
    return Training(
        folder=folder,
        start=starts[0],
        steps=tuple(steps[k] for k in sorted(steps)),
        validations=tuple(line for line in lines if line.get("event") == "validation"),
        end=next((line for line in reversed(lines) if line.get("event") == "end"), None),
        wall_s=_wall_s(lines),
        resumed=len(starts) - 1,
        config=_text(folder / "config.yaml"),
    )


def _wall_s(lines: Sequence[Mapping[str, Any]]) -> float:
    """`wall_s` counts from the start of each session: add the last one of every session."""
    total = last = 0.0
    for line in lines:
        if line.get("event") == "start":
            total, last = total + last, 0.0
        last = line.get("wall_s", last)
    return total + last


def evaluation(folder: Path) -> Evaluation:
    config = _text(folder / results.CONFIG)
    settings = flatten(config_file(folder / results.CONFIG)) if config else {}
    summary = folder / results.SUMMARY
    return Evaluation(
        folder=folder,
        role=role(settings),
        episodes=tuple(results.read(folder)),
        summary=read_json(summary) if summary.is_file() else {},
        config=config,
        settings=settings,
    )


def role(settings: Mapping[str, Any]) -> Role:
    """What an evaluation was for, told by its configuration."""
    if any(k.startswith("instructions.") for k in settings):  # the robot says one thing, the policy hears another
        return "swap"
    return "realtime" if settings.get("clock") == "realtime" else "evaluation"


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """{"robot": {"kind": "x"}} -> {"robot.kind": "x"}; lists stay whole."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def different_keys(a: Evaluation, b: Evaluation) -> list[str]:
    """Settings of the protocol in which two evaluations differ, as `key: this and that`."""
    first, second = a.protocol, b.protocol
    return [
        f"{k}: {_short(first.get(k, 'absent'))} and {_short(second.get(k, 'absent'))}"
        for k in sorted(first.keys() | second.keys())
        if first.get(k, _ABSENT) != second.get(k, _ABSENT)
    ]


_ABSENT = object()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:60]}… (digest {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _below(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def read_json(path: Path) -> Any:
    """Raises `TandemError` naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TandemError(f"{path} is damaged ({error}). Restore it, or run the stage that writes it again.") from error


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
