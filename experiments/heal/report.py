"""The page of a study: report.md and its pictures, from records.json alone."""

from pathlib import Path

from experiments.heal import pictures, tables
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
    parts += ["### Every checkpoint", SWEEP, tables.sweep_table(results)]
    parts += ["## RL from checkpoints, and its controls", RL, tables.rl_table(results), shown["window.svg"]]
    parts += ["### How large differences are without a cause", FLOOR, tables.floor_table(results)]
    parts += ["## Spectra", SPECTRA, tables.spectra_table(results)]
    if results.edited:
        parts += ["## What is put back", EDITS, tables.family_note(results), shown["front.svg"]]
        parts += [tables.edit_table(results)]
        parts += ["### A random change of the same size", RANDOM, tables.other_edits(results, "random change", "peak")]
    if "reverse" in study.edits.kinds and results.edited:
        parts += ["### RL's change inside and outside", REVERSE, tables.other_edits(results, "reverse", "end")]
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


SWEEP = (
    "Means over bases on test. groups with signal: share of groups of rollouts whose rewards are not all equal; "
    "positive: share of rollouts with a reward above 0; advantage entropy: H = -sum p(a) ln p(a) in nats over the "
    "different advantages of all rollouts, rounded to four decimals: our formula, the paper's is not given. All "
    "three before RL, on training questions."
)
RL = (
    "Means over bases on test, [95 % interval] by t over bases. R = mean(after - start) / mean(peak - start), over the "
    "bases (their number in brackets) whose peak comes before, with a jackknife interval, and only if that fall "
    "exceeds four standard errors over bases. RL that learns the task better heals nothing: the sentence above says "
    "how much more it brings from the end than from the base and the peak. `no update` is RL with a learning rate of "
    "0, a few steps of it: its difference must be exactly 0, and so R. Arms are of equal RL or SFT steps, not of equal "
    "FLOPs; optimizer steps count those that learn nothing too."
)
FLOOR = (
    "Standard deviation of the end over other random draws of its responses; absolute difference to the end of a "
    "run with another seed from the same base; SFT at half the rate where it has the end's accuracy, minus the "
    "end."
)
SPECTRA = (
    "Thin SVD in fp64 of the plain weights (norm scales are not multiplied in); means over matrices, then over "
    "bases. ds: singular values paired by rank. Angles in degrees at k: arcsine of the residual below 45, "
    "arccosine above; shares of k are of min(m, n), at most half of it. energy: that of dW in the block of both "
    "top-k subspaces over k^2 / (m n), its expectation for a random dW. no bound: share of matrices in which "
    "|dW|_2 exceeds the gap s_k - s_(k+1), so that the theorems of Davis-Kahan and Wedin bound no angle. Rows "
    "below a pair: W against W in bf16; random changes of the same norm (normal, the same entries permuted, the "
    "same spectrum in random directions); the same steps of a run with another seed."
)
EDITS = (
    "The end with parts of its change since the peak put back, on test. block: the part between both subspaces of "
    "the peak; either: all that touches one of them; rows of a random subspace are means over its seeds (range). "
    "Embedding, head, norms and biases stay the end's unless the name says otherwise, and interpolation moves the "
    "same matrices. distance: |W - peak| over the matrices, that of the end being 1. OOD at equal ...: minus the "
    "interpolation of equal accuracy (straight pieces, the highest where several have it; `not equal`: bases where "
    "none has it and the nearest, better in one accuracy and worse in the other, stands for it), or of equal distance. "
    "`as published` follows the authors' code with its early return, on everything with two dimensions: U'U is no "
    "identity, so its product is no rotation; early: share of matrices that are simply the peak's."
)
RANDOM = "The peak with its matrices changed: by SFT, and at random by as much per matrix."
REVERSE = (
    "The end plus the part of RL's change of the matrices that lies between the end's own top or tail subspaces "
    "(inside), or plus all the rest (outside). Controls: all of that change (`rl matrices`), parts of it (`x a`), and "
    "what lies between random subspaces; a random change has k^2 / (m n) of its energy inside. `rl` is RL's model "
    "itself, with embedding, head and norms."
)
