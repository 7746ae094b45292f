"""Curves of runs over their steps, from metrics files: a page, a picture and a table.

Owns which metrics are drawn and how. `metrics.py` writes and reads the files. Matplotlib is imported when
something is drawn.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llave_jax.common.directories import make_directory
from llave_jax.common.files import write_text
from llave_jax.evaluation import report_html as html
from llave_jax.evaluation.drawing import figure_svg, write_png
from llave_jax.training.best import is_better
from llave_jax.training.metrics import FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Distinguishable for colour-blind readers (Okabe and Ito), the lightest left out.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
# Lines of one panel and run; from the second round of colours on, runs differ by their markers.
_STYLES = ("-", "--", ":")
_MARKERS = ("o", "s", "^", "D", "v")
# With so many points or fewer each of them is marked.
_MARKED = 40


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
      title: above it.
      lines: (metric, what it is called in the legend), one for each of _STYLES at most.
      is_share: values are fractions, shown in percent.
    """

    title: str
    lines: Sequence[tuple[str, str]]
    is_share: bool = False


PANELS = (
    Panel("Loss", (("loss", "training"), ("validation/loss", "held-out pairs"))),
    Panel(
        "InfoNCE, without weights",
        (("infonce_loss", "training"), ("validation/infonce_loss", "held-out pairs")),
    ),
    Panel(
        "Recall among held-out pairs",
        tuple((f"validation/recall@{k}", f"recall@{k}") for k in (1, 5, 10)),
        is_share=True,
    ),
    Panel("Benchmark: precision@1", (("eval/average/overall", "average of datasets"),), True),
    Panel(
        "Benchmark: retrieval",
        (
            ("eval/nDCG@10", "nDCG@10"),
            ("eval/recall@10", "recall@10"),
            ("eval/recall@1", "recall@1"),
        ),
        is_share=True,
    ),
    Panel(
        "Cosine similarity in the batch",
        (
            ("positive_similarity", "positives"),
            ("hard_negative_similarity", "hardest negative"),
            ("easy_negative_similarity", "easiest negative"),
        ),
    ),
    Panel("Learning rate", (("learning_rate", ""),)),
    Panel("Speed, pairs per second", (("pairs_per_second", ""),)),
    Panel("Gradient norm", (("grad_norm", ""),)),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The metrics of a run.

    Attributes:
      label: in legends.
      steps: step -> name -> value; the steps ascend.
    """

    label: str
    steps: Mapping[int, Mapping[str, float]]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """The values of a metric.

        Args:
          name: of the metric.

        Returns:
          The steps at which it was written, and its values.
        """
        found = [(step, values[name]) for step, values in self.steps.items() if name in values]
        return [step for step, _ in found], [value for _, value in found]


def read_runs(directories: Sequence[tuple[str | None, Path]]) -> list[Run]:
    """The metrics of runs.

    Args:
      directories: (label, the run's directory). None: the end of its path by which it differs from the
        others.

    Returns:
      A run for each of them, in order.

    Raises:
      FileNotFoundError: a directory has no metrics.
      ValueError: two runs have one label.
    """
    paths = [path.resolve() for _, path in directories]
    runs = []
    for (label, directory), path in zip(directories, paths, strict=True):
        lines = read_metrics(directory)
        if not lines:
            raise FileNotFoundError(
                f"{directory} has no {FILE} with metrics; expected the --workdir of a run"
            )
        steps: dict[int, dict[str, float]] = {}
        for line in lines:
            steps.setdefault(int(line["step"]), {}).update(line)
        label = label or _shortest_end(path, [other for other in paths if other != path])
        runs.append(Run(label, dict(sorted(steps.items()))))
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"runs need different labels, found {', '.join(labels)}; use LABEL=DIR")
    return runs


def _shortest_end(path: Path, others: Sequence[Path]) -> str:
    for count in range(1, len(path.parts)):
        end = path.parts[-count:]
        if all(other.parts[-count:] != end for other in others):
            return "/".join(end)
    return str(path)


def write_curves(runs: Sequence[Run], output: Path) -> list[Path]:
    """Draws runs over one another.

    Args:
      runs: at least one.
      output: directory for curves.html (one page that loads nothing), curves.png and metrics.csv; made.

    Returns:
      The files.
    """
    files = [output / name for name in ("curves.html", "curves.png", "metrics.csv")]
    make_directory(output)
    write_text(files[0], _page(runs))
    write_png(_picture(runs), files[1])
    write_text(files[2], table(runs))
    return files


def table(runs: Sequence[Run]) -> str:
    """All metrics as CSV.

    Args:
      runs: at least one.

    Returns:
      A line for each run and step, a column for each metric of any run.
    """
    names = {name for run in runs for values in run.steps.values() for name in values}
    columns = ["run", "step", "time", *sorted(names - {"step", "time"})]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        for values in run.steps.values():
            writer.writerow({"run": run.label, **values})
    return text.getvalue()


def _page(runs: Sequence[Run]) -> str:
    charts = "".join(
        f'<div class="sheet">{figure_svg(_panel(runs, panel))}</div>' for panel in _drawn(runs)
    )
    columns = "repeat(auto-fit,minmax(min(100%,330px),1fr))"
    sections = [
        html.Section("Runs", "".join(_legend(number, run) for number, run in enumerate(runs))),
        html.Section(
            "Curves",
            f'<div style="display:grid;gap:1.2rem;grid-template-columns:{columns}">{charts}</div>',
        ),
    ]
    subtitle = f"{len(runs)} runs" if len(runs) > 1 else ""
    return html.page("Training curves", subtitle, [html.Chapter("", sections)])


def _legend(number: int, run: Run) -> str:
    """The colour of a run, its label, and its scores in one line that wraps."""
    return (
        '<p style="overflow-wrap:anywhere"><svg class="sheet" width="26" height="12" style="display:inline-block;'
        'vertical-align:middle" aria-hidden="true"><line x1="0" y1="6" x2="26" y2="6" '
        f'stroke="{_colour(number)}" stroke-width="3"/></svg> <b>{html.escape(run.label)}</b><br>'
        f'<span class="soft">{html.escape(_scores(run))}</span></p>\n'
    )


def _scores(run: Run) -> str:
    """The last values of training, and the best ones of what is evaluated."""
    parts = [f"{max(run.steps)} steps"]
    for name, called in (("loss", "loss"), ("infonce_loss", "InfoNCE")):
        _, values = run.curve(name)
        if values:
            parts.append(f"{called} {values[-1]:.4f}")
    for name, called in (
        ("validation/loss", "held-out loss"),
        ("validation/recall@1", "recall@1"),
        ("eval/average/overall", "precision@1"),
        ("eval/nDCG@10", "nDCG@10"),
    ):
        steps, values = run.curve(name)
        if not steps:
            continue
        best = 0
        for index, value in enumerate(values):
            if is_better(name, value, values[best]):
                best = index
        text = f"{values[best]:.4f}" if name.endswith("loss") else f"{100 * values[best]:.1f} %"
        parts.append(f"best {called} {text} at step {steps[best]}")
    return ", ".join(parts)


def _drawn(runs: Sequence[Run]) -> list[Panel]:
    """The panels that a run has values for."""
    return [
        panel
        for panel in PANELS
        if any(_finite(*run.curve(name))[0] for run in runs for name, _ in panel.lines)
    ]


def _picture(runs: Sequence[Run]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = _drawn(runs)
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    height = 2.9 * rows + 0.22 * len(runs) + 0.2
    figure = Figure(figsize=(4.4 * columns, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, runs, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=_colour(n), linewidth=2.5) for n in range(len(runs))]
    # One run below another: labels of any length are whole.
    legend = figure.legend(
        handles, [run.label for run in runs], loc="outside lower left", frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _panel(runs: Sequence[Run], panel: Panel) -> Figure:
    """A panel by itself, as wide as a phone: 390 pixels of it make 11 pixels of the text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 2.8), layout="constrained")
    _draw(figure.subplots(), runs, panel)
    return figure


