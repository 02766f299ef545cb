"""The one table from a head's settings to the head."""

from vla.errors import UsageError
from vla.head_config import DiscreteDiffusionConfig, E0Config, FlowConfig, RegressionConfig
from vla.heads.base import ActionHead
from vla.heads.discrete_diffusion import DiscreteDiffusionHead
from vla.heads.e0 import E0Head
from vla.heads.flow import FlowHead, HistorySource
from vla.heads.regression import RegressionHead
from vla.policy_config import PolicyConfig


def make_head(config: PolicyConfig, real_dim: int) -> ActionHead:
    """The head that `config.head` names, for actions of `real_dim` dimensions padded to `config.action_dim`.

    Raises:
        UsageError: the head's settings name a dimension that the actions do not have.
    """
    head, padded, width = config.head, config.action_dim, config.expert.width
    match head:
        case FlowConfig():
            states, steps = config.history + 1, config.past + config.chunk
            started = head.source == "history"
            source = HistorySource(states, config.state_dim, steps, padded, width) if started else None
            return FlowHead(head, padded, width, source)
        case RegressionConfig():
            return RegressionHead(head, padded, width, committed=config.committed)
        case DiscreteDiffusionConfig():
            if any(not 0 <= d < real_dim for d in head.binary_dims):
                raise UsageError(f"policy.head.binary_dims is {head.binary_dims}; the actions have 0..{real_dim - 1}.")
            return DiscreteDiffusionHead(head, real_dim, padded, width)
        case E0Config():
            return E0Head(head, real_dim, padded, width)
