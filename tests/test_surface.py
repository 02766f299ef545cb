"""What users and other people's code rely on, checked: configurations load, commands exist, seams keep their fields."""

import ast
import dataclasses
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vla import config, types

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
YAMLS = sorted([*(ROOT / "datasets").rglob("*.y*ml"), *(ROOT / "configs").rglob("*.y*ml")])
FILES = sorted(p for name in ("vla", "robot", "train", "deploy") for p in (ROOT / name).rglob("*.py"))

YAML_CLASS = {  # pattern -> where its dataclass is; the first that fits counts
    "datasets/*.yaml": "train.recipe:Recipe",
    "configs/record_*.yaml": "robot.record:RecordConfig",
    "configs/sft_*.yaml": "train.sft:TrainConfig",
    "configs/eval_*.yaml": "robot.evaluate:EvalConfig",
    "configs/switching_*.yaml": "train.switching_data:SwitchingConfig",
}

SEAMS = {  # fields that other people's code and files rely on: a change here changes the interface
    "ActionSpec": "names units reference low high rate_hz rotation gripper",
    "Observation": "stamp_s images state instruction history executed",
    "ActionChunk": "stamp_s period_s actions execute diagnostics",
    "Verdict": "decision command rule",
    "Result": "suite task instruction seed success steps first_success_step chunks latency_ms wall_s policy "
    "config_digest versions video error",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", YAMLS, ids=relative)
def test_yaml_loads_and_names_files_that_exist(path: Path) -> None:
    place = next((c for pattern, c in YAML_CLASS.items() if Path(relative(path)).match(pattern)), None)
    assert place, f"{relative(path)} fits no pattern of YAML_CLASS: {list(YAML_CLASS)}"
    module, name = place.split(":")
    cls = getattr(importlib.import_module(module), name)
    loaded = config.load(cls, path)
    absent = [s for s in strings(config.to_data(loaded)) if is_ours(s) and not (ROOT / s).exists()]
    assert not absent, f"{relative(path)} names {absent}, which do not exist"


def strings(data: object) -> Iterator[str]:
    if isinstance(data, dict):
        for value in data.values():
            yield from strings(value)
    elif isinstance(data, list):
        for value in data:
            yield from strings(value)
    elif isinstance(data, str):
        yield data


def is_ours(text: str) -> bool:
    return text.startswith(("datasets/", "configs/")) and text.endswith((".yaml", ".yml"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_console_script_exists(name: str) -> None:
    module, function = SCRIPTS[name].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", SEAMS)
def test_seams_are_what_they_were(name: str) -> None:
    cls = getattr(types, name)
    assert [f.name for f in dataclasses.fields(cls)] == SEAMS[name].split()
    assert cls.__dataclass_params__.frozen, f"{name} crosses a seam and must be frozen"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_exported_names_exist(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    listed = [n for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    if not listed:
        return
    names = ast.literal_eval(listed[0].value)
    module = importlib.import_module(relative(path).removesuffix(".py").replace("/", "."))
    assert sorted(names) == sorted(set(names))
    assert not [n for n in names if not hasattr(module, n)], f"{relative(path)} exports what it does not have"
    assert not [n for n in names if n.startswith("_")], f"{relative(path)} exports private names"
