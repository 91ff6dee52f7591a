"""From the rows of an RL step to its `Batch`: what each token counts, over the whole optimizer step and all ranks."""

import torch
from torch import Tensor

from mifo_callbacks.collectives import sum_over, world_group
from mifo_callbacks.tokens import select_tokens
from mifo_lightning.losses.policy import token_weights
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.policy.policy import Sequences
from mifo_lightning.steps.batch import Batch, Stream
from mifo_lightning.steps.rows import Rows
from mifo_lightning.steps.settings import PolicyLoss


def rl_batch(
    rows: Rows,
    sequences: Sequences,
    minibatch: Tensor,
    minibatches: int,
    scales: tuple[float, float],
    settings: PolicyLoss,
    mixing: Mixing | None,
    max_length: int,
) -> Batch:
    """What the updates of an RL step share, without scores; collective.

    Args:
        rows: B rows.
        sequences: [B] the rows with their prompts, where the model is.
        minibatch: [B] int64, which optimizer step of a pass each row belongs to.
        minibatches: How many optimizer steps a pass has.
        scales: Weights of the policy loss and of the SFT loss.
        settings: The policy loss.
        mixing: How demonstrations are mixed in; None if they are not.
        max_length: Longest response that sampling allows, in tokens.
    """
    device, mask = sequences.tokens.device, sequences.mask()
    rl, ce, own_mean = _weights(rows, mask, minibatch, minibatches, settings, mixing, max_length)
    demonstrated = mask & rows.demonstrated.to(device)[:, None]
    own = rl.masked_fill(demonstrated, 0.0)
    kl, bonus = settings.kl_in_loss, settings.entropy_bonus
    return Batch(
        sequences=sequences,
        question=rows.question.to(device),
        minibatch=minibatch,
        active=rows.active.to(device),
        demonstrated=None if mixing is None else demonstrated,
        rl=Stream(rl, scale=scales[0]),
        ce=Stream(ce, scale=scales[1]) if scales[1] else None,
        kl=Stream(own, scale=kl) if kl else None,
        # the authors of `sum` take the mean over tokens
        bonus=Stream(own_mean if settings.aggregation == "sum" else own, scale=bonus) if bonus else None,
        advantages=rows.advantages.to(device),
    )


def forking_tokens(entropy: Tensor, batch: Batch, minibatches: int, fraction: float) -> Tensor:
    """[B, L] bool: the tokens of highest entropy of each optimizer step, over all ranks, and all demonstrations.

    Args:
        entropy: [B, L] entropies in nats under the policy that sampled.
        batch: With its `rl` stream.
        minibatches: How many optimizer steps a pass has.
        fraction: Share of the policy's own tokens.
    """
    assert batch.rl is not None, "an RL step has a policy loss"
    mask = batch.rl.weight > 0
    keep = torch.zeros_like(mask)
    if batch.demonstrated is not None:
        keep |= batch.demonstrated
        mask = mask & ~batch.demonstrated
    for m in range(minibatches):
        rows = batch.minibatch == m
        keep[rows] |= select_tokens(entropy[rows], mask[rows], fraction=fraction, group=world_group()).mask
    return keep


def _weights(
    rows: Rows,
    mask: Tensor,
    minibatch: Tensor,
    minibatches: int,
    settings: PolicyLoss,
    mixing: Mixing | None,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L] weights of the policy loss, of the SFT loss, and of a mean over the policy's own tokens.

    They are made of the counts of each whole optimizer step.
    """
    device = mask.device
    in_policy, demonstrated = rows.in_policy.to(device), rows.demonstrated.to(device)
    own = rows.active.to(device) & ~demonstrated  # with a bonus all are active whose rollouts train
    lengths = mask.sum(-1)
    first = torch.zeros_like(in_policy)  # one row of each question
    first[torch.searchsorted(rows.question, rows.question.unique()).to(device)] = True
    counted = torch.stack(
        [in_policy, in_policy * lengths, demonstrated, demonstrated * lengths, first, own * lengths]
    ).double()
    counts = torch.zeros(6, minibatches, device=device, dtype=torch.double).index_add_(1, minibatch, counted)
    counts = sum_over(counts, world_group())
    rl, ce, own_mean = (torch.zeros(mask.shape, device=device) for _ in range(3))
    for m, (sequences, tokens, lent, lent_tokens, asked, own_tokens) in enumerate(counts.T.tolist()):
        here = minibatch == m
        rl[here] = token_weights(
            mask[here] & in_policy[here, None],
            settings.aggregation,
            sequences=max(sequences, 1.0),
            tokens=max(tokens, 1.0),
            max_length=max_length,
            sum_sequences=settings.sum_sequences,
        )
        own_mean[here] = (mask[here] & own[here, None]) / max(own_tokens, 1.0)
        if mixing is not None and lent:
            ce[here] = (mask[here] & demonstrated[here, None]) * (mixing.share(lent, asked) / lent_tokens)
    return rl, ce, own_mean
