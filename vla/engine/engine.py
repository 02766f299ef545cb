"""The fast path in production: equal to `vla.denoiser` and `vla.sampling` to rounding, at a fraction of their cost.

Done once for the weights    matrices joined, norms folded into them, tables over the sampler's noise levels
Done once for an encoding    keys and values into static buffers, cross layers' projections, masks, rotary tables
Done once for a chunk        random numbers, fresh tokens
Done in a denoising step     four matrix products and one attention a layer, and what lies between

On a GPU the last two are one recorded graph. Nothing in a step joins, clones or uploads: its own keys and values,
written in place, are all that is copied.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from vla.cache import PrefixCache
from vla.engine.embedding import Grid, embedding
from vla.engine.layers import Scoring
from vla.engine.plan import Inputs, Model, Plan
from vla.engine.weights import fuse
from vla.expert import ActionExpert
from vla.heads.base import ActionHead
from vla.horizons import HorizonGate
from vla.layers import ACTIVATIONS
from vla.rtc import Committed
from vla.sampling import Sampled, draw

BUCKET = 64  # prefix lengths are rounded up to a multiple, so that few shapes occur
PLANS = 4  # kept: one for each number of samples and length of prefix that is in use


class Engine:
    """Samples chunks from a policy's parts, with a copy of their weights as they are when it is built.

    One caller at a time: buffers are shared.

    A plan made for one call is used again by those that have its shapes; the oldest of more than `PLANS` is dropped.

    Args:
        real_dim: action dimensions that are not padding.
    """

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __init__(self, head: ActionHead, expert: ActionExpert, gate: HorizonGate | None, real_dim: int) -> None:
        device = next(expert.parameters()).device
        into, grid = embedding(head), Grid.of(head, expert, device)
        self._model = Model(
            head=head,
            expert=expert,
            gate=gate,
            real_dim=real_dim,
            layers=fuse(expert),
            embedding=into,
            grid=Grid(into.prepared(grid.clock), grid.modulations),
            scoring=Scoring(expert.shape.scale, expert.shape.softcap),
            activation=ACTIVATIONS[expert.config.activation],
        )
        self._plans: OrderedDict[tuple[int | bool, ...], Plan] = OrderedDict()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def sample(
        self,
        base: PrefixCache,
        cache: PrefixCache,
        fresh: Tensor,
        condition: Tensor | None,
        shape: tuple[int, int, int, int],
        generator: torch.Generator,
        committed: Committed | None = None,
    ) -> Sampled:
        """Chunks of `shape` (B, G, H, A); the same numbers are drawn as by `vla.sampling.sample`.

        Args:
            base: the encoded observation. While it stays the same, nothing of it is computed or copied again.
            cache: `base`, or `base` with tokens behind it that are valid in every row (a state in the prefix).
            fresh: (B, F, W) tokens of the expert's, F may be 0.
            condition: (B, G, W) added to the action tokens, or None.
        """
        start = draw(self._model.head, shape, generator, fresh.device)
        plan = self._plan(cache, fresh.shape[1], shape, condition is None, committed is None)
        plan.memory.load(base, cache)
        return plan(Inputs(fresh, condition, start, committed))

    def _plan(self, cache: PrefixCache, fresh: int, shape: tuple[int, int, int, int], *options: bool) -> Plan:
        rows, groups, steps, _ = shape
        bucket = -(-cache.valid.shape[1] // BUCKET) * BUCKET
        key = (rows, groups, steps, bucket, fresh, *options)
        plan = self._plans.pop(key, None)
        if plan is None:
            plan = Plan(self._model, rows, groups, bucket=bucket, fresh=fresh, steps=steps)
        self._plans[key] = plan
        if len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        return plan
