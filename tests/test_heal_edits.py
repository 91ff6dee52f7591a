"""The edits of a whole model: each touches what its name says, the controls are always there and as large."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.heal.anatomy import anatomy
from experiments.heal.factorial import UNTRAINED, Edit, Editor, controls, moves_matrices_alone
from experiments.heal.settings import KINDS, Edits, Spectra
from experiments.heal.spectra import TURN, compare
from experiments.prune_update import Weights

MATRICES = Spectra().matrices
SHAPES = {"q_proj": (12, 12), "k_proj": (4, 12), "v_proj": (4, 12), "o_proj": (12, 12)}
SHAPES |= {"gate_proj": (20, 12), "up_proj": (20, 12), "down_proj": (12, 20)}
LAYERS, TOKENS = 3, 9


def model(seed: int) -> Weights:
    """Weights of a decoder, fp32, with a head of its own."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (TOKENS, 12), "lm_head.weight": (TOKENS, 12)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.part.{name}.weight": shape for name, shape in SHAPES.items()}
        shapes |= {f"{at}.part.q_proj.bias": (12,), f"{at}.input_layernorm.weight": (12,)}
    shapes["model.norm.weight"] = (12,)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def editor(**changes: Any) -> Editor:
    peak, noise, more = model(0), model(1), model(2)
    end = {name: w + 0.1 * noise[name] for name, w in peak.items()}
    rl = {name: w + 0.1 * more[name] for name, w in end.items()}
    settings: dict[str, Any] = {"primary": "either top 1/4", "seeds": 2, "interpolation": [0.5], **changes}
    return Editor(Edits(**settings), peak, end, rl, MATRICES, [2, 7])


def named(of: Editor) -> dict[str, Edit]:
    found = list(of.all())
    assert len({edit.name for edit in found}) == len(found)
    return {edit.name: edit for edit in found}


def rank(change: Tensor) -> int:
    return int(torch.linalg.matrix_rank(change.double(), rtol=1e-4))


def test_names_are_sorted_into_parts() -> None:
    found = anatomy(model(0), MATRICES)
    assert len(found.matrices) == LAYERS * 7
    assert [len(names) for names in found.kinds.values()] == [LAYERS] * 7
    assert [len(names) for names in found.thirds.values()] == [7, 7, 7]
    assert (found.embedding, found.head) == (["model.embed_tokens.weight"], ["lm_head.weight"])
    assert len(found.vectors) == 2 * LAYERS + 1
    parts = [*found.matrices, *found.embedding, *found.head, *found.vectors]
    assert sorted(parts) == sorted(model(0))


def test_every_edit_changes_exactly_what_its_name_says() -> None:
    of = editor()
    edits, everything = named(of), set(of.end)
    matrices, thirds = set(of.anatomy.matrices), of.anatomy.thirds

    def touched(name: str, start: Weights) -> set[str]:
        weights, _ = edits[name].make()
        assert all(w.dtype == torch.float32 for w in weights.values())
        return {n for n in everything if not torch.equal(weights[n], start[n])}

    assert touched("rollback everything", of.end) == everything
    assert touched("rollback everything", of.peak) == set()
    assert touched("rollback all but the matrices", of.peak) == matrices
    assert touched("rollback matrices", of.end) == matrices
    two = {name for name, w in of.end.items() if w.ndim == 2}
    assert touched("rollback everything with two dimensions", of.end) == two
    assert touched("rollback everything with two dimensions", of.peak) == everything - two
    assert touched("rollback middle third", of.end) == set(thirds["middle third"])
    assert touched("rollback k_proj", of.end) == set(of.anatomy.kinds["k_proj"])
    assert touched("rollback norms and biases", of.end) == set(of.anatomy.vectors)
    assert touched("rollback head", of.end) == {"lm_head.weight"}
    for name in (
        "block top 1/4",
        "either tail 1/2",
        "values",
        "directions",
        "random block 1/4, 1",
        "interpolation 0.5",
    ):
        assert touched(name, of.end) == matrices
    assert touched("either top 1/4, last third", of.end) == set(thirds["last third"])
    assert touched("interpolation of all weights 0.5", of.end) == everything
    assert touched("interpolation 1", of.end) == set()
    assert touched("peak + gauss", of.peak) == touched("peak + next layer's change", of.peak) == matrices
    assert touched("rl", of.rl) == set()
    assert touched("rl inside top 1/4", of.end) == matrices
    published = touched("as published, directions, top 1/8 tail 0", of.end)
    assert published == matrices | {"model.embed_tokens.weight", "lm_head.weight"}


