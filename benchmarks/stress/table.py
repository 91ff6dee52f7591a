"""Tables of the stress tools: printed, and kept as Markdown for docs/stress.md."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def finish(tool: str, text: str, wrong: Sequence[str], out: Path | None) -> NoReturn:
    """Print a tool's table and what went wrong, keep both, and exit: 1 if anything did.

    Args:
        tool: Its name.
        text: Its table and remarks.
        wrong: A line each.
        out: Markdown file to keep it in, under the command that printed it; None keeps nothing.
    """
    text = "\n\n".join([text, "\n".join(f"- {line}" for line in wrong) or "Nothing went wrong."])
    print(text)
    if out is not None:
        command = shlex.join(["python", "-m", f"benchmarks.stress.{tool}", *_without_out(sys.argv[1:])])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"```\n{command}\n```\n\n{text}\n", encoding="utf-8")
    raise SystemExit(1 if wrong else 0)


def _without_out(arguments: list[str]) -> list[str]:
    at = arguments.index("--out")
    return arguments[:at] + arguments[at + 2 :]
