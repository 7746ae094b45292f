"""What every benchmark has: its tasks, how one is read, and the form in which its scores are written.

Owns the protocol alone. A benchmark is a module beside this one, entered by name in `BENCHMARKS` of `registry.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from llave_jax.evaluation import output
from llave_jax.evaluation.results import Suite
from llave_jax.evaluation.scoring import Result
from llave_jax.evaluation.task import Task
from llave_jax.parallel.processes import only_on_first


@dataclasses.dataclass(frozen=True)
class Options:
    """What flags say about how a benchmark is read. A benchmark looks at those that concern it.

    Attributes:
      images: image folder or archive, if it is not where the benchmark looks.
      frames: of a video that is saved as frames, so many are used; None: the benchmark's own number.
    """

    images: str | os.PathLike | None = None
    frames: int | None = None


class Benchmark(Protocol):
    """A benchmark whose files were found on disk. Nothing has been scored.

    Attributes:
      suite: all tasks, averages, published scores.
      max_length: tokens that its longest items need; None: the model's own limit suffices.
    """

    suite: Suite
    max_length: ClassVar[int | None] = None

    def names(self) -> list[str]:
        """The tasks that are on disk, in the order of the benchmark's tables.

        Raises:
          FileNotFoundError: there are none.
        """
        ...

    def read(self, name: str) -> Task:
        """Reads a task.

        Args:
          name: of the task.

        Returns:
          The task. Pictures and videos are not read yet.

        Raises:
          FileNotFoundError, ValueError: data is missing or malformed; it names file and row.
        """
        ...

    def write(self, directory: Path, task: Task, result: Result) -> None:
        """Writes scores and predictions.

        Args:
          directory: is made.
          task: what was scored.
          result: of it, with answers.
        """
        write(directory, task, result, dict(result.metrics))


def write(directory: Path, task: Task, result: Result, score: Mapping[str, Any]) -> None:
    """Writes `<task>_score.json`, `<task>_predictions.jsonl` and, of local rankings, `<task>_scores.npz`.

    Args:
      directory: is made.
      task: what was scored, with names of candidates.
      result: of it, with answers.
      score: what the score file holds.
    """
    name = task.info.name
    output.write_score(directory, name, score)
    rows = output.prediction_rows(task, only_on_first(result.answers))
    output.write_lines(directory / f"{name}_predictions.jsonl", rows)
    output.write_all_scores(directory, task, result)
