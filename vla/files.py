"""Files that are written whole or not at all."""

import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from vla.errors import TandemError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for a picture or any other content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_partial_prefix(path), delete=False) as f:
        try:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            Path(f.name).unlink(missing_ok=True)
            raise


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    What stood at `path` is replaced. An interruption leaves `path` as it was; remains of an earlier
    interruption are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials(path)
    if not path.exists() and _previous(path).exists():  # killed between the two renames of `_exchange`
        _previous(path).rename(path)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=_partial_prefix(path)))
    os.chmod(partial, 0o755)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
        if path.exists():
            _exchange(partial, path)
        else:
            partial.rename(path)
    finally:  # what failed, or what stood at `path` before
        shutil.rmtree(partial, ignore_errors=True)


def _partial_prefix(path: Path) -> str:
    return f".{path.name}.partial-{os.getpid()}-"


def _remove_partials(path: Path) -> None:
    """Remove what writers that were killed left beside `path`; leave what a living one is writing."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        pid = stale.name.rpartition(".partial-")[2].partition("-")[0]
        if pid.isdecimal() and int(pid) != os.getpid() and _alive(int(pid)):
            continue
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step: at no moment is there nothing at `b`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(b))
    b.rename(_previous(b))  # a file system without the exchange, such as NFS
    a.rename(b)
    _previous(b).rename(a)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def require_writable(folder: Path) -> None:
    """Create `folder` and raise `TandemError` unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TandemError(
            f"Cannot write to {folder}: {error.strerror}. Choose another output folder, or make it writable."
        ) from error


def append_json_line(path: Path, data: Any) -> None:
    """Append one line in one write; what a killed writer left of a last line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # or what another process is writing at this moment would look torn
        _cut_torn_line(f)
        f.write(json.dumps(data, ensure_ascii=False).encode() + b"\n")


def _cut_torn_line(f: FileIO) -> None:
    end = f.seek(0, os.SEEK_END)
    if end == 0 or os.pread(f.fileno(), 1, end - 1) == b"\n":
        return
    f.seek(0)
    f.truncate(f.readall().rfind(b"\n") + 1)


def read_json_lines(path: Path) -> list[Any]:
    """All complete lines of a JSON-lines file; an unfinished last line is left out.

    Raises:
        TandemError: a complete line is not JSON.
    """
    if not path.exists():
        return []
    values = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise TandemError(
                f"{path}, line {number}, is not JSON ({error}). Remove that line, or restore the file."
            ) from error
    return values
