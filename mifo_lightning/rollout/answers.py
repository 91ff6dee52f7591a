"""Responses to prompts outside of training, for a notebook or a look at a trained model."""

from collections.abc import Sequence

from mifo_lightning.common.errors import InputError, require
from mifo_lightning.policy.ending import response_texts
from mifo_lightning.policy.loading import positions
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.template import ChatTemplate
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.respond import Responder

Prompt = str | list[dict[str, str]]


def answers(
    responder: Responder,
    policy: Policy,
    template: ChatTemplate,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
) -> list[list[str]]:
    """Draw responses; the same seed, prompt and weights give the same ones, in whatever company.

    Args:
        responder: Draws them.
        policy: The model.
        template: How prompts become text, and the model's tokenizer.
        prompts: Texts of a user, or conversations of dicts with `role` and `content`; both go through the template.
        sampling: How they are drawn.
        samples: Responses to each prompt.

    Returns:
        `samples` texts for each prompt, end tokens left out.

    Raises:
        InputError: If `prompts` is one text, `samples` is below 1 or the chat template refuses a prompt.
    """
    if isinstance(prompts, str):  # it would be taken for prompts of a letter each
        raise InputError(f"prompts: {prompts!r:.80} is not allowed; it must be a list of prompts")
    if samples < 1:
        raise InputError(f"samples: {samples} is not allowed; it must be at least 1")
    tokenizer = template.tokenizer
    talks = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = [template.render(talk, f"prompt {number}") for number, talk in enumerate(talks, 1)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    limit, whole = positions(policy.model.config), max(map(len, ids), default=0) + sampling.max_new_tokens
    allowed = f"within the {limit} positions of the model"
    require("generate: longest prompt with max_new_tokens", f"{whole} tokens", limit is None or whole <= limit, allowed)
    keys = [responder.key("answers", text) for text in texts]
    drawn = responder.draw(policy, ids, keys, samples, sampling)
    return [response_texts(tokenizer, [c.tokens for c in group], sampling.stop) for group in drawn]
