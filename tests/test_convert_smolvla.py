"""A converted SmolVLA computes what LeRobot's own class computes, on random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lerobot.policies.smolvla.smolvlm_with_expert as with_expert
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline
from torch import Tensor, nn
from transformers import SmolVLMConfig

from deploy import convert
from vla import checkpoint, tokenizer
from vla.batch import Batch
from vla.cache import PrefixCache
from vla.fresh import Fresh
from vla.heads.base import Draws, Target
from vla.policy import VLAPolicy
from vla.types import Observation

CHUNK, STATE, ACTION, SIDE, ROWS = 6, 5, 3, 32, 3
KEYS = ["observation.images.top", "observation.images.wrist"]
LENGTHS = (7, 4, 2)  # of the prompts


def vlm_config() -> Any:
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "rms_norm_eps": 1e-3,  # large enough to matter
        "rope_theta": 100_000.0,  # what LeRobot does not read
        "attention_bias": False,
        "tie_word_embeddings": False,
        "pad_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    return SmolVLMConfig.from_dict(
        {
            "text_config": text,
            "vision_config": vision,
            "scale_factor": 2,
            "image_token_id": 290,
            "tie_word_embeddings": False,
        }
    )


def randomise(module: nn.Module) -> None:
    """Weights that make every part matter."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight") or "layernorm.weight" in name:
            parameter.data = 1 + 0.3 * noise
        elif parameter.dim() > 1 and "embed" not in name:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise


def lerobot_policy(**changes: Any) -> Any:
    inputs = {key: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for key in KEYS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE,))
    config = SmolVLAConfig(
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        device="cpu",
        load_vlm_weights=False,
        num_vlm_layers=4,
        chunk_size=CHUNK,
        n_action_steps=4,
        max_state_dim=8,
        max_action_dim=6,
        num_steps=4,
        resize_imgs_with_padding=(SIDE, SIDE),
        train_expert_only=False,
        freeze_vision_encoder=False,
        **changes,
    )
    policy = SmolVLAPolicy(config)
    randomise(policy)
    return policy.eval()


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """LeRobot asks the hub for the VLM's configuration and processor."""
    names = SimpleNamespace(fake_image_token_id=5, global_image_token_id=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(with_expert, "AutoConfig", SimpleNamespace(from_pretrained=lambda _: vlm_config()))
        processor = SimpleNamespace(from_pretrained=lambda _: SimpleNamespace(tokenizer=names))
        patch.setattr(with_expert, "AutoProcessor", processor)
        yield


@pytest.fixture(scope="module")
def source(offline: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """LeRobot's policy, and the folders that a user of it has."""
    root = tmp_path_factory.mktemp("smolvla")
    policy = lerobot_policy()
    policy.save_pretrained(root / "source")
    rng = np.random.default_rng(0)
    stats = {key: numbers(rng, dim) for key, dim in (("observation.state", STATE), ("action", ACTION))}
    config = policy.config
    normalise = NormalizerProcessorStep(
        features={**config.input_features, **config.output_features},
        norm_map=config.normalization_mapping,
        stats=stats,
    )
    PolicyProcessorPipeline([normalise], name="policy_preprocessor").save_pretrained(root / "source")
    vlm_config().save_pretrained(root / "vlm")
    tokenizer.byte_level().save(root / "vlm")
    (root / "recipe.yaml").write_text(recipe())
    return policy, root


def numbers(rng: np.random.Generator, dim: int) -> dict[str, np.ndarray]:
    middle, wide = rng.normal(size=dim), rng.uniform(0.5, 2, dim)
    levels = {"min": -3, "q01": -2, "q10": -1, "q50": 0, "q90": 1, "q99": 2, "max": 3}
    return {k: middle + v * wide for k, v in levels.items()} | {"mean": middle, "std": wide, "count": np.array([90])}


def recipe() -> str:
    def vector(key: str, dim: int) -> dict[str, Any]:
        spec = {
            "names": [f"j{i}" for i in range(dim)],
            "units": ["rad"] * dim,
            "reference": ["absolute"] * dim,
            "low": [-9.0] * dim,
            "high": [9.0] * dim,
            "rate_hz": 20.0,
        }
        return {"key": key, "spec": spec}

    blocks = {"cameras": {"wrist": KEYS[1], "top": KEYS[0]}}
    return json.dumps(blocks | {"state": vector("observation.state", STATE), "action": vector("action", ACTION)})


@pytest.fixture(scope="module")
def pair(source: tuple[Any, Path]) -> tuple[Any, VLAPolicy]:
    theirs, root = source
    command = [root / "source", root / "ours", "--vlm", root / "vlm", "--recipe", root / "recipe.yaml"]
    assert convert.main([str(word) for word in command]) == 0
    return theirs, checkpoint.load(root / "ours")


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "images": torch.randint(0, 256, (ROWS, 2, SIDE, SIDE, 3), dtype=torch.uint8, generator=g),
        "image_mask": torch.tensor([[True, True], [True, False], [True, True]]),
        "tokens": torch.randint(0, 290, (ROWS, max(LENGTHS)), generator=g),
        "token_mask": torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None],
        "state": torch.nn.functional.pad(torch.randn(ROWS, STATE, generator=g), (0, 8 - STATE)),
    }


