"""Films of episodes: h264 in mp4 that browsers play. PyAV is imported when a film is written."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vla.errors import MissingDependency, TandemError

NEUTRAL, GREEN, RED = (90, 90, 90), (40, 170, 70), (200, 50, 50)  # RGB
BORDER = 6  # pixels
CAPTION = 44  # pixels, two lines of text below the picture
SMALLEST = 256  # pixels, a smaller picture is enlarged so that the caption can be read


def write(path: Path, frames: Iterable[np.ndarray], rate_hz: float) -> None:
    """Encode `frames`, each (H, W, 3) uint8 RGB of one size, as an mp4 at `path`, whole or not at all.

    yuv420p, an even size (the last row or column is repeated if need be), and the index at the front
    so that a browser starts playing before it has the whole file.

    Raises:
        MissingDependency: PyAV is not installed.
        TandemError: there are no frames, or their sizes differ.
    """
    av = _av()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            _encode(container, frames, Fraction(rate_hz).limit_denominator(1000))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(container: Any, frames: Iterable[np.ndarray], rate: Fraction) -> None:
    av = _av()
    stream, first = None, None
    for frame in frames:
        picture = _even(frame)
        if first is None:
            first = picture.shape
            stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "veryfast"})
            stream.height, stream.width = first[:2]
            stream.pix_fmt = "yuv420p"
        if stream is None or picture.shape != first:
            raise TandemError(f"Frames of one film must have one size, got {first} and {picture.shape}.")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    if stream is None:
        raise TandemError("A film needs at least one frame.")
    container.mux(stream.encode())


def _even(frame: np.ndarray) -> np.ndarray:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise TandemError(f"A film frame must be (H, W, 3) uint8 RGB, got {frame.shape} {frame.dtype}.")
    odd = (frame.shape[0] % 2, frame.shape[1] % 2)
    return np.pad(frame, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge") if any(odd) else frame


def captioned(
    frames: Iterable[np.ndarray], instruction: str, first_success_step: int | None, linger: int
) -> Iterator[np.ndarray]:
    """`frames` (step 0 first) with instruction, step and a border that tells how it ends.

    The border is red throughout a failure; in a success it is grey until the step that succeeds, then
    green. The last frame stays for `linger` more frames.
    """
    shown = None
    for step, frame in enumerate(frames):
        solved = first_success_step is not None and step >= first_success_step
        colour = GREEN if solved else RED if first_success_step is None else NEUTRAL
        shown = _decorate(frame, instruction, f"step {step}", colour)
        yield shown
    if shown is not None:
        for _ in range(linger):
            yield shown


def _decorate(frame: np.ndarray, instruction: str, note: str, colour: tuple[int, int, int]) -> np.ndarray:
    scale = -(-SMALLEST // min(frame.shape[:2]))  # 1 for a picture that is large enough
    picture = frame.repeat(scale, 0).repeat(scale, 1) if scale > 1 else frame
    height, width = picture.shape[:2]
    canvas = np.empty((height + CAPTION + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    canvas[:] = colour
    canvas[BORDER : BORDER + height, BORDER : BORDER + width] = picture
    canvas[BORDER + height : -BORDER, BORDER : BORDER + width] = 20
    letters = max(10, width // 8)
    lines = textwrap.wrap(instruction, letters - len(note) - 2, max_lines=2, placeholder="...") or [""]
    for i, line in enumerate(lines):
        _put(canvas, line, (BORDER + 4, BORDER + height + 18 + 18 * i))
    _put(canvas, note, (BORDER + width - 8 * len(note) - 2, BORDER + height + 18))
    return canvas


def _put(canvas: np.ndarray, text: str, corner: tuple[int, int]) -> None:
    plain = text.encode("ascii", "replace").decode()  # OpenCV's built-in font has ASCII only
    cv2.putText(canvas, plain, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235, 235, 235), 1, cv2.LINE_AA)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependency(
            "Films need PyAV, which is not installed. Install it: uv pip install 'av>=15,<16'; "
            "or switch films off: films.failures=0 films.successes=0"
        ) from error
    return av
