"""What every benchmark has: its tasks, how one is read, and the form in which its scores are written.

Owns the protocol alone. A benchmark is a module beside this one, entered by name in `BENCHMARKS` of `registry.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llave_jax.evaluation import output
from llave_jax.evaluation.results import Results, Suite
from llave_jax.evaluation.scoring import Result
from llave_jax.evaluation.task import Task
from llave_jax.parallel.processes import only_on_first


@dataclasses.dataclass(frozen=True)
class Options:
    """What flags say about how a benchmark is read. A benchmark looks at those that concern it.

    Attributes:
      images: image folder or archive, if it is not where the benchmark looks.
      frames: of a video that is saved as frames, so many are used; None: the benchmark's own number.
      query_prompt: put before the texts of queries, where a benchmark has no words of its own.
      document_prompt: the same of documents.
    """

    images: str | os.PathLike | None = None
    frames: int | None = None
    query_prompt: str = ""
    document_prompt: str = ""


class Missing(NamedTuple):
    """Something that a task lacks on disk.

    Attributes:
      task: its name.
      what: is missing, and where it was looked for.
      command: that fetches it; "" if there is none.
      example: a file of it, if it has many.
    """

    task: str
    what: str
    command: str
    example: str = ""


class Benchmark(Protocol):
    """A benchmark whose files were found on disk. Nothing has been scored.

    Attributes:
      suite: all tasks, averages, published scores.
      variants: further tasks, which are scored if they are named, and enter no average.
      max_length: tokens that its longest items need; None: the model's own limit suffices.
    """

    suite: Suite
    variants: Sequence[str] = ()
    max_length: int | None = None

    def names(self) -> list[str]:
        """The tasks that are scored if none are named, in the order of the benchmark's tables.

        Raises:
          FileNotFoundError: there are none.
        """
        ...

    def missing(self, names: Sequence[str]) -> list[Missing]:
        """What tasks lack on disk.

        Args:
          names: of the tasks.

        Returns:
          What is missing; nothing for a benchmark whose tasks are there if `names` has them.

        Raises:
          ValueError: there is no such task, or data is malformed.
        """
        del names
        return []

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

    def finish(self, directory: Path, results: Results, settings: Mapping[str, Any] | None) -> None:
        """Writes what is of all tasks together, after the last one; nothing, if a benchmark has no such file.

        Args:
          directory: of the score files.
          results: of this run.
          settings: what computed them, as in `run.json`; None: unknown.
        """


def describe(missing: Iterable[Missing]) -> str:
    """What is missing, each thing once with its tasks and its command.

    Args:
      missing: by task.

    Returns:
      Lines of text.
    """
    groups: dict[tuple[str, str], list[Missing]] = {}
    for entry in missing:
        groups.setdefault((entry.what, entry.command), []).append(entry)
    lines = []
    for (what, command), entries in groups.items():
        example = f", such as {entries[0].example}" if entries[0].example else ""
        lines += [f"{what}{example}", f"  for {', '.join(entry.task for entry in entries)}"]
        lines += [f"  {command}"] if command else []
    return "\n".join(lines)


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
