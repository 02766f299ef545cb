"""Every training configuration: it loads, and the policy it describes, shrunk, takes a training step and answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from train.recipe import Recipe
from train.train_config import TrainConfig
from vla import config
from vla.backbone_config import (
    BackboneConfig,
    PaliGemmaConfig,
    QwenVLConfig,
    SmolVLMConfig,
    TinyPaliGemma,
    TinyQwenVL,
    TinyVLM,
)
from vla.batch import Batch
from vla.policy import VLAPolicy
from vla.policy_config import PolicyConfig
from vla.stats import Moments, Statistics
from vla.types import Observation

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("sft_*.yaml"))
ROWS = 2


def tiny(backbone: BackboneConfig) -> BackboneConfig:
    match backbone:
        case SmolVLMConfig():
            return replace(backbone, weights=None, tiny=TinyVLM(32, 1, 2, 4, 48, 8, 2), text_layers=None)
        case PaliGemmaConfig():
            return replace(backbone, weights=None, tiny=TinyPaliGemma("gemma", 32, 1, 2, 4, 8, 48, 8))
        case QwenVLConfig():
            return replace(backbone, weights=None, tiny=TinyQwenVL("qwen3_vl", 32, 1, 2, 4, 2, 48, 16))


def shrunk(policy: PolicyConfig) -> PolicyConfig:
    expert = replace(policy.expert, width=24, layers=2, mlp=32)
    return replace(policy, backbone=tiny(policy.backbone), expert=expert, image_size=32, max_tokens=250)


def statistics(recipe: Recipe) -> Statistics:
    def moments(dim: int) -> Moments:
        return Moments(100, *(np.full(dim, v) for v in (0.1, 2.0, -9.0, 9.0, -5.0, -2.0, 0.0, 2.0, 5.0)))

    state, action = recipe.state.spec, recipe.action.spec
    return Statistics(state, action, moments(state.dim), moments(action.dim), "made up")


def batch(policy: VLAPolicy, observation: Observation) -> Batch:
    settings, processor = policy.config, policy.processor
    images, present = processor.images(observation.images)
    state = processor.codec.encode_state(observation.state)
    ids, mask = processor.text(observation.instruction, observation.state)
    g = torch.Generator().manual_seed(0)

    def rows(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)[None].expand(ROWS, *array.shape)

    return Batch(
        images=rows(images),
        image_mask=rows(present),
        tokens=rows(ids[: mask.sum()]),
        token_mask=rows(mask[: mask.sum()]),
        observation=torch.arange(ROWS),
        age=torch.zeros(ROWS),
        fast_images=torch.zeros(ROWS, 0, 0, 0, 3, dtype=torch.uint8),
        fast_image_mask=torch.zeros(ROWS, 0, dtype=torch.bool),
        state=rows(state),
        history=torch.zeros(ROWS, 0, settings.state_dim),
        actions=torch.randn(ROWS, settings.chunk, settings.action_dim, generator=g).clamp(-1, 1),
        valid=torch.ones(ROWS, settings.chunk, dtype=torch.bool),
        dim_mask=rows(processor.codec.dim_mask()),
        rows=torch.arange(ROWS),
        global_size=ROWS,
        noise_seed=3,
        loss_scale=1.0,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_policy_of_a_configuration_learns_and_answers(path: Path) -> None:
    given = config.load(TrainConfig, path)
    recipe = config.load(Recipe, ROOT / given.data.mixture[0].recipe)
    assert set(given.policy.cameras) <= set(recipe.cameras)
    settings = shrunk(given.policy)
    policy = VLAPolicy.build(settings, statistics(recipe), seed=0)
    rng = np.random.default_rng(0)
    observation = Observation(
        stamp_s=1.0,
        images={name: rng.integers(0, 256, (48, 64, 3), np.uint8) for name in recipe.cameras},
        state=np.zeros(recipe.state.spec.dim, np.float32),
        instruction="put the cube into the box",
    )
    out = policy.loss(batch(policy, observation))
    out.total.backward()
    assert out.total.isfinite()
    frozen = set(settings.backbone.freeze)
    assert set(policy.parameter_groups()) == {"vision", "connector", "text", "expert"} - frozen
    idle = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    chunk = policy.eval().infer(observation)
    assert chunk.actions.shape == (settings.chunk, recipe.action.spec.dim)
    assert np.isfinite(chunk.actions).all()
    assert chunk.execute == settings.execute
