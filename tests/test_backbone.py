"""The prefix cache against transformers' own forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, SmolVLMForConditionalGeneration

from vla import tokenizer
from vla.backbone import SmolVLM, new_backbone, tiny_hf_config
from vla.backbone_config import SmolVLMConfig, TinyVLM
from vla.errors import CheckpointError, UsageError

TINY = TinyVLM(width=32, vision_layers=2, text_layers=3, heads=4, mlp=48, patch=8, pixel_shuffle=2)
SETTINGS = SmolVLMConfig(kind="smolvlm", weights=None, tiny=TINY, text_layers=None, freeze=())


@pytest.fixture
def backbone() -> SmolVLM:
    torch.manual_seed(0)
    made, _ = new_backbone(SETTINGS, 32)
    return made.eval()


def inputs(batch: int = 3, cameras: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged prompts, one absent camera: what hides position and padding bugs when left out."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, cameras, 32, 32, 3), dtype=torch.uint8, generator=generator)
    image_mask = torch.ones(batch, cameras, dtype=torch.bool)
    image_mask[1, 0] = False
    tokens = torch.randint(1, 250, (batch, 7), generator=generator)
    token_mask = torch.arange(7) < torch.tensor([7, 4, 2])[:batch, None]
    return images, image_mask, tokens, token_mask


def reference(backbone: SmolVLM, embeddings: Tensor, valid: Tensor) -> DynamicCache:
    """The text model run by transformers itself, with its own cache and its own attention."""
    text = backbone.model.text_model
    cache = DynamicCache(config=text.config)
    text.set_attn_implementation("eager")
    mask = torch.zeros(valid.shape[0], 1, valid.shape[1], valid.shape[1])
    mask.masked_fill_(~valid[:, None, None, :], torch.finfo(torch.float32).min)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    text(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    text.set_attn_implementation("tandem_collect")
    return cache


@torch.no_grad()
def test_keys_and_values_are_those_of_transformers(backbone: SmolVLM) -> None:
    images, image_mask, tokens, token_mask = inputs()
    cache = backbone.encode(images, image_mask, tokens, token_mask)
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = backbone.model.connector(backbone.model.vision_model(pixel_values=pixels).last_hidden_state)
    seen = seen.view(3, -1, 32).masked_fill(~image_mask.repeat_interleave(4, 1)[..., None], 0)
    text = backbone.model.text_model.embed_tokens(tokens)
    expected = reference(backbone, torch.cat((seen, text), 1) * 32**0.5, cache.valid)
    assert len(cache.keys) == 3
    for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        theirs: Any = expected.layers[i]
        torch.testing.assert_close(keys, theirs.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(values, theirs.values, atol=1e-5, rtol=0)
    assert cache.next_position.tolist() == [8 + 7, 4 + 4, 8 + 2]


@torch.no_grad()
def test_an_absent_camera_is_not_encoded(backbone: SmolVLM) -> None:
    images, image_mask, tokens, token_mask = inputs()
    pictures = []
    hook = backbone.model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: pictures.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    whole = backbone.encode(images, image_mask, tokens, token_mask)
    hook.remove()
    assert pictures == [5]
    images[1, 0] = 255 - images[1, 0]  # what an absent camera's array holds changes nothing
    again = backbone.encode(images, image_mask, tokens, token_mask)
    assert torch.equal(whole.keys[-1], again.keys[-1])


@torch.no_grad()
def test_padding_changes_nothing(backbone: SmolVLM) -> None:
    images, image_mask, tokens, token_mask = inputs()
    padded = backbone.encode(images, image_mask, tokens, token_mask)
    for row, count in enumerate((7, 4, 2)):
        alone = backbone.encode(
            images[row : row + 1],
            image_mask[row : row + 1],
            tokens[row : row + 1, :count],
            token_mask[row : row + 1, :count],
        )
        end = 8 + count
        kept = alone.valid[0]
        torch.testing.assert_close(
            padded.keys[-1][row, :, :end][:, kept], alone.keys[-1][0][:, kept], atol=1e-6, rtol=0
        )


def test_collection_works_under_gradient_checkpointing(backbone: SmolVLM) -> None:
    backbone.train()
    weight = backbone.model.text_model.layers[0].mlp.up_proj.weight

    def gradient() -> Tensor:
        backbone.zero_grad()
        sum((k**2).sum() for k in backbone.encode(*inputs()).keys).backward()  # type: ignore[union-attr]
        assert weight.grad is not None
        return weight.grad.clone()

    plain = gradient()
    backbone.model.text_model.gradient_checkpointing_enable({"use_reentrant": False})
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient(), plain, atol=1e-6, rtol=1e-5)


def test_every_trainable_weight_gets_a_gradient(backbone: SmolVLM) -> None:
    cache = backbone.encode(*inputs())
    (sum((k**2).sum() for k in cache.keys) + sum((v**2).sum() for v in cache.values)).backward()  # type: ignore[union-attr]
    idle = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, "weights that never learn break data-parallel training"


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A checkpoint as transformers itself writes one, with random weights."""
    torch.manual_seed(3)
    model = SmolVLMForConditionalGeneration(tiny_hf_config(TINY, 32, 257))
    model.save_pretrained(tmp_path / "vlm")
    tokenizer.byte_level().save(tmp_path / "vlm")
    return tmp_path / "vlm"


def settings_for(folder: Path, text_layers: int | None = None) -> SmolVLMConfig:
    return SmolVLMConfig(kind="smolvlm", weights=str(folder), tiny=None, text_layers=text_layers, freeze=())


def test_pretrained_weights_are_the_checkpoint_s(pretrained: Path) -> None:
    backbone, _ = new_backbone(settings_for(pretrained), 32)
    theirs = SmolVLMForConditionalGeneration.from_pretrained(pretrained).model.state_dict()
    ours = backbone.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@torch.no_grad()
def test_a_truncated_backbone_keeps_its_first_layers(pretrained: Path) -> None:
    whole, _ = new_backbone(settings_for(pretrained), 32)
    short, _ = new_backbone(settings_for(pretrained, text_layers=2), 32)
    assert short.shape.layers == 2
    for ours, theirs in zip(short.encode(*inputs()).keys, whole.encode(*inputs()).keys, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_foreign_and_incomplete_checkpoints_are_refused(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        new_backbone(settings_for(tmp_path / "nowhere"), 32)
    with pytest.raises(CheckpointError, match=r"choose 1\.\.3"):
        new_backbone(settings_for(pretrained, text_layers=9), 32)
    (pretrained / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        new_backbone(settings_for(pretrained), 32)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    llama = LlamaForCausalLM(LlamaConfig.from_dict(sizes))
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="'llama' model"):
        new_backbone(settings_for(tmp_path / "llama"), 32)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple of patch"):
        new_backbone(SETTINGS, 40)
