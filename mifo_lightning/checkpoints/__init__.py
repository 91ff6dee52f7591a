"""Checkpoint files: written whole, read only whole, restored with one line for what does not fit."""
