"""The reader against LeRobot's own, and everything that is refused at the door."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.dataset import LeRobotSource, View
from train.lerobot_folder import locate, open_folder
from train.recipe import Language, Recipe, Split, Vector, load
from vla.errors import DataError, UsageError
from vla.images import resize_with_pad
from vla.types import ActionSpec

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def varied_root(tmp_path_factory: pytest.TempPathFactory, write_lerobot: Callable[..., Path]) -> Path:
    """A file for every episode, 30 frames/s, h264 with reordered frames and key frames far apart."""
    return write_lerobot(
        tmp_path_factory.mktemp("lerobot") / "varied",
        "video",
        fps=30,
        cameras={"observation.images.only": (64, 48)},
        encoder={"vcodec": "h264", "g": 8, "crf": 23, "preset": "medium", "extra_options": {"bf": 2}},
        data_files_size_in_mb=0.0001,
        video_files_size_in_mb=0.0001,
    )


@pytest.fixture
def varied_recipe(varied_root: Path, recipe_of: Callable[..., Recipe]) -> Recipe:
    return recipe_of(varied_root, {"front": "observation.images.only"}, 30.0)


@pytest.fixture
def broken(tmp_path: Path, video_recipe: Recipe) -> Recipe:
    """A recipe whose data set may be damaged."""
    assert video_recipe.root is not None
    shutil.copytree(video_recipe.root, tmp_path / "copy")
    return replace(video_recipe, root=tmp_path / "copy")


def edit_rows(root: Path, column: str, change: Callable[[np.ndarray], object]) -> None:
    """Rewrite one column of the data set's only parquet file of rows."""
    (path,) = (root / "data").glob("*/*.parquet")
    table = pq.read_table(path)
    values = [np.asarray(v) for v in table.column(column).to_pylist()]
    change(stacked := np.stack(values))
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(stacked.tolist(), table.column(column).type)), path)


def edit_episodes(root: Path, column: str, value: Callable[[list], list]) -> None:
    (path,) = (root / "meta/episodes").glob("*/*.parquet")
    table = pq.read_table(path)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(value(table.column(column).to_pylist()))), path)


@pytest.mark.parametrize("kind", ["video_recipe", "image_recipe", "varied_recipe"])
def test_equals_lerobots_own_tensors_bit_for_bit(kind: str, request: pytest.FixtureRequest) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    recipe: Recipe = request.getfixturevalue(kind)
    source = LeRobotSource(recipe, 6, "train", past=3, history=2)
    theirs = LeRobotDataset(
        "test/small",
        root=recipe.root,
        video_backend="pyav",
        return_uint8=True,
        delta_timestamps={
            "action": [i / source.fps for i in range(-3, 6)],
            "observation.state": [i / source.fps for i in range(-2, 1)],
        },
    )
    ends = [e.start + e.length - 1 for e in source.episodes]
    begins = [e.start + 1 for e in source.episodes]
    indices = np.concatenate([np.random.default_rng(1).integers(0, len(source), 60), begins, ends, [0, 0]])
    size = 40 if kind == "image_recipe" else 64  # the cameras' own: nothing is resampled
    raw, instructions = source.steps(indices), source.instructions(indices)
    images, _ = source.pictures(indices, View(tuple(recipe.cameras), size))
    assert len(source) == len(theirs) == 46
    for j, i in enumerate(indices.tolist()):
        item: dict[str, Any] = theirs[i]  # pyright: ignore[reportAssignmentType]
        states = np.concatenate([raw.history[j], raw.state[j][None]])
        assert np.array_equal(states, item["observation.state"].numpy())
        assert np.array_equal(raw.actions[j], item["action"].numpy())
        assert np.array_equal(raw.valid[j], ~item["action_is_pad"].numpy())
        assert instructions[j] == item["task"]
        for v, key in enumerate(recipe.cameras.values()):
            frame = item[key].permute(1, 2, 0).numpy()
            if frame.dtype == np.float32:
                frame = (frame * 255).round().astype(np.uint8)
            assert np.array_equal(images[j, v], resize_with_pad(frame, size)), (i, key)
    assert images.dtype == np.uint8
    assert raw.state.dtype == raw.actions.dtype == np.float32


