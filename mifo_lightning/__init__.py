"""MIFO on PyTorch Lightning: supervised fine-tuning inside reinforcement learning without forgetting."""

__version__ = "0.2.0"
