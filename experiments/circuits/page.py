"""The page of a study of circuits, from its records alone: Markdown with one picture, no model needed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.circuits.picture import draw
from experiments.circuits.results import (
    RECORDS,
    Results,
    alike,
    changed,
    circuit_minus_random,
    large,
    lost,
    necessity_of,
    order_matters,
    own,
    restored,
    size,
)
from experiments.circuits.study import BASE
from mifo_lightning.common.files import replace_text
from mifo_lightning.lab.report.document import bracketed, number, p_value
from mifo_lightning.lab.report.statistics import interval, judge

PAGE, PICTURE = "report.md", "circuits.svg"
RANKS = 3
"""So many of the most necessary heads are shown one by one."""
WAYS = {
    "into_tuned": "Does it come back? Outputs of the base's heads in the trained model",
    "into_base": "The reverse: outputs of the trained model's heads in the base",
}
LIMITS = """
- The primary comparison does not measure what comes back: heads that are put back with the others at their mean do
  harm, the least necessary most, whatever was lost: compare the arms. It shows that the order of necessity, found on
  one sample, holds on another. As many random heads harm likewise, which flatters the circuit.
- The patched outputs come from a model that reads the same question *and* the right answer so far, with all of its MLPs
  at work and its other heads at their mean. What they restore shows that the rest of the trained model can still use
  them, not that the skill lies in those heads.
- The primary comparison was named before the run, but after a reader had looked, on 64 questions and the same models,
  at circuit minus random heads, which was the primary then. The one named now had not been computed.
- The mean of a head is over questions of one skill: what a head says of the skill as such is never taken away.
- Likeness has no floor from another seed of the same arm: there is one run on a base.
- A circuit of most heads shares most of them with any random set of its size, which limits circuit minus random; the
  picture, where heads are put back one by one from either end of their order, is not limited so.
