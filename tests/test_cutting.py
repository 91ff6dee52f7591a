"""Chunks of so many tokens: every row once, little padding, groups whole."""

import pytest
import torch

from mifo_lightning.policy.policy import Sequences
from mifo_lightning.steps.cutting import by_tokens


def drawn(seed: int) -> tuple[Sequences, torch.Tensor]:
    """Eight groups of four responses, of 1 to 40 tokens after prompts of 5 to 20."""
    generator = torch.Generator().manual_seed(seed)
    question = torch.arange(8).repeat_interleave(4)
    prompts = torch.randint(5, 21, (8,), generator=generator)[question]
    responses = torch.randint(1, 41, (32,), generator=generator)
    return Sequences(torch.zeros(32, 60, dtype=torch.long), prompts, responses), question


def padded(sequences: Sequences, question: torch.Tensor, chunk: torch.Tensor, shared: bool) -> int:
    prompts, responses = sequences.prompt_lengths[chunk], sequences.response_lengths[chunk]
    if shared:
        return int(len(chunk) * responses.max() + len(question[chunk].unique()) * prompts.max())
    return int(len(chunk) * (prompts + responses).max())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_hold_every_row_once_and_no_more_than_so_many_tokens(seed: int, shared: bool) -> None:
    sequences, question = drawn(seed)
    rows = torch.arange(32)[torch.arange(32) % 5 != 0]
    chunks = by_tokens(sequences, question, rows, 200, shared)
    assert torch.cat(chunks).sort().values.tolist() == rows.tolist()
    sizes = [padded(sequences, question, chunk, shared) for chunk in chunks]
    assert max(sizes) <= 200
    if shared:
        homes = [set(question[chunk].tolist()) for chunk in chunks]
        assert sum(map(len, homes)) == 8, "no group is in two chunks"
    else:
        least = int((sequences.prompt_lengths + sequences.response_lengths)[rows].sum())
        assert sum(sizes) <= 1.25 * least, "rows of like length are together"


def test_a_group_that_is_too_large_is_cut_and_a_row_that_is_too_long_is_alone() -> None:
    sequences, question = drawn(0)
    chunks = by_tokens(sequences, question, torch.arange(32), 60, shared=True)
    assert torch.cat(chunks).sort().values.tolist() == list(range(32))
    assert max(padded(sequences, question, chunk, True) for chunk in chunks) <= 60
    assert [len(chunk) for chunk in by_tokens(sequences, question, torch.arange(5), 1, shared=False)] == [1] * 5


def test_no_rows_are_one_chunk_without_any() -> None:
    sequences, question = drawn(0)
    assert [c.tolist() for c in by_tokens(sequences, question, torch.arange(0), 100, shared=True)] == [[]]
