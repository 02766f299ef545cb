"""The sections on evaluations: success, language swap, real time, films, failures, comparison."""

import base64
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from robot import results
from robot.statistics import gained_lost, mcnemar_exact, paired_bootstrap
from train.report_blocks import Bar, Block, Cell, Column, Film, Films, Section, Table, Text
from train.report_data import Bundle, Evaluation, different_keys
from train.report_plots import histogram
from train.verdict import Count
from vla.types import Result

RATE_COLUMNS = (
    Column("Task"),
    Column("Solved", "number"),
    Column("Success rate and 95 % interval"),
    Column("Median steps to success", "number"),
)
FAILURES_SHOWN = 60


def bar(count: Count, text: Literal["rate", "with counts"] = "rate") -> Cell:
    """A success rate with its Wilson interval."""
    if not count.episodes:
        return "no episode judged"
    low, high = count.interval.low, count.interval.high
    begin = f"{100 * count.rate:.1f} %" if text == "rate" else f"{count.successes} / {count.episodes}"
    return Bar(count.rate, low, high, f"{begin}  [{100 * low:.1f}, {100 * high:.1f}]")


def by_task(episodes: Sequence[Result]) -> dict[str, list[Result]]:
    """Episodes of each task, in the order in which the tasks first appear."""
    found: dict[str, list[Result]] = {}
    for episode in episodes:
        found.setdefault(episode.task, []).append(episode)
    return found


def success_table(evaluation: Evaluation, caption: str) -> Table:
    """One row a task, all of them in the last."""
    rows = [_rate_row(task, episodes) for task, episodes in by_task(evaluation.episodes).items()]
    return Table(caption, RATE_COLUMNS, tuple(rows), _rate_row("All tasks", evaluation.episodes))


def _rate_row(name: str, episodes: Sequence[Result]) -> tuple[Cell, ...]:
    count = Count.of(episodes)
    steps = [e.first_success_step for e in episodes if e.success and e.first_success_step is not None]
    return name, f"{count.successes} / {count.episodes}", bar(count), f"{np.median(steps):.0f}" if steps else "-"


def evaluation_sections(bundle: Bundle) -> Iterator[Section]:
    runs = bundle.of("evaluation")
    for number, run in enumerate(runs):
        key = "evaluation" if number == 0 else f"evaluation-{number + 1}"
        title = "Evaluation" if len(runs) == 1 else f"Evaluation: {label(run, bundle)}"
        yield Section(key, title, (*_about(run), *_success_blocks(run)))


def _success_blocks(run: Evaluation) -> Iterator[Block]:
    yield success_table(run, "Success by task")
    yield from _errors(run)
    yield from latency_blocks(run)


def _about(run: Evaluation) -> Iterator[Block]:
    suites = ", ".join(dict.fromkeys(e.suite for e in run.episodes)) or "no suite"
    seeds = sorted({e.seed for e in run.episodes})
    span = f", seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else ""
    policies = ", ".join(dict.fromkeys(e.policy for e in run.episodes))
    yield Text(f"{len(run.episodes)} episodes in {suites}{span}, of the policy {policies}.")
    if not run.summary:
        yield Text("This evaluation has no summary.json: it is unfinished, and the rates are preliminary.", "warning")


def _errors(run: Evaluation) -> Iterator[Block]:
    broken = len(run.episodes) - len(run.judged)
    if broken:
        yield Text(
            f"{broken} of {len(run.episodes)} episodes ended in an error and are in no rate; they are listed under "
            "Failures. Running the evaluation again repeats them.",
            "warning",
        )


def latency_blocks(run: Evaluation) -> Iterator[Block]:
    """Percentiles of the wall time of one policy call."""
    values = [ms for e in run.episodes for ms in e.latency_ms]
    if not values:
        return
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    row = (f"{len(values)}", f"{p50:.1f}", f"{p95:.1f}", f"{p99:.1f}", f"{max(values):.1f}")
    names = ("Policy calls", "Median, ms", "95th percentile, ms", "99th percentile, ms", "Longest, ms")
    yield Table("Time of one policy call", tuple(Column(n, "number") for n in names), (row,))
    yield histogram(
        values,
        "Time of one policy call, ms",
        f"Histogram of {len(values)} policy calls: median {p50:.1f} ms, 95th percentile {p95:.1f} ms.",
        "How long the policy took for one chunk of actions, from observation to answer.",
    )


