"""Signals, and where a run may be stopped."""
