"""One matrix of the heal study: angles are exact where cosines are blind, edits are projections, controls as large."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Generator, Tensor

from experiments.heal import edits
from experiments.heal.changes import CHANGES, next_layer, orthonormal
from experiments.heal.edits import as_published, bases, block, either, inside
from experiments.heal.geometry import Svd, movement, principal_angles, svd
from experiments.heal.settings import dimension

SHAPES = [(24, 24), (40, 16), (16, 40)]


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def norm(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a))


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 0.001, 0.1, 10.0, 44.9, 45.0, 60.0, 90.0])
def test_angles_of_known_rotations_are_exact(degrees: float) -> None:
    q = orthonormal(20, 8, Generator().manual_seed(0))
    angles = torch.tensor([degrees, degrees / 2, 0.0, 90.0], dtype=torch.float64).deg2rad()
    a, away = q[:, :4], q[:, 4:]
    b = a * angles.cos() + away * angles.sin()
    found = principal_angles(a, b @ orthonormal(4, 4, Generator().manual_seed(1)))
    torch.testing.assert_close(found, angles.sort().values, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 0.1, 3.0])
def test_angles_are_those_of_scipy(scale: float) -> None:
    a = matrix((30, 5), 0)
    b = a + scale * matrix((30, 5), 1)
    expected = np.sort(subspace_angles(a.numpy(), b.numpy()))
    found = principal_angles(*(torch.linalg.qr(each)[0] for each in (a, b)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_movement_of_a_known_rotation_and_stretch(shape: tuple[int, int]) -> None:
    """The two largest left vectors turn by 5 degrees out of the top three; values grow by a tenth."""
    old = svd(matrix(shape, 0))
    spread = torch.arange(len(old.s), 0, -1, dtype=torch.float64) * 3
    turn = torch.tensor(5.0).double().deg2rad()
    u = old.u.clone()
    u[:, 0], u[:, 5] = (
        old.u[:, 0] * turn.cos() + old.u[:, 5] * turn.sin(),
        old.u[:, 5] * turn.cos() - old.u[:, 0] * turn.sin(),
    )
    before, after = Svd(old.u, spread, old.v).product(), Svd(u, 1.1 * spread, old.v).product()
    found = movement(before, after, {"2": 2, "8": 8, "9": 9})
    assert found.relative_median == pytest.approx(0.1)
    assert found.relative_max == pytest.approx(0.1)
    assert found.norm == pytest.approx(norm(after - before))
    assert found.values == pytest.approx(0.1 * norm(spread) / norm(after - before))
    two = found.turns["2"]
    assert (two.left_max, two.left_mean) == pytest.approx((5.0, 2.5))
    assert two.right_max == pytest.approx(0.0, abs=1e-6)
    assert two.left_distance == pytest.approx(float(turn.sin()))
    assert two.gap == pytest.approx(3.0)
    assert two.bound == pytest.approx(float(torch.linalg.matrix_norm(after - before, 2)) / 3.0)
    assert found.turns["8"].left_max == pytest.approx(0.0, abs=1e-6)  # both vectors are in it
    assert ("9" in found.turns) == (min(shape) >= 18)  # above half of min(m, n) one side would soon be everything


def test_energy_in_the_block_is_one_for_a_random_change() -> None:
    w = matrix((60, 40), 0)
    turns = [movement(w, w + 1e-3 * matrix((60, 40), seed), {"10": 10}).turns["10"] for seed in range(1, 60)]
    assert np.mean([turn.energy for turn in turns]) == pytest.approx(1.0, abs=0.05)
    old = svd(w)
    held = movement(w, w + inside(matrix((60, 40), 1), old.u[:, :10], old.v[:, :10]), {"10": 10}).turns["10"]
    assert held.energy == pytest.approx(60 * 40 / 100)


def test_no_change_has_no_angle_and_no_bound_to_exceed() -> None:
    found = movement(matrix((12, 8), 0), matrix((12, 8), 0), {"2": 2})
    assert (found.norm, found.values) == (0.0, 0.0)
    assert found.turns["2"].left_max < 1e-6
    assert found.turns["2"].bound == 0.0


@pytest.mark.parametrize(("shape", "name"), product(SHAPES, CHANGES))
def test_random_changes_are_exactly_as_large_and_repeat(shape: tuple[int, int], name: str) -> None:
    change = matrix(shape, 3) * 1e-3
    made, again, other = (CHANGES[name](change, Generator().manual_seed(s)) for s in (0, 0, 1))
    assert norm(made) == pytest.approx(norm(change), rel=1e-13)
    assert torch.equal(made, again)
    assert norm(made - other) > 0.5 * norm(change)
    assert norm(made - change) > 0.5 * norm(change)
    if name == "permuted":
        assert torch.equal(made.flatten().sort().values, change.flatten().sort().values)
    if name == "rotated":
        torch.testing.assert_close(svd(made).s, svd(change).s)
    assert torch.equal(CHANGES[name](torch.zeros(shape), Generator().manual_seed(0)), torch.zeros(shape).double())


def test_changes_of_the_next_layer_keep_the_norm_of_their_own() -> None:
    own = [matrix((6, 4), seed) * 10.0**seed for seed in range(3)]
    made = next_layer(own)
    for i, each in enumerate(made):
        assert norm(each) == pytest.approx(norm(own[i]), rel=1e-13)
        torch.testing.assert_close(each / norm(each), own[(i + 1) % 3] / norm(own[(i + 1) % 3]))


@pytest.mark.parametrize(("shape", "end"), product(SHAPES, ["top", "tail"]))
def test_edits_depend_on_the_subspaces_alone(shape: tuple[int, int], end: edits.End) -> None:
    base = matrix(shape, 0)
    tuned = base + matrix(shape, 1)
    u, v = bases(svd(base), 5, end)
    turned = [each @ orthonormal(5, 5, Generator().manual_seed(i)) for i, each in enumerate((u, v))]
    for edit in (block, either):
        torch.testing.assert_close(edit(tuned, base, u, v), edit(tuned, base, *turned))
        torch.testing.assert_close(edit(tuned, base, u, v), edit(tuned, base, -u, v))


@pytest.mark.parametrize(("shape", "end"), product(SHAPES, ["top", "tail"]))
def test_more_dimensions_bring_the_matrix_nearer_until_it_is_back(shape: tuple[int, int], end: edits.End) -> None:
    base = matrix(shape, 0)
    tuned, of = base + matrix(shape, 1), svd(base)
    for edit in (block, either):
        left = [norm(edit(tuned, base, *bases(of, k, end)) - base) for k in range(1, min(shape) + 1)]
        assert left == sorted(left, reverse=True)
        assert left[0] < norm(tuned - base)
    torch.testing.assert_close(either(tuned, base, *bases(of, min(shape), end)), base)
    if shape[0] == shape[1]:
        torch.testing.assert_close(block(tuned, base, *bases(of, min(shape), end)), base)


def test_a_block_takes_back_what_lies_in_it_and_nothing_else() -> None:
    base = matrix((24, 16), 0)
    of = svd(base)
    (u, v), (tail_u, tail_v) = bases(of, 4, "top"), bases(of, 4, "tail")
    within, across, outside = (a @ matrix((4, 4), 1) @ b.T for a, b in ((u, v), (u, tail_v), (tail_u, tail_v)))
    tuned = base + within + across + outside
    torch.testing.assert_close(block(tuned, base, u, v), base + across + outside)
    torch.testing.assert_close(either(tuned, base, u, v), base + outside)


def test_values_and_directions_are_the_two_halves() -> None:
    tuned, base = svd(matrix((10, 6), 0)), svd(matrix((10, 6), 1))
    torch.testing.assert_close(svd(edits.values(tuned, base)).s, base.s)
    torch.testing.assert_close(svd(edits.directions(tuned, base)).s, tuned.s)
    left = principal_angles(svd(edits.directions(tuned, base)).u[:, :3], base.u[:, :3])
    assert float(left.max()) < 1e-6
    torch.testing.assert_close(edits.values(base, base), edits.directions(base, base))


@pytest.mark.parametrize("with_values", [True, False])
def test_as_published_returns_early_and_else_mixes_what_is_not_orthonormal(with_values: bool) -> None:
    a, b = matrix((20, 12), 0), matrix((20, 12), 0) + 0.5 * matrix((20, 12), 1)
    base, tuned = svd(a), svd(b)
    for k_top, k_tail in ((12, 0), (40, 0), (8, 4), (8, 40)):
        found = as_published(tuned, base, k_top, k_tail, with_values=with_values)
        torch.testing.assert_close(found.weight, a)  # its values too, even when directions are asked for
        assert found.early
    nothing = as_published(tuned, base, 0, 0, with_values=with_values)
    torch.testing.assert_close(nothing.weight, b)
    mixed = as_published(tuned, base, 5, 2, with_values=with_values)
    assert not mixed.early
    assert mixed.orthonormality > 0.1
    s = base.s if with_values else tuned.s
    top, middle, tail = slice(0, 5), slice(5, 10), slice(10, 12)
    expected = sum(
        (of.u[:, part] * value[part]) @ of.v[:, part].T
        for of, part, value in ((base, top, s), (tuned, middle, tuned.s), (base, tail, s))
    )
    torch.testing.assert_close(mixed.weight, expected)


def test_ranks_are_numbers_or_shares() -> None:
    assert [dimension(k, 96) for k in (3, "1/16", "1/2", "0", "1/200", "1")] == [3, 6, 48, 0, 1, 96]
    with pytest.raises(ValueError):
        dimension("3/2", 96)
