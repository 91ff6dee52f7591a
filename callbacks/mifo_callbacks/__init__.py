"""Lightning callbacks of MIFO (arXiv 2510.04454), each usable alone, and the pure functions under them."""

from mifo_callbacks.buffer import DemonstrationBuffer
from mifo_callbacks.buffer_phase_switch import BufferPhaseSwitch
from mifo_callbacks.cumulative_freezing import CumulativeFreezing
from mifo_callbacks.entropy_token_selection import EntropyTokenSelection
from mifo_callbacks.freezing_rules import Coordinates, FreezingRule, freezing_masks
from mifo_callbacks.gradient_dropping import GradientDropping, dropping_mask
from mifo_callbacks.gradient_freezing import GradientFreezing
from mifo_callbacks.importance_ema import ImportanceEMA, update_importance
from mifo_callbacks.masking import mask_gradients
from mifo_callbacks.phase import PhaseCallback
from mifo_callbacks.recipe import mifo
from mifo_callbacks.seeds import Seed
from mifo_callbacks.thresholds import kth_largest, top_mask
from mifo_callbacks.tokens import Selection, select_tokens
from mifo_callbacks.two_sided_rules import LowGain, OverlapShares

__all__ = [
    "BufferPhaseSwitch",
    "Coordinates",
    "CumulativeFreezing",
    "DemonstrationBuffer",
    "EntropyTokenSelection",
    "FreezingRule",
    "GradientDropping",
    "GradientFreezing",
    "ImportanceEMA",
    "LowGain",
    "OverlapShares",
    "PhaseCallback",
    "Seed",
    "Selection",
    "dropping_mask",
    "freezing_masks",
    "kth_largest",
    "mask_gradients",
    "mifo",
    "select_tokens",
    "top_mask",
    "update_importance",
]
