"""The policy: backbone -> prefix cache -> expert and head -> action chunk.

loss(batch)           training, through the same cached path as inference
encode(...)           slow: images and instruction -> PrefixCache
sample(cache, ...)    fast: cache and state -> chunks
infer(observation)    both, for the runtime: `vla.types.Policy`
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from vla import tokenizer as tokenizers
from vla.backbones.base import Backbone
from vla.backbones.build import new_backbone
from vla.batch import Batch
from vla.cache import PrefixCache
from vla.codec import Codec
from vla.errors import UsageError
from vla.expert import ActionExpert, Context
from vla.head_config import DiscreteDiffusionConfig, E0Config, FlowConfig, RegressionConfig
from vla.heads.base import ActionHead, Draws, ExpertCall, Target
from vla.heads.discrete_diffusion import DiscreteDiffusionHead
from vla.heads.e0 import E0Head
from vla.heads.flow import FlowHead
from vla.heads.regression import RegressionHead
from vla.losses import LossOut
from vla.policy_config import PolicyConfig
from vla.processor import Processor
from vla.stats import Statistics
from vla.types import ActionChunk, ActionSpec, Observation


def make_head(config: PolicyConfig, real_dim: int) -> ActionHead:
    """The head that `config.head` names, for actions of `real_dim` dimensions padded to `config.action_dim`.

    Raises:
        UsageError: the head's settings name a dimension that the actions do not have.
    """
    head, padded, width = config.head, config.action_dim, config.expert.width
    match head:
        case FlowConfig():
            return FlowHead(head, padded, width)
        case RegressionConfig():
            return RegressionHead(head, padded, width)
        case DiscreteDiffusionConfig():
            if any(not 0 <= d < real_dim for d in head.binary_dims):
                raise UsageError(f"policy.head.binary_dims is {head.binary_dims}; the actions have 0..{real_dim - 1}.")
            return DiscreteDiffusionHead(head, real_dim, padded, width)
        case E0Config():
            return E0Head(head, real_dim, padded, width)


class VLAPolicy(nn.Module):
    """Implements `vla.types.Policy`; composed of parts that know nothing of one another's insides."""

    def __init__(self, config: PolicyConfig, backbone: Backbone, processor: Processor) -> None:
        super().__init__()
        self.config, self.processor = config, processor
        self.backbone = backbone
        self.expert = ActionExpert(config.expert, backbone.shape)
        self.state_proj = nn.Linear(config.state_dim, config.expert.width)
        self.head = make_head(config, processor.codec.action_spec.dim)
        self._generator = torch.Generator()

    @classmethod
    def build(cls, config: PolicyConfig, statistics: Statistics, seed: int) -> "VLAPolicy":
        """A policy to start training from. The same seed gives the same random weights.

        Raises:
            CheckpointError: the pretrained backbone cannot be had.
            TandemError: the data has more dimensions than the model.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone, tokenizer = new_backbone(config.backbone, config.image_size)
            return cls.compose(config, statistics, backbone, tokenizer)

    @classmethod
    def compose(
        cls, config: PolicyConfig, statistics: Statistics, backbone: Backbone, tokenizer: tokenizers.Tokenizer
    ) -> "VLAPolicy":
        codec = Codec(statistics, config.normalization, config.state_dim, config.action_dim)
        return cls(config, backbone, Processor(config, tokenizer, codec))

    @property
    def action_spec(self) -> ActionSpec:
        return self.processor.codec.action_spec

    @property
    def state_spec(self) -> ActionSpec:
        return self.processor.codec.state_spec

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.config.cameras

    @property
    def device(self) -> torch.device:
        return self.state_proj.weight.device

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part: "vision", "connector", "text", "expert"."""
        parts: dict[str, Sequence[nn.Module]] = {k: [v] for k, v in self.backbone.parts().items()}
        parts["expert"] = [self.expert, self.state_proj, self.head]
        groups = {k: [p for m in modules for p in m.parameters() if p.requires_grad] for k, modules in parts.items()}
        return {k: v for k, v in groups.items() if v}

    def forward(self, batch: Batch) -> LossOut:
        """As `loss`; the name under which wrappers for several processes call it."""
        return self.loss(batch)

    def loss(self, batch: Batch) -> LossOut:
        """The head's loss, a mean over the micro-batch's own supervised entries."""
        cache = self.encode(batch.images, batch.image_mask, batch.tokens, batch.token_mask)
        target = Target(actions=batch.actions, valid=batch.valid, dim_mask=batch.dim_mask)
        draws = Draws(seed=batch.noise_seed, global_size=batch.global_size, rows=batch.rows)
        return self.head.loss(self.expert, self.context(cache, batch.state), target, draws)

    def encode(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Slow path; arguments as `Batch`."""
        return self.backbone.encode(images, image_mask, tokens, token_mask)

    def context(self, cache: PrefixCache, state: Tensor) -> Context:
        """Cache and state (B, S) in model units -> what the action tokens attend to."""
        fresh = self.state_proj(state.to(self.state_proj.weight.dtype))[:, None]
        return self.expert.context(cache, fresh, self.head.fresh_condition(fresh))

    @torch.no_grad()
    def sample(self, cache: PrefixCache, state: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Fast path: n chunks for each entry, (B, n, H, A) in model units, on one shared prefix.

        From the same generator state the first m of n samples are the m samples of a call with n = m.
        """
        context = self.context(cache, state)
        call = ExpertCall(self.expert, context, n, self.head.token_count(self.config.chunk))
        return self.head.sample(call, (cache.batch, n, self.config.chunk, self.config.action_dim), generator)

    @torch.no_grad()
    def encode_observation(self, observation: Observation) -> PrefixCache:
        """One observation -> a cache of batch 1 that carries its capture time."""
        images, present = self.processor.images(observation.images)
        ids, mask = self.processor.text(observation.instruction)
        count = int(mask.sum())  # padding is not computed
        cache = self.encode(
            self._tensor(images)[None],
            self._tensor(present)[None],
            self._tensor(ids[:count])[None],
            self._tensor(mask[:count])[None],
        )
        return replace(cache, stamp_s=observation.stamp_s)

    def sample_n(self, observation: Observation, n: int, cache: PrefixCache | None = None) -> np.ndarray:
        """n chunks (n, H, A) float32 in physical units for one observation, which is encoded once."""
        cache = self.encode_observation(observation) if cache is None else cache
        state = self._tensor(self.processor.codec.encode_state(observation.state))[None]
        chunks = self.sample(cache, state, n, self._generator)[0]
        return self.processor.codec.decode_actions(chunks.float().cpu().numpy())

    def reset(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def infer(self, observation: Observation) -> ActionChunk:
        """Answer an observation with one chunk, in physical units and not clipped."""
        start = time.perf_counter()
        cache = self.encode_observation(observation)
        encoded = time.perf_counter()
        actions = self.sample_n(observation, 1, cache)[0]
        done = time.perf_counter()
        return ActionChunk(
            stamp_s=observation.stamp_s,
            period_s=1.0 / self.action_spec.rate_hz,
            actions=actions,
            execute=self.config.execute,
            diagnostics={"encode_ms": 1e3 * (encoded - start), "denoise_ms": 1e3 * (done - encoded)},
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
