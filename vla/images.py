"""Camera pictures -> the picture the model sees. The same function in training and on the arm."""

import cv2
import numpy as np


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """As `letterbox`, into a square."""
    return letterbox(image, size, size)


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (H, W, 3) uint8 RGB into (height, width, 3), keeping its aspect ratio, black bars centred.

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
    top, left = (height - new_h) // 2, (width - new_w) // 2
    whole[top : top + new_h, left : left + new_w] = scaled
    return whole
