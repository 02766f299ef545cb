"""The plugin `lerobot_policy_tandem` inside this process: configuration, policy, processors, environment."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig, RTCAttentionSchedule
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import make_policy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch.utils.data import default_collate

from lerobot_policy_tandem.configuration_tandem import TandemConfig
from lerobot_policy_tandem.environment import TandemEnv
from lerobot_policy_tandem.modeling_tandem import TandemPolicy
from lerobot_policy_tandem.statistics import of_dataset
from robot.registry import PointArmConfig, make_robot
from train.compute_stats import compute
from train.dataset import LeRobotSource
from train.loader import Loader, Member
from train.recipe import Recipe
from train.sampler import MixtureSampler
from vla import config as settings
from vla.codec import Codec
from vla.errors import CheckpointError, DataError, SpecMismatch, UsageError
from vla.load import load_policy
from vla.policy_config import PolicyConfig
from vla.processor import Processor
from vla.types import Observation, UnderWay, require_same

ROOT = Path(__file__).parents[1]
WIDTHS: dict[str, tuple[Any, int, int]] = dict.fromkeys(("discrete_diffusion", "e0"), ("quantile", 8, 8))
WIDTHS |= dict.fromkeys(("flow", "regression"), ("mean_std", 8, 8))
YAML = str(ROOT / "configs/sft_metaworld_flow.yaml")
SMALL = ["backbone.tiny.width=16", "backbone.tiny.mlp=16", "backbone.tiny.heads=2", "expert.width=16", "expert.mlp=16"]
TWO = ["cameras=[top, wrist]", *SMALL]
HEADS = {
    "flow": [],
    "regression": ["head={kind: regression, error: l1}"],
    "discrete_diffusion": [
        "normalization=quantile",
        "head={kind: discrete_diffusion, bins: 8, binary_dims: [1], layout: per_step, steps: 2, score: gap, "
        "remask: none, temperature: 0.5, choice_temperature: 1.5, draws: 1}",
    ],
    "e0": [
        "normalization=quantile",
        "head={kind: e0, bins: 8, layout: per_step, alpha: 0.1, time: concat, steps: 2, draws: 1}",
    ],
}


@pytest.fixture(scope="module")
def data(video_root: Path) -> LeRobotDataset:
    """Chunks of 8 actions, as `lerobot-train` asks for them."""
    ahead = {"action": [i / 10 for i in range(8)]}
    return LeRobotDataset("test/small", root=video_root, video_backend="pyav", delta_timestamps=ahead)


def configured(*overrides: str, **changes: Any) -> TandemConfig:
    given: dict[str, Any] = {"yaml": YAML, "overrides": [*TWO, *overrides], "device": "cpu", "push_to_hub": False}
    return TandemConfig(**(given | changes))


def trained(data: LeRobotDataset, *overrides: str, **changes: Any) -> TandemPolicy:
    policy: Any = make_policy(configured(*overrides, **changes), ds_meta=data.meta)
    return policy


def batch_of(data: LeRobotDataset, frames: list[int]) -> dict[str, Any]:
    """As `lerobot-train` hands it to the policy."""
    pre, _ = make_pre_post_processors(trained(data).config)
    return pre(default_collate([data[i] for i in frames]))


# --- the distribution ------------------------------------------------------------------------------


def test_lerobot_finds_the_distribution_by_its_name() -> None:
    names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
    assert "lerobot_policy_tandem" in names, "hyphens in METADATA would hide it from LeRobot"
    code = """
import sys
from lerobot.configs import PreTrainedConfig
from lerobot.envs import EnvConfig
from lerobot.utils.import_utils import register_third_party_plugins
assert "tandem" not in PreTrainedConfig.get_known_choices()
before = set(sys.modules)
register_third_party_plugins()
assert "tandem" in PreTrainedConfig.get_known_choices() and "tandem" in EnvConfig.get_known_choices()
heavy = [n for n in ("transformers", "vla.policy", "mujoco", "metaworld", "pyarrow") if n in set(sys.modules) - before]
assert not heavy, f"importing the plugin imports {heavy}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_plugin_is_installed_with_everything_else() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())
    plugin = tomllib.loads((ROOT / "plugins/lerobot_policy_tandem/pyproject.toml").read_text())
    assert plugin["project"]["name"] in ours["dependency-groups"]["dev"]
    assert plugin["project"]["version"] == ours["project"]["version"]


# --- configuration ---------------------------------------------------------------------------------


