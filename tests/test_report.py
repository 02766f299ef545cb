"""The report: numbers equal the runs, nothing comes from outside, hostile text stays text."""

import dataclasses
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from robot import results
from robot.statistics import wilson
from train import report, report_data, report_sections
from train.report_blocks import Column, Fold, Section, Table, Text
from train.report_plots import Panel, Series, curves, for_page
from vla import config, files
from vla.errors import TandemError, UsageError
from vla.types import Result

HOSTILE = 'press <b>"it"</b> & <script src="https://evil.example/x.js">alert(1)</script> $\\frac{1}$'
EVALUATION: dict[str, Any] = {
    "policy": {"path": "runs/a/last", "device": "cpu", "settings": {"head": {"noise_scale": 0.0}}},
    "robot": {"kind": "toy", "tasks": ["push", "pull"]},
    "episodes": 4,
    "first_seed": 7,
    "instructions": {},
    "clock": "lockstep",
    "workers": 2,
    "output": "somewhere",
}


def write_evaluation(folder: Path, outcomes: dict[str, str], instruction: str = "do it", **changes: Any) -> Path:
    """`outcomes`: task -> a letter an episode; s(olved), f(ailed), e(rror)."""
    settings = EVALUATION | changes
    rows = [
        Result(
            suite="toy",
            task=task,
            instruction=instruction,
            seed=7 + i,
            success=letter == "s",
            steps=40 + i,
            first_success_step=30 + i if letter == "s" else None,
            chunks=2,
            latency_ms=() if letter == "e" else (10.0 + i, 20.0),
            wall_s=1.0,
            policy=settings["policy"]["path"],
            config_digest="0123456789ab",
            versions={"numpy": "2.2.6"},
            video=None,
            error="simulator: <lost>" if letter == "e" else None,
        )
        for task, letters in outcomes.items()
        for i, letter in enumerate(letters)
    ]
    folder.mkdir(parents=True)
    files.write_text(folder / "config.yaml", config.dump(settings))
    results.rewrite(folder, rows)
    files.write_json(folder / "summary.json", results.summarise(folder, rows, settings["clock"], 3.0))
    return folder


def write_training(folder: Path, lines: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True)
    for line in lines if lines is not None else [START, *(step(i, 2.0 / i, 0.5 * i) for i in range(1, 41)), END]:
        files.append_json_line(folder / "metrics.jsonl", line)
    files.write_text(folder / "config.yaml", "steps: 40\n")
    return folder


START = {
    "event": "start",
    "version": 1,
    "config_digest": "feedfeedfeed",
    "versions": {"torch": "2.11.0"},
    "data": [{"recipe": "toy", "revision": "cafe12", "episodes": 6, "frames": 99}],
    "parameters": {"total": 3000000, "trainable": 1234567},
    "resumed_from": None,
}
END = {"event": "end", "step": 40, "wall_s": 61.0}


def step(number: int, loss: float, wall_s: float) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "loss": loss,
        "terms": {"flow": loss / 2, "gate": loss / 2},
        "lr": 1e-3,
        "grad_norm": 0.7,
        "samples_per_s": 321.0,
        "data_wait_share": 0.0125,
        "wall_s": wall_s,
        "memory_mb": 777.0,
    }


def write_recording(folder: Path) -> Path:
    info = {"total_episodes": 6, "total_frames": 1999, "fps": 40, "robot_type": "toy", "features": {"action": {}}}
    (folder / "meta").mkdir(parents=True)
    files.write_json(folder / "meta" / "info.json", info)
    episodes = [{"task": "push", "frames": 333}] * 6
    record = {"version": 1, "config": {"noise": 0.25}, "tasks": {"push": {"attempts": 8, "failed": 2}}}
    files.write_json(folder / "tandem_record.json", record | {"episodes": episodes, "versions": {}})
    return folder


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """A run folder as the quickstart leaves it."""
    run = tmp_path / "run"
    swap = {"push": "say pull", "pull": "say push"}
    write_recording(run / "data")
    write_training(run / "train")
    write_evaluation(run / "eval", {"push": "sssf", "pull": "ssss"})
    write_evaluation(run / "swap", {"push": "ffff", "pull": "fffs"}, HOSTILE, instructions=swap)
    write_evaluation(run / "realtime", {"push": "s"}, clock="realtime")
    stage = {"status": "done", "wall_s": 75.0, "cpu_s": 98.0, "peak_mb": 1234.0, "shown": "vla-train x.yaml a=1"}
    state = {"version": 1, "stages": {"train": stage}, "expected": {"success_rate": 0.5, "swap_rate": 0.2}}
    files.write_json(run / "state.json", state | {"machine": {"Processor": "Zippy 9"}})
    return run