def swap_sections(bundle: Bundle) -> Iterator[Section]:
    """The right and the wrong instruction side by side, on the same seeds where there are any."""
    for number, swap in enumerate(bundle.of("swap")):
        right = next((e for e in bundle.of("evaluation") if _same_policy(e, swap)), None)
        columns = [Column("Scene"), Column("Was told"), Column("Success with the wrong instruction")]
        columns += [Column("Success with the right one")] if right else []
        rows = [_swap_row(task, told, right, {task}) for task, told in by_task(swap.episodes).items()]
        name, _, *rates = _swap_row("All", swap.episodes, right, {e.task for e in swap.episodes})
        blocks: tuple[Block, ...] = (
            Text(
                "The same scenes, but the policy hears the instruction of the other task. The scenes look alike, so a "
                "policy that follows language must fail here: a low rate is the good result."
            ),
            Table("Success by scene and instruction", tuple(columns), tuple(rows), (name, "", *rates)),
            *_errors(swap),
        )
        yield Section("swap" if number == 0 else f"swap-{number + 1}", "Language swap", blocks)


def _swap_row(scene: str, told: Sequence[Result], right: Evaluation | None, tasks: set[str]) -> tuple[Cell, ...]:
    heard = " / ".join(dict.fromkeys(e.instruction for e in told))
    row = (scene, heard, bar(Count.of(told), "with counts"))
    if right is None:
        return row
    return (*row, bar(Count.of([e for e in right.episodes if e.task in tasks]), "with counts"))


def _same_policy(a: Evaluation, b: Evaluation) -> bool:
    return bool(a.episodes and b.episodes) and a.episodes[0].policy == b.episodes[0].policy


def realtime_sections(bundle: Bundle) -> Iterator[Section]:
    for number, run in enumerate(bundle.of("realtime")):
        control = run.summary.get("control", {})
        verdicts = run.summary.get("verdicts", {})
        blocks: list[Block] = [
            Text(
                "The simulator ran against the wall clock, as an arm does: time that the policy needs is time in which "
                "the arm acts on the previous plan, or holds."
            ),
            success_table(run, "Success in real time"),
        ]
        if control:
            counts = ("steps", "held", "overruns")
            row = tuple(f"{control.get(name, 0)}" for name in counts)
            titles = ("Control steps", "Steps without a plan (held)", "Late control steps")
            blocks.append(Table("The control loop", tuple(Column(t, "number") for t in titles), (row,)))
        if verdicts:
            columns = (Column("Safety verdict"), Column("Control steps", "number"))
            rows = tuple((name, str(n)) for name, n in verdicts.items())
            blocks.append(Table("What safety did with the commands", columns, rows))
        blocks += [*_errors(run), *latency_blocks(run)]
        key = "realtime" if number == 0 else f"realtime-{number + 1}"
        yield Section(key, "Real time", tuple(blocks))


def film_sections(bundle: Bundle, budget_bytes: int) -> Iterator[Section]:
    """Films of every run, failures first, until the budget is spent; what is left out is named."""
    films, left_out = [], []
    for run in bundle.evaluations:
        for episode in sorted((e for e in run.episodes if e.video), key=lambda e: e.success):
            path = run.folder / str(episode.video)
            size = path.stat().st_size * 4 // 3 if path.is_file() else None
            if size is None:
                continue
            if size > budget_bytes:
                left_out.append(path)
                continue
            budget_bytes -= size
            films.append(_film(run, episode, path))
    blocks: list[Block] = [Films(tuple(films))] if films else []
    if left_out:
        more = ", ".join(str(p) for p in left_out)
        blocks.append(Text(f"Left out to keep this file small ({len(left_out)} films): {more}"))
    if blocks:
        yield Section("films", "Films", tuple(blocks))


