"""The policy's configuration: everything that decides its architecture. No torch.

A checkpoint carries one of these; together with its statistics, tokenizer and weights it is complete.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vla.codec import Normalization
from vla.errors import UsageError


@dataclass(frozen=True)
class TinyVLM:
    """Sizes of a small SmolVLM built from random weights: same classes, nothing downloaded."""

    width: int  # of the vision tower and of the text model
    vision_layers: int
    text_layers: int
    heads: int  # query heads; one key-value head for each
    mlp: int
    patch: int  # pixels
    pixel_shuffle: int  # a square of this side of patches becomes one token


@dataclass(frozen=True)
class SmolVLMConfig:
    """SmolVLM2 as prefix encoder (SmolVLA's layout: images, then text, bidirectional)."""

    kind: Literal["smolvlm"]
    weights: str | None  # checkpoint folder or hub id with weights and tokenizer; null: `tiny` at random
    tiny: TinyVLM | None  # sizes used when `weights` is null
    text_layers: int | None  # keep this many text layers of a pretrained model; null: all
    freeze: tuple[Literal["vision", "connector", "text"], ...]

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.tiny is None):
            raise UsageError("policy.backbone: give either 'weights' (folder or hub id) or 'tiny' (sizes), not both.")


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
class FlowConfig:
    """Flow matching (pi0): t = 1 noise, t = 0 data, velocity noise - action."""

    DECODE: ClassVar = ("steps", "noise_scale")

    kind: Literal["flow"]
    time: Literal["concat", "adarms"]  # mixed into the action tokens (pi0, SmolVLA), or into the norms (pi0.5)
    steps: int  # Euler steps of the sampler
    noise_scale: float  # standard deviation of the starting noise when sampling; 0 starts at the mean
    draws: int  # noise and time draws per prefix and training step


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
    backbone: SmolVLMConfig
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
