"""What the doctor of a data set has to say, for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

Severity = Literal["error", "warning", "info"]
STYLE: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
SHOWN = 8  # episodes named in a line


@dataclass(frozen=True)
class Finding:
    """One thing that is, or may be, wrong with a data set or with what its recipe says of it."""

    severity: Severity  # error: unusable or surely wrong; warning: look at it; info: good to know
    check: str  # name of the check
    what: str  # what was found, with numbers
    why: str  # why it matters
    todo: str  # what to do
    episodes: tuple[int, ...] = ()  # where; empty: the whole data set
    frame: int | None = None  # of the first of `episodes`
    column: str | None = None  # column, camera or dimension

    @property
    def where(self) -> str:
        parts = [self.column] if self.column else []
        if self.episodes:
            shown = ", ".join(map(str, self.episodes[:SHOWN]))
            more = f" and {len(self.episodes) - SHOWN} more" if len(self.episodes) > SHOWN else ""
            parts.append(f"episode{'s' * (len(self.episodes) > 1)} {shown}{more}")
        if self.frame is not None:
            parts.append(f"{'first at ' if len(self.episodes) > 1 else ''}frame {self.frame}")
        return ", ".join(parts) or "the whole data set"


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first, then warnings, then the rest; checks stay in their order."""
    return sorted(findings, key=lambda f: list(STYLE).index(f.severity))


def show(findings: Sequence[Finding], console: Console) -> None:
    """One paragraph for each finding, and a closing line."""
    for f in in_order(findings):
        console.print(Text.assemble((f"{f.severity:7}", STYLE[f.severity]), f" {f.check}: ", (f.where, "bold")))
        for label, text in (("found", f.what), ("matters", f.why), ("do", f.todo)):
            console.print(Text(f"        {label + ':':9}", style="dim").append(text, style="default"), soft_wrap=True)
    counts = {s: sum(f.severity == s for f in findings) for s in STYLE}
    console.print(", ".join(f"{n} {s}{'s' * (n != 1 and s != 'info')}" for s, n in counts.items()))


def to_json(recipe: str, findings: Sequence[Finding]) -> dict[str, Any]:
    return {"version": 1, "recipe": recipe, "findings": [asdict(f) for f in in_order(findings)]}
