"""What the tests of RL steps share: scripted questions and responses, and scores by hand."""

import math
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback
from torch import Tensor

from mifo_callbacks import Seed
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import WorkItem
from mifo_lightning.losses.policy import token_weights
from mifo_lightning.methods import Mixing
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.graded import Chosen, Graded
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.rollout.settings import Rollout
from mifo_lightning.steps.batch import Batch, Stream
from mifo_lightning.steps.reinforcement import Reinforcement
from mifo_lightning.steps.settings import PolicyLoss

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = ["123+456=", "777x12=", "s:40312=", "9+9="]
Gradient = dict[str, Tensor]


class Noting(InProcessEngine):
    """Decodes, and keeps prompts and responses."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[list[list[int]], list[list[Completion]]]] = []

    def generate(self, policy: Any, tokenizer: Any, prompts: Any, *rest: Any) -> list[list[Completion]]:
        completions = super().generate(policy, tokenizer, prompts, *rest)
        self.drawn.append((prompts, completions))
        return completions


class Gradients(Callback):
    """The gradient of every optimizer step, before clipping."""

    def __init__(self) -> None:
        self.found: list[Gradient] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.found.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})


class Coin(Reward):
    """Right for about half of all responses, so that there is an advantage to learn from."""

    isolate = False

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [float(zlib.crc32(response.encode()) % 2) for response in responses]


def reinforcement(tokenizer: Any, **changes: Any) -> Reinforcement:
    answering = {
        "engine": InProcessEngine(),
        "tokenizer": tokenizer,
        "reward": LastAnswerReward(),
        "success_threshold": 1.0,
        "seed": Seed(0, "seed"),
    }
    responder = Responder(**{name: changes.pop(name, default) for name, default in answering.items()})
    how = {"sampling": Sampling(max_new_tokens=14), "group_size": 4}
    rollout = Rollout(**{name: changes.pop(name, default) for name, default in how.items()})
    return Reinforcement(responder, rollout, **{"settings": PolicyLoss(), **changes})


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def questions(tokenizer: Any, demonstrations: tuple[str, ...] = ("7<eos>",) * 4) -> list[Question]:
    """As many questions as demonstrations; an empty one is none. The truth is always 7."""
    return [
        Question(i, f"s{i}", PROMPTS[i], encode(tokenizer, PROMPTS[i]), "7", encode(tokenizer, text) if text else None)
        for i, text in enumerate(demonstrations)
    ]


def item(qs: list[Question], **changes: Any) -> WorkItem:
    plain: dict[str, Any] = {
        "phase": "rl",
        "questions": qs,
        "rollout": 0,
        "update": 0,
        "updates": 1,
        "minibatches": 1,
        "step": 0,
    }
    return WorkItem(**{**plain, **changes})  # type: ignore[typeddict-item]


def completion(tokenizer: Any, text: str, logp: float = -1.0) -> Completion:
    tokens = encode(tokenizer, text)
    return Completion(tokens, [logp] * len(tokens), text.endswith("<eos>"))


def groups_of(tokenizer: Any, *texts: str, size: int = 4, logp: float = -1.0) -> list[list[Completion]]:
    flat = [completion(tokenizer, text, logp) for text in texts]
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def by_hand(policy: Policy, prompt: list[int], response: list[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each token of one response, from the logits of the bare model."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp[torch.arange(len(response)), response], -(logp.exp() * logp).sum(-1)


def moved(policy: Policy, seed: int = 0, by: float = 0.05) -> Policy:
    """The same policy after an update, so that ratios differ from 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(by * p.std() * torch.randn_like(p))
    return policy


def gradient(policy: Policy, loss: Tensor) -> Gradient:
    """Gradient of `loss`; none is left behind."""
    policy.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def norm(g: Gradient) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in g.values()))


def relative(a: Gradient, b: Gradient) -> float:
    """L2 distance of two gradients relative to the length of the second."""
    return norm({n: a[n] - b[n] for n in b}) / norm(b)


def configured(name: str) -> dict[str, Any]:
    """The shipped `configs/<name>.yaml`."""
    return dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


def built(spec: dict[str, Any]) -> Any:
    """The object of a `class_path` with its `init_args`."""
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**spec.get("init_args", {}))


def rl_settings(name: str) -> tuple[PolicyLoss, Mixing | None]:
    """Policy loss and mixing of the defaults with `configs/<name>.yaml` over them."""
    base, over = configured("defaults")["model"], configured(name).get("model", {})
    mixing = built(over["mixing"]) if "mixing" in over else None
    return PolicyLoss(**{**base["loss"], **over.get("loss", {})}), mixing


def rollout_of(
    settings: PolicyLoss, mask: Tensor, advantages: Tensor, max_length: int, **scores: Tensor | None
) -> Batch:
    """A rollout of which only the numbers that the loss reads matter."""
    b = len(mask)
    sizes: dict[str, Any] = {"sequences": b, "tokens": float(mask.sum()), "max_length": max_length}
    sizes["sum_sequences"] = settings.sum_sequences
    weight = token_weights(mask, settings.aggregation, **sizes)
    demonstrated = scores.get("demonstrated")
    own = weight if demonstrated is None else weight.masked_fill(demonstrated, 0.0)
    kl, bonus = settings.kl_coefficient, settings.entropy_bonus
    return Batch(
        sequences=Sequences(torch.zeros(b, 1), torch.zeros(b), mask.sum(-1)),
        question=torch.arange(b),
        minibatch=torch.zeros(b, dtype=torch.long),
        active=torch.ones(b, dtype=torch.bool),
        rl=Stream(weight),
        kl=Stream(own, scale=kl) if kl else None,
        bonus=Stream(own, scale=bonus) if bonus else None,
        advantages=advantages,
        **scores,  # type: ignore[arg-type]
    )


def evaluate(
    rl: Reinforcement, logp: Tensor, entropy: Tensor, mask: Tensor, advantages: Tensor, longest: int, **scores: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient with respect to the log-probabilities, metrics."""
    logp = logp.clone().requires_grad_()
    rollout = rollout_of(rl.settings, mask, advantages, longest, **scores)
    loss, metrics = rl.objective(rollout, logp, entropy)
    (grad,) = torch.autograd.grad(loss, logp)
    return loss.detach(), grad, metrics


def prepare(rl: Reinforcement, policy: Policy, work: WorkItem, graded: Graded) -> Batch:
    """What the updates train on if every question does."""
    everything = list(range(len(graded.questions)))
    return rl.prepare(policy, work, graded, Chosen(everything, everything, len(everything)))


def step_loss(rl: Reinforcement, policy: Policy, rollout: Batch, update: int = 0, micro_batches: int = 1) -> Tensor:
    """The loss of one RL optimizer step, summed over its chunks."""
    total = torch.zeros(())
    for part in rollout.chunks(update, micro_batches):
        bonus = rl.settings.entropy_bonus > 0
        logp, entropy = policy(part.sequences, rl.sampling.temperature, entropy_gradient=bonus)
        total = total + rl.objective(part, logp, entropy)[0]
    return total
