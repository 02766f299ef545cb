"""What lies below two Meta-World tasks: the same scene in two environments, and what touches what."""

from types import ModuleType
from typing import Any

import numpy as np


def same_scene(one: Any, other: Any) -> bool:
    """Whether two environments, each reset from one seed, have the same bodies in the same places."""
    return one.model_name == other.model_name and np.array_equal(one.model.body_pos, other.model.body_pos)


def copy_state(mujoco: ModuleType, source: Any, target: Any) -> None:
    """Put `target` where `source` is: all that the next simulator step depends on."""
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(source.model, kind))
    mujoco.mj_getState(source.model, source.data, state, kind)
    mujoco.mj_setState(target.model, target.data, state, kind)


def touching(env: Any) -> bool:
    """Whether the robot touches anything that is not its own."""
    roots, geoms = env.model.body_rootid, env.data.contact.geom  # (bodies,), (contacts, 2)
    own = roots[env.model.geom_bodyid[geoms]] == roots[env.model.body("hand").id]
    return bool((own[:, 0] != own[:, 1]).any())
