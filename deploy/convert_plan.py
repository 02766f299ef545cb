"""What a converter decides: our configuration, the backbone's, and where each weight goes. Every name has a rule."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deploy.convert_source import Weights
from vla.backbone_config import Part
from vla.errors import CheckpointError
from vla.policy_config import PolicyConfig

Change = Literal["renamed", "folded", "dropped", "set"]


@dataclass(frozen=True)
class Rule:
    """What becomes of the weights whose name is matched."""

    pattern: str  # regular expression of a whole name
    target: str | None  # our name, with the pattern's groups; None: dropped, for the reason `why`
    why: str = ""
    fold: Literal["none", "one_plus"] = "none"  # one_plus: ours holds 1 + w where theirs holds w (Gemma's norms)


@dataclass(frozen=True)
class Given:
    """What the caller says beside the folder."""

    execute: int | None = None  # steps executed before planning anew; None: as the source says, or the whole chunk
    chunk: int | None = None  # steps predicted, where the source does not say
    state: Literal["prompt", "none"] | None = None  # of a pi0.5 from openpi; None: prompt
    horizons: tuple[int, ...] = ()  # of a mixture of horizons
    freeze: tuple[Part, ...] | None = None  # parts of the backbone that will not be trained; None: as the source says


@dataclass(frozen=True)
class Plan:
    policy: PolicyConfig
    backbone: dict[str, Any]  # config.json of the Hugging Face architecture
    rules: tuple[Rule, ...]  # the first that matches a name counts
    settings: tuple[tuple[str, str], ...] = ()  # what was set, and why: for the table


@dataclass(frozen=True)
class Row:
    """One line of the table of changes."""

    change: Change
    what: str
    count: int
    why: str = ""


@dataclass(frozen=True)
class Move:
    """One weight's way."""

    target: str
    fold: Literal["none", "one_plus"]


def moves(rules: Sequence[Rule], names: Sequence[str], where: str) -> tuple[dict[str, Move], list[Row]]:
    """Source name -> where it goes, and the table's rows.

    Raises:
        CheckpointError: a name that no rule knows, or two names for one place.
    """
    found: dict[str, Move] = {}
    matched: list[list[str]] = [[] for _ in rules]
    foreign = []
    for name in names:
        index = next((i for i, rule in enumerate(rules) if re.fullmatch(rule.pattern, name)), None)
        if index is None:
            foreign.append(name)
            continue
        matched[index].append(name)
        rule = rules[index]
        if rule.target is not None:
            found[name] = Move(re.sub(rule.pattern, rule.target, name), rule.fold)
    if foreign:
        raise CheckpointError(
            f"{where} holds {len(foreign)} weights that this kind of checkpoint does not have: "
            f"{', '.join(sorted(foreign)[:4])}{', ...' if len(foreign) > 4 else ''}. Nothing is left out silently: "
            "it is another kind, or renamed."
        )
    targets = [move.target for move in found.values()]
    twice = sorted({t for t in targets if targets.count(t) > 1}) if len(set(targets)) < len(targets) else []
    if twice:
        raise CheckpointError(f"{where} holds more than one weight for {twice[:3]}.")
    return found, [_row(rule, there, found) for rule, there in zip(rules, matched, strict=True) if there]


def _row(rule: Rule, names: Sequence[str], found: Mapping[str, Move]) -> Row:
    if rule.target is None:
        return Row("dropped", _shared(names), len(names), rule.why)
    way = f"{_shared(names)} -> {_shared([found[name].target for name in names])}"
    return Row("folded" if rule.fold != "none" else "renamed", way, len(names), rule.why)


def _shared(names: Sequence[str]) -> str:
    """What all names begin with, and a star for the rest."""
    if len(names) == 1:
        return names[0]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(names), max(names), strict=False))
    return "".join(letter for letter, _ in same) + "*"


def require_fit(found: Mapping[str, Move], shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless every weight of ours is filled with one of its shape, and none is left over."""
    filled = {move.target: shapes[name] for name, move in found.items()}
    missing, foreign = sorted(own.keys() - filled.keys()), sorted(filled.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & filled.keys() if tuple(own[k].shape) != filled[k])
    if missing or foreign or wrong:
        detail = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for names, what in ((missing, "missing"), (foreign, "with no place"), (wrong, "of another shape"))
            if names
        )
        raise CheckpointError(
            f"The weights do not make a whole model ({detail}). The checkpoint is incomplete, or its config.json "
            "belongs to another one."
        )


@torch.no_grad()
def fill(policy: nn.Module, weights: Weights, found: Mapping[str, Move]) -> None:
    """Copy each weight to its place, one after another."""
    own = policy.state_dict()
    require_fit(found, weights.shapes, own)
    for name, tensor in weights.read(found):
        move = found[name]
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} in {weights.folder} holds numbers that are not finite: it is damaged.")
        own[move.target].copy_(tensor.float() + 1 if move.fold == "one_plus" else tensor)