def lerobot_batch(given: dict[str, Tensor]) -> dict[str, Tensor]:
    pictures = {key: given["images"][:, i].permute(0, 3, 1, 2) / 255 for i, key in enumerate(KEYS)}
    masks = {f"{key}_padding_mask": given["image_mask"][:, i] for i, key in enumerate(KEYS)}
    return {
        **pictures,
        **masks,
        "observation.state": given["state"][:, :STATE],
        "observation.language.tokens": given["tokens"],
        "observation.language.attention_mask": given["token_mask"],
    }


def lerobot_prefix(policy: Any, given: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """LeRobot's cache of the whole prefix, and which of its tokens are valid."""
    images, masks = policy.prepare_images(lerobot_batch(given))
    model = policy.model
    embeddings, valid, blocks = model.embed_prefix(images, masks, given["tokens"], given["token_mask"], given["state"])
    _, cache = model.vlm_with_expert.forward(
        attention_mask=make_att_2d_masks(valid, blocks),
        position_ids=torch.cumsum(valid, dim=1) - 1,
        inputs_embeds=[embeddings, None],
        use_cache=True,
    )
    return cache, valid


def ours_prefix(policy: VLAPolicy, given: dict[str, Tensor]) -> PrefixCache:
    return policy.encode(given["images"], given["image_mask"], given["tokens"], given["token_mask"])


def with_state(policy: VLAPolicy, cache: PrefixCache, state: Tensor) -> PrefixCache:
    token = policy.fresh.prefix_token(Fresh(state))
    assert token is not None
    one = torch.ones(1, 1, dtype=torch.bool)
    return policy.backbone.extend(cache, token, one, one.expand(len(state), 1))[0]


def close(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_the_folder_says_what_lerobots_said(pair: tuple[Any, VLAPolicy]) -> None:
    config = pair[1].config
    assert (config.cameras, config.execute, config.state) == (("top", "wrist"), 4, "prefix")
    assert config.expert.attention == ("joint", "cross")
    assert (config.expert.width, config.expert.layers, config.backbone.freeze) == (24, 4, ())
    assert pair[1].backbone.shape.rope_theta == 10_000


@torch.no_grad()
def test_prefix(pair: tuple[Any, VLAPolicy]) -> None:
    theirs, ours = pair
    given = inputs()
    expected, valid = lerobot_prefix(theirs, given)
    cache = with_state(ours, ours_prefix(ours, given), given["state"])
    assert torch.equal(cache.valid, valid)
    for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        layer = expected.layers[i]
        close(keys.transpose(1, 2)[valid], layer.keys.transpose(1, 2)[valid], 1e-5)
        close(values.transpose(1, 2)[valid], layer.values.transpose(1, 2)[valid], 1e-5)


@torch.no_grad()
def test_a_fresh_state_costs_one_token_and_is_exact(pair: tuple[Any, VLAPolicy]) -> None:
    theirs, ours = pair
    given = inputs()
    old, newer = ours_prefix(ours, given), given | {"state": given["state"].flip(0)}
    expected, valid = lerobot_prefix(theirs, newer)
    refreshed, stale = with_state(ours, old, newer["state"]), with_state(ours, old, given["state"])
    for i in range(4):
        close(refreshed.keys[i].transpose(1, 2)[valid], expected.layers[i].keys.transpose(1, 2)[valid], 2e-6)
        close(refreshed.values[i].transpose(1, 2)[valid], expected.layers[i].values.transpose(1, 2)[valid], 2e-6)
    assert (stale.keys[-1] - refreshed.keys[-1]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("time", [1.0, 0.7, 0.1])
def test_velocity(pair: tuple[Any, VLAPolicy], time: float) -> None:
    theirs, ours = pair
    given, noisy = inputs(), torch.randn(ROWS, CHUNK, 6, generator=torch.Generator().manual_seed(4))
    cache, valid = lerobot_prefix(theirs, given)
    expected = theirs.model.denoise_step(valid, cache, noisy, torch.full((ROWS,), time))
    denoise = ours._fast.denoiser(ours_prefix(ours, given), Fresh(given["state"]), 1)
    close(denoise(noisy[:, None], torch.full((ROWS, 1, CHUNK), time)).out[:, 0], expected, 1e-5)


@torch.no_grad()
def test_sample(pair: tuple[Any, VLAPolicy]) -> None:
    theirs, ours = pair
    given = inputs()
    noise = ours.head.init((ROWS, 1, CHUNK, 6), torch.Generator().manual_seed(5), torch.device("cpu"))
    expected = theirs.predict_action_chunk(lerobot_batch(given), noise=noise[:, 0])
    drawn = ours.sample(ours_prefix(ours, given), Fresh(given["state"]), 1, torch.Generator().manual_seed(5))
    close(drawn.actions[:, 0, :, :ACTION], expected, 1e-4)


def training_batch(given: dict[str, Tensor]) -> Batch:
    g = torch.Generator().manual_seed(6)
    actions = torch.randn(ROWS, CHUNK, ACTION, generator=g)
    rows = torch.arange(ROWS)
    return Batch(
        **given,
        observation=rows,
        age=torch.zeros(ROWS),
        fast_images=torch.zeros(ROWS, 0, 0, 0, 3, dtype=torch.uint8),
        fast_image_mask=torch.zeros(ROWS, 0, dtype=torch.bool),
        history=torch.zeros(ROWS, 0, 8),
        actions=torch.nn.functional.pad(actions, (0, 6 - ACTION)),
        valid=torch.arange(CHUNK) < torch.tensor([CHUNK, 2, 5])[:, None],
        dim_mask=(torch.arange(6) < ACTION).expand(ROWS, 6),
        rows=rows,
        global_size=ROWS,
        noise_seed=11,
        loss_scale=1.0,
    )


def test_loss_and_gradients(pair: tuple[Any, VLAPolicy]) -> None:
    theirs, ours = pair
    given = inputs()
    batch = training_batch(given)
    draws = Draws(batch.noise_seed, batch.global_size, batch.rows)
    held = torch.zeros(ROWS, 1, CHUNK, dtype=torch.bool)
    drawn = ours.head.corrupt(Target(batch.actions, batch.valid, batch.dim_mask), draws, held)
    noise, time = drawn.answer[:, 0] + batch.actions, drawn.time[:, 0, 0]
    known = lerobot_batch(given) | {"action": batch.actions[..., :ACTION], "action_is_pad": ~batch.valid}
    expected, _ = theirs.forward(known, noise=noise, time=time)
    loss = ours.loss(batch).total
    close(loss, torch.as_tensor(expected), 1e-5)
    theirs.zero_grad()
    ours.zero_grad()
    torch.as_tensor(expected).backward()
    loss.backward()
    there, here = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for name, own in (
        ("model.vlm_with_expert.lm_expert.layers.1.self_attn.k_proj.weight", "expert.layers.1.k_proj.weight"),
        ("model.vlm_with_expert.vlm.model.text_model.layers.0.mlp.up_proj.weight", None),
        ("model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight", None),
        ("model.state_proj.weight", "fresh.state_proj.weight"),
    ):
        own = own or name.replace("model.vlm_with_expert.vlm.", "backbone.")
        gradient, ours_gradient = there[name].grad, here[own].grad
        assert gradient is not None
        assert ours_gradient is not None
        assert gradient.abs().max() > 1e-4
        close(ours_gradient, gradient, 1e-4)


def test_from_picture_to_physical_action(pair: tuple[Any, VLAPolicy]) -> None:
    theirs, ours = pair
    rng = np.random.default_rng(7)
    images = {name: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for name in ("top", "wrist")}
    state = rng.normal(size=STATE).astype(np.float32)
    ours.reset(8)
    chunk = ours.infer(Observation(0.0, images, state, "open it"))
    statistics = ours.processor.codec.statistics
    units = (state - statistics.state.mean) / (statistics.state.std + 1e-8)
    ids = torch.tensor([tokenizer.byte_level().encode("open it\n")])
    noise = ours.head.init((1, 1, CHUNK, 6), torch.Generator().manual_seed(8), torch.device("cpu"))
    known = {
        **{KEYS[i]: torch.from_numpy(images[n]).permute(2, 0, 1)[None] / 255 for i, n in enumerate(("top", "wrist"))},
        "observation.state": torch.from_numpy(units).float()[None],
        "observation.language.tokens": ids,
        "observation.language.attention_mask": torch.ones_like(ids, dtype=torch.bool),
    }
    expected = theirs.predict_action_chunk(known, noise=noise[:, 0])[0].numpy()
    physical = expected * statistics.action.std + statistics.action.mean
    assert np.abs(chunk.actions - physical).max() < 1e-3
    assert chunk.execute == 4


def test_an_oblong_picture_lies_where_lerobot_puts_it(pair: tuple[Any, VLAPolicy]) -> None:
    theirs, ours = pair
    rng = np.random.default_rng(8)
    shapes = {"top": (16, 24, 3), "wrist": (16, 8, 3)}
    images = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in shapes.items()}
    known = {KEYS[i]: torch.from_numpy(images[n]).permute(2, 0, 1)[None] / 255 for i, n in enumerate(images)}
    expected, _ = theirs.prepare_images(known)
    pictures, _ = ours.processor.images(images)
    for own, their in zip(pictures, expected, strict=True):
        close(torch.from_numpy(own).permute(2, 0, 1)[None] / 127.5 - 1, their, 0.01)  # rounded to whole numbers here