def test_an_absent_camera_is_blank_and_masked(image_recipe: Recipe) -> None:
    images, present = LeRobotSource(image_recipe, 2, "train").pictures(np.arange(3), View(("wrist", "top"), 40))
    assert present.tolist() == [False, True]
    assert not images[:, 0].any()
    assert images[:, 1].any()


def test_statistics_are_not_needed(broken: Recipe) -> None:
    assert broken.root is not None
    (broken.root / "meta" / "stats.json").unlink()
    assert len(LeRobotSource(broken, 2, "train")) == 46


def test_splits_are_by_episode_disjoint_and_complete(video_recipe: Recipe) -> None:
    recipe = replace(video_recipe, split=Split(0.4, 3, (1,)))
    train, held = (LeRobotSource(recipe, 4, split, past=2) for split in ("train", "validation"))
    numbers = [{e.index for e in s.episodes} for s in (train, held)]
    assert not numbers[0] & numbers[1]
    assert numbers[0] | numbers[1] == {0, 2, 3}
    assert len(numbers[1]) == 1
    states, actions = held.statistics_arrays()
    assert states.shape == (len(held), 3)
    assert actions.shape == (len(held), 2)
    raw = held.steps(np.arange(len(held)))
    assert np.array_equal(raw.state, states)
    assert np.array_equal(raw.actions[:, 2], actions)
    assert np.array_equal(raw.valid.sum(1), held.valid_steps(np.arange(len(held))))
    assert held.instructions(np.arange(len(held))) == [
        f"task {e.index % 3}" for e in held.episodes for _ in range(e.length)
    ]
    assert LeRobotSource(recipe, 1, "train").episodes == train.episodes


def test_what_is_around_a_frame(broken: Recipe) -> None:
    """Episodes of 13, 7, 10 and 16 frames; in the third the task changes with its fifth frame."""
    assert broken.root is not None
    edit_rows(broken.root, "task_index", lambda t: t.__setitem__(slice(20 + 4, 30), 1))
    recipe = replace(broken, split=Split(0.0, 0, (0,)))
    around = LeRobotSource(recipe, 4, "train").around(np.array([0, 6, 7, 10, 11, 16, 17, 32]))
    assert around.start.tolist() == [0, 0, 7, 7, 7, 7, 17, 17]
    assert around.first.tolist() == [0, 0, 7, 7, 11, 11, 17, 17]
    assert around.last.tolist() == [6, 6, 10, 10, 16, 16, 32, 32]
    constant = LeRobotSource(replace(recipe, language=Language("constant", "go")), 4, "train")
    assert constant.around(np.array([8])).last.tolist() == [16], "what is not read does not divide"


@pytest.mark.parametrize(("horizon", "past", "history"), [(0, 0, 0), (4, -1, 0), (4, 0, -1)])
def test_lengths_that_mean_nothing_are_refused(video_recipe: Recipe, horizon: int, past: int, history: int) -> None:
    with pytest.raises(UsageError, match=f"horizon of {horizon}, past {past} and history {history}"):
        LeRobotSource(video_recipe, horizon, "train", past, history)


def test_a_constant_instruction_replaces_tasks(video_recipe: Recipe) -> None:
    source = LeRobotSource(replace(video_recipe, language=Language("constant", "stack the cups")), 1, "train")
    assert source.instructions(np.arange(2)) == ["stack the cups"] * 2


def test_a_split_without_episodes_is_refused(video_recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="leaves no validation episode"):
        LeRobotSource(video_recipe, 4, "validation")
    with pytest.raises(UsageError, match=r"excludes episodes \[9\]"):
        LeRobotSource(replace(video_recipe, split=Split(0.0, 0, (9,))), 4, "train")


