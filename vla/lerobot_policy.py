"""Any LeRobot policy folder (act, diffusion, smolvla, pi0, pi05, ...) as a policy of ours.

Observation -> the policy's own preprocessor -> `predict_action_chunk` -> its own postprocessor -> chunk. Only
the meaning of the numbers and the cameras' names come from us (`vla.lerobot_config`). A checkpoint's processors
may name classes to import: treat a folder from elsewhere as code.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from vla.errors import CheckpointError, TandemError, choose_from
from vla.images import letterbox
from vla.lerobot_config import STATE_KEY, Meaning, load_meaning
from vla.types import ActionChunk, ActionSpec, Observation

DECODE = ("num_inference_steps", "num_steps")  # of LeRobot's configurations: sampler steps
# Initial weights that a checkpoint overwrites: fetching them would only cost a download.
INITIAL = {"pretrained_backbone_weights": None, "load_vlm_weights": False}


def load(folder: Path, device: str, settings: Mapping[str, Any]) -> "LeRobotPolicy":
    """Open the LeRobot policy in `folder`.

    Args:
        settings: "execute", and those of `DECODE` that its configuration has.

    Raises:
        CheckpointError: the folder is incomplete, its weights do not fit, it needs files that are not here, or
            a setting is unknown.
        ModuleNotFoundError: LeRobot, or what this policy needs besides, is not installed.
    """
    meaning = load_meaning(folder)
    try:
        policy, pre, post = _open(folder, device, {k: v for k, v in settings.items() if k != "execute"})
    except ModuleNotFoundError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"LeRobot cannot open {folder}: {reason}. If it misses a tokenizer or a backbone's configuration, that is "
            "not in LeRobot's checkpoints: load the policy once with network, and offline afterwards."
        ) from error
    kind = LeRobotPolicy if policy.config.n_obs_steps == 1 else LeRobotHistoryPolicy
    return kind(policy, (pre, post), meaning, settings.get("execute"))


def _open(folder: Path, device: str, settings: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of LeRobot's own imports
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies import get_policy_class, make_pre_post_processors
        from lerobot.utils.import_utils import register_third_party_plugins
    register_third_party_plugins()
    config: Any = PreTrainedConfig.from_pretrained(folder)
    config.device, config.pretrained_path = device, folder
    for name, value in INITIAL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    valid = [name for name in DECODE if hasattr(config, name)]
    for name, value in settings.items():
        if name not in valid:
            raise CheckpointError(
                f"A LeRobot policy of type {config.type!r} has no setting {name!r}."
                f"{choose_from(name, ['execute', *valid])} Without: policy.settings={{}}"
            )
        setattr(config, name, value)
    if getattr(config, "temporal_ensemble_coeff", None) is not None:
        raise CheckpointError(
            f"{folder}/config.json asks for temporal ensembling, which is a part of LeRobot's control loop, not of the "
            "policy. Set temporal_ensemble_coeff to null and n_action_steps to how many steps to execute."
        )
    policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    pre, post = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": device}}
    )
    return policy.eval(), pre, post


class LeRobotPolicy:
    """Implements `vla.types.Policy` around a LeRobot policy and its two processors."""

    def __init__(self, policy: Any, processors: tuple[Any, Any], meaning: Meaning, execute: int | None) -> None:
        self._policy, self._meaning = policy, meaning
        self._pre, self._post = processors
        # None: all of the chunk, as vqbet's configuration means it.
        self._execute: int | None = getattr(policy.config, "n_action_steps", None) if execute is None else execute
        if execute is not None and (type(execute) is not int or execute < 1):
            raise CheckpointError(f"policy.settings.execute must be a positive whole number, got {execute!r}.")
        self._device = torch.device(policy.config.device)
        self._streams: list[Tensor] | None = None  # states of the random generators between two chunks

    @property
    def action_spec(self) -> ActionSpec:
        return self._meaning.action.spec

    @property
    def state_spec(self) -> ActionSpec:
        return self._meaning.state.spec

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self._meaning.cameras)

    def reset(self, seed: int) -> None:
        """Begin an episode: LeRobot's own `reset`, and random numbers as after `torch.manual_seed(seed)`."""
        self._policy.reset()
        self._pre.reset()
        self._post.reset()
        self._streams = None
        with self._random():
            torch.manual_seed(seed)

    @torch.no_grad()
    def infer(self, observation: Observation) -> ActionChunk:
        """One chunk in physical units, as many rows as the policy predicts.

        Raises:
            TandemError: fewer rows than are to be executed, or as many columns as the action does not have.
        """
        batch = self._prepare(observation)
        with self._random():
            actions = self._post(self._policy.predict_action_chunk(batch))
        rows = actions[0].float().cpu().numpy()
        execute = len(rows) if self._execute is None else self._execute
        if rows.shape[1] != self.action_spec.dim or len(rows) < execute:
            raise TandemError(
                f"The policy answered {rows.shape}, expected {self.action_spec.dim} columns and at least "
                f"{execute} rows. Lower policy.settings.execute, or correct tandem.yaml."
            )
        return ActionChunk(observation.stamp_s, 1.0 / self.action_spec.rate_hz, rows, execute)

    def _prepare(self, observation: Observation) -> dict[str, Any]:
        """What LeRobot's own loop hands to a policy at this moment."""
        batch: dict[str, Any] = {STATE_KEY: torch.from_numpy(np.array(observation.state, np.float32))[None]}
        for name, key in self._meaning.cameras.items():
            if name not in observation.images:
                raise TandemError(
                    f"The policy's camera {name!r} is not in the observation: {list(observation.images)}."
                )
            _, height, width = self._policy.config.input_features[key].shape
            picture = torch.from_numpy(np.array(letterbox(observation.images[name], height, width)))
            batch[key] = picture.permute(2, 0, 1)[None].float() / 255
        batch = self._pre(batch | {"task": [observation.instruction]})
        return {k: v for k, v in batch.items() if k != "action"}  # its pipelines add an empty one

    @contextlib.contextmanager
    def _random(self) -> Iterator[None]:
        """Inside the block torch draws this policy's own random numbers; nobody else's are disturbed."""
        cuda = [self._device.index or 0] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            if self._streams is not None:
                torch.set_rng_state(self._streams[0])
                for index, state in zip(cuda, self._streams[1:], strict=True):
                    torch.cuda.set_rng_state(state, index)
            yield
            self._streams = [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in cuda)]


class LeRobotHistoryPolicy(LeRobotPolicy):
    """A policy that reads several observations, one control step apart (diffusion, vqbet).

    LeRobot keeps them in the policy's own queues; `watch` fills these at the steps between two chunks.
    """

    def watch(self, observation: Observation) -> None:
        """Take in what the robot sees at a control step at which no chunk is asked for."""
        self._prepare(observation)

    def _prepare(self, observation: Observation) -> dict[str, Any]:
        from lerobot.policies.utils import populate_queues

        batch = super()._prepare(observation)
        images = list(self._policy.config.image_features)
        if images:
            batch["observation.images"] = torch.stack([batch[key] for key in images], dim=-4)
        self._policy._queues = populate_queues(self._policy._queues, batch)
        return batch
