"""Evaluate a policy on a simulated robot: success rates with intervals, latency, films of failures.

    vla-eval configs/eval_metaworld.yaml policy.path=outputs/sft_metaworld/checkpoints/last
    vla-eval configs/eval_metaworld.yaml policy.path=expert output=outputs/eval_expert

Every task is tried from the same seeds by every policy, so that two evaluations can be compared episode
by episode. Results are written as episodes end: interrupted, the same command continues, and episodes
that ended in an error are tried again. A folder that holds results of another configuration is refused.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from robot import results
from robot.eval_config import EvalConfig, differences
from robot.eval_pool import Done, Pool
from robot.eval_worker import as_result, work
from robot.policies import fingerprint
from robot.progress import Counter
from robot.runtime import Episode
from robot.versions import collect
from vla import config as configs
from vla.cli import config_main
from vla.errors import MissingDependency, TandemError, UsageError
from vla.files import require_writable, write_json, write_text
from vla.types import Result


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run what is not finished yet; return what `summary.json` holds.

    Raises:
        UsageError: the folder holds another evaluation.
        TandemError: no episode could be tried, or processes keep dying.
        SpecMismatch, CheckpointError: robot and policy do not fit, the checkpoint cannot be read.
    """
    began = time.monotonic()
    if config.films.failures + config.films.successes and not importlib.util.find_spec("av"):
        raise MissingDependency(
            "Films need PyAV, which is not installed. Install it: uv pip install 'av>=15,<16'; "
            "or do without: films.failures=0 films.successes=0"
        )
    checkpoint = fingerprint(config.policy.path)
    require_writable(config.output)
    limits = {"workers": config.workers, "threads": config.threads, "timeout_s": config.timeout_s}
    with results.alone_in(config.output):
        rows = {results.key(row): row for row in _begin(config, checkpoint)}
        with Pool(work, (config, checkpoint), **limits) as pool:
            try:
                ran = _run_episodes(config, pool, rows, checkpoint)
            except TandemError:
                _leave_no_trace(config.output)
                raise
            ordered = _ordered(config, rows)
            _run_films(config, pool, ordered)
        results.rewrite(config.output, ordered)
        wall_s = time.monotonic() - began if ran else _last_wall_s(config, began)
        summary = results.summarise(config.output, ordered, config.clock, wall_s)
        write_json(config.output / results.SUMMARY, summary)
    if not summary["overall"]["episodes"]:
        raise TandemError(
            f"All {len(ordered)} episodes ended in an error, the first with: {ordered[0].error}. "
            f"Each one's traceback is in {config.output / results.EPISODES}."
        )
    return summary


def _leave_no_trace(folder: Path) -> None:
    """Remove a folder in which no episode has ended, so that a corrected command may use it."""
    if not (folder / results.RESULTS).exists():
        (folder / results.CONFIG).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _begin(config: EvalConfig, checkpoint: str) -> list[Result]:
    """Make the output folder, or continue in one of the same configuration; return its episodes."""
    folder = config.output
    known, path = folder / results.CONFIG, folder / results.RESULTS
    if not path.exists():
        write_text(known, configs.dump(config))
        return []
    before = configs.load(EvalConfig, known)
    changed = differences(before.deciding(), config.deciding())
    if changed:
        raise UsageError(
            f"{folder} holds an evaluation of another configuration:\n" + "\n".join(changed) + "\n"
            "Choose another output folder, or delete that one."
        )
    write_text(known, configs.dump(config))
    rows = results.read(folder)
    others = {row.versions.get("checkpoint", "") for row in rows} - {checkpoint}
    if others:
        raise UsageError(
            f"{folder} holds episodes of a checkpoint with other content ({', '.join(sorted(others))}) than "
            f"{config.policy.path} has now ({checkpoint}). Choose another output folder."
        )
    return rows


def _run_episodes(config: EvalConfig, pool: Pool, rows: dict[results.Key, Result], checkpoint: str) -> int:
    """Try what is missing, seed by seed through all tasks, so that the running rate is a fair sample.

    Returns how many episodes were tried.
    """
    suite = config.robot.kind
    wanted = [(suite, task, config.first_seed + i) for i in range(config.episodes) for task in config.robot.tasks]
    missing = [k for k in wanted if k not in rows or rows[k].error is not None]
    jobs = [{"do": "episode", "task": task, "seed": seed} for _, task, seed in missing]
    finished = len(wanted) - len(missing)
    if not jobs:
        return 0
    if finished:
        print(f"{finished} of {len(wanted)} episodes are finished already", file=sys.stderr)
    with Counter("episodes", len(wanted)) as shown:
        for number, done in enumerate(pool.run(jobs), finished + 1):
            row = _row(config, done, checkpoint)
            results.append(config.output, row)
            rows[results.key(row)] = row
            errors = sum(r.error is not None for r in rows.values())
            shown.to(number, describe(results.rate(list(rows.values())), errors))
    return len(jobs)


