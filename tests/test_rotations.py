"""Rotations in vectors: every form reads what it writes, and what lies between two is on the geodesic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation as SO3

from vla import rotations
from vla.errors import TandemError
from vla.types import Rotation

FORMS: tuple[Rotation, ...] = ("axis_angle", "euler_xyz", "quaternion_xyzw", "rot6d")
vectors = st.tuples(*[st.floats(-1.7, 1.7)] * 3).map(np.array)  # rotation vectors


def angle(a: SO3, b: SO3) -> float:
    return float((a.inv() * b).magnitude())


@pytest.mark.parametrize("form", FORMS)
@given(vectors)
def test_what_is_written_is_read(form: Rotation, vector: np.ndarray) -> None:
    given_, numbers = SO3.from_rotvec(vector[None]), rotations.express(SO3.from_rotvec(vector[None]), form)
    assert numbers.shape == (1, rotations.WIDTH[form])
    assert rotations.parse(numbers, form).approx_equal(given_, atol=1e-7).all()


def test_rot6d_is_the_first_two_columns() -> None:
    quarter = SO3.from_rotvec([[0, 0, np.pi / 2]])  # x -> y, y -> -x
    assert np.allclose(rotations.express(quarter, "rot6d"), [[0, 1, 0, -1, 0, 0]])
    assert rotations.parse(np.array([[0, 2.0, 0, -3, 1, 0]]), "rot6d").approx_equal(quarter).all()


def test_euler_angles_are_about_fixed_axes() -> None:
    both = rotations.parse(np.array([[np.pi / 2, 0, np.pi / 2]]), "euler_xyz")[0]
    assert np.allclose(both.apply([0, 1, 0]), [0, 0, 1], atol=1e-12)  # about x: y -> z; about z: z stays


def test_the_middle_of_almost_half_a_turn_is_a_quarter_turn_about_the_same_axis() -> None:
    """Component by component the two rotation vectors would meet near no rotation at all."""
    epsilon = 0.02
    start = SO3.from_rotvec(np.array([np.pi - epsilon / 2, 0, 0]))
    end = SO3.from_rotvec(np.array([-(np.pi - epsilon / 2), 0, 0]))  # epsilon further on, past half a turn
    middle = rotations.interpolate(start, end, np.array([0.5]))[0]
    assert angle(start, middle) == pytest.approx(epsilon / 2)
    assert angle(middle, SO3.from_rotvec([np.pi, 0, 0])) < 1e-9
    component_wise = SO3.from_rotvec((start.as_rotvec() + end.as_rotvec()) / 2)
    assert angle(start, component_wise) > 3

    far = SO3.from_rotvec(np.array([0, 0, np.pi - epsilon]))
    middle = rotations.interpolate(SO3.identity(), far, np.array([0.5]))[0]
    assert angle(SO3.identity(), middle) == pytest.approx((np.pi - epsilon) / 2)
    assert angle(middle, far) == pytest.approx((np.pi - epsilon) / 2)
    matrices = (np.eye(3) + far.as_matrix()) / 2
    assert abs(np.linalg.det(matrices) - 1) > 0.9, "nor are the matrices' means rotations"


@given(vectors, vectors, st.floats(0, 1))
def test_the_way_between_two_is_even_and_shortest(a: np.ndarray, b: np.ndarray, share: float) -> None:
    start, end = SO3.from_rotvec(a), SO3.from_rotvec(b)
    between = rotations.interpolate(start, end, np.array([share]))[0]
    assert angle(start, between) == pytest.approx(share * angle(start, end), abs=1e-6)
    assert angle(between, end) == pytest.approx((1 - share) * angle(start, end), abs=1e-6)


@pytest.mark.parametrize("form", ["axis_angle", "euler_xyz", "quaternion_xyzw"])
def test_numbers_do_not_jump_where_a_form_has_several(form: Rotation) -> None:
    turning = SO3.from_rotvec(np.linspace([0, 0, 2.5], [0, 0, 4.5], 30))  # past half a turn
    near = rotations.express(turning[:1], form)[0]
    for sign in (1, -1) if form == "quaternion_xyzw" else (1,):
        numbers = rotations.express(turning, form, sign * near)
        assert np.abs(np.diff(numbers, axis=0)).max() < 0.1
        assert np.allclose(numbers[0], sign * near)
        assert rotations.parse(numbers, form).approx_equal(turning, atol=1e-9).all()


def test_what_is_no_rotation_is_refused() -> None:
    with pytest.raises(TandemError, match="'quaternion_xyzw' have 4 numbers"):
        rotations.parse(np.zeros((1, 3)), "quaternion_xyzw")
    with pytest.raises(TandemError, match="no rotation"):
        rotations.parse(np.zeros((1, 4)), "quaternion_xyzw")
    with pytest.raises(TandemError, match="'none'"):
        rotations.parse(np.zeros((1, 0)), "none")
