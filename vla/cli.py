"""What every console script shares: arguments, one clear line per error, exit codes, interruption.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (run the same command again to resume).
"""

import argparse
import dataclasses
import errno
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vla import config
from vla.errors import TandemError, UsageError

T = TypeVar("T")
INTERRUPTED = 130
# What the machine, not the program, is to blame for: said in one sentence, without a traceback.
ADVICE = {
    errno.ENOSPC: "The disk is full: free some space, or choose another output folder.",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose another output folder.",
    errno.EROFS: "That file system is read-only: choose another output folder.",
    errno.EACCES: "You may not read or write there: change its permissions, or choose another folder.",
    errno.EPERM: "You may not read or write there: change its permissions, or choose another folder.",
}


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; raised in the main thread so that `finally` blocks run.

    Like KeyboardInterrupt no `Exception`: a place that survives failures must not survive this.
    """


def run(command: Callable[[], int | None]) -> int:
    """Run a command's body; turn user errors and signals into a message and an exit code.

    A body that returns a number chooses the exit code itself.
    """

    def stop(signum: int, _: Any) -> None:
        signal.signal(signum, signal.SIG_DFL)  # a second signal ends it at once
        raise Interrupted(signal.Signals(signum).name)

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = command()
        sys.stdout.flush()
        return code or 0
    except TandemError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as signal_name:
        print(f"interrupted by {signal_name}; run the same command again to resume.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has gone
        return 1
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}. {ADVICE[error.errno]}", file=sys.stderr)
        return 1
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def parser(doc: str | None, **kwargs: Any) -> argparse.ArgumentParser:
    """An argument parser whose help is the calling module's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
    )


def config_main(  # noqa: UP047 (parses on Python 3.10)
    cls: type[T], body: Callable[[T], int | None], doc: str | None, argv: Sequence[str] | None = None
) -> int:
    """The `main` of a command that takes one YAML path and dotted overrides."""
    p = parser(doc, epilog=f"configuration keys:\n{describe(cls)}")
    p.add_argument("config", metavar="CONFIG.yaml", help="a complete configuration, see configs/")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-4")
    args = p.parse_args(argv)
    if "=" in args.config and not Path(args.config).exists():
        p.error(f"the first argument must be a YAML file, got the override {args.config!r}")
    return run(lambda: body(config.load(cls, args.config, args.overrides)))


def describe(cls: type, indent: str = "  ") -> str:
    """The keys of a configuration with their types, one a line, nested."""
    hints = typing.get_type_hints(cls)
    lines = []
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        note = f.metadata.get("help", "")
        lines.append(f"{indent}{f.name}: {_type_name(hint)}{'  # ' + note if note else ''}")
        nested = [t for t in _types_in(hint) if dataclasses.is_dataclass(t) and isinstance(t, type)]
        lines += [describe(t, indent + "  ") for t in nested]
    return "\n".join(lines)


def _types_in(hint: Any) -> list[Any]:
    return [hint, *(t for arg in typing.get_args(hint) for t in _types_in(arg))]


def _type_name(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    for noise in ("typing.", "pathlib.", "vla.", "train.", "robot.", "deploy."):
        text = text.replace(noise, "")
    return text


def require(condition: object, message: str) -> None:
    """Raise `UsageError(message)` unless `condition` holds."""
    if not condition:
        raise UsageError(message)
