"""Callbacks that only watch: progress, seconds by activity, update norms, samples, the table before and after."""
