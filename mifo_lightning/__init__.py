"""MIFO on PyTorch Lightning: supervised fine-tuning inside reinforcement learning without forgetting."""

from importlib.metadata import version

__version__ = version("mifo_lightning")
