"""The doctor's checks of what the cameras saw: black, stuck or swapped cameras, videos that end too early.

Pictures are looked at as thumbnails: averaging over areas removes what video compression adds, and a stuck
camera differs from a still scene in that the robot's state moves on while nothing in the picture does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from train.dataset import FrameReader
from train.findings import Finding, Severity
from train.raw_table import RawTable, Span
from vla.codec import CONSTANT
from vla.errors import DataError

THUMBNAIL = 32  # pixels
FRAMES = 60  # at most, of an episode; evenly spread
# Grey levels: thumbnails that nowhere differ by more show the same. Measured at 96 px, h264 at crf 30: frames of a
# still scene differ by up to 16, the first ones by up to 23; an arm that moves, by 40 in one frame and 110 in five.
SAME = 20
BLACK = 16  # grey levels: a picture without a brighter thumbnail pixel is black
STUCK_S = 1.0  # shortest standstill that counts, unless it is half of the episode
STUCK_FRAMES = 5
THROUGHOUT = 0.8  # of an episode's frames: the first ones of a video are often coded more coarsely
MOVED = 0.5  # standard deviations the state moves meanwhile


@dataclass
class Seen:
    """What was found in the pictures of one camera."""

    unreadable: list[tuple[int, str]] = field(default_factory=list)  # episode, message
    black: list[tuple[int, int, bool]] = field(default_factory=list)  # episode, first black frame, all of it
    stuck: list[tuple[int, int, float, bool]] = field(default_factory=list)  # episode, first frame, s, all of it


def examine(table: RawTable, looked_at: int) -> Iterator[Finding]:
    """Look at `looked_at` episodes spread over the data set, and at the last frame of every video.

    Args:
        looked_at: episodes whose pictures are decoded, at most `FRAMES` of each; 0 means all.
    """
    filled = [s for s in table.spans if s.length]
    chosen = filled
    if 0 < looked_at < len(filled):
        chosen = [filled[i] for i in np.unique(np.linspace(0, len(filled) - 1, looked_at).round().astype(int))]
    pictures: dict[str, dict[int, np.ndarray]] = {}  # camera -> episode -> (T, h, w, 3)
    for name, key in table.cameras():
        try:
            reader = table.frames(key)
        except DataError as error:
            yield _unreadable(key, [(s.episode, str(error)) for s in filled])
            continue
        seen, pictures[key] = Seen(), {}
        for span in chosen:
            try:
                pictures[key][span.episode] = _look(table, reader, span, seen)
            except DataError as error:
                seen.unreadable.append((span.episode, str(error)))
        seen.unreadable += _cut_short(table, key, reader, {e for e, _ in seen.unreadable})
        yield from _report(f"{key} ({name})", seen, len(chosen))
    yield from _same_views(pictures)
    if chosen and len(chosen) < len(filled):
        yield Finding(
            "info", "pictures", f"the pictures of {len(chosen)} of {len(filled)} episodes were looked at.",
            "Decoding all of them takes long.", "Use --episodes 0 to look at all.",
        )  # fmt: skip


def thumbnails(reader: FrameReader, rows: np.ndarray, size: int = THUMBNAIL) -> np.ndarray:
    """(T, size, size, 3) uint8 of `rows` (T,)."""
    out = np.empty((len(rows), size, size, 3), np.uint8)
    reader.read(rows, size, out)
    return out


def _look(table: RawTable, reader: FrameReader, span: Span, seen: Seen) -> np.ndarray:
    rows = np.unique(np.linspace(span.start, span.stop - 1, min(FRAMES, span.length)).round().astype(np.int64))
    shots = thumbnails(reader, rows)
    dark = shots.reshape(len(shots), -1).max(axis=1) < BLACK
    if dark.any():
        seen.black.append((span.episode, int(rows[np.argmax(dark)]) - span.start, bool(dark.all())))
    if dark.all():
        return shots
    first, last = _longest_standstill(shots)
    seconds, share = (rows[last] - rows[first]) / table.folder.fps, (last - first + 1) / len(rows)
    long = last - first + 1 >= STUCK_FRAMES and (seconds >= STUCK_S or share >= 0.5)
    if long and _moved(table, rows[first], rows[last]):
        seen.stuck.append((span.episode, int(rows[first]) - span.start, float(seconds), share >= THROUGHOUT))
    return shots


def _longest_standstill(shots: np.ndarray) -> tuple[int, int]:
    """First and last of the longest run of thumbnails (T, h, w, 3) that equal the run's first."""
    best, start, values = (0, 0), 0, shots.astype(np.int16)
    for t in range(len(shots)):
        if np.abs(values[t] - values[start]).max() > SAME:
            start = t
        if t - start > best[1] - best[0]:
            best = (start, t)
    return best


