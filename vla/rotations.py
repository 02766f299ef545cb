"""Rotations as they stand in state and action vectors: read, written, and interpolated on SO(3). No torch.

axis_angle       (3,) rotation vector, rad
euler_xyz        (3,) angles about the fixed axes x, y, z in this order, rad
quaternion_xyzw  (4,) unit quaternion, scalar last
rot6d            (6,) the first two columns of the matrix, one after the other (Zhou et al., CVPR 2019)
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation as SO3

from vla.errors import TandemError
from vla.types import Rotation

WIDTH: dict[Rotation, int] = {"none": 0, "axis_angle": 3, "euler_xyz": 3, "quaternion_xyzw": 4, "rot6d": 6}


def parse(values: np.ndarray, form: Rotation) -> SO3:
    """(N, WIDTH[form]) numbers -> N rotations.

    Raises:
        TandemError: the width is not the form's, or numbers that stand for no rotation.
    """
    if form == "none" or values.ndim != 2 or values.shape[1] != WIDTH[form]:
        raise TandemError(f"Rotations of form {form!r} have {WIDTH[form]} numbers each, got shape {values.shape}.")
    values = values.astype(np.float64)
    try:
        if form == "axis_angle":
            return SO3.from_rotvec(values)
        if form == "euler_xyz":
            return SO3.from_euler("xyz", values)
        if form == "quaternion_xyzw":
            return SO3.from_quat(values)
        return SO3.from_matrix(_orthonormal(values))
    except ValueError as error:
        raise TandemError(f"Numbers of form {form!r} that are no rotation: {error}.") from error


def express(rotations: SO3, form: Rotation, near: np.ndarray | None = None) -> np.ndarray:
    """N rotations -> (N, WIDTH[form]) float64: of a form's equal numbers those that follow without a jump.

    Args:
        near: (WIDTH[form],) numbers that the first row is to follow; None: as SciPy writes it.
    """
    if form == "rot6d":
        return np.swapaxes(rotations.as_matrix()[..., :2], -1, -2).reshape(len(rotations), 6)
    if form == "quaternion_xyzw":
        values = rotations.as_quat(canonical=True)
        before = values[0] if near is None else near
        for row in values:
            row *= 1.0 if row @ before >= 0 else -1.0
            before = row
        return values
    values = rotations.as_rotvec() if form == "axis_angle" else rotations.as_euler("xyz")
    turned = _whole_turns if form == "axis_angle" else _whole_angles
    before = values[0] if near is None else near
    for i, row in enumerate(values):
        before = values[i] = turned(row, before)
    return values


def interpolate(start: SO3, end: SO3, shares: np.ndarray) -> SO3:
    """The geodesic from one rotation to another: `start` times exp(share * log(start^-1 end)), at N shares of 0..1."""
    return start * SO3.from_rotvec(shares[:, None] * (start.inv() * end).as_rotvec())


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """(N, 6) two columns -> (N, 3, 3), by Gram and Schmidt."""
    a, b = columns[:, :3], columns[:, 3:]
    x = a / np.linalg.norm(a, axis=1, keepdims=True)
    y = b - (x * b).sum(axis=1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return np.stack((x, y, np.cross(x, y)), axis=-1)


def _whole_turns(vector: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Of the rotation vectors of one rotation, which differ by whole turns about its axis, the nearest."""
    angle = np.linalg.norm(vector)
    if angle < 1e-9:
        return vector
    axis = vector / angle
    return axis * (angle + 2 * np.pi * np.round((before @ axis - angle) / (2 * np.pi)))


def _whole_angles(angles: np.ndarray, before: np.ndarray) -> np.ndarray:
    return angles + 2 * np.pi * np.round((before - angles) / (2 * np.pi))
