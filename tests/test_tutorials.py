"""The tutorials run as they stand, each in a process of its own and in an empty directory."""

import re
from pathlib import Path

import pytest
import warm

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, directory: Path) -> list[str]:
    """The lines that a tutorial prints."""
    printed = warm.run(EXAMPLES / f"{name}.py", output=directory / "printed.txt", directory=directory)
    assert [path.name for path in directory.iterdir()] == ["printed.txt"], "it leaves nothing behind"
    return printed.splitlines()


def numbers(lines: list[str], start: str) -> list[float]:
    """The numbers of the one line that starts with `start`, behind it."""
    (line,) = [line for line in lines if line.startswith(start)]
    return [float(n) for n in re.findall(r"[-+]?\d+(?:\.\d+)?", line.removeprefix(start))]


def test_all_tutorials_are_run() -> None:
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.slow
def test_mifo_on_a_laptop(tmp_path: Path) -> None:
    lines = run("1_mifo_on_a_laptop", tmp_path)
    before, after = numbers(lines, "mirrored    ")
    assert before < 0.05
    assert after > 0.1, "demonstrations teach what RL never samples"
    steps, phases, frozen = numbers([line.replace("%", "") for line in lines if "SFT phases" in line], "")
    assert (steps, phases > 2, round(frozen)) == (32 + 4 * phases, True, 50)


def test_one_callback(tmp_path: Path) -> None:
    lines = run("2_one_callback", tmp_path)
    assert numbers(lines, "half frozen ")[0] > numbers(lines, "plain ")[0], "it forgets less of A"
    still = [line for line in lines if "stand still" in line]
    assert len(still) == 6
    for line in still:
        share, frozen, free = re.findall(r"(\d[\d.e+-]*)", line.partition(" ")[2])
        assert share == "50.0"
        assert float(frozen) > float(free), "what A moved most stands still"


@pytest.mark.slow
def test_your_data_and_reward(tmp_path: Path) -> None:
    lines = run("3_your_data_and_reward", tmp_path)
    assert "[1.0, 0.3, 1.0]" in lines
    (scores,) = [line for line in lines if line.startswith("{'val/")]
    assert "val/small-holdout/avg@1" in scores
    assert float(re.findall(r"'val/avg@1': ([\d.]+)", scores)[0]) > 0.3, "of what the base never gets right"


@pytest.mark.slow
def test_a_method_and_its_controls(tmp_path: Path) -> None:
    lines = run("4_compare", tmp_path)
    arms = {name: numbers(lines, name) for name in ("highest entropy", "random tokens", "all tokens")}
    assert [len(found) for found in arms.values()] == [2, 4, 4], "learned, kept, and a difference for each seed"
    learned, kept, *differences = arms["all tokens"]
    reference = sum(arms["highest entropy"]) / 2
    assert sum(differences) / 2 == pytest.approx((learned + kept) / 2 - reference, abs=2e-3)
