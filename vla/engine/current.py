"""The engine of a policy's parts as they are now."""

import torch
from torch import nn

from vla.engine.engine import Engine
from vla.expert import ActionExpert
from vla.heads.base import ActionHead
from vla.horizons import HorizonGate


class Current:
    """Builds an engine when one is first asked for, and anew after a change of weights, settings or modules.

    What changes a weight behind autograd's back (through `.data`, in place) is not seen.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._built_from: Fingerprint | None = None

    def of(self, head: ActionHead, expert: ActionExpert, gate: HorizonGate | None, real_dim: int) -> Engine | None:
        """None where there is no engine: for weights or computation in another format than float32."""
        device = next(expert.parameters()).device
        formats = {p.dtype for p in expert.parameters()}
        if formats != {torch.float32} or torch.is_autocast_enabled(device.type):
            return None
        if self._engine is None or self._built_from is None or not self._built_from.fits(head, expert, gate):
            self._engine = None  # its buffers make room for those of the next
            self._engine = Engine(head, expert, gate, real_dim)
            self._built_from = Fingerprint(head, expert, gate)
        return self._engine


class Fingerprint:
    """Which modules and weights some parts consist of, the weights' versions, and the parts' settings."""

    def __init__(self, *parts: nn.Module | None) -> None:
        self._parts = [part for part in parts if part is not None]
        modules = [module for part in self._parts for module in part.modules()]
        self._tables = [table for m in modules for table in (m._parameters, m._modules) if table]
        self._members = [member for table in self._tables for member in table.values()]
        self._weights = [member for member in self._members if isinstance(member, nn.Parameter)]
        self._taken = self._take()

    def fits(self, *parts: nn.Module | None) -> bool:
        """Whether `parts` are those it was taken of, unchanged."""
        own = [part for part in parts if part is not None]
        same = len(own) == len(self._parts) and all(a is b for a, b in zip(own, self._parts, strict=True))
        return same and self._take() == self._taken

    def _take(self) -> tuple[list[int], list[int], list[tuple[str, object]]]:
        members = [id(member) for table in self._tables for member in table.values()]
        versions = [x for p in self._weights for x in (p.data_ptr(), 0 if p.is_inference() else p._version)]
        settings = [(name, value) for part in self._parts for name, value in vars(part).items() if name[0] != "_"]
        return members, versions, settings
