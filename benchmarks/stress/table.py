"""Tables of the stress tools: printed, and kept as Markdown for docs/stress.md."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def publish(text: str, out: Path | None) -> None:
    """Print a tool's result; with `out` keep it there under the command that printed it."""
    print(text)
    if out is not None:
        name = sys.modules["__main__"].__spec__.name.removesuffix(".__main__")  # type: ignore[union-attr]
        command = shlex.join(["python", "-m", name, *_without_out(sys.argv[1:])])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"```\n{command}\n```\n\n{text}\n", encoding="utf-8")


def _without_out(arguments: list[str]) -> list[str]:
    at = arguments.index("--out")
    return arguments[:at] + arguments[at + 2 :]
