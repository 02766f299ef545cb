"""Instructions -> token ids: a checkpoint's own tokenizer, or a byte-level one for models made here. No torch."""

from pathlib import Path
from typing import Protocol

from vla.errors import CheckpointError


class Tokenizer(Protocol):
    pad_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def save(self, folder: Path) -> None: ...
