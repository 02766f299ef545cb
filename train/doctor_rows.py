"""The doctor's checks of a data set's bookkeeping: rows, episodes, time, tasks, and what the recipe says of them."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from train.findings import Finding
from train.raw_table import RawTable, Span
from vla.errors import choose_from

LENGTH_FACTOR = 5  # an episode this many times shorter or longer than the median is worth a look
STEP_TOLERANCE = 0.2  # of a frame: a time step that differs by more is a jump
EXCLUDE = "Repair the episodes, or list them in the recipe's split.exclude."


def columns(table: RawTable) -> Iterator[Finding]:
    for key, reason in table.unreadable.items():
        yield Finding(
            "error", "unreadable column", reason, "Training needs this column.", f"Correct {key!r} in the recipe, or "
            "copy the data set again.", column=key,
        )  # fmt: skip


def cameras(table: RawTable) -> Iterator[Finding]:
    for name, key in table.recipe.cameras.items():
        if key not in table.folder.cameras:
            yield Finding(
                "error",
                "missing camera",
                f"the recipe maps {key!r} to {name!r}, but the data set has no such camera."
                f"{choose_from(key, table.folder.cameras)}",
                "The policy would be trained without this view.",
                "Correct the recipe's 'cameras'.",
                column=key,
            )


def dimensions(table: RawTable) -> Iterator[Finding]:
    for role, vector, values in (
        ("state", table.recipe.state, table.state),
        ("action", table.recipe.action, table.action),
    ):
        if values is not None and values.shape[1] != vector.spec.dim:
            yield Finding(
                "error",
                "dimension count",
                f"the column has {values.shape[1]} dimensions, named {table.folder.features[vector.key].get('names')}; "
                f"the recipe describes {vector.spec.dim}: {list(vector.spec.names)}.",
                "Numbers would be given the meaning of their neighbours.",
                f"Correct {role}.spec in the recipe.",
                column=vector.key,
            )
        if abs(vector.spec.rate_hz - table.folder.fps) > 1e-3 * table.folder.fps:
            yield Finding(
                "error",
                "rate",
                f"the data set has {table.folder.fps:g} frames/s, {role}.spec.rate_hz is {vector.spec.rate_hz:g}.",
                "A row is one control step: at another rate the robot moves too fast or too slow.",
                "Correct the recipe's rate_hz, or resample the data.",
                column=vector.key,
            )


def frames(table: RawTable) -> Iterator[Finding]:
    """Frames lost or doubled: between metadata and rows, and inside the episodes."""
    rows = len(next(iter(table.columns.values())))
    if rows != table.folder.total_frames:
        yield Finding(
            "error",
            "frames lost",
            f"meta/info.json counts {table.folder.total_frames} frames, the parquet files hold {rows}.",
            "Frames are missing, or belong to another version of the data set.",
            "Copy or download the data set again.",
        )
    empty = tuple(s.episode for s in table.spans if s.length == 0)
    if empty:
        yield Finding("error", "empty episode", f"{len(empty)} episodes have no frames.", "There is nothing to learn.",
                      EXCLUDE, empty)  # fmt: skip
    steps, owner = table.columns.get("frame_index"), table.columns.get("episode_index")
    if steps is None or owner is None:
        return
    wrong = {s: (steps[s.rows] != np.arange(s.length)) | (owner[s.rows] != s.episode) for s in table.spans}
    broken = [(span, int(np.argmax(rows))) for span, rows in wrong.items() if rows.any()]
    if broken:
        span, at = broken[0]
        yield Finding(
            "error",
            "frames lost",
            f"{len(broken)} episodes do not consist of their own frames 0, 1, 2 ...; row {at} of episode "
            f"{span.episode} says that it is frame {steps[span.start + at]} of episode {owner[span.start + at]}.",
            "Pictures and numbers after the gap belong to different moments.",
            EXCLUDE,
            tuple(s.episode for s, _ in broken),
            frame=at,
        )


def timestamps(table: RawTable) -> Iterator[Finding]:
    stamps = table.columns.get("timestamp")
    if stamps is None:
        return
    period = 1 / table.folder.fps
    steps = {s: np.diff(stamps[s.rows].astype(np.float64)) for s in table.spans if s.length > 1}
    if not steps:
        return
    median = float(np.median(np.concatenate(list(steps.values()))))
    if abs(median - period) > STEP_TOLERANCE * period:
        yield Finding(
            "error",
            "timestamps",
            f"frames are {median:.4f} s apart ({1 / median if median else 0:.1f} frames/s), meta/info.json says "
            f"{table.folder.fps:g} frames/s ({period:.4f} s).",
            "Pictures are found by time: they would be those of other moments, or none.",
            "Correct the rate at the source, or convert the data set again.",
            column="timestamp",
        )
        return
    jumps = {s: np.flatnonzero(~(np.abs(d - period) <= STEP_TOLERANCE * period)) for s, d in steps.items()}
    jumps = {s: at for s, at in jumps.items() if len(at)}
    if jumps:
        span, at = next(iter(jumps.items()))
        yield Finding(
            "error",
            "timestamps",
            f"time jumps {sum(map(len, jumps.values()))} times, first by {steps[span][at[0]]:.3f} s where one frame is "
            f"{period:.3f} s.",
            "The robot moved on while nothing was recorded, and pictures are found by time.",
            EXCLUDE,
            tuple(s.episode for s in jumps),
            frame=int(at[0]) + 1,
            column="timestamp",
        )


def tasks(table: RawTable) -> Iterator[Finding]:
    mute = tuple(s.episode for s in table.spans if s.length and not table.text(s).strip())
    if mute:
        yield Finding(
            "error",
            "task without text",
            f"{len(mute)} of {len(table.spans)} episodes have no instruction.",
            "The policy is told what to do in words.",
            "Name the tasks in meta/tasks.parquet, or set the recipe's language to source 'constant' with a text.",
            mute,
        )
    texts = {table.text(s) for s in table.spans if s.length} - {""}
    spellings = defaultdict(list)
    for text in sorted(texts):
        spellings[" ".join(text.lower().rstrip(".! ").split())].append(text)
    for same in spellings.values():
        if len(same) > 1:
            yield Finding(
                "info", "task spelling", f"one task is spelled in {len(same)} ways: {same}.",
                "The policy has to learn that they mean the same.", "Choose one spelling, unless this is on purpose.",
            )  # fmt: skip


def lengths(table: RawTable) -> Iterator[Finding]:
    filled = [s for s in table.spans if s.length]
    if not filled:
        return
    median = float(np.median([s.length for s in filled]))
    tests: dict[str, Callable[[Span], bool]] = {
        "shorter": lambda s: s.length * LENGTH_FACTOR < median or s.length == 1,
        "longer": lambda s: s.length > median * LENGTH_FACTOR,
    }
    for word, odd in tests.items():
        found = [s for s in filled if odd(s)]
        if found:
            yield Finding(
                "warning",
                "episode length",
                f"{len(found)} episodes are over {LENGTH_FACTOR} times {word} than the median of {median:g} frames: "
                f"{[s.length for s in found[:8]]}.",
                "Often a recording that was started, or left running, by mistake.",
                "Look at them; list those that are no demonstrations in the recipe's split.exclude.",
                tuple(s.episode for s in found),
            )


def duplicates(table: RawTable) -> Iterator[Finding]:
    vectors = [v for v in (table.state, table.action) if v is not None]
    if not vectors:
        return
    same: dict[str, list[int]] = defaultdict(list)
    for span in table.spans:
        if span.length:
            content = b"".join(np.ascontiguousarray(v[span.rows]).tobytes() for v in vectors)
            same[hashlib.sha256(content).hexdigest()].append(span.episode)
    for group in same.values():
        if len(group) > 1:
            yield Finding(
                "warning",
                "duplicate episodes",
                f"{len(group)} episodes have the same states and actions, number for number.",
                "They count several times in training, and a copy in the validation split makes it worthless.",
                f"Keep one: list {group[1:]} in the recipe's split.exclude.",
                tuple(group),
            )


CHECKS = (columns, cameras, dimensions, frames, timestamps, tasks, lengths, duplicates)
