"""Digests of content: all modules that recognise a thing by its content hash it here.

`digest` is wide enough that no two contents ever share one: items, files, models, caches. `short_hash`
is for tables of millions of rows and for what has to fit into an integer.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

DIGEST_BYTES = 32
# `sampled_digest` reads files up to this size as a whole.
_WHOLE_FILE_BYTES = 64 << 20
_BLOCKS = 64
_BLOCK_BYTES = 1 << 20


def digest(*parts: bytes) -> bytes:
    """SHA-256 of several parts, one after another.

    Args:
      parts: they can run into each other: a caller whose parts vary in length puts the lengths between them.

    Returns:
      DIGEST_BYTES bytes.
    """
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.digest()


def file_digest(path: str | os.PathLike) -> bytes:
    """`digest` of a file's content, which is read piece by piece.

    Args:
      path: of the file.

    Returns:
      DIGEST_BYTES bytes.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def sampled_digest(path: str | os.PathLike) -> bytes:
    """`file_digest` of a file up to 64 MiB; of a larger one, 64 blocks of 1 MiB spread over it.

    Args:
      path: of the file.

    Returns:
      DIGEST_BYTES bytes.

    Raises:
      OSError: the file cannot be read.
    """
    size = os.stat(path).st_size
    if size <= _WHOLE_FILE_BYTES:
        return file_digest(path)
    blocks = []
    with open(path, "rb") as file:
        for offset in np.linspace(0, size - _BLOCK_BYTES, _BLOCKS, dtype=np.int64):
            file.seek(int(offset))
            blocks.append(file.read(_BLOCK_BYTES))
    return digest(*blocks)


def short_hash(content: bytes, size: int = 8) -> bytes:
    """BLAKE2b. Among a million contents, two share 8 bytes with probability 3e-8.

    It is not the beginning of `digest`: prepared data, held-out rows and the order in which a run reads its
    rows depend on these values, so they must not change.

    Args:
      content: what is hashed.
      size: bytes of the hash.

    Returns:
      `size` bytes.
    """
    return hashlib.blake2b(content, digest_size=size).digest()
