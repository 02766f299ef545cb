"""Every action head on the four Meta-World tasks, with one horizon and with a mixture of horizons.

  uv run python bench/bench_heads.py --steps 1600 --seeds 0 1 2        all arms; about 10 CPU-minutes for each training
  uv run python bench/bench_heads.py --arms flow discrete --seeds 0    some of them

One recipe, one budget, the same training seeds and the same evaluation starts for every arm: rows differ in the head
alone. What is done is not done again: stop it, start it, add seeds. The table goes to OUT/table.md, with Wilson
intervals over all episodes of an arm, and McNemar's exact p against the arm of the first line on the same starts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robot.statistics import gained_lost, mcnemar_exact, wilson
from vla.files import read_json_lines, write_text

ROOT = Path(__file__).resolve().parents[1]
HEADS = {
    "flow": "{kind: flow, time: concat, steps: 5, noise_scale: 0.0, draws: 4}",
    "discrete": "{kind: discrete_diffusion, bins: 256, binary_dims: [], layout: per_step, steps: 8, score: max, "
    "remask: none, temperature: 1.0, choice_temperature: 0.0, draws: 4}",
    "e0": "{kind: e0, bins: 256, layout: per_step, alpha: 1.0, time: concat, steps: 5, draws: 4}",
    "regression": "{kind: regression, error: l1}",
}
MIXTURE = "{horizons: [2, 4, 6, 8], gate_noise: learned, independent: 1.0, balance: 1e-3, consensus: null}"
CONSENSUS = "{shortest: 4, ratio: 1.1, active: 2}"
ARMS = {name: [f"policy.head={head}"] for name, head in HEADS.items()} | {
    f"{name}_moh": [f"policy.head={head}", f"policy.mixture={MIXTURE}"] for name, head in HEADS.items()
}


def run(command: Sequence[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=out, stderr=out, check=False, env=environment
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}; see {log}.")


def job(out: Path, arm: str, seed: int, options: argparse.Namespace) -> None:
    """Train one arm with one seed and evaluate it, with the consensus rule too if it has horizons."""
    folder = out / f"{arm}-{seed}"
    train = ["train.sft", "configs/sft_metaworld_flow.yaml", f"output={folder / 'train'}", f"seed={seed}"]
    train += [f"steps={options.steps}", "policy.normalization=quantile", "checkpoint.every=400", *ARMS[arm]]
    run([*train, *options.override], folder / "log.txt")
    policy = f"policy.path={folder / 'train' / 'checkpoints' / 'last'}"
    for name, settings in evaluations(arm).items():
        if not (folder / name / "summary.json").is_file():
            test = ["robot.evaluate", "configs/eval_metaworld.yaml", policy, f"output={folder / name}"]
            test += [
                f"policy.settings={settings}",
                f"episodes={options.episodes}",
                "films.successes=0",
                "films.failures=0",
            ]
            run([*test, "workers=1"], folder / "log.txt")


def evaluations(arm: str) -> dict[str, str]:
    plain = "{execute: 4}"
    return {"eval": plain} | ({"consensus": f"{{mixture: {{consensus: {CONSENSUS}}}}}"} if arm.endswith("_moh") else {})


def rows(out: Path, arm: str, kind: str) -> list[dict]:
    found = sorted(out.glob(f"{arm}-*/{kind}/results.jsonl"))
    return [row | {"train": path.parent.parent.name} for path in found for row in read_json_lines(path)]


def line(name: str, these: list[dict], reference: list[dict]) -> str:
    wins = sum(r["success"] for r in these)
    interval = wilson(wins, len(these))
    seeds = sorted({r["train"] for r in these})
    each = " ".join(str(sum(r["success"] for r in these if r["train"] == s)) for s in seeds)
    executed = statistics.mean(r["steps"] / r["chunks"] for r in these if r["chunks"])
    latency = statistics.median(ms for r in these for ms in r["latency_ms"])
    p = "" if these is reference else f"{mcnemar_exact(*gained_lost(*paired(reference, these))):.2g}"
    share = f"{100 * wins / len(these):.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return f"| {name} | {wins}/{len(these)} | {share} | {each} | {p} | {executed:.1f} | {latency:.0f} |"


def paired(reference: list[dict], these: list[dict]) -> tuple[list[bool], list[bool]]:
    """Successes on the starts and training seeds that both have."""
    before, after = (
        {(r["train"].split("-")[-1], r["task"], r["seed"]): r["success"] for r in rows} for rows in (reference, these)
    )
    both = sorted(before.keys() & after.keys())
    return [before[k] for k in both], [after[k] for k in both]


def table(out: Path, arms: Sequence[str]) -> str:
    head = [
        "| arm | successes | % [95 % interval] | by training seed | p against the first | steps a chunk | ms a chunk |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    reference = rows(out, arms[0], "eval")
    body = []
    for arm in arms:
        for kind in evaluations(arm):
            these = reference if (arm, kind) == (arms[0], "eval") else rows(out, arm, kind)
            if these:
                body.append(line(arm + ("" if kind == "eval" else ", consensus"), these, reference))
    return "\n".join([*head, *body]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_heads")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1600, help="training steps of every arm")
    parser.add_argument("--episodes", type=int, default=20, help="evaluation starts of each task")
    parser.add_argument("--jobs", type=int, default=2, help="arms trained at a time, one thread each")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for every training run")
    options = parser.parse_args()
    out = options.out.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        work = [pool.submit(job, out, arm, seed, options) for seed in options.seeds for arm in options.arms]
        for done in work:
            done.result()
            write_text(out / "table.md", table(out, options.arms))
    print(json.dumps({"steps": options.steps, "seeds": options.seeds}) + "\n" + (out / "table.md").read_text())


if __name__ == "__main__":
    main()
