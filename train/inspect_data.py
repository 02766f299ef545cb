"""What is in a data set: a table for the terminal and a picture. Reads broken data sets as far as they go."""

import io
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from train.doctor_numbers import Column, columns_of, finite_rows
from train.raw_table import RawTable, Span
from vla import files
from vla.errors import DataError

SHOT = 128  # pixels of a sample frame
SHOT_EPISODES = 4
PER_ROW = 7  # histograms
TASKS = 30  # lines in the table of tasks
NUMERIC = ("limits", "min", "mean", "max", "std")
BLUE, GREY, RED = "#1f5fa8", "#8a8f98", "#c0392b"


def show(table: RawTable, console: Console) -> None:
    """Print the overview, the tasks, the cameras and both vectors."""
    _overview(table, console)
    _tasks(table, console)
    _cameras(table, console)
    for column in columns_of(table):
        _vector(table, column, console)


def _overview(table: RawTable, console: Console) -> None:
    lengths = [s.length for s in table.spans]
    frames, fps, folder = sum(lengths), table.folder.fps, table.folder
    rows = {
        "folder": str(folder.root),
        "episodes": f"{len(lengths)}" + (f" ({left} excluded)" if (left := len(table.recipe.split.exclude)) else ""),
        "frames": f"{frames:,}",
        "duration": f"{frames / fps / 3600:.2f} h at {fps:g} frames/s",
        "episode length": f"{min(lengths)} to {max(lengths)} frames, median {np.median(lengths):g} "
        f"({np.median(lengths) / fps:.1f} s)"
        if lengths
        else "none",
        "licence": table.recipe.licence,
    }
    grid = Table(title=table.recipe.name, show_header=False, title_justify="left", title_style="bold", box=None)
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, value)
    console.print(grid)


def _tasks(table: RawTable, console: Console) -> None:
    counts = Counter(table.text(s) for s in table.spans)
    frames = Counter[str]()
    for span in table.spans:
        frames[table.text(span)] += span.length
    grid = _grid("tasks", "instruction", "episodes", "frames", "share")
    total = max(1, sum(frames.values()))
    for text, count in counts.most_common(TASKS):
        grid.add_row(text or "[red](no text)[/]", str(count), f"{frames[text]:,}", f"{frames[text] / total:.0%}")
    if len(counts) > TASKS:
        grid.add_row(f"[dim]and {len(counts) - TASKS} more tasks[/]")
    console.print(grid)


def _cameras(table: RawTable, console: Console) -> None:
    grid = _grid("cameras", "policy's name", "data set's key", "size", "stored as")
    for name, key in table.recipe.cameras.items():
        feature = table.folder.features.get(key)
        if feature is None:
            grid.add_row(name, key, "[red]missing[/]", "")
            continue
        height, width = feature["shape"][:2]
        grid.add_row(name, key, f"{width} x {height}", feature["dtype"])
    unused = sorted(set(table.folder.cameras) - set(table.recipe.cameras.values()))
    for key in unused:
        grid.add_row("[dim](not used)[/]", key, "", "")
    console.print(grid)


def _vector(table: RawTable, column: Column, console: Console) -> None:
    grid = _grid(column.key, "dimension", "unit", "meaning", "limits", "min", "mean", "max", "std")
    rows = finite_rows(table, column)
    if not len(rows):
        console.print(f"{column.key}: [red]no finite frame[/]")
        return
    spec = column.spec
    for d, name in enumerate(spec.names):
        x = rows[:, d]
        numbers = (f"{v:.3g}" for v in (x.min(), x.mean(), x.max(), x.std()))
        grid.add_row(name, spec.units[d], spec.reference[d], f"{spec.low[d]:g}..{spec.high[d]:g}", *numbers)
    console.print(grid)


def _grid(title: str, *columns: str) -> Table:
    grid = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        left = i == 0 or name in ("unit", "meaning", "data set's key", "stored as")
        grid.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name in NUMERIC)
    return grid


