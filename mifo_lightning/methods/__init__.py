"""Methods that mix demonstrations into RL steps, one a file, and freezing for adapters; `configs/methods/` has more."""

from mifo_lightning.methods.chord import Chord
from mifo_lightning.methods.direction_freezing import DirectionFreezing
from mifo_lightning.methods.hpt import HPT
from mifo_lightning.methods.luffy import Luffy
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.methods.srft import SRFT

__all__ = ["HPT", "SRFT", "Chord", "DirectionFreezing", "Luffy", "Mixing"]
