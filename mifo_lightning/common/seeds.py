"""Randomness without state: every random choice has a key made of what it is for."""

import hashlib


def stable_key(*parts: int | str) -> int:
    """A 63-bit integer that depends on the parts alone, e.g. `stable_key(seed, "rl", rollout, question_id)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
