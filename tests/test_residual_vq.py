"""Residual VQ: the sum telescopes, gradients pass straight through, levels matter in order, codes stay in use."""

from pathlib import Path

import numpy as np
import pytest
import torch

from train import fit_residual_vq
from train.fit_residual_vq import ResidualVQTraining
from vla.action_tokens.base import ChunkShape
from vla.action_tokens.load import load
from vla.action_tokens.residual_vq import ChunkAutoencoder, ResidualQuantiser, ResidualVQConfig, ResidualVQTokenizer
from vla.errors import DataError, UsageError

CHUNK = ChunkShape(length=10, dim=4, rate_hz=30.0, normalization="quantile")
CONFIG = ResidualVQConfig(levels=3, codes=32, stride=4, latent=8, width=64, blocks=1)  # 3 latents, 9 tokens
TRAINING = ResidualVQTraining(steps=300, batch=128, lr=3e-3, seed=0)


def walks(count: int, seed: int) -> np.ndarray:
    """(count, 10, 4) float32: smooth chunks of correlated dimensions."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(count, 10, 2)) @ np.random.default_rng(9).normal(size=(2, 4))
    return np.cumsum(0.15 * steps, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> ResidualVQTokenizer:
    return fit_residual_vq.fit(walks(2000, 0), CHUNK, CONFIG, TRAINING)


def quantiser(levels: int = 3, codes: int = 16, latent: int = 4) -> tuple[ResidualQuantiser, torch.Tensor]:
    """One with codebooks from data, finer level by level, in evaluation mode; and latents (64, 3, latent)."""
    torch.manual_seed(0)
    module, latents = ResidualQuantiser(levels, codes, latent), torch.randn(64, 3, latent)
    module.train()(latents)
    return module.eval(), latents


def test_the_sum_of_the_levels_telescopes() -> None:
    module, latents = quantiser()
    out = module(latents)
    residual, commitment = latents, 0.0
    for level in range(3):
        distances = (residual[:, :, None] - module.codebooks[level]).norm(dim=-1)  # (B, T, K)
        ids = distances.argmin(dim=-1)
        assert torch.equal(out.ids[:, level], ids)
        commitment += (distances.amin(dim=-1) ** 2).mean() / 4
        residual = residual - module.codebooks[level][ids]
        torch.testing.assert_close(out.sums[level] + residual, latents)
        torch.testing.assert_close(module.sums_of(out.ids[:, : level + 1]), out.sums[level])
    torch.testing.assert_close(out.commitment, torch.as_tensor(commitment))


def test_each_level_leaves_less() -> None:
    module, latents = quantiser()
    left = [float((latents - s).square().mean()) for s in module(latents).sums]
    assert left[0] > left[1] > left[2]


def test_evaluation_changes_no_codebook() -> None:
    module, latents = quantiser()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module(2 * latents)
    for k, v in module.state_dict().items():
        assert torch.equal(v, before[k])


def test_codes_move_to_the_mean_of_what_chose_them() -> None:
    module, _ = quantiser(levels=1, codes=2, latent=1)
    module.codebooks[0] = torch.tensor([[-1.0], [1.0]])
    module.counts[0], module.totals[0] = torch.ones(2), module.codebooks[0].clone()
    module.train()
    points = torch.tensor([-2.0, -4.0, 3.0]).view(1, 3, 1)
    for _ in range(400):
        module(points)
    torch.testing.assert_close(module.codebooks[0], torch.tensor([[-3.0], [3.0]]), atol=1e-2, rtol=0)


def test_a_dead_code_is_put_where_data_is() -> None:
    module, latents = quantiser(levels=1)
    module.codebooks[0, 5] = 100.0
    module.counts[0, 5] = 0.0
    module.train()(latents)
    assert torch.cdist(module.codebooks[0, 5][None], latents.flatten(0, 1)).min() < 1e-5


def test_gradients_pass_straight_through_and_not_to_the_codes() -> None:
    torch.manual_seed(0)
    net, x = ChunkAutoencoder(CHUNK, CONFIG).train(), torch.from_numpy(walks(32, 1))
    kept = torch.full((32,), 3)
    latents = net.encode(x)
    latents.retain_grad()
    net.encode = lambda actions: latents
    net.loss(x, kept, beta=0.0).backward()
    assert latents.grad is not None
    chosen = net.eval().quantiser(latents).sums[-1].detach().requires_grad_()
    torch.nn.functional.mse_loss(net.decode(chosen), x).backward()
    assert chosen.grad is not None
    torch.testing.assert_close(latents.grad, chosen.grad, rtol=0.5, atol=1e-4)  # one update of the codes between them
    assert latents.grad.abs().max() > 1e-4
    assert not any(buffer.requires_grad for buffer in net.quantiser.buffers())


def test_commitment_pulls_latents_to_their_codes() -> None:
    module, latents = quantiser()
    latents = latents.clone().requires_grad_()
    module(latents).commitment.backward()
    assert latents.grad is not None
    out = module(latents)
    codes = [module.codebooks[level][out.ids[:, level]] for level in range(3)]
    expected, residual = torch.zeros_like(latents), latents.detach()
    for code in codes:
        residual = residual - code
        expected += 2 * residual / latents.numel()
    torch.testing.assert_close(latents.grad, expected)


def test_loss_uses_the_kept_levels_of_each_chunk() -> None:
    torch.manual_seed(0)
    net, x = ChunkAutoencoder(CHUNK, CONFIG), torch.from_numpy(walks(8, 1))
    net.train().quantiser(net.encode(x).detach())
    net.eval()
    kept = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2])
    ids = net.quantiser(net.encode(x)).ids
    rebuilt = torch.cat([net.decode(net.quantiser.sums_of(ids[i : i + 1, :k])) for i, k in enumerate(kept.tolist())])
    error, commitment = torch.nn.functional.mse_loss(rebuilt, x), net.quantiser(net.encode(x)).commitment
    torch.testing.assert_close(net.loss(x, kept, beta=0.0), error)
    torch.testing.assert_close(net.loss(x, kept, beta=0.25), error + 0.25 * commitment)


def test_half_of_a_batch_is_rebuilt_from_all_levels_and_the_rest_from_any(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, loss = [], ChunkAutoencoder.loss

    def spy(net: ChunkAutoencoder, actions: torch.Tensor, kept: torch.Tensor, beta: float) -> torch.Tensor:
        assert beta == 0.25
        seen.append(kept)
        return loss(net, actions, kept, beta)

    monkeypatch.setattr(ChunkAutoencoder, "loss", spy)
    fit_residual_vq.fit(walks(50, 0), CHUNK, CONFIG, ResidualVQTraining(steps=2, batch=3000, lr=1e-3, seed=0))
    shares = torch.bincount(torch.cat(seen), minlength=4) / 6000
    torch.testing.assert_close(shares, torch.tensor([0, 1 / 6, 1 / 6, 2 / 3]), atol=0.03, rtol=0)


def test_finer_levels_add_tokens_and_take_error_away(fitted: ResidualVQTokenizer) -> None:
    for x in (walks(2000, 0), walks(300, 1)):
        ids = fitted.encode(x)
        errors = []
        for level in (1, 2, 3):
            coarse = [s[: level * 3] for s in ids]
            errors.append(np.sqrt(np.mean((fitted.decode(coarse) - x) ** 2)))
        assert errors[0] > 1.2 * errors[1] > 1.2 * 1.05 * errors[2]
        assert errors[2] < 0.35 * x.std()


def test_no_level_collapses(fitted: ResidualVQTokenizer) -> None:
    codes = fitted.codes(torch.from_numpy(walks(2000, 0)))
    for level in range(3):
        share = torch.bincount(codes[:, level].flatten(), minlength=32) / codes[:, level].numel()
        perplexity = torch.exp(-(share * torch.log(share + 1e-12)).sum())
        assert perplexity > 12


def test_tokens_are_level_by_level_coarse_first(fitted: ResidualVQTokenizer) -> None:
    x = walks(6, 2)
    ids = np.stack(fitted.encode(x)).reshape(6, 3, 3)
    codes = fitted.codes(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(ids, codes + np.array([0, 32, 64])[:, None])
    latents = fitted.net.encode(torch.from_numpy(x)).detach()
    nearest = torch.cdist(latents.flatten(0, 1), fitted.net.quantiser.codebooks[0]).argmin(-1).view(6, 3)
    np.testing.assert_array_equal(ids[:, 0], nearest)


def test_sequences_of_different_depth_decode_together(fitted: ResidualVQTokenizer) -> None:
    ids = fitted.encode(walks(3, 3))
    mixed = [ids[0], ids[1][:3], ids[2][:6]]
    together = fitted.decode(mixed)
    for one, sequence in zip(together, mixed, strict=True):
        np.testing.assert_allclose(one, fitted.decode([sequence])[0], atol=1e-6)


def test_an_id_of_another_level_is_refused(fitted: ResidualVQTokenizer) -> None:
    (ids,) = fitted.encode(walks(1, 4))
    ids[4] = 70
    with pytest.raises(DataError, match=r"has id 70 of level 3 at place 4; there stand ids of level 2, 32\.\.63"):
        fitted.decode([ids])


def test_a_last_patch_that_is_not_full_repeats_the_last_action() -> None:
    net, x = ChunkAutoencoder(CHUNK, CONFIG), torch.from_numpy(walks(2, 0))
    assert net.latents == 3
    whole = ChunkAutoencoder(ChunkShape(12, 4, 30.0, "quantile"), CONFIG)
    whole.load_state_dict(net.state_dict())
    longer = torch.cat([x, x[:, -1:], x[:, -1:]], dim=1)
    torch.testing.assert_close(net.encode(x), whole.encode(longer))
    assert net.decode(net.encode(x)).shape == (2, 10, 4)


def test_the_same_arguments_give_the_same_weights(tmp_path: Path) -> None:
    short = ResidualVQTraining(steps=3, batch=16, lr=1e-3, seed=5)
    seen = []
    a = fit_residual_vq.fit(walks(50, 0), CHUNK, CONFIG, short, lambda step, loss: seen.append((step, loss)))
    torch.manual_seed(77)  # the caller's random numbers neither enter nor advance
    state = torch.random.get_rng_state()
    b = fit_residual_vq.fit(walks(50, 0), CHUNK, CONFIG, short)
    assert torch.equal(torch.random.get_rng_state(), state)
    a.save(tmp_path / "a")
    c = load(tmp_path / "a")
    assert isinstance(c, ResidualVQTokenizer)
    for other in (b, c):
        for name, value in other.net.state_dict().items():
            assert torch.equal(value, a.net.state_dict()[name])
    assert [step for step, _ in seen] == [0, 1, 2]
    assert c.config == CONFIG
    assert not c.net.training


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="levels must be at least 1, got 0"):
        ResidualVQConfig(0, 32, 4, 8, 32, 1)
    with pytest.raises(UsageError, match="at least one step"):
        ResidualVQTraining(0, 1, 1e-3, 0)
    wild = walks(20, 0) * np.float32(1e30)
    with pytest.raises(DataError, match="The loss is"):
        fit_residual_vq.fit(wild, CHUNK, CONFIG, ResidualVQTraining(5, 8, 1e-3, 0))
