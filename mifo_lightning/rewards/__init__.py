"""Rewards turn (response, ground truth) into a number in [0, 1]; import each from its own module."""