def test_rows_never_trained_are_the_peaks_and_no_others() -> None:
    of = editor()
    weights, _ = named(of)[UNTRAINED].make()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        back = (weights[name] == of.peak[name]).all(1)
        assert back.nonzero().flatten().tolist() == [2, 7]
        assert (weights[name] == of.end[name]).all(1).sum() == TOKENS - 2


@pytest.mark.parametrize("what", ["top 1/4", "tail 1/2", "random 1/4", "either top 1/4", "either random 1/4"])
def test_inside_and_outside_are_the_whole_of_rls_change(what: str) -> None:
    of = editor()
    edits = named(of)
    parts = {where: edits[f"rl {where} {what}"].make()[0] for where in ("inside", "outside")}
    for name in of.anatomy.matrices:
        inside, outside = (parts[where][name] - of.end[name] for where in ("inside", "outside"))
        torch.testing.assert_close(inside + outside, of.rl[name] - of.end[name], rtol=1e-4, atol=1e-6)
        assert abs(float((inside * outside).sum())) < 1e-3 * float(inside.norm() * outside.norm()) + 1e-6
        rows, columns = of.end[name].shape
        k = min(rows, columns) // (2 if "1/2" in what else 4)
        assert rank(inside) == min(k * (2 if "either" in what else 1), rows, columns)


def test_the_authors_edit_of_rl_has_rl_around_it_and_the_ends_directions_in_it() -> None:
    of = editor(published=[["1/3", "0"], ["1", "0"]])
    edits = named(of)
    weights, _ = edits["rl as published, values and directions, top 1/3 tail 0"].make()
    assert all(torch.equal(weights[name], of.rl[name]) for name, w in of.rl.items() if w.ndim == 1)
    name = of.anatomy.kinds["q_proj"][0]
    u, s, v = of.end_svd(name)
    wanted = (u[:, :4] * s[:4]) @ v[:, :4].T
    rest = weights[name].double() - wanted
    later = of.rl_svd(name)
    torch.testing.assert_close(rest, (later.u[:, 4:] * later.s[4:]) @ later.v[:, 4:].T, rtol=1e-4, atol=1e-5)
    whole, _ = edits["rl as published, directions, top 1 tail 0"].make()
    assert all(torch.equal(whole[name], of.end[name]) for name in of.with_two_dimensions)
    assert "rl as published, directions, top 1 tail 0" not in named(editor(kinds=["reverse"], published=[["1", "0"]]))


def test_rls_change_has_controls_that_need_no_spectrum() -> None:
    of = editor()
    edits = named(of)
    whole, half, random = (
        edits[name].make()[0] for name in ("rl matrices", "rl matrices x 0.5", "rl inside random 1/4")
    )
    for name in of.end:
        assert torch.equal(whole[name], of.rl[name] if name in of.anatomy.matrices else of.end[name])
    assert of.norm(half, of.end) == pytest.approx(of.norm(whole, of.end) / 2, rel=1e-4)
    for name in of.anatomy.matrices:
        assert rank(random[name] - of.end[name]) == min(of.end[name].shape) // 4
    assert 0 < of.norm(random, of.end) < of.norm(whole, of.end) / 2


