"""The processes of one run: one CPU or GPU, several (DDP), or a model sharded over them (FSDP2).

The home of accelerate. Started plainly there is one process; `accelerate launch` and `torchrun` start
several, on one machine or on many (docs/training.md).
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from train.train_config import ComputeConfig
from vla.batch import Batch
from vla.errors import UsageError
from vla.losses import LossOut

TEXT_BYTES = 4096


class Cluster:
    """This process among those of the run, and what they do together. Made once per process."""

    def __init__(self, config: ComputeConfig) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("compute.device is 'cuda', but torch sees no GPU. Use compute.device=cpu or auto.")
        precision = "bf16" if config.precision == "bf16" else "no"
        self._accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=precision)
        self._config = config
        self._runner: nn.Module | None = None
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self._config.parallel == "fsdp2" and self.size > 1

    def place(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Move `module` to the device and prepare it for the run's processes. The optimiser is made afterwards.

        Args:
            blocks: submodules that are gathered and freed one at a time under FSDP2; the rest of `module`
                is one more unit. Their parameters are used only while their `forward` runs.
        """
        if self.sharded:
            self._runner = _shard(_Plain(module.to(self.device)), blocks, self._config.precision)
        else:
            self._runner = self._accelerator.prepare_model(module)

    def forward(self, batch: Batch) -> LossOut:
        """The placed module's loss, under the run's precision."""
        assert self._runner is not None, "place() comes first"
        with self._accelerator.autocast():
            out = self._runner(batch)
        return LossOut(*out) if self.sharded else out

    @contextmanager
    def accumulating(self, more: Literal["more follow", "last"]) -> Iterator[None]:
        """Around forward and backward of one micro-batch: gradients are exchanged only with the last."""
        if self.sharded:
            cast(Any, self._runner).set_requires_gradient_sync(more == "last")
            yield
        else:
            skip = self.size > 1 and more != "last"
            with self._accelerator.no_sync(self._runner) if skip else nullcontext():
                yield

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients so that their global norm is at most `limit`; returns the norm before, ()."""
        return self._whole(nn.utils.clip_grad_norm_(parameters, limit))

    @torch.no_grad()
    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Global norm of the weights, ()."""
        return self._whole(nn.utils.get_total_norm([p.detach() for p in parameters]))

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum over processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: object) -> bool:
        """Whether `flag` holds in any process."""
        if self.size == 1:
            return bool(flag)
        return bool(self.total(torch.tensor(float(bool(flag)), device=self.device)).item())

    def shared_text(self, text: str) -> str:
        """The main process's `text`, in every process."""
        if self.size == 1:
            return text
        content = text.encode().ljust(TEXT_BYTES, b"\0")
        if len(content) > TEXT_BYTES:
            raise UsageError(f"A path of {len(content)} bytes is longer than {TEXT_BYTES}: {text}")
        message = torch.tensor(list(content), dtype=torch.uint8, device=self.device)
        dist.broadcast(message, src=0)
        return bytes(message.tolist()).rstrip(b"\0").decode()

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, in the main process; {} in the others, which must call it too."""
        whole = {}
        for name, value in tensors.items():
            full = self._whole(value)  # one at a time: no process holds more than one whole tensor on its device
            if self.is_main:
                whole[name] = full.detach().cpu()
        return whole

    def _whole(self, value: Tensor) -> Tensor:
        if not self.sharded:
            return value
        from torch.distributed.tensor import DTensor  # seconds to import; only a sharded run needs it

        return value.full_tensor() if isinstance(value, DTensor) else value

    def close(self) -> None:
        """Leave the group of processes.

        Everything that refers to the group goes first: gloo's threads end with the last reference, and one
        that still wants the interpreter's lock while the interpreter is being torn down aborts the process.
        """
        if dist.is_initialized():
            self._runner = None
            self._accelerator.free_memory()
            gc.collect()
            dist.destroy_process_group()


class _Plain(nn.Module):
    """A module whose loss comes as plain containers: only in these does FSDP2 find the tensors it must watch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.module(batch)
        return out.total, out.terms


def _shard(module: nn.Module, blocks: Sequence[nn.Module], precision: str) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = MixedPrecisionPolicy()
    if precision == "bf16":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=mixed)
    # Freed after every forward: kept, it would go on with weights that a validation has since put back.
    return cast(nn.Module, fully_shard(module, mp_policy=mixed, reshard_after_forward=True))