def _last_wall_s(config: EvalConfig, began: float) -> float:
    """The time of the run that tried the last episode, when this one tried none."""
    path = config.output / results.SUMMARY
    return json.loads(path.read_text(encoding="utf-8"))["wall_s"] if path.is_file() else time.monotonic() - began


def _row(config: EvalConfig, done: Done, checkpoint: str) -> Result:
    if done.answer is not None and "refused" in done.answer:
        raise _refusal(done.answer)
    if done.answer is not None:
        return results.from_json(done.answer["result"], "a worker")
    task, seed = done.job["task"], done.job["seed"]
    episode = Episode(
        instruction=config.instructions.get(task, ""),
        success=False,
        steps=0,
        first_success_step=None,
        commands=(),
        latency_ms=(),
        overruns=0,
        verdicts={},
        wall_s=0.0,
        error=f"process: {done.died}",
    )
    results.write_episode(config.output, task, seed, episode)
    versions = collect() | ({"checkpoint": checkpoint} if checkpoint else {})
    return as_result(config, task, seed, episode, config.digest(), versions)


def _refusal(answer: Any) -> TandemError:
    """The worker's error, as it would have been raised here."""
    return (UsageError if answer["exit_code"] == UsageError.exit_code else TandemError)(answer["refused"])


def _ordered(config: EvalConfig, rows: dict[results.Key, Result]) -> list[Result]:
    """The asked-for episodes, by task and seed. Others in the folder (of a longer run) are kept behind."""
    tasks = list(config.robot.tasks)
    return sorted(rows.values(), key=lambda row: (tasks.index(row.task), row.seed))


def _run_films(config: EvalConfig, pool: Pool, ordered: list[Result]) -> None:
    """Film the first failures and successes; set `video` in their rows."""
    at = {(row.task, row.seed): i for i, row in enumerate(ordered)}
    jobs = []
    for row in to_film(config, ordered):
        if row.video is None or not (config.output / row.video).is_file():
            jobs.append({"do": "film", "task": row.task, "seed": row.seed})
    if not jobs:
        return
    with Counter("films", len(jobs)) as shown:
        for number, done in enumerate(pool.run(jobs), 1):
            answer = done.answer or {"failed": f"the process {done.died}"}
            note = answer.get("film") or answer.get("failed") or answer.get("refused")
            shown.to(number, str(note))
            if "film" in answer:
                i = at[done.job["task"], done.job["seed"]]
                ordered[i] = dataclasses.replace(ordered[i], video=answer["film"])
            else:
                print(f"warning: no film of {done.job['task']}, seed {done.job['seed']}: {note}", file=sys.stderr)


def to_film(config: EvalConfig, rows: Sequence[Result]) -> list[Result]:
    """The first failures and successes, seed by seed, so that every task has its turn."""
    by_seed = sorted((row for row in rows if row.error is None), key=lambda row: row.seed)
    failures = [row for row in by_seed if not row.success][: config.films.failures]
    return failures + [row for row in by_seed if row.success][: config.films.successes]


def describe(rate: dict[str, Any], errors: int = 0) -> str:
    """ "19/20 = 95 % [76, 99]", and errors if there are any."""
    share = "no verdict yet" if rate["rate"] is None else f"{100 * rate['rate']:.0f} %"
    text = f"{rate['successes']}/{rate['episodes']} = {share} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"
    return text + (f"  errors: {errors}" if errors else "")


def show(config: EvalConfig, summary: dict[str, Any]) -> str:
    """The table that the command prints."""
    shown = summary["tasks"] | {f"switch {when}": rate for when, rate in summary.get("switches", {}).items()}
    width = max(len(name) for name in (*shown, "overall"))
    lines = [f"{name:{width}}  {describe(rate)}" for name, rate in shown.items()]
    lines += [f"{'overall':{width}}  {describe(summary['overall'], summary['errors'])}  (95 % Wilson interval)"]
    ms, control = summary["latency_ms"], summary["control"]
    if ms["p50"] is not None:
        lines += [f"policy call: p50 {ms['p50']:.1f} ms, p95 {ms['p95']:.1f} ms, longest {ms['max']:.1f} ms"]
    if config.clock == "realtime":
        lines += [f"real time: {control['overruns']} of {control['steps']} control ticks missed"]
    return "\n".join([*lines, f"results: {config.output}"])


def _body(config: EvalConfig) -> None:
    print(show(config, evaluate(config)))


def main(argv: Sequence[str] | None = None) -> int:
    return config_main(EvalConfig, _body, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
