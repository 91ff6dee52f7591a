"""Cutting the rows of an optimizer step into chunks: equally many rows, or so many tokens."""

import torch
from torch import Tensor

from mifo_callbacks.collectives import gather_ranks
from mifo_lightning.policy.policy import Sequences


def by_tokens(sequences: Sequences, question: Tensor, rows: Tensor, most: int, shared: bool) -> list[Tensor]:
    """Rows in chunks of at most `most` tokens, padding included; collective: equally many chunks on every rank.

    Sequences of like length go together, so that little is padding. Where a group shares its prompt it stays whole if
    it can, and its prompt counts once. A single row that is longer is a chunk of its own.

    Args:
        sequences: All B sequences of the batch.
        question: [B] int64, whose answer a row is.
        rows: [N] int64 the rows to cut.
        most: Tokens of a chunk.
        shared: Whether rows of a question run their prompt once (`Policy.share_prompts`).

    Returns:
        Row numbers, [n] int64 each; empty ones at the end where another rank has more.
    """
    prompts: list[int] = sequences.prompt_lengths.tolist()
    responses: list[int] = sequences.response_lengths.tolist()
    questions: list[int] = question.tolist()

    def size(chunk: list[int]) -> int:
        longest = max(responses[i] for i in chunk)
        if not shared:
            return len(chunk) * max(prompts[i] + responses[i] for i in chunk)
        return len(chunk) * longest + len({questions[i] for i in chunk}) * max(prompts[i] for i in chunk)

    units: dict[int, list[int]] = {}
    for i in rows.tolist():
        units.setdefault(questions[i] if shared else i, []).append(i)
    chunks: list[list[int]] = [[]]
    for unit in sorted(units.values(), key=lambda unit: max(prompts[i] + responses[i] for i in unit)):
        for part in [unit] if size(unit) <= most else [[i] for i in unit]:
            if chunks[-1] and size(chunks[-1] + part) > most:
                chunks.append([])
            chunks[-1] += part
    chunks += [[]] * (max(gather_ranks(len(chunks))) - len(chunks))
    return [torch.tensor(chunk, dtype=torch.long, device=rows.device) for chunk in chunks]
