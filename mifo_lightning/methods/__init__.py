"""Methods that mix demonstrations into RL steps, and what protects weights in SFT; `configs/methods/` has more."""

from mifo_lightning.methods.anchor import Anchor
from mifo_lightning.methods.chord import Chord
from mifo_lightning.methods.direction_freezing import DirectionFreezing
from mifo_lightning.methods.hpt import HPT
from mifo_lightning.methods.luffy import Luffy
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.methods.sign_conflict import SignConflict
from mifo_lightning.methods.soft_freezing import SoftFreezing
from mifo_lightning.methods.srft import SRFT
from mifo_lightning.methods.subspace_freezing import SubspaceFreezing

__all__ = [
    "HPT",
    "SRFT",
    "Anchor",
    "Chord",
    "DirectionFreezing",
    "Luffy",
    "Mixing",
    "SignConflict",
    "SoftFreezing",
    "SubspaceFreezing",
]
