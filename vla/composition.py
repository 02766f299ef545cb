"""Several policies as one: at every denoising step their words are weighted and added (GPC, arXiv 2510.01068).

For flow heads that is the mean of velocities, for heads over bins the mean of probabilities, for regression the mean of
actions. All see the same noisy trajectory, so they must speak of the same numbers in the same model units.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla import checkpoint
from vla.cache import PrefixCache
from vla.codec import scale_and_shift
from vla.denoiser import Composed
from vla.errors import UsageError
from vla.load import Composition
from vla.observed import continuation
from vla.policy import VLAPolicy
from vla.sampling import draw, follow
from vla.types import ActionChunk, ActionSpec, Observation, UnderWay, require_same

SAME = ("chunk", "past", "committed", "action_dim", "normalization", "head")  # settings that decide the trajectory


class ComposedPolicy:
    """Implements `vla.types.Policy`. Each policy encodes an observation once, as it was trained to.

    Those with weight 0 are not run. `execute`, `candidates` and how chunks are continued are the first other one's.

    Args:
        weights: one for each policy, 0 to 1, summing to 1.

    Raises:
        UsageError: the weights are no such numbers, or the policies do not share their trajectory.
        SpecMismatch: they do not share their ActionSpecs.
    """

    def __init__(self, policies: Sequence[VLAPolicy], weights: Sequence[float]) -> None:
        if len(policies) != len(weights) or len(policies) < 2 or min(weights) < 0 or not math.isclose(sum(weights), 1):
            raise UsageError(
                "A composition needs two or more policies and for each a weight of 0 or more, which sum to 1; got "
                f"{len(policies)} policies and weights {list(weights)}."
            )
        for number, policy in enumerate(policies[1:], 2):
            _require_shared(policies[0], policy, number)
        self._running = [(p, w) for p, w in zip(policies, weights, strict=True) if w]
        self._lead = self._running[0][0]
        self._generator = torch.Generator()

    @property
    def action_spec(self) -> ActionSpec:
        return self._lead.action_spec

    @property
    def state_spec(self) -> ActionSpec:
        return self._lead.state_spec

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for policy, _ in self._running for name in policy.cameras))

    @property
    def history(self) -> int:
        return max(policy.history for policy, _ in self._running)

    @property
    def past(self) -> int:
        return self._lead.past

    def reset(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def infer(self, observation: Observation, under_way: UnderWay | None = None) -> ActionChunk:
        """As `VLAPolicy.infer`."""
        start = time.perf_counter()
        caches = [policy.encode_observation(observation) for policy, _ in self._running]
        encode_ms = 1e3 * (time.perf_counter() - start)
        chunk = self.act(caches, observation, under_way)
        return replace(chunk, diagnostics={"encode_ms": encode_ms, **chunk.diagnostics})

    @torch.no_grad()
    def act(
        self, caches: Sequence[PrefixCache], observation: Observation, under_way: UnderWay | None = None
    ) -> ActionChunk:
        """The fast path alone, from one encoding for each policy whose weight is not 0."""
        began, lead = time.perf_counter(), self._lead
        n = lead.config.candidates
        committed, guidance = continuation(lead.config, lead.processor, under_way, lead.device)
        networks = [
            policy.predictor(cache, policy.fresh_inputs(observation, cache), n)
            for (policy, _), cache in zip(self._running, caches, strict=True)
        ]
        weights = [weight for _, weight in self._running]
        predictor = networks[0] if len(networks) == 1 else Composed(lead.head, networks, weights)
        shape = (1, n, lead.config.past + lead.config.chunk, lead.config.action_dim)
        sampled = follow(
            lead.head,
            predictor,
            draw(lead.head, shape, self._generator, lead.device),
            real_dim=lead.action_spec.dim,
            committed=committed,
            guidance=guidance,
        )
        return lead.conclude(sampled, observation, began)


def _require_shared(first: VLAPolicy, other: VLAPolicy, number: int) -> None:
    require_same(first.action_spec, other.action_spec, f"actions of policy 1 and of policy {number}")
    require_same(first.state_spec, other.state_spec, f"states of policy 1 and of policy {number}")
    for name in SAME:
        mine, its = getattr(first.config, name), getattr(other.config, name)
        if mine != its:
            raise UsageError(
                f"Policies that are composed denoise one trajectory, and need the same policy.{name}; policy 1 has "
                f"{mine} and policy {number} {its}."
            )
    if getattr(first.config.head, "source", "noise") != "noise":
        raise UsageError(
            "policy.head.source 'history' starts each policy's trajectory elsewhere: such policies cannot be composed."
        )
    mine, its = (scale_and_shift(p.processor.codec.statistics.action, p.config.normalization) for p in (first, other))
    if not np.array_equal(mine, its):
        raise UsageError(
            f"Policies that are composed need the same model units of actions; policy 1 has scale and shift "
            f"{[x.tolist() for x in mine]} and policy {number} {[x.tolist() for x in its]}. Train them on the same "
            "data, or with the statistics of one of them."
        )


def load(
    folder: Path, composition: Composition, device: str = "cpu", settings: Mapping[str, Any] | None = None
) -> ComposedPolicy:
    """The composition of a folder; `settings` replace the decode settings of every policy.

    Raises:
        CheckpointError, UsageError, SpecMismatch: as `vla.checkpoint.load` and `ComposedPolicy`.
    """
    policies = [checkpoint.load(folder / path, device, settings) for path in composition.policies]
    return ComposedPolicy(policies, composition.weights)
