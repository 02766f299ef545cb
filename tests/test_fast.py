"""FAST: the bound on its error, known coefficients, and the same numbers as LeRobot's processor, both ways."""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.action_tokens import fast
from vla.action_tokens.base import ChunkShape
from vla.action_tokens.fast import FastConfig, FastTokenizer
from vla.action_tokens.load import load
from vla.errors import CheckpointError, DataError, SpecMismatch, UsageError

CHUNK = ChunkShape(length=16, dim=4, rate_hz=40.0, normalization="quantile")


def walks(count: int, seed: int = 0, length: int = 16, dim: int = 4) -> np.ndarray:
    """(count, length, dim) float32 smooth chunks, about -1 to 1."""
    steps = np.random.default_rng(seed).normal(size=(count, length, dim))
    return np.cumsum(0.2 * steps, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> FastTokenizer:
    return fast.fit(walks(500), CHUNK, FastConfig(scale=10.0, vocab_size=1024))


@pytest.fixture(scope="module")
def processor() -> Any:
    """LeRobot's form of the public class."""
    from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor

    return UniversalActionProcessor


def test_coefficients_are_those_of_the_orthonormal_cosine_transform() -> None:
    time, x = np.arange(16), np.zeros((1, 16, 2))
    x[0, :, 0] = 0.5  # constant: sqrt(16) * 0.5 at frequency 0
    x[0, :, 1] = np.cos(np.pi * (time + 0.5) * 3 / 16)  # a basis function: sqrt(16 / 2) at frequency 3
    expected = np.zeros((16, 2))
    expected[0, 0], expected[3, 1] = 20, 28  # 10 * 2.0; round(10 * 2.83)
    np.testing.assert_array_equal(fast.coefficients(x, 10.0)[0], expected)


def test_text_is_lowest_frequency_first_all_dimensions_together(fitted: FastTokenizer) -> None:
    x = np.zeros((1, 16, 4), np.float32)
    x[0, :, 2] = 0.5
    x[0, :, 1] = np.cos(np.pi * (np.arange(16) + 0.5) / 16)
    text = fitted._bpe.decode(fitted.encode(x)[0].tolist())
    values = np.array([ord(c) for c in text]) + fitted.min_token
    assert {int(i): int(values[i]) for i in np.flatnonzero(values)} == {2: 20, 4 + 1: 28}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 40),
    dim=st.integers(1, 8),
    scale=st.floats(2.0, 60.0),
    spread=st.floats(0.0, 1.5),
)
def test_error_is_within_the_bound(seed: int, length: int, dim: int, scale: float, spread: float) -> None:
    x = spread * np.random.default_rng(seed).standard_normal((6, length, dim)).astype(np.float32)
    chunk = ChunkShape(length, dim, 30.0, "quantile")
    tokenizer = fast.fit(x, chunk, FastConfig(scale, 300))
    back = tokenizer.decode(tokenizer.encode(x))
    norms = np.linalg.norm(back - x, axis=1)  # (6, A)
    assert norms.max() <= np.sqrt(length) / (2 * scale) + 1e-5 * (1 + spread)


def test_decoded_chunks_are_fixed_points(fitted: FastTokenizer) -> None:
    ids = fitted.encode(walks(50, seed=1))
    again = fitted.encode(fitted.decode(ids))
    assert all(np.array_equal(a, b) for a, b in zip(ids, again, strict=True))


def test_coefficients_that_the_fit_did_not_see_are_encoded(fitted: FastTokenizer) -> None:
    x = np.abs(walks(20, seed=2) * 60)
    x[:, 1:] = x[:, :1]  # constant in time, and positive: no coefficient below min_token
    np.testing.assert_allclose(fitted.decode(fitted.encode(x)), x, atol=np.sqrt(16) / 20 + 1e-4)
    with pytest.raises(DataError, match=r"Chunk 1 has cosine coefficients from 0 to 400000,"):
        fitted.encode(np.stack([x[0], np.full_like(x[0], 1e4)]))


