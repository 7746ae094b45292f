"""How far positives stand off from negatives: LLaVE's similarity analysis (its Fig. 1 and Table 1).

From each query's cosines to its candidates: the positive, the most similar and the least similar
negatives; their distributions, means and overlaps, as numbers and as a picture. Cosines are made
elsewhere (`mmeb.py`); the command line compares evaluations that were written before:

    python -m llave_jax.evaluation.similarity --evaluations InfoNCE=DIR LLaVE=DIR --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llave_jax.common.files import atomic_file, write_text
from llave_jax.evaluation import published
from llave_jax.evaluation.mmeb import read_scores
from llave_jax.evaluation.results import align

# Negatives of each kind and query, as in the paper.
NEGATIVES = 5
# Bins of all histograms: 0.04 wide, over all cosines.
EDGES = np.linspace(-1, 1, 51)

_KINDS = ("positive", "hard", "easy")
_TITLES = {
    "positive": "positive",
    "hard": f"hard negatives (top {NEGATIVES})",
    "easy": f"easy negatives (bottom {NEGATIVES})",
}
# Told apart in grey and by colour-blind eyes.
_COLOURS = {"positive": "#1b6ca8", "hard": "#d95f02", "easy": "#8a8f98"}


@dataclasses.dataclass(frozen=True)
class SimilarityStats:
    """Cosines float32 [n] each: one positive a query, up to NEGATIVES hard and easy negatives."""

    positive: np.ndarray
    hard: np.ndarray
    easy: np.ndarray

    def mean(self, kind: str) -> float:
        """Mean cosine of "positive", "hard" or "easy", as in the paper's Table 1."""
        return float(np.mean(getattr(self, kind), dtype=np.float64))

    def overlap(self, first: str, second: str) -> float:
        """Overlap coefficient of two kinds: 0 if told apart by a threshold, 1 if distributed alike.

        The area that their histograms (shares over EDGES) have in common.
        """
        return float(np.minimum(self.histogram(first), self.histogram(second)).sum())

    def histogram(self, kind: str) -> np.ndarray:
        """Share of the cosines in each bin of EDGES: float64 [bins], sums to 1."""
        values = getattr(self, kind)
        # Cosines of rounded embeddings can exceed 1 by an ulp or two.
        counts, _ = np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)
        return counts / len(values)

    def to_dict(self) -> dict[str, Any]:
        """Means, spreads, overlaps and histograms, for JSON."""
        numbers: dict[str, Any] = {"queries": len(self.positive)}
        for kind in _KINDS:
            values = getattr(self, kind)
            numbers[kind] = {
                "count": len(values),
                "mean": self.mean(kind),
                "std": float(np.std(values, dtype=np.float64)),
                "histogram": self.histogram(kind).tolist(),
            }
        numbers["overlap"] = {
            "positive_hard": self.overlap("positive", "hard"),
            "positive_easy": self.overlap("positive", "easy"),
            "hard_easy": self.overlap("hard", "easy"),
        }
        return numbers


def similarity_overlap(
    scores: Sequence[np.ndarray] | np.ndarray,
    positives: Sequence[int] | np.ndarray,
    *,
    candidates: Sequence[np.ndarray] | np.ndarray | None = None,
) -> SimilarityStats:
    """Collect each query's positive, its hard negatives and its easy ones.

    A query with fewer than 2 * NEGATIVES negatives has some of them in both kinds; one with none
    gives its positive only.

    Args:
      scores: cosines of each query with its candidates: [queries, candidates], or one array [c] a
        query with lengths that may differ.
      positives: int [queries], where each query's positive is among its candidates.
      candidates: int ids shaped like `scores`; equal ids of a query are one candidate given twice:
        repeated negatives count once and repetitions of the positive are no negatives. None: all
        candidates of a query differ.

    Raises:
      ValueError: shapes that do not fit, values that are no cosines, or no negatives at all; names
        the query.
    """
    if len(scores) != len(positives) or (candidates is not None and len(candidates) != len(scores)):
        raise ValueError(
            f"scores are of {len(scores)} queries, positives of {len(positives)}"
            + ("" if candidates is None else f", candidates of {len(candidates)}")
        )
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in _KINDS}
    for query, (row, positive) in enumerate(zip(scores, positives, strict=True)):
        row = _check_row(row, positive, query)
        ids = np.arange(len(row)) if candidates is None else np.asarray(candidates[query])
        if ids.shape != row.shape:
            raise ValueError(
                f"query {query}: {ids.shape} candidate ids for {row.shape} scores; expected as many"
            )
        unique, first = np.unique(ids, return_index=True)
        negatives = np.sort(row[first[unique != ids[positive]]])
        found["positive"].append(row[[positive]])
        found["hard"].append(negatives[-NEGATIVES:])
        found["easy"].append(negatives[:NEGATIVES])
    if not any(len(row) for row in found["hard"]):
        raise ValueError("no query has a negative: there is nothing to compare the positives with")
    return SimilarityStats(**{kind: np.concatenate(rows) for kind, rows in found.items()})


