"""Figures of a report: matplotlib -> inline SVG that takes its colours and its font from the page.

The page has a light and a dark form, so a figure must not fix its colours: each is drawn in a
placeholder colour that is then replaced by the page's CSS variable.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from train.report_blocks import Picture

# placeholder -> CSS variable of report.css
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--c1)",
    "#050505": "var(--c2)",
    "#060606": "var(--c3)",
    "#070707": "var(--c4)",
}
INK, MUTED, LINE, *SERIES = COLOURS
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: selectable, scaled with the page, in its font
    "svg.hashsalt": "report",  # the same figure has the same markup
    "font.family": "sans-serif",  # only to measure; `for_page` drops it
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.5,
}
_numbers = count()


@dataclass(frozen=True)
class Series:
    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One plot of a figure."""

    title: str  # what and unit: "Learning rate"
    series: tuple[Series, ...]
    scale: Literal["linear", "log"] = "linear"
    from_zero: bool = False


def curves(panels: Sequence[Panel], alt: str, caption: str, x_label: str) -> Picture:
    """Small multiples with one x axis, two in a row."""
    with mpl.rc_context(STYLE):
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(8.4, 2.15 * rows), layout="constrained")
        axes = list(figure.subplots(rows, 2, squeeze=False).flat)
        for ax, panel in zip(axes, panels, strict=False):
            _draw(ax, panel)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[max(0, len(panels) - 2) : len(panels)]:
            ax.set_xlabel(x_label)
        return Picture(alt=alt, caption=caption, svg=_svg(figure, alt))


def _draw(ax: Axes, panel: Panel) -> None:
    for colour, series in zip(SERIES * 2, panel.series, strict=False):
        few = len(series.x) <= 30
        ax.plot(series.x, series.y, color=colour, label=series.label, marker="o" if few else "", markersize=2.5)
    ax.set_title(panel.title)
    ax.set_yscale(panel.scale)
    if panel.scale == "log":
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.from_zero:
        ax.set_ylim(bottom=0)
    if len(panel.series) > 1:
        ax.legend(fontsize=8, handlelength=1.2, loc="best")


def histogram(values: Sequence[float], title: str, alt: str, caption: str, bins: int = 30) -> Picture:
    """Counts of `values`, for latencies and lengths."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.0), layout="constrained")
        ax = figure.subplots()
        ax.hist(values, bins=bins, color=SERIES[0], rwidth=0.92)
        ax.set_xlabel(title)
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        return Picture(alt=alt, caption=caption, svg=_svg(figure, alt))


def shared_terms(steps: Sequence[Mapping]) -> tuple[str, ...]:
    """Names of the loss terms, in the order in which they first appear."""
    return tuple(dict.fromkeys(name for step in steps for name in step.get("terms", {})))


def _svg(figure: Figure, alt: str) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return for_page(buffer.getvalue(), alt, prefix=f"f{next(_numbers)}-")


def for_page(svg: str, alt: str, prefix: str) -> str:
    """A stand-alone SVG file as an element of an HTML page.

    Drops the XML head, the metadata and every address; makes ids unique in the page with `prefix`;
    puts the page's CSS variables in the place of the placeholder colours; names the picture `alt`.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r'\sid="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}", svg)
    for placeholder, variable in COLOURS.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # would style the whole page
    svg = re.sub(r"; font-family: [^;\"]+", "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)  # coordinates, never text
    size = re.findall(r'viewBox="([^"]+)"', svg)[0]
    head = f'<svg viewBox="{size}" role="img" aria-label="{html.escape(alt)}">'
    svg = head + svg[svg.index(">") + 1 :]
    return re.sub(r"\s*\n\s*", "\n", svg)


def png(path: Path, alt: str, caption: str) -> Picture:
    """A PNG file as a picture of the page."""
    return Picture(alt, caption, source="data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