def test_coefficients_below_the_fitted_range_are_raised_to_it(fitted: FastTokenizer) -> None:
    x = np.full((1, 16, 4), -100.0, np.float32)
    np.testing.assert_allclose(fitted.decode(fitted.encode(x)), fitted.min_token / 10 / 4, rtol=1e-5)


def test_smooth_chunks_need_fewer_tokens_than_numbers(fitted: FastTokenizer) -> None:
    lengths = [len(ids) for ids in fitted.encode(walks(100, seed=3))]
    assert np.mean(lengths) < 32
    assert fitted.tokens is None
    assert fitted.vocab_size == 1024


@pytest.mark.slow
def test_lerobot_reads_our_files_and_says_the_same(fitted: FastTokenizer, processor: Any, tmp_path: Path) -> None:
    fitted.save(tmp_path / "ours")
    peer = processor.from_pretrained_local(str(tmp_path / "ours"))
    assert (peer.scale, peer.min_token, peer.time_horizon, peer.action_dim) == (10.0, fitted.min_token, 16, 4)
    for x in (walks(100, seed=4), 4 * walks(20, seed=5), np.full((1, 16, 4), -100.0, np.float32)):
        ours, theirs = fitted.encode(x), peer(x)
        assert [ids.tolist() for ids in ours] == theirs
        np.testing.assert_allclose(peer.decode([ids.tolist() for ids in ours]), fitted.decode(ours), atol=1e-6)


@pytest.mark.slow
def test_we_read_lerobots_files_and_say_the_same(processor: Any, tmp_path: Path) -> None:
    peer = processor.fit(list(walks(500)), 10, 1024, time_horizon=16, action_dim=4)
    peer.save_pretrained(tmp_path / "theirs")
    ours, x = load(tmp_path / "theirs", CHUNK), walks(100, seed=0)
    theirs = peer(x)
    assert [ids.tolist() for ids in ours.encode(x)] == theirs
    np.testing.assert_allclose(peer.decode(theirs), ours.decode(theirs), atol=1e-6)
    lost = x.copy()
    lost[7] *= 30  # bytes that their vocabulary lacks: they leave coefficients out, we say so
    assert not peer.decode(peer(lost[7:8])).any()
    with pytest.raises(DataError, match=r"Chunk 7 has cosine coefficients .* fit one on this data"):
        ours.encode(lost)


