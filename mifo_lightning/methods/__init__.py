"""Methods that mix demonstrations into RL steps, and freezing for adapters, one a file; `configs/methods/` has these and those made of phases."""

from mifo_lightning.methods.chord import Chord
from mifo_lightning.methods.direction_freezing import DirectionFreezing
from mifo_lightning.methods.hpt import HPT
from mifo_lightning.methods.luffy import Luffy
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.methods.srft import SRFT

__all__ = ["HPT", "SRFT", "Chord", "DirectionFreezing", "Luffy", "Mixing"]
