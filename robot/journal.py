"""Episodes as they were lived through, kept until the data set is written.

A LeRobot v3 data set is unreadable between its first episode and its `finalize`: its Parquet files get
their footers last. Recording therefore goes to a journal first, one file per episode, each written
whole or not at all, and the data set is written from it in one go at the end. A process killed at any
moment leaves complete episodes behind, and running it again continues after the last of them.
"""

import fcntl
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import DataError, TandemError
from vla.files import require_writable, write_bytes, write_json


@dataclass(frozen=True)
class Episode:
    """One demonstration; row t of all arrays belongs to the same control step."""

    images: Mapping[str, np.ndarray]  # camera name -> (T, H, W, 3) uint8 RGB
    state: np.ndarray  # (T, S) float32, units of the state's ActionSpec
    action: np.ndarray  # (T, A) float32, units of the action's ActionSpec; what should be done at state t
    instruction: str

    def __post_init__(self) -> None:
        length = len(self.state)
        if length == 0:
            raise DataError("An episode needs at least one frame; this one has none.")
        lengths = {"action": len(self.action)} | {name: len(x) for name, x in self.images.items()}
        if set(lengths.values()) != {length}:
            raise DataError(f"An episode's arrays must be equally long: state has {length} rows, {lengths}.")
        for name, numbers in (("state", self.state), ("action", self.action)):
            if not np.isfinite(numbers).all():
                raise DataError(f"An episode's {name} holds numbers that are not finite.")


def differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two configurations, "key (then, now)", and so on; empty if nothing does."""
    return ", ".join(
        f"{k} ({begun.get(k)!r} then, {now.get(k)!r} now)" for k in {**begun, **now} if begun.get(k) != now.get(k)
    )


class Journal:
    """A folder with one file per attempt, named by whoever records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def recording(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Take the folder for a recording described by `config`, or continue that recording.

        Raises:
            TandemError: the folder cannot be written, holds episodes of another configuration, or
                somebody is recording into it now.
        """
        require_writable(self.folder)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes when the process goes
            except OSError as error:
                raise TandemError(
                    f"Another process is recording into {self.folder}; wait for it, or stop it."
                ) from error
            opening = self.folder / "config.json"
            if not opening.exists():
                write_json(opening, dict(config))
            begun = json.loads(opening.read_text(encoding="utf-8"))
            if different := differences(begun, config):
                raise TandemError(
                    f"{self.folder} holds an unfinished recording that differs in {different}. Give the same "
                    "configuration again to finish it, choose another output folder, or remove it."
                )
            yield

    def facts(self, name: str) -> dict[str, Any] | None:
        """What was noted about an attempt; None where it has not been made."""
        path = self._path(name)
        if not path.exists():
            return None
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("facts.json"))

    def add(self, name: str, facts: Mapping[str, Any], episode: Episode | None) -> None:
        """Note an attempt, with its frames unless they are not wanted."""
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w") as archive:  # an .npz, uncompressed, with a page of JSON in it
            archive.writestr("facts.json", json.dumps(dict(facts)))
            arrays: dict[str, np.ndarray] = {}
            if episode is not None:
                archive.writestr("instruction.txt", episode.instruction)
                arrays = {"state": episode.state, "action": episode.action}
                arrays |= {f"images/{k}": v for k, v in episode.images.items()}
            for key, array in arrays.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as f:
                    np.lib.format.write_array(f, np.ascontiguousarray(array), allow_pickle=False)
        write_bytes(self._path(name), memory.getvalue())

    def episode(self, name: str) -> Episode:
        """The frames of an attempt that was added with them."""
        with zipfile.ZipFile(self._path(name)) as archive:
            arrays = {}
            for key in archive.namelist():
                if key.endswith(".npy"):
                    with archive.open(key) as f:
                        arrays[key.removesuffix(".npy")] = np.lib.format.read_array(f, allow_pickle=False)
            instruction = archive.read("instruction.txt").decode()
        images = {k.removeprefix("images/"): v for k, v in arrays.items() if k.startswith("images/")}
        return Episode(images, arrays["state"], arrays["action"], instruction)

    def remove(self) -> None:
        """Forget everything: the data set is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"
