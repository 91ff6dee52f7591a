"""What the protections of whole weights do to each SFT step, in a foreign module whose AdamW is warm."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import phased
import pytest
import torch
import warm
from lightning import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from phased import SCHEDULE, Look, Toy, Weights, copies, every_step, fit
from torch import Tensor
from torch.optim import Optimizer

from mifo_callbacks import GradientFreezing, ImportanceEMA
from mifo_lightning.common.errors import InputError
from mifo_lightning.methods import Anchor, SignConflict, SoftFreezing, SubspaceFreezing
from mifo_lightning.methods.anchor import penalty
from mifo_lightning.methods.directions import at_random, singular_directions
from mifo_lightning.methods.soft_freezing import hold_back_, quantile_of, rates
from mifo_lightning.methods.subspace_freezing import component

PHASES = ((3, 6), (8, 11))  # first and last step of the SFT phases of SCHEDULE
STEPS = [step for first, last in PHASES for step in range(first, last)]
MATRICES = ["net.0.weight", "net.2.weight"]


class Known(Callback):
    """Importance that is given."""

    def __init__(self, importance: Weights) -> None:
        self.importance = importance


def held(step: int, look: Look) -> tuple[Weights, Weights]:
    """RL's displacement before an SFT step of SCHEDULE, and the weights when that SFT phase began."""
    first = next(a for a, b in PHASES if a <= step < b)
    began = {3: look.begin, 8: look.after[5]}[first]
    start = look.after[first - 1]
    return {name: weight - began[name] for name, weight in start.items()}, start


def watched(callback: Callback, *before: Callback, **options: Any) -> Look:
    look = Look()
    fit([*before, look, callback], **options)
    assert len(look.raw) == len(STEPS)
    return look


# --- anchor -----------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_penalty_is_that_of_autograd() -> None:
    w0, w = torch.randn(2, 9, 7, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64))[0] for n in (9, 7))
    for bases in ((u, v), None):
        weight = w.clone().requires_grad_()
        inside = weight - w0 if bases is None else u.T @ (weight - w0) @ v
        inside.square().sum().backward()
        value, gradient = penalty(w - w0, bases)
        assert weight.grad is not None
        torch.testing.assert_close(gradient, weight.grad)
        torch.testing.assert_close(value, inside.square().sum().detach())


def projected(weight: Tensor, start: Tensor, k: int | None) -> Tensor:
    """U U^T (W - W_0) V V^T in fp64, by the whole decomposition of W_0; W - W_0 where nothing is left out."""
    change = (weight - start).double()
    if k is None or k >= min(weight.shape):
        return change
    u, _, vt = torch.linalg.svd(start.double())
    return u[:, :k] @ u[:, :k].T @ change @ vt[:k].T @ vt[:k]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("k", [None, 3, 10**6])
