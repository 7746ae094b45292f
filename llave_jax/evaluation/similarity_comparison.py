"""Comparison of evaluated models by their similarities, from the scores that evaluations wrote.

Owns what `python -m llave_jax.similarity` does: reading scores, the table, the files. The statistics
are `similarity.py`, the picture is `drawing.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llave_jax.common.files import write_text
from llave_jax.common.tables import align
from llave_jax.evaluation import published
from llave_jax.evaluation.drawing import write_histograms
from llave_jax.evaluation.output import SIMILARITY, read_similarity_file
from llave_jax.evaluation.similarity import EDGES, HEADING, SimilarityStats


def compare(
    evaluations: Mapping[str, str | os.PathLike],
    datasets: Sequence[str] | None,
    output: str | os.PathLike,
) -> str:
    """Compare evaluations, dataset by dataset and over all of them.

    Args:
      evaluations: label -> `output_dir` of `run.evaluate`.
      datasets: names; None: all that were scored in each of the evaluations.
      output: directory for similarity.png (over all datasets), similarity.json and similarity.txt.

    Returns:
      The table of similarity.txt.

    Raises:
      FileNotFoundError: a dataset was not scored, or none in each of the evaluations.
    """
    if datasets is None:
        scored = [set(_scored_datasets(directory)) for directory in evaluations.values()]
        datasets = sorted(set.intersection(*scored))
    if not datasets:
        places = ", ".join(map(str, evaluations.values()))
        raise FileNotFoundError(f"no dataset was scored in each of {places}")
    groups = {name: [name] for name in datasets}
    if len(datasets) > 1:
        groups["all"] = list(datasets)
    stats = {
        group: {label: read_similarity(path, members) for label, path in evaluations.items()}
        for group, members in groups.items()
    }
    output = Path(output)
    *_, together = stats.values()
    write_histograms(together, output / "similarity.png")
    write_numbers(
        {f"{label}/{group}": s for group, entry in stats.items() for label, s in entry.items()},
        output / "similarity.json",
    )
    table = align(comparison_rows(stats))
    write_text(output / "similarity.txt", table + "\n")
    return table


def _scored_datasets(directory: str | os.PathLike) -> list[str]:
    """Names of the datasets that were scored into a directory, sorted."""
    return sorted(path.name[: -len(SIMILARITY)] for path in Path(directory).glob(f"*{SIMILARITY}"))


def has_similarity(directory: str | os.PathLike, datasets: Iterable[str]) -> bool:
    """Whether `read_similarity` would find all of these datasets.

    Args:
      directory: of an evaluation.
      datasets: names.

    Returns:
      True if all were scored there, and have wrong candidates.
    """
    return all((Path(directory) / f"{name}{SIMILARITY}").is_file() for name in datasets)


def read_similarity(directory: str | os.PathLike, datasets: Sequence[str]) -> SimilarityStats:
    """Statistics over all queries of datasets that an evaluation scored.

    Args:
      directory: its `output_dir`.
      datasets: names; every query counts alike.

    Returns:
      One set of statistics for all of them together.

    Raises:
      FileNotFoundError: a dataset was not scored there.
    """
    parts = []
    for name in datasets:
        path = Path(directory) / f"{name}{SIMILARITY}"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; evaluate {name} into {directory} first"
            )
        parts.append(read_similarity_file(path))
    return SimilarityStats.together(parts)


def comparison_rows(stats: Mapping[str, Mapping[str, SimilarityStats]]) -> list[list[str]]:
    """The paper's Table 1, with the overlap of positives and hard negatives.

    Args:
      stats: by dataset, then by label.

    Returns:
      Rows of cells, the heading first: for each dataset one row a label, then the published rows.
    """
    rows = [["dataset", "model", *HEADING]]
    for dataset, by_label in stats.items():
        rows += [[dataset, label, *values.cells()] for label, values in by_label.items()]
        for label, means in published.SIMILARITY.get(dataset, {}).items():
            rows.append([dataset, f"{label} published", *(f"{mean:.2f}" for mean in means), "-"])
    return rows


def write_numbers(stats: Mapping[str, SimilarityStats], path: str | os.PathLike) -> None:
    """Write all numbers of a picture of `drawing.write_histograms` as JSON.

    Args:
      stats: by label.
      path: the file: {"edges": the bins' edges, "stats": {label: `SimilarityStats.to_dict`}}.
    """
    numbers = {"edges": EDGES.tolist(), "stats": {k: v.to_dict() for k, v in stats.items()}}
    write_text(path, json.dumps(numbers, indent=1) + "\n")
