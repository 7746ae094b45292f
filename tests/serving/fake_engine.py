"""An engine without a model: its vectors are made of each item's content, so that a mix-up is seen."""

import hashlib
import threading
from types import SimpleNamespace

import numpy as np

from llave_jax.inputs import taps
from llave_jax.inputs.config import InputConfig
from llave_jax.inputs.images import load_image
from llave_jax.inputs.sequence import TokenSequence
from llave_jax.serving.items import ClientItem, ItemError, load_item
from llave_jax.serving.settings import Limits

DIMENSION = 8
LONGEST = 200


def vector_of(content: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big")
    vector = np.random.default_rng(seed).normal(size=DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector)


class FakeEngine:
    """Two shards; a batch has room for `rows * row_length` tokens in each.

    Attributes:
      batches: the contents of each batch that was run.
      gate: batches are computed while it is set.
      broken: "pack" or "forward": items with the word POISON make that fail.
    """

    def __init__(self, slots: int = 4, tokens_per_batch: int = 4000, limits: Limits | None = None):
        self.tokens_per_batch = tokens_per_batch
        self.slots = slots
        self.limits = limits or Limits()
        self.batches: list[list[str]] = []
        self.prepared: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = ""

    def prepare(self, item):
        if isinstance(item, ClientItem):
            loaded = load_item(item, InputConfig(pinpoints=((4, 4),)), self.limits)
            try:
                shown = [load_image(image, item.where) for image in loaded.images]
            except ValueError as error:  # as `ModelEngine` does
                raise ItemError.of(item, error) from error
            content = f"{item.prompt_name} {item.text} {[i.tobytes() for i in shown]}"
            if len(item.text) > LONGEST and not item.truncate:
                raise ItemError(item.where, "is too long", "too_long")
        else:
            content = item
        if "UNREADABLE" in content:
            raise ValueError("cannot be read")
        self.prepared.append(content)
        tokens = np.arange(min(len(content), LONGEST), dtype=np.int32)
        return TokenSequence(tokens, np.zeros((0, 2, 2, 3), np.uint8), taps.newlines(0), content)

    def pack(self, sequences):
        if self.broken == "pack" and "POISON" in sequences[0].name:
            raise RuntimeError("cannot be packed")
        taken = sequences[: 2 * self.slots]
        indices = np.full(2 * self.slots, -1, np.int32)
        indices[: len(taken)] = np.arange(len(taken))
        # Filled from the end of each shard, so that the order of slots is not the order of items.
        indices = indices.reshape(2, self.slots)[:, ::-1]
        names = [sequence.name for sequence in taken]
        return SimpleNamespace(tokens=np.zeros((2, 1, 1000)), names=names, indices=indices), indices

    def forward(self, batch):
        if self.broken == "forward" and any("POISON" in name for name in batch.names):
            raise RuntimeError("the device is out of memory")
        return _Later(self, batch)


class _Later:
    """An array that is computed when it is asked for."""

    def __init__(self, engine, batch):
        self.engine, self.batch = engine, batch

    def __array__(self, dtype=None, copy=None):
        assert self.engine.gate.wait(20)
        self.engine.batches.append(self.batch.names)
        result = np.zeros((*self.batch.indices.shape, DIMENSION), np.float32)
        for place, index in np.ndenumerate(self.batch.indices):
            if index >= 0:
                name = self.batch.names[index]
                result[place] = np.nan if name == "NOT FINITE" else vector_of(name)
        return result
