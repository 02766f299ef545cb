"""LeRobot's canonical pre- and postprocessor: keys renamed, batched, moved; numbers left as they are.

The steps named `normalizer_processor` and `unnormalizer_processor` are there because LeRobot's commands address
them by name; with IDENTITY they do nothing. The policy normalises itself, from statistics in its checkpoint.
"""

from typing import Any

from lerobot.lerobot_types import PolicyAction
from lerobot.processor import PolicyProcessorPipeline, make_default_pre_post_processors

from lerobot_policy_tandem.configuration_tandem import TandemConfig


def make_tandem_pre_post_processors(
    config: TandemConfig, dataset_stats: Any = None, dataset_meta: Any = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """Both pipelines. LeRobot's statistics are not used (its quantiles are means of episode quantiles)."""
    del dataset_stats, dataset_meta
    return make_default_pre_post_processors(config, None)
