"""The whole policy: training path, decode settings, the runtime's protocol, its folder."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla import checkpoint, tokenizer
from vla.errors import CheckpointError, TandemError, UsageError
from vla.load import load_policy
from vla.policy import VLAPolicy
from vla.types import Observation

KIT = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "programs/policy_kit.py")))
CONFIG, STATISTICS, observation, batch, spec = KIT.CONFIG, KIT.STATISTICS, KIT.observation, KIT.batch, KIT.spec


@pytest.fixture
def policy() -> VLAPolicy:
    return VLAPolicy.build(CONFIG, STATISTICS, seed=0).eval()


def test_the_same_seed_builds_the_same_policy(policy: VLAPolicy) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = VLAPolicy.build(CONFIG, STATISTICS, seed=0)
    assert torch.equal(torch.get_rng_state(), before), "building must not disturb the caller's generator"
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values(), strict=True)
    )
    other = VLAPolicy.build(CONFIG, STATISTICS, seed=1)
    name = "fresh.state_proj.weight"
    assert not torch.equal(policy.state_dict()[name], other.state_dict()[name])


def test_every_trainable_weight_learns(policy: VLAPolicy) -> None:
    policy.loss(batch(policy, list(range(6)))).total.backward()
    idle = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    named = {id(p) for group in policy.parameter_groups().values() for p in group}
    assert named == {id(p) for p in policy.parameters() if p.requires_grad}


def test_frozen_parts_do_not_learn() -> None:
    frozen = replace(CONFIG, backbone=replace(CONFIG.backbone, freeze=("vision", "text")))
    policy = VLAPolicy.build(frozen, STATISTICS, seed=0)
    policy.loss(batch(policy, [0, 1])).total.backward()
    assert set(policy.parameter_groups()) == {"connector", "expert"}
    assert all(p.grad is None for p in policy.backbone.model.vision_model.parameters())


def test_accumulated_losses_are_the_big_batch_s(policy: VLAPolicy) -> None:
    whole = batch(policy, list(range(6)))
    total = policy.loss(whole).total
    parts = [batch(policy, rows) for rows in ([0, 1, 2], [3, 4, 5])]
    scaled = [policy.loss(p).total * 2 * p.valid.sum() / whole.valid.sum() for p in parts]
    torch.testing.assert_close(sum(scaled) / 2, total, atol=1e-6, rtol=0)


def test_infer_is_repeatable_and_physical(policy: VLAPolicy) -> None:
    chunks = []
    for _ in range(2):
        policy.reset(4)
        chunks.append(policy.infer(observation()))
    first, again = chunks
    assert np.array_equal(first.actions, again.actions)
    assert first.actions.shape == (5, 2)
    assert (first.stamp_s, first.period_s, first.execute) == (12.5, 0.05, 3)
    assert not np.array_equal(policy.infer(observation()).actions, first.actions), "the noise goes on within an episode"


def test_sampling_decodes_with_the_data_s_statistics() -> None:
    """Zero in model units is the data's mean."""
    policy = VLAPolicy.build(replace(CONFIG, head=replace(CONFIG.head, noise_scale=0.0)), STATISTICS, seed=0).eval()
    policy.load_state_dict({k: v * ("action_out_proj" not in k) for k, v in policy.state_dict().items()})
    np.testing.assert_allclose(policy.infer(observation()).actions, 0.1, atol=1e-6)


def test_samples_share_one_encoding(policy: VLAPolicy) -> None:
    encoded = []
    hook = policy.backbone.model.vision_model.register_forward_hook(lambda *_: encoded.append(1))
    policy.reset(0)
    chunks = policy.sample_n(observation(), 6)
    hook.remove()
    assert len(encoded) == 1
    assert chunks.shape == (6, 5, 2)
    assert len(np.unique(chunks[:, 0, 0])) == 6
    policy.reset(0)
    np.testing.assert_allclose(policy.sample_n(observation(), 2), chunks[:2], atol=1e-5)


