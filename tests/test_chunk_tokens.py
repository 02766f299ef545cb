"""The backbone's own token loss, and what insulation keeps from the backbone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla import checkpoint
from vla.action_tokens.base import ChunkShape
from vla.action_tokens.bins import BinsConfig, BinsTokenizer
from vla.chunk_tokens import pad
from vla.errors import CheckpointError, SpecMismatch, UsageError
from vla.policy import VLAPolicy
from vla.policy_config import PolicyConfig, TokenLossConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 uniform bins for chunks of 5 actions with 2 dimensions: 10 tokens each."""
    path = tmp_path_factory.mktemp("tokenizer") / "bins"
    BinsTokenizer(ChunkShape(5, 2, 20.0, "mean_std"), BinsConfig(8, "uniform", ()), None).save(path)
    return path


def config(policies: SimpleNamespace, folder: Path, learns: str) -> PolicyConfig:
    given = TokenLossConfig(str(folder), 0.5, learns)  # pyright: ignore[reportArgumentType]
    return replace(policies.CONFIG, token_loss=given)


def test_padding_ends_every_sequence() -> None:
    ids = pad([np.array([3, 1]), np.array([], np.int64), np.array([2, 2, 2])], edge=9)
    assert ids.tolist() == [[3, 1, 9, 9], [9, 9, 9, 9], [2, 2, 2, 9]]


@pytest.mark.parametrize(("learns", "reached"), [("tokens", False), ("both", True)])
def test_insulation_keeps_the_heads_loss_from_the_backbone(
    policies: SimpleNamespace,
    folder: Path,
    learns: str,
    reached: bool,  # noqa: FBT001
) -> None:
    policy = VLAPolicy.build(config(policies, folder, learns), policies.STATISTICS, seed=0)
    batch = policies.batch(policy, range(6))
    assert policy.chunk_tokens is not None
    slow = policy.config.token_loss
    assert slow is not None
    policy.config = replace(policy.config, token_loss=replace(slow, weight=0.0))
    policy.loss(batch).total.backward()
    touched = [n for n, p in policy.backbone.named_parameters() if p.grad is not None and p.grad.any()]
    assert bool(touched) is reached
    policy.zero_grad()
    policy.config = replace(policy.config, token_loss=replace(slow, weight=1.0))
    policy.loss(batch).total.backward()
    assert [n for n, p in policy.backbone.named_parameters() if p.grad is not None and p.grad.any()]
    idle = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, "the last text layer and the final norm are read by the token loss"


def test_the_token_loss_learns_to_name_the_chunk(policies: SimpleNamespace, folder: Path) -> None:
    policy = VLAPolicy.build(config(policies, folder, "tokens"), policies.STATISTICS, seed=0)
    batch = policies.batch(policy, range(2))
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        policy.loss(batch).total.backward()
        optimizer.step()
    assert float(policy.loss(batch).terms["chunk_tokens"]) < 0.1
    policy.eval()
    assert policy.chunk_tokens is not None
    cache = policy.encode(batch.images, batch.image_mask, batch.tokens, batch.token_mask)
    named = policy.chunk_tokens.generate(policy.backbone, cache, limit=16)
    expected = policy.chunk_tokens.tokenizer.encode(batch.actions[..., :2].numpy())
    assert [a.tolist() for a in named] == [a.tolist() for a in expected], "it says the chunk and stops by itself"


def test_a_chunk_that_leaves_its_episode_is_not_named(policies: SimpleNamespace, folder: Path) -> None:
    policy = VLAPolicy.build(config(policies, folder, "tokens"), policies.STATISTICS, seed=0)
    row = policies.batch(policy, range(2, 3))  # two valid steps of five
    assert float(policy.loss(row).terms["chunk_tokens"]) == 0
    assert float(policy.loss(policies.batch(policy, range(1))).terms["chunk_tokens"]) > 0


def test_a_checkpoint_carries_its_tokenizer(policies: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    policy = VLAPolicy.build(config(policies, folder, "tokens"), policies.STATISTICS, seed=0).eval()
    checkpoint.save(policy, tmp_path / "policy")
    loaded = checkpoint.load(tmp_path / "policy")
    batch = policies.batch(policy, range(6))
    assert torch.equal(loaded.loss(batch).total, policy.loss(batch).total)


def test_a_tokenizer_of_other_chunks_is_refused(policies: SimpleNamespace, tmp_path: Path) -> None:
    BinsTokenizer(ChunkShape(4, 2, 20.0, "mean_std"), BinsConfig(8, "uniform", ()), None).save(tmp_path / "other")
    with pytest.raises(SpecMismatch, match="length"):
        VLAPolicy.build(config(policies, tmp_path / "other", "tokens"), policies.STATISTICS, seed=0)
    with pytest.raises(CheckpointError, match="vla-data tokenizer"):
        VLAPolicy.build(config(policies, tmp_path / "none", "tokens"), policies.STATISTICS, seed=0)
    with pytest.raises(UsageError, match="does not go with"):
        replace(config(policies, tmp_path, "tokens"), state="prefix")


def test_a_token_does_not_see_the_ones_after_it(policies: SimpleNamespace, folder: Path) -> None:
    policy = VLAPolicy.build(config(policies, folder, "tokens"), policies.STATISTICS, seed=0)
    assert policy.chunk_tokens is not None
    seen: list[torch.Tensor] = []
    policy.chunk_tokens.classifier.register_forward_hook(lambda _module, _given, out: seen.append(out.detach()))
    batch = policies.batch(policy, range(1))
    later = batch.actions.clamp(-0.9, 0.9)
    policy.loss(replace(batch, actions=later))
    changed = later.clone()
    changed[:, -1] = -changed[:, -1].sign()  # other bins for the last step's two tokens, which are fed one place later
    policy.loss(replace(batch, actions=changed))
    one, other = seen
    torch.testing.assert_close(one[:, :9], other[:, :9], atol=1e-6, rtol=0)
    assert not torch.allclose(one[:, 9:], other[:, 9:])
