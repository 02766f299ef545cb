import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vla import files
from vla.errors import TandemError

# A writer that announces itself in the middle of its work and then waits to be killed.
KILLED = """
import sys, time
from pathlib import Path
from vla import files

path = Path(sys.argv[1])
if sys.argv[2] == "text":
    files.os.replace = lambda a, b: (print("half", flush=True), time.sleep(60))
    files.write_text(path, "new")
else:
    with files.whole_folder(path) as folder:
        (folder / "weights").write_text("new")
        print("half", flush=True)
        time.sleep(60)
"""


def kill_a_writer(path: Path, what: str) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, path, what], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        writer.send_signal(signal.SIGKILL)


def test_text_is_written_with_its_folders_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    files.write_text(path, "Größe")
    assert path.read_bytes() == "Größe".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["b.txt"]


def test_json_round_trip(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"ö": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ö": [1, 2.5, None]}


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "\ud800")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        files.write_text(tmp_path / "folder", "text")
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "folder"]


def test_a_killed_write_leaves_the_old_text_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    kill_a_writer(path, "text")
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    files.write_text(path, "newer")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "newer"


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "step" / "policy"
    with files.whole_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_text("w")
        assert not path.exists()
    assert (path / "deep" / "weights").read_text() == "w"
    assert os.listdir(path.parent) == ["policy"]
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_folder_replaces_the_whole_old_one(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    (path / "old").mkdir(parents=True)
    with files.whole_folder(path) as folder:
        (folder / "new").touch()
        assert os.listdir(path) == ["old"]
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["policy"]


def test_a_reader_finds_a_folder_at_every_moment_of_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    done, missed, read = threading.Event(), [], []

    def look() -> None:
        while not done.is_set():
            (read if (path / "7").exists() else missed).append(1)

    def replace() -> None:
        with files.whole_folder(path) as folder:
            for i in range(20):
                (folder / str(i)).touch()

    replace()
    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        replace()
    done.set()
    reader.join()
    assert read
    assert not missed


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_folder_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "policy"
    (path / "old").mkdir(parents=True)
    with pytest.raises(error), files.whole_folder(path) as folder:  # noqa: PT012  the block is what is tested
        (folder / "new").touch()
        raise error
    assert os.listdir(path) == ["old"]
    assert os.listdir(tmp_path) == ["policy"]


def test_a_killed_folder_leaves_the_old_one_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    (path / "old").mkdir(parents=True)
    kill_a_writer(path, "folder")
    assert os.listdir(path) == ["old"]
    assert len(os.listdir(tmp_path)) == 2
    with files.whole_folder(path) as folder:
        (folder / "new").touch()
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["policy"]


def test_what_a_living_writer_is_writing_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".policy.partial-{os.getppid()}-x"
    other.mkdir()
    with files.whole_folder(tmp_path / "policy") as folder:
        (folder / "new").touch()
    assert other.is_dir()


def test_a_folder_lost_between_two_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".policy.previous" / "old").mkdir(parents=True)
    with pytest.raises(ValueError, match="no"), files.whole_folder(tmp_path / "policy"):
        raise ValueError("no")
    assert os.listdir(tmp_path / "policy") == ["old"]


def test_an_output_folder_that_cannot_be_made_is_an_error_with_advice(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(TandemError, match=r"Cannot write to .*file/out.*another output folder"):
        files.require_writable(tmp_path / "file" / "out")


def test_a_read_only_output_folder_is_an_error_with_advice() -> None:
    with pytest.raises(TandemError, match=r"Cannot write to /proc/self.*another output folder"):
        files.require_writable(Path("/proc/self"))


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a" / "results.jsonl"
    assert files.read_json_lines(path) == []
    values = [{"ö": 1}, [2], "drei\n", None]
    for value in values:
        files.append_json_line(path, value)
    assert files.read_json_lines(path) == values


@pytest.mark.parametrize("torn", ['{"step": 3', "3", "{}"])
def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert files.read_json_lines(path) == [{"step": 1}, {"step": 2}]
    files.append_json_line(path, {"step": 3})
    assert files.read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_first_line_that_is_torn_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"st')
    files.append_json_line(path, 1)
    assert path.read_text() == "1\n"


def test_a_damaged_line_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("1\n{x}\n3\n")
    with pytest.raises(TandemError, match=r"results.jsonl, line 2, is not JSON"):
        files.read_json_lines(path)


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    code = "import sys; from pathlib import Path; from vla import files\n"
    code += "for i in range(400): files.append_json_line(Path(sys.argv[1]), [sys.argv[2], i, 'x' * 9000])"
    writers = [subprocess.Popen([sys.executable, "-c", code, path, str(n)]) for n in range(3)]
    assert [w.wait() for w in writers] == [0, 0, 0]
    lines = files.read_json_lines(path)
    assert sorted((n, i) for n, i, _ in lines) == sorted((str(n), i) for n in range(3) for i in range(400))


def test_a_line_that_another_process_is_writing_is_not_taken_for_torn(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with path.open("ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"a":')
        writer = threading.Thread(target=files.append_json_line, args=(path, 2))
        writer.start()
        writer.join(0.2)
        other.write(b" 1}\n")
    writer.join()
    assert files.read_json_lines(path) == [{"a": 1}, 2]
