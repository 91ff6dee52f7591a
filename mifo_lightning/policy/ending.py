"""How a response ends, and what of it is text: one definition for decoding, grading, samples and demonstrations."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from mifo_lightning.common.errors import InputError

FILES = ("generation_config.json", "config.json")  # without the first, transformers takes the second's end tokens


def read_ends(model: str) -> frozenset[int]:
    """Ids of the end tokens that a model's `generation_config.json` lists, or else its `config.json`; none if neither.

    Args:
        model: Hugging Face directory or hub name.

    Raises:
        InputError: A file is no JSON object, or its `eos_token_id` is neither an id nor a list of them.
    """
    for name in FILES:
        listed = _read(model, name).get("eos_token_id")
        if listed is not None:
            ids = listed if isinstance(listed, list) else [listed]
            if not ids or not all(type(i) is int and i >= 0 for i in ids):
                raise InputError(
                    f"model.model: eos_token_id of {model}/{name} is {listed!r}, not an id or a list of ids"
                )
            return frozenset(ids)
    return frozenset()


def ends_of(model: PreTrainedModel) -> frozenset[int]:
    """The same of a model that is in memory."""
    generation = getattr(model, "generation_config", None)
    listed = getattr(generation, "eos_token_id", None) or model.config.eos_token_id
    return frozenset(listed if isinstance(listed, list) else [] if listed is None else [listed])


def set_ends(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> None:
    """Keep the model's end tokens with its tokenizer, which goes wherever responses are made or read."""
    tokenizer.response_ends = frozenset(ends)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that end a response: those that the model lists, else the tokenizer's end of sequence."""
    listed: frozenset[int] = getattr(tokenizer, "response_ends", frozenset())
    return listed or frozenset({int(tokenizer.eos_token_id)})


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that fills rows up to one length: the pad token, or else the end of sequence; lengths tell what is padding."""
    pad: int | None = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def turn_end(tokenizer: PreTrainedTokenizerBase, conversation: str, answer: str) -> int:
    """Id of the one token that an SFT target ends in.

    Args:
        tokenizer: The model's.
        conversation: A conversation whose last message is `answer`, after the chat template.
        answer: That message.

    Returns:
        The first end token after `answer`; the tokenizer's end of sequence if the template prints none there.

    Raises:
        InputError: That is no end token of the model: rollouts would go on after what SFT teaches as the end.
    """
    ends = end_tokens(tokenizer)
    _, found, tail = conversation.rpartition(answer)
    after: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    end = next((i for i in after if i in ends), int(tokenizer.eos_token_id))
    if end not in ends:
        raise InputError(
            f"demonstrations would end in {tokenizer.eos_token!r} ({end}), which is not among the end tokens "
            f"{sorted(ends)} of the model; add it to eos_token_id in generation_config.json"
        )
    return end


def end_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The end tokens as they stand in a text; those that are ordinary text of the vocabulary are left out."""
    special = tokenizer.get_added_vocab()
    ends = end_tokens(tokenizer)
    return sorted({str(tokenizer.eos_token), *(text for text, token in special.items() if token in ends)})


def response_texts(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[Sequence[int]], stop: Sequence[str] = ()
) -> list[str]:
    """Responses as rewards and readers see them: whole, but for end and padding tokens and what a stop string ended.

    Other special tokens, `</think>` in some vocabularies, are text.

    Args:
        tokenizer: The model's.
        responses: Token ids of each response.
        stop: Strings that ended responses; the text is cut before the first.
    """
    if not responses:
        return []
    silent = end_tokens(tokenizer) | {tokenizer.pad_token_id}
    kept = [[token for token in response if token not in silent] for response in responses]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [_before(text, stop) for text in texts]


def _before(text: str, stop: Sequence[str]) -> str:
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text


def _read(model: str, name: str) -> dict[str, Any]:
    """A file of the model, {} if there is none."""
    try:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        found = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"model.model: {model}/{name} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise InputError(f"model.model: {model}/{name} is no JSON object")
    return found
