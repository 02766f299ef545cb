import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vla import cli
from vla.errors import DataError, TandemError, UsageError


@dataclass(frozen=True)
class Optim:
    lr: float = field(metadata={"help": "peak learning rate"})


@dataclass(frozen=True)
class Job:
    out: Path
    optims: tuple[Optim, ...]


def fail(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_body_may_choose_the_exit_code(returned: int | None, code: int) -> None:
    assert cli.run(lambda: returned) == code


@pytest.mark.parametrize(("error", "code"), [(TandemError("a"), 1), (DataError("a"), 1), (UsageError("a"), 2)])
def test_a_users_error_is_one_line_and_a_code(error: TandemError, code: int, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(fail(error)) == code
    assert capsys.readouterr().err == "error: a\n"


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture) -> None:
    def body() -> None:
        with Path("/dev/full").open("wb", buffering=0) as f:
            f.write(b"x")

    assert cli.run(body) == 1
    assert capsys.readouterr().err.startswith("error: No space left on device. The disk is full: free some space")


def test_a_forbidden_file_is_named(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(fail(PermissionError(13, "Permission denied", "/a/b"))) == 1
    assert "(/a/b). You may not read or write there" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(2, "No such file"), ValueError()])
def test_a_defect_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        cli.run(fail(error))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_finally_blocks_run(signum: signal.Signals, capsys: pytest.CaptureFixture) -> None:
    tidied = []

    def body() -> None:
        try:
            os.kill(os.getpid(), signum)
            signal.pause()
        finally:
            tidied.append(True)

    before = signal.getsignal(signum)
    assert cli.run(body) == 130
    assert tidied == [True]
    assert f"interrupted by {signum.name}; run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signum) == before


def test_a_second_signal_ends_it_at_once() -> None:
    code = """
import time
from vla import cli
def body():
    try:
        print("ready", flush=True); time.sleep(60)
    finally:
        print("tidying", flush=True); time.sleep(60)
cli.run(body)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        job.terminate()
        assert job.stdout.readline() == "tidying\n"
        job.terminate()
        assert job.wait(10) == -signal.SIGTERM


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "from vla import cli; raise SystemExit(cli.run(lambda: [print('x' * 9) for _ in range(99_999)] and 0))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.read(10)
        job.stdout.close()
        assert job.stderr.read() == b""
        assert job.wait(10) == 1


def test_a_configuration_reaches_the_body(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("out: a\noptims: [{lr: 1.0}]\n")
    seen: list[Job] = []
    assert cli.config_main(Job, seen.append, "doc", [str(tmp_path / "a.yaml"), "optims.0.lr=1e-4"]) == 0
    assert seen == [Job(Path("a"), (Optim(1e-4),))]


def test_a_wrong_configuration_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.yaml").write_text("out: a\noptims: []\n")
    assert cli.config_main(Job, lambda _: None, "doc", [str(tmp_path / "a.yaml"), "ou=b"]) == 2
    assert "Did you mean 'out'?" in capsys.readouterr().err
    assert cli.config_main(Job, lambda _: None, "doc", [str(tmp_path / "b.yaml")]) == 2
    assert "Did you mean 'a.yaml'?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["out=b"], ["--nonsense"]])
def test_wrong_arguments_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.config_main(Job, lambda _: None, "doc", argv)
    assert caught.value.code == 2


def test_help_lists_every_key_with_its_type(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.config_main(Job, lambda _: None, "Does a job.\n\n  as written", ["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "Does a job.\n\n  as written" in shown
    assert "  out: Path\n" in shown
    assert "    lr: float  # peak learning rate\n" in shown


def test_require() -> None:
    cli.require(True, "unused")
    with pytest.raises(UsageError, match="no"):
        cli.require([], "no")
