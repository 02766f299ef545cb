"""What every head must do, over all of them, each with one horizon and with a mixture of horizons."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vla.errors import UsageError
from vla.heads.base import Target
from vla.policy_config import ExpertConfig, MixtureConfig

HEADS = (
    "flow",
    "flow_adarms",
    "flow_entropy",
    "regression_l1",
    "regression_l2",
    "discrete",
    "discrete_scalar",
    "discrete_gap",
    "discrete_code",
    "e0",
    "e0_scalar_adarms",
)
MIXTURES = {"one": None, "mixture": MixtureConfig((1, 3, 5), "learned", 1.0, 1e-3, None)}
every_head = pytest.mark.parametrize("name", HEADS)
every_mixture = pytest.mark.parametrize("mixture", MIXTURES)


def make(kit: SimpleNamespace, name: str, mixture: str, **changes: Any) -> Any:
    return kit.make(kit.HEADS[name], mixture=MIXTURES[mixture], **changes)


def test_every_head_is_here(kit: SimpleNamespace) -> None:
    assert set(HEADS) == set(kit.HEADS)


@every_mixture
@every_head
def test_loss_is_finite_and_every_weight_learns(kit: SimpleNamespace, name: str, mixture: str) -> None:
    parts = make(kit, name, mixture, committed=2)
    out = parts.loss(kit.target())
    assert out.total.isfinite()
    out.total.backward()
    assert not [n for n, p in parts.parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for _, p in parts.parameters())


@every_mixture
@every_head
def test_the_terms_add_up(kit: SimpleNamespace, name: str, mixture: str) -> None:
    out = make(kit, name, mixture).loss(kit.target())
    assert float(sum(out.terms.values())) == pytest.approx(float(out.total.detach()), rel=1e-6)


@every_mixture
@every_head
def test_loss_does_not_see_what_is_not_valid(kit: SimpleNamespace, name: str, mixture: str) -> None:
    parts, clean = make(kit, name, mixture), kit.target()
    other = clean.actions.clone()
    other[~clean.valid] = 0.77
    other[..., ~clean.dim_mask[0]] = -0.5
    loss = parts.loss(Target(other, clean.valid, clean.dim_mask)).total
    if name.startswith("regression"):  # the other heads' networks see the (noisy) target itself
        assert torch.equal(loss, parts.loss(clean).total)
    row = slice(3, 4)  # one valid step
    nothing = Target(clean.actions[row], torch.zeros(1, kit.STEPS, dtype=torch.bool), clean.dim_mask[row])
    main = parts.loss(nothing, row).terms[parts.head.error_name]
    assert float(main) == 0.0, "a chunk without a valid step counts nothing"


@every_mixture
@every_head
def test_a_step_does_not_depend_on_how_the_batch_is_divided(kit: SimpleNamespace, name: str, mixture: str) -> None:
    parts, full = make(kit, name, mixture, committed=3), kit.target()
    whole = parts.loss(full).terms
    for term in set(whole) - {
        "balance",
        "error_entropy",
    }:  # these two compare the rows of a micro-batch with one another
        pieces = 0.0
        for rows in (slice(0, 2), slice(2, 4)):
            share = full.valid[rows].sum() / full.valid.sum()
            pieces += float(parts.loss(kit.target(rows), rows).terms[term] * share)
        assert pieces == pytest.approx(float(whole[term]), abs=5e-6), term


@every_mixture
@every_head
def test_samples_have_the_shape_and_repeat(kit: SimpleNamespace, name: str, mixture: str) -> None:
    parts = make(kit, name, mixture)
    chunks = parts.sample(3).actions
    assert chunks.shape == (kit.BATCH, 3, kit.STEPS, kit.PADDED)
    assert chunks.isfinite().all()
    assert torch.equal(chunks, parts.sample(3).actions)


@every_head
def test_samples_of_a_row_do_not_depend_on_the_other_rows(kit: SimpleNamespace, name: str) -> None:
    """The released mixture code pairs one sample's actions with another's context as soon as there are two."""
    parts = make(kit, name, "mixture")
    shape = (kit.BATCH, 2, kit.STEPS, kit.PADDED)
    state = parts.head.init(shape, torch.Generator().manual_seed(0), torch.device("cpu"))
    if name.startswith("discrete"):
        state = torch.randint(0, 17, state.shape, generator=torch.Generator().manual_seed(0))
    time = torch.full(shape[:3], 0.4)
    with torch.no_grad():
        together = parts.denoiser(2)(state, time).out
        for row in range(kit.BATCH):
            here = slice(row, row + 1)
            alone = parts.denoiser(2, here)(state[here], time[here]).out
            torch.testing.assert_close(alone, together[here], atol=2e-5, rtol=1e-4)


@every_mixture
@every_head
def test_the_first_samples_do_not_depend_on_how_many_there_are(kit: SimpleNamespace, name: str, mixture: str) -> None:
    parts = make(kit, name, mixture)
    if parts.head.steps == 1:
        torch.testing.assert_close(parts.sample(4).actions[:, :1], parts.sample(1).actions, atol=1e-5, rtol=0)
        return
    many, one = (
        parts.head.init((kit.BATCH, n, kit.STEPS, kit.PADDED), torch.Generator().manual_seed(0), torch.device("cpu"))
        for n in (4, 1)
    )
    assert torch.equal(many[:, :1], one)


@every_head
def test_what_is_committed_comes_out_and_is_not_learnt(kit: SimpleNamespace, name: str) -> None:
    from vla.rtc import Committed

    parts = make(kit, name, "one", committed=3)
    actions = kit.target().actions.clone()
    actions[..., kit.REAL :] = 0
    length = torch.tensor([0, 1, 3, 2])
    chunks = parts.sample(2, committed=Committed(actions, length)).actions
    for row, count in enumerate(length.tolist()):
        for sample in range(2):
            assert torch.equal(chunks[row, sample, :count], actions[row, :count])
    free = parts.sample(2, committed=Committed(actions, torch.zeros(4, dtype=torch.long))).actions
    if name != "regression_l1":
        assert torch.equal(free, parts.sample(2).actions), "nothing committed is the plain sampler, bit for bit"
    assert not torch.equal(chunks[2, :, 3:], free[2, :, 3:]), "the rest depends on what is committed"


@pytest.mark.parametrize(
    ("name", "mixture"),
    [*((name, "one") for name in HEADS), *((n, "mixture") for n in ("flow", "regression_l1", "discrete", "e0"))],
)
def test_it_overfits_one_batch(kit: SimpleNamespace, name: str, mixture: str) -> None:
    config = kit.HEADS[name]
    if hasattr(config, "draws"):
        config = replace(config, draws=8)
    parts = kit.make(config, mixture=MIXTURES[mixture])
    optimizer = torch.optim.Adam([p for _, p in parts.parameters()], 1e-2)
    full = kit.target()
    for step in range(120):
        loss = parts.loss(full, seed=step).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (parts.sample(1).actions[:, 0] - full.actions)[full.valid][:, : kit.REAL].abs().mean()
    assert error < 0.25, "four chunks are not learnt"


def test_heads_and_codec_that_disagree_are_refused(kit: SimpleNamespace) -> None:
    for head in (kit.DISCRETE, kit.E0):
        with pytest.raises(UsageError, match=r"needs policy\.normalization 'quantile', got 'mean_std'"):
            kit.policy_config(head, normalization="mean_std")
    with pytest.raises(UsageError, match="exactly when"):
        kit.policy_config(kit.DISCRETE, expert=ExpertConfig(24, 2, 32, ("joint",), "adarms", "bidirectional"))
    with pytest.raises(UsageError, match=r"binary_dims is \(5,\); the actions have 0\.\.1"):
        kit.make(replace(kit.DISCRETE, binary_dims=(5,)))
