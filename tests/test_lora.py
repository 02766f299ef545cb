"""Adapters: small, without effect at first, learnt alone, saved, merged and loaded in another process."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vla import checkpoint, lora
from vla.errors import CheckpointError, UsageError
from vla.policy import VLAPolicy
from vla.policy_config import LoraConfig

LORA = LoraConfig(2, 4.0, 0.0, ("vision", "text", "expert"), ("q_proj", "k_proj", "v_proj"))


def trained(policy: VLAPolicy, policies: SimpleNamespace) -> VLAPolicy:
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        policy.loss(replace(policies.batch(policy, range(6)), noise_seed=step)).total.backward()
        optimizer.step()
    return policy.eval()


@pytest.fixture
def plain(policies: SimpleNamespace) -> VLAPolicy:
    return VLAPolicy.build(policies.CONFIG, policies.STATISTICS, seed=0).eval()


@pytest.fixture
def adapted(policies: SimpleNamespace) -> VLAPolicy:
    policy = VLAPolicy.build(policies.CONFIG, policies.STATISTICS, seed=0)
    lora.add(policy, LORA)
    return trained(policy, policies)


def chunk(policy: VLAPolicy, policies: SimpleNamespace) -> torch.Tensor:
    policy.reset(0)
    return torch.from_numpy(policy.infer(policies.observation()).actions.copy())


def test_adapters_start_without_effect(plain: VLAPolicy, policies: SimpleNamespace) -> None:
    before = chunk(plain, policies)
    lora.add(plain, LORA)
    torch.testing.assert_close(chunk(plain.eval(), policies), before, atol=1e-6, rtol=0)


def test_only_adapters_and_unadapted_parts_learn(plain: VLAPolicy, policies: SimpleNamespace) -> None:
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    lora.add(plain, LORA)
    policy = trained(plain, policies)
    policy.loss(policies.batch(policy, range(6))).total.backward()
    assert not [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    after = {k.replace(".base_layer.", "."): v for k, v in policy.state_dict().items() if lora.MARK not in k}
    changed = {k.split(".")[0] for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed <= {"fresh", "head", "backbone"}
    assert {k for k in after if k.startswith("backbone.") and not torch.equal(after[k], before[k])} <= {
        k for k in after if ".connector." in k
    }, "the connector has no adapters and is trained whole"


def test_a_real_backbones_adapters_are_small() -> None:
    """Rank 16 on the attention of SmolVLM2-500M, without allocating it: under 5 % of the weights."""
    from transformers import SmolVLMConfig, SmolVLMModel

    text = {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49280,
        "pad_token_id": 2,
    }
    settings = SmolVLMConfig.from_dict({"text_config": text})
    with torch.device("meta"):
        model = SmolVLMModel(settings)
        lora.put_in({"text": model.text_model}, replace(LORA, rank=16, parts=("text",)))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert 0 < sum(v for k, v in sizes.items() if lora.MARK in k) < 0.05 * sum(sizes.values())


def test_merged_equals_unmerged(adapted: VLAPolicy, policies: SimpleNamespace) -> None:
    before = chunk(adapted, policies)
    lora.merge(adapted)
    assert not lora.adapters(adapted)
    assert adapted.config.lora is None
    torch.testing.assert_close(chunk(adapted, policies), before, atol=1e-4, rtol=0)


def test_a_merged_policy_is_a_plain_checkpoint(adapted: VLAPolicy, tmp_path: Path, policies: SimpleNamespace) -> None:
    lora.merge(adapted)
    checkpoint.save(adapted, tmp_path / "merged")
    torch.testing.assert_close(
        chunk(checkpoint.load(tmp_path / "merged"), policies), chunk(adapted, policies), atol=1e-6, rtol=0
    )


def test_a_checkpoint_with_adapters_loads_in_a_fresh_process(
    adapted: VLAPolicy, tmp_path: Path, policies: SimpleNamespace
) -> None:
    checkpoint.save(adapted, tmp_path / "policy")
    torch.save(chunk(adapted, policies), tmp_path / "chunk.pt")
    kit = Path(__file__).parent / "programs/policy_kit.py"
    code = f"""
import runpy, torch
from vla import checkpoint
kit = runpy.run_path({str(kit)!r})
policy = checkpoint.load({str(tmp_path / "policy")!r})
policy.reset(0)
expected = torch.load({str(tmp_path / "chunk.pt")!r}, weights_only=True)
assert torch.equal(torch.from_numpy(policy.infer(kit["observation"]()).actions.copy()), expected)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_adapter_alone_makes_its_base_the_same(
    adapted: VLAPolicy, plain: VLAPolicy, tmp_path: Path, policies: SimpleNamespace
) -> None:
    lora.save(adapted, tmp_path / "adapter")
    lora.load(plain, tmp_path / "adapter")
    assert torch.equal(chunk(plain.eval(), policies), chunk(adapted, policies))


def test_an_adapter_of_other_weights_is_refused(adapted: VLAPolicy, tmp_path: Path, policies: SimpleNamespace) -> None:
    lora.save(adapted, tmp_path / "adapter")
    other = VLAPolicy.build(policies.CONFIG, policies.STATISTICS, seed=1)
    with pytest.raises(CheckpointError, match="trained on other weights than these"):
        lora.load(other, tmp_path / "adapter")
    (tmp_path / "adapter/adapter.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is no adapter, or a damaged one"):
        lora.load(other, tmp_path / "adapter")


def test_adapters_that_make_no_sense_are_refused(adapted: VLAPolicy, plain: VLAPolicy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="merge them first"):
        lora.add(adapted, LORA)
    with pytest.raises(UsageError, match=r"\['nothing'\] name no matrix of part 'vision'"):
        lora.add(plain, replace(LORA, targets=("nothing",)))
    with pytest.raises(UsageError, match="rank >= 1"):
        replace(LORA, rank=0)
    with pytest.raises(UsageError, match="has no adapters"):
        lora.save(plain, tmp_path / "none")
