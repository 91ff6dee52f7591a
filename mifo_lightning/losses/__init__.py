"""Losses as pure functions: tensors in, `(loss, metrics)` out; denominators belong to the whole optimizer step."""
