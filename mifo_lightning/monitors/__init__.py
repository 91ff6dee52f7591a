"""Callbacks that only watch: what a run does, what its phases forget and move, what it costs, what it leaves on disk."""