def _moved(table: RawTable, first: int, last: int) -> bool:
    """Whether the state, or else the action, moves between two rows."""
    values = table.state if table.state is not None else table.action
    if values is None:
        return True
    known = values[table.kept]
    known = known[np.isfinite(known).all(axis=1)]
    inside = values[first : last + 1]
    inside = inside[np.isfinite(inside).all(axis=1)]
    if not len(inside):
        return True
    spread = known.std(axis=0)
    return bool((np.ptp(inside, axis=0) > MOVED * np.where(spread < CONSTANT, np.inf, spread)).any())


def _cut_short(table: RawTable, key: str, reader: FrameReader, known: set[int]) -> list[tuple[int, str]]:
    """(episode, message) for each video file whose last frame is not there."""
    if table.folder.features[key]["dtype"] == "image":
        return []
    files, starts = table.folder.video_files(key), table.folder.video_starts(key)
    last: dict[object, Span] = {}
    for span in table.spans:
        before = last.get(files[span.place])
        if span.length and (before is None or starts[span.place] >= starts[before.place]):
            last[files[span.place]] = span
    missing = []
    for span in last.values():
        if span.episode not in known:
            try:
                thumbnails(reader, np.array([span.stop - 1]))
            except DataError as error:
                missing.append((span.episode, str(error)))
    return missing


def _unreadable(column: str, found: Sequence[tuple[int, str]]) -> Finding:
    return Finding(
        "error",
        "frames lost",
        f"pictures of {len(found)} episodes cannot be read: {found[0][1]}",
        "Training would stop at these frames.",
        "Replace the files, or list the episodes in the recipe's split.exclude.",
        tuple(episode for episode, _ in found),
        column=column,
    )


def _report(column: str, seen: Seen, looked_at: int) -> Iterator[Finding]:
    if seen.unreadable:
        yield _unreadable(column, seen.unreadable)
    verdicts: tuple[tuple[bool, Severity], ...] = ((True, "error"), (False, "warning"))
    for whole, severity in verdicts:
        black = [b for b in seen.black if b[2] is whole]
        if black:
            yield Finding(
                severity,
                "black camera",
                f"{'every' if whole else 'some'} frame of {len(black)} of {looked_at} episodes is black.",
                "The policy learns to do without this view, or to stop when it goes dark.",
                "Check lens cap, exposure and cable; leave the camera out of the recipe, or exclude the episodes.",
                tuple(b[0] for b in black),
                frame=black[0][1],
                column=column,
            )
        stuck = [s for s in seen.stuck if s[3] is whole]
        if stuck:
            yield Finding(
                severity,
                "stuck camera",
                f"the picture stands still {'throughout' if whole else f'for up to {max(s[2] for s in stuck):.1f} s'} "
                f"in {len(stuck)} of {looked_at} episodes while the robot moves.",
                "The policy learns to act without looking.",
                "Check the camera's connection and driver; exclude these episodes.",
                tuple(s[0] for s in stuck),
                frame=stuck[0][1],
                column=column,
            )


def _same_views(pictures: dict[str, dict[int, np.ndarray]]) -> Iterator[Finding]:
    keys = list(pictures)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            both = pictures[one].keys() & pictures[other].keys()
            lit = [e for e in both if pictures[one][e].max() >= BLACK]
            if lit and all(np.abs(pictures[one][e].astype(np.int16) - pictures[other][e]).max() <= SAME for e in lit):
                yield Finding(
                    "warning",
                    "same view twice",
                    f"{one} and {other} show the same pictures.",
                    "One of them is missing: a camera was opened twice, or the columns were copied.",
                    "Check which camera is which; leave one out of the recipe.",
                    tuple(sorted(lit)),
                    column=one,
                )
