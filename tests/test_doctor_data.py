"""Each test breaks a clean data set in one way and expects the doctor to say that, and nothing else."""

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train import doctor_data
from train.findings import Finding
from train.recipe import Language, Recipe, Split, Vector
from vla.images import resize_with_pad
from vla.types import ActionSpec

FPS = 10
STATE, ACTION, FRONT = "observation.state", "action", "observation.images.front"
KEYS = {name: f"observation.images.{name}" for name in ("front", "dark", "frozen", "halting", "twin")}
NAMES = ("arm.x", "arm.y", "gripper")


@dataclass(frozen=True)
class Episode:
    state: np.ndarray  # (T, 3)
    action: np.ndarray  # (T, 3), the next state: absolute targets
    task: str


def episode(seed: int, length: int = 12) -> Episode:
    """Two joints on smooth paths and a gripper that closes half-way."""
    rng = np.random.default_rng(seed)
    time = np.arange(length + 1) / 12
    arm = np.sin(2 * np.pi * (time[:, None] * rng.uniform(0.5, 1.5, 2) + rng.uniform(0, 1, 2)))
    opening = np.clip(1.5 - 2 * time, 0, 1)
    path = np.concatenate([arm, opening[:, None]], axis=1)
    action = path[1:].copy()
    action[:, 2] = time[1:] < 0.5
    return Episode(path[:-1], action, f"put block {seed % 2} away")


def picture(seed: int, step: int) -> np.ndarray:
    """(32, 32, 3) uint8: a bright square that moves over a background of its own."""
    image = np.full((32, 32, 3), 60 + 20 * seed, np.uint8)
    at = 2 * step % 24
    image[at : at + 8, at : at + 8] = (250, 200, 40)
    return image


def views(seed: int, step: int) -> dict[str, np.ndarray]:
    halted = step if step < 4 else 4
    return {
        KEYS["front"]: picture(seed, step),
        KEYS["dark"]: np.full((32, 32, 3), 3, np.uint8),
        KEYS["frozen"]: picture(seed + 3, 0),
        KEYS["halting"]: picture(seed + 6, halted),
        KEYS["twin"]: picture(seed, step),
    }


def write(
    root: Path, episodes: Sequence[Episode], mode: str, cameras: Sequence[str] = (FRONT,), side: int = 32
) -> Path:
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: dict[str, Any] = {
        key: {"dtype": "float32", "shape": (3,), "names": list(NAMES)} for key in (STATE, ACTION)
    } | {key: {"dtype": mode, "shape": (side, side, 3), "names": ["height", "width", "channels"]} for key in cameras}
    data = LeRobotDataset.create(
        "test/doctor", FPS, features, root=root, use_videos=mode == "video", rgb_encoder=RGBEncoderConfig(vcodec="h264")
    )
    for seed, e in enumerate(episodes):
        for step in range(len(e.state)):
            numbers = {STATE: e.state[step].astype(np.float32), ACTION: e.action[step].astype(np.float32)}
            shots = {key: resize_with_pad(image, side) for key, image in views(seed, step).items() if key in cameras}
            data.add_frame(numbers | shots | {"task": e.task})
        data.save_episode()
    data.finalize()
    return root


SPEC = ActionSpec(
    names=NAMES,
    units=("rad", "rad", "1"),
    reference=("absolute",) * 3,
    low=(-2.0, -2.0, 0.0),
    high=(2.0, 2.0, 1.0),
    rate_hz=FPS,
    gripper="open_high",
)


def recipe_for(root: Path, cameras: Mapping[str, str] | None = None) -> Recipe:
    return Recipe(
        name="doctored",
        repo_id=None,
        root=root,
        revision=None,
        licence="none",
        cameras=dict(cameras or {"front": FRONT}),
        state=Vector(STATE, SPEC),
        action=Vector(ACTION, SPEC),
        language=Language("task", None),
        split=Split(0.0, 0, ()),
    )


@pytest.fixture(scope="session")
def clean_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("doctor") / "clean", [episode(i) for i in range(3)], "video")


@pytest.fixture(scope="session")
def cameras_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor") / "cameras"
    return write(root, [episode(i) for i in range(3)], "image", list(KEYS.values()))


@pytest.fixture
def copy(clean_root: Path, tmp_path: Path) -> Recipe:
    """A recipe for a copy of the clean data set, to be broken."""
    shutil.copytree(clean_root, tmp_path / "copy")
    return recipe_for(tmp_path / "copy")


