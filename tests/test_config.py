import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla import config
from vla.errors import TandemError, UsageError


@dataclass(frozen=True)
class Sgd:
    kind: Literal["sgd"]
    lr: float


@dataclass(frozen=True)
class Adam:
    kind: Literal["adam"]
    lr: float
    betas: tuple[float, float]


@dataclass(frozen=True)
class Run:
    name: str
    steps: int
    fast: bool
    out: Path
    mode: Literal["full", "lora"]
    limit: float | None
    tasks: tuple[str, ...]
    cameras: dict[str, str]
    optim: Sgd | Adam
    warm_up: int | Literal["auto"]

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise TandemError(f"steps must not be negative, got {self.steps}.")


RUN = Run(
    name="base",
    steps=10,
    fast=True,
    out=Path("outputs/a"),
    mode="full",
    limit=None,
    tasks=("open", "close"),
    cameras={"front": "observation.images.corner2"},
    optim=Adam("adam", 1e-4, (0.9, 0.95)),
    warm_up="auto",
)

text = st.text(st.characters(codec="utf-8"))
finite = st.floats(allow_nan=False)
runs = st.builds(
    Run,
    name=text,
    steps=st.integers(min_value=0),
    fast=st.booleans(),
    out=st.builds(Path, text.filter(lambda t: "\0" not in t)),
    mode=st.sampled_from(["full", "lora"]),
    limit=st.none() | finite,
    tasks=st.lists(text, max_size=3).map(tuple),
    cameras=st.dictionaries(text, text, max_size=3),
    optim=st.builds(Sgd, st.just("sgd"), finite) | st.builds(Adam, st.just("adam"), finite, st.tuples(finite, finite)),
    warm_up=st.integers() | st.just("auto"),
)


def written(folder: Path, changes: dict[str, Any], without: str | None = None) -> Path:
    path = folder / "run.yaml"
    kept = [f"{k}: {json.dumps(v)}" for k, v in config.to_data(RUN).items() if k != without]
    path.write_text("\n".join([*kept, *(f"{k}: {v}" for k, v in changes.items())]))
    return path


