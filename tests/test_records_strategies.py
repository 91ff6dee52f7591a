"""Two processes, replicated (DDP) or sharded (FSDP2), log and keep what one process does, also when resumed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import warm

PROGRAM = Path(__file__).with_name("two_process_records.py")


def run(strategy: str, out: Path) -> dict[str, Any]:
    warm.run(PROGRAM, strategy, out, output=out.with_suffix(".txt"), ranks=1 if strategy == "single" else 2)
    return json.loads(out.read_text())


def numbers(record: Any, where: str = "") -> dict[str, Any]:
    """Every leaf by its path; floats to be compared up to rounding, and how many of them are equal up to a few."""
    if where.endswith("freeze/ties"):
        return {where: pytest.approx(record, abs=5)}
    if not isinstance(record, (dict, list)):
        return {where: pytest.approx(record, rel=1e-3, abs=1e-5) if isinstance(record, float) else record}
    pairs = record.items() if isinstance(record, dict) else enumerate(record)
    return {path: leaf for key, value in pairs for path, leaf in numbers(value, f"{where}/{key}").items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a single process keeps and logs."""
    return run("single", tmp_path_factory.mktemp("one") / "one.json")["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_keep_the_records_of_one(tmp_path: Path, one: dict[str, Any], strategy: str) -> None:
    found = run(strategy, tmp_path / "two.json")
    one, two, again = copy.deepcopy(one), found["whole"], found["again"]
    assert [(phase["phase"], phase["number"]) for phase in one["layer_updates"]["phases"]][:3] == [
        ("rl", 1),
        ("sft", 1),
        ("rl", 2),
    ]
    for record in (one, two):  # a rank without a row to train on runs one all the same
        extra = record["costs"]["rl"]
        assert extra.pop("trained_tokens") > 0 < extra.pop("flops")
    assert numbers(two) == numbers(one)
    del two["logged"]
    del again["logged"]  # of the rest of the run alone
    for key in ("trained_tokens", "flops"):
        del again["costs"]["rl"][key]
    assert again == two
