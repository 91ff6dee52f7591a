"""Rollouts: the engine protocol and the engine that decodes inside the training process."""
