"""Fits an action tokenizer on the chunks of a recipe's data set, and says what it costs and what it loses.

Chunks are those that training sees: one for each frame, in model units, the last action repeated beyond the
episode's end. Errors are measured on the held-out episodes if the recipe has any, else on the training ones.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from train import compute_stats, fit_residual_vq
from train.dataset import LeRobotSource
from train.fit_residual_vq import ResidualVQTraining
from train.recipe import Recipe
from vla import files
from vla.action_tokens import bins, fast
from vla.action_tokens.base import MANIFEST, ActionTokenizer, ChunkShape
from vla.action_tokens.bins import BinsConfig
from vla.action_tokens.fast import FastConfig
from vla.action_tokens.residual_vq import ResidualVQConfig, ResidualVQTokenizer
from vla.cli import require
from vla.codec import Codec
from vla.errors import choose_from
from vla.types import ActionSpec

REPORT = "report.json"


@dataclass(frozen=True)
class Level:
    """What a residual-VQ tokenizer is with its first levels."""

    tokens: int  # of a chunk, up to this level
    rmse: float  # model units, over all dimensions
    perplexity: float  # effective number of this level's codes on the training chunks, 1..K
    used: int  # codes that occur there


@dataclass(frozen=True)
class Measured:
    """What a tokenizer costs and loses on `chunks` chunks of `split`."""

    split: Literal["train", "validation"]
    chunks: int
    vocab_size: int
    mean_tokens: float  # of a chunk
    max_tokens: int
    rmse: tuple[float, ...]  # (A,) root mean square error of an action, units of the action's spec
    worst: tuple[float, ...]  # (A,) largest error of an action, the same units
    levels: tuple[Level, ...]  # of residual_vq; empty for the others


def command(recipe: Recipe, args: argparse.Namespace, out: Path) -> None:
    """Fit, measure, write the folder `out` and print what was measured; `args` are those of train.tokenizer_cli."""
    require(args.max_chunks >= 1, f"--max-chunks must be at least 1, got {args.max_chunks}.")
    require(
        not out.exists() or (out / MANIFEST).is_file() or (out.is_dir() and not any(out.iterdir())),
        f"{out} holds something else than an action tokenizer and would be replaced. Choose another --out.",
    )
    files.require_writable(out.parent)
    source = LeRobotSource(recipe, args.chunk, "train")
    longest = max(episode.length for episode in source.episodes)
    require(
        args.chunk <= longest,
        f"--chunk is {args.chunk}, but the longest episode of {recipe.name!r} has {longest} frames. Choose a shorter "
        "chunk.",
    )
    statistics, spec = compute_stats.compute([source]), recipe.action.spec
    codec = Codec(statistics, args.normalization, statistics.state_spec.dim, spec.dim)
    chunk = ChunkShape(args.chunk, spec.dim, spec.rate_hz, args.normalization)
    fitted_on = codec.encode_actions(chunks_of(source, args.max_chunks, args.seed))
    tokenizer = FIT[args.kind](fitted_on, chunk, spec, args)
    split: Literal["train", "validation"] = "validation" if recipe.split.validation_fraction > 0 else "train"
    seen = source if split == "train" else LeRobotSource(recipe, args.chunk, split)
    measured = measure(tokenizer, fitted_on, chunks_of(seen, args.max_chunks, args.seed), codec, split)
    with files.whole_folder(out) as partial:
        tokenizer.write(partial)
        report = {"version": 1, "recipe": recipe.name, "source": statistics.source, "fitted_on": len(fitted_on)}
        files.write_json(partial / REPORT, report | {"names": spec.names, "units": spec.units} | asdict(measured))
    show(tokenizer, measured, spec, Console())
    Console().print(f"tokenizer: {out}", soft_wrap=True)


def chunks_of(source: LeRobotSource, most: int, seed: int) -> np.ndarray:
    """(n, H, A) float32 physical: the chunks of all frames, or of `most` drawn ones; in the data's order."""
    frames = np.arange(len(source))
    if len(frames) > most:
        frames = np.sort(np.random.default_rng(seed).choice(frames, most, replace=False))
    return source.steps(frames).actions


