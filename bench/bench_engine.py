"""What a denoising step costs: Tandem's engine, its plain path, and LeRobot's SmolVLA, all at SmolVLA's sizes.

  uv run python bench/bench_engine.py                 counts at 16 layers, CPU time at 2 (one joint, one cross): minutes
  uv run python bench/bench_engine.py --layers 16     CPU time at full depth too
  uv run python bench/bench_engine.py --device cuda   on a GPU, wall time between synchronisations

Everything has random weights: nothing is downloaded, and costs do not depend on them. The prefix (two 256 px cameras, a
prompt of 13 tokens and the state: 142 tokens) is given where loops are compared. The last table has whole calls:
LeRobot's batch of 8 encodes 8 prefixes, our 8 samples one.

Counts do not depend on the computer's load: operators that start work, views apart, and the bytes that clone, copy_,
cat and casts read and write, of a whole loop divided by its steps. Times: cases take turns in one process on one
thread; a ratio compares neighbours of one round. Figures are medians, with the extremes in brackets.
"""

import argparse
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vla.backbone_config import SmolVLMConfig
from vla.backbones.smolvlm import SmolVLM
from vla.cache import CacheShape, PrefixCache
from vla.denoiser import Denoiser
from vla.engine.engine import Engine
from vla.expert import ActionExpert
from vla.head_config import FlowConfig
from vla.heads.flow import FlowHead
from vla.horizons import HorizonGate
from vla.policy_config import ExpertConfig, MixtureConfig
from vla.sampling import sample

WIDTH, MLP, ACTION, STEPS, CHUNK, PREFIX, PROMPT, SAMPLES = 720, 2048, 32, 10, 50, 142, 13, 8
HEADS, KV_HEADS, HEAD_DIM = 15, 5, 64
COUNTED_LAYERS = 16
Loop = Callable[[], object]


