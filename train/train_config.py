"""The configuration of `vla-train`. No torch, so that a typo is reported at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.frame_cache import CacheConfig
from train.switching_data import SwitchingRows
from vla.errors import UsageError
from vla.policy_config import PolicyConfig

Backend = Literal["tensorboard", "trackio", "wandb"]


@dataclass(frozen=True)
class MemberConfig:
    """One data set of the mixture."""

    recipe: Path  # a YAML of datasets/
    weight: float  # relative share of the samples
    rows: SwitchingRows | None = None  # null: as recorded


@dataclass(frozen=True)
class DataConfig:
    mixture: tuple[MemberConfig, ...]
    cache: CacheConfig | None  # null: decode every time
    prefetch: int  # steps prepared ahead, by threads
    threads: int

    def __post_init__(self) -> None:
        if not self.mixture:
            raise UsageError("data.mixture needs at least one {recipe, weight}.")


@dataclass(frozen=True)
class InitConfig:
    """A policy to start from."""

    checkpoint: Path  # a policy folder
    statistics: Literal["checkpoint", "data"]  # keep its normalisation (same robot), or make it anew (another robot)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019)."""

    lr: float  # peak learning rate
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # of matrices; norms, biases and embeddings are never decayed
    clip: float  # largest global norm of the gradient
    lr_scale: dict[str, float]  # part of the policy -> factor on the learning rate; 0 freezes it; absent: 1

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip <= 0:
            raise UsageError(f"optim.lr and optim.clip must be positive, got {self.lr} and {self.clip}.")
        if any(v < 0 for v in self.lr_scale.values()):
            raise UsageError(f"optim.lr_scale must not be negative, got {self.lr_scale}.")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a half cosine from the peak to a floor at the last step."""

    warmup: int  # steps
    floor: float  # fraction of the peak

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.floor <= 1:
            raise UsageError(
                f"schedule.warmup must be 0 or more and schedule.floor in 0..1, got {self.warmup} and {self.floor}."
            )


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the weights: what a checkpoint's policy carries."""

    decay: float  # largest decay, e.g. 0.99 for a run of 1600 steps, 0.9999 for 100,000
    power: float  # of the warm-up: decay at step n is min(decay, 1 - (1 + n)^-power); 0.75 suits short runs

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or self.power <= 0:
            raise UsageError(f"ema.decay must be in [0, 1) and ema.power positive, got {self.decay} and {self.power}.")


@dataclass(frozen=True)
class BatchConfig:
    global_batch: int  # rows of one update, over all processes and micro-batches
    accumulation: int  # micro-batches of one update on each process; less memory, same result

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.accumulation < 1:
            raise UsageError(
                f"batch.global_batch and batch.accumulation must be positive, got {self.global_batch} and "
                f"{self.accumulation}."
            )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int  # steps; the last step is always saved
    keep: int  # newest ones

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UsageError(
                f"checkpoint.every and checkpoint.keep must be positive, got {self.every} and {self.keep}."
            )


@dataclass(frozen=True)
class LogConfig:
    every: int  # steps between lines
    backends: tuple[Backend, ...]  # dashboards besides metrics.jsonl
    project: str  # name of the project on a dashboard

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"log.every must be positive, got {self.every}.")


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on the episodes that the recipes hold out, with the averaged weights."""

    every: int  # steps
    batches: int  # global batches each time, always the same ones

    def __post_init__(self) -> None:
        if self.every < 1 or self.batches < 1:
            raise UsageError(
                f"validation.every and validation.batches must be positive, got {self.every} and {self.batches}. "
                "Without: validation=null."
            )


@dataclass(frozen=True)
class ComputeConfig:
    device: Literal["auto", "cpu", "cuda"]  # auto: a GPU if there is one
    precision: Literal["fp32", "bf16"]  # bf16: autocast; weights and optimiser stay float32
    parallel: Literal["ddp", "fsdp2"]  # with several processes: a copy on each, or shards


@dataclass(frozen=True)
class TrainConfig:
    output: Path  # folder of the run; the same command continues what is there
    seed: int
    steps: int  # optimiser updates
    data: DataConfig
    init: InitConfig | None  # null: random or pretrained weights, as policy.backbone says
    policy: PolicyConfig
    batch: BatchConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    ema: EmaConfig | None
    checkpoint: CheckpointConfig
    validation: ValidationConfig | None
    log: LogConfig
    compute: ComputeConfig

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seed < 0:
            raise UsageError(f"steps must be positive and seed not negative, got {self.steps} and {self.seed}.")