def change_rows(recipe: Recipe, column: str, change: Callable[[np.ndarray], object]) -> None:
    """Change a column of the rows in place."""
    assert recipe.root
    (path,) = (recipe.root / "data").glob("*/*.parquet")
    table = pq.read_table(path)
    values = np.array(table.column(column).to_pylist())
    change(values)
    place = table.column_names.index(column)
    new = pa.array(values.tolist(), table.column(column).type)
    pq.write_table(table.set_column(place, table.field(place), new), path)


def change_vectors(recipe: Recipe, change: Callable[[np.ndarray, np.ndarray], object]) -> None:
    """Change states and actions (36, 3) together, in place."""
    assert recipe.root
    (path,) = (recipe.root / "data").glob("*/*.parquet")
    state, action = (np.array(pq.read_table(path).column(key).to_pylist()) for key in (STATE, ACTION))
    change(state, action)
    change_rows(recipe, STATE, lambda v: np.copyto(v, state))
    change_rows(recipe, ACTION, lambda v: np.copyto(v, action))


def with_action(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, action=Vector(ACTION, replace(SPEC, **changes)))


def found(recipe: Recipe) -> list[Finding]:
    return doctor_data.examine(recipe, 0)


def verdicts(recipe: Recipe) -> list[tuple[str, str]]:
    """(severity, check) of all errors and warnings."""
    return [(f.severity, f.check) for f in found(recipe) if f.severity != "info"]


def only(recipe: Recipe, severity: str, check: str) -> Finding:
    """The one finding above info, which must be this one."""
    serious = [f for f in found(recipe) if f.severity != "info"]
    assert [(f.severity, f.check) for f in serious] == [(severity, check)]
    return serious[0]


def test_a_clean_data_set_is_clean(clean_root: Path) -> None:
    assert found(recipe_for(clean_root)) == []


def test_nan_action(copy: Recipe) -> None:
    def change(actions: np.ndarray) -> None:
        actions[17, 1], actions[30, 1] = np.nan, np.inf

    change_rows(copy, ACTION, change)
    finding = only(copy, "error", "not finite")
    assert (finding.episodes, finding.frame, finding.column) == ((1, 2), 5, ACTION)
    assert "2 frames" in finding.what
    assert "['arm.y']" in finding.what
    assert finding.where == "action, episodes 1, 2, first at frame 5"


def test_an_excluded_episode_is_not_looked_at(copy: Recipe) -> None:
    change_rows(copy, STATE, lambda v: v.__setitem__((17, 0), np.nan))
    assert verdicts(copy) == [("error", "not finite")]
    assert verdicts(replace(copy, split=Split(0.0, 0, (1,)))) == []


def test_constant_dimension(copy: Recipe) -> None:
    change_rows(copy, STATE, lambda v: v[:, 1].fill(0.25))
    finding = only(copy, "warning", "constant dimension")
    assert finding.column == "observation.state 'arm.y'"
    assert "0.25 in every frame" in finding.what


def test_a_few_values_outside_the_limits(copy: Recipe) -> None:
    recipe = with_action(copy, high=(2.0, 0.95, 1.0))
    finding = only(recipe, "warning", "outside the limits")
    assert finding.column == "action 'arm.y'"
    assert "[-2, 0.95] rad" in finding.what


def test_most_values_outside_the_limits(copy: Recipe) -> None:
    assert verdicts(with_action(copy, low=(5.0, -2.0, 0.0), high=(6.0, 2.0, 1.0))) == [("error", "outside the limits")]


def test_outliers_and_a_very_short_episode(tmp_path: Path) -> None:
    episodes = [episode(0, 100), episode(1, 100), episode(2, 100), episode(4, 5)]
    for e in episodes:
        e.state[:, :2] *= 0.1
        e.action[:, :2] *= 0.1
    episodes[1].state[50, 0] = 1.9
    recipe = recipe_for(write(tmp_path / "data", episodes, "image"))
    serious = [f for f in found(recipe) if f.severity != "info"]
    assert [(f.severity, f.check) for f in serious] == [("warning", "episode length"), ("warning", "outliers")]
    assert serious[0].episodes == (3,)
    assert "shorter than the median of 100 frames: [5]" in serious[0].what
    assert "up to 1.9" in serious[1].what