def written(made: TandemConfig, folder: Path, cli: list[str] | None = None) -> Any:
    folder.mkdir(exist_ok=True)
    made.save_pretrained(folder)
    return PreTrainedConfig.from_pretrained(folder, cli_overrides=cli or [])


def test_every_field_survives_being_saved_and_loaded(tmp_path: Path) -> None:
    spec = make_robot(PointArmConfig("point_arm", ("reach-red",), 64, 9)).action_spec.to_json()
    made = configured(
        "mixture={horizons: [4, 8], gate_noise: learned, independent: 0.5, balance: 1e-5, "
        "consensus: {shortest: 2, ratio: 1.25, active: 2}}",
        "conditions={modes: 2, intents: 3, drop: 0.1}",
        "continuation={method: identity, schedule: linear, strength: 3.5}",
        "committed=2",
        execute=3,
        n_obs_steps=2,
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (3,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        use_amp=True,
        use_peft=True,
        repo_id="me/mine",
        private=True,
        tags=["a"],
        license="mit",
        pretrained_path=Path("some/where"),
        pretrained_revision="abc",
        image_keys={"top": "observation.images.cam0"},
        specs={"state": spec, "action": spec},
        seed=3,
        action_feature_names=["a", "b"],
        normalization_mapping={"STATE": NormalizationMode.IDENTITY},
        optimizer_lr=3e-5,
        optimizer_betas=(0.8, 0.95),
        optimizer_eps=1e-6,
        optimizer_weight_decay=0.5,
        optimizer_grad_clip_norm=0.5,
        scheduler_warmup_steps=7,
        scheduler_decay_steps=70,
        scheduler_decay_lr=1e-7,
    )
    again = written(made, tmp_path / "config")
    plain = TandemConfig(device="cpu")
    emptied = {"yaml", "overrides", "recipe"}  # taken in
    fixed = {"device"} | ({"use_amp"} if not made.use_amp else set())
    for f in dataclasses.fields(TandemConfig):
        value = getattr(made, f.name)
        assert getattr(again, f.name) == value, f.name
        assert type(getattr(again, f.name)) is type(value), f.name
        assert (value == getattr(plain, f.name)) == (f.name in emptied | fixed), f"{f.name} is not tested"
    assert again.policy == made.policy
    assert json.loads((tmp_path / "config/config.json").read_text())["type"] == "tandem"


@pytest.mark.parametrize("head", HEADS)
def test_every_head_survives_being_saved_and_loaded(head: str, tmp_path: Path) -> None:
    made = configured(*HEADS[head])
    assert written(made, tmp_path / "config").policy == made.policy
    assert made.policy.head.kind == head


def test_a_policy_yaml_alone_and_one_with_a_policy_block_are_the_same(tmp_path: Path) -> None:
    alone = tmp_path / "policy.yaml"
    whole = TandemConfig(yaml=YAML, device="cpu")
    alone.write_text(settings.dump(whole.policy))
    assert TandemConfig(yaml=str(alone), device="cpu").policy == whole.policy
    assert whole.policy == settings.build(PolicyConfig, settings.read(YAML)["policy"])


def test_settings_on_the_command_line_win(tmp_path: Path) -> None:
    made = configured("execute=5", chunk=6, execute=2)
    assert (made.policy.chunk, made.policy.execute, made.chunk, made.execute) == (6, 2, 6, 2)
    cli = ["--execute=4", '--overrides=["head.steps=9"]']
    again = written(made, tmp_path / "config", cli)
    assert (again.policy.chunk, again.policy.execute, again.policy.head.steps) == (6, 4, 9)
    assert again.overrides == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"yaml": "nowhere.yaml"}, "No such file"),
        ({"overrides": ["head.stepz=3"]}, "unknown key 'stepz'. Did you mean 'steps'"),
        ({"overrides": ["head.steps"]}, "must look like key.subkey=value"),
        ({"execute": 99}, r"policy.execute must be 1\.\.chunk"),
        ({"normalization_mapping": {"STATE": NormalizationMode.MEAN_STD}}, "must be IDENTITY"),
        ({"recipe": "nowhere.yaml"}, "No such file"),
    ],
)
def test_wrong_settings_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configured(**changes)


def test_without_settings_the_message_says_what_to_give() -> None:
    with pytest.raises(UsageError, match=r"--policy\.yaml=FILE"):
        _ = TandemConfig(device="cpu").action_delta_indices


