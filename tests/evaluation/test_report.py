"""The evaluation's page: complete, self-contained, well formed, and true; text from anywhere stays text."""

import html.parser
import json
import logging
import os
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llave_jax.evaluation import (
    comparison,
    report,
    report_drawing,
    report_examples,
    report_html,
    report_pictures,
    report_style,
    run,
)
from llave_jax.evaluation.benchmarks.base import Benchmark, Options
from llave_jax.evaluation.benchmarks.corpus import Corpus
from llave_jax.evaluation.benchmarks.mmeb import MMEB_DATASETS, Mmeb
from llave_jax.evaluation.benchmarks.text_video import READERS
from llave_jax.evaluation.forms import Form
from llave_jax.evaluation.results import Reference, Suite, by_meta_task
from llave_jax.evaluation.scoring import Answers
from llave_jax.evaluation.similarity import KINDS, SimilarityStats
from llave_jax.evaluation.task import Task, TaskInfo
from llave_jax.inputs.item import Item
from tests.evaluation.fake_encoder import HashEncoder
from tests.evaluation.mmeb_eval_tree import make_tree

VOID = {"meta", "img", "line", "rect", "path", "circle", "polyline", "polygon"}
TAGS = VOID | {
    "html",
    "head",
    "title",
    "style",
    "body",
    "main",
    "nav",
    "ul",
    "ol",
    "li",
    "a",
    "b",
    "i",
    "p",
}
TAGS |= {
    "h1",
    "h2",
    "h3",
    "h4",
    "div",
    "span",
    "section",
    "bdi",
    "svg",
    "text",
    "table",
    "thead",
    "tbody",
    "tr",
}
TAGS |= {"th", "td", "details", "summary", "figure", "figcaption"}
HOSTILE = "\"'><img src=x onerror=alert(1)></style></title><script>alert(2)</script> $x^{ & \x00\ud800\u202e <!--"
SHOWN = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")


