"""Tandem under LeRobot's commands: importing this registers the policy `tandem` and the environment `tandem`."""

from lerobot_policy_tandem.configuration_tandem import TandemConfig
from lerobot_policy_tandem.environment import TandemEnv

__all__ = ["TandemConfig", "TandemEnv"]
