"""What a data set must satisfy before anything is learned from it. Each failure is one `DataError`."""

from collections.abc import Mapping, Sequence

import numpy as np

from train.lerobot_folder import RECOPY, Folder
from train.recipe import Recipe, Vector
from vla.errors import DataError, choose_from

NUMBERS = ("float", "int", "uint", "bool")  # beginnings of the dtypes a vector may have


def declared(recipe: Recipe, folder: Folder) -> None:
    """The columns that the recipe names exist and have its dimensions; the rates agree."""
    for name, key in recipe.cameras.items():
        if key not in folder.cameras:
            raise DataError(
                f"{folder.root} has no camera {key!r}, which recipe {recipe.name!r} maps to {name!r}."
                f"{choose_from(key, folder.cameras)} Correct the recipe's 'cameras'."
            )
        if (folder.features[key].get("info") or {}).get("is_depth_map"):
            raise DataError(f"Camera {key!r} of {folder.root} is a depth map; policies here read RGB pictures.")
    for role, vector in (("state", recipe.state), ("action", recipe.action)):
        _vector(role, vector, recipe, folder)


def cameras(recipe: Recipe, wanted: Sequence[str]) -> None:
    """The recipe has one of the policy's cameras."""
    if not set(wanted) & recipe.cameras.keys():
        raise DataError(
            f"Recipe {recipe.name!r} has none of policy.cameras {list(wanted)}.{choose_from(wanted[0], recipe.cameras)}"
        )


def _vector(role: str, vector: Vector, recipe: Recipe, folder: Folder) -> None:
    numbers = [k for k, f in folder.features.items() if f["dtype"].startswith(NUMBERS)]
    if vector.key not in numbers:
        raise DataError(
            f"{folder.root} has no column of numbers {vector.key!r}, which recipe {recipe.name!r} names as its {role}."
            f"{choose_from(vector.key, numbers)}"
        )
    shape = list(folder.features[vector.key]["shape"])
    if shape != [vector.spec.dim]:
        raise DataError(
            f"Column {vector.key!r} of {folder.root} has shape {shape}, but the {role} of recipe {recipe.name!r} has "
            f"{vector.spec.dim} dimensions {list(vector.spec.names)}; the data set's own names are "
            f"{folder.features[vector.key].get('names')}. Correct the recipe's {role}.spec."
        )
    if abs(vector.spec.rate_hz - folder.fps) > 1e-3 * folder.fps:
        raise DataError(
            f"{folder.root} was recorded at {folder.fps:g} frames/s, but {role}.spec.rate_hz of recipe "
            f"{recipe.name!r} is {vector.spec.rate_hz:g}: each row is one control step, so both must be equal. "
            f"Correct the recipe, or record or resample the data at {vector.spec.rate_hz:g}."
        )


def episodes(folder: Folder, table: Mapping[str, np.ndarray], kept: np.ndarray) -> None:
    """Every kept episode has frames, and the rows are exactly those that the metadata counts.

    Args:
        table: columns `index`, `episode_index` and `frame_index`, each (N,).
        kept: places in `folder.episodes`.
    """
    rows = len(table["index"])
    numbered = np.array_equal(table["index"], np.arange(rows))
    if rows != folder.total_frames or not numbered:
        raise DataError(
            f"{folder.root}: meta/info.json counts {folder.total_frames} frames, data/ holds {rows} rows whose 'index' "
            f"{'has no gap' if numbered else 'does not count 0, 1, 2 ...'}. {RECOPY}"
        )
    for e in kept:
        number, (first, after) = int(folder.episodes["episode_index"][e]), folder.bounds(e)
        if after <= first:
            raise DataError(
                f"Episode {number} of {folder.root} is empty. Add {number} to the recipe's split.exclude, or delete "
                f"it with `lerobot-edit-dataset`."
            )
        inside = table["episode_index"][first:after]
        steps = table["frame_index"][first:after]
        if len(inside) != after - first or not (
            np.all(inside == number) and np.array_equal(steps, np.arange(len(steps)))
        ):
            raise DataError(
                f"Episode {number} of {folder.root}: meta/episodes gives it rows {first}..{after - 1}, but those "
                f"are not its frames 0..{after - first - 1}: frames are lost or doubled. {RECOPY}"
            )


def finite(key: str, values: np.ndarray, table: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
    """No NaN and no infinity in `values` (N, dim) at `rows`."""
    bad = rows[~np.isfinite(values[rows]).all(axis=1)]
    if len(bad):
        row = bad[0]
        count = len(np.unique(table["episode_index"][bad]))
        raise DataError(
            f"{key!r} is not finite in {len(bad)} frames of {count} episodes, first in episode "
            f"{table['episode_index'][row]}, frame {table['frame_index'][row]}: {values[row].tolist()}. Repair the "
            f"data, or list the episodes {np.unique(table['episode_index'][bad])[:20].tolist()} in the recipe's "
            f"split.exclude."
        )


def tasks(folder: Folder, table: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
    """Every frame at `rows` has an instruction."""
    for task in np.unique(table["task_index"][rows]).tolist():
        if not (folder.tasks.get(task) or "").strip():
            number = table["episode_index"][rows[table["task_index"][rows] == task][0]]
            raise DataError(
                f"Episode {number} of {folder.root} has no instruction: meta/tasks.parquet has no text for task "
                f"{task}. Set the recipe's language to source 'constant' with a text, or name the tasks."
            )