class Page(HTMLParser):
    """What a browser would see: text and links, and whether every element is closed."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[dict[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        self.tags.append(tag)
        self.attributes.append(values)
        self.addresses += [v for k, v in values.items() if k in ("src", "href", "poster", "srcset", "action")]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def table(sections: list[Section], caption: str) -> Table:
    found = [b for s in sections for b in s.blocks if isinstance(b, Table) and b.caption == caption]
    assert len(found) == 1, f"{len(found)} tables {caption!r}"
    return found[0]


def cells(row: tuple[Any, ...]) -> list[str]:
    return [value if isinstance(value, str) else value.text for value in row]


def texts(sections: list[Section]) -> list[str]:
    return [b.text for s in sections for b in s.blocks if isinstance(b, Text)]


def build(*folders: Path, budget: int = 10**6) -> list[Section]:
    return report_sections.build(report_data.read(folders), budget)


def test_page_is_self_contained_and_complete(quickstart: Path) -> None:
    html = report.report([quickstart], film_budget_mb=1)
    page = Page(html)
    assert not [a for a in page.addresses if not a.startswith(("#", "data:"))]
    assert "://" not in html.replace("https://evil.example", "")  # not in styles or SVG either
    assert "url(" not in html.replace("url(#", "")
    assert not {"script", "link", "iframe", "b", "object"} & set(page.tags)
    wanted = ("headline", "evaluation", "swap", "realtime", "failures", "training", "data", "ran", "commands")
    assert [i for i in wanted if i not in page.ids] == []
    assert len(page.ids) == len(set(page.ids))
    links = [a[1:] for a in page.addresses if a.startswith("#")]
    assert not set(links) - set(page.ids)
    svgs = [a for tag, a in zip(page.tags, page.attributes, strict=True) if tag == "svg"]
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in svgs)
    assert HOSTILE.replace(" ", "") in page.text.replace(" ", "")


def test_success_table_holds_the_counts_and_wilson_intervals(quickstart: Path) -> None:
    sections = [s for s in build(quickstart) if s.key == "evaluation"]
    shown = table(sections, "Success by task")
    low, high = (100 * x for x in dataclasses.astuple(wilson(3, 4)))
    assert cells(shown.rows[0]) == ["push", "3 / 4", f"75.0 %  [{low:.1f}, {high:.1f}]", "31"]
    assert shown.total is not None
    assert cells(shown.total)[:2] == ["All tasks", "7 / 8"]


def test_wilson_by_hand() -> None:
    """10 of 20, computed by hand: centre 1/2, half width z sqrt(n + z^2) / (2 (n + z^2)) = 0.2007."""
    low, high = dataclasses.astuple(wilson(10, 20))
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_latency_percentiles(quickstart: Path) -> None:
    sections = [s for s in build(quickstart) if s.key == "evaluation"]
    # 16 calls: 10, 11, 12, 13 twice, and 20 eight times
    assert cells(table(sections, "Time of one policy call").rows[0])[:3] == ["16", "16.5", "20.0"]


def test_swap_stands_beside_the_right_instruction(quickstart: Path) -> None:
    shown = table(build(quickstart), "Success by scene and instruction")
    texts = [cells(row) for row in shown.rows]
    assert [row[0] for row in texts] == ["push", "pull"]
    assert [row[2].split("  ")[0] for row in texts] == ["0 / 4", "1 / 4"]
    assert [row[3].split("  ")[0] for row in texts] == ["3 / 4", "4 / 4"]


def test_verdict_stands_in_the_headline(quickstart: Path) -> None:
    (headline,) = (s for s in build(quickstart) if s.key == "headline")
    assert isinstance(headline.blocks[0], Text)
    assert headline.blocks[0].tone == "good"
    assert "7 of 8 (87.5 %" in headline.blocks[0].text


def test_training_numbers(quickstart: Path) -> None:
    rows = dict(cells(row) for row in table(build(quickstart), "Training in numbers").rows)
    assert rows["Steps"] == "40"
    assert rows["Time"] == "1 min 01 s"
    assert rows["Parameters, trained / all"] == "1,234,567 / 3,000,000"
    assert rows["Share of time spent waiting for data"] == "1.2 %"
    assert rows["Samples per second, median"] == "321"


def test_resumed_training_counts_each_step_once_and_all_its_time(tmp_path: Path) -> None:
    lines = [START, step(1, 9.0, 5.0), step(2, 9.0, 10.0), START, step(2, 1.0, 4.0), step(3, 1.0, 8.0)]
    run = report_data.training(write_training(tmp_path / "t", lines))
    assert [s["loss"] for s in run.steps] == [9.0, 1.0, 1.0]
    assert run.wall_s == 18.0
    assert run.resumed == 1
    assert any("Not finished" in text for text in texts(build(tmp_path / "t")))


def test_data_and_what_ran(quickstart: Path) -> None:
    sections = build(quickstart)
    assert cells(table(sections, "Demonstrations by task").rows[0]) == ["push", "8", "2", "6", "1,998"]
    identity = dict(cells(row) for row in table(sections, "Identity").rows)
    assert identity["Processor"] == "Zippy 9"
    assert identity["Data toy: revision"] == "cafe12"
    assert identity["Training train: configuration digest"] == "feedfeedfeed"
    folds = [b.title for s in sections for b in s.blocks if isinstance(b, Fold)]
    assert "Configuration of eval" in folds


def test_errors_are_in_no_rate_but_in_the_list(tmp_path: Path) -> None:
    sections = build(write_evaluation(tmp_path / "e", {"push": "ssfe"}))
    shown = table(sections, "Success by task")
    assert cells(shown.rows[0])[1] == "2 / 3"
    failures = table(sections, "Episodes that were not solved")
    assert [cells(row)[-1] for row in failures.rows] == ["ran out of steps", "simulator: <lost>"]
    assert [cells(row)[1] for row in failures.rows] == ["9", "10"]


def test_comparison_is_paired(tmp_path: Path) -> None:
    before = write_evaluation(tmp_path / "a", {"push": "ssff", "pull": "fffe"})
    after = write_evaluation(tmp_path / "b", {"push": "sfss", "pull": "sssssf"})
    sections = build(before, after)
    row = cells(table(sections, "Pairwise comparison").rows[0])
    # push: + 2, - 1; pull: + 3; its 4th episode has an error on one side, 2 more have no partner
    assert row[:4] == ["a → b", "7", "5", "1"]
    assert row[4].startswith("+57.1")
    assert row[5] == "0.219"  # 2 * (1 + 6) / 2**6
    assert row[6] == "3"
    assert not [text for text in texts(sections) if "protocols differ" in text]


def test_other_protocols_are_named(tmp_path: Path) -> None:
    before = write_evaluation(tmp_path / "a", {"push": "s"})
    robot = EVALUATION["robot"] | {"step_limit": 50}
    after = write_evaluation(tmp_path / "b", {"push": "f"}, robot=robot, workers=9, episodes=1)
    (note,) = (text for text in texts(build(before, after)) if "protocols differ" in text)
    assert 'robot.step_limit: "absent" and 50' in note
    assert "workers" not in note
    assert "episodes:" not in note


def test_films_within_the_budget_failures_first(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "e", {"push": "sf"})
    rows = results.read(folder)
    for row in rows:
        files.write_bytes(folder / f"{row.seed}.mp4", bytes([row.seed]) * 300)
    results.rewrite(folder, [dataclasses.replace(row, video=f"{row.seed}.mp4") for row in rows])
    (films,) = (s for s in build(folder, budget=1000) if s.key == "films")
    shown: Any = films.blocks[0]
    assert [f.caption.split(":")[0] for f in shown.films] == ["push, seed 8", "push, seed 7"]
    (films,) = (s for s in build(folder, budget=500) if s.key == "films")
    shown = films.blocks[0]
    assert len(shown.films) == 1
    assert "7.mp4" in texts([films])[0]


def test_unfinished_evaluation_says_so(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "e", {"push": "s"})
    (folder / "summary.json").unlink()
    assert any("preliminary" in text for text in texts(build(folder)))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda p: p / "absent", UsageError, "No such folder"),
        (lambda p: p, UsageError, "holds nothing to report"),
        (lambda p: broken(p / "q", "state.json", "{"), TandemError, "state.json is damaged"),
        (lambda p: broken(p / "t", "metrics.jsonl", '{"event": "step", "step": 1}\n'), TandemError, "no start line"),
        (lambda p: broken(p / "e", "results.jsonl", '{"version": 99}\n'), TandemError, "version 99"),
    ],
)
def test_bad_folders(tmp_path: Path, make: Callable[[Path], Path], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        report_data.read([make(tmp_path)])


def broken(folder: Path, name: str, content: str) -> Path:
    folder.mkdir()
    (folder / name).write_text(content)
    return folder


def test_command_writes_the_page(quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    assert report.main([str(quickstart), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert "Result" in Page(out.read_text()).text
    assert report.main([str(tmp_path / "absent")]) == 2
    assert "No such folder" in capsys.readouterr().err
    assert report.main([str(quickstart), "--film-budget-mb", "-1"]) == 2


def test_section_of_a_later_stage_is_rendered_and_escaped() -> None:
    section = Section("critic", HOSTILE, (Table(HOSTILE, (Column(HOSTILE),), ((HOSTILE,),)), Text(HOSTILE, "bad")))
    page = Page(report.render([section], HOSTILE, HOSTILE, HOSTILE))
    assert "script" not in page.tags
    assert page.text.count("alert(1)") >= 7


def test_table_with_a_short_row_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells in 2 columns"):
        Table("t", (Column("a"), Column("b")), (("x",),))


def test_figures_take_their_colours_from_the_page() -> None:
    line = Series(HOSTILE, [1, 2, 3], [3.0, 2.0, 1.0])
    picture = curves([Panel("Loss", (line, line)), Panel("Rate", (line,))], HOSTILE, "c", "step")
    page = Page(picture.svg)
    assert page.tags[0] == "svg"
    assert "var(--c1)" in picture.svg
    assert "script" not in page.tags
    assert not [a for a in page.addresses if not a.startswith("#")]
    other = curves([Panel("Loss", (line,))], "a", "c", "step")
    assert not set(page.ids) & set(Page(other.svg).ids)  # both stand in one page


def test_figures_keep_the_digits_of_their_numbers() -> None:
    line = Series("lr", [0, 100], [0.0, 0.0012])
    words = Page(curves([Panel("Rate", (line,), from_zero=True)], "a", "c", "step").svg).text.split()
    assert "0.0005" in words


def test_for_page_keeps_references_together() -> None:
    inside = '<g id="unused"/><path id="m1"/><use xlink:href="#m1" clip-path="url(#m1)"/>'
    svg = f'<?xml?>\n<svg viewBox="0 0 1 1">{inside}</svg>'
    assert for_page(svg, "x", "p-") == (
        '<svg viewBox="0 0 1 1" role="img" aria-label="x"><g/><path id="p-m1"/>'
        '<use href="#p-m1" clip-path="url(#p-m1)"/></svg>'
    )
