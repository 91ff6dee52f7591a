"""Two processes, replicated (DDP) or sharded (FSDP2), compute what one process computes, and resume exactly."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm
from transformers import AutoModelForCausalLM

from mifo_lightning.cli import entry
from mifo_lightning.common.errors import InputError, Interrupted

PROGRAM = Path(__file__).with_name("two_processes.py")
Seen = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def seen(root: Path) -> Seen:
    """What the first process sees under a strategy; all of it comes from one start of the program."""

    @functools.cache
    def run(strategy: str) -> dict[str, Any]:
        out = root / f"{strategy}.pt"
        warm.run(PROGRAM, strategy, out, output=out.with_suffix(".txt"), ranks=1 if strategy == "single" else 2)
        found: dict[str, Any] = torch.load(out, weights_only=False)
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_see_the_gradients_and_scores_of_one(seen: Seen, strategy: str) -> None:
    singly, shared = seen("single")["cases"], seen(strategy)["cases"]
    assert set(singly) == {
        "phases",
        "mixed",
        "summed",
        "own responses",
        "distilled",
        "dynamic sampling",
        "adapters",
    }
    for case, one in singly.items():
        two = shared[case]
        assert one["phases"] == two["phases"]
        assert {"rl", "sft"} <= set(one["phases"])
        assert one["drawn"] == two["drawn"]
        for a, b in zip(one["gradients"], two["gradients"], strict=True):
            scale = max(float(g.abs().max()) for g in a.values())
            for name in a:
                torch.testing.assert_close(b[name], a[name], atol=2e-5 * scale, rtol=1e-3, msg=f"{case}: {name}")
    assert max(len(ids) for ids in singly["dynamic sampling"]["drawn"]) > 8
    one, two = (found["phases"]["validation"][0] for found in (singly, shared))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for found, before in ((singly, one), (shared, two)):  # the rate is 0 and the run ends on SFT: the same model again
        after_rl = {f"val/{name}": value for name, value in found["phases"]["after_rl"][0].items()}
        assert after_rl == pytest.approx(before, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_freeze_resume_and_export_exactly(seen: Seen, root: Path, strategy: str) -> None:
    whole, again = seen(strategy)["whole"], seen(strategy)["again"]
    assert not any(whole["moved"])
    assert [step for step, still in enumerate(whole["still"]) if still] == [1]  # its gradient was set to 0
    frozen = dict(zip(whole["phases"], whole["frozen"], strict=True))
    assert frozen["rl"] == 0
    assert frozen["sft"] > 0
    assert len(again) == 2
    for step, resumed in again.items():
        assert resumed["phases"] == whole["phases"][step:]
        for name, value in whole["weights"][0].items():
            assert (resumed["weights"][0][name] == value).all(), (step, name)
    exported = AutoModelForCausalLM.from_pretrained(root / f"model-{strategy}")
    for name, value in exported.named_parameters():
        assert (value == whole["weights"][0][f"policy.model.{name}"]).all()


@pytest.mark.parametrize(
    ("end", "status", "member"),
    [
        (None, 0, False),
        (Interrupted(15, together=True), 143, False),
        (Interrupted(15), 143, True),
        (InputError("no"), 2, True),
    ],
    ids=["whole", "stopped together", "stopped alone", "failed"],
)
def test_a_program_leaves_the_group_where_all_ranks_end(
    monkeypatch: pytest.MonkeyPatch, end: BaseException | None, status: int, member: bool
) -> None:
    """At exit gloo's threads may abort a process that is still a member; one that ends alone would wait for others."""

    def run(args: list[str] | None) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if end is not None:
            raise end

    monkeypatch.setattr(entry, "make_cli", run)
    try:
        code: Any = 0
        try:
            entry.main(["fit", "--config", "tiny"])
        except SystemExit as ended:
            code = ended.code
        assert (code, dist.is_initialized()) == (status, member)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
