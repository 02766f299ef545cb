"""Camera pictures -> the square the model sees. The same function in training and on the arm."""

import cv2
import numpy as np


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """Scale (H, W, 3) uint8 RGB into (size, size, 3), keeping its aspect ratio, black bars centred.

    Shrinking averages areas (no aliasing); enlarging is bilinear.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = size / max(height, width)
    new_h, new_w = max(1, round(height * ratio)), max(1, round(width * ratio))
    scaled = cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR)
    if (new_h, new_w) == (size, size):
        return np.asarray(scaled)
    square = np.zeros((size, size, 3), np.uint8)
    top, left = (size - new_h) // 2, (size - new_w) // 2
    square[top : top + new_h, left : left + new_w] = scaled
    return square
