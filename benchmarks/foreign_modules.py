"""Every callback in every foreign module: does it work exactly, or refuse clearly?

python -m benchmarks.foreign_modules             # the table
python -m benchmarks.foreign_modules gan lbfgs   # rows whose name has one of these words
"""

import copy
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mifo_callbacks
from benchmarks import foreign_zoo as zoo
from mifo_callbacks import (
    BufferPhaseSwitch,
    EntropyTokenSelection,
    GradientDropping,
    GradientFreezing,
    ImportanceEMA,
    dropping_mask,
)


@dataclass
class Case:
    """One row: a module, and how it is trained."""

    name: str
    module: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    others: Callable[[], list[Callback]] = list
    phase: Any = "phase"
    batches: Callable[[], zoo.Batches] = zoo.Batches
    wrap: Callable[[zoo.Batches], Any] = lambda loader: loader
    run: Callable[..., None] | None = None


@dataclass
class Step:
    """One optimizer step: its number in the fit, its phase, and gradients and weights of the parameters stepped."""

    number: int
    label: str
    gradients: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class Watch(Callback):
    """Weights and buffers before and after every batch, and every optimizer step."""

    def __init__(self, case: Case, freezing: Any) -> None:
        self.case, self.freezing = case, freezing
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.labels: list[str] = []
        self.masks: list[dict[str, Tensor]] = []
        self.steps: list[Step] = []
        self.names: list[set[str]] = []  # what was trainable at some batch start so far

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.number = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._skip_backward:
            return
        trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        self.names.append(trained.union(*self.names[-1:]))
        phase = self.case.phase
        known = batch[1] if isinstance(batch, (tuple, list)) else batch
        self.labels.append(phase(trainer, pl_module, batch) if callable(phase) else known[phase])
        self.before.append(state(pl_module))

        running: list[Any] = []  # an optimizer may be made of others

        def starts(optimizer: Any, *args: Any) -> None:
            running.append((optimizer, owned(optimizer, pl_module)))

        def ends(optimizer: Any, *args: Any) -> None:
            _, before = running.pop()
            if not running:
                found = {n: full(p.grad) for n, p in pl_module.named_parameters() if n in before and p.grad is not None}
                self.steps.append(Step(self.number, self.labels[-1], found, before, owned(optimizer, pl_module)))
                self.number += 1

        self.handles = [register_optimizer_step_pre_hook(starts), register_optimizer_step_post_hook(ends)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.fit_loop._skip_backward:
            return
        for handle in self.handles:
            handle.remove()
        self.after.append(state(pl_module))
        masks = getattr(self.freezing, "masks", {})
        self.masks.append({name: mask.clone() for name, mask in masks.items()})

    def spans(self, label: str) -> list[range]:
        """Batches of every phase of this label."""
        changes = [i for i in range(1, len(self.labels)) if self.labels[i] != self.labels[i - 1]]
        found = itertools.pairwise([0, *changes, len(self.labels)])
        return [range(start, end) for start, end in found if self.labels[start] == label]


def full(tensor: Tensor) -> Tensor:
    """A copy; of all shards, dense."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return (tensor.to_dense() if tensor.layout != torch.strided else tensor).clone()


def owned(optimizer: Any, module: LightningModule) -> dict[str, Tensor]:
    """Copies of the parameters that `optimizer` steps, by name."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: full(p) for name, p in module.named_parameters() if id(p) in known}


def state(module: LightningModule) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name."""
    return {name: full(t) for name, t in [*module.named_parameters(), *module.named_buffers()]}


# each judge says what is wrong, or nothing


def judge_freezing(freezing: GradientFreezing, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """Frozen coordinates and buffers bit-identical in the phase, free ones moved, all free afterwards."""
    buffers = {name for name, _ in module.named_buffers()}
    for span in watch.spans("sft"):
        start, last = watch.before[span[0]], watch.after[span[-1]]
        if not watch.masks[span[0]]:
            return "nothing was frozen"
        for i in span:
            for name, mask in watch.masks[i].items():
                if not torch.equal(watch.after[i][name][mask], start[name][mask]):
                    return f"frozen coordinates of {name} moved in batch {i}"
            for name in buffers:
                if not torch.equal(watch.after[i][name], start[name]):
                    return f"buffer {name} moved in batch {i}"
        if not any((last[name] != start[name])[~mask].any() for name, mask in watch.masks[span[0]].items()):
            return "free coordinates did not move"
    return "masks outside of the phase" if any(watch.masks[i] for span in watch.spans("rl") for i in span) else ""


def judge_importance(importance: ImportanceEMA, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """The map is the formula's, from weights copied at the edges of phases, or around optimizer steps."""
    expected: dict[str, Tensor] = {}
    if importance.accumulate == "phase":
        edges = [(watch.names[s[-1]], watch.before[s[0]], watch.after[s[-1]]) for s in watch.spans("rl")]
    else:
        edges = [(set(step.before), step.before, step.after) for step in watch.steps if step.label == "rl"]
    for names, before, after in edges:
        for name in names:
            moved = (after[name] - before[name]).square()
            expected[name] = 0.5 * expected[name] + 0.5 * moved if name in expected else moved
    found = {name: full(value) for name, value in (importance.importance or {}).items()}
    if missing := watch.names[-1] - found.keys():
        return f"no score for {sorted(missing)[0]}"
    for name, value in found.items():
        if not torch.allclose(value, expected.get(name, torch.zeros(())), rtol=1e-5, atol=1e-12):
            return f"scores of {name} are not the formula's"
    return ""


def judge_dropping(dropping: GradientDropping, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """Each step's gradient is exactly 0 under the mask of its number and not all 0 elsewhere."""
    everything = [name for name, _ in module.named_parameters() if name in watch.names[-1]]
    steps = [step for step in watch.steps if step.label == "sft"]
    for step in steps:
        for name, gradient in step.gradients.items():
            if gradient.any() and name in everything:
                mask = dropping_mask(gradient.shape, 0.5, 0, step.number, everything.index(name))
                if gradient[mask].any():
                    return f"gradient of {name} is not dropped in step {step.number}"
    return "" if steps else "no step was seen"


def judge_tokens(selection: EntropyTokenSelection, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """The fifth with the highest entropy."""
    if not module.selected or not all(getattr(module, "could_select", [])):
        return "select_tokens was not there"
    for entropy, mask in module.selected:
        if set(entropy[mask].tolist()) != set(entropy.flatten().topk(entropy.numel() // 5).values.tolist()):
            return "not the tokens of highest entropy"
    return ""


def judge_buffer(switch: BufferPhaseSwitch, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """Every second question fails, and three of them are pushed together."""
    failed = list(dict.fromkeys(i % 16 for i in range(0, len(watch.labels), 2)))
    expected = [failed[i : i + 3] for i in range(0, len(failed) - 2, 3)]
    return "" if loader.pushed[: len(expected)] == expected else f"pushed {loader.pushed}"


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
    Case("GAN, two optimizers, toggle_optimizer", zoo.TwoPlayers),
    Case("GAN, toggled by hand, weights clamped", zoo.HandToggled),
    Case("manual optimization, two steps a batch", zoo.Manual),
    Case("manual, optimizers(use_pl_optimizer=False)", zoo.Raw),
    Case("manual, LBFGS without Lightning's wrapper", zoo.RawLBFGS),
    Case("optimizer the Trainer does not know", zoo.OwnOptimizer),
    Case("new optimizers at each phase", zoo.Recreated),
    Case("weights moved by hand, no optimizer", zoo.ByHand),
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
