"""What do the models answer, and how was it found out? The sections about the runs themselves."""

import json

from experiments.report.document import Gallery, Section, Table, absent
from experiments.report.results import Ablation, samples
from experiments.report.statistics import COVERAGE, EXACT, FALSE_ALARMS, LEVEL, RESAMPLES

RESPONSES = 4
"""Shown of each arm."""
CHARACTERS = 1200
"""Shown of a response; a longer one is cut in its middle."""


def responses(ablation: Ablation) -> Section:
    """A few graded responses of each arm, written by models: folded."""
    tables: list[Table | Gallery] = []
    for arm in ablation.names:
        for cell in ablation.done(arm)[:1]:
            rows = [
                [
                    *(str(row[key]) for key in ("source", "prompt")),
                    _cut(str(row["response"])),
                    str(row["truth"]),
                    str(row["reward"]),
                ]
                for row in samples(cell, RESPONSES)
            ]
            if rows:
                title = f"{arm}: base {cell.base}, seed {cell.seed}"
                header = ["source", "prompt", "response", "truth", "reward"]
                tables.append(Table(title, header, rows, folded=True, prose=True))
    question = "What do the trained models answer?"
    if not tables:
        return absent(question, "samples")
    text = (
        "The last recorded response of each source, sampled as for avg@n, from one run only of each arm: the one that "
        "its line names."
    )
    return Section(question, text=[text], blocks=tables)


def unfinished(ablation: Ablation) -> Section:
    """Failed and missing runs."""
    question = "Which runs are not in these numbers?"
    rows = [
        [cell.arm, cell.base, str(cell.seed), cell.status, cell.error or ""]
        for cell in ablation.cells
        if cell.status != "done"
    ]
    if not rows:
        return Section(question, [f"None: all {len(ablation.cells)} runs are done."])
    answer = f"{len(rows)} of {len(ablation.cells)} runs are not done. Means are over the runs that are."
    table = Table("Runs without a result", ["arm", "base", "seed", "status", "error"], rows, prose=True)
    return Section(question, [answer], blocks=[table])


def made(ablation: Ablation) -> Section:
    """The arms, the command, and what an interval means."""
    how = (
        "bases and seeds were resampled independently, as every base has the same seeds"
        if ablation.design == "crossed"
        else "bases were resampled, then seeds within each base"
    )
    text = [
        f"Made by: {ablation.command or 'a command that was not recorded'}, at commit "
        f"{ablation.commit or '(not recorded)'}. Bases: {', '.join(ablation.bases)}. Seeds: "
        f"{', '.join(map(str, ablation.seeds))}. The primary metric, {ablation.primary}, was set in the configuration.",
        f"An interval is a {LEVEL:.0%} percentile bootstrap interval of the mean over runs, from {RESAMPLES:,} "
        f"resamples: {how}. With 3 bases x 5 seeds and bases that differ as much as runs do, such intervals cover the "
        f"truth in about {COVERAGE[ablation.design]:.0%} of simulated cases; with one base they say nothing about "
        "other bases.",
        "p is the two-sided probability of a mean difference at least as large if each run's difference could as well "
        f"have the opposite sign (all assignments of signs up to {EXACT} runs), corrected by Holm's method for all "
        "arms compared with the reference on the primary metric, and for the contrasts among themselves. "
        "It treats runs as independent. Simulated without a true difference, 3 bases x 5 seeds, a single comparison is "
        f"called significant in {FALSE_ALARMS['nothing']:.0%} of cases if runs share nothing, in "
        f"{FALSE_ALARMS['seed']:.0%} if what differs is as much by seed as by run, in {FALSE_ALARMS['base']:.0%} if it "
        "is by base. Other metrics and pictures are descriptive.",
    ]
    rows = [
        [arm.name, ", ".join(arm.configs), ", ".join(f"{key} = {json.dumps(value)}" for key, value in arm.set.items())]
        for arm in ablation.arms
    ]
    table = Table("Arms", ["arm", "configuration files", "settings"], rows, prose=True)
    return Section("How was this made?", text=text, blocks=[table])


def _cut(text: str) -> str:
    half = CHARACTERS // 2
    return text if len(text) <= CHARACTERS else f"{text[:half]} […] {text[-half:]}"
