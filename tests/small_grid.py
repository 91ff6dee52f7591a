"""A grid of two arms for the tests of the ablation runner."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BASE = "mifo_lightning/assets/base"
GRID: dict[str, Any] = {
    "name": "two arms",
    "question": "Does the runner run?",
    "primary": "avg@1",
    "metrics": ["addition/avg@1"],
    "reference": "mifo",
    "primary_contrast": ["interleave, half + lr", "mifo"],
    "config": ["tiny"],
    "bases": {"shipped": BASE},
    "seeds": [0, 1],
    "jobs": 2,
    "set": {
        "data.schedule.rl_steps": 3,
        "data.schedule.prompts_per_step": 8,
        "data.schedule.sft_batch": 8,
        "data.train.init_args.count": 64,
        "data.val.init_args.count": 16,
        "buffer.size": 8,
        "buffer.max_accuracy": 0.5,
        "checkpoint.every": 1,
    },
    "arms": {
        "mifo": {"configs": ["methods/mifo"]},
        "interleave, half + lr": {"configs": ["methods/interleave"], "set": {"model.optimizer.sft.lr": 5.0e-4}},
    },
}


def write(root: Path, **changes: Any) -> Path:
    """An ablation file of two arms, one base and two seeds, with some keys changed; None leaves a key out."""
    content = {key: value for key, value in {"out": str(root / "out"), **GRID, **changes}.items() if value is not None}
    path = root / "ablation.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
