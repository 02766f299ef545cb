"""What every head must do, over all of them; then what each one alone must do."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vla.backbone_config import SmolVLMConfig, TinyVLM
from vla.bins import Bins
from vla.cache import CacheShape, PrefixCache
from vla.errors import UsageError
from vla.expert import ActionExpert, Context
from vla.head_config import DiscreteDiffusionConfig, E0Config, FlowConfig, HeadConfig, RegressionConfig
from vla.heads import discrete_diffusion, e0
from vla.heads.base import ActionHead, Draws, ExpertCall, Target
from vla.heads.discrete_diffusion import DiscreteDiffusionHead, hide, masked_after, remask_threshold
from vla.heads.e0 import E0Head, level, noised
from vla.heads.tokens import draws_of
from vla.policy import make_head
from vla.policy_config import ExpertConfig, PolicyConfig

BATCH, STEPS, REAL, PADDED, WIDTH, PREFIX = 4, 5, 2, 3, 24, 6
DISCRETE = DiscreteDiffusionConfig("discrete_diffusion", 16, (), "per_step", 6, "max", "none", 1.0, 0.0, 2)
E0 = E0Config("e0", 16, "per_step", 1.0, "concat", 6, 2)
HEADS: dict[str, HeadConfig] = {
    "flow": FlowConfig("flow", "concat", 6, 1.0, 2),
    "flow_adarms": FlowConfig("flow", "adarms", 6, 1.0, 2),
    "regression_l1": RegressionConfig("regression", "l1"),
    "regression_l2": RegressionConfig("regression", "l2"),
    "discrete": DISCRETE,
    "discrete_scalar": replace(DISCRETE, layout="per_scalar"),
    "discrete_gap": replace(DISCRETE, score="gap", remask="threshold"),
    "discrete_code": replace(DISCRETE, score="sampled", remask="decay", choice_temperature=1.0),
    "e0": E0,
    "e0_scalar_adarms": replace(E0, layout="per_scalar", time="adarms"),
}


def policy_config(head: HeadConfig) -> PolicyConfig:
    norm = "adarms" if getattr(head, "time", "") == "adarms" else "rms"
    return PolicyConfig(
        chunk=STEPS,
        execute=1,
        state_dim=4,
        action_dim=PADDED,
        cameras=("front",),
        image_size=32,
        max_tokens=8,
        normalization="quantile",
        state="suffix",
        backbone=SmolVLMConfig("smolvlm", None, TinyVLM(32, 1, 1, 4, 48, 8, 2), None, ()),
        expert=ExpertConfig(WIDTH, 2, 32, ("joint",), norm, "bidirectional"),
        head=head,
    )


def make(head: HeadConfig) -> tuple[ActionHead, ActionExpert]:
    torch.manual_seed(0)
    config = policy_config(head)
    expert = ActionExpert(config.expert, CacheShape(2, 2, 2, 8, 100.0))
    for name, p in expert.named_parameters():  # zero-initialised gates would hide a broken condition
        if "dense" in name:
            torch.nn.init.normal_(p, std=0.3)
    return make_head(config, REAL), expert


def context(expert: ActionExpert, head: ActionHead, batch: int = BATCH) -> Context:
    g = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, BATCH, 2, PREFIX, 8, generator=g)[:, :batch] for _ in range(2))
    valid = (torch.arange(PREFIX) < torch.tensor([6, 4, 5, 6])[:, None])[:batch]
    state = torch.randn(BATCH, 1, WIDTH, generator=g)[:batch]
    cache = PrefixCache(tuple(keys), tuple(values), valid, valid.sum(1))
    return expert.context(cache, state, head.fresh_condition(state))


def target(rows: slice = slice(None)) -> Target:
    g = torch.Generator().manual_seed(2)
    actions = torch.rand(BATCH, STEPS, PADDED, generator=g) * 1.8 - 0.9
    valid = torch.arange(STEPS) < torch.tensor([5, 5, 3, 1])[:, None]
    dim_mask = torch.tensor([True, True, False]).expand(BATCH, -1)
    return Target(actions[rows], valid[rows], dim_mask[rows])


def draw(head: ActionHead, expert: ActionExpert, ctx: Context, groups: int, seed: int = 0) -> Tensor:
    batch = ctx.valid.shape[0]
    call = ExpertCall(expert, ctx, groups, head.token_count(STEPS))
    with torch.no_grad():
        return head.sample(call, (batch, groups, STEPS, PADDED), torch.Generator().manual_seed(seed))


every_head = pytest.mark.parametrize("name", HEADS)


@every_head
def test_loss_is_finite_and_every_weight_learns(name: str) -> None:
    head, expert = make(HEADS[name])
    out = head.loss(expert, context(expert, head), target(), Draws(3, BATCH, torch.arange(BATCH)))
    assert out.total.isfinite()
    out.total.backward()
    assert not [n for n, p in head.named_parameters() if p.grad is None]


@every_head
def test_loss_does_not_see_what_is_not_valid(name: str) -> None:
    head, expert = make(HEADS[name])
    ctx, clean, draws = context(expert, head), target(), Draws(3, BATCH, torch.arange(BATCH))
    row = torch.arange(3, 4)  # one valid step
    one = Context(
        tuple(k[row] for k in ctx.keys), tuple(v[row] for v in ctx.values), ctx.valid[row], 6, ctx.next_position[row]
    )
    nothing = Target(clean.actions[row], torch.zeros(1, STEPS, dtype=torch.bool), clean.dim_mask[row])
    loss = head.loss(expert, one, nothing, replace(draws, rows=row)).total
    assert float(loss.detach()) == 0.0, "a chunk without a valid step counts nothing"


@every_head
def test_a_step_does_not_depend_on_how_the_batch_is_divided(name: str) -> None:
    head, expert = make(HEADS[name])
    ctx = context(expert, head)
    whole = head.loss(expert, ctx, target(), Draws(7, BATCH, torch.arange(BATCH))).total.detach()
    parts = 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        cut = Context(
            tuple(k[rows] for k in ctx.keys),
            tuple(v[rows] for v in ctx.values),
            ctx.valid[rows],
            6,
            ctx.next_position[rows],
        )
        part = target(rows)
        loss = head.loss(expert, cut, part, Draws(7, BATCH, torch.arange(BATCH)[rows])).total.detach()
        parts += float(loss * part.valid.sum() / target().valid.sum())
    assert parts == pytest.approx(float(whole), abs=2e-6)


@every_head
def test_samples_have_the_shape_and_repeat(name: str) -> None:
    head, expert = make(HEADS[name])
    ctx = context(expert, head)
    chunks = draw(head, expert, ctx, 3)
    assert chunks.shape == (BATCH, 3, STEPS, PADDED)
    assert chunks.isfinite().all()
    assert torch.equal(chunks, draw(head, expert, ctx, 3))


@every_head
def test_the_first_samples_do_not_depend_on_how_many_there_are(name: str) -> None:
    head, expert = make(HEADS[name])
    ctx = context(expert, head)
    one = draw(head, expert, ctx, 1)
    if head.steps == 1:
        torch.testing.assert_close(draw(head, expert, ctx, 4)[:, :1], one, atol=1e-5, rtol=0)
        return
    state = head.init((BATCH, 4, STEPS, PADDED), torch.Generator().manual_seed(0), ctx.valid.device)
    single = head.init((BATCH, 1, STEPS, PADDED), torch.Generator().manual_seed(0), ctx.valid.device)
    assert torch.equal(state[:, :1], single)


@every_head
def test_it_overfits_one_batch(name: str) -> None:
    config = HEADS[name]
    if hasattr(config, "draws"):
        config = replace(config, draws=8)  # pyright: ignore[reportCallIssue, reportArgumentType]
    head, expert = make(config)
    optimizer = torch.optim.Adam([*head.parameters(), *expert.parameters()], 1e-2)
    full = target()
    for step in range(120):
        loss = head.loss(expert, context(expert, head), full, Draws(step, BATCH, torch.arange(BATCH))).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (draw(head, expert, context(expert, head), 1)[:, 0] - full.actions)[full.valid][:, :REAL].abs().mean()
    assert error < 0.25, "four chunks are not learnt"


def test_heads_and_codec_that_disagree_are_refused() -> None:
    for head in (DISCRETE, E0):
        with pytest.raises(UsageError, match=r"needs policy\.normalization 'quantile', got 'mean_std'"):
            replace(policy_config(head), normalization="mean_std")
    with pytest.raises(UsageError, match="exactly when"):
        replace(policy_config(DISCRETE), expert=ExpertConfig(WIDTH, 2, 32, ("joint",), "adarms", "bidirectional"))
    with pytest.raises(UsageError, match=r"binary_dims is \(5,\); the actions have 0\.\.1"):
        make(replace(DISCRETE, binary_dims=(5,)))


# --- bins ----------------------------------------------------------------------------------------


@given(st.floats(-3, 3), st.sampled_from([2, 16, 256, 2048]))
def test_bins_round_trip_within_half_a_bin(value: float, count: int) -> None:
    decoded = float(Bins(count, 1).decode(Bins(count, 1).encode(torch.tensor([value]))))
    assert abs(decoded - min(max(value, -1), 1)) <= 1 / count + 1e-6


def test_bin_centres_are_unbiased() -> None:
    """The released E0 code decodes left edges, which is off by -1/K on average."""
    values = torch.linspace(-1, 1, 200_001)[:-1, None]
    bins = Bins(256, 1)
    assert abs(float((bins.decode(bins.encode(values)) - values).mean())) < 1e-5


def test_a_binary_dimension_is_low_or_high() -> None:
    bins = Bins(16, 2, (1,))
    ids = bins.encode(torch.tensor([[0.3, -0.2], [0.3, 0.4]]))
    assert ids[:, 1].tolist() == [0, 1]
    assert bins.decode(ids)[:, 1].tolist() == [-1.0, 1.0]
    assert bins.allowed().sum(1).tolist() == [16, 2]
    head, expert = make(replace(DISCRETE, binary_dims=(1,)))
    assert set(draw(head, expert, context(expert, head), 4)[..., 1].unique().tolist()) <= {-1.0, 1.0}


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    share = torch.bincount(draws_of(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)


# --- masked diffusion ----------------------------------------------------------------------------


def test_commit_schedule_known_answer() -> None:
    """L = 56 tokens in T = 12 rounds (arXiv 2508.20072)."""
    left = masked_after(56, 12)
    assert left == [55, 54, 51, 48, 44, 39, 34, 28, 21, 14, 7, 1]
    assert [a - b for a, b in zip([56, *left[:-1]], left, strict=True)] == [1, 1, 3, 3, 4, 5, 5, 6, 7, 7, 7, 6]


def test_remask_thresholds_of_the_paper() -> None:
    assert [round(remask_threshold(j, 12), 3) for j in (0, 1, 11)] == [0.0, 0.042, 0.458]


def test_hidden_share_and_support() -> None:
    real = torch.tensor([True] * 8 + [False] * 4).expand(3, -1)
    order = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    hidden = hide(real, torch.tensor([0.5, 1.0, 0.001]), order)
    assert hidden.sum(1).tolist() == [4, 8, 1]
    assert not hidden[:, 8:].any()
    assert hidden[0, order[0, :8].argsort()[:4]].all()


def discrete(**changes: object) -> DiscreteDiffusionHead:
    head, _ = make(replace(DISCRETE, **changes))  # pyright: ignore[reportArgumentType]
    assert isinstance(head, DiscreteDiffusionHead)
    return head


def test_loss_counts_hidden_tokens_only() -> None:
    """The gradient reaches the logits of hidden positions and of no other."""
    head, expert = make(DISCRETE)
    seen: list[tuple[Tensor, Tensor]] = []

    class Recorder(DiscreteDiffusionHead):
        def predict(self, state: Tensor, index: int, call: ExpertCall) -> Tensor:
            out = DiscreteDiffusionHead.predict(self, state, index, call)
            out.retain_grad()
            seen.append((state, out))
            return out

    recorder = Recorder(DISCRETE, REAL, PADDED, WIDTH)
    recorder.load_state_dict(head.state_dict())
    recorder.loss(expert, context(expert, head), target(), Draws(3, BATCH, torch.arange(BATCH))).total.backward()
    ((state, out),) = seen
    assert out.grad is not None
    touched = out.grad.abs().sum(-1) > 0
    assert torch.equal(touched, state == recorder.mask_id)
    assert not touched[3, :, 1:].any()


def test_rounds_commit_what_the_schedule_says() -> None:
    head = discrete(remask="none")
    state = head.init((1, 1, STEPS, PADDED), torch.Generator(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for index, left in enumerate(masked_after(STEPS * REAL, 6)[:-1]):
        before = state
        state = head.advance(state, torch.randn(1, 1, STEPS, REAL, 16, generator=generator), index, generator)
        assert int((state == head.mask_id).sum()) == left
        committed = before != head.mask_id
        assert torch.equal(state[committed], before[committed])
    assert (head.advance(state, torch.randn(1, 1, STEPS, REAL, 16), 5, generator) != head.mask_id).all()


@pytest.mark.parametrize(("remask", "expected"), [("threshold", True), ("none", False)])
def test_a_doubtful_commitment_is_hidden_again(remask: str, expected: bool) -> None:  # noqa: FBT001
    head = discrete(remask=remask)
    ids = torch.zeros(1, 1, STEPS, REAL, dtype=torch.long)
    ids[0, 0, 4] = head.mask_id
    logits = torch.full((1, 1, STEPS, REAL, 16), -20.0)
    logits[..., 0] = 20.0
    logits[0, 0, 1, 1] = torch.zeros(16)  # 1/16 everywhere: below 0.5 * 4/6
    after = head.advance(ids, logits, 4, torch.Generator().manual_seed(0))
    assert bool(after[0, 0, 1, 1] == head.mask_id) is expected
    assert int((after[0, 0, :4] == head.mask_id).sum()) == int(expected)


def joint_law(score: str, rounds: int) -> Tensor:
    """Histogram over 3^3 outcomes of decoding an exact joint distribution, one token a round."""
    torch.manual_seed(0)
    joint = torch.rand(3, 3, 3) ** 2
    joint /= joint.sum()
    config = replace(DISCRETE, bins=3, steps=rounds, score=score, layout="per_scalar")  # pyright: ignore[reportArgumentType]
    head = DiscreteDiffusionHead(config, 1, 1, 4)
    n = 30_000
    generator = torch.Generator().manual_seed(1)
    state = torch.full((1, n, 3, 1), 3)
    for index in range(rounds):
        # exact conditionals: sum the joint over what is hidden, with what is committed held fixed
        table = joint.expand(n, 3, 3, 3)
        for axis in range(3):
            ids = state[0, :, axis, 0]
            keep = torch.nn.functional.one_hot(ids.clamp(max=2), 3).bool() | (ids == 3)[:, None]
            shape = [n, 1, 1, 1]
            shape[axis + 1] = 3
            table = table * keep.view(shape)
        marginals = [table.sum([d for d in (1, 2, 3) if d != axis + 1]) for axis in range(3)]
        out = torch.stack(marginals, 1)[None, :, :, None].clamp(min=1e-12).log()
        state = head.advance(state, out, index, generator)
    flat = (state[0, :, :, 0] * torch.tensor([9, 3, 1])).sum(1)
    return torch.stack([torch.bincount(flat, minlength=27) / n, joint.flatten()])


def test_decoding_an_exact_joint_gives_the_joint() -> None:
    """Choosing the position from the context alone keeps the law; ranking by the drawn token biases it to modes."""
    histogram, joint = joint_law("max", 3)
    assert float((histogram - joint).abs().sum()) < 0.03
    histogram, joint = joint_law("sampled", 3)
    assert float((histogram - joint).abs().sum()) > 0.06


def test_action_tokens_see_one_another_in_both_directions() -> None:
    for layout in ("per_step", "per_scalar"):
        head, expert = make(replace(DISCRETE, layout=layout))  # pyright: ignore[reportArgumentType]
        call = ExpertCall(expert, context(expert, head), 1, head.token_count(STEPS))
        ids = torch.zeros(BATCH, 1, STEPS, REAL, dtype=torch.long)
        with torch.no_grad():
            before = head.predict(ids, 0, call)
            ids[:, :, -1, -1] = 5
            after = head.predict(ids, 0, call)
        assert (before[:, :, 0, 0] != after[:, :, 0, 0]).any()


# --- e0 ------------------------------------------------------------------------------------------


def test_noised_one_hots_have_the_stated_moments() -> None:
    ids, tau, alpha = torch.full((40_000,), 3), torch.full((40_000,), 0.7), 0.5
    x = noised(ids, tau, torch.randn(40_000, 8, generator=torch.Generator().manual_seed(0)), alpha)
    expected = torch.zeros(8)
    expected[3] = 0.7 * alpha
    torch.testing.assert_close(x.mean(0), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((8,), 0.3), atol=0.01, rtol=0)


def test_levels_are_even_in_log_odds() -> None:
    tau = level(torch.linspace(0, 1, 5))
    torch.testing.assert_close(tau[[0, -1]], torch.tensor([0.02, 0.995]))
    gaps = tau.logit().diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(4), atol=1e-4, rtol=0)


def oracle_histogram(steps: int, scheme: str) -> Tensor:
    """Decode with the exact posterior of a known prior; the law that comes out."""
    prior, n, alpha = torch.tensor([0.5, 0.3, 0.15, 0.05]), 40_000, 1.0
    head = E0Head(replace(E0, bins=4, steps=steps, alpha=alpha), 1, 1, 4)
    generator = torch.Generator().manual_seed(0)
    state = head.init((1, n, 1, 1), generator, torch.device("cpu"))
    for index in range(steps):
        tau = head._tau(index)
        given = 0.0 if index == 0 else tau * alpha / (1 - tau) ** 2  # the first level is pure noise
        posterior = prior.log() + given * state
        if scheme == "argmax":
            posterior = posterior + 1e4 * torch.nn.functional.one_hot(posterior.argmax(-1), 4)
        if index + 1 == steps:  # the last answer is drawn here, to compare laws
            ids = draws_of(posterior, torch.rand(posterior.shape[:-1], generator=generator))
            return torch.bincount(ids.flatten(), minlength=4) / n - prior
        state = head.advance(state, posterior, index, generator)
    raise AssertionError


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_an_exact_denoiser_gives_the_prior(steps: int) -> None:
    assert float(oracle_histogram(steps, "draw").abs().sum()) < 0.02


def test_taking_the_most_probable_bin_does_not() -> None:
    assert float(oracle_histogram(3, "argmax").abs().sum()) > 0.3


def test_both_modules_name_their_source() -> None:
    assert "2508.20072" in str(discrete_diffusion.__doc__)
    assert "2511.21542" in str(e0.__doc__)
    assert math.isclose(0.5 * (1 - 1 / 12), remask_threshold(11, 12))
