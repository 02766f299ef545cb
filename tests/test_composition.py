"""Several policies as one: known answers, what must be shared, and the folder that names them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from robot.policies import fingerprint
from vla import checkpoint
from vla.composition import ComposedPolicy
from vla.errors import CheckpointError, SpecMismatch, UsageError
from vla.head_config import DiscreteDiffusionConfig, E0Config, RegressionConfig
from vla.load import load_policy
from vla.policy import VLAPolicy
from vla.policy_config import ConsensusConfig, MixtureConfig
from vla.types import Observation, Policy

HEADS: dict[str, dict[str, Any]] = {
    "flow": {},
    "regression": {"head": RegressionConfig("regression", "l1")},
    "discrete": {
        "head": DiscreteDiffusionConfig("discrete_diffusion", 16, (), "per_scalar", 5, "max", "none", 1.0, 1.0, 1),
        "normalization": "quantile",
    },
    "e0": {"head": E0Config("e0", 16, "per_step", 1.0, "concat", 5, 1), "normalization": "quantile"},
}


def parent(policies: SimpleNamespace, seed: int, **changes: Any) -> VLAPolicy:
    return VLAPolicy.build(replace(policies.CONFIG, **changes), policies.STATISTICS, seed).eval()


def answer(policy: Policy, observation: Observation, seed: int = 3) -> np.ndarray:
    policy.reset(seed)
    return policy.infer(observation).actions


@pytest.mark.parametrize("name", HEADS)
def test_known_answers(policies: SimpleNamespace, name: str) -> None:
    """All weight on one gives that one, to the bit; copies of one give it with any weights."""
    one, other, here = parent(policies, 0, **HEADS[name]), parent(policies, 1, **HEADS[name]), policies.observation()
    for weights, alone in (((1.0, 0.0), one), ((0.0, 1.0), other)):
        composed = answer(ComposedPolicy([one, other], weights), here)
        expected = answer(alone.train(), here)  # in training mode chunks are drawn on the plain path
        alone.eval()
        assert np.array_equal(composed, expected)
    for weights in ((0.3, 0.7), (0.5, 0.25, 0.25)):
        copies = ComposedPolicy([one] * len(weights), weights)
        np.testing.assert_allclose(answer(copies, here), answer(one, here), atol=1e-4)


def test_two_policies_meet_at_every_step(policies: SimpleNamespace) -> None:
    """One Euler step: the mean of the velocities is the mean of the chunks. Several: it is not."""
    here = policies.observation()
    for steps in (1, 4):
        one, other = (parent(policies, seed, head=replace(policies.CONFIG.head, steps=steps)) for seed in (0, 1))
        mixed = 0.4 * answer(one, here) + 0.6 * answer(other, here)
        composed = answer(ComposedPolicy([one, other], (0.4, 0.6)), here)
        assert np.allclose(composed, mixed, atol=1e-5) == (steps == 1)


def test_each_parent_sees_what_it_was_trained_with(policies: SimpleNamespace) -> None:
    plain, looking = parent(policies, 0), parent(policies, 1, history=2, cameras=("wrist", "unused"), state_dim=7)
    composed = ComposedPolicy([plain, looking], (0.5, 0.5))
    assert (composed.cameras, composed.history, composed.past) == (("front", "wrist", "unused"), 2, 0)
    here = replace(policies.observation(), history=np.zeros((2, 4), np.float32))
    moved = replace(here, history=np.ones((2, 4), np.float32))
    assert not np.allclose(answer(composed, here), answer(composed, moved), atol=1e-7)
    chunk = composed.infer(here)
    assert (chunk.actions.shape, chunk.execute, chunk.stamp_s) == ((5, 2), 3, 12.5)
    assert {"encode_ms", "denoise_ms"} == set(chunk.diagnostics)


def test_a_policy_without_weight_is_not_run_and_the_first_other_one_leads(policies: SimpleNamespace) -> None:
    agreed = MixtureConfig((1, 5), "none", 1.0, 0.0, ConsensusConfig(2, 1e9, 1))
    plain, looking = parent(policies, 0), parent(policies, 1, history=2, mixture=agreed, cameras=("wrist",))
    first = ComposedPolicy([plain, looking], (1.0, 0.0))
    assert (first.history, first.cameras, first.infer(policies.observation()).execute) == (0, ("front", "wrist"), 3)
    second = ComposedPolicy([plain, looking], (0.0, 1.0))
    here = replace(policies.observation(), history=np.zeros((2, 4), np.float32))
    chunk = second.infer(here)
    assert (second.history, second.cameras, chunk.execute) == (2, ("wrist",), looking.infer(here).execute)
    assert "disagreement" in chunk.diagnostics, "what it says of its own horizons is kept"


@pytest.mark.parametrize("weights", [(0.5, 0.6), (1.5, -0.5), (1.0,)])
def test_weights_are_shares(policies: SimpleNamespace, weights: tuple[float, ...]) -> None:
    one = parent(policies, 0)
    with pytest.raises(UsageError, match="two or more policies and for each a weight"):
        ComposedPolicy([one, one], weights)


def test_what_is_not_shared_is_named(policies: SimpleNamespace) -> None:
    one, config, given = parent(policies, 0), policies.CONFIG, policies.STATISTICS
    for changes, match in (
        ({"head": replace(config.head, steps=7)}, r"the same policy\.head; policy 1 has .*steps=4.* and policy 2 .*=7"),
        ({"chunk": 6}, r"the same policy\.chunk; policy 1 has 5 and policy 2 6"),
        ({"normalization": "quantile"}, r"the same policy\.normalization"),
    ):
        with pytest.raises(UsageError, match=match):
            ComposedPolicy([one, parent(policies, 0, **changes)], (0.5, 0.5))
    started = parent(policies, 0, history=1, head=replace(config.head, source="history"))
    with pytest.raises(UsageError, match="cannot be composed"):
        ComposedPolicy([started, started], (0.5, 0.5))
    units = replace(given, action=replace(given.action, std=2 * given.action.std))
    with pytest.raises(UsageError, match=r"same model units .*\[2\.0, 2\.0\].* and policy 2 .*\[4\.0, 4\.0\]"):
        ComposedPolicy([one, VLAPolicy.build(config, units, 0)], (0.5, 0.5))
    slower = replace(given, action_spec=replace(given.action_spec, rate_hz=10.0))
    with pytest.raises(SpecMismatch, match="actions of policy 1 and of policy 2 differ"):
        ComposedPolicy([one, VLAPolicy.build(config, slower, 0)], (0.5, 0.5))


def test_a_folder_names_a_composition(policies: SimpleNamespace, tmp_path: Path) -> None:
    one, other, here = parent(policies, 0), parent(policies, 1), policies.observation()
    checkpoint.save(one, tmp_path / "one")
    checkpoint.save(other, tmp_path / "other")
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "composition.yaml").write_text("policies: [../one, ../other]\nweights: [0.25, 0.75]\n")
    loaded = load_policy(folder)
    assert isinstance(loaded, ComposedPolicy)
    np.testing.assert_allclose(
        answer(loaded, here), answer(ComposedPolicy([one, other], (0.25, 0.75)), here), atol=1e-6
    )
    assert load_policy(folder, settings={"execute": 1}).infer(here).execute == 1
    before = fingerprint(str(folder))
    checkpoint.save(parent(policies, 2), tmp_path / "other")
    assert fingerprint(str(folder)) != before, "another parent is another policy"
    (folder / "composition.yaml").write_text("policies: [../one, ../nobody]\nweights: [0.25, 0.75]\n")
    with pytest.raises(CheckpointError, match=r"No such checkpoint folder: .*nobody"):
        load_policy(folder)
    (folder / "composition.yaml").write_text("policies: [../one]\nweight: [1]\n")
    with pytest.raises(UsageError, match="weights"):
        load_policy(folder)
