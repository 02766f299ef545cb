"""What every action tokenizer does: check chunks and ids at the door, and keep one folder on disk. numpy only.

A tokenizer's folder holds `action_tokenizer.json` (kind, version, the chunk it was fitted for, its settings)
beside the files of its kind.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vla.codec import Normalization
from vla.config import build
from vla.errors import CheckpointError, DataError, SpecMismatch, UsageError
from vla.files import whole_folder, write_json

MANIFEST = "action_tokenizer.json"
FORMAT = 1


@dataclass(frozen=True)
class ChunkShape:
    """The chunks that a tokenizer reads and writes."""

    length: int  # H, actions of a chunk
    dim: int  # A, real action dimensions, without the model's padding
    rate_hz: float  # actions per second
    normalization: Normalization  # what makes physical actions the model units that are tokenised

    def __post_init__(self) -> None:
        if self.length < 1 or self.dim < 1 or not self.rate_hz > 0:
            raise SpecMismatch(f"A chunk needs at least one action, one dimension and a positive rate, got {self}.")


class ActionTokenizer(ABC):
    """Chunks of one shape <-> sequences of ids in 0..vocab_size-1."""

    KIND: ClassVar[str]

    def __init__(self, chunk: ChunkShape) -> None:
        self.chunk = chunk

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids are smaller than this."""

    @property
    @abstractmethod
    def tokens(self) -> int | None:
        """L, the number of ids of every chunk; None if it differs from chunk to chunk."""

    def encode(self, actions: np.ndarray) -> list[np.ndarray]:
        """Chunks (B, H, A) float32, model units -> B id sequences, each (L,) int64.

        Raises:
            SpecMismatch: chunks of another shape than this tokenizer's.
            DataError: a number that is not finite, or that has no token.
        """
        expected = (self.chunk.length, self.chunk.dim)
        if actions.ndim != 3 or actions.shape[1:] != expected:
            raise SpecMismatch(
                f"This {self.KIND} tokenizer reads chunks of {expected[0]} actions with {expected[1]} dimensions, got "
                f"an array of shape {actions.shape}. Give (B, {expected[0]}, {expected[1]}), or fit a tokenizer anew."
            )
        if not np.isfinite(actions).all():
            bad = sorted(set(np.argwhere(~np.isfinite(actions))[:, 0].tolist()))
            raise DataError(
                f"{len(bad)} of {len(actions)} chunks hold a number that is not finite, first chunk {bad[0]}."
            )
        return self._encode(actions) if len(actions) else []

    def decode(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        """B id sequences, each (L,) integers -> chunks (B, H, A) float32, model units.

        Raises:
            DataError: an id outside the vocabulary, or a sequence that is no chunk.
        """
        sequences = [np.asarray(sequence, np.int64).reshape(-1) for sequence in ids]
        for i, sequence in enumerate(sequences):
            wrong = sequence[(sequence < 0) | (sequence >= self.vocab_size)]
            if len(wrong):
                raise DataError(
                    f"Sequence {i} holds id {wrong[0]}; this {self.KIND} tokenizer has ids 0..{self.vocab_size - 1}."
                )
        empty = np.zeros((0, self.chunk.length, self.chunk.dim), np.float32)
        return self._decode(sequences) if sequences else empty

    def _of_equal_length(self, ids: list[np.ndarray]) -> np.ndarray:
        """(B, L) int64, L = `tokens`. Raises `DataError`."""
        for i, sequence in enumerate(ids):
            if len(sequence) != self.tokens:
                raise DataError(f"Sequence {i} has {len(sequence)} ids; a chunk has {self.tokens}.")
        return np.stack(ids)

    def save(self, folder: Path) -> None:
        """Write `folder`, whole or not at all; what stood there is replaced."""
        with whole_folder(folder) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, which exists and is the caller's to make whole."""
        self._write(folder)
        what = {"format": FORMAT, "kind": self.KIND, "chunk": asdict(self.chunk), "settings": self._settings()}
        write_json(folder / MANIFEST, what)

    @abstractmethod
    def _encode(self, actions: np.ndarray) -> list[np.ndarray]: ...

    @abstractmethod
    def _decode(self, ids: list[np.ndarray]) -> np.ndarray: ...

    @abstractmethod
    def _settings(self) -> Mapping[str, Any]:
        """What the manifest keeps of this kind."""

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """The files of this kind, besides the manifest."""


@dataclass(frozen=True)
class Manifest:
    """`action_tokenizer.json` of a folder."""

    kind: str
    chunk: ChunkShape
    settings: dict[str, Any]  # of the kind


def read_manifest(folder: Path) -> Manifest:
    """Raises `CheckpointError` if `folder` has no manifest, a damaged one, or one of another release."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "There is no folder" if not folder.is_dir() else f"There is no {MANIFEST} in"
        raise CheckpointError(f"{what} {folder}: it is no action tokenizer. Make one with: vla-data tokenizer.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {data['format']!r}; this release reads {FORMAT}. Fit it anew.")
        return build(Manifest, {k: v for k, v in data.items() if k != "format"}, "manifest")
    except (ValueError, KeyError, TypeError, SpecMismatch, UsageError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Fit the tokenizer anew, or restore the file.") from error