@pytest.fixture(autouse=True)
def quiet():
    """Names with half a surrogate pair are in logs too, which a test process cannot send to the one that collects."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Page(html.parser.HTMLParser):
    """Checks nesting, tags and attributes; collects text, attributes that load things, and counts of tags."""

    def __init__(self, path):
        super().__init__()
        self.stack, self.counts, self.loads, self.pieces, self.alts = [], {}, [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.stack == []

    @property
    def text(self):
        return " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attributes:
            assert not name.startswith("on")
            if name == "href":
                assert re.fullmatch(r"#c\d+(s\d+)?", value)
            if name == "src":
                assert re.fullmatch(r"data:image/(jpeg|png);base64,[\w+/=]+", value)
                self.loads.append(value)
            if name in ("alt", "aria-label"):
                self.alts.append(value)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.pieces.append(data)


class Fake(Benchmark):
    """Tasks that are there already."""

    def __init__(self, name, tasks, references=()):
        infos = tuple(task.info for task in tasks)
        self.suite = Suite(name, infos, by_meta_task(infos), references)
        self._tasks = {task.info.name: task for task in tasks}

    def names(self):
        return list(self._tasks)

    def read(self, name):
        return self._tasks[name]


def a_task(name, meta_task="vqa", queries=(), candidates=(), right=None, **options):
    """Queries whose right candidate is the one of their own number."""
    right = range(len(queries)) if right is None else right
    return Task(
        info=TaskInfo(name, meta_task),
        queries=queries,
        candidates=candidates,
        relevant=[np.array([number], np.int32) for number in right],
        candidate_names=[f"c{number}" for number in range(len(candidates))],
        **options,
    )


def noise(seed, size=(400, 300)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def test_mmeb(tmp_path):
    make_tree(tmp_path / "data", zipped=True)
    benchmark = Mmeb(tmp_path / "data")
    results = run.evaluate(HashEncoder(), benchmark)
    path = tmp_path / "report.html"
    report.write_report(path, {"mmeb": (benchmark, results)}, model="a/model")
    page = Page(path)
    assert page.loads
    # One gallery for each dataset, and the folded tables of datasets and of mean cosines.
    assert page.counts["details"] == len(MMEB_DATASETS) + 2
    for result in results.tasks:
        right = f"{result.answers.right.sum()} of {result.queries} right"
        assert f"{result.info.name} {right}" in page.text
    overall = results.averages()[-1]
    assert f"overall {100 * overall.value:.1f} chance {100 * overall.chance:.1f}" in page.text
    assert "LLaVE-7B 65.7 65.4 70.9 91.9 75.0 64.4 70.3" in page.text
    first = path.read_bytes()
    report.write_report(path, {"mmeb": (benchmark, results)}, model="a/model")
    assert path.read_bytes() == first


def test_text_from_anywhere_stays_text(tmp_path):
    # File names may hold half a surrogate pair; a text that is embedded may not.
    text = HOSTILE.replace("\ud800", "")
    item = lambda n, **more: Item(f"<image>{n}{text}", name=HOSTILE, **more)  # noqa: E731
    tasks = [
        a_task(f"{n}{HOSTILE}", HOSTILE, [item(0)], [item(1, images=(noise(1, (3, 5)),)), item(2)])
        for n in range(11)
    ]
    published = Reference(HOSTILE, {(tasks[0].info.name, "precision@1"): 1.0}, {"overall": 1.0})
    entry = Fake(HOSTILE, tasks, (published,))
    results = run.evaluate(HashEncoder(), entry, forms=[Form(n) for n in (16, 8, 4)])
    other = results.summary()
    other["tasks"][tasks[0].info.name]["settings"] = {HOSTILE: HOSTILE}
    base = comparison.Evaluation(HOSTILE, HOSTILE, {HOSTILE: comparison.from_summary(other)})
    path = tmp_path / "r.html"
    report.write_report(
        path, {HOSTILE: (entry, results), "two": (entry, results)}, model=HOSTILE, baselines=[base]
    )
    page = Page(path)
    shown = " ".join(SHOWN.split())
    # Names of benchmarks, tasks and groups, models, published ones, baselines, settings, texts.
    for expected in (
        f"Evaluation: {shown}, two",
        f"{shown}: 22 tasks",
        f"{shown}: {shown}",
        f"3{shown} ",
        " ".join(f"2{text}".replace("\x00", "\ufffd").split()),
        f"{shown} (precision@1)",
        f"1.0 {shown}",
        f"{shown} of {shown}: {shown} - here, {shown} there",
    ):
        assert expected in page.text, expected
    assert any(SHOWN in alt for alt in page.alts)


def test_the_page_says_what_is_right_and_a_far_positive_is_shown(tmp_path):
    texts = [Item(f"candidate {i}", name=f"c{i}") for i in range(20)]
    scores = np.linspace(0.5, -0.5, 20)

    def encode(items):
        """Cosines to the query (the first item) fall with the candidates' number."""
        angles = [0.0, *np.arccos(scores)]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)

    benchmark = Fake("own", [a_task("Own", "own", [Item("q")], texts, right=[19])])
    path = tmp_path / "r.html"
    report.write_report(path, {"own": (benchmark, run.evaluate(encode, benchmark))}, model="m")
    text = Page(path).text
    assert "Own 0 of 1 right" in text
    assert "right answer at rank 20" in text
    assert "candidate 0 #1 · 0.500 · chosen" in text
    assert "candidate 19 #20 · -0.500 · right" in text
    assert "#6 " not in text


