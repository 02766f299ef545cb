"""FAST (Pertsch et al. 2025, arXiv 2501.09747): cosine transform over time, rounding, byte-pair encoding. No torch.

A chunk x (H, A) becomes coefficients c = round(scale * DCT-II(x)) along time, orthonormal. They are written
lowest frequency first, all dimensions of one frequency together; each is the character with code
c - min_token; and the text is encoded by a byte-level BPE.

The transform is orthonormal and each coefficient is off by 1/2 at most, so for each dimension
    ||decode(encode(x)) - x||_2 <= sqrt(H) / (2 scale),    root mean square over time <= 1 / (2 scale),
as long as no coefficient lies below `min_token`: those are raised to it, as in the public processor.

Files are those of the public tokenizer (physical-intelligence/fast), read without running its code: the BPE
at the top (MolmoAct2 in LeRobot), or in the folder where transformers 5 keeps it for the public class.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from vla.action_tokens.base import ActionTokenizer, ChunkShape, Manifest
from vla.config import build
from vla.errors import CheckpointError, DataError, SpecMismatch, UsageError
from vla.files import write_json, write_text

BPE, PROCESSOR = "tokenizer.json", "processor_config.json"
BPE_FOLDERS = ("", "bpe_tokenizer")
BYTES = 256  # symbols of the byte-level alphabet
NOT_TEXT = 0xFFFD  # what bytes that are no text decode to
SURROGATES = 0xD800  # character codes from here on cannot be written as bytes

PUBLIC_CLASS = "physical-intelligence/fast--processing_action_tokenizer.UniversalActionProcessor"
# Readers that tidy up spaces in decoded text would lose coefficients.
TOKENIZER_CONFIG = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}

Malformed = Literal["error", "pad"]


@dataclass(frozen=True)
class FastConfig:
    """Settings of a FAST tokenizer."""

    scale: float  # coefficients are rounded to 1 / scale model units; 10 in the paper
    vocab_size: int  # ids at most: 256 bytes and the merges; 1024 in the paper, 2048 in the public tokenizer


@dataclass(frozen=True)
class Decoding:
    """What the manifest keeps beside the public files."""

    malformed: Malformed


class FastTokenizer(ActionTokenizer):
    """DCT and BPE.

    Args:
        chunk: the chunks that it reads.
        bpe: byte-level BPE over the characters of the coefficients.
        scale: coefficients per model unit.
        min_token: the coefficient that character 0 stands for.
        malformed: what `decode` does with ids that do not make up H * A coefficients, as a model may
            generate them. error: raise `DataError`. pad: missing coefficients, the highest frequencies, are
            0 and surplus ones are left out (LeRobot's pi0_fast); so is one whose bytes are no text.
    """

    KIND = "fast"

    def __init__(
        self, chunk: ChunkShape, bpe: Tokenizer, scale: float, min_token: int, malformed: Malformed = "error"
    ) -> None:
        super().__init__(chunk)
        self.scale, self.min_token = scale, min_token
        self.malformed: Malformed = malformed
        self._bpe = bpe

    @property
    def vocab_size(self) -> int:
        return self._bpe.get_vocab_size(with_added_tokens=True)

    @property
    def tokens(self) -> None:
        return None

    def _encode(self, actions: np.ndarray) -> list[np.ndarray]:
        quantised = coefficients(actions, self.scale)
        for i in np.flatnonzero((quantised - self.min_token >= SURROGATES).any(axis=(1, 2))):
            raise self._no_tokens(int(i), actions, quantised)
        texts = [_text(c, self.min_token) for c in quantised]
        encoded = [e.ids for e in self._bpe.encode_batch(texts, add_special_tokens=False)]
        for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if self._bpe.decode(ids, skip_special_tokens=False) != text:
                raise self._no_tokens(i, actions, quantised)
        return [np.asarray(ids, np.int64) for ids in encoded]

    def _no_tokens(self, i: int, actions: np.ndarray, quantised: np.ndarray) -> DataError:
        return DataError(
            f"Chunk {i} has cosine coefficients from {quantised[i].min():.0f} to {quantised[i].max():.0f}, and this "
            "tokenizer has no tokens for some of them: they did not occur in the data it was fitted on. Check that "
            f"actions are in model units (here {np.abs(actions[i]).max():.3g} at most), or fit one on this data."
        )

    def _decode(self, ids: list[np.ndarray]) -> np.ndarray:
        quantised = np.stack([self._coefficients_of(i, sequence) for i, sequence in enumerate(ids)])
        return np.asarray(idct(quantised / self.scale, axis=1, norm="ortho"), np.float32)

    def _coefficients_of(self, i: int, ids: np.ndarray) -> np.ndarray:
        """(L,) ids -> (H, A) float64."""
        length, dim = self.chunk.length, self.chunk.dim
        text = self._bpe.decode(ids.tolist(), skip_special_tokens=False)
        codes = np.fromiter(map(ord, text), np.int64, len(text))
        found = np.where(codes == NOT_TEXT, 0, codes + self.min_token).astype(np.float64)
        if self.malformed == "error" and (len(found) != length * dim or (codes == NOT_TEXT).any()):
            lost = ", some of them no text" if (codes == NOT_TEXT).any() else ""
            raise DataError(
                f"Sequence {i} of {len(ids)} ids makes up {len(found)} cosine coefficients{lost}; a chunk of {length} "
                f"actions with {dim} dimensions has {length * dim}."
            )
        found = found[: length * dim]
        return np.pad(found, (0, length * dim - len(found))).reshape(length, dim)

    def _settings(self) -> dict[str, Any]:
        return asdict(Decoding(self.malformed))

    def _write(self, folder: Path) -> None:
        write_json(
            folder / PROCESSOR,
            {
                "action_dim": self.chunk.dim,
                "auto_map": {"AutoProcessor": PUBLIC_CLASS},
                "min_token": self.min_token,
                "processor_class": PUBLIC_CLASS.rpartition(".")[2],
                "scale": self.scale,
                "time_horizon": self.chunk.length,
                "vocab_size": self.vocab_size,
            },
        )
        for name in BPE_FOLDERS:
            write_text(folder / name / BPE, self._bpe.to_str())
            write_json(folder / name / "tokenizer_config.json", TOKENIZER_CONFIG)


def coefficients(actions: np.ndarray, scale: float) -> np.ndarray:
    """(B, H, A) model units -> (B, H, A) rounded cosine coefficients, frequency along axis 1."""
    return np.around(np.asarray(dct(actions, axis=1, norm="ortho")) * scale)


def fit(chunks: np.ndarray, chunk: ChunkShape, config: FastConfig) -> FastTokenizer:
    """A tokenizer for data like `chunks` (N, H, A) float32, model units.

    All 256 bytes are in the vocabulary, so every chunk has an encoding; the public fit leaves out those
    that its data did not show.

    Raises:
        UsageError: settings that make no tokenizer, or data that the scale blows up.
    """
    if not config.scale > 0:
        raise UsageError(f"FAST's scale must be positive, got {config.scale}.")
    if config.vocab_size < BYTES:
        raise UsageError(f"FAST needs a vocabulary of at least {BYTES}, one id for each byte, got {config.vocab_size}.")
    found = coefficients(chunks, config.scale)
    low, high = int(found.min()), int(found.max())
    if high - low >= SURROGATES:
        raise UsageError(
            f"Cosine coefficients reach from {low} to {high}, more than {SURROGATES} values. Lower the scale "
            f"({config.scale}), or check that the actions are normalised."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def texts() -> Iterator[str]:
        for c in found:
            yield _text(c, low)

    bpe.train_from_iterator(texts(), trainer, length=len(found))
    return FastTokenizer(chunk, bpe, config.scale, low)


def read(folder: Path, manifest: Manifest) -> FastTokenizer:
    """The tokenizer that `save` wrote. Raises `CheckpointError`."""
    try:
        decoding = build(Decoding, manifest.settings, "settings")
    except UsageError as error:
        raise CheckpointError(f"The FAST tokenizer in {folder} is damaged: {error} Fit it anew.") from error
    return read_public(folder, manifest.chunk, decoding.malformed)


def read_public(folder: Path, chunk: ChunkShape | None, malformed: Malformed = "error") -> FastTokenizer:
    """A tokenizer in the public layout: tokenizer.json beside processor_config.json.

    Raises:
        CheckpointError: a file is missing or damaged.
        SpecMismatch: `chunk` is missing, or the files are for other chunks.
    """
    if chunk is None:
        raise SpecMismatch(
            f"{folder} is a FAST tokenizer for chunks of any shape. Say which chunks it is to read: length, "
            "dimensions, rate and normalisation."
        )
    try:
        settings = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))
        scale, low = float(settings["scale"]), int(settings["min_token"])
        named = {"time_horizon": settings.get("time_horizon"), "action_dim": settings.get("action_dim")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / PROCESSOR} is missing or damaged: {error!r}. Copy the folder anew."
        ) from error
    for (name, value), wanted in zip(named.items(), (chunk.length, chunk.dim), strict=True):
        if value is not None and value != wanted:
            raise SpecMismatch(
                f"{folder / PROCESSOR} has {name} {value}, but chunks have {wanted}. Fit a tokenizer anew."
            )
    return FastTokenizer(chunk, _read_bpe(folder), scale, low, malformed)


def _read_bpe(folder: Path) -> Tokenizer:
    path = next((folder / n / BPE for n in BPE_FOLDERS if (folder / n / BPE).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder / BPE} is missing: the folder holds no whole FAST tokenizer. Copy it anew.")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise CheckpointError(f"{path} is not a tokenizer description: {error}. Copy the folder anew.") from error


def _text(quantised: np.ndarray, min_token: int) -> str:
    """(H, A) coefficients -> one character each, lowest frequency first."""
    return "".join(map(chr, np.maximum(quantised - min_token, 0).astype(int).ravel().tolist()))
