"""Rebuild the report of one or several runs: one HTML file with everything in it.

    vla-report outputs/quickstart
    vla-report outputs/eval_a outputs/eval_b --out comparison.html

RUN is the output folder of vla-quickstart, vla-train, vla-eval or vla-record, in any mixture. Several
evaluations are compared pairwise on the episodes that they share: gained, lost, exact McNemar test,
paired interval of the difference. The file needs nothing but a browser: no network, no scripts.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from train import report_data
from train.report_blocks import Section
from vla import cli
from vla.errors import MissingDependency, UsageError
from vla.files import require_writable, write_text

TEMPLATES = Path(__file__).parent / "templates"


def render(sections: Sequence[Section], title: str, subtitle: str, footer: str) -> str:
    """The page; every string of the sections is escaped, except `Picture.svg`.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependency("Reports need jinja2. Install it with: uv pip install 'tandem-vla[train]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    page = environment.get_template("report.html.j2")
    return page.render(sections=sections, title=title, subtitle=subtitle, footer=footer, css=css)


def report(folders: Sequence[Path], film_budget_mb: float) -> str:
    """The HTML text of a report on run folders.

    Raises:
        UsageError, TandemError: as `train.report_data.read`.
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    try:
        from train import report_sections
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Reports need {error.name}. Install it with: uv pip install 'tandem-vla[train]'"
        ) from error
    bundle = report_data.read(folders)
    sections = report_sections.build(bundle, int(film_budget_mb * 1e6))
    title = bundle.state.get("title") or ("Run report" if len(folders) == 1 else f"Report on {len(folders)} runs")
    subtitle = " · ".join(str(folder) for folder in folders)
    return render(sections, title, subtitle, f"Made by vla-report on {time.strftime('%Y-%m-%d %H:%M %Z')}.")


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    p.add_argument("--out", type=Path, default=None, help="HTML file to write (default: report.html in the first RUN)")
    p.add_argument(
        "--film-budget-mb",
        type=float,
        default=12.0,
        metavar="MB",
        help="most that films may add (default: %(default)s)",
    )
    args = p.parse_args(argv)

    def body() -> None:
        if args.film_budget_mb < 0:
            raise UsageError(f"--film-budget-mb must be 0 or more, got {args.film_budget_mb}.")
        out: Path = args.out or args.runs[0] / "report.html"
        text = report(args.runs, args.film_budget_mb)
        require_writable(out.parent)
        write_text(out, text)
        print(f"{out} ({len(text.encode()) / 1e6:.1f} MB)")

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