def test_revision_is_of_the_content(broken: Recipe, video_recipe: Recipe) -> None:
    assert broken.root is not None
    revision = LeRobotSource(broken, 1, "train").revision
    assert revision == LeRobotSource(video_recipe, 4, "train").revision
    video = next((broken.root / "videos").rglob("*.mp4"))
    content = bytearray(video.read_bytes())
    content[-1] ^= 1
    video.write_bytes(content)
    changed = LeRobotSource(broken, 1, "train").revision
    assert changed != revision
    edit_rows(broken.root, "action", lambda a: a.__setitem__((5, 1), 0.25))
    assert LeRobotSource(broken, 1, "train").revision not in (changed, revision)


@pytest.mark.parametrize("place", [0, -1])
def test_both_ends_of_large_files_enter_the_revision(
    broken: Recipe, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr("train.lerobot_folder.HEAD", 64)
    assert broken.root is not None
    video = next((broken.root / "videos").rglob("*.mp4"))
    content = bytearray(video.read_bytes())
    revisions = []
    for change in (0, 1):
        content[place] ^= change
        video.write_bytes(content)
        revisions.append(open_folder(locate(broken)).revision(list(broken.cameras.values())))
    assert revisions[0] != revisions[1]


def refused(recipe: Recipe, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        LeRobotSource(recipe, 4, "train").pictures(np.arange(46), View(tuple(recipe.cameras), 64))
    assert "\n" not in str(caught.value)


def test_missing_folder_says_what_to_put_where(video_recipe: Recipe) -> None:
    refused(replace(video_recipe, root=Path("/nowhere/x")), r"no /nowhere/x/meta/info.json.*lerobot-record")
    named = replace(video_recipe, root=Path("/nowhere/x"), repo_id="some/one")
    refused(named, r"hf download some/one .*--local-dir /nowhere/x")


def test_missing_camera_names_the_nearest(video_recipe: Recipe) -> None:
    recipe = replace(video_recipe, cameras={"top": "observation.images.tpo"})
    refused(recipe, r"no camera 'observation.images.tpo'.*Did you mean 'observation.images.top'.*wrist")


def test_missing_vector_names_the_nearest(video_recipe: Recipe) -> None:
    recipe = replace(video_recipe, action=replace(video_recipe.action, key="actions"))
    refused(recipe, r"no column of numbers 'actions'.*Did you mean 'action'")


def test_wrong_dimensions(video_recipe: Recipe) -> None:
    swapped = replace(video_recipe, state=Vector("observation.state", video_recipe.action.spec))
    refused(swapped, r"'observation.state' .* shape \[3\], .* 2 dimensions \['a0', 'a1'\]")


def test_wrong_rate(video_recipe: Recipe) -> None:
    spec: ActionSpec = replace(video_recipe.action.spec, rate_hz=30.0)
    refused(replace(video_recipe, action=Vector("action", spec)), r"recorded at 10 frames/s, .*rate_hz .* is 30")


def test_depth_camera(broken: Recipe) -> None:
    assert broken.root is not None
    path = broken.root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["observation.images.top"]["info"]["is_depth_map"] = True
    path.write_text(json.dumps(info))
    refused(broken, "is a depth map")


@pytest.mark.parametrize(("column", "value"), [("action", np.nan), ("observation.state", np.inf)])
def test_numbers_that_are_not_finite(broken: Recipe, column: str, value: float) -> None:
    assert broken.root is not None
    edit_rows(broken.root, column, lambda a: a.__setitem__((13 + 4, 1), value))
    refused(broken, rf"'{column}' is not finite in 1 frames of 1 episodes, first in episode 1, frame 4")
    assert len(LeRobotSource(replace(broken, split=Split(0.0, 0, (1,))), 4, "train")) == 46 - 7


def test_empty_episode(broken: Recipe) -> None:
    assert broken.root is not None
    edit_episodes(broken.root, "dataset_to_index", lambda v: [v[0], v[0], *v[2:]])
    refused(broken, "Episode 1 .* is empty")


def test_episode_that_claims_foreign_frames(broken: Recipe) -> None:
    assert broken.root is not None
    edit_episodes(broken.root, "dataset_to_index", lambda v: [v[0], v[1] + 1, *v[2:]])
    refused(broken, "Episode 1 .* frames are lost or doubled")


def test_lost_rows(broken: Recipe) -> None:
    assert broken.root is not None
    (path,) = (broken.root / "data").glob("*/*.parquet")
    pq.write_table(pq.read_table(path).slice(0, 40), path)
    refused(broken, "counts 46 frames, data/ holds 40 rows")


def test_task_without_text(broken: Recipe) -> None:
    assert broken.root is not None
    edit_rows(broken.root, "task_index", lambda t: t.__setitem__(slice(13, 20), 8))
    refused(broken, "Episode 1 .* no instruction.* task 8")


@pytest.mark.parametrize("file", ["meta/info.json", "data/chunk-000/file-000.parquet", "meta/tasks.parquet"])
def test_damaged_files_are_named(broken: Recipe, file: str) -> None:
    assert broken.root is not None
    (broken.root / file).write_bytes(b"damaged")
    refused(broken, Path(file).name if not file.endswith("tasks.parquet") else "metadata")


def test_missing_video_file(broken: Recipe) -> None:
    assert broken.root is not None
    next((broken.root / "videos/observation.images.wrist").rglob("*.mp4")).unlink()
    refused(broken, r"1 of 1 video files are missing, first .*wrist.*mp4")


def test_older_format_names_the_converter(broken: Recipe) -> None:
    assert broken.root is not None
    path = broken.root / "meta/info.json"
    path.write_text(path.read_text().replace('"v3.0"', '"v2.1"'))
    refused(broken, "version v2.1.*convert_dataset_v21_to_v30")


def test_a_picture_that_is_no_picture(tmp_path: Path, image_recipe: Recipe) -> None:
    assert image_recipe.root is not None
    shutil.copytree(image_recipe.root, tmp_path / "copy")
    (path,) = (tmp_path / "copy/data").glob("*/*.parquet")
    table = pq.read_table(path)
    column = table.column("observation.image").to_pylist()
    column[3]["bytes"] = b"no picture"
    place = table.column_names.index("observation.image")
    pq.write_table(
        table.set_column(
            place, table.schema.field(place), pa.array(column, table.schema.field("observation.image").type)
        ),
        path,
    )
    recipe = replace(image_recipe, root=tmp_path / "copy")
    with pytest.raises(DataError, match="picture of row 3"):
        LeRobotSource(recipe, 4, "train").pictures(np.arange(5), View(("top",), 40))


def test_hub_is_asked_only_where_a_recipe_says_so(
    video_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = replace(video_recipe, root=None, repo_id="some/one")
    with pytest.raises(DataError, match=r"Cannot get some/one \(revision v3.0\) from the hub"):
        locate(hub)
    assert video_recipe.root is not None
    shutil.copytree(video_recipe.root, tmp_path / "some/one")
    assert locate(hub) == tmp_path / "some/one"
    with pytest.raises(DataError, match="revision abc"):  # whose revision LeRobot's copy has is unknown
        locate(replace(hub, revision="abc"))


@pytest.mark.parametrize("path", sorted((ROOT / "datasets").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    assert recipe.licence


def test_the_recorded_recipe_is_the_simulators() -> None:
    from robot.sims import metaworld

    recipe = load(ROOT / "datasets/metaworld_four_tasks.yaml")
    assert recipe.state.spec == metaworld.STATE_SPEC
    assert recipe.action.spec == metaworld.ACTION_SPEC
    assert list(recipe.cameras) == [metaworld.CAMERA]
