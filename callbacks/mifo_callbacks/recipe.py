"""MIFO's four callbacks in the order in which they work together."""

from lightning.pytorch import Callback

from mifo_callbacks.buffer_phase_switch import BufferPhaseSwitch
from mifo_callbacks.entropy_token_selection import EntropyTokenSelection
from mifo_callbacks.gradient_freezing import GradientFreezing
from mifo_callbacks.importance_ema import ImportanceEMA


def mifo(
    size: int = 128,
    max_accuracy: float = 0.125,
    tokens: float = 0.2,
    frozen: float = 0.5,
    alpha: float = 0.5,
) -> list[Callback]:
    """The callbacks of the method with its defaults (MIFO, Algorithm 1); `size` and `alpha` are open in the paper.

    Args:
        size: S, demonstrations that trigger an SFT phase.
        max_accuracy: p; a question enters the buffer if at most floor(p G) of its G rollouts are correct.
        tokens: rho, share of tokens, by entropy, that SFT learns from.
        frozen: k, share of coordinates, by how far RL moved them, that stand still in SFT.
        alpha: Weight of the past in the map of importance.

    Returns:
        In the order that the Trainer needs; other settings are those of the single callbacks.
    """
    return [
        EntropyTokenSelection(tokens),
        ImportanceEMA(alpha),
        GradientFreezing(frozen),
        BufferPhaseSwitch(size, max_accuracy),
    ]