def draw(table: RawTable, path: Path) -> None:
    """Write the picture, a PNG, whole: episode lengths, histograms of both vectors, sample frames of every camera."""
    columns = list(columns_of(table))
    cameras = [(n, k) for n, k in table.cameras()]
    across = min(PER_ROW, max((c.spec.dim for c in columns), default=1))  # histograms in a row
    heights = [1.5, *(1.35 * -(-c.spec.dim // across) + 0.25 for c in columns), *(2.5 for _ in cameras)]
    figure = Figure(figsize=(13, sum(heights) + 0.5), dpi=110, layout="constrained")
    blocks = np.atleast_1d(np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights)))
    frames = sum(s.length for s in table.spans)
    figure.suptitle(
        f"{table.recipe.name}: {len(table.spans)} episodes, {frames:,} frames at {table.folder.fps:g}/s", weight="bold"
    )
    _draw_lengths(blocks[0], table)
    for block, column in zip(blocks[1:], columns, strict=False):
        cells = block.subplots(-(-column.spec.dim // across), across, squeeze=False)
        block.suptitle(f"{column.key}   (dotted: 1 % and 99 % quantile; red: limits)", x=0.01, ha="left", fontsize=9)
        _draw_vector(list(cells.flat), table, column, GREY if column.key == table.recipe.state.key else BLUE)
    for block, (name, key) in zip(blocks[1 + len(columns) :], cameras, strict=True):
        _draw_camera(block, table, name, key)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write_bytes(path, content.getvalue())


def _draw_lengths(block: SubFigure, table: RawTable) -> None:
    lengths, tasks = block.subplots(1, 2, width_ratios=(1, 1))
    texts = [text for text, _ in Counter(table.text(s) for s in table.spans).most_common()]
    frames = np.array([s.length for s in table.spans] or [0])
    step = max(1, int(np.ptp(frames)) // 40)  # whole frames, so that no bin is empty by rounding
    edges = np.arange(frames.min(), frames.max() + step + 1, step) - 0.5
    lengths.hist(frames / table.folder.fps, bins=list(edges / table.folder.fps), color=BLUE)
    lengths.set_xlabel("episode length (s)", fontsize=8)
    lengths.set_ylabel("episodes", fontsize=8)
    shown = texts[:6][::-1]
    counts = [sum(table.text(s) == text for s in table.spans) for text in shown]
    bars = tasks.barh([textwrap.shorten(t, 44, placeholder=" ...") or "(no text)" for t in shown], counts, color=BLUE)
    tasks.bar_label(bars, padding=2, fontsize=8)
    more = f", {len(texts) - 6} more tasks not shown" if len(texts) > 6 else ""
    tasks.set_xlabel(f"episodes{more}", fontsize=8)
    lengths.yaxis.set_major_locator(MaxNLocator(integer=True))
    tasks.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (lengths, tasks):
        _plain(axes)


def _draw_vector(cells: Sequence[Axes], table: RawTable, column: Column, colour: str) -> None:
    rows = finite_rows(table, column)
    for d, axes in enumerate(cells):
        if d >= column.spec.dim or not len(rows):
            axes.set_axis_off()
            continue
        axes.hist(rows[:, d], bins=40, color=colour)
        for q in np.quantile(rows[:, d], (0.01, 0.99)):
            axes.axvline(q, color="black", linestyle=":", linewidth=1)
        inside = axes.get_xlim()
        for limit in (column.spec.low[d], column.spec.high[d]):
            if inside[0] <= limit <= inside[1]:
                axes.axvline(limit, color=RED, linewidth=1)
        unit = f" ({column.spec.units[d]})" if column.spec.units[d] != "1" else ""
        axes.set_title(f"{column.spec.names[d]}{unit}", fontsize=8)
        axes.set_yticks([])
        _plain(axes)


def _draw_camera(block: SubFigure, table: RawTable, name: str, key: str) -> None:
    block.suptitle(f"{name}   ({key}; first and last frame)", x=0.01, ha="left", fontsize=9)
    spans = _examples(table)
    cells = list(block.subplots(1, 2 * SHOT_EPISODES, squeeze=False).flat)
    for axes in cells:
        axes.set_axis_off()
    for axes, (span, row) in zip(cells, ((s, r) for s in spans for r in (s.start, s.stop - 1)), strict=False):
        picture = np.zeros((1, SHOT, SHOT, 3), np.uint8)
        try:
            table.frames(key).read(np.array([row]), SHOT, picture)
            axes.imshow(picture[0])
        except DataError:
            axes.text(0.5, 0.5, "unreadable", color=RED, ha="center", va="center")
        axes.set_title(f"episode {span.episode}, frame {row - span.start}", fontsize=7)
        if row == span.start:
            text = textwrap.fill(textwrap.shorten(table.text(span), 54, placeholder=" ..."), 28)
            axes.text(0, -0.06, text, transform=axes.transAxes, fontsize=7, va="top", color=GREY)


def _examples(table: RawTable) -> Sequence[Span]:
    """Episodes to show: one for each of the first tasks, then others, spread over the data set."""
    filled = [s for s in table.spans if s.length]

    def by_task() -> Iterator[Span]:
        seen = set()
        for span in filled:
            if table.text(span) not in seen:
                seen.add(table.text(span))
                yield span

    spread = [filled[i] for i in np.linspace(0, len(filled) - 1, SHOT_EPISODES).astype(int)] if filled else []
    return list(dict.fromkeys([*by_task(), *spread]))[:SHOT_EPISODES]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
