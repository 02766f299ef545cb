"""The fast path: an encoding and fresh inputs -> chunks. What training and sampling share, and how chunks are drawn.

Axes: B rows, G groups, n samples, H steps, A action dims.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vla.backbones.base import Backbone
from vla.cache import PrefixCache
from vla.conditions import Conditions, Steering
from vla.denoiser import Denoiser, Guided, Predictor
from vla.engine.current import Current
from vla.expert import ActionExpert, Context
from vla.fresh import Fresh, FreshInputs
from vla.heads.base import ActionHead
from vla.horizons import HorizonGate
from vla.policy_config import PolicyConfig
from vla.rtc import Committed, Guidance
from vla.sampling import Sampled, draw, follow


@dataclass(frozen=True)
class FastPath:
    """A policy's parts behind the encoding. It owns no weights."""

    config: PolicyConfig
    backbone: Backbone
    fresh: FreshInputs
    conditions: Conditions
    expert: ActionExpert
    gate: HorizonGate | None
    head: ActionHead
    real_dim: int  # action dimensions that are not padding
    engine: Current

    def denoiser(self, cache: PrefixCache, fresh: Fresh, groups: int) -> Denoiser:
        """The network for `groups` chunks of each row of the cache."""
        return self._denoiser(self._context(cache, fresh), fresh.steering, groups)

    @torch.no_grad()
    def sample(
        self,
        cache: PrefixCache,
        fresh: Fresh,
        n: int,
        generator: torch.Generator,
        committed: Committed | None,
        guidance: Guidance | None,
    ) -> Sampled:
        """As `VLAPolicy.sample`.

        Where the head, expert and gate are in eval mode, `vla.engine` does it and equals the plain path to rounding.
        The plain path does it in training mode, and what the engine does not cover: real-time guidance,
        classifier-free guidance, paths that start at a source, other number formats than float32.
        """
        shape, source = self.shape(cache, n), self.source(fresh)
        steering = self._intended(fresh.steering, cache.batch, n)
        if guidance is None and source is None and not self._contrasts and not self.head.training:
            engine = self.engine.of(self.head, self.expert, self.gate, self.real_dim)
            if engine is not None:
                condition = self.conditions(steering, cache.batch, n)
                tokens, seen = self.fresh.tokens(fresh), self._with_state(cache, fresh)
                return engine.sample(cache, seen, tokens, condition, shape, generator, committed)
        start = draw(self.head, shape, generator, cache.valid.device, source)
        predictor = self.predictor(cache, fresh, n)
        return follow(self.head, predictor, start, real_dim=self.real_dim, committed=committed, guidance=guidance)

    def shape(self, cache: PrefixCache, n: int) -> tuple[int, int, int, int]:
        """Of n samples for each row of the cache; they begin `config.past` steps before the observation."""
        return cache.batch, n, self.config.past + self.config.chunk, self.config.action_dim

    def source(self, fresh: Fresh) -> Tensor | None:
        """Where paths start, of heads that do not start at noise alone."""
        newest = fresh.state[:, None]
        return self.head.source(newest if fresh.history is None else torch.cat((fresh.history, newest), dim=1))

    def predictor(self, cache: PrefixCache, fresh: Fresh, n: int) -> Predictor:
        """What n samples of each row are drawn with; on the plain path."""
        return self._predictor(self._context(cache, fresh), self._intended(fresh.steering, cache.batch, n), n)

    def _context(self, cache: PrefixCache, fresh: Fresh) -> Context:
        """What the action tokens attend to."""
        tokens = self.fresh.tokens(fresh)
        return self.expert.context(self._with_state(cache, fresh), tokens, self.head.fresh_condition(tokens))

    def _with_state(self, cache: PrefixCache, fresh: Fresh) -> PrefixCache:
        """The cache with the state's token behind it, if it belongs there."""
        token = self.fresh.prefix_token(fresh)
        if token is None:
            return cache
        # exact: images and text do not see the state, so their keys and values stay
        alone = torch.ones(1, 1, dtype=torch.bool, device=token.device)
        return self.backbone.extend(cache, token, alone, alone.expand(cache.batch, 1))[0]

    def _denoiser(self, context: Context, steering: Steering, groups: int) -> Denoiser:
        condition = self.conditions(steering, context.valid.shape[0], groups)
        steps = self.config.past + self.config.chunk
        return Denoiser(self.head, self.expert, self.gate, context, groups, steps, condition)

    @property
    def _contrasts(self) -> bool:
        """Whether sampling is guided away from what the policy does without an intent."""
        settings = self.config.conditions
        return settings is not None and settings.intent >= 0 and settings.scale != 1

    def _intended(self, steering: Steering, rows: int, n: int) -> Steering:
        """With the intent to follow when sampling, if there is one."""
        settings = self.config.conditions
        if settings is None or settings.intent < 0:
            return steering
        intent = torch.full((rows, n), settings.intent, device=next(self.expert.parameters()).device)
        return replace(steering, intent=intent)

    def _predictor(self, context: Context, steering: Steering, n: int) -> Predictor:
        settings = self.config.conditions
        if settings is None or steering.intent is None or not self._contrasts:
            return self._denoiser(context, steering, n)
        both = torch.cat((torch.full_like(steering.intent, -1), steering.intent), dim=1)
        return Guided(self.head, self._denoiser(context, replace(steering, intent=both), 2 * n), settings.scale)
