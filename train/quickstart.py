"""From nothing to a trained and tested policy, in one command.

    vla-quickstart                      the whole loop, about ten minutes on two cores
    vla-quickstart --preset smoke       every stage once, as small as it can be, about a minute
    vla-quickstart --minutes 5          less of everything: demonstrations, training steps, episodes
    vla-quickstart --redo train         once more from that stage on

It records demonstrations in a simulator, checks them, trains a policy, evaluates it, tries it with the
wrong instruction, runs it in real time and writes a report. Each stage is one of the other commands, shown
as you would type it. Interrupted or failed, the same command continues at the first stage that is not done.
"""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robot import results
from train.quickstart_plan import EVAL, PRESETS, REALTIME, TRAIN, Preset, changes, find_configs, plan, scaled
from train.stage_display import make_display
from train.stages import Chain
from train.verdict import Count, judge
from vla import cli
from vla.config import to_data


def facts(preset: Preset, seed: int) -> dict[str, Any]:
    """What `state.json` says of a run, besides its stages."""
    return {
        "title": f"Tandem quickstart, {preset.name} preset",
        "preset": to_data(preset),
        "seed": seed,
        "expected": to_data(preset.expected),
        "note": preset.note,
        "machine": machine(),
    }


def machine() -> dict[str, str]:
    """What this runs on."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "Processor": _processor(),
        "Cores": str(usable),
        "Memory": f"{memory_gb:.0f} GB",
        "System": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def conclusion(out: Path, preset: Preset) -> str:
    """The headline result: success with its interval, and whether that is what a good run reaches."""
    success = Count.of(results.read(out / "eval"))
    swap = Count.of(results.read(out / "swap"))
    lines = [judge(success, swap, preset.expected).sentence]
    if preset.note:
        lines.append(preset.note)
    return "\n".join(lines)


def next_commands(configs: Path, out: Path) -> Mapping[str, str]:
    """What a user would want to do now -> the command."""
    policy = f"policy.path={out / 'train' / 'checkpoints' / 'last'}"
    return {
        "Train on your own data (a LeRobot data set; copy and edit a recipe of datasets/)": shlex.join(
            ["vla-train", str(configs / TRAIN), "data.mixture.0.recipe=datasets/mine.yaml", "output=outputs/mine"]
        ),
        "Evaluate this policy more": shlex.join(
            ["vla-eval", str(configs / EVAL), policy, "episodes=100", "output=outputs/eval_100"]
        ),
        "Run it in real time for longer": shlex.join(
            ["vla-eval", str(configs / REALTIME), policy, "episodes=10", "output=outputs/realtime_10"]
        ),
    }


def quickstart(preset: Preset, configs: Path, out: Path, seed: int, redo: str | None) -> None:
    """Run the stages that are not done and say what came out.

    Raises:
        UsageError, StageFailed: as `train.stages.Chain.run`.
    """
    stages = plan(preset, configs, out, seed)
    print(f"{len(stages)} stages into {out}, about {preset.minutes:g} minutes on two idle cores.", file=sys.stderr)
    Chain(stages, out, facts(preset, seed), make_display(stages, sys.stderr)).run(redo)
    print(f"\n{conclusion(out, preset)}\n\nReport: {out / 'report.html'}\n\nWhat next:")
    for what, command in next_commands(configs, out).items():
        print(f"  {what}:\n    {command}")


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__)
    p.add_argument(
        "--preset", choices=sorted(PRESETS), default="default", help="size of the run (default: %(default)s)"
    )
    p.add_argument("--minutes", type=float, help="scale the default preset to about this time on two idle cores")
    p.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="folder (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    p.add_argument("--redo", metavar="STAGE", help="forget this stage and those after it, then run")
    p.add_argument("--configs", type=Path, help="folder of configurations (default: configs/ here or in the clone)")
    args = p.parse_args(argv)

    def body() -> None:
        preset = scaled(PRESETS[args.preset], args.minutes)
        configs = find_configs(args.configs)
        if told := changes(preset, PRESETS[args.preset]):
            print(f"--minutes {args.minutes:g}: {told}.", file=sys.stderr)
        quickstart(preset, configs, args.out, args.seed, args.redo)

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
