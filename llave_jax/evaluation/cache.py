"""Embeddings by content: each item is encoded once, and a killed evaluation continues.

Owns the store (memory or disk) and the loop that encodes what is missing. On disk the store is a
directory of safetensors shards. What makes two items the same is `inputs/content.py`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from llave_jax.common.content import DIGEST_BYTES
from llave_jax.common.files import atomic_file
from llave_jax.embedding.checks import check_embeddings
from llave_jax.inputs.content import item_key
from llave_jax.inputs.item import Item
from llave_jax.parallel.processes import from_first_process

# Items -> float32 [n, D], L2-normalised, in order: `Embedder.encode`, or a stand-in in tests.
Encode = Callable[[Sequence[Item]], np.ndarray]

# Items that are encoded between two writes: the most that a killed run loses. More items fill batches better.
SHARD_ITEMS = 1024


class EmbeddingCache:
    """Embeddings of one model, by the key of the item (`inputs.content.item_key`).

    With a directory they lie in `<directory>/<fingerprint>/*.safetensors` and are there for the next run.
    Without one they stay in memory as long as this object.

    Args:
      directory: of the caches of all models; None: in memory.
      fingerprint: of the model, see `weights/fingerprint.py`; required with a directory.
    """

    def __init__(self, directory: str | os.PathLike | None = None, fingerprint: str = ""):
        if directory is not None and not fingerprint:
            raise ValueError(
                "an embedding cache on disk needs the model's fingerprint: without it one model's "
                "embeddings would be taken for another's"
            )
        self._where: dict[bytes, tuple[int, int]] = {}  # key -> (shard, row)
        self._shards: list[np.ndarray | Path] = []
        self._directory = Path(directory) / fingerprint if directory is not None else None
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._directory.glob("*.safetensors")):
                self._register(_read_shard(path, "keys"), path)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def add(self, keys: Sequence[bytes], embeddings: np.ndarray) -> None:
        """Store embeddings.

        Args:
          keys: n different ones.
          embeddings: float32 [n, D].
        """
        key_array = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), DIGEST_BYTES)
        if self._directory is None:
            self._register(key_array, embeddings)
            return
        # A random name, since two evaluations may share the cache.
        path = self._directory / f"{uuid.uuid4().hex}.safetensors"
        arrays = {"keys": key_array, "embeddings": np.ascontiguousarray(embeddings)}
        with atomic_file(path) as temporary:
            save_file(arrays, temporary)
        self._register(key_array, path)

    def gather(self, keys: Sequence[bytes]) -> np.ndarray:
        """Look embeddings up.

        Args:
          keys: n keys, also repeated ones.

        Returns:
          float32 [n, D], in order.

        Raises:
          KeyError: a key is not stored.
        """
        found = np.array([self._where[key] for key in keys]).reshape(-1, 2)
        result: np.ndarray | None = None
        for shard in np.unique(found[:, 0]):
            source = self._shards[shard]
            rows = source if isinstance(source, np.ndarray) else _read_shard(source, "embeddings")
            if result is None:
                result = np.empty((len(keys), rows.shape[1]), np.float32)
            chosen = found[:, 0] == shard
            result[chosen] = rows[found[chosen, 1]]
        return np.zeros((0, 0), np.float32) if result is None else result

    def _register(self, keys: np.ndarray, shard: np.ndarray | Path) -> None:
        for row, key in enumerate(keys):
            self._where[key.tobytes()] = (len(self._shards), row)
        self._shards.append(shard)


def _read_shard(path: Path, name: str) -> np.ndarray:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a readable shard of embeddings ({error}); delete it and run again"
        ) from error


def embed(
    encode: Encode,
    count: int,
    make_item: Callable[[int], Item],
    cache: EmbeddingCache,
    *,
    shard_items: int = SHARD_ITEMS,
) -> np.ndarray | None:
    """Embeddings of items 0..count-1, encoding only those whose content is not in the cache.

    With several processes all call this with the same items. The cache of the first one decides what is
    missing, all take part in encoding it, and only the first one keeps and returns the result.

    Args:
      encode: items -> float32 [n, D], L2-normalised, in order.
      count: number of items.
      make_item: index -> item; called again for each use, so that images need not stay in memory.
      cache: takes and gives the embeddings.
      shard_items: items that are encoded between two writes.

    Returns:
      float32 [count, D] on the first process, None on the others.

    Raises:
      ValueError: an item cannot be read, or its embedding is not finite; it names the item.
    """
    first = jax.process_index() == 0
    keys: list[bytes] = [item_key(make_item(i)) for i in range(count)] if first else []
    missing = np.zeros(count, bool)
    if first:
        known: set[bytes] = set()
        for i, key in enumerate(keys):
            missing[i] = key not in cache and key not in known
            known.add(key)
    indices = np.flatnonzero(from_first_process(missing))
    for start in range(0, len(indices), shard_items):
        chunk = indices[start : start + shard_items]
        items = [make_item(int(i)) for i in chunk]
        embeddings = np.asarray(encode(items), np.float32)
        check_embeddings(embeddings, items)
        if first:
            cache.add([keys[i] for i in chunk], embeddings)
    return cache.gather(keys) if first else None