@given(runs)
def test_dump_is_the_inverse_of_load(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_bytes(config.dump(run).encode())
    assert config.load(Run, path) == run


@given(runs)
def test_plain_data_is_the_inverse_of_build(run: Run) -> None:
    assert config.build(Run, config.to_data(run)) == run


@pytest.mark.parametrize(
    "name", ["1e-4", "1e5", "0x10", "true", "null", "2024-01-01", ".5", "~", "no", "\x85", "a\u2028b"]
)
def test_strings_that_look_like_something_else_survive(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(config.dump(replace(RUN, name=name)))
    assert config.load(Run, tmp_path / "a.yaml").name == name


@pytest.mark.parametrize(
    ("written_as", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("-2e+3", -2000.0), ("1.5e-7", 1.5e-7), (".5", 0.5), ("3", 3.0), (".inf", math.inf)],
)
def test_numbers_people_write_are_floats(written_as: str, value: float) -> None:
    data = config.override(config.to_data(RUN), [f"optim.lr={written_as}"], Run)
    lr = config.build(Run, data).optim.lr
    assert lr == value
    assert type(lr) is float


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("stepz", "3", ["run.yaml: unknown key 'stepz'", "Did you mean 'steps'?", "cameras, fast, limit"]),
        ("steps", "3.5", ["run.yaml: steps must be int", "3.5"]),
        ("steps", "true", ["run.yaml: steps must be int", "True"]),
        ("steps", "-1", ["run.yaml: steps must not be negative, got -1"]),
        ("fast", "1", ["fast must be bool"]),
        ("name", "7", ["name must be str"]),
        ("out", "7", ["out must be a path"]),
        ("mode", "loar", ["run.yaml: mode is 'loar'", "Did you mean 'lora'?", "full, lora"]),
        ("limit", "high", ["limit must be float"]),
        ("tasks", "open", ["tasks must be a list"]),
        ("tasks", "[open, 3]", ["run.yaml: tasks[1] must be str"]),
        ("cameras", "[a]", ["cameras must be a mapping"]),
        ("cameras", "{front: 3}", ["run.yaml: cameras.front must be str"]),
        ("optim", "{kind: adan, lr: 1.0}", ["optim needs a 'kind', got 'adan'", "Did you mean 'adam'?", "adam, sgd"]),
        ("optim", "{lr: 1.0}", ["optim needs a 'kind', got None", "adam, sgd"]),
        ("optim", "sgd", ["optim needs a 'kind', got 'sgd'"]),
        ("optim", "{kind: sgd, lrr: 1.0}", ["run.yaml: optim: unknown key 'lrr'", "Did you mean 'lr'?"]),
        ("optim", "{kind: sgd}", ["run.yaml: optim: missing key ['lr']", "Valid: kind, lr"]),
        ("optim", "{kind: adam, lr: a, betas: [1, 2]}", ["run.yaml: optim.lr must be float, got 'a'"]),
        ("optim", "{kind: adam, lr: 1, betas: [1]}", ["optim.betas must have 2 entries, got 1"]),
        ("warm_up", "often", ["warm_up must be int or", "auto", "'often'"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_valid(key: str, value: str, fragments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        config.load(Run, written(tmp_path, {key: value}, without=key))
    for fragment in fragments:
        assert fragment in str(caught.value)


@dataclass(frozen=True)
class Level:
    value: Literal[1, 2]


def test_a_choice_of_numbers_does_not_take_a_boolean() -> None:
    assert config.build(Level, {"value": 1}).value == 1
    with pytest.raises(UsageError, match=r"value is True. Valid: 1, 2"):
        config.build(Level, {"value": True})


def test_a_missing_key_is_named_with_all_keys(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run.yaml: missing key \['mode'\]. Valid: name, steps, fast, out, mode"):
        config.load(Run, written(tmp_path, {}, without="mode"))


def test_a_key_given_twice_is_an_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run.yaml: Key 'name' is given twice, first in line 1"):
        config.load(Run, written(tmp_path, {"name": "again"}))


def test_a_key_given_twice_deep_inside_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'lr' is given twice"):
        config.load(Run, written(tmp_path, {"optim": "{kind: sgd, lr: 1.0, lr: 2.0}"}, without="optim"))


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2", "", "a: !!python/object:os.system x"])
def test_a_file_that_is_not_a_mapping_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"a\.yaml"):
        config.load(Run, tmp_path / "a.yaml")


def test_an_absent_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "sft_tiny.yaml").touch()
    with pytest.raises(UsageError, match=r"Did you mean 'sft_tiny.yaml'"):
        config.load(Run, tmp_path / "sft_tyni.yaml")


def test_overrides_reach_every_kind_of_place(tmp_path: Path) -> None:
    items = ["steps=7", "optim.lr=1e-3", "tasks.1=shut", "cameras.front=observation.image", "limit=2", "name=a=b"]
    run = config.load(Run, written(tmp_path, {}), items)
    assert (run.steps, run.optim.lr, run.tasks, run.limit, run.name) == (7, 1e-3, ("open", "shut"), 2.0, "a=b")
    assert run.cameras == {"front": "observation.image"}


def test_an_override_may_give_a_key_the_file_lacks(tmp_path: Path) -> None:
    assert config.load(Run, written(tmp_path, {}, without="mode"), ["mode=lora"]).mode == "lora"


def test_overriding_leaves_its_input_alone() -> None:
    data = config.to_data(RUN)
    config.override(data, ["optim.lr=5.0", "tasks.0=x"], Run)
    assert data == config.to_data(RUN)


@pytest.mark.parametrize(
    ("item", "fragments"),
    [
        ("steps", ["key.subkey=value"]),
        ("=3", ["key.subkey=value"]),
        ("stepz=3", ["unknown key 'stepz'", "Did you mean 'steps'?", "warm_up"]),
        ("optim.lrr=3", ["unknown key 'lrr'", "Did you mean 'lr'?", "betas, kind, lr"]),
        ("optin.lr=3", ["no key 'optin'", "Did you mean 'optim'?"]),
        ("tasks.5=x", ["2 entries", "'5' is not an index"]),
        ("tasks.²=x", ["is not an index"]),
        ("tasks.².b=x", ["list of 2", "'²'"]),
        ("tasks.a.b=x", ["list of 2", "'a'"]),
        ("steps.a=x", ["no keys below", "10"]),
        ("steps.a.b=x", ["no key 'a'"]),
        ("steps=[", ["not valid YAML"]),
        ("steps=many", ["run.yaml: steps must be int, got 'many'"]),
    ],
)
def test_a_wrong_override_is_named_with_what_is_valid(item: str, fragments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        config.load(Run, written(tmp_path, {}), [item])
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [replace(RUN, steps=11), replace(RUN, tasks=("close", "open")), replace(RUN, optim=Sgd("sgd", 1e-4))],
)
def test_the_digest_changes_with_any_value(changed: Run) -> None:
    assert config.digest(changed) != config.digest(RUN)


def test_the_digest_depends_on_values_only(tmp_path: Path) -> None:
    assert config.digest(config.load(Run, written(tmp_path, {}))) == config.digest(RUN)
    assert len(config.digest(RUN)) == 12


@dataclass(frozen=True)
class Outer:
    inner: "Inner"


@dataclass(frozen=True)
class Inner:
    optim: Sgd | None = None


def test_an_optional_block_that_the_file_leaves_out_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("inner: {}\n", encoding="utf-8")
    assert config.load(Outer, path).inner.optim is None
    given_block = config.load(Outer, path, ["inner.optim={kind: sgd, lr: 0.1}"])
    assert given_block.inner.optim == Sgd("sgd", 0.1)
    with pytest.raises(UsageError, match=r"inner: unknown key 'optin'"):
        config.load(Outer, path, ["inner.optin=null"])
