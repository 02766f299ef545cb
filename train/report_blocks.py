"""What a report is made of: sections of blocks. A later stage adds a `Section` and touches no template.

    Section(key, title, blocks)     blocks: Text, Tiles, Table, Picture, Films, Code, Fold

Blocks hold plain strings; the template escapes every one of them, so that an instruction or a task
name may contain anything. Only `Picture.svg` is markup, and only `train.report_plots` makes it.
"""

from dataclasses import dataclass
from typing import Literal

Tone = Literal["plain", "good", "warning", "bad"]
Align = Literal["text", "number"]


@dataclass(frozen=True)
class Text:
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tile:
    """One number that matters, with what it is and how sure it is."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tiles:
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Bar:
    """A value in [minimum, maximum] with its interval, drawn as a small bar beside its text."""

    value: float
    low: float
    high: float
    text: str
    minimum: float = 0.0
    maximum: float = 1.0

    def percent(self, value: float) -> float:
        """Position of `value` along the bar, 0..100."""
        span = self.maximum - self.minimum
        return round(100 * min(max((value - self.minimum) / span, 0.0), 1.0), 2)


Cell = str | Bar


@dataclass(frozen=True)
class Column:
    title: str
    align: Align = "text"


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: tuple[Cell, ...] | None = None  # last row, set apart

    def __post_init__(self) -> None:
        for row in (*self.rows, *(() if self.total is None else (self.total,))):
            if len(row) != len(self.columns):
                raise ValueError(f"Table {self.caption!r}: a row of {len(row)} cells in {len(self.columns)} columns.")


@dataclass(frozen=True)
class Picture:
    """A figure: inline SVG markup, or the `data:` address of a PNG."""

    alt: str
    caption: str
    svg: str = ""
    source: str = ""


@dataclass(frozen=True)
class Film:
    caption: str
    alt: str
    source: str  # data:video/mp4;base64,...
    tone: Tone = "plain"


@dataclass(frozen=True)
class Films:
    films: tuple[Film, ...]


@dataclass(frozen=True)
class Code:
    """Lines to be typed or read literally."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are there for whoever opens them."""

    title: str
    blocks: tuple["Block", ...]


Block = Text | Tiles | Table | Picture | Films | Code | Fold


@dataclass(frozen=True)
class Section:
    key: str  # anchor in the page, lower-case
    title: str
    blocks: tuple[Block, ...]
