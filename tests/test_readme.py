"""README and manual tell the truth: commands exist, their configurations load, the files they name are there."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from train import recipe
from vla import config

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("vla/", "robot/", "train/", "deploy/", "datasets/", "configs/", "tests/", "docs/", "scripts/", "bench/")

CONFIG_OF = {  # command -> the dataclass of its YAML
    "vla-record": "robot.record:RecordConfig",
    "vla-train": "train.sft:TrainConfig",
    "vla-eval": "robot.evaluate:EvalConfig",
    "vla-data": "train.recipe:Recipe",
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[tuple[str, ...]]:
    """The commands of a page's fenced bash blocks, one for each side of a `&&`."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [tuple(w) for w in words if w]


def vla_commands() -> list[tuple[str, ...]]:
    """Each call of one of our commands on any page, once, without `.venv/bin/` or `uv run` before it."""
    found = []
    for page in PAGES:
        for words in commands(page):
            words = words[2:] if words[:2] == ("uv", "run") else words
            name = words[0].removeprefix(".venv/bin/")
            if name.startswith("vla-"):
                found.append((name, *words[1:]))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("words", vla_commands(), ids=" ".join)
def test_command_of_the_manual_is_understood(words: tuple[str, ...]) -> None:
    name, *arguments = words
    assert name in SCRIPTS, f"{name} is not a command; pyproject.toml has {sorted(SCRIPTS)}"
    files = [a for a in arguments if a.endswith(".yaml") and "=" not in a]
    if name in CONFIG_OF and "--help" not in arguments:
        module, cls = CONFIG_OF[name].split(":")
        overrides = [a for a in arguments if "=" in a]
        config.load(getattr(importlib.import_module(module), cls), ROOT / files[0], overrides)


@pytest.mark.parametrize("name", sorted({words[0] for words in vla_commands()}))
def test_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, function = SCRIPTS[name].split(":")
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)(["--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_readme_shows_every_command_that_a_user_comes_for() -> None:
    shown = {words[0].removeprefix(".venv/bin/") for words in commands(ROOT / "README.md")}
    assert SCRIPTS.keys() <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = text.replace("tests/test_x.py", "")  # stands for any
    named = set(re.findall(r"(?<![\w./-])((?:[a-z_]+/)+[\w.-]+\.(?:py|yaml|md|toml))\b", text))
    absent = [n for n in sorted(named) if n.startswith(OURS) and not (ROOT / n).exists()]
    assert not absent, f"{page.name} names {absent}, which do not exist"
    links = [t for t in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not t.endswith(".png")]
    broken = [t for t in links if not (page.parent / t).exists()]
    assert not broken, f"{page.name} links to {broken}, which do not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_yaml_of_a_page_is_a_recipe_that_loads(page: Path, tmp_path: Path) -> None:
    for i, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(block)
        assert recipe.load(path).state.spec.dim == 6


def test_ci_runs_what_the_readme_tells() -> None:
    tests = [line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith(".venv/bin/pytest")]
    assert len(tests) == 1
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[-1] == tests[0], "CI must end with the README's test command, word for word"


SMALL = {  # what makes a job of the README small enough for a test
    "vla-doctor": ["--help"],  # tests/test_doctor.py runs it
    "vla-record": ["episodes_per_task=1", "robot.tasks=[drawer-close-v3]", "workers=1"],
    "vla-data": [],
    "vla-train": ["steps=2", "validation=null", "batch.global_batch=4", "schedule.warmup=1", "compute.device=cpu"],
    "vla-eval": ["episodes=1", "robot.tasks=[drawer-close-v3]", "workers=1", "films.failures=1", "films.successes=1"],
    "vla-report": [],
}


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jobs_of_the_readme_run_one_after_another(tmp_path: Path) -> None:
    for folder in ("configs", "datasets"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    jobs = [words for words in commands(ROOT / "README.md") if words[0] in SMALL]
    assert [words[0] for words in jobs].count("vla-train") == 1
    for name, *arguments in jobs:
        module, function = SCRIPTS[name].split(":")
        code = f"import sys; from {module} import {function}; sys.exit({function}())"
        command = [sys.executable, "-P", "-c", code, *arguments, *SMALL[name]]
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # the work is tiny: more threads only wait for one another
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, f"{name} {arguments}: {done.stderr[-2000:]}"
    assert (tmp_path / "outputs/sft_metaworld/report.html").stat().st_size > 10_000
