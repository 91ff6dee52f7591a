"""What do the models answer, and how was it found out? The sections about the runs themselves."""

import json
from collections.abc import Sequence

from mifo_lightning.lab.report.document import Gallery, Section, Table
from mifo_lightning.lab.report.rates import ARMS, DESIGNS, MEASURED, VARIANCES
from mifo_lightning.lab.report.results import Ablation, samples
from mifo_lightning.lab.report.statistics import EXACT, LEVEL, Design

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
        return Section(question, monitor="samples")
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
    answer = (
        f"{len(rows)} of {len(ablation.cells)} runs have no result. An arm that misses one has no mean and no rank."
    )
    table = Table("Runs without a result", ["arm", "base", "seed", "status", "error"], rows, prose=True)
    return Section(question, [answer], blocks=[table])


def not_recorded(missing: Sequence[Section]) -> list[Section]:
    """What further monitors would have shown."""
    listed = "; ".join(f"{section.question} (monitor {section.monitor})" for section in missing)
    return [Section("What was not recorded?", text=[f"These runs did not record: {listed}."])] if missing else []


def made(ablation: Ablation) -> Section:
    """The arms, the command, and what an interval means."""
    bases = "; ".join(f"{base} with {', '.join(map(str, seeds))}" for base, seeds in ablation.seeds.items())
    text = [
        f"Made by: {ablation.command or 'a command that was not recorded'}, at commit "
        f"{ablation.commit or '(not recorded)'}. Bases, and the seeds of every arm on them: {bases}. The primary "
        f"metric, {ablation.primary}, was set in the configuration. All final scores are in runs.csv, from which the "
        "statistics of this page are remade by python -m mifo_lightning.lab report.",
        f"{_interval(ablation)} A difference is taken on the same base with the same seed.",
        "p is two-sided, and the larger one of two probabilities: that of Student's t for this interval, and that of a "
        "mean difference at least as large if each base's mean difference could as well have the opposite sign (all "
        f"assignments of signs up to {EXACT} bases). All comparisons on {ablation.compared} but a primary contrast are "
        "corrected together by Holm's method. Other metrics and pictures are descriptive.",
    ]
    text += [_simulated(ablation.design, len(ablation.bases))] if len(ablation.bases) > 1 else []
    rows = [
        [arm.name, ", ".join(arm.configs), ", ".join(f"{key} = {json.dumps(value)}" for key, value in arm.set.items())]
        for arm in ablation.arms
    ]
    table = Table("Arms", ["arm", "configuration files", "settings"], rows, prose=True)
    return Section("How was this made?", text=text, blocks=[table])


def _interval(ablation: Ablation) -> str:
    """What the intervals of this page are of."""
    text = f"An interval is a {LEVEL:.0%} interval by Student's t "
    if len(ablation.bases) == 1:
        return f"{text}over the runs on the one base: of other bases it says nothing."
    if ablation.design == "nested":
        return f"{text}over bases; every base has seeds of its own."
    return (
        f"{text}in a model with random effects of base and seed, as every base has the same seeds: the variance of a "
        "mean is (MS_base + MS_seed - MS_error) / N, with Satterthwaite's "
        "degrees of freedom, at least 1; where that is not positive, max(MS_base, MS_seed) / N."
    )


def _simulated(design: Design, bases: int) -> str:
    """How often all this errs, as simulated with the nearest number of bases."""
    _, bases, seeds = min((d for d in DESIGNS if d[0] == design), key=lambda d: abs(d[1] - bases))
    told = []
    for failures in (False, True):
        rates = {name: f"{r.low:.1%} to {r.high:.1%}" for name, r in MEASURED[design, bases, failures].items()}
        told.append(
            f"{'where one run in seven fails' if failures else 'with normal scores'}, {LEVEL:.0%} intervals of "
            f"differences have the truth in them in {rates['differences']} of cases, those of means in "
            f"{rates['means']}, and some arm is wrongly called significant in {rates['alarms']} of grids"
        )
    return (
        f"How often this errs, simulated with {ARMS} arms that equal their reference on {bases} bases x {seeds} seed"
        f"{'s' if seeds > 1 else ''}, the variances of base, seed and run each {', '.join(map(str, VARIANCES))}: "
        f"{'; '.join(told)} (python -m mifo_lightning.lab.report.simulation)."
    )


def _cut(text: str) -> str:
    half = CHARACTERS // 2
    return text if len(text) <= CHARACTERS else f"{text[:half]} […] {text[-half:]}"
