"""The folder of a run, as error messages and resumption see it. No torch.

config.yaml  metrics.jsonl  checkpoints/<step>/{policy,training}/  checkpoints/last
"""

from pathlib import Path

from vla.errors import TandemError

POINTER = "last"  # a text file with the name of the newest complete checkpoint


def last_name(output: Path) -> str | None:
    """The newest complete checkpoint's folder name, as the pointer says."""
    pointer = output / "checkpoints" / POINTER
    return pointer.read_text().strip() if pointer.exists() else None


def usable(output: Path) -> str:
    """A clause on what can be resumed from."""
    name = last_name(output)
    return f"The last complete checkpoint is {output / 'checkpoints' / name}" if name else "There is no checkpoint yet"


def write_error(what: str, path: Path, output: Path, error: Exception | None) -> TandemError:
    """The error for a file of a run that could not be written; None: another process could not write its part."""
    reason = getattr(error, "strerror", None) or str(error or "another process failed").removeprefix(
        "Error while serializing: "
    )
    return TandemError(
        f"Cannot write the {what} {path}: {reason}. {usable(output)}. Free some space or correct the permissions, then "
        "run the same command again to resume."
    )
