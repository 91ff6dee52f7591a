"""Two processes against one: thresholds, token selection, buffers, and whole runs under DDP and FSDP2."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_buffer import group
from test_thresholds import scores
from test_tokens import tokens
from torch import Tensor
from two_ranks import SCHEDULE, VARIANTS, run

from mifo_callbacks import collectives, select_tokens, top_mask
from mifo_callbacks.tokens import selection_metrics, threshold_metrics


def shard(tensor: Tensor, rank: int) -> Tensor:
    return [*tensor.chunk(2), tensor[:0]][rank] if len(tensor) else tensor


def in_two_processes(work: Callable[[int], None], folder: Path) -> None:
    mp.start_processes(_enter, args=(work, str(folder / "meet")), nprocs=2, start_method="fork")


def _enter(rank: int, work: Callable[[int], None], meet: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    work(rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["largest", "smallest_zero_last"])
def test_top_mask_over_a_group_equals_one_process(order: Any, tmp_path: Path) -> None:
    """Tensors sharded by rows, unevenly: the shards of the mask are the mask of the whole, ties included."""

    def work(rank: int) -> None:
        for kind in ("normal", "tied", "zero-heavy", "constant"):
            whole = [t for t in scores(kind) if t.dim()]
            parts = [shard(t, rank) for t in whole]
            for k in (1, 100, 400, sum(t.numel() for t in whole)):
                expected = top_mask(whole, k, order=order)
                got = top_mask(parts, k, dist.group.WORLD, order)
                for mask, part in zip(expected, got, strict=True):
                    assert torch.equal([*mask.chunk(2), mask[:0]][rank] if len(mask) else mask, part), (
                        kind,
                        k,
                    )

    in_two_processes(work, tmp_path)


def test_token_selection_over_ranks_equals_one_process(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        for tied in (False, True):
            entropy, mask = tokens(tied=tied)
            for selector in ("top", "bottom", "random"):
                # ties go by rank; what is drawn belongs to a sequence as samplers deal them
                mine = slice(rank, None, 2) if selector == "random" else [slice(0, 2), slice(2, 6)][rank]
                for scope in ("batch", "fixed") if selector == "random" else ("batch", "sequence", "fixed"):
                    options: Any = {
                        "selector": selector,
                        "scope": scope,
                        "threshold": 1.5 if scope == "fixed" else None,
                        "seed": (7, 1),
                    }
                    one = select_tokens(entropy, mask, **options)
                    two = select_tokens(entropy[mine], mask[mine], **options, group=dist.group.WORLD)
                    assert torch.equal(two.mask, one.mask[mine]), options
                    assert two.denominator == one.denominator
            chosen = select_tokens(entropy, mask).mask
            for metrics in (selection_metrics, threshold_metrics):
                last: Any = "top" if metrics is threshold_metrics else chosen
                one_metrics = metrics(entropy, mask, chosen, last)
                args: Any = (entropy[mine], mask[mine], chosen[mine], last if last == "top" else chosen[mine])
                assert metrics(*args, dist.group.WORLD) == pytest.approx(one_metrics)

    in_two_processes(work, tmp_path)


def test_a_broken_entropy_on_one_rank_stops_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        entropy, mask = tokens()
        entropy[0, 0] = torch.nan if rank else 0.0
        with pytest.raises(MisconfigurationException, match="at 1 of"):
            select_tokens(entropy, mask, group=dist.group.WORLD)

    in_two_processes(work, tmp_path)


def test_groups_are_gathered_in_the_order_of_one_process(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        everything = [group(i) for i in range(5)]
        assert collectives.gather_dealt(everything[rank::2]) == everything

    in_two_processes(work, tmp_path)


def test_collectives_of_two_ranks_and_of_one(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        assert (collectives.rank(), collectives.ranks()) == (rank, 2)
        assert collectives.gather_ranks({"a": rank}) == [{"a": 0}, {"a": 1}]
        assert collectives.from_first_rank(rank + 5) == 5
        sums = collectives.sum_ranks([torch.tensor(float(rank)), torch.tensor(3)])
        assert [float(value) for value in sums] == [1.0, 6.0]
        assert collectives.mean_ranks({"x": 2.0 * rank, "y": 1.0}, torch.device("cpu")) == {"x": 1.0, "y": 1.0}

    in_two_processes(work, tmp_path)
    assert (collectives.rank(), collectives.ranks(), collectives.world_group()) == (0, 1, None)
    assert (collectives.gather_ranks(3), collectives.from_first_rank(3)) == ([3], 3)
    assert collectives.mean_ranks({"x": 2.0}, torch.device("cpu")) == {"x": 2.0}


def launch(strategy: str, folder: Path) -> None:
    """`run` on two ranks that find each other as under torchrun; forked, for starting them anew takes seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    ranks = mp.start_processes(_launched, args=(strategy, folder, meet), nprocs=2, join=False, start_method="fork")
    end = time.monotonic() + 120
    while not ranks.join(timeout=1):
        if time.monotonic() > end:
            for process in ranks.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")


def _launched(rank: int, strategy: str, folder: Path, meet: dict[str, str]) -> None:
    os.environ.update(meet, LOCAL_RANK=str(rank))
    run(strategy, folder)
    collectives.leave_group()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a single process keeps."""
    folder = tmp_path_factory.mktemp("one")
    run("single", folder)
    return torch.load(folder / "rank0.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(strategy: str, one: Any, tmp_path: Path) -> None:
    """Both ranks see the data of the single process, so weights, masks and resumed runs agree bit for bit."""
    launch(strategy, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for variant in VARIANTS:
        weights = [kept[variant]["weights"] for kept in (one, first, second)]
        for step in range(len(SCHEDULE)):
            for name, value in weights[0][step].items():
                assert torch.equal(weights[1][step][name], value), (variant, step)
                assert torch.equal(weights[2][step][name], value), (variant, step)
            masks, *shards = (kept[variant]["masks"][step] for kept in (one, first, second))
            assert bool(masks) == (SCHEDULE[step] == "sft")
            for name, mask in masks.items():
                parts = [shard[name] for shard in shards]
                assert torch.equal(torch.cat(parts) if strategy == "fsdp2" else parts[1], mask)
                held = weights[1][step][name][mask], weights[1][step - 1][name][mask]
                assert torch.equal(*held)
        logged = one[variant]["logged"]
        for kept in (first, second):
            assert kept[variant]["logged"].keys() == logged.keys()
            for name, rows in logged.items():
                assert kept[variant]["logged"][name] == [(step, pytest.approx(v, rel=1e-5)) for step, v in rows]
        assert len(first[variant]["resumed"]) >= 1
        for resumed in first[variant]["resumed"]:
            for name, value in weights[0][-1].items():
                assert torch.equal(resumed[name], value), variant


@pytest.mark.slow
def test_tensor_parallel_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match="allowed: data_parallel_size=2, tensor_parallel_size=1"):
        launch("tensor_parallel", tmp_path)
