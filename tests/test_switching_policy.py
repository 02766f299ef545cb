"""A policy that is told something else: which instruction it encodes, which encodings it uses, how it behaves."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vla import config
from vla.errors import UsageError
from vla.policy import VLAPolicy
from vla.policy_config import ConditionConfig, PolicyConfig
from vla.stats import Moments, Statistics
from vla.switching import ADVANCE, FORWARD, ROLLBACK, SwitchingRules
from vla.switching_policy import SwitchingPolicy
from vla.types import ActionChunk, ActionSpec, Observation, UnderWay

ROOT = Path(__file__).parents[1]
SPEC = ActionSpec(("x", "hand"), ("m", "1"), ("delta", "absolute"), (-9.0,) * 2, (9.0,) * 2, 10.0)
RULES = SwitchingRules(enter=1, leave=2, approach=3, before_contact="forward")


@dataclass(frozen=True)
class Entry:
    told: str
    stamp_s: float
    task_version: int = 0


class Noting:
    """Notes what it is asked; the state's second number says whether the robot is in contact."""

    action_spec = state_spec = SPEC
    cameras: tuple[str, ...] = ()
    config = SimpleNamespace(conditions=ConditionConfig(3, 0, 0.0))
    mode = FORWARD

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.acted: list[tuple[int, Entry, str, UnderWay | None]] = []

    def reset(self, seed: int) -> None:
        self.seed = seed

    def infer(self, observation: Observation) -> ActionChunk:
        raise AssertionError("encoding and acting are asked for one by one")

    def encode_observation(self, observation: Observation) -> Entry:
        self.encoded.append(observation.instruction)
        return Entry(observation.instruction, observation.stamp_s)

    def act(self, cache: Any, observation: Observation, under_way: UnderWay | None = None) -> ActionChunk:
        self.acted.append((self.mode, cache, observation.instruction, under_way))
        return ActionChunk(observation.stamp_s, 0.1, np.zeros((4, 2), np.float32), 1, {"denoise_ms": 1.0})


def feels(observation: Observation) -> bool:
    return bool(observation.state[1] > 0)


def seen(step: int, instruction: str, *, contact: bool = False) -> Observation:
    return Observation(0.1 * step, {}, np.array([0, contact], np.float32), instruction)


def test_a_switch_in_contact_takes_back_the_old_task_first() -> None:
    inner = Noting()
    policy = SwitchingPolicy(inner, RULES, feels)
    policy.reset(5)
    assert inner.seed == 5
    for step, (told, contact) in enumerate(
        [("A", False), ("A", True), ("B", True), ("B", False), ("B", False), ("B", True)]
    ):
        policy.infer(seen(step, told, contact=contact))
    modes = [mode for mode, *_ in inner.acted]
    assert modes == [FORWARD, FORWARD, ROLLBACK, ROLLBACK, FORWARD, FORWARD]
    told = [entry.told for _, entry, _, _ in inner.acted]
    assert told == inner.encoded == [said for *_, said, _ in inner.acted] == ["A"] * 4 + ["B"] * 2
    assert [entry.task_version for _, entry, *_ in inner.acted] == [0] * 4 + [1] * 2


def test_control_steps_between_two_chunks_count() -> None:
    inner = Noting()
    policy = SwitchingPolicy(inner, replace(RULES, leave=4), feels)
    for step, told in ((0, "A"), (4, "B"), (8, "B")):  # four steps a chunk
        policy.infer(seen(step, told, contact=step == 0))
    assert [mode for mode, *_ in inner.acted] == [FORWARD, ADVANCE, FORWARD], "contact had ended by then"
    policy.reset(0)
    inner.acted.clear()
    for step, told in ((0, "A"), (3, "B"), (6, "B"), (7, "B")):
        policy.infer(seen(step, told, contact=step == 0))
    assert [mode for mode, *_ in inner.acted] == [FORWARD, ROLLBACK, FORWARD, FORWARD]


def test_an_encoding_that_was_under_way_at_the_switch_is_not_used_for_the_new_task() -> None:
    """The slow path was asked before contact; its answer comes after the robot was told another task."""
    inner = Noting()
    policy = SwitchingPolicy(inner, RULES, feels)
    old = policy.encode_observation(seen(0, "A"))
    policy.act(old, seen(0, "A"))
    chunk = policy.act(old, seen(1, "B"))
    assert inner.encoded == ["A", "B"]
    mode, used, _, _ = inner.acted[-1]
    assert (mode, used.told, used.task_version) == (FORWARD, "B", 1)
    assert chunk.diagnostics["task_version"] == 1
    again = policy.encode_observation(seen(2, "B"))
    policy.act(again, seen(2, "B"))
    assert inner.encoded == ["A", "B", "B"], "one of its own version is used as it is"
    assert inner.acted[-1][1] is again


