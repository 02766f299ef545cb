"""Rollback and advance rows for task switching, made from recorded demonstrations while they are read.

Nothing is copied: a row's pictures and state are a recorded frame's; only its chunk and what is asked for differ.

    rollback   a frame in contact; back along the demonstration to before the contact; the demonstration's instruction
    advance    a frame before or after contact; to where an episode of another task began; that task's instruction
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from train import switching_moves
from train.contact_labels import Contact, Labels, label
from train.dataset import Around, LeRobotSource, RawSteps, View
from train.switching_moves import Course, Move
from vla import config
from vla.errors import DataError, UsageError
from vla.switching import ADVANCE, PHASES, ROLLBACK

Behaviour = Literal["rollback", "advance"]
MODE: dict[Behaviour, int] = {"rollback": ROLLBACK, "advance": ADVANCE}


@dataclass(frozen=True)
class SwitchingConfig:
    """How a data set's demonstrations become rollbacks and advances. One YAML for each robot."""

    contact: Contact
    enter: int  # frames: shorter contact is flicker
    leave: int  # frames: a shorter interruption of contact is none
    margin: int  # steps that a rollback goes back beyond the beginning of contact
    approach: int  # steps of an advance, or more where the action's limits are too low for that
    advance_from: tuple[Literal["pre", "post"], ...]  # phases whose frames advance
    seed: int  # which other task, and which of its episodes, an advance goes to
    moves: tuple[Move, ...]  # what each action dimension does to the state

    def __post_init__(self) -> None:
        if min(self.enter, self.leave, self.approach) < 1 or self.margin < 0 or self.seed < 0:
            raise UsageError(
                "enter, leave and approach must be at least 1, margin and seed not negative, got "
                f"{self.enter}, {self.leave}, {self.approach}, {self.margin} and {self.seed}."
            )


@dataclass(frozen=True)
class SwitchingRows:
    """Which rows a member of a mixture has, instead of those that were recorded."""

    behaviour: Behaviour
    settings: Path  # a YAML of `SwitchingConfig`


@dataclass(frozen=True)
class Plan:
    """Derived rows; every array has one entry a row. Frames count the source's own."""

    frame: np.ndarray  # (n,) int64, whose state and pictures the row has
    first: np.ndarray  # (n,) int64, the first and the last of the rows that are passed one after another
    last: np.ndarray  # (n,) int64
    goal: np.ndarray  # (n,) int64, the frame whose state is the end of the way
    asked: np.ndarray  # (n,) int64, a frame with the instruction that is in effect