def test_the_instruction_and_the_state_matter(policy: VLAPolicy) -> None:
    def act(obs: Observation) -> np.ndarray:
        policy.reset(0)
        return policy.infer(obs).actions

    here = observation()
    assert not np.allclose(act(here), act(observation("turn right")), atol=1e-7)
    moved = Observation(here.stamp_s, dict(here.images), here.state + 1, here.instruction)
    assert not np.allclose(act(here), act(moved), atol=1e-7)


def test_observations_that_do_not_fit_are_refused(policy: VLAPolicy) -> None:
    here = observation()
    with pytest.raises(TandemError, match=r"None of the policy's cameras .* which has \['unused'\]"):
        policy.infer(Observation(0.0, {"unused": here.images["unused"]}, here.state, "go"))
    with pytest.raises(TandemError, match=r"policy\.max_tokens is 24"):
        policy.infer(Observation(0.0, dict(here.images), here.state, "a very long instruction indeed, it is"))
    with pytest.raises(TandemError, match=r"Raise policy\.action_dim"):
        VLAPolicy.build(replace(CONFIG, action_dim=1), STATISTICS, 0)
    with pytest.raises(UsageError, match="exactly when"):
        replace(CONFIG, expert=replace(CONFIG.expert, norm="adarms"))


def test_a_folder_is_complete_in_a_fresh_process(policy: VLAPolicy, tmp_path: Path) -> None:
    checkpoint.save(policy, tmp_path / "policy")
    policy.reset(3)
    expected = policy.infer(observation())
    code = (
        "import sys, numpy as np; from vla.load import load_policy; from vla.types import Observation\n"
        "rng = np.random.default_rng(0)\n"
        "images = {n: rng.integers(0, 256, (40, 30, 3), np.uint8) for n in ('front', 'wrist', 'unused')}\n"
        "o = Observation(12.5, images, rng.normal(size=4).astype(np.float32), 'turn left')\n"
        "p = load_policy(sys.argv[1]); p.reset(3); np.save(sys.argv[2], p.infer(o).actions)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "policy"), str(tmp_path / "out.npy")]
    subprocess.run(run, check=True, env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected.actions, atol=1e-6)


def test_settings_change_decoding_only(policy: VLAPolicy, tmp_path: Path) -> None:
    checkpoint.save(policy, tmp_path / "policy")
    other = load_policy(tmp_path / "policy", settings={"execute": 1, "head.steps": 2, "head.noise_scale": 0.0})
    assert other.infer(observation()).execute == 1
    with pytest.raises(CheckpointError, match=r"cannot be changed after training\. Valid:"):
        load_policy(tmp_path / "policy", settings={"expert.width": 48})
    with pytest.raises(UsageError, match=r"execute must be 1\.\.chunk"):
        load_policy(tmp_path / "policy", settings={"execute": 9})


def test_damaged_folders_are_refused(policy: VLAPolicy, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    checkpoint.save(policy, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.load(folder)
    renamed = {k.replace("state_proj", "proj_state"): v for k, v in policy.state_dict().items()}
    checkpoint.save(policy, folder, renamed)
    with pytest.raises(CheckpointError, match=r"2 weights missing .*state_proj.* 2 unknown .*proj_state"):
        checkpoint.load(folder)
    checkpoint.save(policy, folder)
    (folder / "statistics.json").unlink()
    with pytest.raises(CheckpointError, match=r"statistics\.json missing"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match="No such checkpoint folder"):
        checkpoint.load(tmp_path / "nowhere")


def test_text_of_any_kind_has_tokens() -> None:
    byte_level = tokenizer.byte_level()
    for text in ("open the faucet", "Öffne den Hahn", "打开水龙头", "🤖"):
        assert len(byte_level.encode(text)) == len(text.encode())
        assert max(byte_level.encode(text)) < byte_level.vocab_size
