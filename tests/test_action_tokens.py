"""What every action tokenizer promises, and the bins."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import fit_residual_vq
from train.fit_residual_vq import ResidualVQTraining
from vla.action_tokens import bins, fast
from vla.action_tokens.base import ActionTokenizer, ChunkShape
from vla.action_tokens.bins import BinsConfig
from vla.action_tokens.fast import FastConfig
from vla.action_tokens.load import load
from vla.action_tokens.residual_vq import ResidualVQConfig
from vla.errors import CheckpointError, DataError, SpecMismatch, UsageError

CHUNK = ChunkShape(length=10, dim=3, rate_hz=30.0, normalization="quantile")
KINDS = ("bins_uniform", "bins_quantile", "fast", "residual_vq")


def walks(count: int, seed: int = 0) -> np.ndarray:
    """(count, 10, 3) float32, smooth, about -1 to 1; the last dimension is a gripper, -1 or 1."""
    steps = np.random.default_rng(seed).normal(size=(count, 10, 3))
    x = np.cumsum(0.25 * steps, axis=1)
    x[..., 2] = np.where(x[..., 2] > 0, 1, -1)
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, ActionTokenizer]:
    x = walks(2000)
    return {
        "bins_uniform": bins.fit(x, CHUNK, BinsConfig(64, "uniform", (2,))),
        "bins_quantile": bins.fit(x, CHUNK, BinsConfig(64, "quantile", ())),
        "fast": fast.fit(x, CHUNK, FastConfig(10.0, 512)),
        "residual_vq": fit_residual_vq.fit(
            x, CHUNK, ResidualVQConfig(3, 32, 4, 8, 32, 1), ResidualVQTraining(60, 64, 3e-3, 0)
        ),
    }


@pytest.fixture(params=KINDS)
def tokenizer(tokenizers: dict[str, ActionTokenizer], request: pytest.FixtureRequest) -> ActionTokenizer:
    return tokenizers[request.param]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_ids_and_chunks_have_the_promised_form(tokenizer: ActionTokenizer) -> None:
    ids = tokenizer.encode(walks(7, seed=1))
    assert len(ids) == 7
    for sequence in ids:
        assert (sequence.dtype, sequence.ndim) == (np.int64, 1)
        assert sequence.min() >= 0
        assert sequence.max() < tokenizer.vocab_size
        assert tokenizer.tokens is None or len(sequence) == tokenizer.tokens
    back = tokenizer.decode(ids)
    assert (back.dtype, back.shape) == (np.float32, (7, 10, 3))
    assert tokenizer.encode(walks(0)) == []
    assert tokenizer.decode([]).shape == (0, 10, 3)


def test_decoding_is_nearer_than_the_mean(tokenizer: ActionTokenizer) -> None:
    x = walks(200, seed=2)
    error = np.sqrt(np.mean((tokenizer.decode(tokenizer.encode(x)) - x) ** 2))
    assert error < 0.5 * np.std(x)


def test_a_chunk_is_encoded_alone_as_among_others(tokenizer: ActionTokenizer) -> None:
    x = walks(9, seed=3)
    assert same(tokenizer.encode(x), [tokenizer.encode(x[i : i + 1])[0] for i in range(9)])
    ids = tokenizer.encode(x)
    np.testing.assert_allclose(tokenizer.decode(ids)[4], tokenizer.decode([ids[4]])[0], atol=1e-6)


def test_a_folder_keeps_everything(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    again, x = load(tmp_path / "t", CHUNK), walks(50, seed=4)
    assert type(again) is type(tokenizer)
    assert (again.chunk, again.vocab_size, again.tokens) == (CHUNK, tokenizer.vocab_size, tokenizer.tokens)
    assert same(again.encode(x), tokenizer.encode(x))
    np.testing.assert_array_equal(again.decode(again.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    again.save(tmp_path / "t")  # over the old one
    assert same(load(tmp_path / "t").encode(x), tokenizer.encode(x))


@pytest.mark.parametrize("shape", [(2, 9, 3), (2, 10, 4), (10, 3), (2, 3, 10)])
def test_chunks_of_another_shape_are_refused(tokenizer: ActionTokenizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecMismatch, match=r"reads chunks of 10 actions with 3 dimensions, got an array of shape"):
        tokenizer.encode(np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(tokenizer: ActionTokenizer, value: float) -> None:
    x = walks(4)
    x[2, 5, 1] = value
    with pytest.raises(DataError, match="1 of 4 chunks hold a number that is not finite, first chunk 2"):
        tokenizer.encode(x)


def test_ids_outside_the_vocabulary_are_refused(tokenizer: ActionTokenizer) -> None:
    good = tokenizer.encode(walks(2))
    for wrong in (-1, tokenizer.vocab_size):
        bad = good[1].copy()
        bad[3] = wrong
        with pytest.raises(DataError, match=rf"Sequence 1 holds id {wrong}; this \w+ tokenizer has ids 0\.\."):
            tokenizer.decode([good[0], bad])


def test_sequences_of_another_length_are_refused(tokenizer: ActionTokenizer) -> None:
    good = tokenizer.encode(walks(2))
    for bad in (good[1][:-1], np.concatenate([good[1], good[1][:1]]), good[1][:0]):
        with pytest.raises(DataError, match="Sequence 1 "):
            tokenizer.decode([good[0], bad])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 8}, "length 10 instead of 8"),
        ({"dim": 4}, "dim 3 instead of 4"),
        ({"rate_hz": 50.0}, r"rate_hz 30.0 instead of 50.0"),
        ({"normalization": "mean_std"}, "normalization 'quantile' instead of 'mean_std'"),
    ],
)
def test_a_tokenizer_for_other_chunks_is_refused(
    tokenizer: ActionTokenizer, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tokenizer.save(tmp_path / "t")
    wanted = ChunkShape(**{"length": 10, "dim": 3, "rate_hz": 30.0, "normalization": "quantile"} | change)
    with pytest.raises(SpecMismatch, match=message):
        load(tmp_path / "t", wanted)


def test_a_folder_that_is_none_is_refused(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no folder .*no action tokenizer\. Make one with"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"There is no action_tokenizer\.json in"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this release reads 1"),
        ({"kind": "fats"}, "kind 'fats'. Did you mean 'fast'"),
        ({"chunk": {"length": 10}}, "is damaged"),
        ({"chunk": {"length": 0, "dim": 3, "rate_hz": 30.0, "normalization": "quantile"}}, "is damaged"),
        ({"settings": {}}, "is damaged"),
        ({"settings": None}, "is damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(
    tokenizer: ActionTokenizer, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tokenizer.save(tmp_path / "t")
    path = tmp_path / "t/action_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "t")


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_file_is_refused(tokenizer: ActionTokenizer, tmp_path: Path, how: str) -> None:
    tokenizer.save(tmp_path / "t")
    for path in sorted((tmp_path / "t").rglob("*.*")):
        tokenizer.save(tmp_path / "t")
        if path.name == "tokenizer_config.json" or path.parent.name == "bpe_tokenizer":
            continue  # for other readers of the public layout
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        bpe = path.name == "tokenizer.json" and how == "gone"  # its copy is read
        public = path.name == "action_tokenizer.json" and tokenizer.KIND == "fast" and how == "gone"
        if not bpe and not public:
            with pytest.raises(CheckpointError):
                load(tmp_path / "t")


def test_uniform_bins_are_the_discrete_heads_bins_step_by_step(tokenizers: dict[str, ActionTokenizer]) -> None:
    x = np.zeros((1, 10, 3), np.float32)
    x[0, 0] = [-1.0, -0.99, 0.3]
    x[0, 1] = [7.0, 0.02, -0.3]
    (ids,) = tokenizers["bins_uniform"].encode(x)
    assert ids[:6].tolist() == [0, 0, 1, 63, 32, 0]
    back = tokenizers["bins_uniform"].decode([ids])[0]
    np.testing.assert_allclose(back[:2], [[-63 / 64, -63 / 64, 1.0], [63 / 64, 1 / 64, -1.0]])


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 300))
def test_uniform_bins_are_off_by_half_a_bin_at_most(seed: int, count: int) -> None:
    x = np.random.default_rng(seed).uniform(-1, 1, (5, 10, 3)).astype(np.float32)
    tokenizer = bins.fit(x, CHUNK, BinsConfig(count, "uniform", ()))
    assert np.abs(tokenizer.decode(tokenizer.encode(x)) - x).max() <= 1 / count + 1e-6


def test_quantile_bins_hold_equal_shares_and_stand_for_their_means() -> None:
    x = np.random.default_rng(0).standard_normal((4000, 10, 3)).astype(np.float32) ** 3
    tokenizer = bins.fit(x, CHUNK, BinsConfig(16, "quantile", ()))
    ids = np.stack(tokenizer.encode(x)).reshape(-1, 3)
    back = tokenizer.decode(tokenizer.encode(x)).reshape(-1, 3)
    for d in range(3):
        counts = np.bincount(ids[:, d], minlength=16)
        assert counts.max() - counts.min() <= 2
        for k in (0, 7, 15):
            chosen = ids[:, d] == k
            np.testing.assert_allclose(back[chosen, d], x.reshape(-1, 3)[chosen, d].mean(dtype=np.float64), rtol=1e-5)
    uniform = bins.fit(x, CHUNK, BinsConfig(16, "uniform", ()))
    errors = [np.abs(t.decode(t.encode(x)) - x).mean() for t in (tokenizer, uniform)]
    assert errors[0] < errors[1]


def test_quantile_bins_keep_two_values_exactly(tokenizers: dict[str, ActionTokenizer]) -> None:
    x = walks(20, seed=5)
    tokenizer = tokenizers["bins_quantile"]
    np.testing.assert_array_equal(tokenizer.decode(tokenizer.encode(x))[..., 2], x[..., 2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BinsConfig(1, "uniform", ()), "at least 2 bins"),
        (BinsConfig(1, "quantile", ()), "at least 2 bins"),
        (BinsConfig(8, "quantile", (2,)), "uniform edges"),
        (BinsConfig(8, "uniform", (3,)), r"\[3\] do not exist: actions have dimensions 0\.\.2"),
    ],
)
def test_bins_without_meaning_are_refused(config: BinsConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bins.fit(walks(5), CHUNK, config)