class Counts(TorchDispatchMode):
    """Operators that start work, and the bytes of those that only move."""

    VIEWS = frozenset(
        {"view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "select"}
        | {"slice", "split", "split_with_sizes", "chunk", "unbind", "detach", "alias", "as_strided", "unfold"}
        | {"view_as_complex", "view_as_real", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided"}
    )
    MOVES = frozenset({"clone", "copy_", "cat", "_to_copy"})

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name not in self.VIEWS:
            self.operators[name] += 1
        if name in self.MOVES:
            given = [y for x in args for y in (x if isinstance(x, list | tuple) else [x])]
            self.moved += sum(x.numel() * x.element_size() for x in (*given, out) if isinstance(x, Tensor))
        return out


def counted(loop: Loop) -> Counts:
    loop()
    with torch.no_grad(), Counts() as counts:
        loop()
    return counts


def lerobot_model(layers: int, device: torch.device) -> Any:
    """LeRobot's SmolVLA with random weights. The vision tower, 12 layers for 16 of text, is as shallow as `layers`."""
    import lerobot.policies.smolvla.smolvlm_with_expert as module
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    text = {"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": layers}
    text |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": 49280}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 512}
    vision |= {"patch_size": 16, "num_hidden_layers": round(layers * 12 / 16)}
    sizes = {"text_config": text, "vision_config": vision, "scale_factor": 4, "image_token_id": 49190}
    tokenizer = SimpleNamespace(fake_image_token_id=49189, global_image_token_id=49152)
    sources: Any = module  # it asks the hub for both
    hf_config = sources.SmolVLMForConditionalGeneration.config_class.from_dict(sizes)
    sources.AutoConfig = SimpleNamespace(from_pretrained=lambda *_, **__: hf_config)
    sources.AutoProcessor = SimpleNamespace(from_pretrained=lambda *_, **__: SimpleNamespace(tokenizer=tokenizer))
    config = SmolVLAConfig(
        input_features={
            "observation.images.a": PolicyFeature(FeatureType.VISUAL, (3, 256, 256)),
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        device=device.type,
        load_vlm_weights=False,
        num_vlm_layers=layers,
    )
    assert config.num_steps == STEPS
    return SmolVLAPolicy(config).to(device).eval().model


def lerobot_loop(model: Any, batch: int, device: torch.device) -> Loop:
    """LeRobot's denoising loop behind its own prefill of random embeddings."""
    from lerobot.policies.common.flow_matching import euler_integrate
    from lerobot.policies.common.vla_utils import make_att_2d_masks

    valid = torch.ones(batch, PREFIX, dtype=torch.bool, device=device)
    last = torch.zeros_like(valid)
    last[:, -1] = True  # the state's token
    with torch.no_grad():
        cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(valid, last),
            position_ids=torch.cumsum(valid, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[torch.randn(batch, PREFIX, 960, device=device), None],
            use_cache=True,
        )[1]
    noise = torch.randn(batch, CHUNK, ACTION, device=device)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return model.denoise_step(prefix_pad_masks=valid, past_key_values=cache, x_t=x, timestep=t)

    def loop() -> object:
        with torch.no_grad():
            return euler_integrate(step, noise, STEPS)

    return loop


def lerobot_call(model: Any, batch: int, device: torch.device) -> Loop:
    """A whole call of LeRobot's: two pictures a row are encoded, then the loop."""
    images = [torch.rand(batch, 3, 512, 512, device=device) * 2 - 1 for _ in range(2)]
    there = torch.ones(batch, dtype=torch.bool, device=device)
    tokens = torch.ones(batch, PROMPT, dtype=torch.int64, device=device)
    arguments = images, [there, there], tokens, tokens.bool(), torch.randn(batch, ACTION, device=device)

    def call() -> object:
        with torch.no_grad():
            return model.sample_actions(*arguments)

    return call


class Tandem:
    """Our expert at the same sizes: SmolVLA's layout, or with all actions of a chunk seeing one another."""

    def __init__(self, layers: int, device: torch.device, horizons: Sequence[int] = (), *, among: Any) -> None:
        torch.manual_seed(0)
        config = ExpertConfig(WIDTH, layers, MLP, ("joint", "cross"), "rms", among)
        shape = CacheShape(layers, HEADS, KV_HEADS, HEAD_DIM, 10_000.0)
        mixture = MixtureConfig(tuple(horizons), "none", 1.0, 1e-3, None) if horizons else None
        self.gate = HorizonGate(mixture, WIDTH).to(device) if mixture else None
        self.expert = ActionExpert(config, shape).to(device).eval()
        self.head = FlowHead(FlowConfig("flow", "concat", STEPS, 1.0, 1), ACTION, WIDTH).to(device).eval()
        self.engine = Engine(self.head, self.expert, self.gate, 7)
        keys, values = torch.randn(2, layers, 1, KV_HEADS, PREFIX, HEAD_DIM, device=device)
        valid = torch.ones(1, PREFIX, dtype=torch.bool, device=device)
        self.cache = PrefixCache(tuple(keys), tuple(values), valid, valid.sum(1))
        self.none = torch.zeros(1, 0, WIDTH, device=device)

    def loop(self, samples: int = 1, chunk: int = CHUNK) -> Loop:
        """The prefix is loaded by the first call and stays."""
        shape = (1, samples, chunk, ACTION)
        return lambda: self.engine.sample(self.cache, self.cache, self.none, None, shape, torch.Generator())

    def call(self, model: Any, samples: int) -> Loop:
        """A whole call: two pictures are encoded by LeRobot's own weights under our class, then the loop."""
        settings = SmolVLMConfig("smolvlm", "LeRobot's", None, None, ())
        backbone = SmolVLM(model.vlm_with_expert.vlm.model, None, settings, "cache")
        images = torch.randint(256, (1, 2, 512, 512, 3), dtype=torch.uint8, device=self.none.device)
        there, tokens = torch.ones(1, 2, device=self.none.device), torch.ones(1, PROMPT, device=self.none.device)
        state = torch.randn(1, 1, WIDTH, device=self.none.device)  # an expert's token here, the prefix's in LeRobot

        def call() -> object:
            with torch.no_grad():
                cache = backbone.encode(images, there.bool(), tokens.long(), tokens.bool())
            return self.engine.sample(cache, cache, state, None, (1, samples, CHUNK, ACTION), torch.Generator())

        return call

    def plain(self) -> Loop:
        shape = (1, 1, CHUNK, ACTION)

        def loop() -> object:
            with torch.no_grad():
                context = self.expert.context(self.cache, self.none, None)
                network = Denoiser(self.head, self.expert, self.gate, context, 1, CHUNK)
                return sample(self.head, network, shape, torch.Generator(), self.none.device, real_dim=7)

        return loop


def timed(cases: dict[str, Loop], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """CPU seconds of this process, or wall seconds on a GPU, by case and round."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name in cases if turn % 2 else reversed(cases):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            cases[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                times[name].append(clock() - start)
    return times


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}..{max(values):.3g}]"


def report(times: dict[str, list[float]], against: str) -> None:
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[against], strict=True)]
        milliseconds = spread([1e3 * v for v in values])
        print(f"| {name} | {milliseconds} | {spread(ratios)} | {len(values)} |", flush=True)


def show_counts(device: torch.device) -> None:
    ours = Tandem(COUNTED_LAYERS, device, among="causal")
    counts = {
        "LeRobot": counted(lerobot_loop(lerobot_model(COUNTED_LAYERS, device), 1, device)),
        "Tandem, plain path": counted(ours.plain()),
        "Tandem, engine": counted(ours.loop()),
    }
    first = counts["LeRobot"]
    title = f"one step of {STEPS}, {COUNTED_LAYERS} layers"
    print(f"\n| {title} | operators | ratio | MB copied | ratio |\n|---|---|---|---|---|")
    for name, found in counts.items():
        operators, moved = found.operators.total(), found.moved
        shares = operators / first.operators.total(), moved / first.moved
        print(
            f"| {name} | {operators / STEPS:.0f} | {shares[0]:.2f} | {moved / STEPS / 1e6:.2f} | {shares[1]:.3f} |",
            flush=True,
        )


def show_loops(model: Any, layers: int, rounds: int, device: torch.device) -> None:
    ours = Tandem(layers, device, among="causal")
    print(f"\n| {STEPS} steps, {layers} layers | ms | ratio | n |\n|---|---|---|---|")
    one = {"LeRobot": lerobot_loop(model, 1, device), "plain path": ours.plain(), "engine": ours.loop()}
    report(timed(one, rounds, device), "LeRobot")
    first = f"LeRobot, batch of {SAMPLES}"
    many = {first: lerobot_loop(model, SAMPLES, device), f"engine, {SAMPLES} samples": ours.loop(SAMPLES)}
    report(timed(many | {"engine, 1 sample": ours.loop()}, rounds, device), first)
    for chunk in (CHUNK, 10):
        horizons = [chunk * (i + 1) // 10 for i in range(10)]
        name = f"one horizon of {chunk} steps"
        cases = {name: Tandem(layers, device, among="bidirectional").loop(chunk=chunk)}
        packed = Tandem(layers, device, horizons, among="bidirectional")
        cases[f"ten horizons {horizons[0]}..{chunk}, {sum(horizons)} tokens"] = packed.loop(chunk=chunk)
        report(timed(cases, rounds, device), name)


def show_calls(model: Any, layers: int, rounds: int, device: torch.device) -> None:
    ours, first = Tandem(layers, device, among="causal"), f"LeRobot, batch of {SAMPLES}"
    print(f"\n| with encoding, {layers} layers, vision {round(layers * 12 / 16)} | ms | ratio | n |\n|---|---|---|---|")
    calls = {first: lerobot_call(model, SAMPLES, device), f"Tandem, {SAMPLES} samples": ours.call(model, SAMPLES)}
    report(timed(calls, min(rounds, 3), device), first)
    packed = Tandem(layers, device, [5 * (i + 1) for i in range(10)], among="bidirectional")
    calls = {"Tandem, one horizon": ours.call(model, 1), "Tandem, ten horizons 5..50": packed.call(model, 1)}
    report(timed(calls, rounds, device), "Tandem, one horizon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of the loops that are timed (even)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    device = torch.device(options.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread"
    print(f"torch {torch.__version__}, {where}, load {os.getloadavg()[0]:.1f}, prefix of {PREFIX} tokens, float32")
    if device.type == "cpu":
        show_counts(device)  # a recorded loop dispatches nothing
    model = lerobot_model(options.layers, device)
    show_loops(model, options.layers, options.rounds, device)
    show_calls(model, options.layers, options.rounds, device)


if __name__ == "__main__":
    main()
