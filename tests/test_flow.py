"""Flow head: equations, known answers, and what the loss must and must not see."""

import pytest
import torch
from torch import Tensor

from vla.cache import CacheShape, PrefixCache
from vla.expert import ActionExpert, Context
from vla.head_config import FlowConfig
from vla.heads.base import Draws, ExpertCall, Target
from vla.heads.flow import FlowHead, interpolate, pi0_time
from vla.policy_config import ExpertConfig

WIDTH, STEPS, DIMS = 16, 5, 3


def parts(time: str = "concat", draws: int = 2) -> tuple[FlowHead, ActionExpert, Context]:
    torch.manual_seed(0)
    norm = "adarms" if time == "adarms" else "rms"
    expert = ActionExpert(
        ExpertConfig(WIDTH, 2, 24, ("joint",), norm, "bidirectional"),  # pyright: ignore[reportArgumentType]
        CacheShape(2, 2, 2, 8, 100.0),
    )
    head = FlowHead(FlowConfig("flow", time, 4, 1.0, draws), DIMS, WIDTH)  # pyright: ignore[reportArgumentType]
    for name, p in expert.named_parameters():
        if "dense" in name:
            torch.nn.init.normal_(p, std=0.3)
    return head, expert, context(expert, head, 4)


def context(expert: ActionExpert, head: FlowHead, batch: int) -> Context:
    g = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, batch, 2, 6, 8, generator=g) for _ in range(2))
    valid = torch.ones(batch, 6, dtype=torch.bool)
    state = torch.randn(batch, 1, WIDTH, generator=g)
    return expert.context(
        PrefixCache(tuple(keys), tuple(values), valid, valid.sum(1)), state, head.fresh_condition(state)
    )


def target(batch: int = 4) -> Target:
    g = torch.Generator().manual_seed(2)
    valid = torch.arange(STEPS) < torch.tensor([5, 5, 3, 1])[:batch, None]
    dim_mask = torch.tensor([True, True, False]).expand(batch, -1)
    return Target(torch.randn(batch, STEPS, DIMS, generator=g), valid, dim_mask)


def draws(rows: list[int], size: int = 4) -> Draws:
    return Draws(seed=7, global_size=size, rows=torch.tensor(rows))


def test_interpolation_is_noise_at_one_and_data_at_zero() -> None:
    a, e = torch.randn(2, 4, DIMS), torch.randn(2, 4, DIMS)
    time = torch.tensor([[1.0, 0.0, 0.25, 0.5]] * 2)
    x, u = interpolate(a, e, time)
    torch.testing.assert_close(x[:, 0], e[:, 0])
    torch.testing.assert_close(x[:, 1], a[:, 1])
    torch.testing.assert_close(x[:, 2], 0.25 * e[:, 2] + 0.75 * a[:, 2])
    torch.testing.assert_close(u, e - a)


def test_time_law() -> None:
    """E[Beta(1.5, 1)] = 0.6 and P(t < 0.2) = 0.2^1.5 = 0.0894, both through 0.999 t + 0.001."""
    time = pi0_time(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert float(time.mean()) == pytest.approx(0.6004, abs=0.002)
    assert float((time < 0.2).float().mean()) == pytest.approx(0.0889, abs=0.002)
    assert float(time.min()) >= 0.001
    assert float(time.max()) <= 1.0


class ExactField(FlowHead):
    """The exact velocity towards one known chunk: (x - a) / t."""

    goal: Tensor

    def velocity(self, noisy: Tensor, time: Tensor, call: ExpertCall) -> Tensor:
        return (noisy - self.goal) / time[..., None]


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_sampling_follows_the_field_to_the_data(steps: int) -> None:
    """The exact straight-line field is integrated without error by any number of Euler steps."""
    _, expert, ctx = parts()
    exact = ExactField(FlowConfig("flow", "concat", steps, 1.0, 1), DIMS, WIDTH)
    exact.goal = torch.randn(4, 2, STEPS, DIMS)
    call = ExpertCall(expert, ctx, 2, STEPS)
    out = exact.sample(call, (4, 2, STEPS, DIMS), torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, exact.goal, atol=1e-5, rtol=0)


def test_noise_scale_zero_starts_at_the_mean() -> None:
    zero = FlowHead(FlowConfig("flow", "concat", 4, 0.0, 1), DIMS, WIDTH)
    assert not zero.init((1, 2, STEPS, DIMS), torch.Generator(), torch.device("cpu")).any()


@pytest.mark.parametrize("time", ["concat", "adarms"])
def test_loss_ignores_padding(time: str) -> None:
    head, expert, ctx = parts(time)
    full = target()
    predicted: list[Tensor] = []

    class Recorder(FlowHead):
        def velocity(self, noisy: Tensor, time: Tensor, call: ExpertCall) -> Tensor:
            out = FlowHead.velocity(self, noisy, time, call)
            out.retain_grad()
            predicted.append(out)
            return out

    recorder = Recorder(head.config, DIMS, WIDTH)
    recorder.load_state_dict(head.state_dict())
    recorder.loss(expert, ctx, full, draws([0, 1, 2, 3])).total.backward()
    gradient = predicted[0].grad
    assert gradient is not None
    assert not gradient[..., 2].any()  # a padded dimension
    assert not gradient[~full.valid[:, None].expand(gradient.shape[:3])].any()
    assert gradient[3, :, 0, :2].all()


def test_per_token_time_reaches_its_token() -> None:
    for time in ("concat", "adarms"):
        head, expert, ctx = parts(time)
        call = ExpertCall(expert, ctx, 1, STEPS)
        x = torch.randn(4, 1, STEPS, DIMS)
        t = torch.full((4, 1, STEPS), 0.5)
        before = head.velocity(x, t, call)
        t[..., 2] = 0.0
        changed = (head.velocity(x, t, call) - before).abs().amax(dim=(0, 1, 3))
        assert changed[2] > 1e-4
