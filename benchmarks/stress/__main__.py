"""All stress tools, one after another, each in a process of its own; the tables go into docs/stress.md on request.

python -m benchmarks.stress                              # everything: an hour on two cores
python -m benchmarks.stress --short                      # a minute of it
python -m benchmarks.stress --only kills --write docs/stress.md
"""

import argparse
import importlib
import os
import re
import sys
from pathlib import Path

SHORT = {
    "inputs": ["--every", "98"],
    "fuzz": ["--tries", "6"],
    "security": ["--only", "code in data"],
    "kills": ["--only", "luffy", "--points", "2", "--jobs", "1"],
    "endurance": ["--steps", "200"],
}
TOOLS = [*SHORT, "resume_vs_trl"]


def run(tool: str, arguments: list[str]) -> int:
    """The status of a tool that runs in a fork."""
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        sys.argv = [tool, *arguments]
        importlib.import_module(f"benchmarks.stress.{tool}").main()
    except SystemExit as end:
        status = int(end.code or 0) if not isinstance(end.code, str) else print(end.code) or 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def write(page: Path, tool: str, table: str) -> None:
    """Put a table between the page's marks for this tool."""
    mark = f"<!-- {tool} -->"
    text, count = re.subn(
        f"{mark}.*?{mark}", lambda _: f"{mark}\n{table}{mark}", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if not count:
        raise SystemExit(f"{page}: has no place for {tool}: two lines {mark}")
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Run them, say which found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TOOLS, action="append", help="this one; may be given again")
    parser.add_argument("--short", action="store_true", help="a small part of each, for the tests")
    parser.add_argument("--trl", help="the Python of an environment with TRL, to compare with")
    parser.add_argument("--out", type=Path, default=Path("runs/stress"), help="directory of the tables")
    parser.add_argument("--write", type=Path, help="a page with marks to put the tables into: docs/stress.md")
    given = parser.parse_args()
    import mifo_lightning.cli  # noqa: F401  once, before the forks

    failed = []
    for tool in given.only or (list(SHORT) if given.short else TOOLS):
        out = given.out / f"{tool}.md"
        arguments = (SHORT[tool] if given.short else []) + (["--trl", given.trl] if given.trl and "trl" in tool else [])
        print(f"\n# {tool}\n", flush=True)
        if run(tool, [*arguments, "--out", str(out)]):
            failed.append(tool)
        if given.write and out.is_file():
            write(given.write, tool, out.read_text(encoding="utf-8"))
    print(f"\nstress: {'something went wrong in ' + ', '.join(failed) if failed else 'nothing went wrong'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
