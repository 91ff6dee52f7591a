"""One self-contained page of an ablation and the same in Markdown.

The page has no script and loads nothing; all text that came from a configuration, an error or a model is escaped. The
same results give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.report import dynamics, sections
from experiments.report.document import Section, Table
from experiments.report.results import Ablation, load

PARTS = (
    sections.best,
    dynamics.learning,
    dynamics.forgetting,
    dynamics.divergence,
    dynamics.updates,
    dynamics.overlap,
    dynamics.costs,
    sections.responses,
    sections.unfinished,
    sections.made,
)
"""Each answers one question, in reading order."""


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Write `report.html` and `report.md` of the ablation in `directory` into `out`; returns the page's path.

    Raises:
        InputError: A file of the ablation is missing or is not what the runner writes.
    """
    ablation = load(directory)
    verdict = sections.verdict(ablation)
    parts = [part(ablation) for part in PARTS]
    out = out or directory
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    page.write_text(as_html(ablation, verdict, parts), encoding="utf-8")
    (out / "report.md").write_text(as_markdown(ablation, verdict, parts), encoding="utf-8")
    return page


def as_html(ablation: Ablation, verdict: Sequence[str], parts: Sequence[Section]) -> str:
    """The page."""
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html.jinja")
    return template.render(name=ablation.name, question=ablation.question, verdict=verdict, sections=parts)


def as_markdown(ablation: Ablation, verdict: Sequence[str], parts: Sequence[Section]) -> str:
    """The same sentences and tables; pictures and responses are in the page only."""
    blocks = [f"# {_plain(ablation.question)}", f"**{_plain(verdict[0])}**", *map(_plain, verdict[1:])]
    for part in parts:
        blocks += [f"## {_plain(part.question)}", *map(_plain, part.text)]
        blocks += [block for table in _tables(part) for block in (f"{_plain(table.caption)}:", _rows(table))]
        if part.figures or part.panels or (part.prose and part.folded):
            blocks.append("Shown in [report.html](report.html).")
    return "\n\n".join(blocks) + "\n"


def _tables(part: Section) -> list[Table]:
    """Without what models wrote."""
    return part.tables if part.prose else [*part.tables, *part.folded]


def _rows(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no new cell, no new line."""
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())
    return text.replace("*", "\\*").replace("_", "\\_").replace("[", "\\[")
