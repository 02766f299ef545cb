"""The data sets of a run: opened once, and checked at the door against one another and the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from train import compute_stats, dataset_checks, frame_cache, recipe
from train.dataset import LeRobotSource, views
from train.recipe import Recipe
from train.switching_data import MODE, DerivedSource, SwitchingRows, derive
from train.train_config import DataConfig
from vla.cli import require
from vla.config import digest
from vla.errors import UsageError, choose_from
from vla.policy_config import PolicyConfig
from vla.stats import Statistics
from vla.types import require_same

if TYPE_CHECKING:
    from train.loader import Source


@dataclass(frozen=True)
class Sources:
    """In the order of the mixture."""

    train: tuple[LeRobotSource, ...]
    held_out: tuple[LeRobotSource, ...]  # episodes for validation; empty if not asked for
    train_rows: tuple[Source, ...]  # what the members read: these sources, or rows made from them
    held_out_rows: tuple[Source, ...]

    def identity(self) -> list[dict[str, Any]]:
        """What must be the same when a run is resumed, and what its log says of the data."""
        return [
            made(rows)
            | {
                "recipe": source.recipe.name,
                "revision": source.revision,
                "meaning": digest([getattr(source.recipe, k) for k in ("cameras", "state", "action", "language")]),
                "split": digest(source.recipe.split),
                "episodes": len(source.episodes),
                "frames": len(source),
            }
            for source, rows in zip(self.train, self.train_rows, strict=True)
        ]

    def notes(self) -> list[str]:
        """What is allowed, and seldom meant: a line each."""
        found = []
        for source in dict.fromkeys(self.train):
            window, lengths = source.past + source.horizon, [episode.length for episode in source.episodes]
            short = sum(length < window for length in lengths)
            if 2 * short > len(lengths):
                found.append(
                    f"{short} of {len(lengths)} episodes of recipe {source.recipe.name!r} are shorter than the "
                    f"{window} steps of policy.past and policy.chunk; their median is {median(lengths):g} frames. "
                    "Steps outside an episode are left out of the loss, so the far ones are learned from few frames."
                )
        return found

    def statistics(self) -> Statistics:
        """Exact statistics of all training frames; the mixture's weights do not enter."""
        return compute_stats.compute(list(dict.fromkeys(self.train)))


def open_sources(data: DataConfig, policy: PolicyConfig, *, held_out: bool) -> Sources:
    """Open all data sets of the mixture.

    Raises:
        UsageError, DataError, SpecMismatch: saying which recipe does not fit, and how.
    """
    recipes = [recipe.load(member.recipe) for member in data.mixture]
    first = recipes[0]
    for r in recipes:
        require_same(r.state.spec, first.state.spec, f"states of recipes {r.name!r} and {first.name!r}")
        require_same(r.action.spec, first.action.spec, f"actions of recipes {r.name!r} and {first.name!r}")
        _require_fit(r, policy)
        require(
            not held_out or r.split.validation_fraction > 0,
            f"A validation loss is asked for, but recipe {r.name!r} holds no episode out. Set its "
            "split.validation_fraction, or validation=null.",
        )
    for name in views(policy)[1].cameras:
        known = sorted({camera for r in recipes for camera in r.cameras})
        require(
            name in known,
            f"policy.fast_slow.cameras names {name!r}, which no recipe of data.mixture has.{choose_from(name, known)}",
        )
    train = _open_all(recipes, data, policy, "train")
    for source in train:
        _require_reach(source, policy)
    validation = _open_all(recipes, data, policy, "validation") if held_out else ()
    rows = [member.rows for member in data.mixture]
    return Sources(train, validation, _rows(train, rows, policy), _rows(validation, rows, policy) if held_out else ())


def _open_all(
    recipes: Sequence[Recipe], data: DataConfig, policy: PolicyConfig, split: Literal["train", "validation"]
) -> tuple[LeRobotSource, ...]:
    """Each data set once, however many members read it."""
    files = [member.recipe for member in data.mixture]
    opened = {file: _open(r, data, policy, split) for file, r in dict(zip(files, recipes, strict=True)).items()}
    return tuple(opened[file] for file in files)


def _rows(
    sources: Sequence[LeRobotSource], rows: Sequence[SwitchingRows | None], policy: PolicyConfig
) -> tuple[Source, ...]:
    for made in filter(None, rows):
        require(
            policy.conditions is not None and policy.conditions.modes > max(MODE.values()),
            f"data.mixture has {made.behaviour} rows, and the policy could not tell them from others: set "
            f"policy.conditions.modes to {max(MODE.values()) + 1}.",
        )
    return tuple(s if made is None else derive(s, made) for s, made in zip(sources, rows, strict=True))


def made(rows: Source) -> dict[str, Any]:
    """What else decides a member's rows, where they were made."""
    return {"rows": rows.identity} if isinstance(rows, DerivedSource) else {}


def _require_reach(source: LeRobotSource, policy: PolicyConfig) -> None:
    """Every length that the policy asks for occurs in the data."""
    longest = max(episode.length for episode in source.episodes)
    window = policy.past + policy.chunk
    needs = {
        f"policy.past {policy.past} and policy.chunk {policy.chunk} need {window}": window,
        f"policy.history {policy.history} needs {policy.history + 1}": policy.history + 1,
    }
    if policy.fast_slow:
        oldest = policy.fast_slow.max_age
        needs[f"policy.fast_slow.max_age {oldest} needs {oldest + 1}"] = oldest + 1
    for what, steps in needs.items():
        require(
            steps <= longest,
            f"{what} steps of one episode, but the longest episode of {source.recipe.name!r} has {longest} frames. "
            "Choose less.",
        )


def _require_fit(r: Recipe, policy: PolicyConfig) -> None:
    for name, dim, spec in (
        ("state_dim", policy.state_dim, r.state.spec),
        ("action_dim", policy.action_dim, r.action.spec),
    ):
        if spec.dim > dim:
            raise UsageError(
                f"policy.{name} is {dim}, but recipe {r.name!r} has {spec.dim} dimensions {spec.names}. Raise it."
            )
    dataset_checks.cameras(r, policy.cameras)


def _open(r: Recipe, data: DataConfig, policy: PolicyConfig, split: Literal["train", "validation"]) -> LeRobotSource:
    source = LeRobotSource(r, policy.chunk, split, policy.past, policy.history)
    return frame_cache.cached(source, views(policy), data.cache) if data.cache else source