def _film(run: Evaluation, episode: Result, path: Path) -> Film:
    ending = "solved" if episode.success else "failed"
    kind = {"evaluation": "", "swap": "wrong instruction, ", "realtime": "real time, "}[run.role]
    wanted = episode.success != (run.role == "swap")
    return Film(
        caption=f"{episode.task}, seed {episode.seed}: {kind}{ending} (“{episode.instruction}”)",
        alt=f"Film of {episode.task} with seed {episode.seed}; the episode {ending} after {episode.steps} steps.",
        source="data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode(),
        tone="good" if wanted else "bad",
    )


def failure_sections(bundle: Bundle) -> Iterator[Section]:
    runs = [*bundle.of("evaluation"), *bundle.of("realtime")]
    failed = [(run, e) for run in runs for e in run.episodes if not e.success]
    if not runs:
        return
    if not failed:
        yield Section("failures", "Failures", (Text("None: every episode was solved.", "good"),))
        return
    columns = (Column("Task"), Column("Seed", "number"), Column("Steps", "number"), Column("What happened"))
    many = len(runs) > 1
    rows = tuple(
        (*((label(run, bundle),) if many else ()), e.task, str(e.seed), str(e.steps), e.error or "ran out of steps")
        for run, e in failed[:FAILURES_SHOWN]
    )
    table = Table("Episodes that were not solved", (*((Column("Run"),) if many else ()), *columns), rows)
    rest = len(failed) - len(rows)
    more = (Text(f"{rest} more are in results.jsonl of the runs."),) if rest else ()
    yield Section("failures", "Failures", (table, *more))


def comparison_sections(bundle: Bundle) -> Iterator[Section]:
    """Every pair of evaluations of one kind on the episodes that both have."""
    rows, notes = [], []
    for before, after in combinations(bundle.of("evaluation"), 2):
        names = f"{label(before, bundle)} → {label(after, bundle)}"
        rows.append(_comparison_row(names, before, after))
        if differences := different_keys(before, after):
            notes.append(
                Text(
                    f"{names}: the protocols differ, so a difference need not come from the policies. "
                    + "; ".join(differences),
                    "warning",
                )
            )
    if not rows:
        return
    columns = (
        Column("From → to"),
        *(Column(name, "number") for name in ("Pairs", "Gained", "Lost", "Difference, points", "p (McNemar, exact)")),
        Column("Not paired", "number"),
    )
    explanation = Text(
        "Only episodes of the same suite, task and seed are compared. Gained: solved only by the second run; lost: "
        "only by the first. The interval of the difference is a paired bootstrap at 95 %. p answers one question per "
        "row and is not corrected for the number of rows."
    )
    yield Section(
        "comparison",
        "Comparison",
        (explanation, *notes, Table("Pairwise comparison", columns, tuple(rows))),
    )


def _comparison_row(names: str, before: Evaluation, after: Evaluation) -> tuple[Cell, ...]:
    pairs = results.pair(before.episodes, after.episodes)
    if not len(pairs.keys):
        return names, "0", "-", "-", "-", "-", str(pairs.unpaired)
    gained, lost = gained_lost(pairs.before, pairs.after)
    interval = paired_bootstrap(gained, lost, len(pairs.keys))
    difference = 100 * (gained - lost) / len(pairs.keys)
    text = f"{difference:+.1f}  [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    p = mcnemar_exact(gained, lost)
    return (
        names,
        str(len(pairs.keys)),
        str(gained),
        str(lost),
        text,
        f"{p:.3f}" if p >= 0.001 else f"{p:.1e}",
        str(pairs.unpaired),
    )


def label(run: Evaluation, bundle: Bundle) -> str:
    """The folder's name, with as many parents as it takes to tell the runs apart."""
    everyone = [e.folder.resolve() for e in bundle.evaluations]
    mine = run.folder.resolve()
    for parts in range(1, len(mine.parts) + 1):
        name = Path(*mine.parts[-parts:])
        if sum(other.parts[-parts:] == mine.parts[-parts:] for other in everyone) == 1:
            return str(name)
    return str(mine)
