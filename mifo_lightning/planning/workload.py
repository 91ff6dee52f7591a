"""What of a run's configuration decides the memory and the time of one of its processes."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.adapter import Adapter
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.in_process import InProcessEngine


@dataclass(frozen=True)
class Workload:
    """What one process does, at its largest.

    Args:
        ranks: Data-parallel processes.
        cpu: Whether it runs on a CPU.
        sharded: Whether they share weights, gradients and moments (FSDP2); otherwise each has all (DDP).
        bf16: Whether passes run in bf16 (bf16-mixed); weights, gradients and moments are fp32 either way.
        checkpointing: Whether layers are recomputed in the backward pass.
        share_prompts: As `model.loading.share_prompts`.
        adapter: What is trained in place of the weights; None trains the weights.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
        prompts: Questions of a rollout on each process.
        group: Responses to each.
        passes: Over a rollout.
        minibatches: Optimizer steps of each pass.
        micro_batches: Chunks of an optimizer step.
        micro_batch_tokens: Most tokens of a chunk; None goes by `micro_batches`.
        engine_rows: Most responses decoded at once.
        cache_tokens: Most tokens whose keys and values are held at once.
        entropy_gradient: Whether the loss has an entropy bonus.
        scored: Whether a rollout is scored once more, for old log-probabilities or a mask.
        reference: Whether there is a reference model.
        teacher: Whether SDFT's teacher has weights of its own, as many as are trained.
        shown: Tokens by which prompts of SDFT's teacher are longer; 0: there is none.
        demonstrations: Of an SFT step on each process; 0: there are no SFT steps.
        demonstration: Tokens of each.
        moments: model.optimizer.moments.
        importance: Bytes of the importance map for each weight; 0: there is none.
        freezing: Whether SFT phases freeze weights.
        protection: Copies of the trained weights that other protections hold in RL and in SFT phases.
        movement: Whether a monitor keeps a copy of the weights during the step.
        evaluated: Responses of an evaluation batch on each process; 0: there is none.
        samples: Responses to each of its questions.
        sampling: Of evaluation.
    """

    ranks: int = 1
    cpu: bool = False
    sharded: bool = False
    bf16: bool = False
    checkpointing: bool = False
    share_prompts: bool | None = None
    adapter: Adapter | None = None
    prompt: int = 1024
    response: int = 1024
    prompts: int = 32
    group: int = 8
    passes: int = 1
    minibatches: int = 1
    micro_batches: int = 1
    micro_batch_tokens: int | None = None
    engine_rows: int = 512
    cache_tokens: int = 2**18
    entropy_gradient: bool = False
    scored: bool = False
    reference: bool = False
    teacher: bool = False
    shown: int = 0
    demonstrations: int = 0
    demonstration: int = 0
    moments: str = "reset"
    importance: int = 0
    freezing: bool = False
    protection: tuple[float, float] = (0.0, 0.0)
    movement: bool = False
    evaluated: int = 0
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def rows(self) -> int:
        """Responses of an optimizer step on this process."""
        return -(-self.prompts // self.minibatches) * self.group

    def batch(self, questions: int, samples: int, length: int) -> "DecodingBatch":
        """The rows that `InProcessEngine` decodes at once, `samples` of each question, `length` tokens at most."""
        room = self.cache_tokens // (self.prompt + length)
        size = max(1, min(self.engine_rows, room, questions * samples))
        together = min(size, samples)
        return DecodingBatch(size, size // together, together)

    @property
    def decoded(self) -> int:
        """Responses of a rollout decoded at once."""
        return self.batch(self.prompts, self.group, self.response).rows

    def chunk(self, shared: bool) -> "Chunk":
        """The largest chunk of an RL step; `shared` says whether a group runs its prompt once."""
        if self.micro_batch_tokens is None:
            size = -(-self.rows // self.micro_batches)
            starts = range(0, self.rows, size)
            prompts = max(min(self.rows - 1, s + size - 1) // self.group - s // self.group + 1 for s in starts)
            return Chunk(size, prompts, self.micro_batches)
        whole = self.prompt + self.group * self.response
        if not shared:
            size = self.micro_batch_tokens // (self.prompt + self.response)
        elif whole <= self.micro_batch_tokens:
            size = self.micro_batch_tokens // whole * self.group
        else:
            size = (self.micro_batch_tokens - self.prompt) // self.response
        size = max(1, min(size, self.rows))
        return Chunk(size, -(-size // self.group), -(-self.rows // size))

    def sft_chunk(self) -> "Chunk":
        """The largest chunk of an SFT step, whose rows run each with its own prompt."""
        size = -(-self.demonstrations // self.micro_batches)
        if self.micro_batch_tokens is not None:
            size = min(self.demonstrations, max(1, self.micro_batch_tokens // (self.prompt + self.demonstration)))
        return Chunk(size, size, -(-self.demonstrations // size))


class DecodingBatch(NamedTuple):
    """Rows decoded at once.

    Attributes:
        slots: Rows that there is room for.
        jobs: Prompts that are read for them.
        samples: Rows of each.
    """

    slots: int
    jobs: int
    samples: int

    @property
    def rows(self) -> int:
        """Rows that run."""
        return self.jobs * self.samples


class Chunk(NamedTuple):
    """A chunk of an optimizer step.

    Attributes:
        rows: Of the chunk.
        prompts: Most different prompts that a chunk of so many rows has.
        chunks: Of the step.
    """

    rows: int
    prompts: int
    chunks: int


def workload_of(config: Any, ranks: int | None, prompt: int | None, response: int | None) -> tuple[Workload, list[str]]:
    """What a parsed configuration asks of each process, and what of it is not known without the data, in lines.

    Args:
        config: Of the command line.
        ranks: Data-parallel processes; None takes the Trainer's.
        prompt: Tokens of a prompt; None takes the longest allowed.
        response: Tokens of a response; None takes the longest allowed.

    Raises:
        InputError: What is trained cannot be cut into so many processes, or the strategy is none of ours.
    """
    trainer, model, data = config.trainer, config.model, config.data
    rollout, schedule, loss = model.rollout, data.schedule, model.loss
    ranks, said = ranks_of(trainer, ranks)
    for key, value in (("prompts_per_step", schedule.prompts_per_step), ("sft_batch", schedule.sft_batch)):
        if value % ranks:
            raise InputError(f"data.schedule.{key}: {value} does not divide by {ranks} ranks")
    lengths, unknown = _lengths(config, prompt, response)
    said += unknown
    engine, unknown = _engine(rollout.engine)
    said += unknown
    adapter = None if model.adapter is None else Adapter(**vars(model.adapter))
    if adapter is not None:
        adapter.check("model.adapter")
    own = model.evaluation.sampling
    samples = model.evaluation.samples or 1
    if (distillation := model.sft_loss.distillation) is not None:
        said.append("the time of SDFT's teacher, whose prompts hold the demonstrations, is not counted")
    buffered = config.buffer is not None or schedule.sft_before or schedule.sft_after
    updates = schedule.epochs_per_rollout * schedule.minibatches
    return Workload(
        ranks=ranks,
        cpu=trainer.accelerator == "cpu",
        sharded=sharded(trainer.strategy),
        bf16=trainer.precision == "bf16-mixed",
        checkpointing=model.loading.gradient_checkpointing,
        share_prompts=model.loading.share_prompts,
        adapter=adapter,
        prompt=lengths[0],
        response=lengths[1],
        prompts=schedule.prompts_per_step // ranks,
        group=rollout.group_size,
        passes=schedule.epochs_per_rollout,
        minibatches=schedule.minibatches,
        micro_batches=model.optimizer.micro_batches,
        micro_batch_tokens=model.optimizer.micro_batch_tokens,
        engine_rows=engine.rows,
        cache_tokens=engine.cache_tokens,
        entropy_gradient=loss.entropy_bonus > 0,
        scored=updates > 1 or loss.entropy_fraction < 1,
        reference=loss.kl_coefficient > 0,
        teacher=distillation is not None and distillation.teacher_rate < 1,
        shown=data.demonstrations.max_tokens if distillation is not None else 0,
        demonstrations=schedule.sft_batch // ranks if buffered else 0,
        demonstration=_demonstration(config, lengths[1], response),
        moments=model.optimizer.moments,
        importance=_map_bytes(config.importance),
        freezing=config.freeze is not None,
        protection=_copies(config),
        movement=config.updates is not None,
        evaluated=data.eval_batch * samples if data.val or data.holdout else 0,
        samples=samples,
        sampling=Sampling(own.temperature, own.top_p, own.top_k, own.max_new_tokens or lengths[1]),
    ), said


def _lengths(config: Any, prompt: int | None, response: int | None) -> tuple[tuple[int, int], list[str]]:
    """Tokens of a prompt and of a response, and a line where they are the longest that are allowed."""
    lengths = (prompt or config.data.prompts.max_tokens, response or config.model.rollout.sampling.max_new_tokens)
    if prompt is not None and response is not None:
        return lengths, []
    return lengths, [
        f"prompts of {lengths[0]} and responses of {lengths[1]} tokens, the longest that are allowed, since only "
        "the data tells: --prompt_tokens and --response_tokens say what is usual"
    ]


def _demonstration(config: Any, drawn: int, usual: int | None) -> int:
    """Tokens of what SFT learns from: responses of `drawn` tokens where they are the model's own."""
    learned, longest = config.model.sft_loss, config.data.demonstrations.max_tokens
    if learned.demonstrations != "data" or learned.distillation is not None:
        return drawn
    return int(min(longest, usual or longest))


