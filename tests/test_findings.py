import io
import json

from rich.console import Console

from train import findings
from train.findings import Finding


def test_findings_for_people() -> None:
    out = Console(file=io.StringIO(), width=200)
    listed = [
        Finding("info", "b", "w", "y", "d"),
        Finding("error", "a", "w [red]", "y", "d", tuple(range(20)), 3, "action 'x'"),
    ]
    findings.show(listed, out)
    text = out.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert text.index("error   a: action 'x', episodes 0, 1, 2, 3, 4, 5, 6, 7 and 12 more, first at frame 3") < (
        text.index("info    b: the whole data set")
    )
    assert "found:   w [red]" in text  # shown as written, not taken for a style
    assert text.endswith("1 error, 0 warnings, 1 info\n")


def test_findings_for_programs() -> None:
    listed = [Finding("info", "b", "w", "y", "d"), Finding("error", "a", "w", "y", "d", (1,), 3, "c")]
    data = json.loads(json.dumps(findings.to_json("mine", listed)))
    assert (data["version"], data["recipe"]) == (1, "mine")
    assert data["findings"][0] == {
        "severity": "error", "check": "a", "what": "w", "why": "y", "todo": "d", "episodes": [1], "frame": 3,
        "column": "c",
    }  # fmt: skip
    assert data["findings"][1]["severity"] == "info"
