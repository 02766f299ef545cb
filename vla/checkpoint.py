"""A checkpoint folder: everything a policy needs, loadable in a fresh process with no network.

config.yaml         PolicyConfig
statistics.json     normalisation, with the ActionSpecs of state and action
model.safetensors   all weights, strict
tokenizer/          tokenizer.json
backbone/           config.json of the Hugging Face architecture
action_tokenizer/   only with policy.token_loss: what names its chunks
versions.json       what wrote it
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vla import config, tokenizer
from vla.backbones.build import saved_backbone
from vla.errors import CheckpointError, TandemError
from vla.files import whole_folder, write_json, write_text
from vla.policy import VLAPolicy
from vla.policy_config import PolicyConfig
from vla.stats import Statistics

FORMAT = 1
CHUNK_TOKENIZER = "action_tokenizer"
DECODE = (  # and the head's
    "execute",
    "candidates",
    "mixture.consensus",
    "continuation",
    "conditions.intent",
    "conditions.scale",
)
FILES = ("config.yaml", "statistics.json", "model.safetensors", "versions.json")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of its policy, without the weights."""

    config: PolicyConfig
    statistics: Statistics
    tokenizer: tokenizer.Tokenizer


def save(policy: VLAPolicy, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write `policy` to `folder`, whole or not at all.

    Args:
        weights: written instead of the policy's own, under the same names (an average, gathered shards).
    """
    with whole_folder(folder) as partial:
        state = policy.state_dict() if weights is None else weights
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, partial / "model.safetensors")
        write_text(partial / "config.yaml", config.dump(policy.config))
        write_json(partial / "statistics.json", policy.processor.codec.statistics.to_json())
        policy.processor.tokenizer.save(partial / "tokenizer")
        policy.backbone.hf_config.save_pretrained(partial / "backbone")
        if policy.chunk_tokens is not None:
            (partial / CHUNK_TOKENIZER).mkdir()
            policy.chunk_tokens.tokenizer.write(partial / CHUNK_TOKENIZER)
        packages = ("tandem-vla", "torch", "transformers", "tokenizers", "numpy")
        write_json(partial / "versions.json", {"format": FORMAT} | {name: version(name) for name in packages})


def load(folder: Path | str, device: str = "cpu", settings: Mapping[str, Any] | None = None) -> VLAPolicy:
    """Read a policy.

    Args:
        settings: decode settings that replace the saved ones, as dotted keys: those of `DECODE` and of the
            head, e.g. "head.steps". Nothing that would change what the weights mean.

    Raises:
        CheckpointError: a file is missing or damaged, or weights and configuration do not fit.
        UsageError: an unknown setting.
    """
    folder = Path(folder)
    saved = read(folder, settings)
    with torch.random.fork_rng(devices=[]):  # building draws random weights that are then overwritten
        backbone = saved_backbone(folder / "backbone", saved.config.backbone, saved.config.reads)
        policy = VLAPolicy.compose(
            saved.config, saved.statistics, backbone, saved.tokenizer, chunk_tokenizer(folder, saved.config)
        )
    load_weights(policy, folder / "model.safetensors")
    return policy.to(device).eval()


def read(folder: Path, settings: Mapping[str, Any] | None = None) -> Saved:
    """All of a checkpoint but its weights; arguments and errors as `load`."""
    _require_complete(folder)
    try:
        statistics = Statistics.from_json(json.loads((folder / "statistics.json").read_text()))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'statistics.json'} is damaged: {error!r}.") from error
    return Saved(_configured(folder, settings or {}), statistics, tokenizer.load(folder / "tokenizer"))


def chunk_tokenizer(folder: Path, config: PolicyConfig) -> Path | None:
    """Where a checkpoint keeps the action tokenizer of its token loss."""
    return None if config.token_loss is None else folder / CHUNK_TOKENIZER


@torch.no_grad()
def load_weights(policy: VLAPolicy, path: Path, new: tuple[str, ...] = ()) -> None:
    """Strict: every name and shape must agree. One tensor after another, so that no second copy of all is held.

    Args:
        new: beginnings of names that the file may lack: parts that this policy adds to it.
    """
    own = policy.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            own = {name: x for name, x in own.items() if name in shapes or not name.startswith(new)}
            _require_fit(path, {name: tuple(x.shape) for name, x in own.items()}, shapes)
            for name, parameter in own.items():
                parameter.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. It is truncated or not a safetensors file.") from error


def _require_fit(path: Path, own: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> None:
    missing, foreign = sorted(own.keys() - there.keys()), sorted(there.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & there.keys() if own[k] != there[k])
    if missing or foreign or wrong:
        raise CheckpointError(
            f"{path} does not fit its config.yaml: {len(missing)} weights missing {missing[:3]}, "
            f"{len(foreign)} unknown {foreign[:3]}, {len(wrong)} of another shape {wrong[:3]}."
        )


def _require_complete(folder: Path) -> None:
    absent = [name for name in FILES if not (folder / name).is_file()]
    if not absent:
        return
    if not folder.is_dir():
        raise CheckpointError(f"No such checkpoint folder: {folder}.")
    last = folder / "checkpoints" / "last"
    hint = f" Did you mean {last.parent / last.read_text().strip() / 'policy'}?" if last.is_file() else ""
    raise CheckpointError(f"{folder} is no policy checkpoint: {', '.join(absent)} missing.{hint}")


def _configured(folder: Path, settings: Mapping[str, Any]) -> PolicyConfig:
    try:
        saved = config.load(PolicyConfig, folder / "config.yaml")
    except TandemError as error:
        raise CheckpointError(f"{folder / 'config.yaml'} is damaged or of another release: {error}") from error
    allowed = {*DECODE, *(f"head.{name}" for name in saved.head.DECODE)}
    unknown = sorted(key for key in settings if not any(f"{key}.".startswith(f"{name}.") for name in allowed))
    if unknown:
        raise CheckpointError(f"Settings {unknown} cannot be changed after training. Valid: {sorted(allowed)}.")
    data = config.to_data(saved)
    for key, value in settings.items():
        _replace(data, key, value)
    return config.build(PolicyConfig, data, "settings")


def _replace(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        if data.get(name) is None:
            data[name] = {}  # an optional block that training left out
        data = data[name]
    data[last] = value