def test_cameras_that_are_not_there_are_named(data: LeRobotDataset) -> None:
    with pytest.raises(UsageError, match=r"\['observation.images.front'\].*Valid: observation.images.top"):
        make_policy(configured("cameras=[top, front]"), ds_meta=data.meta)


def test_a_new_policy_needs_a_data_set() -> None:
    made = TandemEnv(robot="point_arm")
    with pytest.raises(UsageError, match="from which its statistics are computed"):
        make_policy(TandemConfig(yaml=YAML, overrides=["cameras=[top]"], device="cpu"), env_cfg=made)


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "block"), [*((h, "execute=4") for h in HEADS), ("flow", "state=prompt")])
def test_the_loss_is_that_of_our_own_loader(head: str, block: str, data: LeRobotDataset, video_recipe: Recipe) -> None:
    policy = trained(data, *HEADS[head], block, "max_tokens=96")
    model = policy.model
    source = LeRobotSource(video_recipe, 8, "train")
    statistics = compute([source])
    for side in ("state", "action"):
        ours, theirs = (getattr(s, side).to_json() for s in (model.processor.codec.statistics, statistics))
        assert ours == theirs
    processor = Processor(model.config, model.processor.tokenizer, Codec(statistics, *WIDTHS[head]))
    loader = Loader([Member(source, processor, 1.0)], 8, 1, 0, 1, seed=0, prefetch=0)
    (ours,) = loader.micro_batches(0)
    _, frames = MixtureSampler([len(source)], [1.0], 0).draw(0, 8)
    given = batch_of(data, frames.tolist())
    theirs = policy._batch(given)
    for f in dataclasses.fields(ours):
        one, other = getattr(ours, f.name), getattr(theirs, f.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), f.name
            assert one.dtype == other.dtype, f.name
        elif f.name != "noise_seed":
            assert one == other, f.name
    assert not theirs.valid.all()
    assert not theirs.dim_mask.all()
    expected = model.loss(dataclasses.replace(ours, noise_seed=theirs.noise_seed))
    loss, terms = policy.forward(given)
    assert torch.equal(loss, expected.total)
    assert terms.keys() == expected.terms.keys()
    assert all(type(value) is float for value in terms.values())


def test_draws_follow_the_frames_and_their_order(data: LeRobotDataset) -> None:
    policy = trained(data)
    frames = [3, 20, 31]
    loss = policy.forward(batch_of(data, frames))[0]
    torch.manual_seed(12345)
    assert torch.equal(policy.forward(batch_of(data, frames))[0], loss)
    assert len({policy._batch(batch_of(data, f)).noise_seed for f in (frames, frames[::-1], [3, 20, 30])}) == 3


@pytest.mark.parametrize("head", HEADS)
def test_losses_of_the_rows_make_up_the_loss(head: str, data: LeRobotDataset) -> None:
    policy, given = trained(data, *HEADS[head]), batch_of(data, [0, 9, 12, 30])
    rows, _ = policy.forward(given, reduction="none")
    assert rows.shape == (4,)
    assert rows.requires_grad
    weights = (~given["action_is_pad"]).sum(1).float()
    assert len(set(weights.tolist())) > 1
    torch.testing.assert_close((rows * weights).sum() / weights.sum(), policy.forward(given)[0])


def test_matrices_decay_and_nothing_else(data: LeRobotDataset) -> None:
    policy = trained(data, "backbone.freeze=[vision]")
    decayed, kept = policy.get_optim_params()
    assert kept["weight_decay"] == 0
    assert "weight_decay" not in decayed
    ids = [id(p) for group in (decayed, kept) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in policy.parameters() if p.requires_grad)
    names = {id(p): n for n, p in policy.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert any("embed" in names[id(p)] for p in kept["params"])
    assert not any("vision" in names[i] for i in ids)


@pytest.mark.parametrize("block", ["history=2", "fast_slow={min_age: 0, max_age: 2, fresh_share: 0.5, frames: 1, "
                                   "cameras: [], image_size: 16}"])  # fmt: skip
def test_what_lerobot_cannot_give_is_refused(block: str, data: LeRobotDataset) -> None:
    with pytest.raises(UsageError, match="vla-train"):
        trained(data, block)


def test_statistics_are_exact_where_lerobots_are_not(data: LeRobotDataset) -> None:
    statistics = trained(data).model.processor.codec.statistics
    values = np.stack([np.asarray(v) for v in data.hf_dataset.with_format("numpy")["action"]])
    np.testing.assert_allclose(statistics.action.q99, np.quantile(values, 0.99, axis=0), rtol=1e-6)
    assert data.meta.stats is not None
    assert np.abs(data.meta.stats["action"]["q99"] - statistics.action.q99).max() > 0.01
    assert statistics.action_spec.units == ("unknown", "unknown")
    assert statistics.action_spec.rate_hz == 10


def test_rows_that_are_not_on_disk_cannot_make_statistics(data: LeRobotDataset, tmp_path: Path) -> None:
    shutil.copytree(data.root / "meta", tmp_path / "streamed/meta")
    with pytest.raises(DataError, match=r"without --dataset\.streaming"):
        of_dataset(tmp_path / "streamed", configured())


# --- checkpoints -----------------------------------------------------------------------------------


def observation() -> Observation:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (48, 64, 3), np.uint8) for name in ("top", "wrist")}
    return Observation(1.0, images, rng.normal(size=3).astype(np.float32), "task 1")


