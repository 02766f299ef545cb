"""PaliGemma 1 and 2 against transformers' own forward pass, on checkpoints that transformers wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from vla import tokenizer
from vla.backbone_config import PaliGemmaConfig as Settings
from vla.backbone_config import TinyPaliGemma
from vla.backbones.base import Reads
from vla.backbones.build import new_backbone, saved_backbone
from vla.backbones.paligemma import PaliGemma, tiny_hf_config
from vla.cache import rope_tables
from vla.errors import CheckpointError, UsageError

TINY = TinyPaliGemma("gemma", 32, vision_layers=2, text_layers=3, heads=4, head_dim=16, mlp=48, patch=8)
SETTINGS = Settings(kind="paligemma", weights=None, tiny=TINY, text_layers=None, freeze=())
IMAGE = 257  # the id that stands for an image token
WINDOW = 9  # of the sliding layers, shorter than the sequences here


def hf_config(text: str) -> PaliGemmaConfig:
    """As the real ones, but with values that matter: a window that is reached, caps that bend, an own query scale."""
    config = tiny_hf_config(replace(TINY, text=text), 16, IMAGE)  # type: ignore[arg-type]
    assert config.text_config is not None
    if text == "gemma2":
        settings = {"sliding_window": WINDOW, "attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 5}
        for name, value in settings.items():
            setattr(config.text_config, name, value)
    return config


@pytest.fixture(params=["gemma", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = PaliGemmaForConditionalGeneration(hf_config(request.param))
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at 0 and biases too: what they do must show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "vlm")
    tokenizer.byte_level().save(tmp_path / "vlm")
    return tmp_path / "vlm"


def settings_for(folder: Path, text_layers: int | None = None) -> Settings:
    return Settings(kind="paligemma", weights=str(folder), tiny=None, text_layers=text_layers, freeze=())


def load(folder: Path, reads: Reads = "cache") -> tuple[PaliGemma, Any]:
    """Ours and theirs, from the same files."""
    ours, _ = new_backbone(settings_for(folder), 16, reads)
    assert isinstance(ours, PaliGemma)
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return ours.eval(), theirs.eval()


def inputs(batch: int = 3, cameras: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged prompts; one camera absent in one row; 4 tokens an image."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, cameras, 16, 16, 3), dtype=torch.uint8, generator=generator)
    image_mask = torch.ones(batch, cameras, dtype=torch.bool)
    image_mask[1, 0] = False
    tokens = torch.randint(1, 250, (batch, 7), generator=generator)
    token_mask = torch.arange(7) < torch.tensor([7, 4, 2])[:batch, None]
    return images, image_mask, tokens, token_mask


def reference(
    model: Any, given: tuple[Tensor, Tensor, Tensor, Tensor], suffix: Tensor
) -> tuple[DynamicCache, Tensor, Tensor]:
    """Their forward on image placeholders, prompt and `suffix` ids: its cache, its logits, which tokens are real."""
    images, image_mask, tokens, token_mask = given
    placeholders = torch.full((len(tokens), 4 * image_mask.shape[1]), IMAGE)
    valid = torch.cat((image_mask.repeat_interleave(4, 1), token_mask, torch.ones_like(suffix).bool()), 1)
    kinds = torch.ones_like(valid, dtype=torch.long)
    kinds[:, : placeholders.shape[1] + tokens.shape[1]] = 0  # 0: prefix, 1: suffix
    cache = DynamicCache()  # one that keeps all: a sliding layer of theirs would forget
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255  # their processor: rescale, then normalise
    out = model(
        input_ids=torch.cat((placeholders, tokens, suffix), 1),
        pixel_values=(pixels - 0.5) / 0.5,
        attention_mask=valid.long(),
        position_ids=(valid.long().cumsum(1) - 1).clamp(min=0),
        token_type_ids=kinds,
        past_key_values=cache,
    )
    return cache, out.logits, valid


def assert_same_cache(keys: Any, values: Any, theirs: DynamicCache, valid: Tensor) -> None:
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        layer: Any = theirs.layers[i]
        for ours, their in ((k, layer.keys), (v, layer.values)):
            torch.testing.assert_close(ours.transpose(1, 2)[valid], their.transpose(1, 2)[valid], atol=1e-5, rtol=0)


@torch.no_grad()
def test_prefix_suffix_and_logits_are_those_of_transformers(folder: Path) -> None:
    """The prefix bidirectional, the suffix causal and, in Gemma 2, through its sliding windows."""
    ours, theirs = load(folder, "tokens")
    given = inputs()
    if ours.text.config.model_type == "gemma2":  # their windows count padding: compare without any
        given = (given[0], torch.ones_like(given[1]), given[2], torch.ones_like(given[3]))
    suffix = torch.randint(1, 250, (3, 5))
    expected, logits, valid = reference(theirs, given, suffix)
    cache = ours.encode(*given)
    there = torch.ones(3, 5, dtype=torch.bool)
    longer, hidden = ours.extend(cache, ours.embed_tokens(suffix), there[0].expand(5, 5).tril(), there)
    assert longer.valid.tolist() == valid.tolist()
    assert_same_cache(longer.keys, longer.values, expected, valid)
    torch.testing.assert_close(ours.token_logits(hidden), logits[:, -5:], atol=1e-4, rtol=0)
    assert longer.next_position.tolist() == valid.sum(1).tolist()


@torch.no_grad()
def test_the_ragged_prefix_of_gemma_2_sees_all_of_itself(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = PaliGemmaForConditionalGeneration(hf_config("gemma2")).eval()
    model.save_pretrained(tmp_path)
    tokenizer.byte_level().save(tmp_path)
    ours, theirs = load(tmp_path)
    given = inputs()
    cache = ours.encode(*given)
    embeddings = ours._prefix(*given).embeddings
    mask = torch.zeros(3, 1, 15, 15).masked_fill(~cache.valid[:, None, None, :], torch.finfo(torch.float32).min)
    expected = DynamicCache()
    theirs.model.language_model(
        inputs_embeds=embeddings,
        attention_mask={"full_attention": mask, "sliding_attention": mask},
        position_ids=(cache.valid.long().cumsum(1) - 1).clamp(min=0),
        past_key_values=expected,
        use_cache=True,
    )
    assert_same_cache(cache.keys, cache.values, expected, cache.valid)


@pytest.mark.parametrize("text", ["gemma", "gemma2"])
def test_gradients_reach_all_that_trains_with_checkpointing_too(text: str) -> None:
    def run(settings: Settings) -> dict[str, Tensor]:
        torch.manual_seed(0)
        backbone, _ = new_backbone(settings, 16, "tokens")
        cache = backbone.train().encode(*inputs())
        there = torch.ones(3, 2, dtype=torch.bool)
        longer, hidden = backbone.extend(cache, torch.full((3, 2, 32), 0.1), there[:2, :2].tril(), there)
        total = (backbone.token_logits(hidden) ** 2).sum()
        sum(((k**2).sum() for k in longer.keys), total).backward()
        idle = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle
        return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}

    settings = replace(SETTINGS, tiny=replace(TINY, text=text))
    plain, again = run(settings), run(replace(settings, gradient_checkpointing=True))
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-5, rtol=1e-4)


def test_only_keys_and_values_of_the_last_layer_train_when_nothing_else_is_read() -> None:
    backbone, _ = new_backbone(replace(SETTINGS, tiny=replace(TINY, text="gemma2")), 16)
    last = backbone.text.layers[-1]
    training = {name for name, p in last.named_parameters() if p.requires_grad}
    assert training == {"input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}
    assert not backbone.text.norm.weight.requires_grad


@torch.no_grad()
def test_the_names_of_older_files_are_understood(folder: Path) -> None:
    """The public files were written before transformers moved its text models up a level."""
    new, _ = load(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for older in (
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        {name.replace("language_model.model.", "language_model."): tensor for name, tensor in tensors.items()},
    ):
        assert older.keys() != tensors.keys()
        save_file(older, path, {"format": "pt"})
        old, _ = load(folder)
        assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters(), strict=True))


@torch.no_grad()
def test_a_truncated_backbone_keeps_its_first_layers(folder: Path, tmp_path: Path) -> None:
    whole, _ = load(folder)
    short, _ = new_backbone(settings_for(folder, text_layers=2), 16)
    for ours, theirs in zip(short.eval().encode(*inputs()).keys, whole.encode(*inputs()).keys, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    short.hf_config.save_pretrained(tmp_path / "backbone")
    saved = saved_backbone(tmp_path / "backbone", settings_for(folder, text_layers=2))
    saved.load_state_dict(short.state_dict())
    assert torch.equal(saved.eval().encode(*inputs()).keys[-1], short.encode(*inputs()).keys[-1])


def test_what_the_expert_must_know_of_the_real_ones() -> None:
    """Sizes of the public configurations, on the meta device: nothing is allocated."""
    first = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_key_value_heads": 1}
    second = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_key_value_heads": 4}
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
    for model_type, sizes, billions, softcap in (("gemma", first, 2.92, None), ("gemma2", second, 3.03, 50.0)):
        text = {"model_type": model_type, "num_attention_heads": 8, "vocab_size": 257216, **sizes}
        config = PaliGemmaConfig.from_dict(
            {"vision_config": dict(vision), "text_config": text, "projection_dim": sizes["hidden_size"]}
        )
        with torch.device("meta"):
            backbone = PaliGemma(PaliGemmaForConditionalGeneration(config).model, None, SETTINGS, "tokens")
        shape = backbone.shape
        assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(billions * 1e9, rel=0.005)
        assert (shape.layers, shape.heads, shape.head_dim, shape.rope_theta) == (len(backbone.text.layers), 8, 256, 1e4)
        assert (shape.kv_heads, shape.scale, shape.softcap) == (sizes["num_key_value_heads"], 1 / 16, softcap)
        backbone.require_image_size(224)


def test_what_cannot_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="16 pixels only"):
        new_backbone(settings_for(folder), 32)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "paligemma"', '"model_type": "llava"'))
    with pytest.raises(CheckpointError, match=r"'llava' model.*PaliGemma 2"):
        new_backbone(settings_for(folder), 16)
    with pytest.raises(UsageError, match="multiple of patch"):
        new_backbone(SETTINGS, 20)


def test_the_expert_turns_its_tokens_as_the_backbone_does() -> None:
    backbone, _ = new_backbone(SETTINGS, 16)
    positions = torch.tensor([[0, 3, 50]])
    cos, sin = backbone.text.rotary_emb(torch.zeros(1), positions)
    ours = rope_tables(positions, backbone.shape.head_dim, backbone.shape.rope_theta)
    torch.testing.assert_close(ours, (cos, sin))
