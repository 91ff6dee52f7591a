"""What the heal study says: R only where there is a fall, edits against interpolation, no table without controls."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.heal.__main__ import main
from experiments.heal.edit_tables import edit_table
from experiments.heal.report import write_report
from experiments.heal.restoration import Fall, Share, at_equal, fall_over_bases, pareto, share_of, units
from experiments.heal.results import read_results
from experiments.heal.settings import Edits, Stage, Study, Sweep
from experiments.heal.spectra import REFERENCES, TURN
from experiments.heal.tables import rl_table
from experiments.heal.verdict import verdict
from mifo_lightning.common.errors import InputError

SEEN, ID, OOD = "seen/avg@1", "unseen/avg@1", "ood/avg@1"
PRIMARY = "either top 1/4"


def fall(peak: float, end: float, questions: int = 1000) -> Fall:
    return Fall(Share(peak, questions), Share(end, questions))


def test_restoration_is_the_share_of_the_fall_that_came_back() -> None:
    for parts, wholes, share in (([0.1, 0.1], [0.2, 0.2], 0.5), ([0.0, 0.3], [0.1, 0.3], 0.75), ([-0.1], [0.2], -0.5)):
        assert share_of(units(parts), units(wholes)).mean == pytest.approx(share)
    found = share_of(units([0.1, 0.2, 0.3]), units([0.3, 0.3, 0.3]))
    assert found.error == pytest.approx(np.std([1 / 3, 2 / 3, 1], ddof=1) / 3**0.5)  # of equal wholes that of a mean
    assert np.isnan(share_of(units([0.1]), units([0.2])).error)


def test_where_nothing_is_healed_noise_of_the_end_heals_nothing() -> None:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(300):
        peak, end, after = (draw.binomial(1000, p, (9, 1)) / 1000 for p in (0.13, 0.11, 0.11))
        found.append(share_of(after - end, peak - end).mean)
    assert abs(np.median(found)) < 0.05


def test_there_is_no_share_of_a_fall_within_two_standard_errors() -> None:
    error = math.sqrt(0.2 * 0.8 / 1000 + 0.16 * 0.84 / 1000)
    assert fall(0.2, 0.16).error == pytest.approx(error)
    assert 2 * error < 0.04
    assert fall(0.2, 0.16).real
    for none in (fall(0.2, 0.17), fall(0.2, 0.2), fall(0.1, 0.3), fall(0.2, 0.16, questions=500)):
        assert not none.real


def test_a_fall_must_exceed_its_noise_over_bases_too() -> None:
    assert fall_over_bases([fall(0.3, 0.1), fall(0.32, 0.1), fall(0.28, 0.1)])[1]
    found, real = fall_over_bases([fall(0.9, 0.1), fall(0.1, 0.3), fall(0.2, 0.1)])
    assert not real
    assert found.mean == pytest.approx(0.7 / 3)
    assert not fall_over_bases([fall(0.9, 0.1)])[1]


def test_the_path_is_read_at_equal_values() -> None:
    path = [(0.2, 0.10), (0.4, 0.20), (0.8, 0.00)]
    assert at_equal(path, 0.3) == ([pytest.approx(0.15)], True, 0.3)
    assert at_equal(path, 0.6) == ([pytest.approx(0.10)], True, 0.6)
    assert at_equal(path, 0.1) == ([0.10], False, 0.2)  # beyond its ends: the nearest point
    assert at_equal(path, 0.9) == ([0.00], False, 0.8)
    assert at_equal([*path, (0.4, 0.4)], 0.6).passes == pytest.approx([0.10, 0.20])  # it passes twice
    assert at_equal([*path, (0.4, 0.4)], 0.6).value == pytest.approx(0.20)
    assert at_equal(path[::-1], 0.3).value == pytest.approx(0.15)
    corner = [(0.2, 0.1), (0.4, 0.2), (0.3, 0.0), (0.8, 0.0)]
    assert at_equal(corner, 0.4).passes == pytest.approx([0.2, 0.0])  # once where it turns, once on its way back
    assert at_equal(path, 0.8) == ([pytest.approx(0.0)], True, 0.8)
    low, high = at_equal(path, 0.1), at_equal(path, 0.9)
    assert [low.fair(0.1, y) for y in (0.05, 0.10, 0.15)] == [True, True, False]  # worse in both is worse
    assert [high.fair(0.9, y) for y in (-0.1, 0.0, 0.1)] == [False, True, True]  # better in both is better


def test_the_front_holds_what_nothing_else_beats() -> None:
    assert pareto([(1, 3), (2, 2), (3, 1), (2, 1), (1, 2), (3, 1)]) == [(1, 3), (2, 2), (3, 1)]


def study() -> Study:
    return Study(
        name="pretend",
        config=["points"],
        bases={},
        id=ID,
        id_seen=SEEN,
        ood=OOD,
        evaluation={"val": {}, "test": {}},
        sweep=Sweep(steps=[0, 4, 9]),
        rl={"grpo": Stage(start=[0, "end"])},
        edits=Edits(primary=PRIMARY, kinds=["either"], k=["1/4"], thirds=False, seeds=1, interpolation=[0.5]),
        protected=0.25,
        draws=2,
        out=Path("out"),
    )


def base(
    peak: float, end: float, healed: float, edit: float, noise: float, slower_keeps: float = 0.0
) -> dict[str, Any]:
    """Records of a base whose peak is step 4; `edit` is what the primary edit gains over interpolation."""

    def on_test(seen: float, ood: float) -> dict[str, Any]:
        return {"test": {SEEN: seen, ID: 0.1, OOD: ood + noise}}

    signal = {"groups with signal": 0.5, "positive": 0.4, "advantage entropy": 2.0}
    points = {"0": on_test(0.2, peak - 0.05), "4": on_test(0.4, peak), "9": on_test(0.8, end)}
    row = {"relative_median": 0.1, "relative_max": 0.1, "values": 0.1, "norm": 1.0, "turns": {"1": [1.0] * len(TURN)}}
    interpolated = {"0": (0.4, peak), "0.5": (0.6, (peak + end) / 2), "1": (0.8, end)}
    edits = {
        f"interpolation {a}": {"family": "interpolation", "norm": 2 * float(a), **on_test(*place)}
        for a, place in interpolated.items()
    }
    # at equal seen accuracy interpolation has a quarter of the fall left
    edits[PRIMARY] = {"family": "restoration", "norm": 1.0, **on_test(0.5, peak - (peak - end) / 4 + edit)}
    for kind in ("either", "block"):
        edits[f"random {kind} 1/4, 0"] = {"family": "random subspace", "norm": 1.5, **on_test(0.6, end)}
    for name in ("SFT's change", "gauss", "permuted", "rotated", "next layer's change"):
        edits[f"peak + {name}"] = {"family": "random change", "norm": 2.0, **on_test(0.4, peak)}
    for name in ("interpolation of all weights 0.5", "coordinates 0.25", "coordinates 0.5", "coordinates 0.75"):
        edits[name] = {"family": "interpolation", "norm": 1.0, **on_test(0.6, (peak + end) / 2)}
    edits["rollback embedding"] = {"family": "rollback", "norm": 2.0, **on_test(0.5, end)}
    slower = {"0": on_test(0.2, peak - 0.05), "4": on_test(0.4, peak), "9": on_test(0.8, end + slower_keeps)}
    tries = {f"SFT/{step}": {"ood/pass@5": 2 * each["test"][OOD]} for step, each in points.items()}
    tries |= {"grpo/0": {"ood/pass@5": 2 * (peak + noise)}, "grpo/9": {"ood/pass@5": 2 * (healed + noise)}}
    return {
        "peak": 4,
        "least train loss": 9,
        "least test loss": 0,
        "questions": {"ood": 1000},
        "sweep": {step: {**each, "signal": signal} for step, each in points.items()},
        "half rate": slower,
        "protected 0.25": dict(points),
        "protected at random 0.25": dict(points),
        "tries": tries,
        "other seed": {"4": on_test(0.4, peak), "9": on_test(0.8, end)},
        "seconds": {"measure sweep": 1.0},
        "noise": {"1": on_test(0.8, end), "2": on_test(0.8, end)},
        "rl": {"grpo/0": on_test(0.2, peak), "grpo/9": on_test(0.8, healed), "no update/9": on_test(0.8, end)},
        "spectra": {"base -> end": dict.fromkeys(("change", *REFERENCES), row)},
        "edits": edits,
    }


def write(directory: Path, bases: dict[str, dict[str, Any]]) -> Path:
    for each in bases.values():
        for record in each["rl"].values():
            record |= {"optimizer steps": 12, "norm": 0.0}
        for record in each["edits"].values():
            record |= {"from end": 2 - record["norm"]}
    content = {"study": {**study().content(), "bases": list(bases)}, "commit": None, "bases": bases}
    (directory / "records.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def several(number: int = 8, **values: Any) -> dict[str, dict[str, Any]]:
    """Bases that differ a little; a callable value is given the number of the base."""
    found = {"peak": 0.3, "end": 0.1, "healed": 0.2, "edit": 0.0, **values}
    noise = np.linspace(-0.01, 0.01, number)
    return {
        f"b{i}": base(**{k: v(i) if callable(v) else v for k, v in found.items()}, noise=float(noise[i]))
        for i in range(number)
    }


def said(directory: Path, bases: dict[str, dict[str, Any]]) -> str:
    return "\n".join(verdict(read_results(write(directory, bases))))


def test_half_of_the_fall_comes_back(tmp_path: Path) -> None:
    text = said(tmp_path, several())
    assert "peak (chosen on val, at SFT step 4, 4, 4, 4, 4, 4, 4, 4) minus end: +0.200 [+0.200, +0.200]" in text
    assert "which chose no step, from the same step to its end: +0.200 [+0.200, +0.200]." in text
    assert "R = mean(RL - end) / mean(peak - end) is +0.500 [+0.500, +0.500] over 8 bases." in text
    table = rl_table(read_results(tmp_path))
    (end,) = [line for line in table.splitlines() if line.startswith("| grpo | end |")]
    assert "+0.500 [+0.500, +0.500] (8)" in end
    (still,) = [line for line in table.splitlines() if line.startswith("| no update |")]
    assert still.count("+0.000 [+0.000, +0.000]") == 4  # three accuracies, and R


def test_without_a_fall_nothing_is_restored_whatever_the_edit_does(tmp_path: Path) -> None:
    text = said(tmp_path, several(peak=0.1, end=0.1, edit=lambda i: 0.05 + 0.001 * i))
    assert text.startswith("**No fall to restore.** Out of distribution")
    assert "is undefined: no fall to restore." in text
    assert "so that this says nothing of restoration" in text
    assert "beats" not in text
    assert "| no fall to restore |" in rl_table(read_results(tmp_path))


def test_falls_of_some_bases_alone_are_none(tmp_path: Path) -> None:
    text = said(tmp_path, several(peak=lambda i: 0.5 if i < 2 else 0.1, end=0.12))
    assert text.startswith("**No fall to restore.**")
    assert "on 2 of 8 bases" in text


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda i: 0.05 + 0.002 * i, "Top-k restoration beats interpolation at equal seen/avg@1"),
        (lambda i: -0.05 - 0.002 * i, "Top-k restoration loses to interpolation at equal seen/avg@1"),
        (lambda i: 0.05 * (-1) ** i, "Top-k restoration is not told from interpolation at equal seen/avg@1"),
    ],
)
def test_the_primary_edit_is_judged_over_bases(tmp_path: Path, edit: Any, words: str) -> None:
    text = said(tmp_path, several(edit=edit))
    expected = np.mean([edit(i) for i in range(8)])
    assert f"**{words}**: delta = {expected:+.3f} [" in text
    # as far from the peak as a = 0.5: more OOD by a quarter of the fall, less of what was learned
    assert f"At equal |W - peak| it is {expected + 0.05:+.3f} [" in text
    assert "in OOD and -0.100 [-0.100, -0.100] in seen/avg@1" in text


def test_an_edit_whose_accuracy_no_interpolation_has_is_not_judged(tmp_path: Path) -> None:
    bases = several(edit=lambda i: 0.05 + 0.002 * i)
    bases["b5"]["edits"][PRIMARY]["test"] |= {SEEN: 0.3, OOD: 0.2}  # worse in both than the nearest: that counts
    assert "nothing is judged" not in said(tmp_path, bases)
    bases["b5"]["edits"][PRIMARY]["test"] |= {SEEN: 0.3, OOD: 0.4}
    text = said(tmp_path, bases)
    assert "on 1 of 8 bases no interpolation has its seen/avg@1" in text
    assert "beats" not in text
    page = write_report(tmp_path).read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {PRIMARY} (primary)")]
    assert "(1 not equal)" in row


def test_what_any_subspace_would_do_is_not_said_of_the_largest(tmp_path: Path) -> None:
    bases = several(edit=lambda i: 0.05 + 0.002 * i)
    for each in bases.values():
        each["edits"]["random either 1/4, 0"]["test"] |= {SEEN: 0.5, OOD: each["edits"][PRIMARY]["test"][OOD] + 0.01}
    text = said(tmp_path, bases)
    assert "**Putting back a part beats interpolation at equal seen/avg@1; the top k is worse than random" in text
    assert "the edit minus them -0.010 [" in text


def test_the_line_that_passes_twice_decides_nothing_by_its_highest_point_alone(tmp_path: Path) -> None:
    """Random subspaces lie where the line turns back: against its highest OOD there they look worse than they are."""
    bases = several(edit=lambda i: 0.05 + 0.002 * i)
    for i, each in enumerate(bases.values()):
        edits, gain = each["edits"], each["edits"][PRIMARY]["test"][OOD]
        edits["interpolation 0.5"]["test"][SEEN] = 0.9  # seen accuracy rises beyond the end's and turns back
        edits["random either 1/4, 0"]["test"] |= {SEEN: 0.85, OOD: edits["interpolation 1"]["test"][OOD] + 0.08}
        edits[PRIMARY]["test"] |= {SEEN: 0.5, OOD: gain + 0.01 * i / 7}
    text = said(tmp_path, bases)
    assert "**Putting back a part beats interpolation at equal seen/avg@1; the top k is not told from random" in text
    assert "(against lowest passes " in text
    for each in bases.values():  # the edit itself where the line passes twice: between its two passes nothing is lost
        each["edits"][PRIMARY]["test"] |= {SEEN: 0.85, OOD: each["edits"]["interpolation 1"]["test"][OOD] + 0.06}
    text = said(tmp_path, bases)
    assert "**Top-k restoration is not told from interpolation" in text
    assert "more than once on some base: delta is against its highest OOD there, against the lowest it is +" in text


def test_the_top_k_is_not_judged_by_random_subspaces_that_no_interpolation_matches(tmp_path: Path) -> None:
    bases = several(edit=lambda i: 0.05 + 0.002 * i)
    bases["b2"]["edits"]["random either 1/4, 0"]["test"] |= {SEEN: 0.95, OOD: 0.05}  # better in ID, worse in OOD
    text = said(tmp_path, bases)
    assert "**Putting back a part beats interpolation at equal seen/avg@1; the top k is not judged against" in text
    assert "of 8 random ones 1 have a seen/avg@1 that no interpolation has" in text


def test_one_base_is_described_without_a_fall_or_a_second_pass(tmp_path: Path) -> None:
    bases = {"b0": base(peak=0.1, end=0.12, healed=0.2, edit=0.01, noise=0.0)}
    text = said(tmp_path, bases)
    assert text.startswith("**No fall to restore.**")
    assert "lowest" not in text
    (row,) = [line for line in edit_table(read_results(tmp_path)).splitlines() if line.startswith(f"| {PRIMARY}")]
    assert row.count("| |") + row.count("|  |") >= 1, "no share of a fall that is none"


def test_rl_that_goes_straight_back_is_told_from_one_that_goes_aside(tmp_path: Path) -> None:
    bases = several()
    for i, each in enumerate(bases.values()):
        far, norm = ((0.5, 1.5), (1.5, 2.5))[i % 2]
        each["edits"]["rl matrices"] = {"family": "reverse", "norm": norm, **each["edits"]["interpolation 1"]}
        each["edits"]["rl matrices"] |= {"norm": norm, "family": "reverse"}
        each["far"] = far
    results = read_results(write(tmp_path, bases))
    for each in results.edited:
        each["edits"]["rl matrices"]["from end"] = each["far"]
    assert results.turned_back()[:2, 0] == pytest.approx([-1.0, 0.0])


def test_what_moves_more_than_matrices_is_compared_with_the_line_of_all_weights(tmp_path: Path) -> None:
    bases = several()
    for each in bases.values():
        each["edits"]["interpolation of all weights 0.5"]["test"] |= {SEEN: 0.5, OOD: 0.07}
        each["edits"]["rollback embedding"]["test"] |= {SEEN: 0.5, OOD: 0.09}
    results = read_results(write(tmp_path, bases))
    assert results.over_interpolation("rollback embedding")[:, 0] == pytest.approx(0.02)
    assert results.over_interpolation("coordinates 0.5")[:, 0] == pytest.approx(0.0)


def test_what_a_smaller_step_keeps_is_said_beside_rl(tmp_path: Path) -> None:
    text = said(tmp_path, several(slower_keeps=0.15))
    assert "half rate +0.150 [+0.150, +0.150], +0.750 [+0.750, +0.750] of the fall, -0.050 [-0.050, -0.050] be" in text
    earlier = "the sweep stopped earlier +0.200 [+0.200, +0.200], +1.000 [+1.000, +1.000] of the fall"
    assert f"{earlier} (8 of 8 bases never have it, the nearest lacks 0.400); half rate" in text
    assert "Main directions minus as many at random: +0.000 [+0.000, +0.000]." in text
    assert "tries (the paper: in five turns with a verifier), OOD of the peak minus the end is +0.400" in text
    assert "grpo from the end changes it by +0.200 [+0.200, +0.200]." in text
    bases = several(slower_keeps=0.15)
    bases["b1"]["half rate"]["9"]["test"][SEEN] = 0.7
    unmet = "beyond the sweep stopped earlier (1 of 8 bases never have it, the nearest lacks 0.013); protected"
    assert unmet in said(tmp_path, bases)


def test_what_rl_brings_from_elsewhere_too_is_taken_off(tmp_path: Path) -> None:
    """It learns the task better from the base as well: by 0.05 of the 0.1 that it brings from the end."""
    assert "(+0.050 [+0.050, +0.050] more than grpo from the base)" in said(tmp_path, several())


def test_a_fall_that_is_small_beside_its_error_is_not_divided_by(tmp_path: Path) -> None:
    text = said(tmp_path, several(end=lambda i: 0.1 + 0.19 * (i % 2)))  # falls of .2 and .01
    assert "No fall" not in text
    assert "is not given: the fall is less than 4 standard errors over bases" in text


def test_without_a_fall_no_edits_are_needed_and_with_one_they_are(tmp_path: Path) -> None:
    bases = several(peak=0.1, end=0.1)
    for each in bases.values():
        each["edits"] = {}
    assert "No edits: no fall to restore." in said(tmp_path, bases)
    fallen = several()
    for each in fallen.values():
        each["edits"] = {}
    with pytest.raises(InputError, match="no control edit random block"):
        read_results(write(tmp_path, fallen))


def test_too_few_bases_are_never_enough(tmp_path: Path) -> None:
    text = said(tmp_path, several(number=4, edit=lambda i: 0.05 + 0.001 * i))
    assert "is not told from" in text
    assert "With 4 bases no difference can be significant: 6 are needed." in text


def test_bases_whose_peak_is_the_end_have_no_edits(tmp_path: Path) -> None:
    bases = several(edit=lambda i: 0.05 + 0.001 * i)
    bases["b0"] |= {"peak": 9, "edits": {}}
    assert "7 of 7 bases ahead" in said(tmp_path, bases)
    for each in bases.values():
        each |= {"peak": 9, "edits": {}}
    assert "No edits: the peak is the end on every base." in said(tmp_path, bases)
    assert write_report(tmp_path).read_text().count("## ") > 5


def test_the_page_is_remade_from_its_records(tmp_path: Path) -> None:
    page = write_report(write(tmp_path, several()))
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"records.json", "report.md", "curve.svg", "window.svg", "spectra.svg", "front.svg"}
    assert main(["--report", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    text = page.read_text(encoding="utf-8")
    assert "| either top 1/4 (primary) | restoration |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    (named,) = [line for line in text.splitlines() if line.startswith("| peak: highest OOD on val")]
    assert "0.300 [" in named


@pytest.mark.parametrize(
    ("stage", "name", "missing"),
    [
        ("half rate", "4", "sweep at half rate"),
        ("other seed", "9", "run of another seed"),
        ("other seed", "4", "run of another seed"),
        ("rl", "grpo/0", "RL from the base"),
        ("rl", "no update/9", "RL without updates"),
        ("protected at random 0.25", "4", "run of SFT protected at random 0.25"),
        ("noise", "2", "other draws"),
        ("edits", "random either 1/4, 0", "control edit random either 1/4, 0"),
        ("edits", "random block 1/4, 0", "control edit random block 1/4, 0"),
        ("edits", "interpolation 0.5", "control edit interpolation 0.5"),
        ("edits", "peak + gauss", "control edit peak + gauss"),
        ("edits", PRIMARY, "edit named in edits.primary"),
    ],
)
def test_a_page_without_a_control_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, name: str, missing: str
) -> None:
    bases = several()
    del bases["b3"][stage][name]
    assert main(["--report", str(write(tmp_path, bases))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"b3: no {missing}; a table without its controls is not written" in line
    assert not (tmp_path / "report.md").exists()


def test_a_pair_without_its_reference_rows_is_refused(tmp_path: Path) -> None:
    bases = several()
    bases["b0"]["spectra"]["base -> end"] = {"change": bases["b0"]["spectra"]["base -> end"]["change"]}
    with pytest.raises(InputError, match="b0: no reference rows of base -> end"):
        read_results(write(tmp_path, bases))


def test_a_directory_without_records_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", str(tmp_path)]) == 2
    assert "no readable records.json" in capsys.readouterr().err
    (tmp_path / "records.json").write_text("{}", encoding="utf-8")
    assert main(["--report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --report {tmp_path}: no readable records.json")
