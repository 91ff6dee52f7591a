"""Which weights would MIFO freeze otherwise if its map were kept in bf16? After every RL phase of one run.

    python -m benchmarks.map_dtype                          # the embedded task, configs/tiny.yaml with methods/mifo
    python -m benchmarks.map_dtype --model DIR --phases 3   # a Hugging Face directory, steps as in benchmarks.callbacks

The run goes by its fp32 map; a bf16 map of the same movements is kept beside it, and both are asked for the half that
they would freeze. Printed: the share of frozen coordinates that the other map leaves free, Jaccard's index of the two
masks, and how many coordinates are tied at the threshold, where position decides, a frozen one.
"""

import argparse
import tempfile
from typing import get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from benchmarks import callbacks
from mifo_callbacks import ImportanceEMA, freezing_masks, update_importance
from mifo_callbacks.freezing_rules import Scope
from mifo_lightning.cli import main as command_line

TINY = ("configs/tiny.yaml", "configs/methods/mifo.yaml")


class Beside(ImportanceEMA):
    """ImportanceEMA, with a bf16 map of the same movements beside it."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__(alpha)
        self._half: dict[str, Tensor] = {}

    def _update(self, pl_module: LightningModule, names: list[str]) -> None:
        params = dict(pl_module.named_parameters())
        for name in names:
            start, end = self._start[name].clone(), params[name].detach()
            self._half[name] = update_importance(self._half.get(name), start, end, self.alpha).bfloat16()
        super()._update(pl_module, names)
        for scope in get_args(Scope):
            print(f"| {self.updates} | {scope} | {' | '.join(self._compared(scope))} |", flush=True)

    def _compared(self, scope: Scope) -> list[str]:
        """The cells of a row."""
        exact = freezing_masks(self._map.items(), scope=scope)
        half = freezing_masks(((name, scores.float()) for name, scores in self._half.items()), scope=scope)
        other = sum(int((mask & ~half.masks[name]).sum()) for name, mask in exact.masks.items())
        k = exact.frozen
        return [f"{other / k:.2%}", f"{(k - other) / (k + other):.4f}", f"{exact.tied / k:.2%}", f"{half.tied / k:.2%}"]


def embedded(options: list[str]) -> None:
    """A run of the embedded task from the command line."""
    with tempfile.TemporaryDirectory() as folder:
        files = [word for path in TINY for word in ("--config", path)]
        quiet = [f"--{key}=false" for key in ("trainer.logger", "trainer.enable_progress_bar")]
        quiet += ["--progress=null", "--data.val=null", f"--trainer.default_root_dir={folder}"]
        command_line(["fit", *files, "--importance.class_path", "benchmarks.map_dtype.Beside", *quiet, *options])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face directory; without it the embedded task")
    parser.add_argument("--phases", type=int, default=3, help="RL phases of a run with --model")
    given, options = parser.parse_known_args()
    torch.set_num_threads(1)
    print("| RL phase | scope | frozen by fp32 alone | Jaccard | tied, fp32 | tied, bf16 |")
    print("|---|---|---|---|---|---|", flush=True)
    if given.model:
        callbacks.run(given.model, rl_phases=given.phases, importance=Beside())
    else:
        embedded(options)


if __name__ == "__main__":
    main()
