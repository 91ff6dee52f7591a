"""Callbacks that only watch: what a run does, what its phases forget and move, what it costs and leaves on disk."""
