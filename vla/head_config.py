"""The settings of each action head. No torch.

`DECODE` names the settings that may be changed when a trained policy is loaded.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching (pi0): t = 1 noise, t = 0 data, velocity noise - action."""

    DECODE: ClassVar = ("steps", "noise_scale")

    kind: Literal["flow"]
    time: Literal["concat", "adarms"]  # mixed into the action tokens (pi0, SmolVLA), or into the norms (pi0.5)
    steps: int  # Euler steps of the sampler
    noise_scale: float  # standard deviation of the starting noise when sampling; 0 starts at the mean. With source
    # 'history' of the noise around it, in training too; 0 makes the policy deterministic
    draws: int  # noise and time draws per prefix and training step
    source: Literal["noise", "history"] = "noise"  # where paths start: at noise, or at what a small network makes of
    # the last states (A2A; needs policy.history)
    error_entropy: float = 0.0  # weight of the T-MEE term on the velocity errors; its code has 0.01


@dataclass(frozen=True)
class RegressionConfig:
    """One parallel pass from learned queries to actions (OpenVLA-OFT)."""

    DECODE: ClassVar = ()

    kind: Literal["regression"]
    error: Literal["l1", "l2"]


@dataclass(frozen=True)
class DiscreteDiffusionConfig:
    """Masked diffusion over action bins (Discrete Diffusion VLA, arXiv 2508.20072)."""

    DECODE: ClassVar = ("steps", "score", "remask", "temperature", "choice_temperature")

    kind: Literal["discrete_diffusion"]
    bins: int  # for each dimension, between the data's 1 % and 99 % quantiles
    binary_dims: tuple[int, ...]  # dimensions of two values, as a gripper that is open or closed
    layout: Literal["per_step", "per_scalar"]  # one token a step (fast), or one token a number (the paper)
    steps: int  # decoding rounds
    score: Literal["max", "gap", "sampled"]  # what ranks positions: best probability, its lead, the drawn token's
    remask: Literal["none", "threshold", "decay"]  # of committed tokens: the paper's rule, or its code's
    temperature: float  # of the token draws; 0 takes the most probable
    choice_temperature: float  # of the ranking at the first round, falling linearly to 0 (Gumbel noise)
    draws: int  # maskings per prefix and training step


@dataclass(frozen=True)
class E0Config:
    """Continuized discrete diffusion: Gaussian noise on one-hot bins, categorical prediction (arXiv 2511.21542)."""

    DECODE: ClassVar = ("steps",)

    kind: Literal["e0"]
    bins: int
    layout: Literal["per_step", "per_scalar"]
    alpha: float  # amplitude of the one-hot, the same in training and sampling; the paper has 0.1
    time: Literal["concat", "adarms"]
    steps: int
    draws: int


HeadConfig = FlowConfig | RegressionConfig | DiscreteDiffusionConfig | E0Config