def _check_row(row: np.ndarray, positive: int, query: int) -> np.ndarray:
    row = np.asarray(row, np.float32)
    if row.ndim != 1 or not 0 <= positive < len(row):
        raise ValueError(
            f"query {query}: expected scores [c] with the positive at an index below c, found "
            f"scores {row.shape} and index {positive}"
        )
    # Not (<=): also true for nan. float32 dot products of unit vectors stay far within 1e-3.
    if not np.all(np.abs(row) <= 1 + 1e-3):
        raise ValueError(
            f"query {query}: scores must be cosines, found {row[np.argmax(~(np.abs(row) <= 1.001))]};"
            " L2-normalise the embeddings"
        )
    return row


def write_numbers(stats: Mapping[str, SimilarityStats], path: str | os.PathLike) -> None:
    """All numbers of `plot_histograms`'s picture as JSON, by label; `edges` are the bins'."""
    numbers = {"edges": EDGES.tolist(), "stats": {k: v.to_dict() for k, v in stats.items()}}
    write_text(Path(path), json.dumps(numbers, indent=1) + "\n")


def plot_histograms(stats: Mapping[str, SimilarityStats], path: str | os.PathLike) -> None:
    """A PNG with one panel for each label, cosines on a common axis, as in the paper's Fig. 1.

    Args:
      stats: for example {"InfoNCE": ..., "hardness-weighted": ...}.
    """
    if not stats:
        raise ValueError("nothing to plot: give at least one label with its statistics")
    columns = 2 if len(stats) == 4 else min(len(stats), 3)
    rows = -(-len(stats) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, (label, values) in zip(grid, stats.items(), strict=False):
        _draw_panel(axes, label, values)
    for axes in grid[len(stats) :]:
        axes.set_visible(False)
    grid[0].set_xlim(_limits(stats.values()))
    for axes in grid[::columns]:
        axes.set_ylabel("share of pairs")
    # The lowest panel of each column says what the axis is.
    for number, axes in enumerate(grid[: len(stats)]):
        if number + columns >= len(stats):
            axes.set_xlabel("cosine similarity")
            axes.tick_params(labelbottom=True)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3, frameon=False)

    with atomic_file(path) as temporary:
        # Without the version of matplotlib in it, the same numbers give the same file.
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def _draw_panel(axes: Axes, label: str, stats: SimilarityStats) -> None:
    for kind in reversed(_KINDS):
        colour = _COLOURS[kind]
        shares = stats.histogram(kind)
        axes.stairs(shares, EDGES, fill=True, color=colour, alpha=0.35, label=_TITLES[kind])
        axes.stairs(shares, EDGES, color=colour, linewidth=1.2)
        axes.axvline(stats.mean(kind), color=colour, linewidth=1.2, linestyle="--")
    means = ", ".join(f"{kind} {stats.mean(kind):.2f}" for kind in _KINDS)
    overlap = f"overlap positive/hard {stats.overlap('positive', 'hard'):.2f}"
    axes.set_title(label, fontsize=11, fontweight="bold", pad=30)
    note = {"ha": "center", "va": "bottom", "fontsize": 8.5, "color": "#444444"}
    axes.text(0.5, 1.02, f"mean: {means}\n{overlap}", transform=axes.transAxes, **note)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_ylim(bottom=0)


