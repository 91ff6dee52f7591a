"""Losses as pure functions: tensors in, `(loss, metrics)` out; every denominator belongs to the whole optimizer step."""