- Patched heads go through the trained model's `o_proj`; its embedding, MLPs, norms and head stay its own.
- Accuracy is greedy and of the demonstration's own words; the studies of methods sample at T = 1 and grade answers.
- One run of an arm on a base: what differs from run to run is part of what differs from base to base.
"""


def write_page(directory: Path, out: Path | None = None) -> Path:
    """Write report.md, circuits.svg and records.json, all that they are made of, from a directory; the page's path.

    Raises:
        InputError: There are no records.
    """
    results, out = Results(directory), out or directory
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / RECORDS, json.dumps(results.content) + "\n")  # whole or not at all: it may be what was read
    (out / PICTURE).write_text(draw(results), encoding="utf-8")
    (out / PAGE).write_text("\n".join(_lines(results)) + "\n", encoding="utf-8")
    return out / PAGE


def primary_line(results: Results) -> str:
    """The one comparison that was named before the run."""
    arm, skills = results.study["primary_arm"], results.study["untrained"]
    named = f"**Primary comparison** (named in the study's file): in {arm}, over {' and '.join(skills)},"
    values = results.values(arm, order_matters(skills))
    if not values:
        return f"{named} no result yet."
    compared = judge({"primary": np.array(values)[:, None]}, "nested")["primary"]
    each = ", ".join(f"{skill} {results.cell(arm, order_matters([skill]), '+')}" for skill in skills)
    others = ", ".join(f"{one} {results.cell(one, order_matters(skills), '+')}" for one in results.arms if one != arm)
    word = "significant" if compared.significant else "not significant"
    most = max(results.arms, key=lambda one: sum(np.mean(results.values(one, lost(skill))) for skill in skills))
    return (
        f"{named} what heads of the base restore if the most necessary are put back first, minus if the least are, "
        f"mean over one to all but one of them: {bracketed(compared.difference, '+')}, ahead on {compared.ahead} of "
        f"{compared.bases} bases, {p_value(compared.p)}, {word} ({each}). The arm that lost most: {most}."
        + (f" The same in the others, whatever they lost: {others}." if others else "")
    )


def verdict(results: Results, arm: str, skill: str) -> str:
    """One arm and skill in a sentence."""
    if not results.values(arm, restored(skill, "circuit")):
        return f"{arm}: its bases have no circuit of {skill}."
    gone, circuit, other, heads = (
        results.cell(arm, find)
        for find in (lost(skill), *(restored(skill, by) for by in ("circuit", "random", "heads")))
    )
    return (
        f"{arm}: patching the base's circuit restores {circuit} of the {gone} lost in {skill}; as many random heads "
        f"restore {other}, all heads {heads}."
    )


def _lines(results: Results) -> Iterator[str]:
    """The page."""
    yield from ("# Circuits: which heads carry a skill, before and after training", "")
    yield from (_setting(results.study), "", primary_line(results), "")
    for skill in results.study["untrained"]:
        yield from (f"- {verdict(results, arm, skill)}" for arm in results.arms)
    yield from ("", f"![accuracy as heads are put back]({PICTURE})", "")
    for way, title in WAYS.items():
        yield from (f"## {title}", "", "Changes of accuracy.", "", *_transplants(results, way))
    yield from ("## How many heads does a skill need?", "", *_sizes(results))
    yield from ("## Is it the same circuit?", "", *_likeness(results))
    yield from ("## What is each part needed for?", "", *_necessities(results))
    yield from ("## What this cannot say", LIMITS)
    seconds = [record["cpu_seconds"] for record in results.records.values()]
    commits = dict.fromkeys(record.get("commit") or "(not recorded)" for record in results.records.values())
    yield (
        f"Made by `python -m experiments.circuits`, at commit {', '.join(commits)}, of the models below "
        f"`{results.study.get('runs', '(not recorded)')}`. Bases: {', '.join(results.study['bases'])}; seed of the "
        f"questions: {results.study['seed']}. {len(seconds)} models took {sum(seconds) / 60:.0f} CPU minutes, "
        f"{max(seconds):.0f} s the slowest. `python -m experiments.circuits --report DIR` makes it again."
    )


def _setting(study: dict[str, Any]) -> str:
    """How everything was measured."""
    return (
        f"Accuracy is the share of {study['questions']} {study['split']} questions for which greedy decoding gives "
        f"the demonstration word for word (tokens of it that are given: {study['given']}). A part is ablated by "
        "putting the mean of its outputs over as many other questions of the skill in its place, position by position "
        "(where a table says resampled, its output for another question). A head's output is what enters `o_proj`. A "
        "circuit is the set of heads, grown in the order of their necessity, that keeps "
        f"{study['kept']:.0%} of the accuracy with all other heads at their mean and every MLP at work; a skill with "
        f"an accuracy below {study['least']:g} has none. Means [95 % intervals by Student's t] over bases, of which "
        f"there are {len(study['bases'])}; all but the primary comparison is exploratory and not corrected for number."
    )


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def _transplants(results: Results, way: str) -> Iterator[str]:
    """What patching in one direction changes."""
    rows = []
    for skill in results.study["untrained"]:
        for arm in results.arms:
            finds = [restored(skill, by, way) for by in ("circuit", "random", "heads", "heads_and_mlps")]
            changes = [results.cell(arm, find, "+") for find in (*finds, circuit_minus_random([skill], way))]
            rows.append([skill, arm, results.cell(arm, lost(skill)), *changes])
    names = ["circuit", "random heads", "all heads", "heads and MLPs", "circuit - random"]
    yield from _table(["skill", "arm", "lost in training", *names], rows)


def _sizes(results: Results) -> Iterator[str]:
    """Sizes of circuits, and whether growing them found the smallest."""
    rows = []
    for skill in results.study["skills"]:
        for arm in (BASE, *results.arms):
            grown, fewest = (results.values(arm, size(skill, which)) for which in ("circuit", "smallest"))
            same = sum(a == b for a, b in zip(grown, fewest, strict=True))
            cells = [results.cell(arm, find) for find in (own(skill), size(skill, "circuit"), size(skill, "smallest"))]
            many = sum(results.values(arm, large(skill)))
            rows.append([skill, arm, *cells, f"{same} of {len(grown)}", f"{many:g} of {len(grown)}"])
    yield "The smallest set: every set with fewer heads than the circuit was tried."
    yield ""
    header = ["skill", "arm", "accuracy", "heads of the circuit", "of the smallest set", "equally many"]
    yield from _table([*header, "all heads but one, or all"], rows)


def _likeness(results: Results) -> Iterator[str]:
    """Circuits and necessities after training against the base's, with the floors."""
    rows, first = [], results.arms[0]
    for skill in results.study["skills"]:
        bases = results.surviving(skill)
        for arm in results.arms:
            ways = [("skills", "jaccard"), ("skills", "chance"), ("random_change", "jaccard")]
            ways += [("skills", "spearman"), ("random_change", "spearman")]
            cells = [results.cell(arm, alike(skill, *way), bases=bases) for way in ways]
            own_jaccard, of_first = (results.values(one, alike(skill, *ways[0]), bases) for one in (arm, first))
            lead = bracketed(interval(np.array([own_jaccard]).T - np.array([of_first]).T), "+") if bases else "-"
            kept = results.cell(arm, own(skill)), results.cell(arm, changed(skill))
            rows.append([skill, arm, f"{len(bases)}", *kept, *cells, lead if arm != first else ""])
        same, chance, order = (
            results.cell(BASE, alike(skill, "other_sample", measure), bases=bases)
            for measure in ("jaccard", "chance", "spearman")
        )
        rows.append([skill, "*base, other questions*", f"{len(bases)}", "", "", same, chance, "", order, "", ""])
    yield (
        "Jaccard index of the circuit with the base's, and Spearman's correlation of the heads' necessities with the "
        "base's, on the bases where the models of all arms have a circuit: what has lost its skill has none, and is "
        "not compared. Chance: as many random heads in each layer in place of the trained model's. Random change: the "
        "base with every tensor changed at random by as much (L2) as in training, equal in size and not in damage: its "
        "own accuracy stands beside the arm's, both on all bases. The base on other questions, for scores and means "
        "alike, is as like itself as can be measured."
    )
    yield ""
    header = ["skill", "arm", "bases", "accuracy", "after a random change", "Jaccard", "by chance"]
    header += ["after a random change", "Spearman", "after a random change", f"Jaccard minus {first}'s"]
    yield from _table(header, rows)


