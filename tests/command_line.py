"""The command line as tests use it: a short run, what a configuration prints, the line that bad input gets."""

import json
import os
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from mifo_lightning.cli import main
from mifo_lightning.cli.command_line import MifoCLI, make_cli
from mifo_lightning.cli.packaged import find
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


PRINTED: dict[tuple[str, ...], dict[str, Any]] = {}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `--print_config` prints; of shipped files, which no test writes, it is remembered."""
    key = (os.getcwd(), *arguments)
    if key in PRINTED:
        return deepcopy(PRINTED[key])
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    files = [find(word) for flag, word in pairwise(arguments) if flag == "--config"]
    if all(file and file.is_relative_to(CONFIGS) for file in files) and "-c" not in arguments and "=" not in str(key):
        PRINTED[key] = deepcopy(config)
    return config


def fitted(*arguments: str) -> MifoCLI:
    """The command line of `fit` with these arguments after training, without evaluation and what it writes then."""
    cli = make_cli([*arguments], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli


def settings(cli: MifoCLI) -> dict[str, Any]:
    """Its resolved configuration, without the names of its files."""
    return {key: value for key, value in cli.config.as_dict().items() if key != "config"}


def layers(*names: str) -> list[str]:
    """Flags that lay these shipped configurations over each other."""
    return [text for name in names for text in ("--config", str(CONFIGS / f"{name}.yaml"))]


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key of every value that is no mapping -> it."""
    if not isinstance(config, dict) or not config:
        return {prefix[:-1]: config}
    return {key: value for name, inner in config.items() for key, value in flat(inner, f"{prefix}{name}.").items()}


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