def _limits(stats: Iterable[SimilarityStats]) -> tuple[float, float]:
    """The bins that any panel uses, with a little room."""
    used = np.any([values.histogram(kind) > 0 for values in stats for kind in _KINDS], axis=0)
    bins = np.flatnonzero(used)
    width = EDGES[1] - EDGES[0]
    return EDGES[bins[0]] - width, EDGES[bins[-1] + 1] + width


_SCORES = "_scores.npz"


def scored_datasets(directory: str | os.PathLike) -> list[str]:
    """Datasets whose scores `evaluate_mmeb` left in a directory, by name."""
    return sorted(path.name[: -len(_SCORES)] for path in Path(directory).glob(f"*{_SCORES}"))


def read_similarity(directory: str | os.PathLike, datasets: Sequence[str]) -> SimilarityStats:
    """Statistics over all queries of datasets that `evaluate_mmeb` scored.

    Args:
      directory: its `output_dir`.
      datasets: names; every query counts alike.

    Raises:
      FileNotFoundError: a dataset was not scored there.
    """
    scores, candidates = [], []
    for name in datasets:
        path = Path(directory) / f"{name}{_SCORES}"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; evaluate {name} into {directory} first"
            )
        scores += read_scores(path)
        candidates += read_scores(path, "candidates")
    return similarity_overlap(scores, [0] * len(scores), candidates=candidates)


def comparison_rows(stats: Mapping[str, Mapping[str, SimilarityStats]]) -> list[list[str]]:
    """Cells of the paper's Table 1, with the overlap: one row a dataset and label, then the published
    ones of that dataset.

    Args:
      stats: by dataset, then by label.
    """
    rows = [["dataset", "model", *_KINDS, "overlap of positive and hard"]]
    for dataset, by_label in stats.items():
        for label, values in by_label.items():
            # Adding zero makes a rounded -0.00 plain.
            means = [f"{round(values.mean(kind), 2) + 0.0:.2f}" for kind in _KINDS]
            rows.append([dataset, label, *means, f"{values.overlap('positive', 'hard'):.2f}"])
        for label, means in published.SIMILARITY.get(dataset, {}).items():
            rows.append([dataset, f"{label} published", *(f"{mean:.2f}" for mean in means), "-"])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llave_jax.evaluation.similarity",
        description="Compare how evaluated models tell positives from negatives.",
    )
    parser.add_argument(
        "--evaluations",
        nargs="+",
        required=True,
        metavar="LABEL=DIR",
        help="outputs of llave_jax.evaluate, with a name for each",
    )
    parser.add_argument("--subsets", help="comma-separated datasets; default: those in all outputs")
    parser.add_argument("--output", required=True, help="for similarity.png, .json and .txt")
    args = parser.parse_args(argv)
    pairs = [entry.partition("=") for entry in args.evaluations]
    if not all(label and directory for label, _, directory in pairs):
        parser.error(f"--evaluations takes LABEL=DIR, found {' '.join(args.evaluations)}")
    directories = {label: directory for label, _, directory in pairs}
    if args.subsets:
        names = args.subsets.split(",")
    else:
        names = sorted(set.intersection(*(set(scored_datasets(d)) for d in directories.values())))
    if not names:
        parser.error(f"no dataset was scored in each of {', '.join(directories.values())}")

    groups = {name: [name] for name in names}
    if len(names) > 1:
        groups["all"] = names
    try:
        stats = {
            group: {label: read_similarity(path, members) for label, path in directories.items()}
            for group, members in groups.items()
        }
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    output = Path(args.output)
    *_, together = stats.values()
    plot_histograms(together, output / "similarity.png")
    write_numbers(
        {f"{label}/{group}": s for group, entry in stats.items() for label, s in entry.items()},
        output / "similarity.json",
    )
    table = align(comparison_rows(stats))
    write_text(output / "similarity.txt", table + "\n")
    print(table)


if __name__ == "__main__":
    main()
