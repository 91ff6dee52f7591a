"""Responses to prompts outside of training, for a notebook or a look at a trained model."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mifo_lightning.errors import InputError
from mifo_lightning.policy.ending import response_texts
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import RolloutEngine, Sampling
from mifo_lightning.seeds import stable_key

Prompt = str | list[dict[str, str]]


def answers(
    engine: RolloutEngine,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    seed: int,
) -> list[list[str]]:
    """Draw responses; the same seed, prompt and weights give the same ones, in whatever company.

    Args:
        engine: Draws them.
        policy: The model.
        tokenizer: Its.
        prompts: Texts of a user, or conversations of dicts with `role` and `content`; both go through the tokenizer's
            chat template.
        sampling: How they are drawn.
        samples: Responses to each prompt.
        seed: Seed of the draws.

    Returns:
        `samples` texts for each prompt, end tokens left out.

    Raises:
        InputError: If `samples` is below 1 or the chat template refuses a prompt.
    """
    if samples < 1:
        raise InputError(f"samples: {samples} is not allowed; it must be at least 1")
    texts = [_rendered(tokenizer, prompt, number) for number, prompt in enumerate(prompts, 1)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    keys = [stable_key(seed, "answers", text) for text in texts]
    drawn = engine.generate(policy, tokenizer, ids, keys, samples, sampling)
    return [response_texts(tokenizer, [c.tokens for c in group], sampling.stop) for group in drawn]


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, number: int) -> str:
    messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise InputError(f"prompt {number}: the chat template refuses it: {error}") from error
