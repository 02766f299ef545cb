"""Images and an instruction -> PrefixCache, by a Hugging Face VLM. The home of transformers.

Axes: B batch, V cameras, M tokens of one image, T text tokens, P = V*M + T, E embedding width,
K key-value heads, D head size.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, SmolVLMConfig, SmolVLMModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vla import tokenizer as tokenizers
from vla.backbone_config import SmolVLMConfig as SmolVLMSettings
from vla.backbone_config import TinyVLM
from vla.cache import CacheShape, PrefixCache, positions_of, rotate
from vla.errors import CheckpointError, UsageError
from vla.tokenizer import Tokenizer

COLLECT = "tandem_collect"


class KeyValues(dict[int, tuple[Tensor, Tensor]]):
    """Text layer -> its keys and values. A type of its own, since FSDP2 hands a layer a copy of a plain dict."""


def _collecting_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention that also leaves its rotated keys and values in `kwargs["sink"]`.

    A cache object would be dropped by transformers under gradient checkpointing; this works there too,
    since the recomputation merely writes equal values again.
    """
    sink: KeyValues = kwargs["sink"]
    sink[module.layer_idx] = (key, value)
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=kwargs["scaling"], enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(COLLECT, _collecting_attention)


class SmolVLM(nn.Module):
    """SmolVLM2 as prefix encoder in SmolVLA's layout: image tokens, then text, all seeing one another.

    Image and text embeddings are scaled by sqrt(width), as the public SmolVLA weights expect. The last text
    layer contributes only its keys and values; its attention output and MLP are never computed.
    """

    def __init__(self, hf_config: SmolVLMConfig, text_layers: int | None) -> None:
        super().__init__()
        model: Any = SmolVLMModel(hf_config)  # transformers' own annotations do not cover its parts
        if text_layers is not None:
            _require_layers(text_layers, len(model.text_model.layers))
            model.text_model.layers = model.text_model.layers[:text_layers]
            model.text_model.config.num_hidden_layers = text_layers  # the same object as hf_config.text_config
        model.text_model.set_attn_implementation(COLLECT)
        self.hf_config = hf_config
        self.model = model
        for unused in self._unused():
            unused.requires_grad_(requires_grad=False)

    def _unused(self) -> Iterable[nn.Module]:
        last = self.model.text_model.layers[-1]
        yield from (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp, last.post_attention_layernorm)
        yield self.model.text_model.norm

    @property
    def shape(self) -> CacheShape:
        text: Any = self.hf_config.text_config
        return CacheShape(
            layers=len(self.model.text_model.layers),
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            rope_theta=float(text.rope_parameters["rope_theta"]),
        )

    def parts(self) -> dict[str, nn.Module]:
        """Parts that can be frozen or given their own learning rate."""
        return {"vision": self.model.vision_model, "connector": self.model.connector, "text": self.model.text_model}

    def encode(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Encode one observation per row.

        Args:
            images: (B, V, h, w, 3) uint8 RGB, of the side the vision tower was built for.
            image_mask: (B, V) bool; absent cameras are not encoded.
            tokens: (B, T) int64.
            token_mask: (B, T) bool.
        """
        image_tokens = self._embed_images(images, image_mask)  # (B, V*M, E)
        text = self.model.text_model
        scale = math.sqrt(image_tokens.shape[-1])
        embeddings = torch.cat((image_tokens * scale, text.embed_tokens(tokens) * scale), dim=1)
        per_camera = image_tokens.shape[1] // image_mask.shape[1]
        valid = torch.cat((image_mask.repeat_interleave(per_camera, dim=1), token_mask), dim=1)
        return self._collect(embeddings, valid)

    def _embed_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        rows, cameras = image_mask.shape
        present = images.flatten(0, 1)[image_mask.flatten()]  # (R, h, w, 3), real pictures only
        dtype = self.model.connector.modality_projection.proj.weight.dtype
        pixels = present.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0  # SigLIP's range
        features = self.model.connector(self.model.vision_model(pixel_values=pixels).last_hidden_state)  # (R, M, E)
        everywhere = features.new_zeros(rows * cameras, *features.shape[1:])
        everywhere[image_mask.flatten()] = features
        return everywhere.view(rows, cameras * features.shape[1], features.shape[2])

    def _collect(self, embeddings: Tensor, valid: Tensor) -> PrefixCache:
        text, sink = self.model.text_model, KeyValues()
        positions = positions_of(valid)
        tables = text.rotary_emb(embeddings, position_ids=positions)
        hidden, mask = embeddings, valid[:, None, None, :]  # every token sees every valid token
        for layer in text.layers[:-1]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=tables, sink=sink)
        last = text.layers[-1]
        sink[len(text.layers) - 1] = _keys_and_values(last.self_attn, last.input_layernorm(hidden), tables)
        layers = [sink[i] for i in range(len(text.layers))]
        return PrefixCache(
            keys=tuple(k for k, _ in layers),
            values=tuple(v for _, v in layers),
            valid=valid,
            next_position=valid.sum(dim=1),
        )


def _keys_and_values(attention: Any, hidden: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    split = (*hidden.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(hidden).view(split).transpose(1, 2)
    return rotate(keys, tables), attention.v_proj(hidden).view(split).transpose(1, 2)


def _require_layers(asked: int, there: int) -> None:
    if not 1 <= asked <= there:
        raise CheckpointError(f"policy.backbone.text_layers is {asked}; this backbone has {there}: choose 1..{there}.")


def tiny_hf_config(tiny: TinyVLM, image_size: int, vocab_size: int) -> SmolVLMConfig:
    """A SmolVLM of the given sizes. Padding and image ids stand in both configs, as the classes expect."""
    if image_size % (tiny.patch * tiny.pixel_shuffle) or tiny.width % tiny.heads:
        raise UsageError(
            f"policy.backbone.tiny: image_size {image_size} must be a multiple of patch x pixel_shuffle "
            f"({tiny.patch * tiny.pixel_shuffle}), and width {tiny.width} of heads {tiny.heads}."
        )
    common = {"hidden_size": tiny.width, "num_attention_heads": tiny.heads, "intermediate_size": tiny.mlp}
    return SmolVLMConfig.from_dict(
        dict(
            vision_config={
                **common,
                "num_hidden_layers": tiny.vision_layers,
                "image_size": image_size,
                "patch_size": tiny.patch,
            },
            text_config={
                **common,
                "model_type": "llama",
                "num_hidden_layers": tiny.text_layers,
                "num_key_value_heads": tiny.heads,
                "head_dim": tiny.width // tiny.heads,
                "vocab_size": vocab_size,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": None,
            },
            scale_factor=tiny.pixel_shuffle,
            image_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )


def new_backbone(settings: SmolVLMSettings, image_size: int) -> tuple[SmolVLM, Tokenizer]:
    """A backbone to start training from: random weights (`tiny`) or a pretrained checkpoint (`weights`).

    Raises:
        CheckpointError: the checkpoint is absent, is no SmolVLM, or lacks its tokenizer.
    """
    if settings.tiny is not None:
        tokenizer = tokenizers.byte_level()
        hf_config = tiny_hf_config(settings.tiny, image_size, tokenizer.vocab_size)
        return SmolVLM(hf_config, None), tokenizer
    assert settings.weights is not None  # the config refuses neither
    folder = _resolve(settings.weights)
    hf_config = read_hf_config(folder)
    loaded: Any = SmolVLMModel.from_pretrained(folder, config=hf_config, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"]:
        raise CheckpointError(
            f"{settings.weights} lacks {len(report['missing_keys'])} weights of its own architecture, for example "
            f"{sorted(report['missing_keys'])[:3]}. The download is incomplete or the folder is another model."
        )
    backbone = SmolVLM(hf_config, None)
    backbone.model.load_state_dict(model.state_dict())
    if settings.text_layers is not None:
        backbone = _truncated(backbone, settings.text_layers)
    return backbone, tokenizers.load(folder)


def _truncated(backbone: SmolVLM, text_layers: int) -> SmolVLM:
    shorter = SmolVLM(backbone.hf_config, text_layers)
    kept = shorter.state_dict().keys()
    shorter.load_state_dict({k: v for k, v in backbone.state_dict().items() if k in kept})
    return shorter


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


def read_hf_config(folder: Path) -> SmolVLMConfig:
    """The Hugging Face configuration in `folder`; raises `CheckpointError` unless it is a SmolVLM's."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    hf_config = AutoConfig.from_pretrained(folder)
    if not isinstance(hf_config, SmolVLMConfig):
        raise CheckpointError(
            f"{folder} holds a {hf_config.model_type!r} model; backbone.kind 'smolvlm' reads SmolVLM and SmolVLM2."
        )
    return hf_config


def saved_backbone(folder: Path) -> SmolVLM:
    """The architecture described in a policy checkpoint's `backbone/`; its weights come with the policy's."""
    return SmolVLM(read_hf_config(folder), None)
