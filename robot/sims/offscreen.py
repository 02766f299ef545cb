"""Pictures of a MuJoCo model without a window. The only file that opens a GL context.

Rendering in software (EGL on llvmpipe) is the whole cost of a simulated step, and MuJoCo's defaults
are made for a GPU: at 96 px the shadow map and fourfold anti-aliasing take 92 of 100 CPU-ms of a
Meta-World frame. `LOOKS` holds the two settings worth having.
"""

import atexit
import functools
import os
import types
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla.errors import MissingDependency

APT = "sudo apt-get install --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri"
Look = Literal["policy", "film"]


@dataclass(frozen=True)
class _Quality:
    samples: int  # anti-aliasing samples per pixel
    off: tuple[str, ...]  # mjtRndFlag names, without the prefix, that are switched off


LOOKS: dict[Look, _Quality] = {
    "policy": _Quality(samples=0, off=("SHADOW", "REFLECTION", "SKYBOX", "HAZE")),
    "film": _Quality(samples=4, off=("SHADOW",)),
}


def load_mujoco() -> types.ModuleType:
    """Import mujoco with `MUJOCO_GL=egl` unless the variable is set.

    Raises:
        MissingDependency: mujoco, or the system library it draws with, is not installed.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise MissingDependency(f"{error}. The simulator needs MuJoCo: pip install 'tandem-vla[metaworld]'.") from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise no_gl(error) from error
    return mujoco


def no_gl(error: object) -> MissingDependency:
    return MissingDependency(
        f"MuJoCo cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({error}). "
        f"For pictures without a window install EGL ({APT}) and set MUJOCO_GL=egl, or leave it unset."
    )


def _context_class() -> Any:
    """What MUJOCO_GL names now: mujoco itself looks only once, when somebody first imports it."""
    if os.environ["MUJOCO_GL"].lower() == "egl":
        from mujoco.egl import GLContext
    elif os.environ["MUJOCO_GL"].lower() == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco import GLContext
    return GLContext


class Renderer:
    """One camera of one model at one size, in a GL context of its own.

    Every call makes its own context current first. Without that, the second of two renderers alive
    would lend its meshes and textures to the first, silently. Use one from one thread only.
    """

    def __init__(self, model: Any, camera: str, size: int, look: Look) -> None:
        """`size` is height and width in pixels; `camera` is the name of a fixed camera of `model`.

        Raises:
            MissingDependency: no GL context can be opened.
        """
        self._context: Any = None  # set first: `close` must work on a half-made object
        self._gl: Any = None
        mj = self._mj = load_mujoco()
        self._model, self.size = model, size
        quality = LOOKS[look]
        # MjrContext reads these when it is made, and never again.
        model.vis.quality.offsamples = quality.samples
        model.vis.quality.shadowsize = 0  # no look has shadows: spare the map, 0.1 CPU-s to allocate
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._camera = mj.MjvCamera()
        self._camera.type = mj.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = model.camera(camera).id
        self._option = mj.MjvOption()
        self._scene = mj.MjvScene(model, maxgeom=2000)
        for flag in quality.off:
            self._scene.flags[getattr(mj.mjtRndFlag, f"mjRND_{flag}")] = 0
        self._rect = mj.MjrRect(0, 0, size, size)
        try:
            self._gl = _context_class()(size, size)
            # Registered after EGL's own exit handler, so that it runs before it: freeing a context
            # of a display already shut down prints tracebacks over the last lines of a run.
            _close_at_exit()
            _LIVE.add(self)
            self._gl.make_current()
            self._context = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_100.value)
        except (ImportError, AttributeError, OSError, RuntimeError, mj.FatalError) as error:
            raise no_gl(error) from error
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)

    def render(self, data: Any) -> np.ndarray:
        """(size, size, 3) uint8 RGB of the state in `data`, the first row is the camera's lowest one.

        That is OpenGL's order; whoever knows how the camera is mounted turns the picture upright.
        """
        mj = self._mj
        self._gl.make_current()
        category = mj.mjtCatBit.mjCAT_ALL.value
        mj.mjv_updateScene(self._model, data, self._option, None, self._camera, category, self._scene)
        mj.mjr_render(self._rect, self._scene, self._context)
        pixels = np.empty((self.size, self.size, 3), np.uint8)
        mj.mjr_readPixels(pixels, None, self._rect, self._context)
        return pixels

    def close(self) -> None:
        """Free the context; may be called twice."""
        if self._context is not None:
            self._gl.make_current()  # else the objects of whichever context is current are deleted
            self._context.free()
            self._context = None
        if self._gl is not None:
            self._gl.free()
            self._gl = None

    def __del__(self) -> None:
        self.close()


_LIVE: weakref.WeakSet[Renderer] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    def close_all() -> None:
        for renderer in list(_LIVE):
            renderer.close()

    atexit.register(close_all)
