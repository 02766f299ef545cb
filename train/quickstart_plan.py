"""What the quickstart runs: presets of its size, and the stages made from them. Pure, but for looking at files."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.stages import Stage
from train.verdict import Expected
from vla.errors import UsageError

FAUCETS = ("faucet-open-v3", "faucet-close-v3")  # look alike: the instruction alone tells them apart
RECORD, TRAIN = "record_metaworld.yaml", "sft_metaworld_flow.yaml"
EVAL, SWAP, REALTIME = "eval_metaworld.yaml", "eval_metaworld_swap.yaml", "eval_metaworld_realtime.yaml"
CONFIGS = (RECORD, TRAIN, EVAL, SWAP, REALTIME)
PROGRAMS = {  # console script -> module with its `main`
    "vla-record": "robot.record",
    "vla-data": "train.data_cli",
    "vla-train": "train.sft",
    "vla-eval": "robot.evaluate",
    "vla-report": "train.report",
}


@dataclass(frozen=True)
class Preset:
    """How much of everything."""

    name: str
    minutes: float  # on two idle cores
    tasks: tuple[str, ...]
    demonstrations: int  # per task
    steps: int  # of training
    episodes: int  # of evaluation, per task
    swap_episodes: int  # per task of the faucet pair
    realtime_episodes: int  # per task
    expected: Expected | None  # None: the result of this size says nothing
    note: str


DEFAULT = Preset(
    name="default",
    minutes=10.0,
    tasks=(*FAUCETS, "drawer-close-v3", "button-press-topdown-v3"),
    demonstrations=40,
    steps=1600,
    episodes=20,
    swap_episodes=20,
    realtime_episodes=1,
    expected=Expected(success_rate=0.9, swap_rate=0.05),
    note="",
)
SMOKE = Preset(
    name="smoke",
    minutes=1.5,
    tasks=FAUCETS,
    demonstrations=2,
    steps=6,
    episodes=1,
    swap_episodes=1,
    realtime_episodes=1,
    expected=None,
    note="The smoke preset only shows that every stage runs: six training steps teach nothing.",
)
PRESETS = {p.name: p for p in (DEFAULT, SMOKE)}
LEAST = {"demonstrations": 10, "steps": 100, "episodes": 5, "swap_episodes": 5}
MOST = {"demonstrations": 40, "episodes": 100, "swap_episodes": 50}  # more demonstrations than 40 were never tried


def scaled(preset: Preset, minutes: float | None) -> Preset:
    """`preset` in proportion to another time on two idle cores, within bounds that keep it meaningful.

    Training steps, demonstrations and evaluation episodes scale alike; demonstrations end at 40 per task.
    Below the preset's own time its expectations are dropped, since less training reaches less.

    Raises:
        UsageError: a time that is not positive, or for the smoke preset.
    """
    if minutes is None:
        return preset
    if preset.name != DEFAULT.name:
        raise UsageError(
            f"--minutes scales the default preset; {preset.name!r} has a fixed size. Leave one of them out."
        )
    if not minutes > 0:
        raise UsageError(f"--minutes must be positive, got {minutes:g}.")
    factor = minutes / preset.minutes
    sizes = {}
    for name, least in LEAST.items():
        size = round(getattr(preset, name) * factor)
        sizes[name] = max(least, min(size, MOST.get(name, size)))
    return dataclasses.replace(preset, minutes=minutes, expected=preset.expected if factor >= 1 else None, **sizes)


def changes(preset: Preset, original: Preset) -> str:
    """What scaling changed, in words: "160 training steps in place of 1600, ..."."""
    words = {
        "demonstrations": "demonstrations per task",
        "steps": "training steps",
        "episodes": "evaluation episodes per task",
        "swap_episodes": "language-swap episodes per task",
    }
    told = [
        f"{getattr(preset, k)} {word} in place of {getattr(original, k)}"
        for k, word in words.items()
        if getattr(preset, k) != getattr(original, k)
    ]
    return ", ".join(told)


def find_configs(given: Path | None) -> Path:
    """The folder of configurations: as given, else ./configs, else the one of the clone this code runs from.

    Raises:
        UsageError: there is none, or a file that the quickstart needs is not in it.
    """
    places = [given] if given else [Path("configs"), Path(__file__).resolve().parents[1] / "configs"]
    for place in places:
        missing = [name for name in CONFIGS if not (place / name).is_file()]
        if not missing:
            return place
    raise UsageError(
        f"The quickstart needs the configurations {', '.join(CONFIGS)} and found no folder that has them all "
        f"(looked in {', '.join(str(p) for p in places)}). They belong to the project's sources, not to "
        "the installed package: run this in a clone, or name the folder with --configs."
    )


def plan(preset: Preset, configs: Path, out: Path, seed: int) -> tuple[Stage, ...]:
    """The stages in their order. Each begins from what those before it left in `out`."""
    recipe, policy = out / "data" / "recipe.yaml", out / "train" / "checkpoints" / "last"
    tasks = f"robot.tasks=[{','.join(preset.tasks)}]"
    smoke = preset.name == SMOKE.name
    few = ("workers=1",) if smoke else ()
    films = ("films.failures=1", "films.successes=1") if smoke else ()
    no_films = ("films.failures=0", "films.successes=0") if smoke else ()
    budget_s = preset.minutes * 60
    make = Maker(configs, out)
    return (
        make.stage(
            ("record", "vla-record", RECORD),
            "scripted experts demonstrate the tasks; the demonstrations become a LeRobot data set",
            (tasks, f"episodes_per_task={preset.demonstrations}", *few),
            (out / "data", out / ".data.recording"),
            _is_file(out / "data" / "tandem_record.json"),
            budget_s * 0.12,
        ),
        Stage(
            name="check",
            why="broken data would spoil everything after it, so the data set is examined first",
            command=program("vla-data", "check", absolute(recipe)),
            shown=f"vla-data check {shlex.quote(str(recipe))}",
            outputs=(),
            done=lambda: True,
            expected_s=6,
        ),
        Stage(
            name="inspect",
            why="a picture of the data: lengths, actions, what the camera saw",
            command=program("vla-data", "inspect", absolute(recipe), "--out", absolute(out / "inspect")),
            shown=f"vla-data inspect {shlex.quote(str(recipe))} --out {shlex.quote(str(out / 'inspect'))}",
            outputs=(out / "inspect",),
            done=_is_file(out / "inspect" / "inspect.png"),
            expected_s=6,
        ),
        make.stage(
            ("train", "vla-train", TRAIN),
            "the policy learns to imitate the demonstrations from pictures, state and instruction",
            (
                f"seed={seed}",
                f"steps={preset.steps}",
                f"data.mixture.0.recipe={absolute(recipe)}",
                f"data.cache.folder={absolute(out / 'cache')}",
                *(("validation=null", "log.every=1", "schedule.warmup=2") if smoke else ()),
            ),
            (out / "train", out / "cache"),
            lambda: _training_ended(out / "train" / "metrics.jsonl", policy),
            budget_s * 0.6,
        ),
        make.stage(
            ("eval", "vla-eval", EVAL),
            "the policy is tried from starts that nobody demonstrated: the success rate that counts",
            (tasks, f"episodes={preset.episodes}", f"policy.path={absolute(policy)}", *few, *films),
            (out / "eval",),
            _is_file(out / "eval" / "summary.json"),
            budget_s * 0.1,
        ),
        make.stage(
            ("swap", "vla-eval", SWAP),
            "told the wrong instruction, a policy that listens must fail: this shows that language decides",
            (f"episodes={preset.swap_episodes}", f"policy.path={absolute(policy)}", *few, *no_films),
            (out / "swap",),
            _is_file(out / "swap" / "summary.json"),
            budget_s * 0.06,
        ),
        make.stage(
            ("realtime", "vla-eval", REALTIME),
            "the same policy against the wall clock, as on an arm: its thinking time now costs something",
            (tasks, f"episodes={preset.realtime_episodes}", f"policy.path={absolute(policy)}", *no_films),
            (out / "realtime",),
            _is_file(out / "realtime" / "summary.json"),
            15 + 4 * preset.realtime_episodes * len(preset.tasks),
        ),
        Stage(
            name="report",
            why="everything that ran and came out, in one page that needs nothing but a browser",
            command=program("vla-report", absolute(out), "--out", absolute(out / "report.html")),
            shown=f"vla-report {shlex.quote(str(out))}",
            outputs=(out / "report.html",),
            done=_is_file(out / "report.html"),
            expected_s=5,
        ),
    )


@dataclass(frozen=True)
class Maker:
    """Makes the stages that are a command with a configuration and an output folder of the stage's name."""

    configs: Path
    out: Path

    def stage(
        self,
        what: tuple[str, str, str],
        why: str,
        overrides: Sequence[str],
        outputs: tuple[Path, ...],
        done: Callable[[], bool],
        expected_s: float,
    ) -> Stage:
        """`what`: the stage's name, its console script, its configuration file."""
        name, script, config = what
        folder = {"record": "data"}.get(name, name)
        arguments = (absolute(self.configs / config), *overrides, f"output={absolute(self.out / folder)}")
        root = f"{Path.cwd()}/"  # what a person types is relative to where they are
        shown = shlex.join([script, *(a.replace(root, "") for a in arguments)])
        return Stage(name, why, program(script, *arguments), shown, outputs, done, expected_s)


def program(script: str, *arguments: str) -> tuple[str, ...]:
    """The argument vector that runs a console script of ours with this interpreter, installed on the path or not.

    -P: what lies in the current folder (`datasets/`, for one) must not hide installed packages.
    """
    code = f"import sys; from {PROGRAMS[script]} import main; sys.exit(main())"
    return sys.executable, "-P", "-c", code, *arguments


def absolute(path: Path) -> str:
    return str(path.absolute())


def _is_file(path: Path) -> Callable[[], bool]:
    return path.is_file


def _training_ended(metrics: Path, last: Path) -> bool:
    """Whether the log says that training came to its end, and a checkpoint is there to be used."""
    if not (metrics.is_file() and last.is_file()):
        return False
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return bool(lines) and json.loads(lines[-1]).get("event") == "end"