def measure(
    tokenizer: ActionTokenizer,
    fitted_on: np.ndarray,
    chunks: np.ndarray,
    codec: Codec,
    split: Literal["train", "validation"],
) -> Measured:
    """Encode and decode `chunks` (N, H, A) float32 physical; `fitted_on` (M, H, A) is in model units."""
    model_units = codec.encode_actions(chunks)
    ids = tokenizer.encode(model_units)
    error = codec.decode_actions(tokenizer.decode(ids)).astype(np.float64) - chunks
    lengths = [len(sequence) for sequence in ids]
    return Measured(
        split=split,
        chunks=len(chunks),
        vocab_size=tokenizer.vocab_size,
        mean_tokens=float(np.mean(lengths)),
        max_tokens=max(lengths),
        rmse=tuple(np.sqrt(np.square(error).mean(axis=(0, 1))).tolist()),
        worst=tuple(np.abs(error).max(axis=(0, 1)).tolist()),
        levels=_levels(tokenizer, fitted_on, model_units, ids) if isinstance(tokenizer, ResidualVQTokenizer) else (),
    )


def _levels(
    tokenizer: ResidualVQTokenizer, fitted_on: np.ndarray, chunks: np.ndarray, ids: Sequence[np.ndarray]
) -> tuple[Level, ...]:
    sizes = tokenizer.config
    counts = np.bincount(np.concatenate(tokenizer.encode(fitted_on)), minlength=tokenizer.vocab_size)
    levels = []
    for level, used in enumerate(counts.reshape(sizes.levels, sizes.codes), start=1):
        tokens = tokenizer.tokens // sizes.levels * level
        share = used[used > 0] / used.sum()
        error = tokenizer.decode([sequence[:tokens] for sequence in ids]) - chunks
        rmse = float(np.sqrt(np.mean(np.square(error))))
        levels.append(Level(tokens, rmse, float(np.exp(-np.sum(share * np.log(share)))), int((used > 0).sum())))
    return tuple(levels)


def show(tokenizer: ActionTokenizer, measured: Measured, spec: ActionSpec, console: Console) -> None:
    """Print size, errors for each dimension in its unit, and the levels of a residual-VQ tokenizer."""
    chunk = tokenizer.chunk
    numbers = chunk.length * chunk.dim
    console.print(
        f"{tokenizer.KIND}: {measured.vocab_size:,} ids; {measured.mean_tokens:.1f} tokens for the {numbers} numbers "
        f"of a chunk, {measured.max_tokens} at most; errors on {measured.chunks:,} {measured.split} chunks",
        soft_wrap=True,
    )
    grid = Table("dimension", "unit", "rms error", "worst", box=None)
    for row in zip(spec.names, spec.units, measured.rmse, measured.worst, strict=True):
        grid.add_row(row[0], row[1], f"{row[2]:.3g}", f"{row[3]:.3g}")
    console.print(grid)
    if measured.levels:
        grid = Table("levels", "tokens", "rms error, model units", "perplexity of the last", "codes in use", box=None)
        for i, level in enumerate(measured.levels, start=1):
            grid.add_row(str(i), str(level.tokens), f"{level.rmse:.3g}", f"{level.perplexity:.0f}", str(level.used))
        console.print(grid)


def _fast(chunks: np.ndarray, chunk: ChunkShape, spec: ActionSpec, args: argparse.Namespace) -> ActionTokenizer:
    return fast.fit(chunks, chunk, FastConfig(args.scale, args.vocab_size))


def _bins(chunks: np.ndarray, chunk: ChunkShape, spec: ActionSpec, args: argparse.Namespace) -> ActionTokenizer:
    for name in args.binary:
        require(name in spec.names, f"--binary names no dimension: {name!r}.{choose_from(name, spec.names)}")
    binary = tuple(spec.names.index(name) for name in args.binary)
    return bins.fit(chunks, chunk, BinsConfig(args.count, args.edges, binary))


def _residual_vq(chunks: np.ndarray, chunk: ChunkShape, spec: ActionSpec, args: argparse.Namespace) -> ActionTokenizer:
    config = ResidualVQConfig(args.levels, args.codes, args.stride, args.latent, args.width, args.blocks)
    training = ResidualVQTraining(args.steps, args.batch, args.lr, args.seed)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=training.steps)

        def progress(step: int, loss: float) -> None:
            bar.update(task, completed=step + 1, description=f"loss {loss:.2e}")

        return fit_residual_vq.fit(chunks, chunk, config, training, progress)


FIT = {"fast": _fast, "residual_vq": _residual_vq, "bins": _bins}
