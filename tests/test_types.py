import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla import types
from vla.errors import SpecMismatch, TandemError
from vla.types import ActionChunk, ActionSpec, Observation, Result, require_same

SPEC = ActionSpec(
    names=("x", "gripper"),
    units=("m", "1"),
    reference=("delta", "absolute"),
    low=(-1.0, 0.0),
    high=(1.0, 1.0),
    rate_hz=40.0,
    gripper="close_high",
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ()}, "at least one dimension"),
        ({"units": ("m",)}, r"units has 1 entries, but there are 2 names: \('x', 'gripper'\)"),
        ({"low": (0.0,)}, "low has 1 entries"),
        ({"names": ("x", "x")}, "differ from one another"),
        ({"rate_hz": 0.0}, "rate_hz must be positive, got 0"),
        ({"rate_hz": float("nan")}, "rate_hz must be positive"),
        ({"high": (1.0, 0.0)}, "'gripper': low 0.0 is not below high 0.0"),
        ({"high": (float("nan"), 1.0)}, "'x': low -1.0 is not below high nan"),
        ({"reference": ("delta", "abs")}, "reference is 'abs'.*absolute, delta"),
        ({"rotation": "euler"}, "rotation is 'euler'.*Did you mean 'euler_xyz'"),
        ({"gripper": "open"}, "gripper is 'open'.*close_high, none, open_high"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(TandemError, match=message):
        replace(SPEC, **changes)


def test_a_spec_survives_json() -> None:
    assert ActionSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SPEC.to_json() | {"unit": []}, r"unknown keys \['unit'\].*valid:.*'units'"),
        ({k: v for k, v in SPEC.to_json().items() if k != "low"}, r"missing keys \['low'\]"),
    ],
)
def test_a_spec_in_json_with_wrong_keys_is_refused(data: dict, message: str) -> None:
    with pytest.raises(TandemError, match=message):
        ActionSpec.from_json(data)


def test_clip_keeps_the_dtype_and_every_dimensions_own_limits() -> None:
    clipped = SPEC.clip(np.array([[-3.0, -3.0], [3.0, 3.0], [0.5, 0.5]], np.float32))
    assert clipped.dtype == np.float32
    assert clipped.tolist() == [[-1, 0], [1, 1], [0.5, 0.5]]


def test_equal_specs_connect() -> None:
    require_same(SPEC, ActionSpec.from_json(SPEC.to_json()), "action of a and of b")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("names", ("y", "gripper")),
        ("units", ("rad", "1")),
        ("reference", ("absolute", "absolute")),
        ("low", (-2.0, 0.0)),
        ("high", (2.0, 1.0)),
        ("rate_hz", 20.0),
        ("rotation", "rot6d"),
        ("gripper", "open_high"),
    ],
)
def test_any_difference_is_refused_and_printed_from_both_sides(field: str, value: object) -> None:
    with pytest.raises(SpecMismatch) as caught:
        require_same(SPEC, replace(SPEC, **{field: value}), "action of recipe a and of checkpoint b")
    message = str(caught.value)
    assert "action of recipe a and of checkpoint b differ" in message
    assert f"{field}: {getattr(SPEC, field)!r} and {value!r}" in message
    assert message.count("\n  ") == 1  # nothing that is equal is listed


def observation(image: np.ndarray | None = None, state: np.ndarray | None = None) -> Observation:
    return Observation(
        stamp_s=1.0,
        images={"front": np.zeros((4, 5, 3), np.uint8) if image is None else image},
        state=np.zeros(2, np.float32) if state is None else state,
        instruction="open the drawer",
    )


@pytest.mark.parametrize(
    "image", [np.zeros((4, 5, 3), np.float32), np.zeros((3, 4, 5), np.uint8), np.zeros((4, 5), np.uint8)]
)
def test_an_image_in_another_form_is_refused(image: np.ndarray) -> None:
    with pytest.raises(TandemError, match=r"camera 'front' must be \(H, W, 3\) uint8 RGB, got"):
        observation(image=image)


def test_a_state_that_is_no_vector_is_refused() -> None:
    with pytest.raises(TandemError, match=r"vector \(S,\), got shape \(1, 2\)"):
        observation(state=np.zeros((1, 2), np.float32))


def test_what_crossed_a_seam_cannot_be_changed_there() -> None:
    seen = observation()
    with pytest.raises(ValueError, match="read-only"):
        seen.state[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        seen.images["front"][0] = 1
    with pytest.raises(TypeError):
        seen.images["back"] = seen.images["front"]  # pyright: ignore[reportIndexIssue]
    chunk = ActionChunk(0.0, 0.1, np.zeros((2, 3), np.float32), execute=2)
    with pytest.raises(ValueError, match="read-only"):
        chunk.actions[0] = 1


def test_freezing_leaves_the_owners_array_writable() -> None:
    mine = np.zeros(2, np.float32)
    observation(state=mine)
    mine[0] = 1


@pytest.mark.parametrize("execute", [0, 3])
def test_a_chunk_cannot_recommend_steps_it_does_not_have(execute: int) -> None:
    with pytest.raises(TandemError, match=rf"execute must be 1..2 for this chunk, got {execute}"):
        ActionChunk(0.0, 0.1, np.zeros((2, 3), np.float32), execute=execute)


def test_a_chunk_without_a_horizon_axis_is_refused() -> None:
    with pytest.raises(TandemError, match=r"must be \(H, A\), got shape \(3,\)"):
        ActionChunk(0.0, 0.1, np.zeros(3, np.float32), execute=1)


def test_a_result_becomes_one_line_of_json_with_a_version() -> None:
    result = Result(
        suite="metaworld", task="drawer", instruction="close", seed=3, success=True, steps=20, first_success_step=18,
        chunks=3, latency_ms=(1.5, 2.0, 2.5), wall_s=0.4, policy="a", config_digest="abc", versions={"torch": "2.11"},
    )  # fmt: skip
    data = json.loads(json.dumps(result.to_json()))
    assert data["version"] == 1
    values: dict[str, Any] = {k: v for k, v in data.items() if k != "version"} | {"latency_ms": result.latency_ms}
    assert Result(**values) == result


def test_the_file_parses_on_the_simulators_python() -> None:
    ast.parse(Path(types.__file__).read_text(), feature_version=(3, 10))
