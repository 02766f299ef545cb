"""Qwen2.5-VL and Qwen3-VL against transformers' own forward pass, on checkpoints that transformers wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLForConditionalGeneration,
)

from vla import tokenizer
from vla.backbone_config import QwenVLConfig, TinyQwenVL
from vla.backbones.base import Reads
from vla.backbones.build import new_backbone, saved_backbone
from vla.backbones.qwen_vl import PIXELS, QwenVL, picture_positions, tiny_hf_config, to_patches
from vla.cache import rope_tables
from vla.errors import CheckpointError, UsageError

TINY = TinyQwenVL("qwen2_5_vl", width=48, vision_layers=3, text_layers=4, heads=4, kv_heads=2, mlp=48, patch=4)
SETTINGS = QwenVLConfig(kind="qwen_vl", weights=None, tiny=TINY, text_layers=None, freeze=())
THEIRS = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
SIDE = 24  # pixels: 6 x 6 patches, 3 x 3 tokens, so windows of 2 x 2 tokens are cut off
START, END, IMAGE = 257, 258, 259


def tiny(model: str) -> TinyQwenVL:
    return replace(TINY, model=model)  # type: ignore[arg-type]


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    config = tiny_hf_config(tiny(request.param), 16, 257)  # trained for another grid: positions are interpolated
    model = THEIRS[request.param](config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0: what they do must show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "vlm")
    tokenizer.byte_level().save(tmp_path / "vlm")
    return tmp_path / "vlm"


def settings_for(folder: Path, text_layers: int | None = None) -> QwenVLConfig:
    return QwenVLConfig(kind="qwen_vl", weights=str(folder), tiny=None, text_layers=text_layers, freeze=())


def load(folder: Path, reads: Reads = "cache") -> tuple[QwenVL, Any]:
    """Ours and theirs, from the same files."""
    ours, _ = new_backbone(settings_for(folder), SIDE, reads)
    assert isinstance(ours, QwenVL)
    theirs = THEIRS[ours.hf_config.model_type].from_pretrained(folder, attn_implementation="eager")
    return ours.eval(), theirs.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged prompts; the first camera absent in one row."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 2, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    image_mask = torch.tensor([[1, 1], [0, 1], [1, 1]], dtype=torch.bool)
    tokens = torch.randint(1, 250, (3, 7), generator=generator)
    token_mask = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    return images, image_mask, tokens, token_mask


def reference(model: Any, given: tuple[Tensor, ...], suffix: Tensor) -> tuple[DynamicCache, Tensor, Tensor, Tensor]:
    """Their processor and forward: the cache, logits, which tokens are real, and the positions that come next."""
    images, image_mask, tokens, token_mask = given
    mean, std = PIXELS[model.config.model_type]
    processor = Qwen2VLImageProcessor(
        image_mean=mean,
        image_std=std,
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 64, "longest_edge": 10**6},
    )
    pictures = [image.permute(2, 0, 1) for image in images.flatten(0, 1)[image_mask.flatten()]]
    seen = processor(images=pictures, return_tensors="pt")
    one = torch.tensor([START, *[IMAGE] * 9, END])
    ids = torch.cat((one.expand(3, 2, -1).flatten(1), tokens, suffix), 1)
    valid = torch.cat((image_mask.repeat_interleave(11, 1), token_mask, torch.ones_like(suffix).bool()), 1)
    ids = ids.masked_fill(~valid, 0)
    cache = DynamicCache()
    out = model(
        input_ids=ids,
        attention_mask=valid.long(),
        pixel_values=seen["pixel_values"],
        image_grid_thw=seen["image_grid_thw"],
        mm_token_type_ids=(ids == IMAGE).int(),
        past_key_values=cache,
        use_cache=True,
    )
    return cache, out.logits, valid, model.model.rope_deltas[:, 0] + valid.sum(1)


@torch.no_grad()
def test_prefix_suffix_and_logits_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = load(folder, "tokens")
    given, suffix = inputs(), torch.randint(1, 250, (3, 5))
    expected, logits, valid, following = reference(theirs, given, suffix)
    cache = ours.encode(*given)
    there = torch.ones(3, 5, dtype=torch.bool)
    longer, hidden = ours.extend(cache, ours.embed_tokens(suffix), there[0].expand(5, 5).tril(), there)
    assert longer.valid.tolist() == valid.tolist()
    for i, (keys, values) in enumerate(zip(longer.keys, longer.values, strict=True)):
        layer: Any = expected.layers[i]
        for ours_, theirs_ in ((keys, layer.keys), (values, layer.values)):
            torch.testing.assert_close(ours_.transpose(1, 2)[valid], theirs_.transpose(1, 2)[valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.token_logits(hidden), logits[:, -5:], atol=1e-4, rtol=0)
    assert longer.next_position.tolist() == following.tolist()


@torch.no_grad()
def test_patches_are_those_of_the_processor() -> None:
    picture = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    theirs = Qwen2VLImageProcessor()(images=list(picture), return_tensors="pt")
    mean, std = (torch.tensor(x)[:, None, None] for x in PIXELS["qwen2_5_vl"])
    ours = to_patches((picture.float() / 255 - mean) / std, 14, 2, 2)
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-5, rtol=0)
    assert theirs["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert PIXELS["qwen3_vl"] == ([0.5] * 3, [0.5] * 3)  # as its preprocessor_config.json


def test_positions_of_a_known_case() -> None:
    """Two cameras of 2 x 2 tokens, then the second alone, which starts where the first would have."""
    both, second = picture_positions(torch.tensor([[True, True], [False, True]]), 2).unbind(1)
    assert both.tolist() == [
        [0, 1, 1, 1, 1, 3, 4, 5, 5, 5, 5, 7],  # start mark, one moment, end mark
        [0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7],  # rows
        [0, 1, 2, 1, 2, 3, 4, 5, 6, 5, 6, 7],  # columns
    ]
    assert second[:, 6:].tolist() == both[:, :6].tolist()


@torch.no_grad()
def test_absent_cameras_change_nothing_and_are_not_encoded(folder: Path) -> None:
    ours, _ = load(folder)
    images, image_mask, tokens, token_mask = inputs()
    patches = []
    ours.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    whole = ours.encode(images, image_mask, tokens, token_mask)
    assert patches == [5 * 36]
    images[1, 0] = 255 - images[1, 0]
    again = ours.encode(images, image_mask, tokens, token_mask)
    assert torch.equal(whole.keys[-1], again.keys[-1])
    alone = ours.encode(images[1:2], image_mask[1:2], tokens[1:2, :4], token_mask[1:2, :4])
    assert alone.valid.all()
    kept = whole.keys[-1][1][:, whole.valid[1]]
    torch.testing.assert_close(kept, alone.keys[-1][0], atol=1e-5, rtol=0)
    sees_itself = ours._prefix(images, image_mask, tokens, token_mask).mask.diagonal(dim1=2, dim2=3)
    assert sees_itself.all(), "attending to nothing is NaN in some kernels, and a masked NaN spreads"
    text = ours.encode(images, torch.zeros_like(image_mask), tokens, token_mask)
    assert text.next_position.tolist() == [7, 4, 2]


@pytest.mark.parametrize("model", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("reads", ["cache", "tokens"])
def test_gradients_reach_all_that_trains_with_checkpointing_too(model: str, reads: Reads) -> None:
    def run(settings: QwenVLConfig) -> dict[str, Tensor]:
        torch.manual_seed(0)
        backbone, _ = new_backbone(settings, SIDE, reads)
        cache = backbone.train().encode(*inputs())
        there = torch.ones(3, 2, dtype=torch.bool)
        total = sum((k**2).sum() for k in (*cache.keys, *cache.values))
        if reads == "tokens":
            hidden = backbone.extend(cache, torch.full((3, 2, 48), 0.1), there[:2, :2].tril(), there)[1]
            total = total + (backbone.token_logits(hidden) ** 2).sum()
        assert isinstance(total, Tensor)
        total.backward()
        idle = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle
        return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}

    settings = replace(SETTINGS, tiny=tiny(model))
    plain, again = run(settings), run(replace(settings, gradient_checkpointing=True))
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-5, rtol=1e-4)


def test_deepstack_beyond_the_kept_layers_does_not_train(folder: Path) -> None:
    short, _ = new_backbone(settings_for(folder, text_layers=2), SIDE)
    cache = short.encode(*inputs())
    sum(((k**2).sum() for k in cache.keys), (cache.values[-1] ** 2).sum()).backward()
    idle = [name for name, p in short.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    whole, _ = load(folder)
    torch.testing.assert_close(cache.keys[-1], whole.encode(*inputs()).keys[1], atol=1e-6, rtol=0)


@torch.no_grad()
def test_parts_may_differ_in_dtype(folder: Path) -> None:
    plain, _ = load(folder)
    settings = replace(settings_for(folder), freeze=("vision", "text"), dtype="bf16")
    mixed, _ = new_backbone(settings, SIDE)
    for name, part in mixed.parts().items():
        assert {p.dtype for p in part.parameters()} == {torch.float32 if name == "connector" else torch.bfloat16}
    named = {id(p) for part in mixed.parts().values() for p in part.parameters()}
    assert named == {id(p) for p in mixed.parameters()}, "every weight belongs to a part"
    near, exact = mixed.eval().encode(*inputs()), plain.encode(*inputs())
    torch.testing.assert_close(near.keys[-1].float(), exact.keys[-1], atol=0.2, rtol=0.1)


@torch.no_grad()
def test_a_saved_architecture_is_built_anew(folder: Path, tmp_path: Path) -> None:
    made, _ = new_backbone(settings_for(folder, text_layers=3), SIDE)
    made.hf_config.save_pretrained(tmp_path / "backbone")
    saved = saved_backbone(tmp_path / "backbone", settings_for(folder, text_layers=3))
    saved.load_state_dict(made.state_dict())
    assert torch.equal(saved.eval().encode(*inputs()).keys[-1], made.eval().encode(*inputs()).keys[-1])


REAL = {
    "qwen2_5_vl": {  # 3B, written flat
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 2048, "spatial_patch_size": 14},
    },
    "qwen3_vl": {  # 2B
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        },
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
}


@pytest.mark.parametrize(
    ("model", "billions", "theta", "size"), [("qwen2_5_vl", 3.75, 1e6, 28), ("qwen3_vl", 2.13, 5e6, 32)]
)
def test_what_the_expert_must_know_of_the_real_ones(model: str, billions: float, theta: float, size: int) -> None:
    """Sizes of the public configurations, on the meta device: nothing is allocated."""
    config = AutoConfig.for_model(model, **REAL[model])
    with torch.device("meta"):
        backbone = QwenVL(THEIRS[model](config).model, None, SETTINGS, "tokens")
    shape = backbone.shape
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(billions * 1e9, rel=0.01)
    assert (shape.heads, shape.head_dim, shape.rope_theta, shape.softcap) == (16, 128, theta, None)
    assert shape.scale == pytest.approx(128**-0.5)
    backbone.require_image_size(7 * size)
    with pytest.raises(UsageError, match=f"multiples of {size}"):
        backbone.require_image_size(7 * size + 4)


def test_what_cannot_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="multiples of 8"):
        new_backbone(settings_for(folder), 20)
    with pytest.raises(UsageError, match="2 x patch"):
        new_backbone(SETTINGS, 20)
    config = folder / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"rope_type": "default"', '"rope_type": "linear", "factor": 2.0'))
    with pytest.raises(CheckpointError, match="'linear'"):
        new_backbone(settings_for(folder), SIDE)
    config.write_text(whole)
    config.write_text(config.read_text().replace('"model_type": "qwen', '"model_type": "mistral", "was": "qwen', 1))
    with pytest.raises(CheckpointError, match=r"'mistral' model.*Qwen3-VL"):
        new_backbone(settings_for(folder), SIDE)


@pytest.mark.parametrize("model", ["qwen2_5_vl", "qwen3_vl"])
def test_the_expert_turns_its_tokens_as_the_backbone_does(model: str) -> None:
    backbone, _ = new_backbone(replace(SETTINGS, tiny=tiny(model)), SIDE)
    assert isinstance(backbone, QwenVL)
    positions = torch.tensor([[0, 3, 50]])
    theirs = backbone._key_tables(backbone._tables(torch.zeros(1), positions))
    ours = rope_tables(positions, backbone.shape.head_dim, backbone.shape.rope_theta)
    torch.testing.assert_close(ours, theirs)