def test_the_pull_is_added_to_the_gradient_once_a_step_in_sft_alone(k: int | None, parts: int) -> None:
    look = watched(Anchor(0.7, k), parts=parts)
    for i in range(len(STEPS)):
        start = look.before[3 * (i // 3)]  # each phase has three steps
        for name, gradient in look.gradients[i].items():
            added = look.given[i][name] - gradient
            if k is not None and gradient.ndim == 1:
                assert (added == 0).all()
            else:
                expected = 1.4 * projected(look.before[i][name], start[name], k)
                torch.testing.assert_close(added.double(), expected, atol=1e-6, rtol=1e-4)
                assert bool(expected.any()) == (i % 3 > 0), "nothing is pulled before something has moved"


def test_with_as_many_vectors_as_a_matrix_has_it_is_l2_on_matrices() -> None:
    l2, whole = watched(Anchor(0.7)), watched(Anchor(0.7, k=16))
    for i in (0, 1):  # the same weights so far, but for those that are no matrices
        for name in MATRICES:
            torch.testing.assert_close(whole.raw[i][name], l2.raw[i][name], atol=1e-5, rtol=0)
    first, second = l2.given[1][MATRICES[0]] - l2.gradients[1][MATRICES[0]], l2.before[1][MATRICES[0]]
    torch.testing.assert_close(first, 1.4 * (second - l2.before[0][MATRICES[0]]), atol=1e-6, rtol=1e-4)


def test_a_stronger_anchor_leaves_the_weights_nearer() -> None:
    drift = []
    for strength in (1e-9, 1.0, 100.0):
        look = watched(Anchor(strength))
        drift.append(sum(float((look.after[5][n] - look.after[2][n]).norm()) for n in MATRICES))
    assert drift[0] > drift[1] > drift[2]


def test_random_directions_are_as_many_and_new_in_each_phase() -> None:
    anchor = Anchor(1.0, 3, "random", seed=0)
    seen: list[Any] = []
    look = Look(lambda: seen.append(dict(anchor._bases)))
    fit([look, anchor])
    for name in MATRICES:
        (u, v), (again, _), (other, _) = (seen[i][name] for i in (0, 1, 3))
        assert (u.shape[1], v.shape[1]) == (3, 3)
        torch.testing.assert_close(u.T @ u, torch.eye(3), atol=1e-6, rtol=0)
        assert torch.equal(u, again)
        assert not torch.equal(u, other)
        added = look.given[1][name] - look.gradients[1][name]
        change = look.before[1][name] - look.before[0][name]
        torch.testing.assert_close(added, 2 * u @ (u.T @ change @ v) @ v.T, atol=1e-6, rtol=1e-4)
    top = Anchor(1.0, 3)
    fit([Look(lambda: seen.append(dict(top._bases))), top], SCHEDULE[:4])
    assert [x.shape for x in seen[-1][MATRICES[0]]] == [x.shape for x in seen[0][MATRICES[0]]]


# --- soft -------------------------------------------------------------------------------------------------------------


def test_without_importance_soft_is_plain_sft_to_the_bit() -> None:
    zero = {name: torch.zeros_like(p) for name, p in Toy().named_parameters()}
    plain = copies(fit([]))
    for name, weight in copies(fit([Known(zero), SoftFreezing()])).items():
        assert torch.equal(weight, plain[name])
    early = ["sft", "sft", "rl"]
    for name, weight in copies(fit([ImportanceEMA(), SoftFreezing()], early)).items():
        assert torch.equal(weight, copies(fit([], early))[name])


@pytest.mark.parametrize("quantile", [0.25, 0.5, 1.0])
def test_a_coordinate_makes_its_share_of_the_step(quantile: float) -> None:
    draw = torch.Generator().manual_seed(3)
    known = {name: torch.randn(p.shape, generator=draw).square() for name, p in Toy().named_parameters()}
    known[MATRICES[0]][:4] = 0
    look = watched(SoftFreezing(quantile), Known(known))
    everything = torch.cat([c.flatten() for c in known.values()])
    c0 = float(everything.sort().values[-(-int(1000 * quantile) * len(everything) // 1000) - 1])
    assert quantile_of(known, quantile) == pytest.approx(c0)
    for i, step in enumerate(STEPS):
        for name, c in known.items():
            before, raw, after = look.before[i][name], look.raw[i][name], look.after[step][name]
            expected = before + (raw - before) / (1 + c / c0)
            torch.testing.assert_close(after, expected, atol=1e-7, rtol=1e-6)
            assert torch.equal(after[c == 0], raw[c == 0])


def test_rates_at_their_ends() -> None:
    assert rates(torch.tensor([0.0, 1e-30, 1.0, 1e30]), 1.0).tolist() == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert rates(torch.tensor([0.0, 1e-30]), 0.0).tolist() == [1.0, 0.0]
    before, after = torch.randn(2, 1000)
    for importance, expected in ((torch.zeros(1000), after), (torch.full((1000,), torch.inf), before)):
        weight = after.clone()
        hold_back_(weight, before, importance, 1.0)
        assert torch.equal(weight, expected), "nothing is rounded"


# --- sign conflict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("signs", ["rl", "random"])
def test_what_goes_against_the_sign_is_put_back_and_nothing_else(scope: Any, signs: Any) -> None:
    conflict = SignConflict(0.4, scope, signs, seed=0)
    look = Look(lambda: {name: s.clone() for name, s in conflict._signs.items()})
    fit([look, conflict])
    blocked = moved_on = 0
    for i, step in enumerate(STEPS):
        displaced, _ = held(step, look)
        chosen = top(displaced, 0.4, scope)
        for name, d in displaced.items():
            before, raw, after = look.before[i][name], look.raw[i][name], look.after[step][name]
            sign = look.looks[i][name].float()
            assert torch.equal(sign != 0, chosen[name])
            if signs == "rl":
                assert torch.equal(sign[chosen[name]], d.sign()[chosen[name]])
            against = ((raw > before) & (sign < 0)) | ((raw < before) & (sign > 0))
            assert torch.equal(after[against], before[against])
            assert torch.equal(after[~against], raw[~against])
            blocked, moved_on = blocked + int(against.sum()), moved_on + int((chosen[name] & ~against).sum())
    assert min(blocked, moved_on) > 10
    if signs == "random":
        drawn = [torch.cat([s.flatten() for s in look.looks[i].values()]) for i in (0, 1, 3)]
        assert torch.equal(drawn[0], drawn[1])
        both = drawn[0] * drawn[2]
        assert (both < 0).any(), "each RL phase draws anew"
        assert (both > 0).any()


class Sparse(Toy):
    """Half of each tensor never has a gradient, and nothing else moves it."""

    def on_after_backward(self) -> None:
        for p in self.parameters():
            assert p.grad is not None
            p.grad.view(-1)[::2] = 0.0

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("signs", ["rl", "random"])
def test_what_rl_did_not_move_is_watched_by_neither_signs_nor_random_ones(signs: Any) -> None:
    """As rows of an embedding whose tokens never came: a control that watched them would be another one."""
    conflict = SignConflict(0.9, "tensor", signs, seed=0)
    look = Look(lambda: {name: sign.clone() for name, sign in conflict._signs.items()})
    fit([look, conflict], ["rl", "sft"], module=Sparse())
    for sign in look.looks[0].values():
        assert not sign.view(-1)[::2].any()
        assert sign.view(-1)[1::2].any()


def top(displaced: Weights, fraction: float, scope: str) -> dict[str, Tensor]:
    """The share of coordinates of largest |D|, of each tensor or of all, by sorting."""
    if scope == "global":
        flat = torch.cat([d.abs().flatten() for d in displaced.values()])
        cut = flat.sort(descending=True).values[int(fraction * len(flat)) - 1]
        return {name: d.abs() >= cut for name, d in displaced.items()}
    found = {}
    for name, d in displaced.items():
        found[name] = torch.zeros(d.numel(), dtype=torch.bool)
        found[name][
            d.abs().flatten().sort(descending=True, stable=True).indices[: int(fraction * d.numel() + 1e-9)]
        ] = True
        found[name] = found[name].view(d.shape)
    return found


# --- subspace ---------------------------------------------------------------------------------------------------------


def test_singular_directions_are_those_of_the_decomposition() -> None:
    matrix = torch.randn(12, 3) @ torch.randn(3, 8)
    u, v = singular_directions(matrix, 2)
    expected_u, _, expected_vt = torch.linalg.svd(matrix)
    torch.testing.assert_close(u @ u.T, expected_u[:, :2] @ expected_u[:, :2].T, atol=1e-5, rtol=0)
    torch.testing.assert_close(v @ v.T, expected_vt[:2].T @ expected_vt[:2], atol=1e-5, rtol=0)
    assert [x.shape[1] for x in singular_directions(matrix, 8)] == [3, 3], "it has no more"
    assert [x.shape[1] for x in singular_directions(matrix * 0, 8)] == [0, 0]
    for drawn, like in zip(at_random(u, v, 0, 1), (u, v), strict=True):
        assert drawn.shape == like.shape
        torch.testing.assert_close(drawn.T @ drawn, torch.eye(2), atol=1e-6, rtol=0)


def test_components_are_orthogonal_projections() -> None:
    u, v = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64))[0] for n in (9, 7))
    x = torch.randn(9, 7, dtype=torch.float64)
    p, q = torch.eye(9, dtype=torch.float64) - u @ u.T, torch.eye(7, dtype=torch.float64) - v @ v.T
    torch.testing.assert_close(x - component(x, u, v, "either"), p @ x @ q)
    torch.testing.assert_close(component(x, u, v, "both"), u @ u.T @ x @ v @ v.T)
    for sides in ("either", "both"):
        once = component(x, u, v, sides)  # type: ignore[arg-type]
        torch.testing.assert_close(component(once, u, v, sides), once)  # type: ignore[arg-type]


@pytest.mark.parametrize("selector", ["top", "random"])
@pytest.mark.parametrize("sides", ["either", "both"])
def test_directions_of_rl_stand_still_while_sft_moves_the_rest(sides: Any, selector: Any) -> None:
    freezing = SubspaceFreezing(2, sides, selector, seed=0)
    look = Look(lambda: {name: (pair["u"], pair["v"]) for name, pair in freezing._held.items()})
    fit([look, freezing])
    for i, step in enumerate(STEPS):
        displaced, start = held(step, look)
        assert look.looks[i].keys() == set(MATRICES)
        for name, (u, v) in look.looks[i].items():
            assert (u.shape[1], v.shape[1]) == (2, 2)
            if selector == "top":
                expected, _, vt = torch.linalg.svd(displaced[name].double())
                torch.testing.assert_close((u @ u.T).double(), expected[:, :2] @ expected[:, :2].T, atol=1e-4, rtol=0)
                torch.testing.assert_close((v @ v.T).double(), vt[:2].T @ vt[:2], atol=1e-4, rtol=0)
            change = look.after[step][name] - start[name]
            raw = look.raw[i][name] - start[name]
            still = [u.T @ change @ v] if sides == "both" else [u.T @ change, change @ v]
            assert all(float(part.norm()) < 1e-5 for part in still)
            assert float((u.T @ raw @ v).norm()) > 1e-3, "AdamW moves them though the gradient is projected"
            assert float(change.norm()) > 1e-2
            torch.testing.assert_close(change, raw - component(raw, u, v, sides), atol=1e-6, rtol=0)
            torch.testing.assert_close(
                component(look.given[i][name], u, v, sides), torch.zeros_like(raw), atol=1e-6, rtol=0
            )
    if selector == "random":
        assert not torch.equal(look.looks[0][MATRICES[0]][0], look.looks[3][MATRICES[0]][0]), "each RL phase draws anew"


@pytest.mark.parametrize("selector", ["top", "random"])
def test_own_directions_are_those_of_the_weights_where_each_sft_phase_begins(selector: Any) -> None:
    freezing = SubspaceFreezing(0.25, selector=selector, of="weights", seed=0)
    look = Look(lambda: {name: (pair["u"], pair["v"]) for name, pair in freezing._held.items()})
    fit([look, freezing])
    for i, step in enumerate(STEPS):
        start = look.before[3 * (i // 3)]  # each phase has three steps
        for name, (u, v) in look.looks[i].items():
            k = min(start[name].shape) // 4
            assert (u.shape[1], v.shape[1]) == (k, k)
            own = torch.linalg.svd(start[name].double())[0][:, :k]
            same = torch.allclose((u @ u.T).double(), own @ own.T, atol=1e-4, rtol=0)
            assert same == (selector == "top")
            change = look.after[step][name] - start[name]
            assert max(float((u.T @ change).norm()), float((change @ v).norm())) < 1e-5
            assert float(change.norm()) > 1e-2
    assert look.looks[0].keys() == set(MATRICES)


def test_only_the_named_matrices_are_held() -> None:
    freezing = SubspaceFreezing(2, of="weights", matrices=["2"])  # `Toy` has no better names
    look = Look(lambda: dict(freezing._held))
    fit([look, freezing], ["sft", "sft"])
    assert look.looks[0].keys() == {"net.2.weight"}
    with pytest.raises(InputError, match=r"subspace.matrices: q_proj is not allowed; it must be some of 0, 2, or null"):
        fit([SubspaceFreezing(2, matrices=["q_proj"])])


@pytest.mark.parametrize(("of", "warned"), [("rl", True), ("weights", False)])
def test_before_rl_only_own_directions_are_held(of: Any, warned: bool, recwarn: pytest.WarningsRecorder) -> None:
    freezing = SubspaceFreezing(2, of=of)
    look = Look(lambda: dict(freezing._held))
    fit([look, freezing], ["sft", "sft"])
    assert bool(look.looks[0]) == (not warned)
    assert any("before RL has moved anything" in str(one.message) for one in recwarn) == warned


# --- all --------------------------------------------------------------------------------------------------------------

MAKE: dict[str, Callable[[], list[Callback]]] = {
    **phased.SHARDED,
    "rpsft": lambda: [Anchor(0.3, 3)],
    "random anchor": lambda: [Anchor(0.3, 3, "random", seed=0)],
    "subspace": lambda: [SubspaceFreezing(2)],
    "random block": lambda: [SubspaceFreezing(2, "both", "random", seed=0)],
}


@pytest.mark.parametrize("case", MAKE)
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, case: str) -> None:
    whole = copies(fit([*MAKE[case](), every_step(tmp_path)], enable_checkpointing=True))
    plain = copies(fit([]))
    assert any(not torch.equal(weight, plain[name]) for name, weight in whole.items()), "it does something"
    for step in (2, 3, 4, 6, 8, 10):  # inside and at the end of an RL phase, then of an SFT phase; of the later ones
        torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        again = copies(fit(MAKE[case](), ckpt_path=tmp_path / f"step={step}.ckpt"))
        for name, weight in whole.items():
            assert torch.equal(again[name], weight), f"resumed from step {step}"


@pytest.mark.parametrize("case", MAKE)
def test_rl_is_left_alone(case: str) -> None:
    plain = copies(fit([], ["rl"] * 4))
    for name, weight in copies(fit(MAKE[case](), ["rl"] * 4)).items():
        assert torch.equal(weight, plain[name])


@pytest.mark.parametrize("case", ["conflict", "subspace", "soft"])
def test_sft_before_rl_is_plain_and_says_so(case: str) -> None:
    with pytest.warns(UserWarning, match="SFT begins before"):
        early = copies(fit(MAKE[case](), ["sft"] * 3))
    plain = copies(fit([], ["sft"] * 3))
    assert all(torch.equal(weight, plain[name]) for name, weight in early.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    return phased.under("single", tmp_path_factory.mktemp("single"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(tmp_path: Path, alone: dict[str, Any], strategy: str) -> None:
    """Both ranks see the batches of the single process: weights, and runs that are resumed, agree to the bit."""
    out = tmp_path / "out.pt"
    warm.run(Path(phased.__file__), strategy, out, output=out.with_suffix(".txt"), ranks=2)
    two, one = torch.load(out, weights_only=True), dict(alone)
    sharded = "is not allowed with sharded weights; take DDP, or freeze"
    assert two.pop("refused") == ([f"anchor: {sharded}", f"subspace: {sharded}"] if strategy == "fsdp2" else [])
    assert one.pop("refused") == []
    assert one.keys() == phased.SHARDED.keys()
    for case, single in one.items():
        for step, weights in enumerate(single["after"]):
            assert all(torch.equal(two[case]["after"][step][name], w) for name, w in weights.items()), (case, step)
        for resumed in two[case]["resumed"]:
            assert all(torch.equal(resumed[name], w) for name, w in single["after"][-1].items()), case


def test_what_is_refused() -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Anchor(0.0), "anchor.strength: 0.0 is not allowed; it must be above 0"),
        (lambda: Anchor(1.0, 0), "anchor.k: 0 is not allowed; it must be at least 1, or null"),
        (lambda: Anchor(1.0, None, "random"), "anchor.selector: random is not allowed; it must be top where k is null"),
        (lambda: SoftFreezing(0.0), "soft.quantile: 0.0 is not allowed; it must be above 0 and at most 1"),
        (lambda: SignConflict(1.5), "conflict.fraction: 1.5 is not allowed; it must be above 0 and at most 1"),
        (
            lambda: SubspaceFreezing(0),
            "subspace.k: 0 is not allowed; it must be a whole number from 1 on, or a share between 0 and 1",
        ),
        (
            lambda: SubspaceFreezing(2.5),
            "subspace.k: 2.5 is not allowed; it must be a whole number from 1 on, or a share between 0 and 1",
        ),
        (lambda: SubspaceFreezing(of="sft"), "subspace.of: sft is not allowed; it must be rl or weights"),
    ]
    for make, line in cases:
        with pytest.raises(InputError) as refused:
            make()
        assert str(refused.value) == line
    adapted = fit([], ["rl"])
    adapted.policy = SimpleNamespace(adapter=object())  # a stand-in: only its presence is asked for
    with pytest.raises(InputError, match=r"^anchor: is not allowed with model.adapter; take freeze or directions$"):
        fit([Anchor()], module=adapted)
    with pytest.raises(InputError, match=r"^subspace: is not allowed with freeze, which holds weights that it moves"):
        fit([ImportanceEMA(), GradientFreezing(), SubspaceFreezing(4)])
    fit([GradientFreezing(selector="none"), SubspaceFreezing(4)], ["rl", "sft"])
    with pytest.raises(MisconfigurationException, match="soft needs one callback with an importance map"):
        fit([SoftFreezing()])
    with pytest.raises(MisconfigurationException, match="stands after SoftFreezing"):
        fit([SoftFreezing(), ImportanceEMA()])
