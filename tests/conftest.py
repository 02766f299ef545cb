"""Fixtures that several test files share."""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from train.recipe import Language, Recipe, Split, Vector
from vla.types import ActionSpec

# The time an example takes says more about the machine's load than about the code.
settings.register_profile("tandem", deadline=None)
settings.load_profile("tandem")

LENGTHS = (13, 7, 10, 16)  # frames of the episodes of the small data sets


def unit_spec(prefix: str, dim: int, rate_hz: float) -> ActionSpec:
    names = tuple(f"{prefix}{i}" for i in range(dim))
    return ActionSpec(names, ("1",) * dim, ("absolute",) * dim, (-9.0,) * dim, (9.0,) * dim, rate_hz)


def picture(episode: int, step: int, camera: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 that differs for every episode, step and camera and survives compression."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 3 + 17 * episode, y * 4 + 9 * step, (x + y) * 2 + 60 * camera], -1)
    base[(y // 4 + step) % 5 == 0] += 40
    return (base % 256).astype(np.uint8)


@pytest.fixture(scope="session")
def write_lerobot() -> Callable[..., Path]:
    """Writes a small data set with LeRobot's own writer."""

    def write(root: Path, mode: str, *, fps: int, cameras: dict[str, tuple[int, int]], **options: Any) -> Path:
        from lerobot.configs import RGBEncoderConfig
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        pictures = {
            key: {"dtype": mode, "shape": (*size, 3), "names": ["height", "width", "channels"]}
            for key, size in cameras.items()
        }
        numbers = {
            "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
            "action": {"dtype": "float32", "shape": (2,), "names": None},
        }
        encoder = RGBEncoderConfig(**options.pop("encoder", {}))
        data = LeRobotDataset.create(
            "test/small", fps, pictures | numbers, root=root, use_videos=mode == "video", rgb_encoder=encoder, **options
        )
        rng = np.random.default_rng(0)
        for episode, length in enumerate(LENGTHS):
            for step in range(length):
                frame: dict[str, Any] = {
                    key: picture(episode, step, c, *size) for c, (key, size) in enumerate(cameras.items())
                }
                frame["observation.state"] = rng.standard_normal(3).astype(np.float32)
                frame["action"] = rng.standard_normal(2).astype(np.float32)
                data.add_frame(frame | {"task": f"task {episode % 3}"})
            data.save_episode()
        data.finalize()
        return root

    return write


@pytest.fixture(scope="session")
def video_root(tmp_path_factory: pytest.TempPathFactory, write_lerobot: Callable[..., Path]) -> Path:
    """Two cameras of different shapes, 10 frames/s, all episodes in one AV1 file for each camera."""
    cameras = {"observation.images.top": (48, 64), "observation.images.wrist": (64, 64)}
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / "video", "video", fps=10, cameras=cameras)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory, write_lerobot: Callable[..., Path]) -> Path:
    """One camera named unlike the others, 15 frames/s, pictures inside the parquet file."""
    return write_lerobot(
        tmp_path_factory.mktemp("lerobot") / "image", "image", fps=15, cameras={"observation.image": (40, 40)}
    )


@pytest.fixture(scope="session")
def recipe_of() -> Callable[..., Recipe]:
    """A recipe for a data set of `write_lerobot`."""

    def make(root: Path, cameras: dict[str, str], rate_hz: float, **changes: Any) -> Recipe:
        given: dict[str, Any] = {
            "name": "small",
            "repo_id": None,
            "root": root,
            "revision": None,
            "licence": "none",
            "cameras": cameras,
            "state": Vector("observation.state", unit_spec("s", 3, rate_hz)),
            "action": Vector("action", unit_spec("a", 2, rate_hz)),
            "language": Language("task", None),
            "split": Split(0.0, 0, ()),
        }
        return Recipe(**(given | changes))

    return make


@pytest.fixture(scope="session")
def video_recipe(video_root: Path, recipe_of: Callable[..., Recipe]) -> Recipe:
    return recipe_of(video_root, {"top": "observation.images.top", "wrist": "observation.images.wrist"}, 10.0)


@pytest.fixture(scope="session")
def image_recipe(image_root: Path, recipe_of: Callable[..., Recipe]) -> Recipe:
    return recipe_of(image_root, {"top": "observation.image"}, 15.0)


@pytest.fixture(scope="session")
def tiny_run() -> dict[str, Any]:
    """The names of tests/programs/tiny_run.py: a training run of a tiny module, in this process."""
    return runpy.run_path(str(Path(__file__).parent / "programs/tiny_run.py"))


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The names of tests/programs/head_kit.py: small heads with a random context."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "programs/head_kit.py")))


@pytest.fixture(scope="session")
def policies() -> SimpleNamespace:
    """The names of tests/programs/policy_kit.py: a small policy's settings, an observation, a batch."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "programs/policy_kit.py")))
