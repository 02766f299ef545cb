"""Low-rank adapters on a policy, by peft: put in, saved alone, loaded, merged. The home of peft.

A policy with adapters is saved and loaded like any other: its checkpoint holds everything. An adapter folder holds
what was learned alone and a hash of the weights it belongs to; it is put on the policy that training started from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vla.config import build
from vla.errors import CheckpointError, TandemError, UsageError
from vla.files import whole_folder, write_json
from vla.policy_config import LoraConfig

if TYPE_CHECKING:
    from vla.policy import VLAPolicy

FORMAT = 1
MARK = ".lora_"


def put_in(parts: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Put adapters into the parts that `config` names. They start without effect; those parts' own weights stay still.

    Raises:
        UsageError: a part has none of the matrices that are named.
    """
    import peft  # slow to import, and most policies have no adapters

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] (a float does as well)
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    for name in config.parts:
        try:
            peft.inject_adapter_in_model(settings, parts[name])
        except ValueError as error:
            raise UsageError(
                f"policy.lora.targets {list(config.targets)} name no matrix of part {name!r}: {error}"
            ) from error


def add(policy: VLAPolicy, config: LoraConfig) -> None:
    """Put adapters into a policy that has none.

    Raises:
        UsageError: it has adapters already, or a part has none of the matrices that are named.
    """
    if policy.config.lora is not None:
        raise UsageError("This policy has adapters already: merge them first (vla.lora.merge).")
    put_in(policy.adaptable(), config)
    policy.backbone.freeze_unused()
    policy.config = replace(policy.config, lora=config)


def adapters(policy: VLAPolicy) -> dict[str, Tensor]:
    """The adapters' weights by their names in the policy."""
    return {name: value for name, value in policy.state_dict().items() if MARK in name}


def merge(policy: VLAPolicy) -> None:
    """Add the adapters into the weights they belong to and remove them: faster, and a plain policy again."""
    from peft.tuners.lora import LoraLayer

    for module in list(policy.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()
                setattr(module, name, child.get_base_layer())
    policy.config = replace(policy.config, lora=None)


def learned(policy: VLAPolicy) -> dict[str, Tensor]:
    """What training with adapters changes: the adapters, and the parts that are trained whole (head, projections)."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def save(policy: VLAPolicy, folder: Path) -> None:
    """Write what was learned alone, whole or not at all."""
    if policy.config.lora is None:
        raise UsageError("This policy has no adapters: train it with policy.lora.")
    with whole_folder(folder) as partial:
        tensors = {k: v.detach().cpu().contiguous() for k, v in learned(policy).items()}
        save_file(tensors, partial / "adapter.safetensors")
        about = {"format": FORMAT, "base": base_digest(policy, tensors.keys()), "lora": asdict(policy.config.lora)}
        write_json(partial / "adapter.json", about)


@torch.no_grad()
def load(policy: VLAPolicy, folder: Path) -> None:
    """Put a saved adapter on the policy that it was trained from.

    Raises:
        CheckpointError: the folder is damaged, or the adapter belongs to other weights.
    """
    try:
        about = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter.safetensors")
        config, base = build(LoraConfig, about["lora"], "adapter.json"), about["base"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, TandemError) as error:
        raise CheckpointError(
            f"{folder} is no adapter, or a damaged one: {error}. It holds adapter.json and adapter.safetensors."
        ) from error
    add(policy, config)
    own = dict(policy.named_parameters())
    wrong = sorted(k for k, v in tensors.items() if k not in own or own[k].shape != v.shape)
    wrong += sorted(adapters(policy).keys() - tensors.keys() - _never_learned(policy))
    if wrong:
        raise CheckpointError(f"The adapter in {folder} does not fit this policy, for example {wrong[:3]}.")
    digest = base_digest(policy, tensors.keys())
    if base != digest:
        raise CheckpointError(
            f"The adapter in {folder} was trained on other weights than these ({base} and {digest}): give the policy "
            "that it started from."
        )
    for name, value in tensors.items():
        own[name].copy_(value)


def _never_learned(policy: VLAPolicy) -> set[str]:
    """Adapters on matrices that nothing reads: they keep their start, which has no effect."""
    return {name for name, p in policy.named_parameters() if MARK in name and not p.requires_grad}


def base_digest(policy: VLAPolicy, without: Collection[str]) -> str:
    """16 hexadecimal digits of the weights that did not learn."""
    digest = hashlib.sha256()
    for name, value in sorted(policy.state_dict().items()):
        if name not in without and MARK not in name:
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
