"""The evaluation's page: complete, self-contained, well formed, and true."""

import html.parser
import json

import numpy as np
import PIL.Image
import pytest

from llave_jax.evaluation import report, report_html, run
from llave_jax.evaluation.benchmarks.base import Options
from llave_jax.evaluation.benchmarks.corpus import Corpus
from llave_jax.evaluation.benchmarks.mmeb import MMEB_DATASETS, Mmeb
from llave_jax.evaluation.benchmarks.text_video import READERS
from tests.evaluation.fake_encoder import HashEncoder
from tests.evaluation.mmeb_eval_tree import make_tree

VOID = {"meta", "img", "line", "rect", "polygon", "br"}


class Page(html.parser.HTMLParser):
    """Checks nesting; collects text, attributes that load things, and counts of tags."""

    def __init__(self, path):
        super().__init__()
        self.stack, self.counts, self.loads, self.pieces = [], {}, [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.stack == []

    @property
    def text(self):
        return " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.pieces.append(data)


def test_mmeb(tmp_path):
    make_tree(tmp_path / "data", zipped=True)
    benchmark = Mmeb(tmp_path / "data")
    results = run.evaluate(HashEncoder(), benchmark)
    path = tmp_path / "report.html"
    report.write_report(path, [(benchmark, results)], model="a/model")
    page = Page(path)
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.loads)
    assert page.loads
    # One gallery for each dataset, and the folded table of means.
    assert page.counts["details"] == len(MMEB_DATASETS) + 1
    for result in results.tasks:
        right = f"{result.answers.right.sum()} of {result.queries} right"
        assert f"{result.info.name} {right}" in page.text
    overall = results.averages()[-1]
    assert f"overall {100 * overall.value:.1f} chance {100 * overall.chance:.1f}" in page.text
    assert "LLaVE-7B 65.7 65.4 70.9 91.9 75.0 64.4 70.3" in page.text
    first = path.read_bytes()
    report.write_report(path, [(benchmark, results)], model="a/model")
    assert path.read_bytes() == first


def rows_file(path, rows):
    path.write_text(json.dumps(rows))


def test_texts_are_escaped_and_a_far_positive_is_shown(tmp_path):
    texts = [f"candidate {i} <script>alert(1)</script>" for i in range(20)]
    row = {"qry_text": "<image>\n<b>bold</b>", "qry_img_path": "a.png"}
    PIL.Image.new("L", (3, 5), 200).save(tmp_path / "a.png")
    name = "<img src=x onerror=alert(1)> 'q' $x^{ & Own"
    rows_file(tmp_path / f"{name}.json", [{**row, "tgt_text": texts, "tgt_img_path": [""] * 20}])
    scores = iter(np.linspace(-0.5, 0.5, 21))

    def encode(items):
        """Cosines to the query (the first item) grow with the candidates' number."""
        angles = [0.0] + [np.arccos(next(scores)) for _ in items[1:]]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)

    benchmark = Mmeb(tmp_path)
    path = tmp_path / "report.html"
    report.write_report(path, [(benchmark, run.evaluate(encode, benchmark))], model="<i>m</i>")
    page = Page(path)
    assert "script" not in page.counts
    assert page.loads
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.loads)
    assert f"{name} 0 of 1 right" in page.text
    assert "b" in page.counts  # the headline numbers' own
    assert "<b>bold</b>" in page.text
    assert "right answer at rank 20" in page.text
    assert "#20" in page.text
    assert "#6 " not in page.text


def test_a_single_candidate_has_no_histogram(tmp_path):
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a"], "tgt_img_path": [""]}
    rows_file(tmp_path / "Own.json", [row])
    entry = (Mmeb(tmp_path), run.evaluate(HashEncoder(), Mmeb(tmp_path)))
    report.write_report(tmp_path / "r.html", [entry], model="m")
    assert "No query has a candidate besides its positive." in Page(tmp_path / "r.html").text


def test_retrieval(tmp_path):
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = {
        "queries": [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}],
        "corpus": [{"_id": f"d{i}", "text": f"text {i}"} for i in range(8)]
        + [{"_id": "p", "image": "a.png"}],
    }
    for name, entries in rows.items():
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "qrels.tsv").write_text("q1\tp\t1\nq2\td1\t1\nq2\td2\t1\n")
    results = run.evaluate(HashEncoder(), Corpus(tmp_path))
    result = results["retrieval"]
    report.write_report(tmp_path / "r.html", [(Corpus(tmp_path), results)], model="m")
    page = Page(tmp_path / "r.html")
    assert f"nDCG@10 {100 * result.metrics['nDCG@10']:.1f}" in page.text
    assert "1 task, 2 queries" in page.text
    assert page.loads


def test_videos(tmp_path):
    pytest.importorskip("av")
    from tests.inputs.test_video_decode import write_video

    (tmp_path / "t.csv").write_text("video_id,sentence\nv0,a\nv1,b\nv2,c\n")
    for number in range(3):
        write_video(tmp_path / f"v{number}.mp4", 4 + number)
    benchmark = READERS["msrvtt"](tmp_path, Options())
    entry = (benchmark, run.evaluate(HashEncoder(), benchmark))
    report.write_report(tmp_path / "r.html", [entry], model="m")
    page = Page(tmp_path / "r.html")
    assert "2 tasks, 6 queries" in page.text
    # Three candidates of three captions, and three videos as queries.
    assert len(page.loads) == 9 + 3
    assert page.counts["svg"] == 1


def test_long_texts_are_cut():
    card = report_html._card(report_html.Card("x" * 1000), "", "")
    assert 300 < card.count("x") < 400
