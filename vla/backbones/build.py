"""Settings -> a backbone: random, pretrained, or the architecture of a saved policy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from vla import tokenizer as tokenizers
from vla.backbone_config import BackboneConfig
from vla.backbones import paligemma, qwen_vl, smolvlm
from vla.backbones.base import Backbone, Reads
from vla.errors import CheckpointError
from vla.tokenizer import Tokenizer


@dataclass(frozen=True)
class Family:
    backbone: type[Backbone]
    reads: str  # for messages
    architectures: Mapping[str, type[Any]]  # by transformers' model_type, with the layer that gives logits
    tiny_hf_config: Callable[[Any, int, int], Any]  # sizes, image size, vocabulary -> transformers' configuration


FAMILIES = {
    "smolvlm": Family(
        smolvlm.SmolVLM,
        "SmolVLM and SmolVLM2",
        {"smolvlm": SmolVLMForConditionalGeneration},
        smolvlm.tiny_hf_config,
    ),
    "paligemma": Family(
        paligemma.PaliGemma,
        "PaliGemma and PaliGemma 2",
        {"paligemma": PaliGemmaForConditionalGeneration},
        paligemma.tiny_hf_config,
    ),
    "qwen_vl": Family(
        qwen_vl.QwenVL,
        "Qwen2.5-VL and Qwen3-VL",
        {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration},
        qwen_vl.tiny_hf_config,
    ),
}


def new_backbone(settings: BackboneConfig, image_size: int, reads: Reads = "cache") -> tuple[Backbone, Tokenizer]:
    """A backbone to start training from: random weights (`tiny`) or a pretrained checkpoint (`weights`).

    Raises:
        CheckpointError: the checkpoint is absent, damaged, of another family, or lacks its tokenizer.
        UsageError: the backbone cannot take pictures of this size.
    """
    family = FAMILIES[settings.kind]
    if settings.tiny is not None:
        tokenizer = tokenizers.byte_level()
        hf_config = family.tiny_hf_config(settings.tiny, image_size, tokenizer.vocab_size)
        return _random(settings, hf_config, reads), tokenizer
    assert settings.weights is not None  # the config refuses neither
    folder = _resolve(settings.weights)
    hf_config, tokenizer = read_hf_config(folder, settings.kind), tokenizers.load(folder)
    whole = _pretrained(family.architectures[hf_config.model_type], folder, hf_config, reads)
    backbone = _composed(settings, whole, reads)
    backbone.require_image_size(image_size)
    return backbone, tokenizer


def saved_backbone(folder: Path, settings: BackboneConfig, reads: Reads = "cache") -> Backbone:
    """The architecture described in a policy checkpoint's `backbone/`. Its weights are not set: they come with the
    policy's.

    Raises:
        CheckpointError: `folder` describes no model of the family that `settings` names.
    """
    hf_config = read_hf_config(folder, settings.kind)
    with no_init_weights():
        return _random(settings, hf_config, reads)


def _random(settings: BackboneConfig, hf_config: Any, reads: Reads) -> Backbone:
    return _composed(settings, FAMILIES[settings.kind].architectures[hf_config.model_type](hf_config), reads)


def _composed(settings: BackboneConfig, whole: Any, reads: Reads) -> Backbone:
    head = whole.lm_head if _own_head(whole.config, reads) else None
    return FAMILIES[settings.kind].backbone(whole.model, head, settings, reads)


def _own_head(hf_config: Any, reads: Reads) -> bool:
    """Whether logits are read, and from a matrix of their own instead of the embedding's."""
    return reads == "tokens" and not hf_config.tie_word_embeddings


def _pretrained(architecture: type[Any], folder: Path, hf_config: Any, reads: Reads) -> Any:
    try:
        whole, report = architecture.from_pretrained(
            folder, config=hf_config, dtype="float32", output_loading_info=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"The weights in {folder} cannot be read: {reason}. The download is incomplete or the folder is damaged."
        ) from error
    needed = _own_head(hf_config, reads)
    missing = sorted(k for k in report["missing_keys"] if needed or not k.startswith("lm_head."))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of its own architecture, for example {missing[:3]}. "
            f"The download is incomplete or the folder is another model."
        )
    return whole


def _resolve(weights: str) -> Path:
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    if weights.count("/") != 1 or weights.startswith((".", "/", "~")):
        raise CheckpointError(
            f"policy.backbone.weights: {weights!r} is neither a folder nor a hub id (owner/name). Give a folder that "
            f"holds config.json, *.safetensors and tokenizer.json."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(weights, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"policy.backbone.weights: {weights!r} cannot be had from the hub ({type(error).__name__}). Check the name "
            f"and the network, or download it elsewhere and give the folder."
        ) from error


def read_hf_config(folder: Path, kind: str) -> Any:
    """The Hugging Face configuration in `folder`; raises `CheckpointError` unless it is of the family `kind`."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from error
    family = FAMILIES[kind]
    if hf_config.model_type not in family.architectures:
        raise CheckpointError(
            f"{folder} holds a {hf_config.model_type!r} model; backbone.kind {kind!r} reads {family.reads}."
        )
    return hf_config
