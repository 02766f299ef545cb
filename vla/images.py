"""Camera pictures -> the picture the model sees. The same function in training and on the arm."""

from typing import Literal

import cv2
import numpy as np

Bars = Literal["centred", "top_left"]  # of what remains black: on both sides, or all of it before the picture (SmolVLA)


def resize_with_pad(image: np.ndarray, size: int, bars: Bars = "centred") -> np.ndarray:
    """As `letterbox`, into a square."""
    return letterbox(image, size, size, bars)


def letterbox(image: np.ndarray, height: int, width: int, bars: Bars = "centred") -> np.ndarray:
    """Scale (H, W, 3) uint8 RGB into (height, width, 3), keeping its aspect ratio, black bars beside it.

    Shrinking averages areas (no aliasing); enlarging is bilinear.
    """
    given_h, given_w = image.shape[:2]
    if (given_h, given_w) == (height, width):
        return image
    ratio = min(height / given_h, width / given_w)
    new_h, new_w = max(1, round(given_h * ratio)), max(1, round(given_w * ratio))
    scaled = cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR)
    if (new_h, new_w) == (height, width):
        return np.asarray(scaled)
    whole = np.zeros((height, width, 3), np.uint8)
    share = 2 if bars == "centred" else 1
    top, left = (height - new_h) // share, (width - new_w) // share
    whole[top : top + new_h, left : left + new_w] = scaled
    return whole
