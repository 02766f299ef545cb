"""A small policy, an observation and a batch, for the tests of policies."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vla.backbone_config import SmolVLMConfig, TinyVLM
from vla.batch import Batch
from vla.head_config import FlowConfig
from vla.policy import VLAPolicy
from vla.policy_config import ExpertConfig, PolicyConfig
from vla.stats import Moments, Statistics
from vla.types import ActionSpec, Observation

CONFIG = PolicyConfig(
    chunk=5,
    execute=3,
    state_dim=4,
    action_dim=3,
    cameras=("front", "wrist"),
    image_size=32,
    max_tokens=24,
    normalization="mean_std",
    state="suffix",
    backbone=SmolVLMConfig("smolvlm", None, TinyVLM(32, 1, 2, 4, 48, 8, 2), None, ()),
    expert=ExpertConfig(24, 2, 32, ("joint", "cross"), "rms", "bidirectional"),
    head=FlowConfig("flow", "concat", 4, 1.0, 2),
)


def spec(dim: int) -> ActionSpec:
    names = tuple("abcdef"[:dim])
    return ActionSpec(names, ("1",) * dim, ("delta",) * dim, (-1.0,) * dim, (1.0,) * dim, 20.0)


def moments(dim: int) -> Moments:
    rows = [np.full(dim, v) for v in (0.1, 2.0, -9.0, 9.0, -5.0, -2.0, 0.0, 2.0, 5.0)]
    return Moments(100, *rows)


STATISTICS = Statistics(spec(4), spec(2), moments(4), moments(2), "made up")


def observation(instruction: str = "turn left") -> Observation:
    rng = np.random.default_rng(0)
    images = {n: rng.integers(0, 256, (40, 30, 3), np.uint8) for n in ("front", "wrist", "unused")}
    return Observation(12.5, images, rng.normal(size=4).astype(np.float32), instruction)


def batch(policy: VLAPolicy, rows: Sequence[int], size: int = 6) -> Batch:
    g = torch.Generator().manual_seed(5)

    def cut(x: Tensor) -> Tensor:
        return x[list(rows)]

    ids, mask = zip(*(policy.processor.text(t) for t in ("turn left", "stop", "go on and on")), strict=True)
    return Batch(
        images=cut(torch.randint(0, 256, (size, 2, 32, 32, 3), dtype=torch.uint8, generator=g)),
        image_mask=cut(torch.tensor([[True, True], [True, False]] * 3)),
        tokens=cut(torch.from_numpy(np.stack(ids * 2))),
        token_mask=cut(torch.from_numpy(np.stack(mask * 2))),
        state=cut(torch.randn(size, 4, generator=g)),
        actions=cut(torch.randn(size, 5, 3, generator=g)),
        valid=cut(torch.arange(5) < torch.tensor([5, 5, 2, 3, 1, 4])[:, None]),
        dim_mask=cut(torch.tensor([[True, True, False]] * 6)),
        observation=torch.arange(len(rows)),
        age=torch.zeros(len(rows)),
        history=torch.zeros(len(rows), 0, 4),
        fast_images=torch.zeros(len(rows), 0, 0, 0, 3, dtype=torch.uint8),
        fast_image_mask=torch.zeros(len(rows), 0, dtype=torch.bool),
        rows=torch.tensor(list(rows)),
        global_size=size,
        noise_seed=3,
        loss_scale=1.0,
    )
