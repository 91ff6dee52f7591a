"""The page of a study: report.md and its pictures, from records.json alone."""

from pathlib import Path

from experiments.heal import captions, edit_tables, pictures, spectra_tables, tables
from experiments.heal.results import Results, read_results
from experiments.heal.verdict import verdict


def write_report(directory: Path) -> Path:
    """Write the page of the records in a directory beside them; where it is.

    Raises:
        InputError: There are no records, or a control is missing.
    """
    results = read_results(directory)
    shown = {name: f"![{text}]({name})\n\n{text}" for name, text in pictures.draw(results, directory).items()}
    page = directory / "report.md"
    page.write_text("\n\n".join(sections(results, shown)) + "\n", encoding="utf-8")
    return page


def sections(results: Results, shown: dict[str, str]) -> list[str]:
    """The paragraphs of the page; `shown` are its pictures by file."""
    study = results.study
    parts = [f"# {study.name}", *verdict(results), study.setting]
    parts += ["## Along SFT", shown["curve.svg"], "### Which checkpoint", tables.checkpoint_table(results)]
    parts += ["### Every checkpoint", captions.SWEEP, tables.sweep_table(results)]
    held = captions.PROTECTED if study.protected else ""
    parts += ["### SFT that forgets less", captions.SLOWER, held, tables.slower_table(results)]
    parts += ["## RL from checkpoints, and its controls", captions.RL, tables.rl_table(results), shown["window.svg"]]
    if results.tried:
        parts += ["### Several tries a question", captions.TRIES, tables.tries_table(results)]
    parts += ["### How large differences are without a cause", captions.FLOOR, tables.floor_table(results)]
    turns = captions.TURNS.format(k=spectra_tables.at(results))
    parts += ["## Spectra", captions.SPECTRA, shown["spectra.svg"], turns, spectra_tables.turn_table(results)]
    parts += [spectra_tables.part_table(results), *spectra_tables.turned_back(results)]
    parts += ["### At every k", spectra_tables.spectra_table(results)]
    if results.edited:
        parts += ["## What is put back", captions.EDITS, edit_tables.family_note(results), shown["front.svg"]]
        parts += [edit_tables.edit_table(results)]
        parts += ["### A random change of the same size", captions.RANDOM, edit_tables.random_changes(results)]
    if "reverse" in study.edits.kinds and results.edited:
        parts += ["### RL's change inside and outside", captions.REVERSE, edit_tables.reverse_table(results)]
    made = (
        f"Made by `python -m experiments.heal`, at commit {results.commit}. Bases: {', '.join(results.bases)}; seeds "
        f"from {study.seed} on, one a base. {results.hours:.1f} hours of one thread, not "
        "counting what was cut off. "
    )
    return [
        part
        for part in [*parts, made + "The page is remade from records.json by `--report` and this directory."]
        if part
    ]
