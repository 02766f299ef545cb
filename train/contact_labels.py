"""Where a demonstration is in contact: from the gripper, from a column of the data set, or from a file beside it.

A file is JSON; frames are numbered within their episode, and both ends of a span are in contact:

    {"episodes": [{"episode_index": 0, "contacts": [[12, 30], [41, 55]]}, ...]}

`vla-record` writes such entries into `tandem_record.json` for robots that feel contact.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.dataset import LeRobotSource
from vla.errors import DataError
from vla.switching import GripperContact, onsets, phases, settle


@dataclass(frozen=True)
class ColumnContact:
    """A column of the data set: a sensor's force, or 0 and 1."""

    kind: Literal["column"]
    key: str  # of one number a frame
    above: float  # more than this is contact


@dataclass(frozen=True)
class FileContact:
    """Spans of contact in a JSON file."""

    kind: Literal["file"]
    path: Path  # absolute, or below the data set's folder


Contact = GripperContact | ColumnContact | FileContact


@dataclass(frozen=True)
class Labels:
    """Of the n frames of a source; frames count the source's own."""

    phase: np.ndarray  # (n,) int64, number in `vla.switching.PHASES`
    onset: np.ndarray  # (n,) int64, the frame at which this frame's contact began; -1 without contact
    begin: np.ndarray  # (n,) int64, first frame of the episode


def label(source: LeRobotSource, contact: Contact, enter: int, leave: int) -> Labels:
    """Phases of all frames of `source`; contact shorter than `enter` and gaps shorter than `leave` do not count.

    Raises:
        UsageError: the gripper's dimension is not there.
        DataError: the column or the file cannot be read, or does not speak of every episode.
    """
    felt = read(source, contact)
    phase, onset = np.empty(len(source), np.int64), np.empty(len(source), np.int64)
    begin = np.empty(len(source), np.int64)
    for episode in source.episodes:
        here = slice(episode.start, episode.start + episode.length)
        settled = settle(felt[here], enter, leave)
        phase[here], begin[here] = phases(settled), episode.start
        local = onsets(settled)
        onset[here] = np.where(local >= 0, local + episode.start, -1)
    return Labels(phase, onset, begin)


def read(source: LeRobotSource, contact: Contact) -> np.ndarray:
    """(n,) bool, contact as it was measured, of all frames of `source`."""
    if isinstance(contact, GripperContact):
        states, actions = source.statistics_arrays()
        vector, values = (source.recipe.state, states) if contact.vector == "state" else (source.recipe.action, actions)
        return contact.read(values, vector.spec)
    if isinstance(contact, ColumnContact):
        return _column(source, contact)
    path = source.folder.root / contact.path
    spans = _spans(path)
    felt = np.zeros(len(source), bool)
    for episode in source.episodes:
        for first, last in _of(spans, episode.index, episode.length, path):
            felt[episode.start + first : episode.start + last + 1] = True
    return felt


def _column(source: LeRobotSource, contact: ColumnContact) -> np.ndarray:
    features = source.folder.features
    if contact.key not in features:
        raise DataError(f"{source.folder.root} has no column {contact.key!r}, only {sorted(features)}.")
    values = source.folder.read([contact.key])[contact.key]
    rows = np.concatenate([np.arange(e.row, e.row + e.length) for e in source.episodes])
    if values.size != len(values) or values.dtype.kind not in "biuf":
        raise DataError(f"Column {contact.key!r} must hold one number a frame, got {values.dtype} {values.shape}.")
    return values.reshape(-1)[rows] > contact.above


def _spans(path: Path) -> Mapping[int, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {entry["episode_index"]: entry["contacts"] for entry in data["episodes"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no file of contacts ({type(error).__name__}: {error}). It must be JSON: "
            '{"episodes": [{"episode_index": 0, "contacts": [[first, last], ...]}, ...]}.'
        ) from error


def _of(spans: Mapping[int, Any], episode: int, length: int, path: Path) -> list[tuple[int, int]]:
    if episode not in spans:
        raise DataError(f"{path} says nothing of episode {episode}. Without contact: an empty list.")
    found = [tuple(span) for span in spans[episode]]
    for span in found:
        if len(span) != 2 or not all(isinstance(f, int) for f in span) or not 0 <= span[0] <= span[1] < length:
            raise DataError(
                f"{path}: episode {episode} has {length} frames, and contact {list(span)}. A span is [first, last]."
            )
    return found
