"""How does a report reach a reader? As one self-contained page, and in Markdown with one picture.

The page has no script and loads nothing; all text that came from a configuration, an error or a model is escaped. The
same results give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import printable
from mifo_lightning.lab.cell import write_json
from mifo_lightning.lab.report import costs, dynamics, forgetting, front, scores, sections
from mifo_lightning.lab.report.document import Figure, Gallery, Section, Table
from mifo_lightning.lab.report.drawing import alone
from mifo_lightning.lab.report.results import PLAN, RUNS, Ablation, load, read_plan, write_runs
from mifo_lightning.lab.report.verdict import verdict

PARTS = (
    scores.best,
    scores.contrasts,
    forgetting.old_abilities,
    dynamics.learning,
    forgetting.forgetting,
    forgetting.plasticity,
    forgetting.divergence,
    dynamics.updates,
    dynamics.overlap,
    costs.costs,
    sections.responses,
    sections.unfinished,
    sections.made,
)
"""Each answers one question, in reading order, or has nothing to ask (None)."""
OF_SCORES = (scores.best, scores.contrasts, forgetting.old_abilities, sections.unfinished, sections.made)
"""Those that final scores can answer."""
OF_SWEEP = (front.front, front.contrasts, front.chosen, sections.unfinished, sections.made)
"""Those of an ablation whose arms ran at several values of one setting; final scores answer them."""


def write_report(directory: Path, out: Path | None = None, bases: Sequence[str] = ()) -> Path:
    """Write `report.html`, `report.md` and its `report.svg` of the ablation in `directory` into `out`; the page's path.

    With them go the ablation's plan and `runs.csv`, from which alone the page's statistics can be written again.

    Args:
        directory: Of the ablation.
        out: Another one; None: the same.
        bases: Those that are whole, of an ablation that is still running; none: all. The page says which.

    Raises:
        InputError: A file of the ablation is missing or is not what the runner writes, or a base is none of it.
    """
    ablation, words, parts = _told(directory, bases)
    out = out or directory
    if bases and out.resolve() == directory.resolve():
        raise InputError("--bases: a page of some bases needs --out, a directory of its own")
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    page.write_text(as_html(ablation, words, parts), encoding="utf-8")
    (out / "report.md").write_text(as_markdown(ablation, words, parts), encoding="utf-8")
    (out / "report.svg").write_text(alone(first_picture(parts).svg), encoding="utf-8")
    write_runs(ablation, out / RUNS)
    if out.resolve() != directory.resolve():
        write_json(out / PLAN, read_plan(directory, bases))
    return page


def write_page(directory: Path, page: Path) -> None:
    """Write the self-contained page of the ablation in `directory`, and nothing else, as the file `page`.

    Raises:
        InputError: A file of the ablation is missing or is not what the runner writes.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(as_html(*_told(directory)), encoding="utf-8")


def as_html(ablation: Ablation, words: Sequence[str], parts: Sequence[Section]) -> str:
    """The page."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_shown)
    environment.filters["breakable"] = lambda text: Markup(str(escape(_shown(text))).replace("/", "/<wbr>"))
    template = environment.get_template("page.html.jinja")
    setting = ablation.setting.splitlines()
    return template.render(
        name=ablation.name,
        question=ablation.question,
        note=ablation.note,
        verdict=words,
        setting=setting,
        sections=parts,
    )


def as_markdown(ablation: Ablation, words: Sequence[str], parts: Sequence[Section]) -> str:
    """The same sentences and tables with the first picture; others and what models wrote are in the page only."""
    blocks = [f"# {_plain(ablation.question)}"]
    blocks += [f"> {_plain(ablation.note)}"] if ablation.note else []
    blocks += [f"**{_plain(words[0])}**", *map(_plain, words[1:])]
    shown = (
        " against ".join(reversed(list(ablation.trade_off))) if ablation.sweep else f"{ablation.primary} of every run"
    )
    blocks += [f"![{_plain(shown)}](report.svg)", _plain(first_picture(parts).caption)]
    if ablation.setting:
        blocks += ["## What was run", *(_plain(line) for line in ablation.setting.splitlines() if line)]
    for part in parts:
        tables = [block for block in part.blocks if isinstance(block, Table) and not (block.folded and block.prose)]
        if part.answer or tables or not part.blocks:
            blocks += [f"## {_plain(part.question)}", *(f"**{_plain(line)}**" for line in part.answer)]
            blocks += [*map(_plain, part.text)]
            blocks += [text for table in tables for text in (f"{_plain(table.caption)}:", _rows(table))]
    return "\n\n".join(blocks) + "\n"


def first_picture(parts: Sequence[Section]) -> Figure:
    """That of the primary metric, or of the front."""
    galleries = (block for part in parts for block in part.blocks if isinstance(block, Gallery))
    return next(gallery.figures[0] for gallery in galleries if gallery.kind == "wide")


def _told(directory: Path, bases: Sequence[str] = ()) -> tuple[Ablation, list[str], list[Section]]:
    """The ablation in `directory`, what it says first, and its answers to the questions that it can answer."""
    ablation = load(directory, bases)
    asked = OF_SWEEP if ablation.sweep else OF_SCORES if ablation.scores_only else PARTS
    found = [section for part in asked if (section := part(ablation))]
    shown, missing = [s for s in found if not s.monitor], [s for s in found if s.monitor]
    return ablation, verdict(ablation), [*shown[:-1], *sections.not_recorded(missing), shown[-1]]


def _rows(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _shown(value: Any) -> Any:
    """Text without what a terminal or a page would obey; what is our own markup stays."""
    return printable(value) if type(value) is str else value


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no new cell, no new line."""
    text = " ".join(printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())
    return text.replace("*", "\\*").replace("_", "\\_").replace("[", "\\[")
