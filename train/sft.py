"""Fine-tune a policy on demonstrations: `vla-train CONFIG.yaml [key=value ...]`.

    vla-train configs/sft_metaworld_flow.yaml
    vla-train configs/sft_metaworld_flow.yaml output=outputs/other optim.lr=3e-4

The output folder holds config.yaml, metrics.jsonl and checkpoints/. Interrupted, killed or out of disk, the same
command continues from the last checkpoint with the same result. Several GPUs or machines: docs/training.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.switching_data import MODE
from train.train_config import TrainConfig
from vla import cli
from vla.config import dump, to_data
from vla.errors import TandemError, UsageError
from vla.files import require_writable, write_text
from vla.switching import FORWARD

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.distributed import Cluster
    from train.loader import Loader, Source
    from train.session import Work
    from train.sources import Sources
    from train.training_state import Learner, Manifest
    from vla.policy import VLAPolicy

# What a policy may change when it starts from a checkpoint; the rest is fixed by the checkpoint's weights.
FREE_AT_INIT = (
    "chunk",
    "execute",
    "cameras",
    "bars",
    "max_tokens",
    "head.steps",
    "head.noise_scale",
    "head.draws",
    "backbone",
    "continuation",
    "committed",
    "past_weight",
    "candidates",
    "lora",
)
# Parts that it may add: policy.key -> the weights that come with it and begin as they do in a new policy.
ADDED_AT_INIT = {
    "mixture": ("gate.",),
    "fast_slow": ("conditions.", "fresh.fast_images."),
    "conditions": ("conditions.",),
    "token_loss": ("chunk_tokens.",),
    "committed": ("head.held_proj.",),
    "history": ("fresh.history_position",),
}


def new_policy(config: TrainConfig, sources: Sources) -> VLAPolicy:
    """The policy to start from, on the CPU.

    Raises:
        CheckpointError, UsageError, SpecMismatch: the checkpoint of `init` cannot be used here.
    """
    import torch

    from vla.policy import VLAPolicy

    if config.init is None:
        return VLAPolicy.build(config.policy, sources.statistics(), config.seed)
    from train.training_state import differences
    from vla import checkpoint, lora
    from vla.backbones.build import saved_backbone

    folder = config.init.checkpoint
    saved = checkpoint.read(folder)
    statistics = saved.statistics
    free: list[str] = [*FREE_AT_INIT]
    new: list[str] = []
    for key, weights in ADDED_AT_INIT.items():
        if getattr(config.policy, key) and not getattr(saved.config, key):
            free.append(key)
            new += weights
    if config.init.statistics == "checkpoint":
        recipe = sources.train[0].recipe
        statistics.require_for(
            recipe.state.spec, recipe.action.spec, f"recipe {recipe.name!r} (init.checkpoint {folder})"
        )
    else:
        statistics = sources.statistics()
        free.append("normalization")
    different = [
        f"  policy.{key}: {there!r} there, {here!r} here"
        for key, there, here in differences(to_data(saved.config), to_data(config.policy))
        if not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if different:
        raise UsageError(f"init.checkpoint {folder} is another architecture:\n" + "\n".join(different))
    adapters = config.policy.lora if saved.config.lora is None else None
    plain = config.policy if adapters is None else replace(config.policy, lora=None)
    chunk_tokenizer = Path(plain.token_loss.tokenizer) if plain.token_loss else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # of the parts that are added
        backbone = saved_backbone(folder / "backbone", plain.backbone, plain.reads)
        policy = VLAPolicy.compose(plain, statistics, backbone, saved.tokenizer, chunk_tokenizer)
        checkpoint.load_weights(policy, folder / "model.safetensors", tuple(new))
        if adapters is not None:
            lora.add(policy, adapters)
    return policy


def make_loader(config: TrainConfig, sources: Sequence[Source], policy: VLAPolicy, cluster: Cluster) -> Loader:
    from train.loader import Loader, Member

    mixture = config.data.mixture
    modes = [MODE[member.rows.behaviour] if member.rows else FORWARD for member in mixture]
    return Loader(
        members=[
            Member(s, policy.processor, m.weight, mode) for s, m, mode in zip(sources, mixture, modes, strict=True)
        ],
        global_batch=config.batch.global_batch,
        accumulation=config.batch.accumulation,
        rank=cluster.rank,
        world_size=cluster.size,
        seed=config.seed,
        prefetch=config.data.prefetch,
        threads=config.data.threads,
    )


def sharding_blocks(policy: VLAPolicy) -> list[nn.Module]:
    """Modules whose weights are used only inside their own `forward`, so that FSDP2 may free them outside it.

    Cross layers project the cache before their forward: they stay in the root unit.
    """
    from vla.expert import JointLayer

    return [*policy.backbone.blocks(), *(layer for layer in policy.expert.layers if isinstance(layer, JointLayer))]


def train(config: TrainConfig) -> None:
    """The body of `vla-train`."""
    require_writable(config.output)
    from train.sources import open_sources

    try:
        sources = open_sources(config.data, config.policy, held_out=config.validation is not None)
    except TandemError:
        _leave_no_trace(config.output)
        raise
    from train.distributed import Cluster
    from train.session import Session
    from train.session import train as run

    cluster = Cluster(config.compute)
    try:
        session = Session(
            output=config.output,
            config=to_data(config),
            data=sources.identity(),
            log=config.log,
            keep=config.checkpoint.keep,
        )
        try:
            policy = _policy_of(config, sources, session.resumed())
        except TandemError:
            _leave_no_trace(config.output)
            raise
        if cluster.is_main:
            write_text(config.output / "config.yaml", dump(config))
            for note in sources.notes():
                print(f"note: {note}", file=sys.stderr)
        learner = _learner(config, policy, cluster)
        run(session, _work(config, sources, policy, cluster), learner, cluster)
    finally:
        cluster.close()


def _leave_no_trace(output: Path) -> None:
    with suppress(OSError):
        output.rmdir()  # only if it is empty: nothing was begun


def _policy_of(config: TrainConfig, sources: Sources, resumed: tuple[Path, Manifest] | None) -> VLAPolicy:
    if resumed is None:
        policy = new_policy(config, sources)
    else:  # its statistics and tokenizer are those of the checkpoint; its weights are replaced by the raw ones
        from vla import checkpoint

        policy = checkpoint.load(resumed[0] / "policy")
    return policy.train()


def _learner(config: TrainConfig, policy: VLAPolicy, cluster: Cluster) -> Learner:
    from train.optim import Ema, freeze, make_optimizer
    from train.training_state import Learner

    freeze(policy, config.optim.lr_scale)
    cluster.place(policy, sharding_blocks(policy) if cluster.sharded else [])
    optimizer = make_optimizer(policy, policy.parameter_groups(), config.optim)
    return Learner(policy, optimizer, Ema(policy, config.ema) if config.ema else None)


def _work(config: TrainConfig, sources: Sources, policy: VLAPolicy, cluster: Cluster) -> Work:
    from train.loop import LoopConfig
    from train.session import Work
    from vla import checkpoint

    loader = make_loader(config, sources.train_rows, policy, cluster)
    held_out = make_loader(config, sources.held_out_rows, policy, cluster) if config.validation else None

    def validate() -> float:
        assert config.validation is not None
        assert held_out is not None
        policy.eval()
        losses = []
        for i in range(config.validation.batches):
            for batch in held_out.micro_batches(i):
                out = cluster.forward(batch.to(cluster.device))
                losses.append(out.total * (batch.loss_scale / config.batch.accumulation / config.validation.batches))
        policy.train()
        return float(cluster.total(sum(losses[1:], losses[0])) / cluster.size)

    def write_policy(folder: Path, weights: dict[str, Tensor]) -> None:
        checkpoint.save(policy, folder, weights)

    return Work(
        loop=LoopConfig(
            seed=config.seed,
            steps=config.steps,
            global_batch=config.batch.global_batch,
            optim=config.optim,
            schedule=config.schedule,
            log_every=config.log.every,
            checkpoint_every=config.checkpoint.every,
            validate_every=config.validation.every if config.validation else 0,
        ),
        batches=loader.stream,
        write_policy=write_policy,
        validate=validate,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return cli.config_main(TrainConfig, train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
