"""Statistics of a LeRobot data set over all of its frames, as `vla-train` computes them.

LeRobot's own `meta/stats.json` is not used: its q01 and q99 are means of the episodes' quantiles, which describe
no data set whose episodes sit at different places.
"""

from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_tandem.configuration_tandem import TandemConfig
from train.compute_stats import summarise
from train.lerobot_folder import Folder, open_folder
from vla.errors import DataError
from vla.stats import Moments, Statistics
from vla.types import ActionSpec

UNKNOWN = "unknown"  # a unit that no robot of ours has, so that such a policy is refused there


def of_dataset(root: Path, config: TandemConfig) -> Statistics:
    """Exact statistics of the data set at `root`, all of its frames, with the recipe's meaning of the numbers.

    Raises:
        DataError: the rows are not on this disk (streaming), or are damaged.
        TandemError: the recipe's dimensions are not the data set's.
    """
    folder = open_folder(root)
    if not folder.data_files:
        raise DataError(
            f"{root} has no rows on this disk, and the policy's statistics are computed from all of them. "
            "Train without --dataset.streaming."
        )
    columns = folder.read([OBS_STATE, ACTION])
    moments = {k: summarise([np.ascontiguousarray(v.reshape(len(v), -1))]) for k, v in columns.items()}
    return Statistics(
        state_spec=config.spec("state") or _named(folder, OBS_STATE, moments[OBS_STATE]),
        action_spec=config.spec("action") or _named(folder, ACTION, moments[ACTION]),
        state=moments[OBS_STATE],
        action=moments[ACTION],
        source=f"{root.name}@{folder.revision([])}",
    )


def _named(folder: Folder, key: str, moments: Moments) -> ActionSpec:
    """What is known without a recipe: names, the rate, and the range seen."""
    dim = len(moments.mean)
    return ActionSpec(
        names=_names(folder.features[key].get("names"), dim),
        units=(UNKNOWN,) * dim,
        reference=("absolute",) * dim,
        low=tuple((moments.min - 1e-6).tolist()),
        high=tuple((moments.max + 1e-6).tolist()),
        rate_hz=folder.fps,
    )


def _names(given: Any, dim: int) -> tuple[str, ...]:
    names = [n for group in given.values() for n in group] if isinstance(given, dict) else list(given or ())
    return tuple(map(str, names)) if len(set(names)) == dim else tuple(f"dim{i}" for i in range(dim))
