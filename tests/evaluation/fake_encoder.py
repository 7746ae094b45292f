"""Stand-ins for a model in tests of the evaluation: vectors that depend on content only."""

import hashlib

import numpy as np

from llave_jax.inputs.content import item_key


def hash_vector(key: bytes, size: int = 16) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return vector / np.linalg.norm(vector)


class HashEncoder:
    """Random unit vectors by content; remembers the keys of all items it was asked to encode."""

    def __init__(self, fail_after: int | None = None):
        self.keys: list[bytes] = []
        self.fail_after = fail_after

    def __call__(self, items):
        self.keys += [item_key(item) for item in items]
        if self.fail_after is not None and len(self.keys) > self.fail_after:
            raise KeyboardInterrupt
        return np.stack([hash_vector(item_key(item)) for item in items])
