"""The command line as tests use it: a short run, what a configuration prints, the line that bad input gets."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mifo_lightning.cli import main
from mifo_lightning.data.skills import Skills

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = str(CONFIGS / "tiny.yaml")
MIFO = ["--config", TINY, "--config", str(CONFIGS / "methods" / "mifo.yaml")]
BASES = sorted(p.name for p in CONFIGS.glob("*.yaml") if p.stem not in ("defaults", "monitors"))
SHORT = {
    "trainer.logger": "false",
    "trainer.enable_checkpointing": "false",
    "data.schedule.rl_steps": "3",
    "data.schedule.prompts_per_step": "8",
    "data.schedule.sft_batch": "8",
    "data.train.init_args.count": "64",
    "data.val.init_args.count": "16",
    "buffer.size": "8",
    "buffer.max_accuracy": "0.5",
}


def short(root: Path, **changes: str) -> list[str]:
    """Arguments of a run of MIFO of 3 RL steps with SFT phases."""
    pairs = {**SHORT, "trainer.default_root_dir": str(root), **{k.replace("__", "."): v for k, v in changes.items()}}
    return ["fit", *MIFO, *(text for key, value in pairs.items() for text in (f"--{key}", value))]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The single line that bad input gets."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def write_rows(path: Path, demonstrated: bool) -> None:
    rows = Skills(["addition", "mirrored"], 64).rows()
    lines = [json.dumps(row if demonstrated else row | {"target": None}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