def test_a_rollback_needs_no_new_encoding_to_begin_and_its_own_serves_no_new_task() -> None:
    inner = Noting()
    policy = SwitchingPolicy(inner, RULES, feels)
    old = policy.encode_observation(seen(0, "A"))
    policy.act(old, seen(0, "A", contact=True))
    policy.act(old, seen(1, "B", contact=True))
    assert inner.encoded == ["A"]
    assert inner.acted[-1][0] == ROLLBACK
    assert inner.acted[-1][1] is old
    meanwhile = policy.encode_observation(seen(1, "B", contact=True))
    assert meanwhile.told == "A", "still the task that is being taken back"
    policy.act(meanwhile, seen(3, "B"))
    assert inner.acted[-1][:1] + inner.acted[-1][1:2] != (FORWARD, meanwhile)
    assert (inner.acted[-1][0], inner.acted[-1][1].told) == (FORWARD, "B")


def test_what_is_under_way_is_continued_only_within_one_behaviour() -> None:
    inner = Noting()
    policy = SwitchingPolicy(inner, RULES, feels)
    rest = UnderWay(np.zeros((2, 2), np.float32), 1)
    for step, told in enumerate("AABB"):
        policy.infer(seen(step, told, contact=True), rest)
    assert [under_way is rest for *_, under_way in inner.acted] == [False, True, False, True]


def test_advance_after_contact() -> None:
    inner = Noting()
    policy = SwitchingPolicy(inner, RULES, feels)
    for step, (told, contact) in enumerate([("A", True), ("A", False), ("A", False), *[("B", False)] * 4]):
        chunk = policy.infer(seen(step, told, contact=contact))
        assert chunk.diagnostics["mode"] == inner.acted[-1][0]
    assert [mode for mode, *_ in inner.acted] == [FORWARD] * 3 + [ADVANCE] * 3 + [FORWARD]
    assert inner.encoded[3:] == ["B"] * 4


def test_a_new_episode_remembers_nothing() -> None:
    inner = Noting()
    policy = SwitchingPolicy(inner, RULES, feels)
    policy.infer(seen(0, "A", contact=True))
    policy.reset(1)
    assert policy.state is None
    policy.infer(seen(0, "B", contact=True))
    assert inner.acted[-1][0] == FORWARD


@pytest.mark.parametrize("conditions", [None, ConditionConfig(2, 0, 0.0)])
def test_a_policy_without_modes_is_refused(conditions: ConditionConfig | None) -> None:
    inner = Noting()
    inner.config = SimpleNamespace(conditions=conditions)
    with pytest.raises(UsageError, match=r"policy\.conditions\.modes of 3"):
        SwitchingPolicy(inner, RULES, feels)
    with pytest.raises(UsageError, match="this one has none"):
        SwitchingPolicy(SimpleNamespace(), RULES, feels)  # pyright: ignore[reportArgumentType]


def test_the_real_policy_is_steered() -> None:
    data = config.read(ROOT / "configs/sft_metaworld_switching.yaml")["policy"]
    settings = replace(config.build(PolicyConfig, data), cameras=("top",), image_size=32, state_dim=2, action_dim=2)
    moments = Moments(1, *[np.ones(2)] * 9)
    inner = VLAPolicy.build(settings, Statistics(SPEC, SPEC, moments, moments, "none"), 0).eval()
    assert inner.conditions.mode is not None
    torch.nn.init.normal_(inner.conditions.mode.weight, generator=torch.Generator().manual_seed(0))
    touched = {"now": False}
    policy = SwitchingPolicy(inner, RULES, lambda observation: touched["now"])
    picture = {"top": np.full((32, 32, 3), 90, np.uint8)}

    def answer(*told: str, contact: bool) -> np.ndarray:
        policy.reset(0)
        chunk, touched["now"] = None, contact
        for step, instruction in enumerate(told):
            chunk = policy.infer(replace(seen(step, instruction), images=picture))
        assert chunk is not None
        return chunk.actions

    forward = answer("A", "A", contact=True)
    assert np.array_equal(forward, answer("A", "A", contact=False)), "contact alone changes nothing"
    assert np.abs(answer("A", "B", contact=True) - forward).max() > 1e-3, "a rollback is another behaviour"
    assert np.array_equal(answer("A", "B", contact=False), answer("B", "B", contact=False)), "a plain switch is none"
