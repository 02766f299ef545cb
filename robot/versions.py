"""What a result was made with, so that two results can be told apart later."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

PACKAGES = ("tandem-vla", "numpy", "scipy", "mujoco", "metaworld", "torch", "transformers", "lerobot")


def collect() -> dict[str, str]:
    """Package -> version for the packages that are installed, and Python and the processor's kind."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gl_renderer() -> str:
    """Who draws in the GL context that is current in this thread, "" if nobody has drawn.

    Pictures differ between renderers, and with them the results of a policy that looks at pictures.
    """
    if "mujoco" not in sys.modules:
        return ""
    from OpenGL import GL, error

    try:
        name = GL.glGetString(GL.GL_RENDERER)
    except error.Error:
        return ""
    return name.decode(errors="replace") if isinstance(name, bytes) else ""