def test_random_subspaces_have_the_dimension_of_the_edit_and_differ_by_seed() -> None:
    of = editor()
    edits = named(of)
    taken = {name: edits[name].make()[0] for name in ("block top 1/4", "random block 1/4, 0", "random block 1/4, 1")}
    for name in of.anatomy.matrices:
        assert {rank(of.end[name] - weights[name]) for weights in taken.values()} == {min(of.end[name].shape) // 4}
    first, second = taken["random block 1/4, 0"], taken["random block 1/4, 1"]
    assert all(not torch.equal(first[name], second[name]) for name in of.anatomy.matrices)


def test_random_changes_are_as_large_as_sfts_in_every_matrix() -> None:
    of = editor()
    for edit in of.all():
        if edit.family == "random change":
            weights, _ = edit.make()
            for name in of.anatomy.matrices:
                wanted = float((of.end[name] - of.peak[name]).norm())
                assert float((weights[name] - of.peak[name]).norm()) == pytest.approx(wanted, rel=1e-5)


def test_distances_from_the_peak() -> None:
    of = editor()
    edits = named(of)
    whole = of.norm(of.end)
    assert of.norm(edits["interpolation 0.5"].make()[0]) == pytest.approx(whole / 2)
    assert of.norm(edits["rollback matrices"].make()[0]) == 0.0
    assert of.norm(edits["rollback matrices"].make()[0], of.end) == pytest.approx(whole)
    for name, edit in edits.items():
        if edit.family in ("restoration", "random subspace") and name != "values":
            assert of.norm(edit.make()[0]) < whole


def test_controls_come_whatever_kinds_are_asked_for() -> None:
    bare = [edit.name for edit in editor(kinds=[]).all()]
    assert sorted(bare) == sorted([*controls(editor().settings), UNTRAINED])
    assert {edit.name for edit in editor(kinds=list(KINDS)).all()} > set(bare)


def test_edits_of_more_than_matrices_are_known_by_their_names() -> None:
    of = editor()
    for edit in of.all():
        if edit.family in ("rollback", "restoration", "published", "random subspace"):
            weights, _ = edit.make()
            others = (name for name in of.end if name not in of.anatomy.matrices)
            alone = all(torch.equal(weights[name], of.end[name]) for name in others)
            assert alone == moves_matrices_alone(edit.name, edit.family), edit.name


def test_as_published_says_how_far_it_is_from_a_rotation_and_how_often_it_gave_up() -> None:
    edits = named(editor(published=[["1/3", "0"], ["1", "0"]]))
    _, said = edits["as published, directions, top 1/3 tail 0"].make()
    assert said["orthonormality"] > 0.01
    assert said["early"] == pytest.approx(2 * LAYERS / (7 * LAYERS + 2))  # 4 of 12 are all that k_proj and v_proj have
    weights, said = edits["as published, directions, top 1 tail 0"].make()
    assert said == {"orthonormality": 0.0, "early": 1.0}
    peak = editor().peak
    assert all(torch.equal(weights[name], peak[name]) for name, w in peak.items() if w.ndim == 2)


def test_spectra_are_kept_by_kind_and_depth_too() -> None:
    of = editor()
    study = SimpleNamespace(spectra=Spectra(k=[1, "1/4"]))
    found = compare(study, of.peak, of.end, None)  # type: ignore[arg-type]  # of a study it reads that group alone
    parts = found["change"]["parts"]
    assert set(parts) == {*of.anatomy.kinds, *of.anatomy.thirds}
    assert all("parts" not in row for name, row in found.items() if name not in ("change", "gauss"))
    for key in ("relative_median", "values"):
        over_kinds = sum(parts[kind][key] for kind in of.anatomy.kinds) / 7
        assert over_kinds == pytest.approx(found["change"][key])
    alone = compare(SimpleNamespace(spectra=Spectra(["v_proj"], [1, "1/4"])), of.peak, of.end, None)  # type: ignore[arg-type]
    left, right, energy = parts["v_proj"]["turns"]["1"]
    known = dict(zip(TURN, alone["change"]["turns"]["1"], strict=True))
    assert (left, right, energy) == pytest.approx((known["left_mean"], known["right_mean"], known["energy"]))