def _draw(axes: Axes, runs: Sequence[Run], panel: Panel) -> None:
    from matplotlib import ticker
    from matplotlib.lines import Line2D

    used: dict[str, Line2D] = {}
    for number, run in enumerate(runs):
        for style, (name, called) in zip(_STYLES, panel.lines, strict=False):
            steps, values = _finite(*run.curve(name))
            if not steps:
                continue
            marker = _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
            axes.plot(
                steps,
                values,
                style,
                color=_colour(number),
                linewidth=1.5,
                marker=marker if len(steps) <= _MARKED else None,
                markersize=3,
            )
            used[called] = Line2D([], [], color="#333333", linestyle=style, linewidth=1.5)
    axes.set_title(panel.title, fontsize=10, fontweight="bold", loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    if panel.is_share:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    if len(used) > 1:
        # Below the axes, where it hides no curve.
        axes.legend(
            list(used.values()),
            list(used),
            fontsize=8.5,
            frameon=False,
            ncols=1 if max(map(len, used)) > 14 and len(used) > 2 else len(used),
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.24),
            handlelength=1.8,
            columnspacing=1.0,
            borderaxespad=0,
        )


def _finite(steps: Iterable[int], values: Iterable[float]) -> tuple[list[int], list[float]]:
    found = [pair for pair in zip(steps, values, strict=True) if math.isfinite(pair[1])]
    return [step for step, _ in found], [value for _, value in found]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
