"""LeRobot's own policies, with random weights, under our evaluation; compared with LeRobot's own loop."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robot.clock import LockstepClock
from robot.eval_config import EvalConfig, Films, PolicySource
from robot.evaluate import evaluate
from robot.policies import make_policy
from robot.registry import PointArmConfig, make_robot
from robot.runtime import connect, run_episode
from robot.sims.point_arm import ACTION_SPEC, STATE_SPEC, PointArm
from vla import config
from vla.errors import CheckpointError, SpecMismatch, TandemError
from vla.lerobot_config import Meaning, VectorMeaning, is_lerobot
from vla.load import load_policy
from vla.types import Observation

KEY = "observation.images.top"
MEANING = Meaning({"top": KEY}, VectorMeaning("observation.state", STATE_SPEC), VectorMeaning("action", ACTION_SPEC))
ROBOT = PointArmConfig("point_arm", ("reach-red",), image_size=64, step_limit=9)
SMALL: dict[str, dict[str, Any]] = {
    "act": {
        "chunk_size": 6,
        "n_action_steps": 3,
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 16,
        "n_encoder_layers": 1,
        "n_vae_encoder_layers": 1,
    },
    "diffusion": {
        "horizon": 8,
        "n_action_steps": 3,
        "down_dims": (16, 32),
        "num_inference_steps": 2,
        "crop_ratio": 1.0,
        "spatial_softmax_num_keypoints": 4,
    },
    "vqbet": {  # three observations, and no n_action_steps
        "n_obs_steps": 3,
        "n_action_pred_token": 2,
        "action_chunk_size": 3,
        **dict.fromkeys(("gpt_hidden_dim", "gpt_input_dim", "gpt_output_dim"), 16),
        **{"gpt_n_layer": 1, "gpt_n_head": 2, "crop_shape": (64, 64), "spatial_softmax_num_keypoints": 4},
        **{"vqvae_n_embed": 4, "vqvae_embedding_dim": 8, "vqvae_enc_hidden_dim": 8},
    },
}
STATS = {
    "observation.state": {"mean": [0.1, -0.1], "std": [0.5, 0.6], "min": [-1.0, -1.0], "max": [1.0, 0.9]},
    "action": {"mean": [0.05, 0.2], "std": [0.3, 0.4], "min": [-0.4, -0.5], "max": [0.6, 0.3]},
    KEY: {"mean": [[[0.2]]] * 3, "std": [[[0.3]]] * 3, "min": [[[0.0]]] * 3, "max": [[[1.0]]] * 3},
}


def build(kind: str, folder: Path, image: tuple[int, int, int] = (3, 64, 64), **changes: Any) -> Path:
    """A policy as LeRobot leaves it, made by LeRobot's own classes from random weights."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies import get_policy_class, make_policy_config, make_pre_post_processors

    settings: dict[str, Any] = {"pretrained_backbone_weights": None, **SMALL[kind], **changes}
    made: Any = make_policy_config(
        kind,
        input_features={
            KEY: PolicyFeature(FeatureType.VISUAL, image),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        device="cpu",
        **settings,
    )
    torch.manual_seed(0)
    policy = get_policy_class(kind)(made)
    stats = {k: {n: torch.tensor(v) for n, v in values.items()} for k, values in STATS.items()}
    pre, post = make_pre_post_processors(made, dataset_stats=stats)  # pyright: ignore[reportArgumentType]
    made.pretrained_backbone_weights = "ResNet18_Weights.IMAGENET1K_V1"  # what a trained checkpoint says
    for part in (policy, pre, post):
        part.save_pretrained(folder)
    (folder / "tandem.yaml").write_text(config.dump(MEANING))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: build(kind, tmp_path_factory.mktemp("lerobot") / kind) for kind in SMALL}


class Kept(PointArm):
    """Keeps every observation and command."""

    def __init__(self) -> None:
        super().__init__(("reach-red",), image_size=64, step_limit=9)
        self.seen: list[Observation] = []
        self.sent: list[np.ndarray] = []

    def observe(self) -> Observation:
        self.seen.append(super().observe())
        return self.seen[-1]

    def command(self, action: np.ndarray) -> np.ndarray:
        self.sent.append(action)
        return super().command(action)