def test_a_very_long_episode(tmp_path: Path) -> None:
    recipe = recipe_for(write(tmp_path / "data", [episode(i, n) for i, n in enumerate((8, 8, 60))], "image"))
    finding = only(recipe, "warning", "episode length")
    assert finding.episodes == (2,)
    assert "longer" in finding.what


@pytest.mark.parametrize(("still", "severity"), [(4, "info"), (9, "warning")])
def test_idle_frames(copy: Recipe, still: int, severity: str) -> None:
    def change(state: np.ndarray, action: np.ndarray) -> None:
        for start in (0, 12, 24):
            state[start : start + still] = state[start]
            action[start : start + still] = state[start]

    change_vectors(copy, change)
    assert [(f.severity, f.check) for f in found(copy) if f.check == "idle frames"] == [(severity, "idle frames")]


def test_deltas_declared_absolute(copy: Recipe) -> None:
    def change(state: np.ndarray, action: np.ndarray) -> None:
        action[:, :2] -= state[:, :2]

    change_vectors(copy, change)
    meant = [f for f in found(copy) if f.severity != "info"]
    assert {f.check for f in meant} == {"action meaning"}
    assert [f.column for f in meant] == ["action 'arm.x'", "action 'arm.y'"]
    assert "declared absolute, but looks like a delta" in meant[0].what
    assert verdicts(with_action(copy, reference=("delta", "delta", "absolute"))) == []


def test_absolute_targets_declared_deltas(copy: Recipe) -> None:
    meant = [f for f in found(with_action(copy, reference=("delta", "absolute", "absolute"))) if f.severity != "info"]
    assert [(f.check, f.column) for f in meant] == [("action meaning", "action 'arm.x'")]
    assert "declared a delta, but looks like an absolute target" in meant[0].what


def test_degrees_for_radians(copy: Recipe) -> None:
    change_rows(copy, ACTION, lambda v: v[:, :2].__imul__(180 / np.pi))
    recipe = with_action(copy, low=(-180.0, -180.0, 0.0), high=(180.0, 180.0, 1.0))
    meant = [f for f in found(recipe) if f.severity != "info"]
    assert [f.check for f in meant] == ["action meaning"] * 2
    assert all("follows the state times 5" in f.what or "follows the state times 6" in f.what for f in meant)


def test_gripper_sign(copy: Recipe) -> None:
    finding = only(with_action(copy, gripper="close_high"), "warning", "gripper sign")
    assert "a high command leads to a high state" in finding.what
    change_rows(copy, ACTION, lambda v: np.copyto(v[:, 2], 1 - v[:, 2]))
    assert only(copy, "warning", "gripper sign").column == "action 'gripper'"
    assert verdicts(with_action(copy, gripper="close_high")) == []


def test_a_gripper_that_does_not_follow_says_nothing_about_its_sign(copy: Recipe) -> None:
    change_rows(copy, ACTION, lambda v: np.copyto(v[:, 2], np.arange(36) % 2))
    assert verdicts(copy) == verdicts(with_action(copy, gripper="close_high")) == []


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 100.0)])
def test_gripper_range(copy: Recipe, low: float, high: float) -> None:
    finding = only(with_action(copy, low=(-2.0, -2.0, low), high=(2.0, 2.0, high)), "warning", "gripper range")
    assert f"the limits are [{low:g}, {high:g}]" in finding.what


def test_gripper_without_a_convention(copy: Recipe) -> None:
    assert [(f.severity, f.check) for f in found(with_action(copy, gripper="none"))] == [("info", "gripper convention")]


def test_timestamps_that_jump(copy: Recipe) -> None:
    change_rows(copy, "timestamp", lambda v: v[15:24].__iadd__(0.7))
    finding = only(copy, "error", "timestamps")
    assert (finding.episodes, finding.frame) == ((1,), 3)
    assert "first by 0.800 s where one frame is 0.100 s" in finding.what


def test_timestamps_that_disagree_with_fps(copy: Recipe) -> None:
    change_rows(copy, "timestamp", lambda v: v.__imul__(2))
    finding = only(copy, "error", "timestamps")
    assert "0.2000 s apart (5.0 frames/s), meta/info.json says 10 frames/s" in finding.what


