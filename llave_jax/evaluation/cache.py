"""Embeddings by content: each item is encoded once, and a killed evaluation continues.

Owns the store (memory or disk) and the loop that encodes what is missing. On disk the store is a
directory of safetensors shards. What makes two items the same is `inputs/content.py`.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from llave_jax.common.content import DIGEST_BYTES, digest
from llave_jax.common.directories import make_directory
from llave_jax.common.files import atomic_file, remove_abandoned
from llave_jax.embedding.checks import check_embeddings
from llave_jax.embedding.precision import truncate
from llave_jax.inputs.content import item_key
from llave_jax.inputs.item import Item
from llave_jax.parallel.processes import from_first_process

# Items -> float32 [n, D], L2-normalised, in order: `Embedder.encode`, or a stand-in in tests.
Encode = Callable[[Sequence[Item]], np.ndarray]

# Items that are encoded between two writes: the most that a killed run loses. More items fill batches better.
SHARD_ITEMS = 1024
_CHECKSUM = "sha256"

logger = logging.getLogger(__name__)


class EmbeddingCache:
    """Embeddings of one model, by the key of the item (`inputs.content.item_key`).

    With a directory they lie in `<directory>/<fingerprint>/*.safetensors` and are there for the next run. A shard
    that is damaged, or was made for another model, is removed with a warning: its items are encoded again.
    Without a directory they stay in memory as long as this object.

    Args:
      directory: of the caches of all models; None: in memory.
      fingerprint: of the model, see `weights/fingerprint.py`; required with a directory.
      model: as its user calls it, for messages.
      truncate_dim: numbers that are given of each embedding, L2-normalised again; kept are all of them. None: all.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None = None,
        fingerprint: str = "",
        *,
        model: str = "",
        truncate_dim: int | None = None,
    ):
        if directory is not None and not fingerprint:
            raise ValueError(
                "an embedding cache on disk needs the model's fingerprint: without it one model's "
                "embeddings would be taken for another's"
            )
        self.model = model
        self._truncate_dim = truncate_dim
        self._fingerprint = fingerprint
        self._dimension: int | None = None
        self._where: dict[bytes, tuple[int, int]] = {}  # key -> (shard, row)
        self._shards: list[np.ndarray | Path] = []
        self._directory = Path(directory) / fingerprint if directory is not None else None
        if self._directory is not None:
            make_directory(self._directory)
            remove_abandoned(self._directory)
            for path in sorted(self._directory.glob("*.safetensors")):
                self._take(path)

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
            save_file(arrays, temporary, {_CHECKSUM: self._checksum(arrays)})
        self._register(key_array, path)

    def gather(self, keys: Sequence[bytes]) -> np.ndarray:
        """Look embeddings up.

        Args:
          keys: n keys, also repeated ones.

        Returns:
          float32 [n, D], in order; [n, truncate_dim] where that is set.

        Raises:
          KeyError: a key is not stored.
        """
        found = np.array([self._where[key] for key in keys]).reshape(-1, 2)
        result: np.ndarray | None = None
        for shard in np.unique(found[:, 0]):
            source = self._shards[shard]
            rows = source if isinstance(source, np.ndarray) else _read(source)[0]["embeddings"]
            if result is None:
                result = np.empty((len(keys), rows.shape[1]), np.float32)
            chosen = found[:, 0] == shard
            result[chosen] = rows[found[chosen, 1]]
        if result is None:
            return np.zeros((0, 0), np.float32)
        return truncate(result, self._truncate_dim)

    def _take(self, path: Path) -> None:
        """Enters a shard of an earlier run, or removes it."""
        try:
            arrays, metadata = _read(path)
            problem = self._problem(arrays, metadata.get(_CHECKSUM))
        except FileNotFoundError:  # Another evaluation has removed it.
            return
        except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
            problem = f"cannot be read ({error})"
        if problem is None:
            self._dimension = arrays["embeddings"].shape[1]
            self._register(arrays["keys"], path)
            return
        logger.warning("%s: %s; it is removed, and its items are encoded again", path, problem)
        path.unlink(missing_ok=True)

    def _problem(self, arrays: dict[str, np.ndarray], checksum: str | None) -> str | None:
        """Why a shard cannot be used; None if it can. Those of earlier versions have no checksum."""
        keys, rows = arrays.get("keys"), arrays.get("embeddings")
        if keys is None or rows is None or (keys.dtype, rows.dtype) != (np.uint8, np.float32):
            return "has not the tensors of a shard of embeddings"
        if keys.shape != (len(keys), DIGEST_BYTES) or rows.ndim != 2:
            return "has not the form of a shard of embeddings"
        if len(keys) != len(rows) or self._dimension not in (None, rows.shape[1]):
            return f"has embeddings of the shape {rows.shape}, not that of the other shards"
        if checksum is not None and checksum != self._checksum(arrays):
            return "is damaged, or of another model (its checksum differs)"
        return None if np.isfinite(rows).all() else "has embeddings that are not finite"

    def _checksum(self, arrays: dict[str, np.ndarray]) -> str:
        content = (np.ascontiguousarray(arrays[name]).tobytes() for name in ("keys", "embeddings"))
        return digest(self._fingerprint.encode(), *content).hex()

    def _register(self, keys: np.ndarray, shard: np.ndarray | Path) -> None:
        for row, key in enumerate(keys):
            self._where[key.tobytes()] = (len(self._shards), row)
        self._shards.append(shard)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a shard by name, and its metadata."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


class Embedded(NamedTuple):
    """Embeddings of items. Items of one content share a row, so that their scores are equal to the last bit.

    Attributes:
      vectors: float32 [contents, D], L2-normalised.
      rows: int32 [items], the row of each item.
    """

    vectors: np.ndarray
    rows: np.ndarray


def embed(
    encode: Encode,
    items: Sequence[Item],
    cache: EmbeddingCache,
    *,
    shard_items: int = SHARD_ITEMS,
) -> Embedded | None:
    """Embeddings of items, encoding only those whose content is not in the cache.

    With several processes all call this with the same items. The cache of the first one decides what is
    missing, all take part in encoding it, and only the first one keeps and returns the result.

    Args:
      encode: items -> float32 [n, D], L2-normalised, in order.
      items: each is asked for again for each use, so that images need not stay in memory (`task.Items`).
      cache: takes and gives the embeddings.
      shard_items: items that are encoded between two writes.

    Returns:
      The embeddings on the first process, None on the others.

    Raises:
      ValueError: an item cannot be read, or its embedding is not finite; it names the item.
    """
    first = jax.process_index() == 0
    contents: dict[bytes, int] = {}
    rows = np.zeros(len(items) if first else 0, np.int32)
    missing = np.zeros(len(items), bool)
    for i in range(len(rows)):
        key = item_key(items[i])
        missing[i] = key not in cache and key not in contents
        rows[i] = contents.setdefault(key, len(contents))
    keys = list(contents)
    indices = np.flatnonzero(from_first_process(missing))
    for start in range(0, len(indices), shard_items):
        chunk = indices[start : start + shard_items]
        made = [items[int(i)] for i in chunk]
        embeddings = np.asarray(encode(made), np.float32)
        check_embeddings(embeddings, made, cache.model)
        if first:
            cache.add([keys[rows[i]] for i in chunk], embeddings)
    return Embedded(cache.gather(keys), rows) if first else None
