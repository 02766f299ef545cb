"""The tokenizer of a folder, whatever its kind."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from vla.action_tokens import bins, fast, residual_vq
from vla.action_tokens.base import MANIFEST, ActionTokenizer, ChunkShape, Manifest, read_manifest
from vla.errors import CheckpointError, SpecMismatch, choose_from

KINDS: dict[str, Callable[[Path, Manifest], ActionTokenizer]] = {
    "bins": bins.read,
    "fast": fast.read,
    "residual_vq": residual_vq.read,
}


def load(folder: Path, chunk: ChunkShape | None = None) -> ActionTokenizer:
    """Read a tokenizer that `ActionTokenizer.save` wrote, or a folder in the public FAST layout.

    Args:
        chunk: the chunks that it will be used for. Needed for a public FAST folder, which does not say;
            compared with any other.

    Raises:
        CheckpointError: the folder is missing, damaged, or holds no action tokenizer.
        SpecMismatch: the tokenizer was fitted for other chunks than `chunk`.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() and (folder / fast.PROCESSOR).is_file():
        return fast.read_public(folder, chunk)
    manifest = read_manifest(folder)
    if manifest.kind not in KINDS:
        raise CheckpointError(
            f"{folder} holds a tokenizer of kind {manifest.kind!r}.{choose_from(manifest.kind, KINDS)}"
        )
    if chunk is not None:
        require_same_chunk(manifest.chunk, chunk, folder)
    return KINDS[manifest.kind](folder, manifest)


def require_same_chunk(found: ChunkShape, wanted: ChunkShape, folder: Path) -> None:
    """Raise `SpecMismatch`, naming each field that differs."""
    different = [
        f"{f.name} {getattr(found, f.name)!r} instead of {getattr(wanted, f.name)!r}"
        for f in fields(ChunkShape)
        if getattr(found, f.name) != getattr(wanted, f.name)
    ]
    if different:
        raise SpecMismatch(f"The action tokenizer in {folder} has {', '.join(different)}. Fit one for this policy.")
