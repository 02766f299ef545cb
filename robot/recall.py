"""What lay before the present moment, for policies that look back (`vla.types.Recalling`).

The control loop keeps it: it alone knows what was executed, whichever chunk that came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vla.types import Observation, Policy, Recalling


class Recall:
    """Completes the observations of one episode.

    Args:
        history: states wanted at the control steps before an observation.
        past: commands wanted at the control steps before an observation.
        action_dim: A.
    """

    def __init__(self, history: int = 0, past: int = 0, action_dim: int = 0) -> None:
        self.history, self.past = history, past
        self._nothing = np.full(action_dim, np.nan, np.float32)
        self._states: list[np.ndarray] = []  # one for each control step so far

    @classmethod
    def of(cls, policy: Policy) -> Recall:
        """As much as `policy` asks for, which is nothing for most."""
        history, past = (policy.history, policy.past) if isinstance(policy, Recalling) else (0, 0)
        return cls(history, past, policy.action_spec.dim)

    def complete(self, seen: Observation, commands: Sequence[np.ndarray | None]) -> Observation:
        """`seen` with what lies before it.

        Args:
            commands: (A,) or None where the arm held, one for each control step since the episode began. `seen` comes
                after the last. A step that was never looked at counts with the state before it.
        """
        step = len(commands)
        history, executed = None, None
        if self.history:
            self._states += [self._states[-1] if self._states else seen.state] * (step - len(self._states))
            self._states[step:] = [seen.state]
            history = np.stack([self._states[max(i, 0)] for i in range(step - self.history, step)])
        if self.past:
            rows = [None] * self.past + list(commands[max(0, step - self.past) :])
            executed = np.stack([self._nothing if row is None else row for row in rows[-self.past :]])
        return dataclasses.replace(seen, history=history, executed=executed)
