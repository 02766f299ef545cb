"""`vla.policy.VLAPolicy` behind LeRobot's interface. A checkpoint it writes is a checkpoint of ours, too."""

import hashlib
import shutil
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.configs import PreTrainedConfig, RTCAttentionSchedule
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from lerobot_policy_tandem import statistics
from lerobot_policy_tandem.configuration_tandem import TandemConfig
from vla import checkpoint
from vla import config as settings
from vla.batch import Batch
from vla.errors import UsageError, choose_from
from vla.policy import VLAPolicy
from vla.policy_config import ContinuationConfig, PolicyConfig
from vla.rtc import Schedule
from vla.switching import FORWARD
from vla.types import ActionChunk, Observation, UnderWay

PREFIX = "model."  # of our weights' names inside this class
SCHEDULES: dict[RTCAttentionSchedule, Schedule] = {
    RTCAttentionSchedule.ZEROS: "hard",
    RTCAttentionSchedule.LINEAR: "linear",
    RTCAttentionSchedule.EXP: "exponential",
}


class TandemPolicy(PreTrainedPolicy):
    """LeRobot's contract of a policy. Numbers come and go in the data set's own units.

    Args:
        model: a policy that is ready; None builds a new one, with statistics of the data set.
        dataset_meta: LeRobot's description of the data set to train on.
    """

    config_class = TandemConfig  # pyright: ignore[reportAssignmentType]
    name = "tandem"  # pyright: ignore[reportAssignmentType]

    def __init__(
        self, config: TandemConfig, *, model: VLAPolicy | None = None, dataset_meta: Any = None, **_: Any
    ) -> None:
        super().__init__(config)
        self.config: TandemConfig = config
        config.validate_features()
        if dataset_meta is not None and (config.policy.fast_slow or config.policy.history):
            raise UsageError(
                "policy.fast_slow and policy.history need states and pictures of other moments, which lerobot-train "
                "does not give. Train such a policy with vla-train; its checkpoint runs under LeRobot after "
                "`python -m lerobot_policy_tandem.export`."
            )
        if model is None:
            if dataset_meta is None:
                raise UsageError(
                    "A new policy of type 'tandem' needs a data set, from which its statistics are computed. "
                    "Give a trained one: --policy.path=FOLDER."
                )
            model = VLAPolicy.build(config.policy, statistics.of_dataset(Path(dataset_meta.root), config), config.seed)
        self.model = model
        self._queue: deque[Tensor] = deque()
        self.reset()

    def reset(self) -> None:
        """Begin an episode. Draws follow torch's own seed, which LeRobot's commands set."""
        self._queue.clear()
        self.model.reset(int(torch.randint(2**31, ())))

    def forward(
        self, batch: dict[str, Any], reduction: Literal["mean", "none"] = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss: () for "mean", one for each row (B,) for "none", which takes a pass for each row."""
        whole = self._batch(batch)
        if reduction == "none":
            rows = [self.model.loss(_row(whole, i)).total for i in range(len(whole.rows))]
            return torch.stack(rows), {}
        out = self.model.loss(whole)
        return out.total, {name: float(term.detach()) for name, term in out.terms.items()}

    def get_optim_params(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Two groups: matrices, which decay, and norms, biases and embeddings, which do not."""
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        learning = [p for p in self.parameters() if p.requires_grad]
        kept = [p for p in learning if p.ndim < 2 or id(p) in embeddings]
        others = {id(p) for p in kept}
        decayed = [p for p in learning if id(p) not in others]
        groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """All linear layers but the backbone's."""
        linear = [n for n, m in self.named_modules() if isinstance(m, nn.Linear)]
        return {"target_modules": [n for n in linear if not n.startswith(f"{PREFIX}backbone.")]}

    def supports_rtc(self) -> bool:
        """Whether a chunk can continue the one under way: with every head but a regression trained without."""
        return self.model.config.continuation is not None or _continues(self.model.config) is not None

    def init_rtc_processor(self) -> None:
        """Settings that the policy lacks are LeRobot's `--inference.rtc`, which its commands put into `config`."""
        given: RTCConfig | None = getattr(self.config, "rtc_config", None)
        method = _continues(self.model.config)
        if given is not None and method is not None and self.model.config.continuation is None:
            schedule = SCHEDULES.get(given.prefix_attention_schedule)
            if schedule is None:
                raise UsageError(
                    f"--inference.rtc.prefix_attention_schedule is {given.prefix_attention_schedule.name}."
                    f"{choose_from('', (s.name for s in SCHEDULES))}"
                )
            continuation = ContinuationConfig(method, schedule, given.max_guidance_weight)
            self.model.config = replace(self.model.config, continuation=continuation)

    @torch.no_grad()
    def predict_action_chunk(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        batch: dict[str, Any],
        inference_delay: int = 0,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        **_: Any,
    ) -> Tensor:
        """(B, H, A) in the data set's units.

        Args:
            inference_delay: rows of `prev_chunk_left_over` that will be executed before this chunk is there.
            prev_chunk_left_over: (K, A) or (1, K, A), what of the previous chunk is not executed yet.
            execution_horizon: rows of it that count; None takes all.
        """
        under_way = _under_way(prev_chunk_left_over, inference_delay, execution_horizon)
        return _stacked(self._answers(batch, under_way)).to(self.model.device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """(B, A), the action due now; asks for new chunks when the shortest one is executed."""
        if not self._queue:
            chunks = self._answers(batch)
            execute = min(chunk.execute for chunk in chunks)
            self._queue.extend(_stacked(chunks)[:, :execute].to(self.model.device).unbind(1))
        return self._queue.popleft()

    def _answers(self, batch: dict[str, Any], under_way: UnderWay | None = None) -> list[ActionChunk]:
        seen = self._observations(batch)
        if under_way is not None and len(seen) > 1:
            raise UsageError(f"A chunk that continues another is for one robot, got a batch of {len(seen)}.")
        with torch.inference_mode(mode=False):  # guidance differentiates, which that mode does not allow
            return [self.model.infer(observation, under_way) for observation in seen]

    def _observations(self, batch: dict[str, Any]) -> list[Observation]:
        """LeRobot's batch row by row, as a robot of ours would say it."""
        cameras = {name: self.config.image_key(name) for name in self.model.cameras}
        pictures = {name: _pictures(batch[key]) for name, key in cameras.items() if key in batch}
        states = batch[OBS_STATE].detach().float().cpu().numpy()
        tasks = batch.get("task") or [""] * len(states)
        return [
            Observation(0.0, {name: rows[i] for name, rows in pictures.items()}, states[i], tasks[i])
            for i in range(len(states))
        ]

    def _batch(self, batch: dict[str, Any]) -> Batch:
        """LeRobot's training batch as ours, in model units."""
        processor, codec = self.model.processor, self.model.processor.codec
        seen = self._observations(batch)
        images, present = zip(*(processor.images(o.images) for o in seen), strict=True)
        ids, mask = zip(*(processor.text(o.instruction, o.state) for o in seen), strict=True)
        longest = int(np.stack(mask).sum(axis=1).max())
        actions = batch[ACTION].detach().float().cpu().numpy()
        pad = batch.get("action_is_pad")
        count = len(seen)
        arrays = {
            "images": np.stack(images),
            "image_mask": np.stack(present),
            "tokens": np.stack(ids)[:, :longest],
            "token_mask": np.stack(mask)[:, :longest],
            "observation": np.arange(count),
            "age": np.zeros(count, np.float32),
            "fast_images": np.zeros((count, 0, 0, 0, 3), np.uint8),
            "fast_image_mask": np.zeros((count, 0), bool),
            "state": codec.encode_state(np.stack([o.state for o in seen])),
            "history": np.zeros((count, 0, codec.state_dim), np.float32),
            "actions": codec.encode_actions(actions),
            "valid": np.ones(actions.shape[:2], bool) if pad is None else ~pad.cpu().numpy(),
            "dim_mask": np.repeat(codec.dim_mask()[None], count, axis=0),
            "rows": np.arange(count),
            "mode": np.full(count, FORWARD),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        whole = Batch(**tensors, global_size=count, noise_seed=_noise_seed(batch), loss_scale=1.0)
        return whole.to(self.model.device)

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """LeRobot's config.json, and beside it all files of a checkpoint of ours."""
        self.config._save_pretrained(save_directory)
        weights = None
        if state_dict is not None:
            weights = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
        with tempfile.TemporaryDirectory(dir=save_directory) as partial:
            checkpoint.save(self.model, Path(partial) / "policy", weights)
            shutil.copytree(Path(partial) / "policy", save_directory, dirs_exist_ok=True)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: TandemConfig | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> "TandemPolicy":
        """Strict: weights and settings must agree. What `config` changes must be a decode setting.

        Raises:
            CheckpointError: the folder is no whole checkpoint, or a setting cannot be changed after training.
        """
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            named = {"revision": revision, "local_files_only": local_files_only}
            folder = Path(snapshot_download(str(pretrained_name_or_path), **named))
        loaded: Any = PreTrainedConfig.from_pretrained(folder) if config is None else config
        saved = settings.to_data(settings.load(PolicyConfig, folder / "config.yaml"))
        model = checkpoint.load(folder, loaded.device, _changes(saved, loaded.architecture))
        return cls(loaded, model=model, **kwargs).eval()


def _changes(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys whose value differs, with the value that is wanted."""
    changes: dict[str, Any] = {}
    for name, value in wanted.items():
        if isinstance(value, Mapping) and isinstance(saved.get(name), Mapping):
            changes |= _changes(saved[name], value, f"{prefix}{name}.")
        elif value != saved.get(name):
            changes[prefix + name] = value
    return changes


def _pictures(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1], or uint8 -> (B, H, W, C) uint8; exact for pictures that were uint8."""
    if images.dtype != torch.uint8:
        images = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _continues(config: PolicyConfig) -> Literal["trained", "vjp", "prior"] | None:
    """How a policy without settings for it can continue a chunk."""
    if config.committed:
        return "trained"
    return {"flow": "vjp", "discrete_diffusion": "prior", "e0": "prior"}.get(config.head.kind)  # pyright: ignore[reportReturnType]


def _under_way(left_over: Tensor | None, delay: int, horizon: int | None) -> UnderWay | None:
    if left_over is None:
        return None
    rows = left_over.detach().float().cpu().numpy()
    rows = (rows[0] if rows.ndim == 3 else rows)[:horizon]
    real = np.flatnonzero(rows.any(axis=1))  # LeRobot fills up to its execution horizon with zeros
    rows = rows[: real[-1] + 1] if len(real) else rows[:0]
    return UnderWay(rows, min(delay, len(rows)))


def _stacked(chunks: list[ActionChunk]) -> Tensor:
    return torch.from_numpy(np.stack([chunk.actions for chunk in chunks]))


def _row(batch: Batch, i: int) -> Batch:
    """One row of a batch, with the random draws that it has there."""
    tensors = {k: v[i : i + 1] for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **tensors | {"observation": torch.zeros_like(batch.observation[:1])})


def _noise_seed(batch: dict[str, Any]) -> int:
    """The seed of a step's draws: a function of which frames are in it and in which order.

    LeRobot restores the order of frames when it resumes, but draws from torch's generator once more than a run
    that was not interrupted; so this, and not that generator, makes a resumed run the same.
    """
    if "index" not in batch:
        return int(torch.randint(2**62, ()))
    frames = batch["index"].detach().cpu().numpy().astype(np.int64)
    return int.from_bytes(hashlib.sha256(frames.tobytes()).digest()[:8], "little") >> 1