@given(st.data())
def test_the_worst_queries_are_shown_first(data):
    count = data.draw(st.integers(1, 40))
    scores = st.lists(st.floats(-1, 1, width=16), min_size=count, max_size=count)
    first = np.array(data.draw(scores), np.float32)
    positive = np.minimum(first, np.array(data.draw(scores), np.float32))
    right = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    unranked = ~right & (np.array(data.draw(scores)) > 0.5)
    answers = Answers(
        ranking=np.where(right, 7, 3)[:, None],
        scores=first[:, None],
        positive=np.where(unranked, -1, 7),
        positive_score=np.where(unranked, -np.inf, positive).astype(np.float32),
        better=np.zeros(count, int),
        similarity=None,
    )
    each = data.draw(st.integers(2, 8))
    wrong, shown_right = report_examples.chosen(answers, each)
    lead = answers.scores[:, 0] - answers.positive_score
    rest = np.setdiff1d(np.flatnonzero(~right), wrong)
    assert len(wrong) == min(each - each // 3, (~right).sum())
    assert not right[wrong].any()
    assert right[shown_right].all()
    assert list(lead[wrong]) == sorted(lead[wrong], reverse=True)
    assert not len(rest) or lead[rest].max() <= lead[wrong].min()
    assert len(set(shown_right)) == min(each // 3, right.sum())


def test_a_single_candidate_has_no_histogram(tmp_path):
    entry = Fake("own", [a_task("Own", "own", [Item("q")], [Item("a")])])
    results = run.evaluate(HashEncoder(), entry)
    report.write_report(tmp_path / "r.html", {"own": (entry, results)}, model="m")
    assert "No query has a candidate besides its positive." in Page(tmp_path / "r.html").text


def test_baselines(tmp_path):
    words = [Item(f"word {n}") for n in range(12)]
    others = [Item(f"other {n}") for n in range(12)]
    entry = Fake("own", [a_task(name, "m", words, others) for name in ("A", "B")])
    results = run.evaluate(HashEncoder(), entry, output_dir=tmp_path / "base")
    summary = {"benchmark": "own", "model": {"model": "base/model"}, **results.summary()}
    for name, score in (("A", 0.75), ("B", 0.0)):
        summary["tasks"][name] |= {"score": score, "metrics": {"precision@1": score}}
    (tmp_path / "base/summary.json").write_text(json.dumps(summary))
    own = [result.score for result in results.tasks]
    baselines = comparison.read_evaluations([str(tmp_path / "base")])
    path = tmp_path / "r.html"
    report.write_report(path, {"own": (entry, results)}, model="m", baselines=baselines)
    page = Page(path)
    mean = 100 * np.mean(own)
    assert f"overall {mean:.1f} base 37.5 ({mean - 37.5:+.1f})" in page.text
    for name, score, other in zip("AB", own, (75.0, 0.0), strict=True):
        row = f"{name} precision@1 {100 * score:.1f} {other} {100 * score - other:+.1f} "
        assert row.replace("+0.0", "0.0") in page.text
    # Gains are green, losses red.
    markup = path.read_text()
    assert f'<td class="bad">{100 * own[0] - 75:+.1f}</td>' in markup
    assert f'<td class="good">{100 * own[1]:+.1f}</td>' in markup
    # Histograms of both, over the datasets that both have.
    assert page.counts["figure"] == 2
    (tmp_path / "base/A_similarity.npz").unlink()
    report.write_report(path, {"own": (entry, results)}, model="m", baselines=baselines)
    assert "over 1 datasets" in Page(path).text

    # The same from files alone.
    run.evaluate(HashEncoder(), entry, output_dir=tmp_path / "mine")
    (tmp_path / "mine/summary.json").write_text(json.dumps({**summary, **results.summary()}))
    (mine,) = comparison.read_evaluations([str(tmp_path / "mine")])
    report.write_comparison(path, mine, baselines)
    text = Page(path).text
    assert f"overall {mean:.1f} base 37.5 ({mean - 37.5:+.1f})" in text
    assert "Answers" not in text


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
    entries = {"retrieval": (Corpus(tmp_path), results)}
    report.write_report(tmp_path / "r.html", entries, model="m")
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
    results = run.evaluate(HashEncoder(), benchmark)
    report.write_report(tmp_path / "r.html", {"msrvtt": (benchmark, results)}, model="m")
    page = Page(tmp_path / "r.html")
    assert "2 tasks, 6 queries" in page.text
    # Three candidates of three captions, and three frames of three videos as queries.
    assert len(page.loads) == 9 + 9
    assert page.counts["figure"] == 1


def test_captions_that_count_as_one_answer_are_shown_together(tmp_path):
    groups = np.array([0, 1, 0, 0, 1, 0], np.int32)
    captions = [Item(f"<image>caption {n}") for n in range(6)]
    task = a_task("v2t", "video", [Item("q"), Item("p")], captions, groups=groups)
    entry = Fake("own", [task])
    results = run.evaluate(HashEncoder(), entry)
    report.write_report(tmp_path / "r.html", {"own": (entry, results)}, model="m")
    text = Page(tmp_path / "r.html").text
    assert "• caption 0 • caption 2 • caption 3 and 1 more" in text
    assert "• caption 1 • caption 4 #" in text


@pytest.mark.slow
def test_78_tasks_fit_a_page(tmp_path):
    # Noise is what JPEG is worst at.
    pages = [Item("page", images=(noise(n, (400, 550)),), name=f"page {n}") for n in range(6)]
    clips = [Item("clip", video=[noise(n)] * 8, name=f"clip {n}") for n in range(6)]
    tasks = [a_task(f"T{n}", f"meta {n // 6}", clips[:4], [*pages, *clips]) for n in range(78)]
    entry = Fake("large", tasks)
    results = run.evaluate(HashEncoder(), entry)
    path = tmp_path / "r.html"
    report.write_report(path, {"large": (entry, results)}, model="m")
    page = Page(path)
    assert page.counts["details"] == 78 + 2
    assert len(page.loads) > 78 * 3 * 5
    assert sum(map(len, page.loads)) < report_pictures.TOTAL_BYTES
    assert path.stat().st_size < report_pictures.TOTAL_BYTES + (1 << 20)


def test_a_page_does_not_wait_for_pictures_for_ever_and_survives_bad_ones(tmp_path):
    items = [Item("a", images=(noise(0),)), Item("b", images=(tmp_path / "gone.png",)), Item("c")]
    late = report_pictures.Reader(3, seconds=0)
    shown = late.read(items, [1, 1, 1])
    assert [(len(found.shown), bool(found.note)) for found in shown] == [(0, 1), (0, 1), (0, 0)]
    assert late.late == 2
    shown = report_pictures.Reader(3).read(items, [1, 1, 1])
    assert [(len(found.shown), bool(found.note)) for found in shown] == [(1, 0), (0, 1), (0, 0)]


def test_long_texts_are_cut():
    card = report_html._content(report_html.Card("x" * 1000))
    assert 300 < card.count("x") < 400


def test_scores_by_size_are_drawn_where_they_are(tmp_path):
    sizes = [64, 128, 256, 1024]
    svg = report_drawing.lines({"float32": [(n, n / 20) for n in sizes]}, "overall")
    points = re.search(r'points="([^"]*)" *[/>]', svg)[1].split()
    across, down = zip(*(map(float, point.split(",")) for point in points), strict=True)
    steps = np.diff(across)
    assert steps == pytest.approx(steps[0] * np.array([1, 1, 2]), abs=0.2)
    slopes = np.diff(down) / np.diff([n / 20 for n in sizes])
    assert slopes == pytest.approx([slopes[0]] * 3, rel=0.05)
    assert slopes[0] < 0
    # Names of series and of the score are text here too.
    (tmp_path / "x.html").write_text(report_drawing.lines({HOSTILE: [(64, 1.0)]}, HOSTILE))
    assert Page(tmp_path / "x.html").alts == [
        f"{SHOWN} in percent by the numbers of a vector: {SHOWN}"
    ]
    # A single value, and equal ones, have axes too.
    for values in ([(64, 50.0)], [(64, 0.0), (128, 0.0)]):
        assert "nan" not in report_drawing.lines({"a": values}, "b")


def test_histograms_are_drawn_as_they_are():
    stats = SimilarityStats(
        *(
            np.linspace(low, low + 0.3, n).astype(np.float32)
            for low, n in ((0.5, 60), (0.2, 90), (-0.4, 90))
        )
    )
    axes = report_drawing.limits([stats])
    svg = report_drawing.histogram(stats, axes)
    assert svg == report_drawing.histogram(stats, axes)
    edges = dict(
        re.findall(r'class="(\w+)-line" fill="none" stroke-width="1.3" d="M([\d.]+ [\d.]+)', svg)
    )
    paths = dict(re.findall(r'class="(\w+)-fill" fill-opacity=".3" d="([^"]*)Z"', svg))
    assert set(paths) == set(edges) == set(KINDS)
    for kind, path in paths.items():
        base = float(edges[kind].split()[1])
        heights = base - np.array([float(y) for y in re.findall(r"V([\d.]+)H", path)])
        shares = stats.histogram(kind)
        shares = shares[shares > 0]
        assert heights / heights.sum() == pytest.approx(shares, abs=0.01)
    # A phone has 350 pixels for it, and the text is of 12.
    assert float(re.search(r'viewBox="0 0 (\d+)', svg)[1]) <= 360


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = np.array([int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_contrast_in_every_scheme():
    """WCAG 2 AA: 4.5 for text, 3 for marks."""
    schemes = re.findall(r":root \{(.*?)\}", report_style.STYLE, re.DOTALL)
    assert len(schemes) == 3
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]+)", scheme))
        for least, front, back in (
            (4.5, ("ink", "soft", "good", "bad", "link"), ("paper", "fill", "own")),
            (3, ("bar", "first", "second", "positive", "hard", "easy"), ("paper", "fill")),
        ):
            for one in front:
                for other in back:
                    light, dark = sorted(
                        (luminance(colours[one]), luminance(colours[other])), reverse=True
                    )
                    assert (light + 0.05) / (dark + 0.05) >= least, (one, other, scheme)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser_nothing_overflows_or_is_asked_for(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    name = "a_name_without_any_place_to_break_" * 3
    items = [Item("x" * 150, images=(noise(n),), name=name) for n in range(7)]
    tasks = [a_task(f"{n} {name}", f"{n % 6} {name}", items[:2], items) for n in range(12)]
    labels = [f"{n} meta" for n in range(20)]
    entry = Fake("own", tasks, (Reference(name, {}, dict.fromkeys(labels, 1.0)),))
    results = run.evaluate(HashEncoder(), entry, forms=[Form(n) for n in (16, 8, 4)])
    scores = comparison.from_summary(results.summary())
    baselines = [
        comparison.Evaluation(f"{n}{name}", name, {"own": scores, "b": scores}) for n in range(2)
    ]
    path = tmp_path / "r.html"
    entries = {"own": (entry, results), "b": (entry, results)}
    report.write_report(path, entries, model=name, baselines=baselines)
    said = []
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        for width, scheme in ((390, "dark"), (1280, "light")):
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme
            )
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(request.url))
            page.goto(path.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            root = "document.documentElement"
            assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
            # What is wider scrolls in its own box, and a keyboard reaches it.
            assert page.locator(".scroll:not([tabindex])").count() == 0
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") == (scheme == "light")
            pictures = "[...document.images].every((image) => image.naturalWidth > 0)"
            assert page.evaluate(pictures)
            page.emulate_media(media="print")
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == "rgb(255, 255, 255)"
            assert all(text.startswith(("data:", path.as_uri())) for text in said), said
            # The policy refuses what asks for more.
            with page.expect_event("requestfailed") as refused:
                page.evaluate("document.body.innerHTML += '<img src=https://example.org/x>'")
            assert refused.value.failure == "csp"
            context.close()
            said.clear()
        browser.close()
