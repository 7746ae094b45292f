"""The benchmarks by name.

A new one is a module beside this one with a subclass of `base.Benchmark`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llave_jax.evaluation.benchmarks import corpus, mmeb, text_video
from llave_jax.evaluation.benchmarks.base import Benchmark, Options
from llave_jax.evaluation.benchmarks.mmeb_v2.benchmark import MmebV2

# Name -> (its directory, options) -> the benchmark.
BENCHMARKS: dict[str, Callable[[Path, Options], Benchmark]] = {
    "mmeb": mmeb.Mmeb,
    "mmeb-v2": MmebV2,
    "retrieval": corpus.Corpus,
    **text_video.READERS,
}


def open_benchmark(name: str, data_dir: Path, options: Options | None = None) -> Benchmark:
    """Finds a benchmark's files.

    Args:
      name: one of BENCHMARKS.
      data_dir: its directory.
      options: how it is read.

    Returns:
      The benchmark; nothing has been scored.

    Raises:
      FileNotFoundError, ValueError: files are missing or malformed; it names them.
    """
    return BENCHMARKS[name](data_dir, options or Options())