def _copies(config: Any) -> tuple[float, float]:
    """What protections hold in RL and in SFT phases, in copies of the weights; an anchor's bases are two at most."""
    held = {"anchor": (0.0, 1.0), "soft": (0.0, 1.0), "conflict": (1.25, 1.25), "subspace": (1.0, 1.0)}
    found = [copies for part, copies in held.items() if config[part] is not None]
    anchor = config.anchor
    if anchor is not None and "init_args" in anchor and anchor.init_args.get("k") is not None:
        found.append((0.0, 2.0))
    return sum(rl for rl, _ in found), sum(sft for _, sft in found)


def _map_bytes(given: Any) -> int:
    """Bytes of the importance map for each weight."""
    if given is None:
        return 0
    return 2 if "init_args" in given and given.init_args.get("dtype") == "bfloat16" else 4


def _engine(given: Any) -> tuple[InProcessEngine, list[str]]:
    """The engine that decoding is planned with, and a line where the run has another."""
    if given is not None and not given.class_path.endswith(InProcessEngine.__name__):
        another = f"the memory and the speed of {given.class_path} are its own; decoding is planned as in process"
        return InProcessEngine(), [another]
    arguments = vars(given.init_args) if given is not None and "init_args" in given else {}
    # a class of the user's that is one, too, may take others
    return InProcessEngine(**{name: arguments[name] for name in ("rows", "cache_tokens") if name in arguments}), []


def ranks_of(trainer: Any, given: int | None) -> tuple[int, list[str]]:
    """Data-parallel processes, and a line where the configuration leaves their number to the machine."""
    if given is not None:
        return given, []
    devices = trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else None
    if count is None:
        return trainer.num_nodes, [f"trainer.devices is {devices}: one GPU a machine is assumed; --gpus says how many"]
    return count * trainer.num_nodes, []


def sharded(strategy: Any) -> bool:
    """Whether a strategy is FSDP2; every other that is allowed keeps all weights on each process."""
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", type(strategy).__name__)
    if "deepspeed" in name.lower() or name.lower().rpartition(".")[2].startswith("fsdp"):
        raise InputError(f"trainer.strategy: {name} is not allowed; DDP and ModelParallelStrategy (FSDP2) are")
    return name.endswith("ModelParallelStrategy")
