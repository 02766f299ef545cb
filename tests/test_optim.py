"""Optimiser groups, learning rate and weight average."""

import math

import pytest
import torch
from torch import nn

from train.optim import Ema, ema_decay, freeze, learning_rate, make_optimizer, set_learning_rate
from train.train_config import EmaConfig, OptimConfig, ScheduleConfig
from vla.batch import Batch
from vla.errors import UsageError
from vla.losses import LossOut


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 3)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {
            "text": [*self.table.parameters()],
            "expert": [*self.norm.parameters(), *self.linear.parameters()],
        }

    def forward(self, batch: Batch) -> LossOut:
        raise NotImplementedError


def optim(**changes: object) -> OptimConfig:
    given: dict[str, object] = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.5,
        "clip": 1.0,
        "lr_scale": {},
    }
    return OptimConfig(**(given | changes))  # pyright: ignore[reportArgumentType]


def test_learning_rate_rises_falls_and_ends_at_the_floor() -> None:
    schedule = ScheduleConfig(warmup=4, floor=0.1)
    rates = [learning_rate(s, 2.0, schedule, 24) for s in range(24)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates == rates[:4] + sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    half = 4 + 19 / 2
    assert (learning_rate(13, 2.0, schedule, 24) + learning_rate(14, 2.0, schedule, 24)) / 2 == pytest.approx(
        0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * (half - 4) / 19)), abs=1e-3
    )


def test_learning_rate_without_warm_up_or_decay() -> None:
    assert learning_rate(0, 2.0, ScheduleConfig(0, 1.0), 1) == 2.0
    assert learning_rate(9, 2.0, ScheduleConfig(0, 1.0), 10) == 2.0


def test_only_matrices_are_decayed() -> None:
    model = Model()
    groups = make_optimizer(model, model.parameter_groups(), optim()).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.5 for p in g["params"]}
    kept = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decayed == {id(model.linear.weight)}
    assert kept == {id(p) for p in (model.table.weight, model.norm.weight, model.norm.bias, model.linear.bias)}


def test_parts_have_their_own_learning_rate() -> None:
    model = Model()
    config = optim(lr_scale={"text": 0.25})
    optimizer = make_optimizer(model, model.parameter_groups(), config)
    set_learning_rate(optimizer, 0.8)
    assert {g["part"]: g["lr"] for g in optimizer.param_groups} == {"text": 0.2, "expert": 0.8}


def test_a_frozen_part_does_not_move() -> None:
    model = Model()
    config = optim(lr_scale={"text": 0.0})
    freeze(model, config.lr_scale)
    optimizer = make_optimizer(model, model.parameter_groups(), config)
    before = model.table.weight.detach().clone()
    model.linear(model.norm(model.table(torch.arange(5)))).sum().backward()
    optimizer.step()
    assert torch.equal(model.table.weight, before)
    assert not model.table.weight.requires_grad
    assert model.linear.weight.grad is not None


def test_unknown_part() -> None:
    with pytest.raises(UsageError, match="Did you mean 'text'"):
        freeze(Model(), {"txt": 1.0})


def test_one_step_is_adamw() -> None:
    """Against the equations of Loshchilov and Hutter (2019), algorithm 2, first step."""
    model, config = Model(), optim()
    optimizer = make_optimizer(model, model.parameter_groups(), config)
    set_learning_rate(optimizer, 0.1)
    before = model.linear.weight.detach().clone()
    gradient = torch.full_like(before, 3.0)
    model.linear.weight.grad = gradient
    optimizer.step()
    expected = before - 0.1 * 0.5 * before - 0.1 * torch.sign(gradient)
    torch.testing.assert_close(model.linear.weight.detach(), expected)


def test_average_follows_its_recursion() -> None:
    model, config = Model(), EmaConfig(decay=0.6, power=0.75)
    ema = Ema(model, config)
    expected = model.linear.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.linear.weight += 1.0 + step
        ema.update(model, step)
        decay = ema_decay(step, config)
        expected = decay * expected + (1 - decay) * model.linear.weight.detach()
        torch.testing.assert_close(ema.shadow["linear.weight"], expected)


def test_decay_starts_at_zero_rises_and_is_limited() -> None:
    decays = [ema_decay(s, EmaConfig(0.99, 0.75)) for s in range(1000)]
    assert decays[0] == 0
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    assert decays[463] < 0.99 <= decays[500]


def test_applied_average_is_taken_back() -> None:
    model = Model()
    ema = Ema(model, EmaConfig(0.9, 0.75))
    raw = model.linear.weight.detach().clone()
    ema.shadow["linear.weight"].fill_(7.0)
    with ema.applied(model):
        assert (model.linear.weight == 7.0).all()
    assert torch.equal(model.linear.weight, raw)
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model):
        raise RuntimeError("inside")
    assert torch.equal(model.linear.weight, raw)
