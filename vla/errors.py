"""Errors a user can act on.

    TandemError            exit code 1: something given to us is wrong or has failed
    ├── UsageError         exit code 2: the command line or a configuration is wrong
    ├── SpecMismatch       two sides of a connection disagree on what state or action numbers mean
    ├── DataError          a data set is broken or does not fit its recipe
    ├── CheckpointError    a checkpoint folder is incomplete, damaged or foreign
    └── MissingDependency  an optional package or system library is not installed

Every message says what was given, what is allowed, and what to do.
"""

import difflib
from collections.abc import Iterable


class TandemError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 1


class UsageError(TandemError):
    exit_code = 2


class SpecMismatch(TandemError):
    pass


class DataError(TandemError):
    pass


class CheckpointError(TandemError):
    pass


class MissingDependency(TandemError):
    pass


def choose_from(given: object, valid: Iterable[str]) -> str:
    """The tail of an error message: the nearest valid name, then all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Valid: {', '.join(names) or '(none)'}."
