"""Every callback in every foreign module: does it work exactly, or refuse clearly?

python -m benchmarks.foreign_modules             # the table
python -m benchmarks.foreign_modules gan lbfgs   # rows whose name has one of these words
"""

import copy
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

import mifo_callbacks
from benchmarks import foreign_manual as manual
from benchmarks import foreign_zoo as zoo
from benchmarks.foreign_judges import (
    Case,
    Watch,
    judge_buffer,
    judge_dropping,
    judge_freezing,
    judge_importance,
    judge_tokens,
)
from mifo_callbacks import (
    BufferPhaseSwitch,
    EntropyTokenSelection,
    GradientDropping,
    GradientFreezing,
    ImportanceEMA,
)

# what makes the callbacks of a column, the judged one last
COLUMNS: dict[str, tuple[Callable[[Case], list[Any]], Callable[..., str]]] = {
    "EntropyTokenSelection": (lambda case: [EntropyTokenSelection(0.2)], judge_tokens),
    "ImportanceEMA, phase": (lambda case: [ImportanceEMA(phase=case.phase)], judge_importance),
    "ImportanceEMA, step": (lambda case: [ImportanceEMA(phase=case.phase, accumulate="step")], judge_importance),
    "GradientFreezing, random": (
        lambda case: [GradientFreezing(0.5, "random", phase=case.phase, buffers=True)],
        judge_freezing,
    ),
    "GradientFreezing, rl_topk": (
        lambda case: [ImportanceEMA(phase=case.phase), GradientFreezing(0.5, phase=case.phase, buffers=True)],
        judge_freezing,
    ),
    "GradientDropping": (lambda case: [GradientDropping(0.5, phase=case.phase)], judge_dropping),
    "BufferPhaseSwitch": (lambda case: [BufferPhaseSwitch(3)], judge_buffer),
}


def fit(callbacks: list[Callback], module: Any, loader: Any, case: Case, **more: Any) -> None:
    """One quiet fit on the CPU."""
    ckpt_path = more.pop("ckpt_path", None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **case.options, **more}
    validation = zoo.Batches(["rl"] * 2) if isinstance(module, zoo.Validates) else None
    Trainer(callbacks=callbacks, **options).fit(module, case.wrap(loader), validation, ckpt_path=ckpt_path)


