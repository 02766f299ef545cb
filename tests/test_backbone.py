"""The prefix cache against transformers' own forward pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, SmolVLMForConditionalGeneration

from vla import tokenizer
from vla.backbone_config import SmolVLMConfig, TinyVLM
from vla.backbones.base import Reads
from vla.backbones.build import new_backbone
from vla.backbones.smolvlm import SmolVLM, tiny_hf_config
from vla.cache import rope_tables
from vla.errors import CheckpointError, UsageError

TINY = TinyVLM(width=32, vision_layers=2, text_layers=3, heads=4, mlp=48, patch=8, pixel_shuffle=2)
SETTINGS = SmolVLMConfig(kind="smolvlm", weights=None, tiny=TINY, text_layers=None, freeze=())


def made(reads: Reads = "cache", settings: SmolVLMConfig = SETTINGS) -> SmolVLM:
    """The same random weights in every call with the same `reads`."""
    torch.manual_seed(0)
    backbone, _ = new_backbone(settings, 32, reads)
    assert isinstance(backbone, SmolVLM)
    return backbone.eval()


@pytest.fixture
def backbone() -> SmolVLM:
    return made()


def inputs(batch: int = 3, cameras: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged prompts, one absent camera: what hides position and padding bugs when left out."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, cameras, 32, 32, 3), dtype=torch.uint8, generator=generator)
    image_mask = torch.ones(batch, cameras, dtype=torch.bool)
    image_mask[1, 0] = False
    tokens = torch.randint(1, 250, (batch, 7), generator=generator)
    token_mask = torch.arange(7) < torch.tensor([7, 4, 2])[:batch, None]
    return images, image_mask, tokens, token_mask


def reference(backbone: SmolVLM, embeddings: Tensor, valid: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """The text model run by transformers itself, with its own cache and its own attention."""
    text = backbone.model.text_model
    cache = DynamicCache(config=text.config)
    text.set_attn_implementation("eager")
    weights = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    out = text(
        inputs_embeds=embeddings,
        attention_mask=weights,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    text.set_attn_implementation("tandem_prefix")
    return cache, out.last_hidden_state


@torch.no_grad()
def test_keys_and_values_are_those_of_transformers(backbone: SmolVLM) -> None:
    images, image_mask, tokens, token_mask = inputs()
    cache = backbone.encode(images, image_mask, tokens, token_mask)
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = backbone.model.connector(backbone.model.vision_model(pixel_values=pixels).last_hidden_state)
    seen = seen.view(3, -1, 32).masked_fill(~image_mask.repeat_interleave(4, 1)[..., None], 0)
    text = backbone.model.text_model.embed_tokens(tokens)
    mask = cache.valid[:, None, None, :].expand(3, 1, 15, 15)
    expected, _ = reference(backbone, torch.cat((seen, text), 1) * 32**0.5, cache.valid, mask)
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
        assert alone.valid.all(), "a camera that is absent takes no tokens when no row has it"
        kept = padded.keys[-1][row][:, padded.valid[row]]
        torch.testing.assert_close(kept, alone.keys[-1][0], atol=1e-6, rtol=0)
        assert alone.next_position.tolist() == [padded.next_position[row]]


@torch.no_grad()
def test_text_alone_runs_no_vision(backbone: SmolVLM) -> None:
    images, image_mask, tokens, token_mask = inputs()
    backbone.model.vision_model.register_forward_hook(lambda *_: pytest.fail("nothing is there to see"))
    cache = backbone.encode(images, torch.zeros_like(image_mask), tokens, token_mask)
    assert cache.valid.tolist() == token_mask.tolist()


@torch.no_grad()
def test_extending_equals_one_joint_forward() -> None:
    """Three more tokens: one alone, two that see the first and one another; one of them padding in a row."""
    backbone = made("hidden")
    images, image_mask, tokens, token_mask = inputs()
    cache = replace(backbone.encode(images, image_mask, tokens, token_mask), sequence=7)
    more = torch.randn(3, 3, 32)
    own = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    valid = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1]], dtype=torch.bool)
    longer, hidden = backbone.extend(cache, more, own, valid)

    prefix = backbone._prefix(images, image_mask, tokens, token_mask)
    embeddings = torch.cat((prefix.embeddings, more), 1)
    every = torch.cat((cache.valid, valid), 1)
    mask = every[:, None, None, :].repeat(1, 1, 18, 1)
    mask[..., :15, 15:] = False
    mask[..., 15:, 15:] &= own
    expected, last = reference(backbone, embeddings, every, mask)
    for i in range(3):
        theirs: Any = expected.layers[i]
        for ours, their in ((longer.keys[i], theirs.keys), (longer.values[i], theirs.values)):
            torch.testing.assert_close(ours.transpose(1, 2)[every], their.transpose(1, 2)[every], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[valid], last[:, 15:][valid], atol=1e-5, rtol=0)
    assert longer.next_position.tolist() == [18, 11, 12]
    assert longer.valid.tolist() == every.tolist()
    assert longer.sequence == 7


@torch.no_grad()
def test_tokens_one_by_one_equal_tokens_at_once() -> None:
    backbone = made("tokens")
    start = backbone.encode(*inputs())
    ids = torch.tensor([[5, 6, 7]] * 3)
    there = torch.ones(3, 3, dtype=torch.bool)
    _, at_once = backbone.extend(start, backbone.embed_tokens(ids), there[0].expand(3, 3).tril(), there)
    cache, steps = start, []
    for i in range(3):
        cache, hidden = backbone.extend(cache, backbone.embed_tokens(ids[:, i : i + 1]), there[:1, :1], there[:, :1])
        steps.append(hidden)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, atol=1e-5, rtol=0)
    assert backbone.token_logits(at_once).shape == (3, 3, 257)
    with pytest.raises(ValueError, match="'cache', not 'tokens'"):
        made("cache").token_logits(at_once)


def test_gradient_checkpointing_computes_twice_and_changes_nothing() -> None:
    """In training, for the prefix and for what extends it."""

    def run(settings: SmolVLMConfig) -> tuple[Tensor, Tensor, int]:
        backbone = made("hidden", settings).train()
        computed = []
        backbone.model.text_model.layers[0].mlp.register_forward_pre_hook(lambda *_: computed.append(1))
        backbone.model.vision_model.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: computed.append(1))
        cache = backbone.encode(*inputs())
        there = torch.ones(3, 2, dtype=torch.bool)
        longer, hidden = backbone.extend(cache, torch.full((3, 2, 32), 0.1), there[:2, :2], there)
        (sum((k**2).sum() for k in longer.keys) + (hidden**3).sum()).backward()
        gradient = backbone.model.text_model.layers[0].mlp.up_proj.weight.grad
        assert gradient is not None
        return longer.keys[-1].detach(), gradient, len(computed)

    keys, gradient, plain = run(SETTINGS)
    again, regradient, checkpointed = run(replace(SETTINGS, gradient_checkpointing=True))
    assert (plain, checkpointed) == (3, 6)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(again, keys, atol=1e-6, rtol=0)
    torch.testing.assert_close(regradient, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reads", ["cache", "hidden", "tokens"])
def test_every_trainable_weight_gets_a_gradient(reads: Reads) -> None:
    backbone = made(reads)
    cache = backbone.encode(*inputs())
    total = sum((k**2).sum() for k in cache.keys) + sum((v**2).sum() for v in cache.values)
    if reads != "cache":
        there = torch.ones(3, 2, dtype=torch.bool)
        hidden = backbone.extend(cache, torch.full((3, 2, 32), 0.1), there[:2, :2].tril(), there)[1]
        total = total + ((backbone.token_logits(hidden) if reads == "tokens" else hidden) ** 2).sum()
    assert isinstance(total, Tensor)
    total.backward()
    idle = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, "weights that never learn break data-parallel training"
    learning = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert ("model.text_model.layers.2.mlp.up_proj.weight" in learning) == (reads != "cache")
    assert ("lm_head.weight" in learning) == (reads == "tokens")


def test_frozen_parts_take_the_dtype_and_do_not_learn() -> None:
    backbone = made("tokens", replace(SETTINGS, freeze=("vision", "text"), dtype="bf16"))
    for name, part in backbone.parts().items():
        frozen = name != "connector"
        assert {p.requires_grad for p in part.parameters()} == {not frozen}
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16 if frozen else torch.float32}
    assert backbone.text.rotary_emb.inv_freq.dtype == torch.float32, "rounded frequencies rotate to other places"
    plain = made("tokens").encode(*inputs())
    rounded = backbone.encode(*inputs())
    torch.testing.assert_close(rounded.keys[-1].float(), plain.keys[-1], atol=0.1, rtol=0.05)
    with pytest.raises(UsageError, match="freeze is empty"):
        replace(SETTINGS, dtype="bf16")


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
def test_logits_are_those_of_the_checkpoint_s_head(pretrained: Path) -> None:
    backbone, _ = new_backbone(settings_for(pretrained), 32, "tokens")
    theirs = SmolVLMForConditionalGeneration.from_pretrained(pretrained)
    hidden = torch.randn(2, 3, 32)
    assert torch.equal(backbone.token_logits(hidden), theirs.lm_head(hidden))
    path = pretrained / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "lm_head.weight"}, path, {"format": "pt"})
    new_backbone(settings_for(pretrained), 32, "hidden")
    with pytest.raises(CheckpointError, match="lm_head"):
        new_backbone(settings_for(pretrained), 32, "tokens")


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
    with pytest.raises(UsageError, match="multiples of 16 up to 32"):
        new_backbone(settings_for(pretrained), 64)
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


def test_damaged_weights_are_refused(pretrained: Path) -> None:
    path = pretrained / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="download is incomplete"):
        new_backbone(settings_for(pretrained), 32)
    path.write_bytes(whole.replace(b"connector", b"konnektor"))
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        new_backbone(settings_for(pretrained), 32)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        new_backbone(settings_for(pretrained), 32)


def test_the_expert_turns_its_tokens_as_the_backbone_does() -> None:
    backbone, _ = new_backbone(SETTINGS, 32)
    positions = torch.tensor([[0, 3, 50]])
    cos, sin = backbone.text.rotary_emb(torch.zeros(1), positions)
    ours = rope_tables(positions, backbone.shape.head_dim, backbone.shape.rope_theta)
    torch.testing.assert_close(ours, (cos, sin))
