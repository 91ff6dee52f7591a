"""Rewards turn (response, ground truth) into a finite number; import each from its own module."""
