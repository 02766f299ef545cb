"""What every console script shares: arguments, one clear line per error, exit codes, interruption.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (run the same command again to resume).
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vla import config
from vla.errors import TandemError, UsageError

T = TypeVar("T")
INTERRUPTED = 130


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; raised in the main thread so that `finally` blocks run."""


def run(command: Callable[[], None]) -> int:
    """Run a command's body; turn user errors and signals into a message and an exit code."""

    def stop(signum: int, _: Any) -> None:
        signal.signal(signum, signal.SIG_DFL)  # a second signal ends it at once
        raise Interrupted(signal.Signals(signum).name)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        command()
    except TandemError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as signal_name:
        print(f"interrupted by {signal_name}; run the same command again to resume.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    return 0


def parser(doc: str | None, **kwargs: Any) -> argparse.ArgumentParser:
    """An argument parser whose help is the calling module's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
    )


def config_main(
    cls: type[T], body: Callable[[T], None], doc: str | None, argv: Sequence[str] | None = None
) -> int:
    """The `main` of a command that takes one YAML path and dotted overrides."""
    p = parser(doc, epilog=f"configuration keys:\n{describe(cls)}")
    p.add_argument("config", metavar="CONFIG.yaml", help="a complete configuration, see configs/")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-4")
    args = p.parse_args(argv)
    if args.config.partition("=")[1]:
        p.error(f"the first argument must be a YAML file, got the override {args.config!r}")
    return run(lambda: body(config.load(cls, args.config, args.overrides)))


def describe(cls: type, indent: str = "  ") -> str:
    """The keys of a configuration with their types, one a line, nested."""
    import dataclasses
    import typing

    lines = []
    for f in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[f.name]
        options = [hint, *typing.get_args(hint)]
        nested = [t for t in options if dataclasses.is_dataclass(t)]
        note = f.metadata.get("help", "")
        lines.append(f"{indent}{f.name}: {_type_name(hint)}{'  # ' + note if note else ''}")
        lines += [describe(t, indent + "  ") for t in nested if isinstance(t, type)]
    return "\n".join(lines)


def _type_name(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    for noise in ("typing.", "pathlib.", "vla.", "train.", "robot."):
        text = text.replace(noise, "")
    return text


def require(condition: object, message: str) -> None:
    """Raise `UsageError(message)` unless `condition` holds."""
    if not condition:
        raise UsageError(message)