def lerobots_own(folder: Path, seed: int) -> np.ndarray:
    """The commands of LeRobot's own loop (`select_action` at every control step) on the same arm."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class, make_pre_post_processors
    from lerobot.policies.utils import prepare_observation_for_inference

    made: Any = PreTrainedConfig.from_pretrained(folder)
    made.pretrained_backbone_weights = None
    policy = get_policy_class(made.type).from_pretrained(folder, config=made)
    pre, post = make_pre_post_processors(made, pretrained_path=str(folder))
    arm = Kept()
    arm.reset("reach-red", seed)
    policy.reset()
    torch.manual_seed(seed)
    while not arm.success() and len(arm.sent) < 9:
        seen = arm.observe()
        raw = {"observation.state": seen.state.copy(), KEY: seen.images["top"].copy()}
        ready = prepare_observation_for_inference(raw, torch.device("cpu"), seen.instruction)
        action = post(policy.select_action(pre(ready)))
        arm.command(ACTION_SPEC.clip(action[0].numpy()))
    return np.array(arm.sent)


@pytest.mark.filterwarnings("ignore:To evaluate in the environment")  # vqbet's, of random weights
@pytest.mark.parametrize("kind", SMALL)
def test_our_runtime_sends_what_lerobots_own_loop_sends(kind: str, folders: dict[str, Path]) -> None:
    arm, policy = Kept(), load_policy(folders[kind])
    before = torch.get_rng_state()
    done = run_episode(arm, policy, LockstepClock(), "reach-red", 4)
    assert done.error is None, done.traceback
    assert torch.equal(torch.get_rng_state(), before), "the policy must not disturb the caller's generator"
    assert len(done.latency_ms) == 3
    own = lerobots_own(folders[kind], 4)
    np.testing.assert_array_equal(np.array(arm.sent), own)
    assert np.abs(np.diff(own, axis=0)).max() > 1e-3
    assert len(arm.seen) == (3 if kind == "act" else 9), "only a policy that reads history looks at every step"


@pytest.mark.parametrize("kind", ["act", "diffusion"])
def test_the_chunk_is_lerobots_chunk(kind: str, folders: dict[str, Path]) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class, make_pre_post_processors

    made: Any = PreTrainedConfig.from_pretrained(folders[kind])
    made.pretrained_backbone_weights = None
    policy = get_policy_class(kind).from_pretrained(folders[kind], config=made)
    pre, post = make_pre_post_processors(made, pretrained_path=str(folders[kind]))
    arm = PointArm(("reach-red",), image_size=64, step_limit=9)
    arm.reset("reach-red", 0)
    seen = arm.observe()
    picture = torch.from_numpy(seen.images["top"].copy()).permute(2, 0, 1)[None] / 255
    batch = pre({"observation.state": torch.from_numpy(seen.state.copy())[None], KEY: picture, "task": ["x"]})
    batch = {k: v for k, v in batch.items() if k.startswith("observation")}
    if kind == "diffusion":  # both observations are the first one
        batch = {k: torch.stack([v, v], 1) for k, v in batch.items()}
    torch.manual_seed(7)
    expected = post(policy.predict_action_chunk(batch))[0].numpy()
    ours = load_policy(folders[kind])
    ours.reset(7)
    chunk = ours.infer(seen)
    np.testing.assert_array_equal(chunk.actions, expected)
    assert chunk.actions.shape == ((6, 2) if kind == "act" else (3, 2))
    assert (chunk.execute, chunk.period_s) == (3, 0.1)


def test_a_new_episode_remembers_nothing(folders: dict[str, Path]) -> None:
    policy, fresh = load_policy(folders["diffusion"]), load_policy(folders["diffusion"])
    arm = PointArm(("reach-red",), image_size=64, step_limit=9)
    arm.reset("reach-red", 5)
    policy.reset(0)
    policy.infer(arm.observe())
    arm.reset("reach-red", 6)
    chunks = []
    for one in (policy, fresh):
        one.reset(1)
        chunks.append(one.infer(arm.observe()).actions)
    np.testing.assert_array_equal(chunks[0], chunks[1])


def test_the_seed_decides_the_draws(folders: dict[str, Path]) -> None:
    arm, policy = PointArm(("reach-red",), image_size=64, step_limit=9), load_policy(folders["diffusion"])
    arm.reset("reach-red", 0)
    seen, chunks = arm.observe(), []
    for seed in (1, 2, 1):
        policy.reset(seed)
        chunks.append([policy.infer(seen).actions for _ in range(2)])
        torch.rand(3)
    np.testing.assert_array_equal(chunks[0], chunks[2])
    assert not np.array_equal(chunks[0], chunks[1])
    assert not np.array_equal(*chunks[0]), "the second chunk of an episode has draws of its own"


def test_pictures_of_another_shape_are_letterboxed(tmp_path: Path) -> None:
    policy = load_policy(build("act", tmp_path / "wide", image=(3, 64, 96)))
    arm = PointArm(("reach-red",), image_size=32, step_limit=9)
    arm.reset("reach-red", 0)
    seen = arm.observe()
    import cv2

    boxed = np.zeros((64, 96, 3), np.uint8)
    boxed[:, 16:80] = cv2.resize(seen.images["top"].copy(), (64, 64), interpolation=cv2.INTER_LINEAR)
    by_hand = dataclasses.replace(seen, images={"top": boxed})
    chunks = [policy.infer(o).actions for o in (seen, by_hand)]
    np.testing.assert_array_equal(chunks[0], chunks[1])


def evaluation(path: Path, output: Path, **settings: Any) -> EvalConfig:
    source = PolicySource(str(path), "cpu", settings)
    return EvalConfig(source, ROBOT, 2, 0, {}, "lockstep", 1, 1, 60.0, Films(0, 0), output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["act", "diffusion"])
def test_vla_eval_opens_the_folder(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))  # a download would have to go here
    summary = evaluate(evaluation(folders[kind], tmp_path / "out", execute=2))
    assert summary["overall"]["episodes"] == 2, summary
    assert summary["errors"] == 0
    assert not (tmp_path / "nothing").exists()


def test_settings(folders: dict[str, Path]) -> None:
    arm = make_robot(ROBOT)
    arm.reset("reach-red", 0)
    seen = arm.observe()

    def chunk(**settings: Any) -> Any:
        policy = make_policy(str(folders["diffusion"]), "cpu", settings, ROBOT, arm)
        policy.reset(0)
        return policy.infer(seen)

    assert chunk(execute=1).execute == 1
    assert not np.array_equal(chunk().actions, chunk(num_inference_steps=5).actions)
    with pytest.raises(CheckpointError, match=r"no setting 'head.steps'.*Valid: execute, num_inference_steps"):
        chunk(head={"steps": 3})
    with pytest.raises(TandemError, match="at least 9 rows"):
        chunk(execute=9)
    with pytest.raises(CheckpointError, match="must be a positive whole number, got 0"):
        chunk(execute=0)


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_without_its_meaning_the_message_says_what_to_write(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["act"], tmp_path / "bare")
    (folder / "tandem.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"Write .*bare/tandem.yaml") as refused:
        load_policy(folder)
    proposed = str(refused.value).partition("in:\n")[2]
    (folder / "tandem.yaml").write_text(proposed)
    policy = load_policy(folder)
    assert (policy.state_spec.dim, policy.action_spec.dim, policy.cameras) == (2, 2, ("top",))
    with pytest.raises(SpecMismatch, match="rad"):  # placeholders are never taken for a robot's numbers
        connect(make_robot(ROBOT), policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": {}}, "no camera for 'observation.images.top'"),
        ({"cameras": {"top": KEY, "wrist": "observation.images.wrist"}}, "has no image 'observation.images.wrist'"),
        ({"cameras": {"top": KEY, "again": KEY}}, "is given twice"),
        ({"state": VectorMeaning("observation.environment_state", STATE_SPEC)}, "only key this vector can have"),
        ({"action": VectorMeaning("action", dataclasses.replace(ACTION_SPEC, names=("x",), units=("m",),
          reference=("delta",), low=(0.0,), high=(1.0,)))}, "has 1 names, the policy has 2 dimensions"),
    ],
)  # fmt: skip
def test_a_meaning_that_does_not_fit(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = copy(folders["act"], tmp_path / "wrong")
    (folder / "tandem.yaml").write_text(config.dump(dataclasses.replace(MEANING, **change)))
    with pytest.raises(CheckpointError, match=message):
        load_policy(folder)


def test_broken_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    truncated = copy(folders["act"], tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"LeRobot cannot open {truncated}"):
        load_policy(truncated)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"without model.safetensors\.$"):
        load_policy(truncated)
    (truncated / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it into its base first"):
        load_policy(truncated)

    other = copy(folders["act"], tmp_path / "other")
    said = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(said | {"dim_model": 32}))
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_policy(other)
    (other / "config.json").write_text(json.dumps(said | {"type": "no_such_policy"}))
    with pytest.raises(CheckpointError, match="no_such_policy"):
        load_policy(other)
    (other / "config.json").write_text(json.dumps(said | {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}))
    with pytest.raises(CheckpointError, match="temporal ensembling"):
        load_policy(other)


def test_weights_that_are_missing_are_not_left_random(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(folders["act"], tmp_path / "partial")
    state = load_file(folder / "model.safetensors")
    state.pop("model.action_head.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"action_head\.bias"):
        load_policy(folder)


def test_which_folders_are_lerobots(folders: dict[str, Path], tmp_path: Path) -> None:
    assert is_lerobot(folders["act"])
    assert not is_lerobot(tmp_path)
    both = copy(folders["act"], tmp_path / "both")
    (both / "config.yaml").touch()
    assert not is_lerobot(both), "a checkpoint of ours that LeRobot can read too is ours"
    (tmp_path / "config.json").write_text("[1, 2")
    assert not is_lerobot(tmp_path)