def test_padding_is_that_of_pi0_fast(fitted: FastTokenizer, tmp_path: Path) -> None:
    fitted.save(tmp_path / "ours")
    padding, x = fast.read_public(tmp_path / "ours", CHUNK, "pad"), walks(1, seed=6)
    full = fitted.encode(x)[0]
    short, long = full[: len(full) // 2], np.concatenate([full, full[:5]])
    np.testing.assert_array_equal(padding.decode([full]), fitted.decode([full]))
    np.testing.assert_array_equal(padding.decode([long]), fitted.decode([full]))
    expected = fast.coefficients(x, 10.0)[0].ravel()
    expected[len(fitted._bpe.decode(short.tolist())) :] = 0
    found = fast.coefficients(padding.decode([short]).astype(np.float64), 10.0)[0].ravel()
    np.testing.assert_array_equal(found, expected)
    assert not padding.decode([np.array([], np.int64)]).any()
    for bad in (short, long):
        with pytest.raises(DataError, match=r"cosine coefficients; a chunk of 16 actions with 4 dimensions has 64"):
            fitted.decode([bad])


def test_bytes_that_are_no_text_never_become_an_action(fitted: FastTokenizer, tmp_path: Path) -> None:
    fitted.save(tmp_path / "ours")
    padding = fast.read_public(tmp_path / "ours", CHUNK, "pad")
    lone = fitted._bpe.token_to_id(chr(0xC3))  # the first byte of a two-byte character
    ids = np.full(64, lone)
    with pytest.raises(DataError, match="no text"):
        fitted.decode([ids])
    assert not padding.decode([ids]).any()


def test_settings_survive_the_folder(fitted: FastTokenizer, tmp_path: Path) -> None:
    fitted.malformed = "error"
    fitted.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert isinstance(again, FastTokenizer)
    assert (again.malformed, again.scale, again.min_token) == ("error", 10.0, fitted.min_token)
    again.malformed = "pad"
    again.save(tmp_path / "b")
    third = load(tmp_path / "b")
    assert isinstance(third, FastTokenizer)
    assert third.malformed == "pad"


def public_folder(fitted: FastTokenizer, folder: Path, **changes: Any) -> Path:
    """As physical-intelligence/fast: no manifest, and no shape in its processor's configuration."""
    fitted.save(folder)
    (folder / "action_tokenizer.json").unlink()
    shutil.rmtree(folder / "bpe_tokenizer")
    config = json.loads((folder / "processor_config.json").read_text())
    config |= {"time_horizon": None, "action_dim": None} | changes
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder


def test_the_public_layout_is_read_for_chunks_that_the_caller_names(fitted: FastTokenizer, tmp_path: Path) -> None:
    folder = public_folder(fitted, tmp_path / "public")
    with pytest.raises(SpecMismatch, match="chunks of any shape"):
        load(folder)
    shape = ChunkShape(8, 3, 25.0, "quantile")
    other, x = load(folder, shape), walks(5, length=8, dim=3)
    assert other.chunk == shape
    assert np.abs(other.decode(other.encode(x)) - x).max() <= np.sqrt(8) / 20
    with pytest.raises(SpecMismatch, match="time_horizon 16, but chunks have 8"):
        load(public_folder(fitted, tmp_path / "p", time_horizon=16), shape)


def test_the_layout_of_transformers_5_is_read_and_written(fitted: FastTokenizer, tmp_path: Path) -> None:
    from transformers.processing_utils import ProcessorMixin

    class UniversalActionProcessor(ProcessorMixin):
        """The public class's signature; its one part is not named `tokenizer`."""

        attributes: ClassVar[list[str]] = ["bpe_tokenizer"]
        bpe_tokenizer_class = "AutoTokenizer"

        def __init__(self, bpe_tokenizer: Any, scale: float = 10, vocab_size: int = 1024, min_token: int = 0) -> None:
            self.scale, self.vocab_size, self.min_token = scale, vocab_size, min_token
            super().__init__(bpe_tokenizer)

    fitted.save(tmp_path / "ours")
    peer: Any = UniversalActionProcessor.from_pretrained(tmp_path / "ours")
    assert peer.bpe_tokenizer.clean_up_tokenization_spaces is False  # or it would lose coefficients
    ids = [s.tolist() for s in fitted.encode(walks(3))]
    assert [peer.bpe_tokenizer.decode(s) for s in ids] == [fitted._bpe.decode(s) for s in ids]
    peer.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs/tokenizer.json").exists()
    assert [s.tolist() for s in load(tmp_path / "theirs", CHUNK).encode(walks(3))] == ids


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "is missing: the folder holds no whole FAST tokenizer"),
        ("tokenizer.json", "{", "is not a tokenizer description"),
        ("processor_config.json", "{", "is missing or damaged"),
        ("processor_config.json", "[]", "is missing or damaged"),
        ("processor_config.json", '{"scale": 10}', "'min_token'"),
    ],
)
def test_a_damaged_folder_is_refused(
    fitted: FastTokenizer, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    folder = public_folder(fitted, tmp_path / "public")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(folder, CHUNK)


@pytest.mark.parametrize(
    ("config", "factor", "message"),
    [
        (FastConfig(0.0, 1024), 1.0, "scale must be positive"),
        (FastConfig(10.0, 255), 1.0, "at least 256"),
        (FastConfig(10.0, 1024), 1e4, "check that the actions are normalised"),
    ],
)
def test_settings_that_make_no_tokenizer_are_refused(config: FastConfig, factor: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fast.fit(factor * walks(10), CHUNK, config)
