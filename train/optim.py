"""Optimiser, learning rate and weight average. Everything that depends on time is a pure function of the step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train.train_config import EmaConfig, OptimConfig, ScheduleConfig
from vla.batch import Batch
from vla.errors import UsageError, choose_from
from vla.losses import LossOut


class Trainable(Protocol):
    """What the loop trains: an `nn.Module` that turns a batch into a loss and names its parts."""

    def __call__(self, batch: Batch) -> LossOut: ...

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part."""
        ...


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, steps: int) -> float:
    """Learning rate of 0-based `step` of `steps`."""
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, steps - 1 - schedule.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (schedule.floor + (1 - schedule.floor) * cosine)


def ema_decay(step: int, config: EmaConfig) -> float:
    """Decay of the average after 0-based `step`; 0 at the first, so that the random start is forgotten."""
    return min(config.decay, 1 - (1 + step) ** -config.power)


def freeze(module: Trainable, lr_scale: dict[str, float]) -> None:
    """Freeze the parts whose learning-rate factor is 0. Before the module is wrapped for several processes.

    Raises:
        UsageError: a part that the module does not have, or nothing left to train.
    """
    groups = module.parameter_groups()
    for part in lr_scale:
        if part not in groups:
            raise UsageError(f"optim.lr_scale: no trainable part {part!r}.{choose_from(part, groups)}")
    for part, parameters in groups.items():
        if lr_scale.get(part, 1.0) == 0:
            for parameter in parameters:
                parameter.requires_grad = False
    if not any(p.requires_grad for parameters in groups.values() for p in parameters):
        raise UsageError(
            "Every part of the policy is frozen (optim.lr_scale, policy.backbone.freeze): nothing to train."
        )


def make_optimizer(module: nn.Module, groups: dict[str, list[nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters in `groups`, two groups a part: decayed and not decayed."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    param_groups = []
    for part, parameters in groups.items():
        trainable = [p for p in parameters if p.requires_grad]
        decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
        kept = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
        for chosen, decay in ((decayed, config.weight_decay), (kept, 0.0)):
            if chosen:
                scale = config.lr_scale.get(part, 1.0)
                param_groups.append({"params": chosen, "weight_decay": decay, "scale": scale, "part": part})
    return torch.optim.AdamW(param_groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


class Ema:
    """The weight average of a module's trainable parameters.

    The rule is torch's; the storage is a plain dictionary, since torch's own `AveragedModel` copies the
    module, which a sharded one does not allow.
    """

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        self._config = config
        self.shadow = {k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after 0-based `step`."""
        current = dict(module.named_parameters())
        average = get_ema_multi_avg_fn(ema_decay(step, self._config))
        average(list(self.shadow.values()), [current[k].detach() for k in self.shadow], None)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside the block `module` computes with the average; afterwards it has its own weights again."""
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            raw = {k: parameters[k].detach().clone() for k in self.shadow}
            _copy(self.shadow, parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(raw, parameters)


def _copy(source: dict[str, Tensor], target: dict[str, nn.Parameter]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
