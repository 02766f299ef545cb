"""Pictures decoded once: a uint8 memory map for each camera, at the size the model sees.

A cache belongs to the content of a data set: its name holds a digest of the data set's revision, the camera,
the size and the excluded episodes, so data that changed never meets old pictures. It is written whole or not at all.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from train.dataset import LeRobotSource, View
from vla import files
from vla.errors import TandemError, UsageError
from vla.images import Bars

VERSION = 2
CHUNK = 64  # frames decoded at once while a cache is made
GB = 1e9


@dataclass(frozen=True)
class CacheConfig:
    """Where decoded pictures are kept, and how much room all of them may take together."""

    folder: Path
    budget_gb: float  # 1e9 bytes; the longest unused caches make room

    def __post_init__(self) -> None:
        if not self.budget_gb > 0:
            raise UsageError(f"cache.budget_gb must be positive, got {self.budget_gb}. To do without: cache: null.")


class MappedFrames:
    """The frames of one camera of a data set at one size, out of a memory map."""

    def __init__(self, path: Path, frames: int, size: int) -> None:
        self._map = np.asarray(np.memmap(path, np.uint8, "r", shape=(frames, size, size, 3)))

    def read(self, rows: np.ndarray, size: int, out: np.ndarray, bars: Bars = "centred") -> None:
        """Fill `out` (B, size, size, 3) uint8 with the frames of `rows` (B,); `size` and `bars` are the map's."""
        for i, row in enumerate(rows.tolist()):
            out[i] = self._map[row]


def cached(source: LeRobotSource, views: Sequence[View], config: CacheConfig) -> LeRobotSource:
    """`source` with the pictures of `views` decoded once; makes what is missing, and says so.

    Both splits of a recipe share one cache. Processes that ask for the same cache wait for the first.

    Raises:
        TandemError: the pictures do not fit into the budget or onto the disk.
        DataError: a picture cannot be decoded.
    """
    frames, has, bars = source.folder.total_frames, source.recipe.cameras, _bars(views)
    sizes = {(name, view.size): frames * view.size**2 * 3 for view in views for name in view.cameras if name in has}
    about = {key: _about(source, *key, bars) for key in sizes}
    paths = {key: config.folder / _name(about[key]) for key in sizes}
    total = sum(sizes.values())  # bytes
    if total > config.budget_gb * GB:
        raise TandemError(
            f"{frames} frames of {_listed(sizes)} take {total / GB:.2f} GB decoded; cache.budget_gb is "
            f"{config.budget_gb:g}. Raise it, or train without a cache (cache: null)."
        )
    files.require_writable(config.folder)
    with _alone(config.folder):
        missing = [key for key in sizes if not _complete(paths[key], about[key], sizes[key])]
        _make_room(config, keep=set(paths.values()), bytes_needed=total)
        _require_free(config.folder, sum(sizes[key] for key in missing))
        for key in missing:
            _build(source, *key, paths[key], about[key])
        for path in paths.values():
            os.utime(path)  # marks its last use
    return source.with_frames({key: MappedFrames(paths[key] / "frames.u8", frames, key[1]) for key in sizes})


def _listed(keys: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{camera!r} at {size} px" for camera, size in keys)


def _bars(views: Sequence[View]) -> Bars:
    """Where the views of a policy, all of them, have their bars."""
    return views[0].bars if views else "centred"


def _about(source: LeRobotSource, camera: str, size: int, bars: Bars) -> dict[str, Any]:
    """What a cache holds, complete: two caches with equal values hold equal pictures."""
    return {
        "version": VERSION,
        "recipe": source.recipe.name,
        "revision": source.revision,
        "camera": source.recipe.cameras[camera],
        "size": size,
        "bars": bars,
        "frames": source.folder.total_frames,
        "excluded": sorted(source.recipe.split.exclude),
    }


def _name(about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    readable = "".join(c if c.isalnum() else "-" for c in about["recipe"])
    return f"frames-{readable}-{about['size']}px-{digest}"


def _complete(path: Path, about: dict[str, Any], size_bytes: int) -> bool:
    try:
        written = json.loads((path / "about.json").read_text(encoding="utf-8"))
        return written == about and (path / "frames.u8").stat().st_size == size_bytes
    except (OSError, ValueError):
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process, however that ends."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_room(config: CacheConfig, keep: set[Path], bytes_needed: int) -> None:
    """Remove the longest unused caches, except `keep`, until all others and `bytes_needed` fit the budget."""
    others = [p for p in config.folder.glob("frames-*") if p not in keep and (p / "about.json").is_file()]
    others.sort(key=lambda p: p.stat().st_mtime_ns)
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in others}
    while others and sum(sizes[p] for p in others) + bytes_needed > config.budget_gb * GB:
        shutil.rmtree(others.pop(0))


def _require_free(folder: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if bytes_needed > free:
        raise TandemError(
            f"Decoded pictures need {bytes_needed / GB:.2f} GB in {folder}, where {free / GB:.2f} GB are free. Free "
            f"some room, name another cache.folder, or train without a cache (cache: null)."
        )


def _build(source: LeRobotSource, camera: str, size: int, path: Path, about: dict[str, Any]) -> None:
    """Decode all rows that the recipe keeps; the others stay empty."""
    reader, rows = source.frame_reader(camera, size), source.kept_rows
    frame_bytes = size * size * 3
    buffer = np.empty((CHUNK, size, size, 3), np.uint8)
    console = Console(stderr=True)
    title = f"decoding {len(rows)} frames of camera {camera!r} once, {about['frames'] * frame_bytes / GB:.2f} GB"
    if not console.is_terminal:
        console.print(title, highlight=False)
    try:
        with (
            files.whole_folder(path) as partial,
            Progress(console=console, disable=not console.is_terminal, transient=True) as bar,
            (partial / "frames.u8").open("wb") as file,
        ):
            task = bar.add_task(title, total=len(rows))
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                reader.read(part, size, buffer[: len(part)], about["bars"])
                for row, picture in zip(part.tolist(), buffer, strict=False):
                    file.seek(row * frame_bytes)
                    file.write(picture.data)
                bar.advance(task, len(part))
            file.truncate(about["frames"] * frame_bytes)
            files.write_json(partial / "about.json", about)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TandemError(f"The disk of {path.parent} is full; nothing was kept. Free some room and repeat.") from error
