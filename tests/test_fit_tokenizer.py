"""`vla-data tokenizer`: what it fits on, what it measures, and what it leaves behind."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from train import fit_residual_vq
from train.data_cli import main
from train.dataset import LeRobotSource
from train.fit_tokenizer import chunks_of
from train.recipe import Recipe
from vla import config
from vla.action_tokens.base import ChunkShape
from vla.action_tokens.bins import BinsTokenizer
from vla.action_tokens.fast import FastTokenizer
from vla.action_tokens.load import load
from vla.action_tokens.residual_vq import ResidualVQTokenizer

SMALL_VQ = ["--levels", "2", "--codes", "8", "--width", "16", "--steps", "30", "--batch", "16"]


@pytest.fixture
def recipe_file(video_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(config.dump(video_recipe))
    return "small.yaml"


def test_chunks_are_those_that_training_sees(video_recipe: Recipe) -> None:
    source = LeRobotSource(video_recipe, 8, "train")
    every = source.steps(np.arange(len(source))).actions
    np.testing.assert_array_equal(chunks_of(source, 46, 0), every)
    some = chunks_of(source, 20, 0)
    places = [int(np.flatnonzero((every == chunk).all(axis=(1, 2)))[0]) for chunk in some]
    assert len(places) == 20
    assert places == sorted(set(places))
    assert not np.array_equal(chunks_of(source, 20, 1), some)


@pytest.mark.parametrize(
    ("kind", "options", "cls"),
    [
        ("fast", ["--scale", "20", "--vocab-size", "300"], FastTokenizer),
        ("residual_vq", SMALL_VQ, ResidualVQTokenizer),
        ("bins", ["--count", "16", "--edges", "quantile"], BinsTokenizer),
    ],
)
def test_a_tokenizer_is_fitted_measured_and_written(
    kind: str, options: list[str], cls: type, recipe_file: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["tokenizer", kind, recipe_file, "--chunk", "8", *options]) == 0
    shown = capsys.readouterr().out
    folder = Path("outputs/data/small") / kind
    assert f"tokenizer: {folder}" in shown
    tokenizer = load(folder, ChunkShape(8, 2, 10.0, "quantile"))
    assert type(tokenizer) is cls
    report = json.loads((folder / "report.json").read_text())
    assert (report["recipe"], report["split"], report["chunks"], report["names"]) == (
        "small",
        "train",
        46,
        ["a0", "a1"],
    )
    assert report["vocab_size"] == tokenizer.vocab_size
    for name, rmse, worst in zip(report["names"], report["rmse"], report["worst"], strict=True):
        assert f"{rmse:.3g}" in next(line for line in shown.splitlines() if line.split()[:1] == [name])
        assert 0 < rmse < worst
    assert len(report["levels"]) == (2 if kind == "residual_vq" else 0)
    assert os.listdir("outputs/data/small") == [kind]


def test_errors_are_in_physical_units_of_held_out_episodes(recipe_file: str, video_recipe: Recipe) -> None:
    options = ["split.validation_fraction=0.25", "--normalization", "mean_std"]
    assert main(["tokenizer", "bins", recipe_file, *options, "--chunk", "4", "--count", "8", "--out", "t"]) == 0
    report = json.loads(Path("t/report.json").read_text())
    held_out = config.load(Recipe, recipe_file, ["split.validation_fraction=0.25"])
    chunks = chunks_of(LeRobotSource(held_out, 4, "validation"), 99, 0)
    actions = LeRobotSource(held_out, 4, "train").statistics_arrays()[1].astype(np.float64)
    assert (report["split"], report["chunks"], report["fitted_on"]) == ("validation", len(chunks), len(actions))
    scaled = (chunks - actions.mean(axis=0)) / actions.std(axis=0)
    nearest = np.clip(np.floor((scaled + 1) * 4), 0, 7) / 4 - 7 / 8  # 8 bins on [-1, 1]
    error = (nearest - scaled) * actions.std(axis=0)
    np.testing.assert_allclose(report["rmse"], np.sqrt(np.mean(error**2, axis=(0, 1))), rtol=1e-4)
    np.testing.assert_allclose(report["worst"], np.abs(error).max(axis=(0, 1)), rtol=1e-4)
    assert (report["mean_tokens"], report["max_tokens"]) == (8, 8)


def test_levels_are_measured(recipe_file: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["tokenizer", "residual_vq", recipe_file, "--chunk", "8", *SMALL_VQ, "--out", "t"]) == 0
    report = json.loads(Path("t/report.json").read_text())
    first, second = report["levels"]
    assert (first["tokens"], second["tokens"], report["mean_tokens"]) == (2, 4, 4)
    assert first["rmse"] > second["rmse"]
    tokenizer = load(Path("t"))
    assert isinstance(tokenizer, ResidualVQTokenizer)
    actions = chunks_of(LeRobotSource(config.load(Recipe, recipe_file), 8, "train"), 99, 0)
    low, high = np.quantile(actions[:, 0].astype(np.float64), [0.01, 0.99], axis=0)
    scaled = ((actions - (low + high) / 2) / ((high - low) / 2)).astype(np.float32)
    for level, codes in zip((first, second), tokenizer.codes(torch.from_numpy(scaled)).transpose(0, 1), strict=True):
        share = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
        assert level["used"] == len(share)
        assert level["perplexity"] == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-6)
    assert "perplexity" in capsys.readouterr().out


def test_fewer_chunks_are_drawn_when_asked(recipe_file: str) -> None:
    assert main(["tokenizer", "fast", recipe_file, "--chunk", "4", "--max-chunks", "11", "--out", "t"]) == 0
    report = json.loads(Path("t/report.json").read_text())
    assert (report["fitted_on"], report["chunks"]) == (11, 11)


def test_a_binary_dimension_is_named(recipe_file: str, capsys: pytest.CaptureFixture) -> None:
    given = ["tokenizer", "bins", recipe_file, "--chunk", "4", "--out", "t"]
    assert main([*given, "--binary", "a1"]) == 0
    tokenizer = load(Path("t"))
    assert isinstance(tokenizer, BinsTokenizer)
    assert tokenizer.config.binary == (1,)
    assert main([*given, "--binary", "a2"]) == 2
    assert "--binary names no dimension: 'a2'. Valid: a0, a1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fast", "--chunk", "17"], "--chunk is 17, but the longest episode of 'small' has 16 frames"),
        (["fast", "--chunk", "0"], "at least one action"),
        (["fast", "--chunk", "4", "--max-chunks", "0"], "--max-chunks must be at least 1"),
        (["fast", "--chunk", "4", "--scale", "0"], "scale must be positive"),
        (["fast", "--chunk", "4", "--vocab-size", "20"], "at least 256"),
        (["bins", "--chunk", "4", "--count", "1"], "at least 2 bins"),
        (["residual_vq", "--chunk", "4", "--levels", "0"], "levels must be at least 1"),
        (["residual_vq", "--chunk", "4", "--lr", "0"], "a positive rate"),
    ],
)
def test_wrong_usage_is_2_and_leaves_nothing(
    recipe_file: str, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["tokenizer", options[0], recipe_file, *options[1:], "--out", "out/t"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists() or os.listdir("out") == []


def test_other_folders_are_not_replaced(recipe_file: str, capsys: pytest.CaptureFixture) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    command = ["tokenizer", "fast", recipe_file, "--chunk", "4", "--out"]
    assert main([*command, "mine"]) == 2
    assert "holds something else than an action tokenizer" in capsys.readouterr().err
    assert os.listdir("mine") == ["thesis.txt"]
    assert main([*command, "small.yaml"]) == 2
    assert main([*command, "t"]) == main([*command, "t"]) == 0


def test_an_interruption_leaves_what_was_there(recipe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["tokenizer", "residual_vq", recipe_file, "--chunk", "4", *SMALL_VQ, "--out", "out/t"]
    assert main(command) == 0
    before = {p.name: p.read_bytes() for p in Path("out/t").iterdir()}
    loss = fit_residual_vq.ChunkAutoencoder.loss
    seen = []

    def pressed(*args: object) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(fit_residual_vq.ChunkAutoencoder, "loss", pressed)
    assert main([*command, "--seed", "1"]) == 130
    assert len(seen) == 5
    assert os.listdir("out") == ["t"]
    assert {p.name: p.read_bytes() for p in Path("out/t").iterdir()} == before


def test_an_interruption_while_writing_leaves_no_part(recipe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: FastTokenizer, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FastTokenizer, "_write", stopped)
    assert main(["tokenizer", "fast", recipe_file, "--chunk", "4", "--out", "out/t"]) == 130
    assert os.listdir("out") == []
