"""An ablation as the runner leaves it, with what every monitor would have recorded: made up, from a seed."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from mifo_lightning.lab.report import write_report

SOURCES = ["addition", "mirrored", "sorting", "reversal"]
GROUPS = ["embedding", *(f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp", "norm")), "head"]
PAPER = {
    "rl": 0.72, "sft": 0.55, "sft_then_rl": 0.80, "relift": 0.80, "interleave": 0.79, "mifo_es": 0.80, "mifo_pf": 0.80,
    "mifo": 0.86, "mifo_dagger": 0.805, "luffy": 0.70, "srft": 0.75, "random freeze + ES": 0.81, "half lr": 0.80,
}  # fmt: skip
EVIL = "</td><script>alert(1)</script>"
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
    root: Path,
    arms: dict[str, float],
    bases: int = 3,
    seeds: int = 5,
    noise: float = 0.01,
    primary: str = "avg@1",
    design: str = "crossed",
) -> Path:
    """An ablation as the runner leaves it, every monitor on; `arms` are mean scores."""
    base_names, seed_names = [f"seed{i}" for i in range(bases)], list(range(seeds))
    record = {
        "name": "paper_table", "question": "Does MIFO beat SFT then RL at equal compute?", "primary": primary,
        "metrics": [f"{s}/avg@1" for s in SOURCES], "reference": next(a for a in arms if a in ("sft_then_rl", "ref")),
        "trade_off": {"learned": ["addition/avg@1", "mirrored/avg@1"], "kept": ["sorting/avg@1", "reversal/avg@1"]},
        "setting": "A small model.\nFour skills.", "contrasts": [list(arms)[:2]],
        "design": design, "command": "python -m mifo_lightning.lab ablation --config x.yaml", "commit": "0123abc",
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


def bare(root: Path) -> Path:
    """The same ablation with nothing but the final scores."""
    for path in root.glob("arm*/*/*"):
        edit(path / "summary.json", lambda record: [record.pop(key) for key in list(record) if key != "after"])
        (path / "history.jsonl").unlink()
        (path / "samples.jsonl").unlink()
    return root


def verdict(root: Path) -> str:
    """The sentences before the first question."""
    write_report(root)
    return (root / "report.md").read_text().split("## ")[0].replace("\\", "")


def rows_of(root: Path, caption: str) -> list[list[str]]:
    """Header and rows of the table whose caption has these words."""
    text = (root / "report.md").read_text().replace("\\", "")
    table = re.split(rf"{re.escape(caption)}.*:\n\n", text)[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in [table[0], *table[2:]]]
