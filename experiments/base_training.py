"""What the bases of all embedded tasks have in common: how they are trained from nothing, and how they answer."""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.in_process import InProcessEngine

PAD, EOS = "<pad>", "<eos>"
IGNORED = 0  # id of padding in every vocabulary, which begins with it


@dataclass(frozen=True)
class Training:
    """How a base is trained, apart from what it is shown."""

    steps: int = 1600
    batch: int = 192
    lr: float = 3e-3
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclass(frozen=True)
class Result:
    """One trained base: its seed, test accuracies at temperature 1 by name, and CPU seconds of training."""

    seed: int
    accuracy: dict[str, float]
    seconds: float


def decayed(step: int, recipe: Training, decay_from: int, least: float) -> float:
    """The learning rate of a step: linear warm-up, constant, then from `decay_from` linear to `least` of it."""
    left = (recipe.steps - step) / (recipe.steps - decay_from)
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup, max(left, least))


def build_tokenizer(vocabulary: list[str]) -> Qwen2Tokenizer:
    """One token per character, none merged; as with any byte-level vocabulary, a character outside it is dropped."""
    # transformers loads every qwen2 directory with this class, whatever class wrote it: so this class writes it
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[],
        unk_token=None,  # type: ignore[arg-type]  # the default would add a token without an embedding
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=64,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def build_model(vocabulary: list[str]) -> Qwen2ForCausalLM:
    """A Qwen2 shape with random weights, float32; 300,672 parameters with the 24 tokens of the skills.

    The head is not the embedding: tied, the letters of skills that are not trained are pushed down as outputs, and so
    become unreadable as inputs, which looks like forgetting. Heads are 32 wide, since vLLM on a CPU takes none below.
    """
    eos, pad = vocabulary.index(EOS), vocabulary.index(PAD)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,  # at the usual 0.02, 900 steps are too few to learn to add digits with a carry
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=True)
    return model


def optimize(
    model: Qwen2ForCausalLM,
    recipe: Training,
    batch: Callable[[int], Tensor],
    rate: Callable[[int], float],
    prompt_tokens: int,
) -> None:
    """Train `model` in place; the loss is the mean over the response tokens of a batch, EOS included.

    Args:
        model: Its embedding's first row is padding.
        recipe: Says how.
        batch: Token ids of a step, int64 [B, T]: prompts of `prompt_tokens` tokens, then responses, padded at the end.
        rate: The learning rate of a step.
        prompt_tokens: Length of every prompt.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate(0), betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        tokens = batch(step)
        targets = tokens[:, prompt_tokens:]
        logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=targets.shape[1]).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()


def make_model(
    vocabulary: list[str], seed: int, out: Path, train: Callable[[Qwen2ForCausalLM], None]
) -> tuple[Qwen2ForCausalLM, float]:
    """A model trained from random weights on one thread and written to `out`, and the CPU seconds that it took."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    start = time.process_time()
    model = build_model(vocabulary)
    train(model)
    seconds = time.process_time() - start
    model.save_pretrained(out)
    build_tokenizer(vocabulary).save_pretrained(out)
    return model, seconds


def answers(
    model: Qwen2ForCausalLM, vocabulary: list[str], prompts: list[str], keys: list[int], samples: int, tokens: int
) -> list[str]:
    """Responses at temperature 1 as texts, `samples` to each prompt one after the other; without EOS one is empty.

    Args:
        model: Answers.
        vocabulary: Its tokens, a character each but for padding and EOS.
        prompts: Texts.
        keys: A seed for each.
        samples: Responses to each.
        tokens: Longest response, EOS included.
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    asked = [[ids[char] for char in prompt] for prompt in prompts]
    sampling = Sampling(temperature=1.0, max_new_tokens=tokens)
    drawn = InProcessEngine().generate(Policy(model), build_tokenizer(vocabulary), asked, keys, samples, sampling)
    ends = [one.tokens if one.finished else [] for group in drawn for one in group]
    return ["".join(vocabulary[token] for token in each).removesuffix(EOS) for each in ends]


def make_all(
    make: Callable[[int, Path, int], Result], seeds: list[int], outs: list[Path], questions: int, jobs: int
) -> None:
    """Make the bases of these seeds, `jobs` at the same time in processes of their own, and print a row for each."""
    print(f"accuracy on {questions} test questions of each kind, temperature 1")
    # fork would copy torch's thread state into the workers
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for number, result in enumerate(pool.map(make, seeds, outs, [questions] * len(seeds))):
            if not number:
                print("| seed | " + " | ".join(result.accuracy) + " | CPU seconds |")
                print("|---" * (len(result.accuracy) + 2) + "|")
            cells = " | ".join(f"{value:.4f}" for value in result.accuracy.values())
            print(f"| {result.seed} | {cells} | {result.seconds:.0f} |", flush=True)


def parser(description: str, questions: int) -> argparse.ArgumentParser:
    """What every program that makes bases may be given."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--seeds", type=int, nargs="+", help="bases, written to --out/seed<N>")
    made.add_argument("--jobs", type=int, default=1, help="bases trained at the same time, one thread each")
    made.add_argument("--questions", type=int, default=questions, help="test questions of each kind")
    made.add_argument("--out", type=Path, required=True, help="directory to write")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, checked; without --seeds the one seed is 0."""
    args = made.parse_args()
    if min(args.jobs, args.questions) < 1:
        made.error("--jobs and --questions: allowed is 1 or more")
    if args.seeds and min(args.seeds) < 0:
        made.error(f"--seeds {min(args.seeds)}: allowed is 0 or more")
    return args
