"""The sections of a report in their order, and those on training, data and what ran.

Another stage adds its sections by adding a function to `SECTIONS`: Bundle in, `Section` values out.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.report_blocks import Block, Code, Column, Fold, Section, Table, Text, Tile, Tiles
from train.report_data import Bundle, Recording, Training
from train.report_plots import Panel, Series, curves, png, shared_terms
from train.report_results import (
    comparison_sections,
    evaluation_sections,
    failure_sections,
    film_sections,
    realtime_sections,
    swap_sections,
)
from train.verdict import Count, Expected, judge, percent


def build(bundle: Bundle, film_budget_bytes: int) -> list[Section]:
    """All sections that there is something to say in."""
    return [section for make in sections(film_budget_bytes) for section in make(bundle)]


def sections(film_budget_bytes: int) -> tuple[Callable[[Bundle], Iterable[Section]], ...]:
    return (
        headline_sections,
        comparison_sections,
        evaluation_sections,
        swap_sections,
        realtime_sections,
        lambda bundle: film_sections(bundle, film_budget_bytes),
        failure_sections,
        training_sections,
        data_sections,
        ran_sections,
        command_sections,
    )


def headline_sections(bundle: Bundle) -> Iterator[Section]:
    evaluations = bundle.of("evaluation")
    blocks: list[Block] = []
    if len(evaluations) == 1:
        swap = [e for run in bundle.of("swap") for e in run.episodes]
        verdict = judge(Count.of(evaluations[0].episodes), Count.of(swap) if swap else None, expected(bundle.state))
        blocks.append(Text(verdict.sentence, verdict.tone))
    elif evaluations:
        blocks.append(Text(f"{len(evaluations)} evaluations side by side; the comparison below pairs their episodes."))
    if note := bundle.state.get("note"):
        blocks.append(Text(note))
    tiles = tuple(_tiles(bundle))
    if tiles:
        blocks.append(Tiles(tiles))
    if blocks:
        yield Section("headline", "Result", tuple(blocks))


def expected(state: Mapping[str, Any]) -> Expected | None:
    """What the run was meant to reach, as its `state.json` says."""
    wanted = state.get("expected")
    return Expected(wanted["success_rate"], wanted["swap_rate"]) if wanted else None


def _tiles(bundle: Bundle) -> Iterator[Tile]:
    for run in bundle.of("evaluation"):
        yield _rate_tile("Success" if len(bundle.of("evaluation")) == 1 else run.folder.name, Count.of(run.episodes))
    for run in bundle.of("swap"):
        yield _rate_tile("With the wrong instruction", Count.of(run.episodes))
    for run in bundle.of("realtime"):
        yield _rate_tile("In real time", Count.of(run.episodes))
    if len(bundle.of("evaluation")) == 1:
        values = [ms for e in bundle.of("evaluation")[0].episodes for ms in e.latency_ms]
        if values:
            p50, p95 = np.percentile(values, [50, 95])
            yield Tile("Policy call", f"{p50:.1f} ms", f"median; 95th percentile {p95:.1f} ms")
    for run in bundle.trainings:
        if run.steps:
            yield Tile("Training", f"{run.steps[-1]['step']} steps", f"in {duration(run.wall_s)}")
    for run in bundle.recordings:
        episodes, frames = run.info.get("total_episodes", 0), run.info.get("total_frames", 0)
        yield Tile("Demonstrations", f"{episodes}", f"{frames} frames")


def _rate_tile(name: str, count: Count) -> Tile:
    if not count.episodes:
        return Tile(name, "-", "no episode judged")
    low, high = count.interval.low, count.interval.high
    return Tile(name, percent(count.rate), f"{count}; 95 % interval {100 * low:.0f} to {100 * high:.0f} %")


def training_sections(bundle: Bundle) -> Iterator[Section]:
    for number, run in enumerate(bundle.trainings):
        key = "training" if number == 0 else f"training-{number + 1}"
        title = "Training" if len(bundle.trainings) == 1 else f"Training: {run.folder.name}"
        yield Section(key, title, tuple(_training_blocks(run)))


def _training_blocks(run: Training) -> Iterator[Block]:
    if not run.steps:
        yield Text("No step was logged yet.", "warning")
        return
    if run.end is None:
        yield Text(f"Not finished: the last logged step is {run.steps[-1]['step']}.", "warning")
    yield _training_table(run)
    panels = _panels(run)
    last = run.steps[-1]
    yield curves(
        panels,
        f"Training curves over {last['step']} steps: {', '.join(p.title.lower() for p in panels)}. "
        f"The loss goes from {run.steps[0]['loss']:.3g} to {last['loss']:.3g}.",
        "Each point is the mean since the point before it.",
        "step",
    )


def _training_table(run: Training) -> Table:
    parameters = run.start.get("parameters", {})
    rate = [s["samples_per_s"] for s in run.steps]
    wait = [s["data_wait_share"] for s in run.steps]
    rows = [
        ("Steps", f"{run.steps[-1]['step']}"),
        ("Time", duration(run.wall_s) + (f", resumed {run.resumed} times" if run.resumed else "")),
        ("Parameters, trained / all", f"{parameters.get('trainable', 0):,} / {parameters.get('total', 0):,}"),
        ("Loss, first / last", f"{run.steps[0]['loss']:.4f} / {run.steps[-1]['loss']:.4f}"),
        ("Samples per second, median", f"{np.median(rate):.0f}"),
        ("Share of time spent waiting for data", percent(float(np.mean(wait)))),
        ("Peak memory, MB", f"{max(s.get('memory_mb', 0) for s in run.steps):.0f}"),
    ]
    if run.validations:
        rows.append(("Validation loss, last", f"{run.validations[-1]['loss']:.4f}"))
    return Table("Training in numbers", (Column("Quantity"), Column("Value", "number")), tuple(rows))


def _panels(run: Training) -> list[Panel]:
    def series(label: str, get: Callable[[Mapping[str, Any]], float]) -> Series:
        return Series(label, [s["step"] for s in run.steps], [get(s) for s in run.steps])

    terms = shared_terms(run.steps)
    losses = [series("loss", lambda s: s["loss"])]
    if len(terms) > 1:
        losses += [series(name, lambda s, n=name: s.get("terms", {}).get(n, float("nan"))) for name in terms]
    if run.validations:
        held_out = [v["loss"] for v in run.validations]
        losses.append(Series("validation", [v["step"] for v in run.validations], held_out))
    values = [y for line in losses for y in line.y]
    wide = min(values) > 0 and max(values) > 10 * min(values)
    return [
        Panel("Loss", tuple(losses), scale="log" if wide else "linear"),
        Panel("Learning rate", (series("lr", lambda s: s["lr"]),), from_zero=True),
        Panel("Gradient norm", (series("norm", lambda s: s["grad_norm"]),), from_zero=True),
        Panel("Samples per second", (series("rate", lambda s: s["samples_per_s"]),), from_zero=True),
        Panel("Waiting for data, % of time", (series("wait", lambda s: 100 * s["data_wait_share"]),), from_zero=True),
    ]


def data_sections(bundle: Bundle) -> Iterator[Section]:
    for number, run in enumerate(bundle.recordings):
        title = "Data" if len(bundle.recordings) == 1 else f"Data: {run.folder.name}"
        yield Section("data" if number == 0 else f"data-{number + 1}", title, tuple(_data_blocks(run, bundle.checked)))


def _data_blocks(run: Recording, checked: str) -> Iterator[Block]:
    info = run.info
    facts = [
        ("Episodes", f"{info.get('total_episodes', 0):,}"),
        ("Frames", f"{info.get('total_frames', 0):,}"),
        ("Frames per second", f"{info.get('fps', 0):g}"),
        ("Robot", str(info.get("robot_type") or "not said")),
        ("Features", ", ".join(k for k in info.get("features", {}) if "." in k or k == "action")),
    ]
    yield Table("The data set", (Column("Quantity"), Column("Value", "number")), tuple(facts))
    tasks = run.record.get("tasks", {})
    if tasks:
        columns = (Column("Task"), *(Column(n, "number") for n in ("Attempts", "Failed", "Episodes", "Frames")))
        yield Table("Demonstrations by task", columns, tuple(_task_row(run.record, name) for name in tasks))
    if checked:
        yield Fold("What vla-data check found", (Code(checked),))
    if run.picture:
        yield png(
            run.picture,
            "Sample frames, episode lengths and action histograms.",
            "What is in the data set.",
        )


def _task_row(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    tries = record["tasks"][name]
    kept = [e for e in record.get("episodes", ()) if e.get("task") == name]
    frames = sum(e.get("frames", 0) for e in kept)
    return name, f"{tries.get('attempts', 0)}", f"{tries.get('failed', 0)}", f"{len(kept)}", f"{frames:,}"


def ran_sections(bundle: Bundle) -> Iterator[Section]:
    blocks: list[Block] = []
    stages = bundle.state.get("stages", {})
    if stages:
        blocks.append(_stage_table(stages))
    blocks.append(Table("Identity", (Column("What"), Column("Value")), tuple(_identity(bundle))))
    versions = _versions(bundle)
    if versions:
        rows = tuple((name, ", ".join(found)) for name, found in versions.items())
        blocks.append(Table("Versions", (Column("Package"), Column("Version", "number")), rows))
    blocks += [Fold(f"Configuration of {name}", (Code(text),)) for name, text in _configs(bundle)]
    yield Section("ran", "What ran", tuple(blocks))


def _stage_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    done = {k: v for k, v in stages.items() if v.get("wall_s") is not None}
    columns = (Column("Stage"), *(Column(n, "number") for n in ("Wall time", "CPU seconds", "Peak memory, MB")))
    rows = tuple(
        (name, duration(s["wall_s"]), f"{s.get('cpu_s', 0):.0f}", f"{s.get('peak_mb', 0):.0f}")
        for name, s in done.items()
    )
    total = (
        "Total",
        duration(sum(s["wall_s"] for s in done.values())),
        f"{sum(s.get('cpu_s', 0) for s in done.values()):.0f}",
        f"{max((s.get('peak_mb', 0) for s in done.values()), default=0):.0f}",
    )
    return Table("Time and memory of the stages; the total's memory is the largest", columns, rows, total)


def _identity(bundle: Bundle) -> Iterator[tuple[str, str]]:
    for name, value in bundle.state.get("machine", {}).items():
        yield name, str(value)
    for run in bundle.trainings:
        yield f"Training {run.folder.name}: configuration digest", str(run.start.get("config_digest", "unknown"))
        for data in run.start.get("data", ()):
            yield f"Data {data.get('recipe')}: revision", str(data.get("revision"))
    for run in bundle.evaluations:
        digests = dict.fromkeys(e.config_digest for e in run.episodes)
        yield f"Evaluation {run.folder.name}: configuration digest", ", ".join(digests) or "no episodes"
        yield f"Evaluation {run.folder.name}: policy", ", ".join(dict.fromkeys(e.policy for e in run.episodes))


def _versions(bundle: Bundle) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    sources: list[Mapping[str, str]] = [run.start.get("versions", {}) for run in bundle.trainings]
    sources += [e.versions for run in bundle.evaluations for e in run.episodes]
    sources += [run.record.get("versions", {}) for run in bundle.recordings]
    for versions in sources:
        for name, version in versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return found


def _configs(bundle: Bundle) -> Iterator[tuple[str, str]]:
    runs: Sequence[Any] = (*bundle.recordings, *bundle.trainings, *bundle.evaluations)
    for run in runs:
        if run.config:
            yield run.folder.name, run.config.rstrip()


def command_sections(bundle: Bundle) -> Iterator[Section]:
    lines = [stage["shown"] for stage in bundle.state.get("stages", {}).values() if stage.get("shown")]
    if not lines:
        lines += [f"vla-train {shlex.quote(str(r.folder / 'config.yaml'))}" for r in bundle.trainings if r.config]
        lines += [f"vla-eval {shlex.quote(str(r.folder / 'config.yaml'))}" for r in bundle.evaluations if r.config]
    if lines:
        text = Text("Each line continues where it was stopped, and does nothing where the result is complete.")
        yield Section("commands", "Commands", (text, Code("\n".join(lines))))


def duration(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
