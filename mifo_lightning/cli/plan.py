"""`mifo plan --config ...`: what a run will need on each GPU, without data, weights or a GPU."""

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

import mifo_lightning
from mifo_lightning.cli.command_line import MifoCLI, make_cli
from mifo_lightning.common.errors import require
from mifo_lightning.planning.memory import Plan
from mifo_lightning.planning.speed import GPU, speed
from mifo_lightning.planning.table import speed_line, table, verdict
from mifo_lightning.planning.workload import workload_of
from mifo_lightning.policy.frozen import freeze_named
from mifo_lightning.policy.loading import locate
from mifo_lightning.policy.pretrained import quiet_loading, read_blueprint

SHAPES = Path(mifo_lightning.__file__).parent / "assets" / "shapes"
PACKAGED = {
    "Qwen/Qwen2.5-Math-1.5B": "Qwen2.5-Math-1.5B",
    "Qwen/Qwen2.5-Math-7B": "Qwen2.5-Math-7B",
    "meta-llama/Llama-3.1-70B": "Llama-3.1-70B",
}
"""Models whose config.json travels with the package: a plan of them needs no hub."""


class PlanCLI(MifoCLI):
    """The command line of a run, and what it would run on; nothing is built."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flags of a plan."""
        super().add_arguments_to_parser(parser)
        lengths = "Tokens of a usual %s; by default the longest that is allowed."
        parser.add_argument("--gpus", type=int | None, default=None, help="Data-parallel GPUs; null: as the Trainer's.")
        parser.add_argument("--gpu_memory", type=float, default=GPU().memory, help="GB (10^9 bytes) of each.")
        parser.add_argument("--gpu_tflops", type=float, default=GPU().tflops, help="Dense peak of each, 10^12 / s.")
        parser.add_argument("--gpu_bandwidth", type=float, default=GPU().bandwidth, help="GB per second of each.")
        parser.add_argument("--prompt_tokens", type=int | None, default=None, help=lengths % "prompt")
        parser.add_argument("--response_tokens", type=int | None, default=None, help=lengths % "response")

    def _set_seed(self) -> None:
        """Nothing is random here."""

    def instantiate_classes(self) -> None:
        """Check the configuration, and build nothing."""
        self.check_configuration(self.config)
        for name in ("gpus", "gpu_memory", "gpu_tflops", "gpu_bandwidth", "prompt_tokens", "response_tokens"):
            value = self.config[name]
            require(name, value, value is None or value > 0, "above 0")


def planned(arguments: list[str]) -> tuple[Plan, Any, list[str]]:
    """The plan of a command line, its configuration, and what is not known without the data.

    Args:
        arguments: After `plan`.

    Raises:
        InputError: The configuration is not allowed, or its model cannot be traced.
    """
    config = make_cli(arguments, run=False, kind=PlanCLI).config
    work, said = workload_of(config, config.gpus, config.prompt_tokens, config.response_tokens)
    model, trust = config.model.model, config.model.loading.trust_remote_code
    directory = str(SHAPES / PACKAGED[model]) if model in PACKAGED else locate(model)
    with quiet_loading():
        shape = read_blueprint(model, directory, trust)
    freeze_named(shape, config.model.loading.frozen)
    return Plan(work, shape), config, said


def plan(arguments: list[str]) -> str:
    """What `mifo plan` prints; arguments and errors as of `planned`."""
    found, config, said = planned(arguments)
    work, gpu = found.work, GPU(config.gpu_memory, config.gpu_tflops, config.gpu_bandwidth)
    hoped = speed(work, gpu, found.shape)
    strategy = "FSDP2" if work.sharded else "DDP" if work.ranks > 1 else "one GPU"
    head = [
        f"{config.model.model}: {found.sizes.total / 1e9:.3g} billion weights, "
        f"{'bf16-mixed' if work.bf16 else '32-true'}, {work.ranks} x {gpu.memory:g} GB, {strategy}; GB on each",
        *(f"note: {line}" for line in said),
    ]
    return "\n".join([*head, "", table(found.moments), "", *verdict(found, gpu.memory), speed_line(hoped)])
