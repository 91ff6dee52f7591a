"""The report of an ablation: what it says first, that nothing from data becomes markup, what is left out or missing."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report import main, write_report
from experiments.results import Cell, learning_curves, retention, retention_by_phase
from mifo_lightning.errors import InputError

SOURCES = ["addition", "mirrored", "sorting", "reversal"]
GROUPS = ["embedding", *(f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp", "norm")), "head"]
PAPER = {
    "rl": 0.72, "sft": 0.55, "sft_then_rl": 0.80, "relift": 0.80, "interleave": 0.79, "mifo_es": 0.80, "mifo_pf": 0.80,
    "mifo": 0.86, "mifo_dagger": 0.805, "luffy": 0.70, "srft": 0.75, "random freeze + ES": 0.81, "half lr": 0.80,
}  # fmt: skip
EVIL = "<script>alert(1)</script>"
RL_STEPS = 120
Record = dict[str, Any]


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[Record]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def counts(rng: np.random.Generator, kept: float) -> Record:
    return {
        source: {"questions": 64, "solved": 50, "retained": int(rng.binomial(50, kept)), "gained": int(rng.integers(9))}
        for source in SOURCES
    }


def summary(rng: np.random.Generator, arm: str, score: float) -> Record:
    """What a run records with every monitor on: an RL phase, then an SFT phase, several times."""
    frozen = 0.5 if arm.startswith(("mifo", "random")) else 0.0
    order = [kind for _ in range(6) for kind in (["rl", "sft"] if arm not in ("rl", "sft") else [arm])]
    phases = [{"phase": kind, "number": order[: i + 1].count(kind), "rl_step": 20 * order[: i + 1].count("rl")}
              for i, kind in enumerate(order)]  # fmt: skip
    size = {kind: rng.gamma(4, 0.05 if kind == "rl" else 0.2, len(order)) for kind in ("rl", "sft")}
    kl = [float(size[p["phase"]][i]) for i, p in enumerate(phases)]
    layers = [
        {g: {"l2": float(k * rng.uniform(1, 3)), "changed": 0.9 if p["phase"] == "sft" else 0.6} for g in GROUPS}
        for p, k in zip(phases, kl, strict=True)
    ]
    account = {"optimizer_steps": 120, "questions": 3840, "demonstrations": 700, "generated_tokens": 4.1e5,
               "scored_tokens": 5.2e5, "trained_tokens": 6.1e5, "flops": 1.3e12, "seconds": 9.5}  # fmt: skip
    scores = {f"{s}/avg@1": float(score + rng.normal(0, 0.01) - 0.05 * i) for i, s in enumerate(SOURCES)}
    return {
        "before": {"avg@1": 0.6, **{f"{source}/avg@1": 0.6 for source in SOURCES}},
        "after": {"avg@1": score, **scores},
        "optimizer_steps": 150, "sft_phases": 6, "seconds": {"rollout": 3.0},
        "forgetting": {"seconds": 1.0, "responses": 900, "run": counts(rng, 0.8), "phases": [
            {**p, "sources": counts(rng, float(np.exp(-k)))} for p, k in zip(phases, kl, strict=True)]},
        "phase_kl": {"seconds": 1.0, "phases": [
            {**p, "kl": k, "kl_response": 9 * k} for p, k in zip(phases, kl, strict=True)]},
        "layer_updates": {"seconds": 0.2, "phases": [
            {**p, "steps": 20, "layers": one} for p, one in zip(phases, layers, strict=True)]},
        "overlap": {"seconds": 0.1, "phases": [
            {"number": i, "rl_step": 20 * i, "frozen": frozen, "gradient": 0.55, "gradient_squared": 0.6}
            for i in range(1, 7) if frozen]},
        "costs": {"rl": account, "sft": account, "distinct_questions": 3000, "distinct_demonstrations": 650,
                  "callbacks": {"ImportanceEMA": 0.31, "GradientFreezing": 0.12, "Forgetting": 1.0}},
    }  # fmt: skip


def history(rng: np.random.Generator, arm: str) -> list[Record]:
    rows: list[Record] = []
    accuracy = np.array([0.3, 0.0, 0.95, 0.95])
    for step in range(RL_STEPS + 1):
        rl_step = 0 if arm == "sft" else step
        if step % 20 == 0:
            keys = [f"forgetting/{source}/accuracy" for source in SOURCES]
            rows.append({"step": step, "rl_step": rl_step, **dict(zip(keys, accuracy.clip(0, 1), strict=True))})
            accuracy = accuracy + rng.normal(0, 0.05, 4) + [0.08, 0.12, -0.03, -0.04]
        if step:
            in_sft = arm == "sft" or (arm != "rl" and step % 20 == int(rng.integers(3)))
            row = {"step": step, "rl_step": rl_step, "phase/is_sft": float(in_sft), "phase/rl_step": float(rl_step)}
            reward = {} if arm == "sft" else {"rollout/reward": 0.3 + 0.5 * step / RL_STEPS + rng.normal(0, 0.05)}
            rows.append({**row, **reward})
    return rows


def make(
    root: Path, arms: dict[str, float], bases: int = 3, seeds: int = 5, noise: float = 0.01, primary: str = "avg@1"
) -> Path:
    """An ablation as the runner leaves it, every monitor on; `arms` are mean scores."""
    base_names, seed_names = [f"seed{i}" for i in range(bases)], list(range(seeds))
    record = {
        "name": "paper_table", "question": "Does MIFO beat SFT then RL at equal compute?", "primary": primary,
        "metrics": [f"{s}/avg@1" for s in SOURCES], "reference": next(a for a in arms if a in ("sft_then_rl", "ref")),
        "design": "crossed", "command": "python -m experiments.ablation --config x.yaml", "commit": "0123abc",
        "arms": [{"name": a, "directory": f"arm{i}", "configs": ["configs/tiny.yaml"], "set": {"model.lr": 0.1}}
                 for i, a in enumerate(arms)],
        "bases": base_names, "seeds": seed_names,
    }  # fmt: skip
    cells = []
    for i, (arm, level) in enumerate(arms.items()):
        for b, base in enumerate(base_names):
            for seed in seed_names:
                rng = np.random.default_rng([b, seed])
                shared, own = rng.normal(0, 0.03), np.random.default_rng([i, b, seed])
                directory = f"arm{i}/{base}/seed{seed}"
                write(root / directory / "summary.json", summary(own, arm, level + shared + own.normal(0, noise)))
                write_lines(root / directory / "history.jsonl", history(own, arm))
                rows = [
                    {"step": 9, "stage": "val", "source": s, "prompt": "12+3=", "response": f"{EVIL} & {s}",
                     "truth": "15", "reward": 1.0}
                    for s in SOURCES
                ]  # fmt: skip
                write_lines(root / directory / "samples.jsonl", rows)
                cells.append({"arm": arm, "base": base, "seed": seed, "directory": directory, "status": "done",
                              "error": None, "seconds": 17.5})  # fmt: skip
    write(root / "ablation.json", record)
    write(root / "cells.json", cells)
    return root


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    write(path, value)


class Page(HTMLParser):
    """Checks that tags nest, and collects text, tags and attributes."""

    VOID = {"meta", "link", "br", "img", "input"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def verdict(root: Path) -> str:
    """The sentences before the first question."""
    write_report(root)
    return (root / "report.md").read_text().split("## ")[0].replace("\\", "")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make(tmp_path_factory.mktemp("small"), {"ref": 0.5, f"mifo {EVIL} $\\x$": 0.6, "sft": 0.5}, bases=2, seeds=3)
    fail = {"status": "failed", "error": f"model.lr: {EVIL} is not allowed"}
    edit(root / "cells.json", lambda cells: (cells[3].update(fail), cells.pop()))
    (root / "arm1/seed0/seed0/samples.jsonl").open("a").write('{"half": ')
    write_report(root)
    return root


def test_page_is_self_contained_and_nothing_from_data_is_markup(small: Path) -> None:
    page = Page(small / "report.html")
    assert "script" not in page.tags
    assert EVIL in page.text  # shown as text: arm name, error and response
    assert f"{EVIL} & addition" in page.text
    assert f"model.lr: {EVIL} is not allowed" in page.text
    assert not [value for name, value in page.attributes if name in ("src", "href") and value]
    links = [value for name, value in page.attributes if name == "xlink:href"]
    assert links
    assert all(value and value.startswith("#") for value in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(http" not in (small / "report.html").read_text()
    assert EVIL not in (small / "report.md").read_text()


def test_pictures_take_the_colour_of_the_page_and_share_no_identifier(small: Path) -> None:
    page = Page(small / "report.html")
    text = (small / "report.html").read_text()
    assert "currentColor" in text
    assert "#010203" not in text
    assert "prefers-color-scheme: dark" in text
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text))
    assert used <= set(identifiers)
    assert "image" not in page.tags


def test_the_same_results_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    again = write_report(small, tmp_path / "results" / "again")
    assert again.read_bytes() == (small / "report.html").read_bytes()
    assert (again.parent / "report.md").read_bytes() == (small / "report.md").read_bytes()


def test_failed_and_missing_runs_are_listed(small: Path) -> None:
    text = (small / "report.md").read_text()
    assert "2 of 18 runs are not done" in text
    assert re.search(r"\| ref \| seed1 \| 0 \| failed \|", text)
    assert re.search(r"\| sft \| seed1 \| 2 \| missing \|", text)
    assert "5 of 6" in text


def test_first_sentence_names_the_winner_and_its_lead(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "good": 0.6, "same": 0.5, "bad": 0.3})))
    assert re.search(
        r"good has the highest avg@1, 0\.\d+ \[.*\], and is significantly ahead of ref, by \+0\.\d+ \[", text
    )
    assert re.search(r"Significantly behind ref: bad by -0\.\d+ \[", text)
    assert "No other difference is significant." in text
    assert "same by" not in text
    assert "There are 3 bases" in text


def test_no_difference_is_said_to_be_none(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "a": 0.5, "b": 0.5}, noise=0.03)))
    assert "No arm differs significantly from ref." in text
    assert "significantly ahead" not in text.replace("not significantly ahead", "")


def test_too_few_runs_and_one_base_are_said(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "a": 0.9}, bases=1, seeds=3)))
    assert "is not significantly ahead of ref" in text
    assert "no difference can be significant" in text
    assert "nothing is known about other bases" in text


def test_a_reference_without_a_result_compares_nothing(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.9}, bases=1, seeds=2))
    edit(root / "cells.json", lambda cells: [cell.update(status="failed") for cell in cells if cell["arm"] == "ref"])
    assert "Nothing can be compared: the reference ref has no run" in verdict(root)


def test_what_no_monitor_recorded_is_left_out_in_one_line(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=2))
    text = verdict(root) + (root / "report.md").read_text().replace("\\", "")
    for monitor in ("history", "forgetting", "phase_kl", "layer_updates", "overlap", "costs", "samples"):
        assert f"Not recorded: the monitor {monitor} would show it." in text


def test_scores_are_sorted_and_the_reference_is_marked(small: Path) -> None:
    table = (small / "report.md").read_text().split("highest first:")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:-1]]
    means = [float(row[1].split()[0]) for row in rows]
    assert means == sorted(means, reverse=True)
    assert "ref (reference)" in [row[0] for row in rows]


def test_command_reports_into_out_and_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bare(make(tmp_path / "runs", {"ref": 0.5, "a": 0.6}, bases=1, seeds=2))
    monkeypatch.setattr(sys, "argv", ["report", str(root), "--out", str(tmp_path / "docs")])
    main()
    assert (tmp_path / "docs" / "report.html").is_file()
    assert "python -m experiments.ablation --config x.yaml" in (tmp_path / "docs" / "report.md").read_text()
    edit(root / "ablation.json", lambda record: record.update(reference="rlx"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "'rlx'" in line
    assert "'ref', 'a'" in line


@pytest.mark.parametrize("name", ["ablation.json", "cells.json", "arm0/seed0/seed0/summary.json"])
def test_a_file_that_is_not_there_or_not_json_is_named(name: str, tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=1))
    (root / name).write_text("{")
    with pytest.raises(InputError, match=rf"{re.escape(name)} is not JSON"):
        write_report(root)
    (root / name).unlink()
    with pytest.raises(InputError, match=rf"{re.escape(name)} cannot be read"):
        write_report(root)
    write(root / name, [{"arm": "ref"}])
    with pytest.raises(InputError, match=r"summary\.json" if "arm0" in name else r"ablation\.json or cells\.json"):
        write_report(root)


def bare(root: Path) -> Path:
    """The same ablation with nothing but the final scores."""
    for path in root.glob("arm*/*/*"):
        edit(path / "summary.json", lambda record: [record.pop(key) for key in list(record) if key != "after"])
        (path / "history.jsonl").unlink()
        (path / "samples.jsonl").unlink()
    return root


def cell(history: list[Record] | None = None, phases: list[Record] | None = None) -> Cell:
    return Cell("a", "b", 0, Path(), "done", None, 1.0, {"forgetting": {"phases": phases or []}}, history or [])


def test_learning_curves_average_runs_and_carry_accuracies_forward() -> None:
    def run(shift: float) -> Cell:
        rewards = [{"step": i, "rl_step": i, "rollout/reward": i + shift, "phase/is_sft": 0.0} for i in range(1, 5)]
        first = {"step": 0, "rl_step": 0, "forgetting/x/accuracy": 0.9}
        later = {"step": 2, "rl_step": 2, "forgetting/x/accuracy": 0.5 + shift}
        sft = {"step": 3, "rl_step": 2, "phase/is_sft": 1.0}
        return cell([first, *rewards[:2], later, *([sft] if shift else []), *rewards[2:]])

    data = learning_curves([run(0.0), run(0.2)], bins=4)
    assert data is not None
    assert data.axis == "rl_step"
    np.testing.assert_allclose(data.edges, [-1, 0, 1, 2, 3, 4], atol=1e-12)
    np.testing.assert_allclose(data.reward, [np.nan, np.nan, 1.1, 2.1, 3.1, 4.1])
    np.testing.assert_allclose(data.accuracy["x"], [0.9, 0.9, 0.9, 0.6, 0.6, 0.6])
    np.testing.assert_allclose(data.sft, [0, 0, 0, 0.5, 0, 0])
    coarse = learning_curves([run(0.0)], bins=2)
    assert coarse is not None
    np.testing.assert_allclose(coarse.reward[2:], [1.5, 3.5])
    assert learning_curves([cell()]) is None


def test_an_arm_without_rl_goes_by_optimizer_steps() -> None:
    rows = [{"step": i, "rl_step": 0, "phase/is_sft": 1.0} for i in range(1, 11)]
    data = learning_curves([cell(rows)])
    assert data is not None
    assert data.axis == "step"
    assert data.edges[-1] == 10
    assert data.sft[2:].tolist() == [1.0] * 10


def test_retention_pools_counts() -> None:
    one = {"x": {"solved": 10, "retained": 9}, "y": {"solved": 30, "retained": 15}}
    two = {"x": {"solved": 0, "retained": 0}, "y": {"solved": 10, "retained": 10}}
    assert retention([one, two]) == pytest.approx(34 / 50)
    assert retention([one, two], "x") == pytest.approx(0.9)
    assert retention([two], "x") is None

    def phase(number: int, retained: int) -> Record:
        return {"phase": "sft", "number": number, "sources": {"x": {"solved": 10, "retained": retained}}}

    rl = {"phase": "rl", "number": 1, "sources": {"x": {"solved": 10, "retained": 0}}}
    runs = [cell(phases=[rl, phase(1, 8), phase(2, 6), phase(3, 1)]), cell(phases=[phase(1, 10), phase(2, 10)])]
    runs.append(cell(phases=[phase(1, 9)]))
    assert retention_by_phase(runs, "x") == [pytest.approx(0.9), pytest.approx(0.8)]  # the third only one of three has


@pytest.mark.slow
def test_page_of_a_large_ablation_is_small(tmp_path: Path) -> None:
    page = write_report(make(tmp_path, PAPER))
    assert page.stat().st_size < 2_000_000
    text = page.with_name("report.md").read_text()
    assert "Not recorded" not in text
    assert "**mifo has the highest avg@1" in text