def lerobots(seen: Observation, rows: int = 1) -> dict[str, Any]:
    pictures = {
        f"observation.images.{name}": torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        for name, image in seen.images.items()
    }
    batch = pictures | {"observation.state": torch.from_numpy(np.array(seen.state))[None]}
    return {k: v.repeat(rows, *[1] * (v.ndim - 1)) for k, v in batch.items()} | {"task": [seen.instruction] * rows}


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_is_whole_and_ours_too(head: str, data: LeRobotDataset, tmp_path: Path) -> None:
    policy = trained(data, *HEADS[head], "execute=3")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    policy.save_pretrained(tmp_path / "saved")
    again = TandemPolicy.from_pretrained(tmp_path / "saved")
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())
    assert again.config.policy == policy.config.policy
    ours: Any = load_policy(tmp_path / "saved")
    for one in (policy.eval().model, again.model, ours):
        one.reset(5)
    seen = observation()
    expected = ours.infer(seen)
    for one in (policy, again):
        np.testing.assert_array_equal(one.predict_action_chunk(lerobots(seen))[0].numpy(), expected.actions)
    assert expected.execute == 3


def test_gathered_weights_are_saved_under_our_names(data: LeRobotDataset, tmp_path: Path) -> None:
    policy = trained(data)
    gathered = {name: value + 1 for name, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path / "saved", state_dict=gathered)
    again = TandemPolicy.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], value) for name, value in gathered.items())


def test_saving_again_replaces_and_leaves_other_files_alone(data: LeRobotDataset, tmp_path: Path) -> None:
    policy = trained(data)
    policy.save_pretrained(tmp_path)
    (tmp_path / "policy_preprocessor.json").write_text("{}")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    policy.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_decode_settings_may_change_and_nothing_else(data: LeRobotDataset, tmp_path: Path) -> None:
    trained(data).save_pretrained(tmp_path)
    cli = ["--execute=2", '--overrides=["head.steps=1"]']
    config: Any = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=cli)
    policy = TandemPolicy.from_pretrained(tmp_path, config=config)
    assert (policy.model.config.execute, policy.model.head.steps) == (2, 1)
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=["--chunk=6"])
    with pytest.raises(CheckpointError, match=r"\['chunk'\] cannot be changed after training"):
        TandemPolicy.from_pretrained(tmp_path, config=config)


