"""Pin every dependency in pyproject.toml to what `uv.lock` holds.

    python scripts/pin.py             pin what is locked now (after adding a dependency: `uv lock` first)
    python scripts/pin.py --upgrade   let everything move to its newest allowed version, then pin that

`uv.lock` names the index it was made from, so it stays out of git; the list of versions in
`tool.uv.constraint-dependencies` makes a fresh clone resolve to the same set from any index.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?<=\nconstraint-dependencies = \[\n).*?(?=^\]$)", re.DOTALL | re.MULTILINE)


def pinned(lock: dict) -> list[str]:
    """`name==version` for each locked package that comes from an index; ours come from this folder."""
    found = sorted((p["name"], p["version"]) for p in lock["package"] if "registry" in p["source"])
    return [f"{name}=={version}" for name, version in found]


def main() -> int:
    path = ROOT / "pyproject.toml"
    before = path.read_text(encoding="utf-8")
    if not BLOCK.search(before):
        print("error: pyproject.toml has no list 'constraint-dependencies'.", file=sys.stderr)
        return 1
    try:
        if "--upgrade" in sys.argv[1:]:
            path.write_text(BLOCK.sub("", before, count=1), encoding="utf-8")
            subprocess.run(["uv", "lock", "--upgrade"], cwd=ROOT, check=True)
        lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    except (OSError, subprocess.CalledProcessError) as error:
        path.write_text(before, encoding="utf-8")
        print(f"error: {error}; pyproject.toml is as it was.", file=sys.stderr)
        return 1
    lines = "".join(f'    "{pin}",\n' for pin in pinned(lock))
    path.write_text(BLOCK.sub(lambda _: lines, before, count=1), encoding="utf-8")
    print(f"pinned {lines.count('==')} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
