import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.images import letterbox, resize_with_pad


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_any_picture_becomes_the_square(height: int, width: int, size: int) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    square = resize_with_pad(image, size)
    assert square.shape == (size, size, 3)
    assert square.dtype == np.uint8
    assert set(np.unique(square)) <= {0, 200}
    filled = (square > 0)[..., 0]
    assert filled.max(axis=0).sum() == max(1, round(width * size / max(height, width)))
    assert filled.max(axis=1).sum() == max(1, round(height * size / max(height, width)))


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(resize_with_pad(image, 8), image)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_bars_are_black_and_centred(shape: tuple[int, int]) -> None:
    square = resize_with_pad(np.full((*shape, 3), 255, np.uint8), 8)
    if shape == (8, 4):
        square = square.transpose(1, 0, 2)
    assert (square[:2] == 0).all()
    assert (square[6:] == 0).all()
    assert (square[2:6] == 255).all()


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_bars_may_lie_before_the_picture(shape: tuple[int, int]) -> None:
    square = resize_with_pad(np.full((*shape, 3), 255, np.uint8), 8, "top_left")
    if shape == (8, 4):
        square = square.transpose(1, 0, 2)
    assert (square[:4] == 0).all()
    assert (square[4:] == 255).all()


def test_shrinking_averages_areas() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::4] = 200  # sampling at the middle of each target pixel would not see these lines
    assert (resize_with_pad(image, 16) == 50).all()


def test_enlarging_interpolates() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[:, 1] = 255
    values = resize_with_pad(image, 8)[4, :, 0].astype(int)
    assert (np.diff(values) >= 0).all()
    assert len(set(values.tolist())) > 2


def test_channels_keep_their_order() -> None:
    image = np.zeros((20, 10, 3), np.uint8) + np.array([10, 100, 200], np.uint8)
    assert resize_with_pad(image, 10)[5, 5].tolist() == [10, 100, 200]


@pytest.mark.parametrize(
    ("height", "width", "bars"), [(8, 12, np.s_[:, [0, 1, 10, 11]]), (10, 4, np.s_[[0, 1, 2, 7, 8, 9]])]
)
def test_a_picture_fits_into_any_shape_without_being_stretched(height: int, width: int, bars: tuple) -> None:
    boxed = letterbox(np.full((6, 6, 3), 255, np.uint8), height, width)
    assert boxed.shape == (height, width, 3)
    assert (boxed[bars] == 0).all()
    assert (boxed == 255).sum() == 3 * min(height, width) ** 2
