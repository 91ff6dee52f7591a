"""The fits of a study, as cells of a grid: each a process of its own, kept when done, gone on with when cut off."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.heal.settings import END, PEAK, Start, Study
from mifo_lightning.lab.grid import Ablation, Arm, Cell, cells, slug

SWEEP, HALF_RATE, OTHER_SEED = "sweep", "half rate", "other seed"
NO_UPDATE = "no update"
"""The control of RL that draws, grades and steps at a learning rate of 0: the model must come out as it went in."""
STILL_STEPS = 5
"""Steps of it: as many as show that nothing moves."""
APART = 1000
"""Between the seed of a base and that of its other run."""


def sweep_cells(study: Study, base: str) -> dict[str, Cell]:
    """SFT at a constant rate; the same at half of it, and with another seed, as controls."""
    steps = {"data.schedule.sft_before": study.last, "export.steps": study.sweep.steps, **study.sweep.set}
    arm, half = Arm(study.sweep.configs, steps), Arm([*study.sweep.configs, "controls/half_sft_lr"], steps)
    seed = study.seed_of(base)
    made = {SWEEP: (arm, seed), HALF_RATE: (half, seed), OTHER_SEED: (arm, seed + APART)}
    return {name: _cell(study, base, name, each, "base", study.bases[base], own) for name, (each, own) in made.items()}


def protected_cells(study: Study, base: str) -> dict[str, Cell]:
    """SFT as the sweep's, but for directions of each matrix that stand still; none where the study asks for none.

    Of the matrices that are edited: in embedding and head a projection would move rows of tokens that are never met.
    """
    if study.protected is None:
        return {}
    steps = {"data.schedule.sft_before": study.last, "export.steps": study.sweep.steps, **study.sweep.set}
    configs, seed = [*study.sweep.configs, "protections/own_subspace"], study.seed_of(base)
    held = {"subspace.k": study.protected, "subspace.matrices": study.spectra.matrices}
    made = {}
    for name, selector in zip(protected_runs(study), ("top", "random"), strict=True):
        arm = Arm(configs, {**steps, **held, "subspace.selector": selector})
        made[name] = _cell(study, base, name, arm, "base", study.bases[base], seed)
    return made


def protected_runs(study: Study) -> list[str]:
    """Names of those runs: with each matrix's own main directions, and with as many at random, the control."""
    share = study.protected
    return [] if share is None else [f"protected {share:g}", f"protected at random {share:g}"]


def checkpoint(study: Study, base: str, step: int, run: str = SWEEP) -> Path:
    """The model of one of the runs of `sweep_cells` or `protected_cells` after so many steps."""
    cells = protected_cells if run in protected_runs(study) else sweep_cells
    return cells(study, base)[run].directory / f"model-{step}"


def rl_cells(study: Study, base: str, peak: int) -> dict[tuple[str, int], Cell]:
    """Stage 2 by arm and step of the sweep that it starts from; `peak` is the step that was chosen on this base."""
    main, found = study.rl[study.main], {}
    steps = min(STILL_STEPS, main.set.get("data.schedule.rl_steps", STILL_STEPS))
    own = {"model.optimizer.rl.lr": 0.0, "data.schedule.rl_steps": steps}
    still = replace(main, set={**main.set, **own}, start=[END])
    for name, stage in {**study.rl, NO_UPDATE: still}.items():
        arm = Arm(stage.configs, stage.set)
        for step in steps_of(study, stage.start, peak):
            model = checkpoint(study, base, step)
            found[name, step] = _cell(study, base, name, arm, f"step{step}", model, study.seed_of(base))
    return found


def steps_of(study: Study, starts: Sequence[Start], peak: int) -> list[int]:
    """The steps of the sweep that starts mean on a base whose peak is this step, ascending, each once."""
    named = {PEAK: peak, END: study.last}
    return sorted({named[each] if isinstance(each, str) else each for each in starts})


def _cell(study: Study, base: str, name: str, arm: Arm, start: str, model: Path, seed: int) -> Cell:
    """One fit in `fits/<base>/<name>/<start>/seed<seed>`."""
    always: dict[str, Any] = {"export.dtype": "float32"}  # what is measured and gone on from is not rounded in between
    (cell,) = cells(
        Ablation(
            name=study.name,
            question="",
            primary=study.ood.rpartition("/")[2],  # over all questions: a fit's own evaluation may ask others
            reference=name,
            primary_contrast=[],
            config=study.config,
            bases={start: model},
            seeds=[seed],
            arms={name: arm},
            out=study.out / "fits" / slug(base),
            design="crossed",
            set={**study.set, **always},
        )
    )
    return cell