class DerivedSource:
    """`train.loader.Source` of one behaviour; reads through the source of the recorded rows."""

    past, history = 0, 0

    def __init__(self, source: LeRobotSource, settings: SwitchingConfig, behaviour: Behaviour) -> None:
        """
        Raises:
            UsageError: the settings do not fit the recipe, or a chunk reaches into the past.
            DataError: contact cannot be read, or no frame is fit for the behaviour.
        """
        _check(source, settings)
        self.recipe, self.horizon = source.recipe, source.horizon
        self._source, self._settings, self.behaviour = source, settings, behaviour
        self.moves = settings.moves
        self.recorded = self._states, self._actions = source.statistics_arrays()
        self.labels = label(source, settings.contact, settings.enter, settings.leave)
        make = plan_rollbacks if behaviour == "rollback" else plan_advances
        self.plan = make(source, self.labels, settings)
        self.identity = {"behaviour": behaviour, "settings": config.digest(settings), "rows": len(self)}

    def __len__(self) -> int:
        return len(self.plan.frame)

    def valid_steps(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), self.horizon, np.int64)

    def around(self, indices: np.ndarray) -> Around:
        """Rows follow one another as they are lived through: a rollback's older observation is a later frame."""
        first = self.plan.first[indices]
        return Around(start=first, first=first, last=self.plan.last[indices])

    def steps(self, indices: np.ndarray) -> RawSteps:
        actions = self.courses(indices)[1]
        states = self._states[self.plan.frame[indices]]
        valid = np.ones(actions.shape[:2], bool)
        return RawSteps(state=states, history=np.empty((len(states), 0, states.shape[1])), actions=actions, valid=valid)

    def courses(self, indices: np.ndarray) -> tuple[Course, np.ndarray]:
        """The ways of the rows `indices` (B,), and the actions (B, H, A) float32 that go them."""
        settings, state, action = self._settings, self.recipe.state.spec, self.recipe.action.spec
        frame, goal = self.plan.frame[indices], self.plan.goal[indices]
        if self.behaviour == "rollback":
            begin = self.labels.begin[frame]
            course = switching_moves.retrace(self._states, self._actions, frame, goal, begin, self.horizon)
        else:
            ends = self._states[frame], self._states[goal]
            steps = np.maximum(switching_moves.steps_needed(*ends, settings.moves, state, action), settings.approach)
            commands = self._actions[goal]
            course = switching_moves.approach(ends, commands, steps, settings.moves, state, self.horizon)
        return course, switching_moves.to_actions(course, settings.moves, state, action)

    def pictures(self, indices: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
        return self._source.pictures(self.plan.frame[indices], view)

    def instructions(self, indices: np.ndarray) -> list[str]:
        return self._source.instructions(self.plan.asked[indices])


def derive(source: LeRobotSource, rows: SwitchingRows) -> DerivedSource:
    """The rows of a mixture's member; raises as `DerivedSource`, naming the settings."""
    try:
        return DerivedSource(source, config.load(SwitchingConfig, rows.settings), rows.behaviour)
    except (UsageError, DataError) as error:
        raise type(error)(
            f"{rows.settings}, {rows.behaviour} rows of recipe {source.recipe.name!r}: {error}"
        ) from error


def plan_rollbacks(source: LeRobotSource, labels: Labels, settings: SwitchingConfig) -> Plan:
    """Every frame in contact goes back to `margin` frames before the beginning of that contact."""
    frame = np.flatnonzero(labels.onset >= 0)
    if not len(frame):
        raise DataError("no frame is in contact; correct 'contact', 'enter' or 'leave'.")
    onset = labels.onset[frame]
    order = np.lexsort((-frame, onset))  # contact by contact, each from its end to its beginning
    frame, onset = frame[order], onset[order]
    _, at, counts = np.unique(onset, return_index=True, return_counts=True)
    goal = np.maximum(onset - settings.margin, labels.begin[frame])
    return Plan(frame, np.repeat(at, counts), np.repeat(at + counts - 1, counts), goal, asked=frame)


def plan_advances(source: LeRobotSource, labels: Labels, settings: SwitchingConfig) -> Plan:
    """Every frame of the phases `advance_from` goes to the start of one drawn episode of another drawn task."""
    frame = np.flatnonzero(np.isin(labels.phase, [PHASES.index(phase) for phase in settings.advance_from]))
    starts = np.array([episode.start for episode in source.episodes])
    tasks = np.array(source.instructions(starts))
    here = np.array(source.instructions(frame), tasks.dtype)
    if not len(frame) or len(np.unique(tasks)) < 2:
        raise DataError(
            f"an advance needs frames of the phases {list(settings.advance_from)}, of which there are {len(frame)}, "
            f"and tasks to go to: {np.unique(tasks).tolist()}. Add 'pre' to advance_from, or leave advance rows out."
        )
    rng, goal = np.random.default_rng(settings.seed), np.empty_like(frame)
    for task in np.unique(here):
        others = [starts[tasks == other] for other in np.unique(tasks) if other != task]
        at = np.flatnonzero(here == task)
        goal[at] = [_draw(rng, others) for _ in at]
    rows = np.arange(len(frame))
    return Plan(frame, rows, rows, goal, asked=goal)


def _draw(rng: np.random.Generator, others: Sequence[np.ndarray]) -> int:
    """One start of one task, each task as likely as another."""
    episodes = others[int(rng.integers(len(others)))]
    return int(episodes[rng.integers(len(episodes))])


def _check(source: LeRobotSource, settings: SwitchingConfig) -> None:
    switching_moves.check(settings.moves, source.recipe.state.spec, source.recipe.action.spec)
    if source.past or source.history:
        raise UsageError(
            f"what came before a made row was never recorded: policy.past and policy.history must be 0, got "
            f"{source.past} and {source.history}."
        )
