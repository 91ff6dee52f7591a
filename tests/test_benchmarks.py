"""What benchmarks/ count is what runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_counts import multiplying, update_flops
from benchmarks.shapes import TINY, random_model, words
from benchmarks.sizes import Size
from mifo_lightning.policy.policy import Policy, Sequences

SIZE = Size(prompts=3, tokens=24, group=4, length=16)


@pytest.mark.parametrize("shared", [False, True])
def test_operations_of_an_update_are_those_that_torch_counts(shared: bool) -> None:
    model = random_model(words(64), TINY)
    model.set_attn_implementation("eager")  # torch has no count for the CPU's own kernel
    policy = Policy(model)
    policy.share_prompts = shared
    prompts = [[q + 1] * SIZE.tokens for q in range(SIZE.prompts) for _ in range(SIZE.group)]
    responses = [[5 + i % 9] * SIZE.length for i in range(len(prompts))]
    with FlopCounterMode(display=False) as counter:
        logp, _ = policy(Sequences.pack(prompts, responses, 0), grouped=True)
        torch.Tensor.backward(logp.sum())
    counted = update_flops(model.config, multiplying(model), SIZE, shared)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)
