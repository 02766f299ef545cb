"""The policy's configuration: everything that decides its architecture. No torch.

A checkpoint carries one of these; together with its statistics, tokenizer and weights it is complete.
"""

from dataclasses import dataclass
from typing import Literal

from vla.backbone_config import BackboneConfig
from vla.codec import Normalization
from vla.errors import UsageError
from vla.head_config import DiscreteDiffusionConfig, E0Config, HeadConfig


@dataclass(frozen=True)
class ExpertConfig:
    """The action expert: a transformer over suffix tokens that attends to the prefix cache."""

    width: int
    layers: int
    mlp: int
    attention: tuple[Literal["joint", "cross"], ...]  # repeated over the layers
    norm: Literal["rms", "adarms"]  # adarms: the head's time conditions every norm (pi0.5)
    action_attention: Literal["bidirectional", "causal"]  # pi0 and pi0.5, or SmolVLA

    def __post_init__(self) -> None:
        if "joint" not in self.attention:
            raise UsageError(
                f"policy.expert.attention is {self.attention}: at least one layer kind must be 'joint', since only "
                "joint layers let the actions see the state and one another."
            )
        if self.width % 2:
            raise UsageError(f"policy.expert.width must be even, got {self.width}.")


@dataclass(frozen=True)
class PolicyConfig:
    chunk: int  # H, steps predicted
    execute: int  # steps executed before planning anew
    state_dim: int  # padded width of the state vector
    action_dim: int  # padded width of an action
    cameras: tuple[str, ...]  # names, in the order of the prefix
    image_size: int  # pixels, side of the square the backbone sees
    max_tokens: int  # longest instruction, in tokens
    normalization: Normalization
    backbone: BackboneConfig
    expert: ExpertConfig
    head: HeadConfig

    def __post_init__(self) -> None:
        if not 1 <= self.execute <= self.chunk:
            raise UsageError(f"policy.execute must be 1..chunk ({self.chunk}), got {self.execute}.")
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise UsageError(f"policy.cameras needs one or more different names, got {self.cameras}.")
        adaptive = getattr(self.head, "time", "none") == "adarms"
        if adaptive != (self.expert.norm == "adarms"):
            raise UsageError(
                f"policy.expert.norm is {self.expert.norm!r} and policy.head is {self.head}: the norms are 'adarms' "
                "exactly when the head's time is; heads without a time take 'rms'."
            )
        if isinstance(self.head, DiscreteDiffusionConfig | E0Config) and self.normalization != "quantile":
            raise UsageError(
                f"policy.head {self.head.kind!r} has its bins between the data's 1 % and 99 % quantiles and needs "
                f"policy.normalization 'quantile', got {self.normalization!r}."
            )