def test_a_recipe_gives_the_numbers_their_meaning(data: LeRobotDataset, video_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(settings.dump(video_recipe))
    named = trained(data, recipe=str(tmp_path / "recipe.yaml"))
    require_same(named.model.action_spec, video_recipe.action.spec, "actions")
    assert named.config.image_keys == video_recipe.cameras
    unnamed = trained(data)
    with pytest.raises(SpecMismatch, match="unknown"):
        require_same(unnamed.model.action_spec, video_recipe.action.spec, "actions")
    other = dataclasses.replace(video_recipe, action=dataclasses.replace(video_recipe.action, key="observation.state"))
    (tmp_path / "other.yaml").write_text(settings.dump(other))
    with pytest.raises(UsageError, match="can only be 'action'"):
        configured(recipe=str(tmp_path / "other.yaml"))


def test_adapters_are_trained_alone_and_found_again(data: LeRobotDataset, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = trained(data)
    policy.save_pretrained(tmp_path / "base")
    policy.config.pretrained_path = tmp_path / "base"
    wrapped: Any = policy.wrap_with_peft(peft_cli_overrides={"r": 2})
    learning = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert learning
    assert all("lora" in n for n in learning)
    assert not any("backbone" in n for n in learning)
    wrapped.forward(batch_of(data, [1, 2]))[0].backward()
    assert any(p.grad is not None and p.grad.any() for _, p in wrapped.named_parameters())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(TandemPolicy.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    chunks = []
    for one in (wrapped.base_model.model, again.base_model.model):
        one.model.reset(0)
        chunks.append(one.eval().predict_action_chunk(lerobots(observation())))
    assert torch.equal(*chunks)
    plain = TandemPolicy.from_pretrained(tmp_path / "base")
    plain.model.reset(0)
    assert not torch.equal(plain.predict_action_chunk(lerobots(observation())), chunks[0])


# --- inference -------------------------------------------------------------------------------------


def test_actions_come_out_one_by_one(data: LeRobotDataset) -> None:
    policy, batch = trained(data, "execute=3").eval(), lerobots(observation(), rows=2)
    policy.model.reset(1)
    expected = torch.cat([policy.predict_action_chunk(batch)[:, :3] for _ in range(2)], dim=1)
    policy.model.reset(1)
    actions = torch.stack([policy.select_action(batch) for _ in range(6)], dim=1)
    assert torch.equal(actions, expected)
    assert actions.shape == (2, 6, 2)
    policy.select_action(batch)
    policy.reset()
    policy.model.reset(1)
    assert torch.equal(policy.select_action(batch), expected[:, 0]), "a new episode begins with a new chunk"


def test_a_new_episode_follows_torchs_seed(data: LeRobotDataset) -> None:
    policy, chunks = trained(data, "head.noise_scale=1.0").eval(), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        policy.reset()
        chunks.append(policy.predict_action_chunk(lerobots(observation())))
    assert torch.equal(chunks[0], chunks[2])
    assert not torch.equal(chunks[0], chunks[1])


@pytest.mark.parametrize(
    ("head", "overrides", "method"),
    [
        ("flow", [], "vjp"),
        ("flow", ["continuation={method: identity, schedule: linear, strength: 5.0}"], "identity"),
        ("flow", ["committed=3"], "trained"),
        ("discrete_diffusion", [], "prior"),
        ("e0", [], "prior"),
        ("regression", ["committed=2"], "trained"),
        ("regression", [], None),
    ],
)
def test_a_chunk_continues_the_one_under_way(
    head: str, overrides: list[str], method: str | None, data: LeRobotDataset
) -> None:
    policy = trained(data, *HEADS[head], *overrides).eval()
    assert policy.supports_rtc() == (method is not None)
    policy.config.rtc_config = RTCConfig(max_guidance_weight=4.0)  # pyright: ignore[reportAttributeAccessIssue]
    policy.init_rtc_processor()
    continuation = policy.model.config.continuation
    assert (continuation and continuation.method) == method
    if continuation is None:
        return
    assert continuation.strength == (5.0 if method == "identity" else 4.0)
    seen, rows = observation(), np.array([[0.5, -2.0], [0.25, 1.0], [3.0, 0.5]], np.float32)
    policy.model.reset(0)
    expected = policy.model.infer(seen, UnderWay(rows, 2)).actions
    filled = torch.from_numpy(np.concatenate([rows, np.zeros((2, 2), np.float32)]))  # as LeRobot does
    policy.model.reset(0)
    with torch.inference_mode():
        chunk = policy.predict_action_chunk(lerobots(seen), inference_delay=2, prev_chunk_left_over=filled)
    np.testing.assert_array_equal(chunk[0].numpy(), expected)
    policy.model.reset(0)
    alone = policy.predict_action_chunk(lerobots(seen), inference_delay=2, prev_chunk_left_over=None)
    assert not torch.equal(alone, chunk)
    if method == "trained":
        np.testing.assert_allclose(chunk[0, :2].numpy(), rows[:2], atol=1e-4)
    with pytest.raises(UsageError, match="a batch of 2"):
        policy.predict_action_chunk(lerobots(seen, 2), inference_delay=1, prev_chunk_left_over=filled)


def test_a_schedule_that_we_do_not_have_is_refused(data: LeRobotDataset) -> None:
    policy = trained(data)
    policy.config.rtc_config = RTCConfig(  # pyright: ignore[reportAttributeAccessIssue]
        prefix_attention_schedule=RTCAttentionSchedule.ONES
    )
    with pytest.raises(UsageError, match=r"ONES.*Valid: EXP, LINEAR, ZEROS"):
        policy.init_rtc_processor()
