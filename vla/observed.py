"""One observation as the tensors that the network takes: one row, on the policy's device, in model units.

Axes: V cameras, T tokens, S state dims, p steps back, H steps ahead, A action dims, n candidates.
"""

import numpy as np
import torch
from torch import Tensor

from vla.conditions import Steering
from vla.errors import UsageError
from vla.fresh import Fresh
from vla.policy_config import PolicyConfig
from vla.processor import Processor
from vla.rtc import Committed, Guidance, prefix_weights
from vla.types import Observation, UnderWay


def on(device: torch.device, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def slow_inputs(
    processor: Processor, observation: Observation, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `VLAPolicy.encode`: (1, V, h, w, 3), (1, V), (1, T), (1, T); T is without padding."""
    images, present = processor.images(observation.images)
    ids, mask = processor.text(observation.instruction, observation.state)
    count = int(mask.sum())
    arrays = (images, present, ids[:count], mask[:count])
    first, second, third, fourth = (on(device, array)[None] for array in arrays)
    return first, second, third, fourth


def fresh_inputs(processor: Processor, observation: Observation, steering: Steering, device: torch.device) -> Fresh:
    """What the fast path takes of an observation.

    Raises:
        UsageError: the policy looks at earlier states, and the observation has too few.
    """
    codec, wanted = processor.codec, processor.config.history
    images, present = processor.fast_images(observation.images)
    history = None
    if wanted:
        states = _last(observation.history, wanted, "history", "policy.history")
        history = on(device, codec.encode_state(states))[None]
    return Fresh(
        state=on(device, codec.encode_state(observation.state))[None],
        images=on(device, images)[None],
        image_mask=on(device, present)[None],
        steering=steering,
        history=history,
    )


def _last(rows: np.ndarray | None, wanted: int, field: str, setting: str) -> np.ndarray:
    given = 0 if rows is None else len(rows)
    if rows is None or given < wanted:
        raise UsageError(
            f"The policy needs {wanted} rows of Observation.{field} ({setting}), the last before the observation, and "
            f"was given {given}. robot.runtime fills them in for every policy that says so; another loop does it with "
            "robot.recall.Recall."
        )
    return rows[given - wanted :]


def executed(processor: Processor, observation: Observation) -> np.ndarray:
    """(past, A) model units, the commands before the observation; NaN where there was none.

    Raises:
        UsageError: the observation has too few.
    """
    rows = _last(observation.executed, processor.config.past, "executed", "policy.past with policy.candidates")
    return processor.codec.encode_actions(rows)[:, : processor.codec.action_spec.dim]


def closest_past(candidates: np.ndarray, commands: np.ndarray) -> int:
    """argmin_i |past_i - executed|^2 over the steps that were executed; the first if none was (past-token prediction).

    Args:
        candidates: (n, p, A), what each chunk says of the steps before.
        commands: (p, A), what was sent then; rows of NaN do not count.
    """
    sent = ~np.isnan(commands).any(axis=1)
    return int(((candidates - commands) ** 2)[:, sent].sum(axis=(1, 2)).argmin())


def continuation(
    config: PolicyConfig, processor: Processor, under_way: UnderWay | None, device: torch.device
) -> tuple[Committed | None, Guidance | None]:
    """How the next chunk goes on with what is under way, as `config.continuation` says."""
    settings, chunk = config.continuation, config.chunk
    if settings is None or under_way is None or not len(under_way.actions):
        return None, None
    rows = processor.codec.encode_actions(under_way.actions[:chunk])
    actions = on(device, np.pad(rows, ((0, chunk - len(rows)), (0, 0))))[None]
    fixed = min(under_way.fixed, chunk - 1)
    if settings.method == "trained":
        return Committed(actions, torch.tensor([fixed], device=device)), None
    weights = prefix_weights(fixed, len(rows), chunk, settings.schedule).to(device)
    return None, Guidance(actions, weights, settings.strength, settings.method)