def test_a_rate_that_is_not_the_data_sets(copy: Recipe) -> None:
    finding = only(with_action(copy, rate_hz=30.0), "error", "rate")
    assert "10 frames/s, action.spec.rate_hz is 30" in finding.what


def test_tasks_without_text(copy: Recipe) -> None:
    assert copy.root
    path = copy.root / "meta" / "tasks.parquet"
    table = pq.read_table(path)
    text = next(c for c in table.column_names if c != "task_index")
    texts = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True)) | {1: " "}
    values = [texts[i] for i in table["task_index"].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index(text), text, pa.array(values)), path)
    assert only(copy, "error", "task without text").episodes == (1,)
    assert verdicts(replace(copy, language=Language("constant", "tidy up"))) == []


def test_one_task_in_two_spellings(tmp_path: Path) -> None:
    episodes = [replace(episode(i), task=task) for i, task in enumerate(("Put it away.", "put it  away", "open"))]
    (finding,) = found(recipe_for(write(tmp_path / "data", episodes, "image")))
    assert (finding.severity, finding.check) == ("info", "task spelling")


def test_frame_index_with_a_gap(copy: Recipe) -> None:
    change_rows(copy, "frame_index", lambda v: v[30:36].__iadd__(1))
    finding = only(copy, "error", "frames lost")
    assert (finding.episodes, finding.frame) == ((2,), 6)
    assert "row 6 of episode 2 says that it is frame 7 of episode 2" in finding.what


def test_a_row_of_another_episode(copy: Recipe) -> None:
    change_rows(copy, "episode_index", lambda v: v.__setitem__(20, 0))
    finding = only(copy, "error", "frames lost")
    assert (finding.episodes, finding.frame) == ((1,), 8)
    assert "row 8 of episode 1 says that it is frame 8 of episode 0" in finding.what


def test_rows_that_are_missing(copy: Recipe) -> None:
    assert copy.root
    path = copy.root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_frames": 40}))
    assert "counts 40 frames, the parquet files hold 36" in only(copy, "error", "frames lost").what


def test_an_empty_episode(copy: Recipe) -> None:
    assert copy.root
    (path,) = (copy.root / "meta/episodes").glob("*/*.parquet")
    table = pq.read_table(path)
    place = table.column_names.index("dataset_to_index")
    pq.write_table(table.set_column(place, table.field(place), pa.array([12, 12, 36])), path)
    assert only(copy, "error", "empty episode").episodes == (1,)


