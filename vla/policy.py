"""The policy: backbone -> prefix cache -> expert and head -> action chunk.

loss(batch)           training, through the same cached path as inference
encode(...)           slow: images and instruction -> PrefixCache
sample(cache, ...)    fast: cache, state and what steers -> chunks
infer(observation)    both, for the runtime: `vla.types.Policy`
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vla import lora
from vla import tokenizer as tokenizers
from vla.action_tokens import load as action_tokenizers
from vla.action_tokens.base import ActionTokenizer, ChunkShape
from vla.backbones.base import Backbone
from vla.backbones.build import new_backbone
from vla.batch import Batch
from vla.cache import PrefixCache
from vla.chunk_tokens import ChunkTokens
from vla.codec import Codec
from vla.conditions import Conditions, Steering, trained_intent
from vla.denoiser import Predictor
from vla.engine.current import Current
from vla.expert import ActionExpert
from vla.fast_path import FastPath
from vla.fresh import Fresh, FreshInputs
from vla.heads.base import Draws, Target
from vla.heads.build import make_head
from vla.horizons import HorizonGate, consensus
from vla.losses import LossOut
from vla.objective import policy_loss
from vla.observed import closest_past, continuation, executed, fresh_inputs, slow_inputs
from vla.policy_config import PolicyConfig
from vla.processor import Processor
from vla.rtc import Committed, Guidance
from vla.sampling import Sampled
from vla.stats import Statistics
from vla.types import ActionChunk, ActionSpec, Observation, UnderWay


class VLAPolicy(nn.Module):
    """Implements `vla.types.Policy`; composed of parts that know nothing of one another's insides."""

    def __init__(
        self,
        config: PolicyConfig,
        backbone: Backbone,
        processor: Processor,
        chunk_tokenizer: ActionTokenizer | None,
    ) -> None:
        super().__init__()
        width = config.expert.width
        self.config, self.processor = config, processor
        self.backbone = backbone
        self.expert = ActionExpert(config.expert, backbone.shape)
        self.fresh = FreshInputs(config, backbone.width)
        self.conditions = Conditions(config.conditions, config.fast_slow, width)
        self.gate = HorizonGate(config.mixture, width) if config.mixture else None
        self.head = make_head(config, processor.codec.action_spec.dim)
        self.chunk_tokens = None if chunk_tokenizer is None else ChunkTokens(chunk_tokenizer, backbone.width)
        if config.lora is not None:
            lora.put_in(self.adaptable(), config.lora)
            backbone.freeze_unused()
        self._generator = torch.Generator()
        self._engine = Current()
        self.mode = 0  # the behaviour of the chunks that are asked for: forward, unless tasks are being switched

    @classmethod
    def build(cls, config: PolicyConfig, statistics: Statistics, seed: int) -> "VLAPolicy":
        """A policy to start training from. The same seed gives the same random weights.

        Raises:
            CheckpointError: the pretrained backbone cannot be had.
            TandemError: the data has more dimensions than the model.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone, tokenizer = new_backbone(config.backbone, config.image_size, config.reads)
            folder = Path(config.token_loss.tokenizer) if config.token_loss else None
            return cls.compose(config, statistics, backbone, tokenizer, folder)

    @classmethod
    def compose(
        cls,
        config: PolicyConfig,
        statistics: Statistics,
        backbone: Backbone,
        tokenizer: tokenizers.Tokenizer,
        chunk_tokenizer: Path | None = None,
    ) -> "VLAPolicy":
        """A policy of these parts; `chunk_tokenizer` is the folder that `config.token_loss` needs, or None."""
        codec = Codec(statistics, config.normalization, config.state_dim, config.action_dim)
        spec = codec.action_spec
        shape = ChunkShape(config.chunk, spec.dim, spec.rate_hz, config.normalization)
        tokens = None if chunk_tokenizer is None else action_tokenizers.load(chunk_tokenizer, shape)
        return cls(config, backbone, Processor(config, tokenizer, codec), tokens)

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
    def history(self) -> int:
        """States before the observation that it wants in `Observation.history`."""
        return self.config.history

    @property
    def past(self) -> int:
        """Commands before the observation that it wants in `Observation.executed`."""
        return self.config.past if self.config.candidates > 1 else 0

    @property
    def _fast(self) -> FastPath:
        """The parts behind the encoding as they are now: a changed `config` counts at once."""
        parts = (self.backbone, self.fresh, self.conditions, self.expert, self.gate, self.head)
        return FastPath(self.config, *parts, real_dim=self.action_spec.dim, engine=self._engine)

    @property
    def device(self) -> torch.device:
        return next(self.expert.parameters()).device

    def adaptable(self) -> dict[str, nn.Module]:
        """Parts that can be given low-rank adapters."""
        return self.backbone.parts() | {"expert": self.expert}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part: "vision", "connector", "text", "expert"."""
        parts: dict[str, Sequence[nn.Module]] = {k: [v] for k, v in self.backbone.parts().items()}
        own = (self.expert, self.fresh, self.conditions, self.head, self.gate, self.chunk_tokens)
        parts["expert"] = [part for part in own if part is not None]
        groups = {k: [p for m in modules for p in m.parameters() if p.requires_grad] for k, modules in parts.items()}
        return {k: v for k, v in groups.items() if v}

    def forward(self, batch: Batch) -> LossOut:
        """As `loss`; the name under which wrappers for several processes call it."""
        return self.loss(batch)

    def loss(self, batch: Batch) -> LossOut:
        """The head's loss, a mean over the micro-batch's own supervised entries."""
        cache = self.encode(batch.images, batch.image_mask, batch.tokens, batch.token_mask)
        if self.config.fast_slow is not None:
            cache = cache.select(batch.observation)
        target = Target(actions=batch.actions, valid=batch.valid, dim_mask=batch.dim_mask)
        slow = self.config.token_loss
        if slow is None or self.chunk_tokens is None:
            return self._head_loss(cache, batch, target)
        fast = self._head_loss(cache.detach() if slow.backbone_learns_from == "tokens" else cache, batch, target)
        ahead = slice(self.config.past, None)
        actions, valid = batch.actions[:, ahead, : self.action_spec.dim], batch.valid[:, ahead]
        named = slow.weight * self.chunk_tokens.loss(self.backbone, cache, actions, valid, target.entries())
        return LossOut(total=fast.total + named, terms=fast.terms | {"chunk_tokens": named.detach()})

    def _head_loss(self, cache: PrefixCache, batch: Batch, target: Target) -> LossOut:
        draws = Draws(seed=batch.noise_seed, global_size=batch.global_size, rows=batch.rows)
        intent = trained_intent(self.config.conditions, batch.intent, draws, self.head.draws)
        steering = Steering(batch.age, batch.mode, intent)
        fresh = Fresh(batch.state, batch.fast_images, batch.fast_image_mask, steering, batch.history)
        denoiser = self._fast.denoiser(cache, fresh, self.head.draws)
        return policy_loss(
            self.head,
            denoiser,
            replace(target, source=self._fast.source(fresh)),
            draws,
            committed=self.config.committed,
            mixture=self.config.mixture,
            past=self.config.past,
            past_weight=self.config.past_weight,
        )

    def encode(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Slow path; arguments as `Batch`."""
        return self.backbone.encode(images, image_mask, tokens, token_mask)

    @torch.no_grad()
    def sample(
        self,
        cache: PrefixCache,
        fresh: Fresh,
        n: int,
        generator: torch.Generator,
        *,
        committed: Committed | None = None,
        guidance: Guidance | None = None,
    ) -> Sampled:
        """Fast path: n chunks for each entry, (B, n, past + H, A) in model units, on one shared prefix.

        From the same generator state the first m of n samples are the m samples of a call with n = m. In eval mode
        this is `vla.engine`, with guidance or in training mode the plain path (`vla.fast_path`).
        """
        return self._fast.sample(cache, fresh, n, generator, committed, guidance)

    @torch.no_grad()
    def predictor(self, cache: PrefixCache, fresh: Fresh, n: int) -> Predictor:
        """What n chunks for each entry are drawn with, for those who draw them otherwise than `sample`."""
        return self._fast.predictor(cache, fresh, n)

    @torch.no_grad()
    def encode_observation(self, observation: Observation) -> PrefixCache:
        """One observation -> a cache of batch 1 that carries its capture time."""
        cache = self.encode(*slow_inputs(self.processor, observation, self.device))
        return replace(cache, stamp_s=observation.stamp_s)

    def sample_n(
        self,
        observation: Observation,
        n: int,
        cache: PrefixCache | None = None,
        under_way: UnderWay | None = None,
    ) -> np.ndarray:
        """n chunks (n, H, A) float32 in physical units for one observation, which is encoded once.

        Args:
            cache: an encoding of this observation or of an earlier one, which then counts as older.
            under_way: what of the previous chunk is still to be executed; continued as `config.continuation` says.
        """
        cache = self.encode_observation(observation) if cache is None else cache
        return self._physical(self._draw(cache, observation, n, under_way))

    def _draw(self, cache: PrefixCache, observation: Observation, n: int, under_way: UnderWay | None) -> Sampled:
        committed, guidance = continuation(self.config, self.processor, under_way, self.device)
        fresh = self.fresh_inputs(observation, cache)
        return self.sample(cache, fresh, n, self._generator, committed=committed, guidance=guidance)

    def _physical(self, sampled: Sampled) -> np.ndarray:
        """The chunks (n, H, A) of the one row, without the steps before the observation."""
        ahead = sampled.actions[0, :, self.config.past :]
        return self.processor.codec.decode_actions(ahead.float().cpu().numpy())

    def _chosen(self, sampled: Sampled, observation: Observation) -> int:
        """Which of the candidates to execute."""
        past, real = self.config.past, self.action_spec.dim
        if not self.past:
            return 0
        candidates = sampled.actions[0, :, :past, :real].float().cpu().numpy()
        return closest_past(candidates, executed(self.processor, observation))

    def fresh_inputs(self, observation: Observation, cache: PrefixCache) -> Fresh:
        """What the fast path takes of an observation; `cache` may be of an earlier one."""
        age = round((observation.stamp_s - cache.stamp_s) * self.action_spec.rate_hz)
        steering = Steering(*(torch.tensor([given], device=self.device) for given in (float(age), self.mode)))
        return fresh_inputs(self.processor, observation, steering, self.device)

    def reset(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def infer(self, observation: Observation, under_way: UnderWay | None = None) -> ActionChunk:
        """Answer an observation with one chunk, in physical units and not clipped."""
        start = time.perf_counter()
        cache = self.encode_observation(observation)
        encoded = time.perf_counter()
        chunk = self.act(cache, observation, under_way)
        return replace(chunk, diagnostics={"encode_ms": 1e3 * (encoded - start), **chunk.diagnostics})

    def act(self, cache: PrefixCache, observation: Observation, under_way: UnderWay | None = None) -> ActionChunk:
        """The fast path alone: a chunk for the newest state, from an encoding that may be older."""
        start = time.perf_counter()
        sampled = self._draw(cache, observation, self.config.candidates, under_way)
        return self.conclude(sampled, observation, start)

    def conclude(self, sampled: Sampled, observation: Observation, began: float) -> ActionChunk:
        """The chunk to execute, of candidates (1, n, past + H, A) that were drawn for an observation.

        Args:
            began: `time.perf_counter()` when they were asked for.
        """
        chosen = self._chosen(sampled, observation)
        actions = self._physical(sampled)[chosen]
        diagnostics = {"denoise_ms": 1e3 * (time.perf_counter() - began)}
        execute, mixture = self.config.execute, self.config.mixture
        if sampled.disagreement is not None and mixture is not None and mixture.consensus is not None:
            apart = sampled.disagreement[0, chosen].float().cpu().numpy()
            execute = consensus(apart, mixture.horizons, mixture.consensus)
            diagnostics["disagreement"] = float(apart.mean())
        return ActionChunk(
            stamp_s=observation.stamp_s,
            period_s=1.0 / self.action_spec.rate_hz,
            actions=actions,
            execute=execute,
            diagnostics=diagnostics,
        )