def _necessities(results: Results) -> Iterator[str]:
    """Heads by their rank in each base, since the heads of two bases do not correspond; MLPs by layer."""
    record = next(record for (arm, _), record in results.records.items() if arm == BASE)
    parts = next(iter(record["skills"].values()))["mean"]
    mlps = [part for part in parts if part.endswith("mlp")]
    heads = len(parts) - len(mlps)
    columns = {f"head {i + 1}": slice(i, i + 1) for i in range(min(RANKS, heads))}
    columns |= {"other heads": slice(RANKS, heads)} if heads > RANKS else {}
    columns |= {f"MLP {i + 1}": slice(heads + i, heads + i + 1) for i in range(len(mlps))}
    rows = []
    for skill in results.study["skills"]:
        for arm in (BASE, *results.arms):
            cells = []
            for place in columns.values():
                found = [results.values(arm, necessity_of(skill, how, place)) for how in ("mean", "resampled")]
                cells.append(" / ".join(number(float(np.mean(one)) if one else np.nan) for one in found))
            rows.append([skill, arm, *cells])
    yield (
        "Accuracy that is lost where one part alone is ablated, mean / resampled; means over bases. Heads stand in the "
        "order of their necessity in their own base on other questions, since heads of two bases do not correspond; a "
        "base without a circuit has no such order. MLPs by layer."
    )
    yield ""
    yield from _table(["skill", "arm", *columns], rows)