def shorten(path: Path, packets: int) -> None:
    """Keep the first packets of a video."""
    import av

    buffer = io.BytesIO()
    with av.open(str(path)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.dts is not None and i < packets:
                packet.stream = stream
                target.mux(packet)
    path.write_bytes(buffer.getvalue())


def test_a_video_shorter_than_the_table(copy: Recipe) -> None:
    assert copy.root
    (path,) = copy.root.rglob("*.mp4")
    shorten(path, 32)
    finding = only(copy, "error", "frames lost")
    assert (finding.column, finding.episodes) == (f"{FRONT} (front)", (2,))
    not_looked_at = replace(copy, split=Split(0.0, 0, (0,)))
    assert [f.check for f in doctor_data.examine(not_looked_at, 1) if f.severity == "error"] == ["frames lost"]


def test_a_corrupt_and_a_missing_video(copy: Recipe) -> None:
    assert copy.root
    (path,) = copy.root.rglob("*.mp4")
    path.write_bytes(b"no video" * 100)
    assert only(copy, "error", "frames lost").episodes == (0, 1, 2)
    path.unlink()
    assert only(copy, "error", "frames lost").episodes == (0, 1, 2)


def test_duplicate_episodes(copy: Recipe) -> None:
    def change(state: np.ndarray, action: np.ndarray) -> None:
        state[24:36], action[24:36] = state[:12], action[:12]

    change_vectors(copy, change)
    finding = only(copy, "warning", "duplicate episodes")
    assert finding.episodes == (0, 2)
    assert "list [2] in" in finding.todo


@pytest.mark.parametrize("role", ["state", "action"])
def test_a_spec_with_another_number_of_dimensions(copy: Recipe, role: str) -> None:
    values = {name: getattr(SPEC, name)[:2] for name in ("names", "units", "reference", "low", "high")}
    recipe = replace(copy, **{role: Vector(getattr(copy, role).key, replace(SPEC, **values))})
    finding = only(recipe, "error", "dimension count")
    assert "3 dimensions, named ['arm.x', 'arm.y', 'gripper']; the recipe describes 2" in finding.what


def test_a_column_that_is_not_there(copy: Recipe) -> None:
    finding = only(replace(copy, state=Vector("observation.stat", SPEC)), "error", "unreadable column")
    assert "Did you mean 'observation.state'" in finding.what


def test_a_column_of_pictures_where_numbers_are_expected(cameras_root: Path) -> None:
    recipe = replace(recipe_for(cameras_root, {"front": KEYS["front"]}), state=Vector(KEYS["front"], SPEC))
    finding = only(recipe, "error", "unreadable column")
    assert "does not hold numbers" in finding.what


def test_a_missing_camera(copy: Recipe) -> None:
    finding = only(
        replace(copy, cameras={"front": FRONT, "wrist": "observation.images.wrist"}), "error", "missing camera"
    )
    assert FRONT in finding.what


def test_a_black_camera(cameras_root: Path) -> None:
    finding = only(recipe_for(cameras_root, {"dark": KEYS["dark"]}), "error", "black camera")
    assert finding.episodes == (0, 1, 2)


def test_a_camera_stuck_throughout(cameras_root: Path) -> None:
    finding = only(recipe_for(cameras_root, {"frozen": KEYS["frozen"]}), "error", "stuck camera")
    assert (finding.episodes, finding.frame) == ((0, 1, 2), 0)


def test_a_camera_that_stops(cameras_root: Path) -> None:
    finding = only(recipe_for(cameras_root, {"halting": KEYS["halting"]}), "warning", "stuck camera")
    assert (finding.episodes, finding.frame) == ((0, 1, 2), 4)
    assert "up to 0.7 s" in finding.what


def test_a_still_picture_of_a_still_robot_is_no_finding(cameras_root: Path, tmp_path: Path) -> None:
    shutil.copytree(cameras_root, tmp_path / "copy")
    recipe = recipe_for(tmp_path / "copy", {"frozen": KEYS["frozen"]})

    def change(state: np.ndarray, action: np.ndarray) -> None:
        for start in (0, 12, 24):
            state[start : start + 12] = action[start : start + 12] = state[start]

    change_vectors(recipe, change)
    assert "stuck camera" not in [f.check for f in found(recipe)]


def test_two_cameras_with_the_same_view(cameras_root: Path) -> None:
    finding = only(recipe_for(cameras_root, {n: KEYS[n] for n in ("front", "twin")}), "warning", "same view twice")
    assert KEYS["twin"] in finding.what


def test_a_stuck_camera_is_found_behind_video_compression(tmp_path: Path) -> None:
    root = write(tmp_path / "data", [episode(i) for i in range(3)], "video", [KEYS["frozen"]], side=96)
    assert only(recipe_for(root, {"frozen": KEYS["frozen"]}), "error", "stuck camera").episodes == (0, 1, 2)


def test_looking_at_some_episodes_says_so(cameras_root: Path) -> None:
    listed = doctor_data.examine(recipe_for(cameras_root, {"dark": KEYS["dark"]}), 2)
    assert [(f.check, f.episodes) for f in listed] == [("black camera", (0, 2)), ("pictures", ())]


def test_what_cannot_be_opened_is_a_finding(tmp_path: Path, copy: Recipe) -> None:
    assert "no " in only(replace(copy, root=tmp_path / "nowhere"), "error", "refused").what
    assert copy.root
    shutil.rmtree(copy.root / "data")
    assert "holds no parquet file" in only(copy, "error", "refused").what


def test_no_error_means_that_training_accepts_it(copy: Recipe) -> None:
    """What only the training reader refuses is a finding too."""
    finding = only(replace(copy, split=Split(0.0, 0, (7,))), "error", "refused")
    assert "excludes episodes [7]" in finding.what


def test_several_faults_at_once_are_all_reported(copy: Recipe) -> None:
    change_rows(copy, ACTION, lambda v: v.__setitem__((3, 0), np.nan))
    change_rows(copy, "timestamp", lambda v: v[15:24].__iadd__(0.7))
    recipe = replace(copy, cameras={"front": FRONT, "wrist": "nothing"})
    assert {c for s, c in verdicts(recipe) if s == "error"} == {"not finite", "timestamps", "missing camera"}
