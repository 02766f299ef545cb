"""A LeRobot v3 data set on disk: where it is, what it declares, its rows as arrays, its digest.

Reads `meta/` and `data/` directly: one pass over the columns that are asked for, instead of one
tensor for each cell. What the numbers must satisfy to be trained on is checked in `train.dataset`.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.recipe import Recipe
from vla.errors import DataError, choose_from

HUB_TAG = "v3.0"  # LeRobot tags the hub's revisions with the version of the format
HEAD = 1 << 16  # bytes of a large file that enter the digest, from each end


@dataclass(frozen=True)
class Folder:
    """The metadata of one data set. E episodes; rows are numbered through all files."""

    root: Path
    fps: float
    features: dict[str, Any]  # column -> {"dtype", "shape", "names"}
    total_frames: int  # as `meta/info.json` says
    video_path: str  # pattern of a video's path
    episodes: dict[str, np.ndarray]  # column of meta/episodes -> (E,), sorted by episode
    tasks: dict[int, str]  # task_index -> instruction

    @property
    def cameras(self) -> list[str]:
        return [k for k, f in self.features.items() if f["dtype"] in ("video", "image")]

    @property
    def data_files(self) -> list[Path]:
        """In the order in which their rows are numbered."""
        return sorted((self.root / "data").glob("*/*.parquet"))

    def bounds(self, e: int) -> tuple[int, int]:
        """First row of the episode at place `e`, and the row after its last."""
        first, after = (self._episode_column(f"dataset_{end}_index")[e] for end in ("from", "to"))
        return int(first), int(after)

    def video_files(self, camera: str) -> list[Path]:
        """(E,) the file that holds each episode's frames of a video camera."""
        columns = [self._episode_column(f"videos/{camera}/{name}") for name in ("chunk_index", "file_index")]
        return [
            self.root / self.video_path.format(video_key=camera, chunk_index=int(chunk), file_index=int(file))
            for chunk, file in zip(*columns, strict=True)
        ]

    def video_starts(self, camera: str) -> np.ndarray:
        """(E,) float64 s, where each episode begins in its video file."""
        return self._episode_column(f"videos/{camera}/from_timestamp").astype(np.float64)

    def _episode_column(self, name: str) -> np.ndarray:
        if name not in self.episodes:
            raise DataError(f"{self.root}/meta/episodes has no column {name!r}: the metadata is incomplete.")
        return self.episodes[name]

    def read(self, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Whole columns: scalars as (N,), vectors as (N, dim). One pass over all files."""
        tables = []
        for path in self.data_files:
            try:
                tables.append(pq.ParquetFile(path).read(columns=list(columns)))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"Cannot read {path}: {_first_line(error)} {RECOPY}") from error
        if not tables:
            raise DataError(f"{self.root}/data holds no parquet file. {RECOPY}")
        whole = pa.concat_tables(tables, promote_options="permissive")
        for name in columns:
            if name not in whole.column_names:
                raise DataError(
                    f"The parquet files of {self.root} have no column {name!r}.{choose_from(name, whole.column_names)}"
                )
        return {name: _to_numpy(whole.column(name), name, self.root) for name in columns}

    def revision(self, cameras: Sequence[str]) -> str:
        """16 hexadecimal digits of the content with these cameras, wherever and whenever it was copied.

        Metadata and rows enter whole; of videos and of parquet files that hold pictures, the size and
        both ends enter (a parquet file's end holds the position and range of every column).
        """
        digest = hashlib.sha256((self.root / "meta" / "info.json").read_bytes())
        embedded = any(f["dtype"] == "image" for f in self.features.values())
        rows = [self.root / "meta" / "tasks.parquet", *sorted((self.root / "meta/episodes").glob("*/*.parquet"))]
        for path in rows + ([] if embedded else self.data_files):
            digest.update(path.relative_to(self.root).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        videos = sorted(p for key in cameras for p in (self.root / "videos" / key).glob("*/*.mp4"))
        for path in videos + (self.data_files if embedded else []):
            digest.update(f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(HEAD))
                file.seek(max(0, path.stat().st_size - HEAD))
                digest.update(file.read(HEAD))
        return digest.hexdigest()[:16]


RECOPY = "The copy is damaged or incomplete: copy or download it again."


def open_folder(root: Path) -> Folder:
    """Read the metadata of the data set at `root`.

    Raises:
        DataError: not a LeRobot v3 data set, or its metadata is damaged.
    """
    info = _read_info(root)
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DataError(f"{root}/meta/episodes holds no parquet file: nothing was recorded, or {RECOPY.lower()}")
    try:
        columns = [c for c in pq.read_schema(paths[0]).names if not c.startswith("stats/") and c != "tasks"]
        tables = [pq.ParquetFile(path).read(columns=columns) for path in paths]
        episodes = pa.concat_tables(tables, promote_options="permissive").sort_by("episode_index")
        tasks = pq.read_table(root / "meta" / "tasks.parquet")
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"Cannot read the metadata of {root}: {_first_line(error)} {RECOPY}") from error
    text = next((c for c in tasks.column_names if c != "task_index"), None)
    return Folder(
        root=root,
        fps=float(info["fps"]),
        features=info["features"],
        total_frames=int(info["total_frames"]),
        video_path=info.get("video_path") or "",
        episodes={c: episodes.column(c).to_numpy() for c in columns},
        tasks=dict(zip(tasks.column("task_index").to_pylist(), tasks.column(text).to_pylist(), strict=True))
        if text
        else {},
    )


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {_first_line(error)} {RECOPY}") from error
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise DataError(
            f"{root} is a LeRobot data set of version {version}; this release reads v3. Convert it with "
            f"`python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=<name> --root={root}`."
        )
    missing = [key for key in ("fps", "features", "total_frames") if key not in info]
    if missing:
        raise DataError(f"{path} lacks {missing}. {RECOPY}")
    return info


def locate(recipe: Recipe) -> Path:
    """The folder that a recipe means: its `root`, LeRobot's own copy of `repo_id`, or a download of it.

    Raises:
        DataError: there is no such folder, or the hub cannot be reached.
    """
    if recipe.root is not None:
        if (recipe.root / "meta" / "info.json").is_file():
            return recipe.root
        what = f"the hub's {recipe.repo_id}" if recipe.repo_id else "a LeRobot v3 data set"
        get = (
            f"`hf download {recipe.repo_id} --repo-type dataset --revision {recipe.revision or HUB_TAG} "
            f"--local-dir {recipe.root}`"
            if recipe.repo_id
            else "vla-record or lerobot-record"
        )
        raise DataError(
            f"Recipe {recipe.name!r} expects {what} at {recipe.root}, but there is no "
            f"{recipe.root}/meta/info.json. Make or get it with {get}, or correct the recipe's 'root'."
        )
    assert recipe.repo_id is not None  # the recipe's own check
    home = _lerobot_home()
    local = home / recipe.repo_id
    if recipe.revision is None and (local / "meta" / "info.json").is_file():
        return local
    return _download(recipe, recipe.repo_id, home / "hub")


def _lerobot_home() -> Path:
    """Where LeRobot keeps data sets, so that both share one copy."""
    hub = os.getenv("HF_HOME", os.path.join(os.getenv("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.getenv("HF_LEROBOT_HOME", os.path.join(hub, "lerobot"))).expanduser()


def _download(recipe: Recipe, repo_id: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["meta/*", "data/*", *(f"videos/{key}/*" for key in recipe.cameras.values())]
    revision = recipe.revision or HUB_TAG
    try:
        return Path(
            snapshot_download(repo_id, repo_type="dataset", revision=revision, cache_dir=cache, allow_patterns=wanted)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"Cannot get {repo_id} (revision {revision}) from the hub: {_first_line(error)} Check the name and the "
            f"network, or copy the data set to a folder and name it as 'root' in recipe {recipe.name!r}."
        ) from error


def _to_numpy(column: pa.ChunkedArray, name: str, root: Path) -> np.ndarray:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return column.to_numpy()
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    if len(lengths) != 1 or lengths[0] is None:
        raise DataError(f"Column {name!r} of {root} has vectors of different lengths: {lengths}.")
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
    if flat.dtype == object:
        raise DataError(f"Column {name!r} of {root} holds {kind}, not one vector of numbers a frame.")
    return flat.reshape(len(column), lengths[0])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else type(error).__name__ + "."
