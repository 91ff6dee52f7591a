"""Checkpoint files, written whole and read only whole; signals, and where a run may stop for one."""
