"""Curves of runs: what is drawn, that it can be read on a phone, and where metrics go besides."""

import csv
import json
import re
import sys
import types

import PIL.Image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from llave_jax import plot
from llave_jax.common.extras import MissingPackage
from llave_jax.evaluation import drawing, report_html
from llave_jax.training.curves import PANELS
from llave_jax.training.metrics import MetricsWriter
from llave_jax.training.weights_and_biases import WandbLog
from tests.evaluation.test_similarity import stats_like

# Pixels across a phone's screen that a page has for its content, and the height that text needs.
PHONE, READABLE = 350, 9.0


def write_run(directory, steps=30, evaluate=True):
    directory.mkdir(parents=True)
    writer = MetricsWriter(directory)
    names = {name for panel in PANELS for name, _ in panel.lines}
    scores = {name for name in names if name.startswith(("validation/", "eval/"))}
    for step in range(0, steps + 1, 10):
        if step:
            writer.write(step, dict.fromkeys(names - scores, 0.5 + 0.01 * step))
        if evaluate:
            writer.write(step, dict.fromkeys(scores, 0.25))
    writer.close()
    return directory


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(the folder of what is drawn of three runs, their labels)."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("rate=1/run", "rate=2/run"):
        write_run(root / name)
    write_run(root / "other", evaluate=False)
    with open(root / "other/metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    labels = ["rate=1/run", "rate=2/run", ("a <long> label " * 8).strip()]
    runs = [f"{root}/rate=1/run", f"{root}/rate=2/run", f"{labels[2]}={root}/other"]
    assert plot.main([*runs, "--output", str(root / "out")]) == 0
    return root / "out", labels


def smallest_text(svg):
    """In pixels, if the drawing is as wide as a phone."""
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:\w+ )*([\d.]+)px", svg)]
    assert sizes
    return min(sizes) * PHONE / width


def test_the_page_has_every_run_and_panel_in_readable_size(drawn):
    folder, labels = drawn
    page = (folder / "curves.html").read_text()
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    for label in labels:
        assert report_html.escape(label) in page
    for panel in PANELS:
        assert f">{panel.title}<" in page
    charts = [svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "<text" in svg]
    assert len(charts) == len(PANELS)
    assert min(map(smallest_text, charts)) >= READABLE
    assert PIL.Image.open(folder / "curves.png").format == "PNG"


def test_the_table_has_all_metrics_of_all_runs(drawn):
    folder, labels = drawn
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [(row["run"], int(row["step"])) for row in rows]
    assert steps == [
        *((label, step) for label in labels[:2] for step in (0, 10, 20, 30)),
        *((labels[2], step) for step in (10, 20, 30)),
    ]
    # Of one step both lines: training and evaluation.
    assert (float(rows[1]["loss"]), float(rows[1]["validation/recall@1"])) == (0.6, 0.25)
    assert rows[-1]["validation/recall@1"] == ""


def test_a_run_by_itself_is_drawn_into_its_folder(tmp_path, capsys):
    run = write_run(tmp_path / "run", evaluate=False)
    assert plot.main([str(run)]) == 0
    page = (run / "curves/curves.html").read_text()
    assert capsys.readouterr().out.split() == [
        str(run / "curves" / name) for name in ("curves.html", "curves.png", "metrics.csv")
    ]
    # What it has no values for is not drawn.
    assert "Recall among" not in page


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["{0}/empty"], "empty has no metrics.jsonl"),
        (["{0}/run", "{0}/run", "--output={0}/out"], "different labels"),
    ],
)
def test_what_cannot_be_drawn_is_named(runs, message, tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert plot.main([run.format(tmp_path) for run in runs]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_legend_of_the_similarity_figure_is_whole_with_one_run(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(drawing, "write_png", lambda figure, path: drawn.append(figure))
    drawing.write_histograms({"a run": stats_like(0.7, 0.5, 0.1)}, tmp_path / "similarity.png")
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 3
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= page.y1
    assert all(axes.get_tightbbox().y0 >= box.y1 - 1 for axes in figure.axes)


# Weights & Biases.


class FakeRun:
    def __init__(self):
        self.logged, self.metrics, self.finished = [], [], False

    def define_metric(self, name, **options):
        self.metrics.append((name, options))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, with the runs that were begun."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.Error = type("Error", (Exception,), {})
    module.runs = []

    def init(**options):
        module.runs.append((options, FakeRun()))
        return module.runs[-1][1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_metrics_go_to_weights_and_biases_and_go_on_there(wandb, tmp_path):
    directory = tmp_path / "my-run"
    directory.mkdir()
    for first_step in (-1, 1):
        log = WandbLog("project", directory, {"seed": 0})
        writer = MetricsWriter(directory, first_step=first_step, wandb=log)
        writer.write(first_step + 1, {"loss": 1.0})
        writer.close()
    (first, run), (second, again) = wandb.runs
    assert first["project"] == "project"
    assert first["name"] == "my-run"
    assert first["config"] == {"seed": 0}
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    # Without it the package refuses the config of a run that goes on with more steps.
    assert second["allow_val_change"] is True
    assert run.logged == [{"step": 0, "loss": 1.0}]
    assert again.logged == [{"step": 2, "loss": 1.0}]
    assert ("*", {"step_metric": "step"}) in run.metrics
    assert run.finished
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2]


def test_weights_and_biases_says_in_one_line_what_it_lacks(wandb, tmp_path, monkeypatch):
    def refuse(**options):
        raise wandb.Error("api_key not configured\n(no-tty)")

    wandb.init = refuse
    expected = r"^config\.log\.wandb=p: api_key not configured \(no-tty\)\. Log in \(wandb login\)"
    with pytest.raises(ValueError, match=expected):
        WandbLog("p", tmp_path, {})
    assert not list(tmp_path.iterdir())
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"need wandb: pip install 'llave_jax\[wandb\]'"):
        WandbLog("p", tmp_path, {})


def test_names_of_metrics_become_tags_of_tensorboard(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"validation/recall@1": 0.5})
    writer.close()
    assert not caplog.records
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"validation/recall_1" in events.read_bytes()
    assert "recall@1" in (tmp_path / "metrics.jsonl").read_text()
