import builtins
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from robot import film
from vla.errors import MissingDependency, TandemError


def frames(count: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    """Pictures whose grey level tells their number."""
    return [np.full((height, width, 3), 20 * (i + 1), np.uint8) for i in range(count)]


def decoded(path: Path) -> list[np.ndarray]:
    pictures = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            pictures.append(frame.to_ndarray(format="rgb24"))
    return pictures


def test_a_film_is_h264_in_mp4_as_browsers_want_it(tmp_path: Path) -> None:
    path = tmp_path / "videos" / "a.mp4"
    film.write(path, frames(5, height=63, width=65), rate_hz=40.0)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert container.format.name.split(",")[0] in ("mov", "mp4")
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.height, stream.width) == (64, 66)
        assert stream.average_rate == 40
    pictures = decoded(path)
    assert [round(float(p.mean()) / 20) for p in pictures] == [1, 2, 3, 4, 5]
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index must come first"


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed")
def test_another_program_reads_it(tmp_path: Path) -> None:
    film.write(tmp_path / "a.mp4", frames(7), rate_hz=10.0)
    query = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json", str(tmp_path / "a.mp4")]
    done = subprocess.run(query, check=True, capture_output=True, text=True)
    stream = json.loads(done.stdout)["streams"][0]
    assert (stream["codec_name"], stream["nb_read_frames"], stream["r_frame_rate"]) == ("h264", "7", "10/1")


def test_a_failed_film_leaves_nothing_behind(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (100, 64, 64, 3), np.uint8)  # enough to reach the disk
    with pytest.raises(TandemError, match="one size"):
        film.write(tmp_path / "a.mp4", [*noise, *frames(1, width=80)], 10.0)
    with pytest.raises(TandemError, match="at least one"):
        film.write(tmp_path / "a.mp4", [], 10.0)
    with pytest.raises(TandemError, match="uint8"):
        film.write(tmp_path / "a.mp4", [np.zeros((8, 8, 3))], 10.0)
    assert list(tmp_path.iterdir()) == []


def border(picture: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in picture[0, 0])


def test_the_border_tells_how_it_ends() -> None:
    success = list(film.captioned(frames(4), "open it", first_success_step=2, linger=3))
    assert [border(p) for p in success] == [film.NEUTRAL] * 2 + [film.GREEN] * 5
    failure = list(film.captioned(frames(2), "open it", first_success_step=None, linger=1))
    assert [border(p) for p in failure] == [film.RED] * 3


def test_instruction_and_step_are_written_below_the_enlarged_picture() -> None:
    first, second = film.captioned([frames(1)[0]] * 2, "open the faucet", first_success_step=None, linger=0)
    assert min(first.shape[:2]) >= film.SMALLEST
    caption = slice(-film.CAPTION - film.BORDER, -film.BORDER)
    assert np.array_equal(first[: -film.CAPTION - film.BORDER], second[: -film.CAPTION - film.BORDER])
    assert not np.array_equal(first[caption], second[caption]), "the step must show"
    (other,) = film.captioned([frames(1)[0]], "close the faucet", first_success_step=None, linger=0)
    assert not np.array_equal(first[caption], other[caption]), "the instruction must show"


def test_long_and_foreign_instructions_fit() -> None:
    (picture,) = film.captioned([frames(1)[0]], "grüße " + "very " * 200 + "long", first_success_step=None, linger=0)
    assert border(picture) == film.RED
    right = picture[-film.CAPTION : -film.BORDER, -film.BORDER :]
    assert (right == film.RED).all(), "text must not run into the border"


def test_without_pyav_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_av(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(MissingDependency, match="uv pip install"):
        film.write(tmp_path / "a.mp4", frames(1), 10.0)
