"""How fast training rows come out of a LeRobot v3 data set: LeRobot's own reader against Tandem's.

  uv run python bench/bench_data.py                    writes a small synthetic data set and reads it
  uv run python bench/bench_data.py --root DIR         reads yours (standard keys observation.state and action)

Every reader gives batches of 16 random samples: all cameras as uint8, the state, a chunk of 50 actions with its
padding mask, the instruction. LeRobot's go through a DataLoader without workers; Tandem's are complete batches for
the loss (resized, normalised, tokenised). Readers take turns in one process on one thread; a ratio compares neighbours
of one round, so what else the computer does hits both. Figures are medians, with the extremes in brackets.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from train.compute_stats import compute
from train.dataset import LeRobotSource, View
from train.frame_cache import CacheConfig, cached
from train.lerobot_folder import Folder, open_folder
from train.loader import Loader, Member
from train.recipe import Language, Recipe, Split, Vector
from vla import config
from vla.codec import Codec
from vla.policy_config import PolicyConfig
from vla.processor import Processor
from vla.tokenizer import byte_level
from vla.types import ActionSpec

CHUNK, BATCH = 50, 16
STATE, ACTION = "observation.state", "action"
Read = Callable[[int], None]  # reads this many samples


def picture(rng: np.random.Generator, episode: int, step: int, camera: int, px: int) -> np.ndarray:
    """A textured background, two moving blobs and sensor noise: about 1.1 kB a frame at 256 px as LeRobot encodes."""
    y, x = np.mgrid[0:px, 0:px].astype(np.float32) / px
    waves = [0.5 + 0.3 * np.sin(9 * x + episode + c) * np.cos(7 * y + camera) for c in range(3)]
    image = np.stack(waves, -1) * 255 + rng.normal(0, 3, (px, px, 1))
    for k in range(2):
        cx = 0.5 + 0.3 * np.cos(0.05 * step + 2 * k + episode)
        cy = 0.5 + 0.3 * np.sin(0.04 * step + k + camera)
        image[(x - cx) ** 2 + (y - cy) ** 2 < 0.01] = [230, 50 + 127 * k, 25]
    return image.clip(0, 255).astype(np.uint8)


def write(root: Path, mode: str, episodes: int, frames: int, px: int) -> None:
    """A data set of two cameras with LeRobot's writer and its default encoding."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cameras = {
        f"observation.images.cam{c}": {"dtype": mode, "shape": (px, px, 3), "names": ["height", "width", "channels"]}
        for c in range(2)
    }
    numbers = {key: {"dtype": "float32", "shape": (dim,), "names": None} for key, dim in ((STATE, 8), (ACTION, 7))}
    data = LeRobotDataset.create("bench/data", 30, cameras | numbers, root=root, use_videos=mode == "video")
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        for step in range(frames):
            row: dict[str, Any] = {key: picture(rng, episode, step, c, px) for c, key in enumerate(cameras)}
            row |= {STATE: rng.standard_normal(8, np.float32), ACTION: rng.standard_normal(7, np.float32)}
            data.add_frame(row | {"task": f"task {episode % 4}"})
        data.save_episode()
    data.finalize()


def recipe_for(folder: Folder) -> Recipe:
    """All RGB cameras; the numbers' meaning does not matter here."""

    def vector(key: str) -> Vector:
        dim = folder.features[key]["shape"][0]
        names = tuple(f"{key}.{i}" for i in range(dim))
        spec = ActionSpec(names, ("1",) * dim, ("absolute",) * dim, (-1e9,) * dim, (1e9,) * dim, folder.fps)
        return Vector(key, spec)

    rgb = [k for k in folder.cameras if not (folder.features[k].get("info") or {}).get("is_depth_map")]
    cameras = {key.rpartition(".")[2]: key for key in rgb}
    everything = Split(0.0, 0, ())
    return Recipe(
        "bench", None, folder.root, None, "", cameras, vector(STATE), vector(ACTION), Language("task", None), everything
    )