def judge(case: Case, column: str) -> str:
    """The verdict on one callback in one module."""
    make, judge_it = COLUMNS[column]
    callbacks, module, loader = make(case), case.module(), case.batches()
    watch = Watch(case, callbacks[-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            (case.run or plainly)(case, callbacks, watch, module, loader, lambda: make(case))
            wrong = judge_it(callbacks[-1], watch, module, loader)
        except (MisconfigurationException, ValueError) as error:
            line, where = str(error), Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            return f"{'refused' if OURS in where.parents and NEWLINE not in line else 'TRACEBACK'}: {line}"
        except Exception as error:
            return f"TRACEBACK: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    said = next((str(w.message) for w in caught if OURS in Path(w.filename).parents), "")
    if said and wrong:
        return f"warned: {said}"
    return f"WRONG: {wrong}" if wrong else "exact"


def plainly(case: Case, callbacks: list[Any], watch: Watch, module: Any, loader: Any, make: Any) -> None:
    """One fit."""
    fit([*case.others(), *callbacks, watch], module, loader, case)


def twice(case: Case, callbacks: list[Any], watch: Watch, module: Any, loader: Any, make: Any) -> None:
    """A second fit of the same module with the same objects, cut inside a phase."""
    fit([*callbacks, watch], module, loader, case, max_steps=6)
    fit([*callbacks, watch], module, loader, case)


def another(case: Case, callbacks: list[Any], watch: Watch, module: Any, loader: Any, make: Any) -> None:
    """The same callback objects in a second module."""
    fit(callbacks, case.module(), zoo.Batches(), case)
    fit([*callbacks, watch], module, loader, case)


def resumed(case: Case, callbacks: list[Any], watch: Watch, module: Any, loader: Any, make: Any) -> None:
    """Cut off inside a supervised phase and resumed with new objects, watched by one observer."""
    with tempfile.TemporaryDirectory() as folder:
        cut = make()
        watch.freezing = cut[-1]
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit([*cut, watch, save], case.module(), loader, case, max_steps=6, enable_checkpointing=True)
        watch.freezing = callbacks[-1]
        fit([*callbacks, watch], module, loader, case, ckpt_path=Path(folder) / "step=6.ckpt")


def in_fabric(case: Case, callbacks: list[Any], watch: Watch, module: Any, loader: Any, make: Any) -> None:
    """A loop of Fabric."""
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
    net, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.backward(net.loss(next(iter(loader))))
    optimizer.step()


def twins(case: Case, callbacks: list[Any], watch: Watch, module: Any, loader: Any, make: Any) -> None:
    """Two of each callback."""
    fit([*callbacks, *make(), watch], module, loader, case)


def copied(case: Case, callbacks: list[Any], watch: Watch, module: Any, loader: Any, make: Any) -> None:
    """The module is copied in training, and the copy used."""

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            double = copy.deepcopy(pl_module)
            if isinstance(callbacks[-1], EntropyTokenSelection):
                entropy = torch.rand(2, 5)
                double.select_tokens(entropy, entropy > -1)

    fit([*callbacks, watch, Copies()], module, loader, case)


class Backbone(zoo.Foreign):
    """For BackboneFinetuning, which frees the backbone in mid-run."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(6, 6)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return zoo.F.cross_entropy(self.net(self.backbone(batch["x"])), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def label(trainer: Any, module: Any, batch: Any) -> str:
    """Phase of a batch that is a tuple."""
    return str(batch[1]["phase"])


class InTuples(zoo.Batches):
    def __iter__(self) -> Any:
        return ((torch.zeros(1), batch) for batch in super().__iter__())


OURS, NEWLINE = Path(mifo_callbacks.__file__).parent, "\n"
CASES = [
    Case("plain", zoo.Foreign),
    Case("CNN with BatchNorm", zoo.Convolution),
    Case("GAN, two optimizers, toggle_optimizer", manual.TwoPlayers),
    Case("GAN, toggled by hand, weights clamped", manual.HandToggled),
    Case("manual optimization, two steps a batch", manual.Manual),
    Case("manual, optimizers(use_pl_optimizer=False)", manual.Raw),
    Case("manual, LBFGS without Lightning's wrapper", manual.RawLBFGS),
    Case("optimizer the Trainer does not know", manual.OwnOptimizer),
    Case("new optimizers at each phase", zoo.Recreated),
    Case("weights moved by hand, no optimizer", manual.ByHand),
    Case("mixture of experts, some without gradient", zoo.Experts),
    Case("low-rank adapters on a frozen base", zoo.Adapters),
    Case("torch.compile", zoo.Compiled),
    Case("tied weights", zoo.Tied),
    Case("parameter groups of different rates", zoo.Groups),
    Case("partly frozen", zoo.PartlyFrozen),
    Case("BackboneFinetuning frees weights in mid-run", Backbone, {"max_epochs": 3}, lambda: [BackboneFinetuning(1)]),
    Case("LBFGS", zoo.LBFGS),
    Case("SGD, Nesterov", zoo.Momentum),
    Case("Adafactor", zoo.Adafactor),
    Case("Muon and AdamW in one", zoo.Muon),
    Case("sparse gradients", zoo.SparseEmbedding),
    Case("layers made in configure_model", zoo.Configured),
    Case("layers made after the optimizer", zoo.AddedLate),
    Case("gradient accumulation", zoo.Foreign, {"accumulate_grad_batches": 2}),
    Case("gradient clipping", zoo.Foreign, {"gradient_clip_val": 0.1}),
    Case("bf16-mixed", zoo.Foreign, {"precision": "bf16-mixed"}),
    Case("16-mixed", zoo.Foreign, {"precision": "16-mixed"}),
    Case("bf16-true", zoo.Foreign, {"precision": "bf16-true"}),
    Case("64-true", zoo.Foreign, {"precision": "64-true"}),
    Case("WeightAveraging", zoo.Validates, {"val_check_interval": 3}, lambda: [WeightAveraging()]),
    Case("StochasticWeightAveraging", zoo.Foreign, {"max_epochs": 3}, lambda: [StochasticWeightAveraging(1e-2)]),
    Case(
        "StochasticWeightAveraging, BatchNorm",
        zoo.Convolution,
        {"max_epochs": 3},
        lambda: [StochasticWeightAveraging(1e-2)],
    ),
    Case("tuples, phase=callable", zoo.Tuples, phase=label, batches=InTuples),
    Case("tuples, no phase given", zoo.Tuples, batches=InTuples),
    Case(
        "CombinedLoader, phase=callable",
        zoo.Combined,
        phase=lambda trainer, module, batch: batch["a"]["phase"],
        wrap=lambda loader: CombinedLoader({"a": loader, "b": zoo.Batches()}, "min_size"),
    ),
    Case("several epochs", zoo.Foreign, {"max_epochs": 3}),
    Case("validation and sanity check in mid-phase", zoo.Validates, {"val_check_interval": 3}),
    Case("fit twice, one module", zoo.Foreign, run=twice),
    Case("fit twice, another module", zoo.Foreign, run=another),
    Case("resumed in mid-phase", zoo.Foreign, run=resumed),
    Case("copy.deepcopy of the module", zoo.Foreign, run=copied),
    Case("two equal callbacks", zoo.Foreign, run=twins),
    Case("Fabric", zoo.Foreign, run=in_fabric),
    Case("DDP x 2", zoo.Foreign, {"strategy": "ddp", "devices": 2}),
    Case("FSDP2 x 2", zoo.Configured, {"devices": 2}),
]


def in_processes(number: int, column: str) -> str:
    """A case of two ranks, whose launcher runs the command line again; the worst verdict of the two."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.foreign_modules", "--alone", str(number), column, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        verdicts = [path.read_text() for path in Path(folder).iterdir()]
    if len(verdicts) != 2:
        return f"TRACEBACK: {len(verdicts)} of 2 ranks ended; {done.stderr[-300:]}"
    return next((verdict for verdict in verdicts if verdict != "exact"), "exact")


def alone(number: int, column: str, folder: str) -> None:
    """One case in this process, which writes its verdict."""
    case = CASES[number]
    if case.name.startswith("FSDP2"):
        case.options["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    verdict = judge(case, column)
    Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(verdict)


def main() -> None:
    """Print the table, what was refused, and the counts."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--alone"]:
        alone(int(sys.argv[2]), *sys.argv[3:])
        return
    words = [word.lower() for word in sys.argv[1:]]
    counts: Counter[str] = Counter()
    reasons: dict[str, int] = {}
    print(f"| module | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for number, case in enumerate(CASES):
        if words and not any(word in case.name.lower() for word in words):
            continue
        cells = []
        for column in COLUMNS:
            verdict = in_processes(number, column) if case.options.get("devices", 1) > 1 else judge(case, column)
            kind = verdict.partition(":")[0]
            counts[kind] += 1
            cells.append(kind if kind == verdict else f"{kind} [{reasons.setdefault(verdict, len(reasons) + 1)}]")
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)
    print("\n" + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()) + "\n")
    for verdict, n in reasons.items():
        print(f"{n}. {verdict}")


if __name__ == "__main__":
    main()
