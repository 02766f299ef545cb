"""Rows for task switching: which frames they are made from, what their chunks do, how a mixture brings them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train import sft, switching_data
from train.contact_labels import ColumnContact, Contact, FileContact, label
from train.dataset import LeRobotSource, View
from train.distributed import Cluster
from train.loader import Loader, Member
from train.recipe import Language, Recipe, Split, Vector
from train.sources import open_sources
from train.switching_data import DerivedSource, SwitchingConfig, SwitchingRows, derive
from train.switching_moves import CommandMove, LinearMove
from train.train_config import ComputeConfig, DataConfig, MemberConfig
from vla import config
from vla.codec import Codec
from vla.errors import DataError, UsageError
from vla.files import write_text
from vla.policy import VLAPolicy
from vla.policy_config import ConditionConfig, FastSlowConfig, PolicyConfig
from vla.processor import Processor
from vla.switching import GripperContact
from vla.tokenizer import byte_level
from vla.types import ActionSpec

ROOT = Path(__file__).parents[1]
LENGTHS = (20, 16, 18, 14)  # frames of the episodes; tasks "pull" and "push" take turns
GRASPS = ((6, 13), (5, 9), (8, 17), (4, 10))  # first and last frame in contact; the third ends in contact
STATE = ActionSpec(("x", "hand"), ("m", "1"), ("absolute",) * 2, (-99.0,) * 2, (99.0,) * 2, 10.0, gripper="open_high")
ACTION = ActionSpec(
    ("dx", "close"), ("dm", "1"), ("delta", "absolute"), (-9.0,) * 2, (9.0,) * 2, 10.0, gripper="close_high"
)


def x(episode: int, frame: int) -> float:
    """m: where the arm is; quadratic, so that no two steps are alike."""
    return episode + 0.001 * frame * frame


@pytest.fixture(scope="session")
def grasping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in which a hand closes; its picture says which frame it is of, as red 10 t and green 60 episode."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("switching") / "data"
    two = {"dtype": "float32", "shape": (2,), "names": None}
    features: dict[str, Any] = {"observation.state": two, "action": two, "force": two | {"shape": (1,)}}
    features["observation.images.top"] = {
        "dtype": "image",
        "shape": (32, 32, 3),
        "names": ["height", "width", "channels"],
    }
    data = LeRobotDataset.create("test/grasping", 10, features, root=root, use_videos=False)
    for episode, (length, (first, last)) in enumerate(zip(LENGTHS, GRASPS, strict=True)):
        for t in range(length):
            closed = first <= t <= last
            picture = np.empty((32, 32, 3), np.uint8)
            picture[:] = (10 * t, 60 * episode, 0)
            change = 10 * (x(episode, t + 1) - x(episode, t))
            row: dict[str, Any] = {
                "observation.images.top": picture,
                "observation.state": np.array([x(episode, t), 0.2 if closed else 0.9], np.float32),
                "action": np.array([change, 1.0 if closed else -1.0], np.float32),
                "force": np.array([3.0 if closed else 0.1], np.float32),
            }
            data.add_frame(row | {"task": ("pull", "push")[episode % 2]})
        data.save_episode()
    data.finalize()
    entries = [{"episode_index": e, "contacts": [list(span)]} for e, span in enumerate(GRASPS)]
    write_text(root / "contacts.json", json.dumps({"episodes": entries}))
    return root


SETTINGS = SwitchingConfig(
    contact=GripperContact("gripper", "action", "close", 0.0),
    enter=1,
    leave=1,
    margin=2,
    approach=5,
    advance_from=("post",),
    seed=0,
    moves=(LinearMove("linear", ("dx",), ("x",), 0.1), CommandMove("command", ("close",))),
)


@pytest.fixture
def recipe(grasping: Path) -> Recipe:
    vectors = Vector("observation.state", STATE), Vector("action", ACTION)
    names, everything = {"top": "observation.images.top"}, Split(0.0, 0, ())
    return Recipe("grasping", None, grasping, None, "none", names, *vectors, Language("task", None), everything)


@pytest.fixture
def source(recipe: Recipe) -> LeRobotSource:
    return LeRobotSource(recipe, 6, "train")


def contact_of(source: LeRobotSource) -> np.ndarray:
    felt = np.zeros(len(source), bool)
    for episode, (first, last) in zip(source.episodes, GRASPS, strict=True):
        felt[episode.start + first : episode.start + last + 1] = True
    return felt


@pytest.mark.parametrize(
    "contact",
    [
        SETTINGS.contact,
        GripperContact("gripper", "state", "hand", 0.5),
        ColumnContact("column", "force", 1.0),
        FileContact("file", Path("contacts.json")),
    ],
    ids=lambda c: f"{c.kind}-{getattr(c, 'vector', '')}",
)
def test_contact_is_the_same_however_it_is_given(source: LeRobotSource, contact: Contact) -> None:
    labels = label(source, contact, 1, 1)
    assert ((labels.phase == 1) == contact_of(source)).all()
    starts = [e.start for e in source.episodes]
    assert sorted(set(labels.begin.tolist())) == starts
    first = [start + grasp[0] for start, grasp in zip(starts, GRASPS, strict=True)]
    assert sorted(set(labels.onset.tolist())) == [-1, *first]
    assert labels.phase[starts[1] - 1] == 2
    assert labels.phase[starts[1]] == 0, "an episode begins anew"


def test_labels_of_a_split_are_of_its_own_episodes(recipe: Recipe) -> None:
    source = LeRobotSource(replace(recipe, split=Split(0.0, 0, (0, 2))), 6, "train")
    for contact in (
        SETTINGS.contact,
        ColumnContact("column", "force", 1.0),
        FileContact("file", Path("contacts.json")),
    ):
        labels = label(source, contact, 1, 1)
        assert np.flatnonzero(labels.phase == 1).tolist() == [*range(5, 10), *range(16 + 4, 16 + 11)]


def test_contact_that_cannot_be_read_is_refused(source: LeRobotSource, tmp_path: Path) -> None:
    for contact, message in (
        (ColumnContact("column", "touch", 0.0), "no column 'touch'"),
        (ColumnContact("column", "action", 0.0), "one number a frame"),
        (FileContact("file", tmp_path / "absent.json"), "FileNotFoundError"),
        (file(tmp_path, "{}"), "KeyError"),
        (file(tmp_path, '{"episodes": [{"episode_index": 0, "contacts": []}]}'), "nothing of episode 1"),
        (file(tmp_path, spans([[3, 20]])), r"20 frames, and contact \[3, 20\]"),
        (file(tmp_path, spans([[3]])), "A span is"),
        (file(tmp_path, spans([[5, 4]])), "A span is"),
    ):
        with pytest.raises(DataError, match=message):
            label(source, contact, 1, 1)


def spans(of_each: list[list[int]]) -> str:
    return json.dumps({"episodes": [{"episode_index": e, "contacts": of_each} for e in range(4)]})


def file(folder: Path, text: str) -> FileContact:
    path = folder / f"{abs(hash(text))}.json"
    path.write_text(text)
    return FileContact("file", path)


def follow(start: float, actions: np.ndarray) -> np.ndarray:
    """(H + 1,) m, where the arm is after each step."""
    return start + np.concatenate(([0.0], np.cumsum(actions[:, 0] * 0.1)))


def test_rollback_rows_go_back_through_the_frames_that_were(source: LeRobotSource) -> None:
    rows = DerivedSource(source, SETTINGS, "rollback")
    assert sorted(rows.plan.frame.tolist()) == np.flatnonzero(contact_of(source)).tolist()
    everything = np.arange(len(rows))
    raw, (pictures, _) = rows.steps(everything), rows.pictures(everything, View(("top",), 32))
    shown = pictures[:, 0, ..., :2].mean(axis=(1, 2)) / (10, 60)
    for i, (t, episode) in enumerate(shown.round().astype(int).tolist()):
        first, _ = GRASPS[episode]
        assert raw.state[i, 0] == pytest.approx(x(episode, t)), "picture and state are of one frame"
        way = [x(episode, max(t - k, first - 2)) for k in range(7)]
        assert np.allclose(follow(x(episode, t), raw.actions[i]), way, atol=1e-5)
        closed = [t - 1 - k >= first for k in range(6)]  # the hand opens where it had closed
        assert (raw.actions[i, :, 1] > 0).tolist() == closed
        assert rows.instructions(np.array([i])) == [("pull", "push")[episode % 2]]
    assert raw.valid.all()
    assert (rows.valid_steps(everything) == 6).all()


def test_advance_rows_go_to_the_start_of_the_other_task(source: LeRobotSource) -> None:
    rows = DerivedSource(source, SETTINGS, "advance")
    after = [
        e.start + t for e, (_, last) in zip(source.episodes, GRASPS, strict=True) for t in range(last + 1, e.length)
    ]
    assert rows.plan.frame.tolist() == after
    everything = np.arange(len(rows))
    raw, told = rows.steps(everything), rows.instructions(everything)
    here = source.instructions(rows.plan.frame)
    assert all({a, b} == {"pull", "push"} for a, b in zip(here, told, strict=True))
    starts = {"pull": {0.0, 2.0}, "push": {1.0, 3.0}}
    reached = {task: set() for task in starts}
    for i, task in enumerate(told):
        way = follow(raw.state[i, 0], raw.actions[i])
        assert way[5] == pytest.approx(way[6], abs=1e-5), "arrived after `approach` steps, it stays"
        assert np.allclose(np.diff(way[:6]), np.diff(way[:6])[0], atol=1e-5)
        reached[task].add(round(float(way[6]), 3))
        assert (raw.actions[i, :, 1] == -1).all()
    assert reached == starts, "every episode's start is gone to"
    again = DerivedSource(source, SETTINGS, "advance")
    assert (again.plan.goal == rows.plan.goal).all()
    other = DerivedSource(source, replace(SETTINGS, seed=1), "advance")
    assert not (other.plan.goal == rows.plan.goal).all()


def test_advances_may_begin_before_contact_and_take_as_long_as_limits_ask(recipe: Recipe) -> None:
    slow = replace(recipe, action=Vector("action", replace(ACTION, low=(-2.0, -9.0), high=(2.0, 9.0))))
    source = LeRobotSource(slow, 6, "train")
    rows = DerivedSource(source, replace(SETTINGS, advance_from=("pre",)), "advance")
    assert rows.plan.frame[:6].tolist() == [0, 1, 2, 3, 4, 5]
    actions = rows.steps(np.arange(len(rows))).actions
    assert np.abs(actions[..., 0]).max() <= 2
    far = np.flatnonzero(np.abs(rows._states[rows.plan.goal, 0] - rows._states[rows.plan.frame, 0]) > 1.3)
    steps = np.ceil(np.abs(rows._states[rows.plan.goal[far], 0] - rows._states[rows.plan.frame[far], 0]) / 0.2)
    share = (
        actions[far].sum(axis=1)[:, 0]
        * 0.1
        / (rows._states[rows.plan.goal[far], 0] - rows._states[rows.plan.frame[far], 0])
    )
    assert np.allclose(share, 6 / steps, atol=1e-4)


def test_a_rollback_is_seen_in_the_order_in_which_it_happens(source: LeRobotSource) -> None:
    rows = DerivedSource(source, SETTINGS, "rollback")
    around = rows.around(np.arange(len(rows)))
    frames = rows.plan.frame
    assert (np.diff(frames)[np.diff(around.first) == 0] == -1).all(), "the next row is the frame before"
    lengths = [last - first + 1 for first, last in GRASPS]
    assert (around.last - around.first + 1).tolist() == np.repeat(lengths, lengths).tolist()
    assert (around.start == around.first).all()


def test_rows_that_cannot_be_made_are_refused(recipe: Recipe, source: LeRobotSource) -> None:
    never = replace(SETTINGS, contact=GripperContact("gripper", "action", "close", 5.0))
    with pytest.raises(DataError, match="no frame is in contact"):
        DerivedSource(source, never, "rollback")
    alone = LeRobotSource(replace(recipe, language=Language("constant", "pull")), 6, "train")
    with pytest.raises(DataError, match=r"tasks to go to: \['pull'\]"):
        DerivedSource(alone, SETTINGS, "advance")
    with pytest.raises(DataError, match="of which there are 0"):
        DerivedSource(source, replace(never, advance_from=("post",)), "advance")
    with pytest.raises(UsageError, match="must be 0, got 1 and 0"):
        DerivedSource(LeRobotSource(recipe, 6, "train", past=1), SETTINGS, "rollback")
    with pytest.raises(UsageError, match="each action dimension once"):
        DerivedSource(source, replace(SETTINGS, moves=SETTINGS.moves[:1]), "rollback")
    with pytest.raises(UsageError, match="approach must be at least 1"):
        replace(SETTINGS, approach=0)


def test_an_error_names_the_settings(source: LeRobotSource, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    write_text(path, config.dump(replace(SETTINGS, contact=ColumnContact("column", "touch", 0.0))))
    with pytest.raises(DataError, match=r"s\.yaml, rollback rows of recipe 'grasping': .* no column 'touch'"):
        derive(source, SwitchingRows("rollback", path))


CPU = ComputeConfig("cpu", "fp32", "ddp")


@pytest.fixture
def mixture(recipe: Recipe, tmp_path: Path) -> DataConfig:
    files = {"recipe": recipe, "settings": SETTINGS}
    for name, content in files.items():
        write_text(tmp_path / f"{name}.yaml", config.dump(content))
    made = [SwitchingRows(behaviour, tmp_path / "settings.yaml") for behaviour in ("rollback", "advance")]
    members = [
        MemberConfig(tmp_path / "recipe.yaml", w, rows) for w, rows in zip((2.0, 1.0, 1.0), (None, *made), strict=True)
    ]
    return DataConfig(tuple(members), None, 0, 1)


def policy_config(**changes: Any) -> PolicyConfig:
    data = config.read(ROOT / "configs/sft_metaworld_flow.yaml")["policy"]
    given = {
        "cameras": ("top",),
        "image_size": 32,
        "state_dim": 2,
        "action_dim": 2,
        "chunk": 6,
        "normalization": "identity",
    }
    return replace(config.build(PolicyConfig, data), **(given | {"conditions": ConditionConfig(3, 0, 0.0)} | changes))


def test_a_mixture_brings_rows_with_their_mode(mixture: DataConfig, recipe: Recipe) -> None:
    data = config.read(ROOT / "configs/sft_metaworld_flow.yaml")
    run = replace(
        config.build(sft.TrainConfig, data), data=mixture, policy=policy_config(), validation=None, compute=CPU
    )
    sources = open_sources(run.data, run.policy, held_out=False)
    alone = open_sources(replace(mixture, mixture=mixture.mixture[:1]), run.policy, held_out=False)
    assert sources.train[0] is sources.train[1] is sources.train[2], "a data set is opened once"
    assert sources.statistics().to_json() == alone.statistics().to_json(), "made rows do not enter"
    whats = [entry.get("rows", {}).get("behaviour") for entry in sources.identity()]
    assert whats == [None, "rollback", "advance"]
    policy = VLAPolicy.build(run.policy, sources.statistics(), 0)
    cluster = Cluster(run.compute)
    try:
        (batch,) = sft.make_loader(run, sources.train_rows, policy, cluster).micro_batches(0)
    finally:
        cluster.close()
    assert batch.mode is not None
    assert (torch.bincount(batch.mode, minlength=3) >= 4).all(), "two, one and one of four"
    rollback, state = batch.mode == 1, batch.state[:, 1]
    assert (state[rollback] < 0.5).all(), "in contact"
    assert (batch.actions[rollback][..., 0] <= 1e-6).all(), "x only grew in the demonstrations"
    assert (batch.actions[batch.mode == 0][..., 0] >= 0).all()
    steered = policy.loss(batch)
    steered.total.backward()
    table = policy.conditions.mode
    assert table is not None
    assert table.weight.grad is not None
    assert (table.weight.grad.abs().sum(dim=1) > 0).all(), "every mode is learned"


def test_fast_slow_training_sees_a_rollback_age_forwards(mixture: DataConfig, recipe: Recipe) -> None:
    source = LeRobotSource(recipe, 6, "train")
    rows = DerivedSource(source, SETTINGS, "rollback")
    law = FastSlowConfig(2, 2, 0.0, 1, (), 16)
    policy = policy_config(fast_slow=law)
    sources = open_sources(replace(mixture, mixture=mixture.mixture[:1]), policy, held_out=False)
    codec = Codec(sources.statistics(), "identity", 2, 2)
    member = Member(rows, Processor(policy, byte_level(), codec), 1.0, switching_data.MODE["rollback"])
    (batch,) = Loader([member], len(rows), 1, 0, 1, 3, 0).micro_batches(0)
    shown = batch.images[:, 0, ..., :2].float().mean(dim=(1, 2)) / torch.tensor([10.0, 60.0])
    for (t, episode), (place, _), age in zip(
        shown.round().int().tolist(), batch.state.tolist(), batch.age.tolist(), strict=True
    ):
        assert place == pytest.approx(x(episode, t - int(age)), abs=1e-5), "what was seen earlier is a later frame"
        assert age == min(2, GRASPS[episode][1] - (t - int(age)))


def test_a_policy_without_modes_is_refused(mixture: DataConfig) -> None:
    for conditions in (None, ConditionConfig(2, 0, 0.0)):
        with pytest.raises(UsageError, match=r"set policy\.conditions\.modes to 3"):
            open_sources(mixture, policy_config(conditions=conditions), held_out=False)