def lerobot_reader(recipe: Recipe, fps: float, backend: str) -> Read:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    data: Any = LeRobotDataset(
        "bench/data",
        root=recipe.root,
        video_backend=backend,
        return_uint8=True,
        delta_timestamps={ACTION: [i / fps for i in range(CHUNK)]},
    )

    def batches() -> Iterator[Any]:
        for epoch in range(10**9):
            order = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(epoch))
            yield from torch.utils.data.DataLoader(data, BATCH, sampler=order, drop_last=True)

    stream = batches()
    next(stream)

    def read(samples: int) -> None:
        for _ in range(samples // BATCH):
            next(stream)

    return read


def tandem_reader(source: LeRobotSource, size: int) -> Read:
    recipe = source.recipe
    path = Path(__file__).resolve().parents[1] / "configs/sft_metaworld_flow.yaml"
    changes = {
        "chunk": CHUNK,
        "cameras": list(recipe.cameras),
        "image_size": size,
        "state_dim": recipe.state.spec.dim,
        "action_dim": recipe.action.spec.dim,
        "max_tokens": 128,
    }
    policy = config.build(PolicyConfig, config.read(path)["policy"] | changes)
    codec = Codec(compute([source]), policy.normalization, policy.state_dim, policy.action_dim)
    loader = Loader([Member(source, Processor(policy, byte_level(), codec), 1.0)], BATCH, 1, 0, 1, 0, 0)
    stream = loader.stream(0)
    next(stream)

    def read(samples: int) -> None:
        for _ in range(samples // BATCH):
            next(stream)

    return read


def equal_to_lerobot(recipe: Recipe, sources: list[LeRobotSource], size: int) -> bool:
    """On 24 random rows; pictures where they need no resizing."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    horizon = {ACTION: [i / sources[0].fps for i in range(CHUNK)]}
    data: Any = LeRobotDataset(
        "bench/data", root=recipe.root, video_backend="pyav", return_uint8=True, delta_timestamps=horizon
    )
    indices = np.random.default_rng(1).integers(0, len(data), 24)
    same = True
    for source in sources:
        raw, (images, _) = source.steps(indices), source.pictures(indices, View(tuple(recipe.cameras), size))
        for j, i in enumerate(indices.tolist()):
            item = data[i]
            same &= np.array_equal(raw.actions[j], item[ACTION].numpy())
            same &= np.array_equal(raw.state[j], item[STATE].numpy())
            for v, key in enumerate(recipe.cameras.values()):
                theirs = item[key] if item[key].dtype == torch.uint8 else (item[key] * 255).round().to(torch.uint8)
                if theirs.shape[1:] == (size, size):
                    same &= np.array_equal(images[j, v], theirs.permute(1, 2, 0).numpy())
    return same


def measure(readers: dict[str, Read], samples: dict[str, int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """reader -> {"cpu", "wall"} -> seconds a sample, one for each round; the order turns round by round."""
    costs: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"cpu": [], "wall": []})
    for number in range(rounds):
        for name in list(readers) if number % 2 == 0 else reversed(readers):
            wall, cpu = time.perf_counter(), time.process_time()
            readers[name](samples[name])
            costs[name]["cpu"].append((time.process_time() - cpu) / samples[name])
            costs[name]["wall"].append((time.perf_counter() - wall) / samples[name])
    return costs


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(costs: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    peers = [name for name in costs if name.startswith("LeRobot")]
    for name, cost in costs.items():
        rate = {clock: spread([1 / s for s in cost[clock]]) for clock in cost}
        ratios = {
            peer: {c: spread([p / s for p, s in zip(costs[peer][c], cost[c], strict=True)]) for c in cost}
            for peer in peers
        }
        result[name] = {"samples_per_s": rate, "ratio_to": ratios}
        print(f"{name:24s} {rate['wall']['median']:8.0f} samples/s, {1e3 * statistics.median(cost['cpu']):7.3f} CPU ms")
        for peer in peers if name not in peers else []:
            text = ", ".join(
                f"{ratios[peer][c]['median']:6.1f}x [{ratios[peer][c]['min']:.1f}..{ratios[peer][c]['max']:.1f}] {c}"
                for c in ("cpu", "wall")
            )
            print(f"    against {peer:20s} {text}")
    return result


def lerobot_backends(mode: str) -> list[str]:
    if mode == "image":
        return ["pyav"]  # not used for pictures in parquet files
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        print("torchcodec does not load here (it needs FFmpeg's shared libraries): LeRobot falls back to pyav.")
        return ["pyav"]
    return ["torchcodec", "pyav"]


def run(root: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    folder = open_folder(root)
    recipe = recipe_for(folder)
    mode = folder.features[folder.cameras[0]]["dtype"]
    size = max(max(folder.features[key]["shape"][:2]) for key in recipe.cameras.values())
    source = LeRobotSource(recipe, CHUNK, "train")
    mapped = cached(source, [View(tuple(recipe.cameras), size)], CacheConfig(scratch, 1000.0))
    print(
        f"{len(source.episodes)} episodes, {len(source)} frames, {len(recipe.cameras)} cameras at {size} px, {mode}; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    )
    same = equal_to_lerobot(recipe, [source, mapped], size)
    print(f"both readers equal LeRobot's tensors bit for bit: {same}")
    peers = {f"LeRobot {b if mode == 'video' else mode}": (source.fps, b) for b in lerobot_backends(mode)}
    readers = {name: lerobot_reader(recipe, *how) for name, how in peers.items()}
    readers |= {"Tandem": tandem_reader(source, size), "Tandem memory map": tandem_reader(mapped, size)}
    samples = dict.fromkeys(readers, 96 if mode == "video" else 32) | {"Tandem": 192, "Tandem memory map": 1600}
    result = report(measure(readers, samples, rounds))
    return {"equal": same, "cores": os.cpu_count(), "rounds": rounds, "frames": len(source), "readers": result}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, help="a LeRobot v3 data set; without it a synthetic one is written")
    p.add_argument("--mode", choices=["video", "image"], default="video", help="of the synthetic data set")
    p.add_argument("--episodes", type=int, default=6)
    p.add_argument("--frames", type=int, default=60, help="of each synthetic episode")
    p.add_argument("--px", type=int, default=256)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        root = args.root
        if root is None:
            root = Path(scratch) / "data"
            print(f"writing {args.episodes} episodes of {args.frames} frames with LeRobot's writer ...", flush=True)
            write(root, args.mode, args.episodes, args.frames, args.px)
        result = run(root, Path(scratch) / "maps", args.rounds)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
