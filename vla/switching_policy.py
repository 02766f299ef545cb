"""A policy that leaves a task the way `vla.switching` says. No torch here: the policy inside brings its own.

infer(observation)            for the runtime: notices instruction and contact, encodes, answers
encode_observation, act       the same in two, for a slow and a fast loop: an encoding of another task version than the
                              one in effect is never used, it is made anew
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from vla.errors import UsageError
from vla.switching import MODES, Switching, SwitchingRules, begin, step
from vla.types import ActionChunk, ActionSpec, Observation, Policy, UnderWay


@runtime_checkable
class Steered(Policy, Protocol):
    """What is needed of the policy inside; `vla.policy.VLAPolicy` is one."""

    config: Any  # `vla.policy_config.PolicyConfig`
    mode: int  # the behaviour of the next chunk

    def encode_observation(self, observation: Observation) -> Any:
        """A frozen dataclass with a field `task_version`, such as `vla.cache.PrefixCache`."""
        ...

    def act(self, cache: Any, observation: Observation, under_way: UnderWay | None = None) -> ActionChunk: ...


class SwitchingPolicy:
    """`vla.types.Policy`: may be told something else at any observation.

    Args:
        contact: whether the robot is in contact, at the time of an observation.

    Raises:
        UsageError: the policy was not trained with behaviour modes.
    """

    def __init__(self, policy: Policy, rules: SwitchingRules, contact: Callable[[Observation], bool]) -> None:
        conditions = policy.config.conditions if isinstance(policy, Steered) else None
        if not isinstance(policy, Steered) or conditions is None or conditions.modes < len(MODES):
            raise UsageError(
                f"Task switching needs a policy that was trained with policy.conditions.modes of {len(MODES)}; this "
                f"one has {conditions.modes if conditions else 'none'}. Run it without (switching=null), or train one."
            )
        self._policy, self._rules, self._contact = policy, rules, contact
        self._forget()

    @property
    def action_spec(self) -> ActionSpec:
        return self._policy.action_spec

    @property
    def state_spec(self) -> ActionSpec:
        return self._policy.state_spec

    @property
    def history(self) -> int:
        return self._policy.config.history

    @property
    def past(self) -> int:
        return self._policy.config.past

    @property
    def cameras(self) -> tuple[str, ...]:
        return self._policy.cameras

    @property
    def state(self) -> Switching | None:
        """Where it is between two tasks; None before the first observation."""
        return self._state

    def reset(self, seed: int) -> None:
        self._policy.reset(seed)
        self._forget()

    def _forget(self) -> None:
        self._state: Switching | None = None
        self._noticed_s = 0.0
        self._answered: tuple[int, int] | None = None  # mode and task version of the last chunk

    def infer(self, observation: Observation, under_way: UnderWay | None = None) -> ActionChunk:
        state = self._notice(observation)
        start = time.perf_counter()
        entry = self._encode(observation, state)
        encode_ms = 1e3 * (time.perf_counter() - start)
        chunk = self._answer(entry, observation, under_way, state)
        return replace(chunk, diagnostics={"encode_ms": encode_ms, **chunk.diagnostics})

    def encode_observation(self, observation: Observation) -> Any:
        """The slow path: an encoding for the instruction in effect, which carries its task version."""
        state = self._state or begin(observation.instruction)
        return self._encode(observation, state)

    def act(self, cache: Any, observation: Observation, under_way: UnderWay | None = None) -> ActionChunk:
        """The fast path; `cache` may come from before a switch."""
        return self._answer(cache, observation, under_way, self._notice(observation))

    def _notice(self, observation: Observation) -> Switching:
        steps = 1
        if self._state is None:
            self._state = begin(observation.instruction)
        else:
            steps = round((observation.stamp_s - self._noticed_s) * self.action_spec.rate_hz)
        self._noticed_s = observation.stamp_s
        contact = self._contact(observation)
        self._state = step(self._state, observation.instruction, contact, self._rules, steps)
        return self._state

    def _encode(self, observation: Observation, state: Switching) -> Any:
        told = replace(observation, instruction=state.instruction)
        return replace(self._policy.encode_observation(told), task_version=state.task_version)

    def _answer(
        self, entry: Any, observation: Observation, under_way: UnderWay | None, state: Switching
    ) -> ActionChunk:
        if entry.task_version != state.task_version:
            entry = self._encode(observation, state)
        answered = state.mode, state.task_version
        if self._answered != answered:  # what is under way belongs to another behaviour
            under_way = None
        self._policy.mode, self._answered = state.mode, answered
        chunk = self._policy.act(entry, replace(observation, instruction=state.instruction), under_way)
        noted = {"mode": float(state.mode), "task_version": float(state.task_version)}
        return replace(chunk, diagnostics={**chunk.diagnostics, **noted})
