"""Small heads with a random context, for the tests of heads, horizons and real-time chunking."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from vla.backbone_config import SmolVLMConfig, TinyVLM
from vla.cache import CacheShape, PrefixCache
from vla.denoiser import Denoiser
from vla.expert import ActionExpert, Context
from vla.head_config import DiscreteDiffusionConfig, E0Config, FlowConfig, HeadConfig, RegressionConfig
from vla.heads.base import ActionHead, Draws, Target
from vla.heads.build import make_head
from vla.horizons import HorizonGate
from vla.losses import LossOut
from vla.objective import policy_loss
from vla.policy_config import ExpertConfig, MixtureConfig, PolicyConfig
from vla.sampling import Sampled, sample

BATCH, STEPS, REAL, PADDED, WIDTH, PREFIX = 4, 5, 2, 3, 24, 6
DISCRETE = DiscreteDiffusionConfig("discrete_diffusion", 16, (), "per_step", 6, "max", "none", 1.0, 0.0, 2)
E0 = E0Config("e0", 16, "per_step", 1.0, "concat", 6, 2)
FLOW = FlowConfig("flow", "concat", 6, 1.0, 2)
MIXTURE = MixtureConfig((1, 3, 5), "none", 1.0, 1e-3, None)
HEADS: dict[str, HeadConfig] = {
    "flow": FLOW,
    "flow_adarms": replace(FLOW, time="adarms"),
    "flow_entropy": replace(FLOW, error_entropy=0.01),
    "regression_l1": RegressionConfig("regression", "l1"),
    "regression_l2": RegressionConfig("regression", "l2"),
    "discrete": DISCRETE,
    "discrete_scalar": replace(DISCRETE, layout="per_scalar"),
    "discrete_gap": replace(DISCRETE, score="gap", remask="threshold"),
    "discrete_code": replace(DISCRETE, score="sampled", remask="decay", choice_temperature=1.0),
    "e0": E0,
    "e0_scalar_adarms": replace(E0, layout="per_scalar", time="adarms"),
}


@dataclass(frozen=True)
class Kit:
    config: PolicyConfig
    head: ActionHead
    expert: ActionExpert
    gate: HorizonGate | None

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        parts = {"head": self.head, "expert": self.expert, "gate": self.gate}
        return [(f"{k}.{n}", p) for k, m in parts.items() if m is not None for n, p in m.named_parameters()]

    def context(self, rows: slice = slice(None)) -> Context:
        g = torch.Generator().manual_seed(1)
        keys, values = (torch.randn(2, BATCH, 2, PREFIX, 8, generator=g)[:, rows] for _ in range(2))
        valid = (torch.arange(PREFIX) < torch.tensor([6, 4, 5, 6])[:, None])[rows]
        state = torch.randn(BATCH, 1, WIDTH, generator=g)[rows]
        cache = PrefixCache(tuple(keys), tuple(values), valid, valid.sum(1))
        return self.expert.context(cache, state, self.head.fresh_condition(state))

    def denoiser(self, groups: int, rows: slice = slice(None)) -> Denoiser:
        return Denoiser(self.head, self.expert, self.gate, self.context(rows), groups, STEPS)

    def loss(self, target: Target, rows: slice = slice(None), seed: int = 3) -> LossOut:
        return policy_loss(
            self.head,
            self.denoiser(self.head.draws, rows),
            target,
            Draws(seed, BATCH, torch.arange(BATCH)[rows]),
            committed=self.config.committed,
            mixture=self.config.mixture,
        )

    def sample(self, groups: int, seed: int = 0, **options: Any) -> Sampled:
        with torch.no_grad():
            shape, device = (BATCH, groups, STEPS, PADDED), torch.device("cpu")
            generator = torch.Generator().manual_seed(seed)
            predictor = options.pop("predictor", None) or self.denoiser(groups)
            return sample(self.head, predictor, shape, generator, device, real_dim=REAL, **options)


def policy_config(head: HeadConfig, **changes: Any) -> PolicyConfig:
    norm = "adarms" if getattr(head, "time", "") == "adarms" else "rms"
    plain = PolicyConfig(
        chunk=STEPS,
        execute=1,
        state_dim=4,
        action_dim=PADDED,
        cameras=("front",),
        image_size=32,
        max_tokens=8,
        normalization="quantile",
        state="suffix",
        backbone=SmolVLMConfig("smolvlm", None, TinyVLM(32, 1, 1, 4, 48, 8, 2), None, ()),
        expert=ExpertConfig(WIDTH, 2, 32, ("joint",), norm, "bidirectional"),
        head=head,
    )
    return replace(plain, **changes)


def make(head: HeadConfig, **changes: Any) -> Kit:
    torch.manual_seed(0)
    config = policy_config(head, **changes)
    expert = ActionExpert(config.expert, CacheShape(2, 2, 2, 8, 100.0))
    for name, p in expert.named_parameters():  # zero-initialised gates would hide a broken condition
        if "dense" in name:
            torch.nn.init.normal_(p, std=0.3)
    gate = HorizonGate(config.mixture, WIDTH) if config.mixture else None
    return Kit(config, make_head(config, REAL), expert, gate)


def target(rows: slice = slice(None)) -> Target:
    g = torch.Generator().manual_seed(2)
    actions = torch.rand(BATCH, STEPS, PADDED, generator=g) * 1.8 - 0.9
    valid = torch.arange(STEPS) < torch.tensor([5, 5, 3, 1])[:, None]
    dim_mask = torch.tensor([True, True, False]).expand(BATCH, -1)
    return Target(actions[rows], valid[rows], dim_mask[rows])
