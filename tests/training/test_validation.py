"""Held-out pairs: scores against NumPy, the same on any devices, once a step, and what follows from them."""

import json
import logging
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax import Embedder, train
from llave_jax.common.extras import MissingPackage
from llave_jax.config import default_config
from llave_jax.data.sources import open_source, split_held_out
from llave_jax.inputs import video_decode
from llave_jax.loss.focal import Focal
from llave_jax.loss.hardness import Hardness
from llave_jax.parallel import sharding
from llave_jax.training import benchmark, setup, validation
from llave_jax.training.metrics import read_metrics
from llave_jax.training.validation import SCORES, pool_scores
from tests.evaluation.fake_encoder import HashEncoder
from tests.loss import loss_reference as reference
from tests.training.text_runs import make_config, train_until

SHARE = 0.4
HELD_OUT = {
    "eval.benchmark": None,
    "data.held_out": SHARE,
    "eval.every": 2,
    "loss.temperature": 0.1,
    "optim.learning_rate": 1e-3,
}


def expected_scores(query, target, query_ids, target_ids, alpha, temperature, margin=None):
    """The scores in float64 NumPy, rank by rank."""
    query, target = query.astype(np.float64), target.astype(np.float64)
    match = (query_ids[:, None] == query_ids) | (target_ids[:, None] == target_ids)
    index, values = np.arange(len(query)), {}
    losses, recalls = {"loss": [], "infonce_loss": []}, {}
    for direction, similarity in (
        ("query_to_target", query @ target.T),
        ("target_to_query", target @ query.T),
    ):
        for name, numbers in (("loss", (alpha, margin)), ("infonce_loss", (0.0, None))):
            rows, _, _ = reference.rows_loss(
                similarity, index, ~match, numbers[0], temperature, margin=numbers[1]
            )
            losses[name].append(rows.mean())
        ranks = []
        for i, row in enumerate(similarity):
            best = row[match[i]].max()
            ranks.append(1 + sum(s >= best for s in row[~match[i]]))
        for k in (1, 5, 10):
            recalls.setdefault(k, []).append(np.mean([rank <= k for rank in ranks]))
            values[f"{direction}_recall@{k}"] = recalls[k][-1]
    values |= {name: np.mean(both) for name, both in losses.items()}
    return values | {f"recall@{k}": np.mean(both) for k, both in recalls.items()}


def assert_same_scores(found, expected, error):
    assert set(found) == set(expected) == set(SCORES)
    for name in SCORES:
        if name.endswith("loss"):
            reference.assert_close_loss(found[name], expected[name], error)
        else:
            assert found[name] == pytest.approx(expected[name]), name


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    st.integers(0, 2**32 - 1), st.integers(1, 14), st.sampled_from([Hardness(), Focal(0.3, 0.1)])
)
def test_scores_are_those_of_numpy_in_blocks_of_any_size(seed, block, formula):
    random = np.random.default_rng(seed)
    # Products of eighths are exact, so that ties are ties.
    query, target = (np.round(random.uniform(-2, 2, (14, 3))).astype(np.float32) / 4 for _ in "qt")
    ids = random.integers(0, 9, (2, 14)).astype(np.int32)
    found = pool_scores(query, target, *ids, formula, block=block)
    numbers = {"alpha": 0.0, "temperature": formula.temperature, "margin": None}
    numbers |= {name: value for name, value in formula._asdict().items() if name in numbers}
    expected = expected_scores(query, target, *ids, **numbers)
    error = reference.logit_error(
        numbers["alpha"], formula.temperature, 14, margin=numbers["margin"]
    )
    assert_same_scores(found, expected, 2 * error)


def test_a_model_that_maps_everything_to_one_point_finds_nothing():
    point = np.tile(np.float32([1, 0]), (20, 1))
    ids = np.arange(20, dtype=np.int32)
    scores = pool_scores(point, point, ids, ids, Hardness())
    assert {scores[f"recall@{k}"] for k in (1, 5, 10)} == {0.0}
    # All are the same target, and so all are right.
    scores = pool_scores(point, point, ids, 0 * ids, Hardness())
    assert scores["recall@1"] == 1
    assert scores["loss"] == 0


def test_each_pair_has_the_temperature_of_its_subset():
    random = np.random.default_rng(0)
    query, target = (random.normal(size=(9, 4)).astype(np.float32) / 3 for _ in "qt")
    ids, by_pair = np.arange(9), random.choice([0.1, 0.5], 9).astype(np.float32)
    found = pool_scores(query, target, ids, ids, Hardness(2.0, jnp.asarray(by_pair)), block=4)
    expected = expected_scores(query, target, ids, ids, alpha=2.0, temperature=by_pair)
    assert_same_scores(found, expected, 1e-5)


def validation_lines(workdir):
    return [line for line in read_metrics(workdir) if "validation/loss" in line]


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """(the folder of a run that was stopped after step 3 and continued, what it logged)."""
    workdir = tmp_path_factory.mktemp("run")
    config = make_config(place, {**HELD_OUT, "log_every": 3, "checkpoint.every": 1})
    train_until(3, config, workdir)
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler, root = Keep(logging.INFO), logging.getLogger("llave_jax")
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    train.train(config, workdir)
    root.removeHandler(handler)
    root.setLevel(level)
    return workdir, messages


def held_out_pairs(place):
    source = split_held_out(open_source(place / "data"), SHARE)[1]
    order = np.argsort([source.digest(i) for i in range(len(source))])
    return [source[int(i)] for i in order]


def test_a_run_scores_each_step_once_and_as_numpy_does(run, place):
    workdir, _ = run
    lines = validation_lines(workdir)
    assert [line["step"] for line in lines] == [0, 2, 4]
    pairs = held_out_pairs(place)
    embedder = Embedder.from_pretrained(workdir)
    query = embedder.encode([pair.query for pair in pairs])
    target = embedder.encode([pair.target for pair in pairs])
    ids = np.arange(len(pairs))
    expected = expected_scores(query, target, ids, ids, alpha=9.0, temperature=0.1)
    found = {name: lines[-1][f"validation/{name}"] for name in SCORES}
    # Embeddings are within 1e-5, and so a logit within the slope of 1e-5.
    assert_same_scores(found, expected, 1e-5 * (1 / 0.1 + 9.0))


@pytest.mark.slow
def test_scores_do_not_depend_on_devices_or_batches(run, place, tmp_path, monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
    changes = {"steps": 1, "batch.micro_batches": 2, "batch.pairs": 4}
    train.train(make_config(place, {**HELD_OUT, **changes}), tmp_path / "one")
    one, eight = validation_lines(tmp_path / "one")[0], validation_lines(run[0])[0]
    for name in SCORES:
        value = eight[f"validation/{name}"]
        assert one[f"validation/{name}"] == pytest.approx(value, rel=1e-3), name


def test_the_last_step_is_logged_and_told(run):
    workdir, messages = run
    lines = {line["step"]: line for line in read_metrics(workdir) if "loss" in line}
    assert list(lines) == [3, 4]
    assert {"infonce_loss", "learning_rate", "pairs_per_second"} <= lines[4].keys()
    assert messages[-1].startswith(f"4 of 4 steps done: loss {lines[4]['loss']:.4f}")
    (told,) = [message for message in messages if "held-out pairs: loss" in message]
    assert "\n" not in told
    results = (workdir / "results.txt").read_text()
    assert "untrained (step 0)" in results
    assert "trained (step 4)" in results


def test_the_pool_is_the_same_whatever_the_share_and_has_a_largest_size(place):
    large, small = (split_held_out(open_source(place / "data"), share)[1] for share in (0.9, 0.5))

    def texts(source, most):
        pool = validation.Validation(source, Hardness(), max_pairs=most, skip_unusable=False)
        return [item.text for item in pool._items]

    assert texts(large, 20) == texts(small, 20)
    assert texts(large, None)[:40] == texts(small, 20)
    with pytest.raises(ValueError, match=r"0 pairs are held out.*raise config\.data\.held_out"):
        texts(split_held_out(open_source(place / "data"), 0.0)[1], 20)


def test_pairs_that_cannot_be_read_are_left_out_or_named(place, tmp_path):
    rows = json.loads((place / "data/numbers.json").read_text())
    for row in rows[::3]:
        row.update(qry="<|image_1|>\n" + row["qry"], qry_image_path="not/there.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.json").write_text(json.dumps(rows))
    source = open_source(tmp_path / "data")
    embedder = Embedder.from_pretrained(place / "model")
    pool = validation.Validation(source, Hardness(), max_pairs=None, skip_unusable=True)
    scores = pool.score(embedder)
    usable = validation.Validation(
        open_source(place / "data"), Hardness(), max_pairs=None, skip_unusable=False
    )
    assert usable.score(embedder)["loss"] != pytest.approx(scores["loss"], rel=1e-3)
    kept = [source[i] for i in range(64) if i % 3]
    sides = [embedder.encode([getattr(p, side) for p in kept]) for side in ("query", "target")]
    ids = np.arange(len(kept))
    expected = expected_scores(*sides, ids, ids, alpha=9.0, temperature=0.02)
    assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    pool = validation.Validation(source, Hardness(), max_pairs=None, skip_unusable=False)
    with pytest.raises(ValueError, match=r"not/there\.png"):
        pool.score(embedder)


STOPPING = {
    **HELD_OUT,
    "eval.every": 1,
    "eval.patience": 2,
    "checkpoint.best_metric": "validation/loss",
    # Nothing gets better without learning.
    "optim.learning_rate": 0.0,
}


@pytest.mark.slow
def test_a_run_stops_early_and_goes_on_with_more_patience_only(place, tmp_path, capsys):
    train.train(make_config(place, STOPPING), tmp_path)
    assert [line["step"] for line in validation_lines(tmp_path)] == [0, 1, 2]
    said = capsys.readouterr().out
    for text in (said, (tmp_path / "results.txt").read_text()):
        assert "stopped early at step 2: validation/loss was best at step 0" in text
        assert "best (step 0)" in text
    best = json.loads((tmp_path / "best/best.json").read_text())
    assert best["step"] == 0
    assert best["value"] == validation_lines(tmp_path)[0]["validation/loss"]
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train.train(make_config(place, STOPPING), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    train.train(make_config(place, STOPPING | {"eval.patience": 3}), tmp_path)
    assert [line["step"] for line in validation_lines(tmp_path)] == [0, 1, 2, 3]
    train.train(make_config(place, STOPPING | {"eval.patience": None}), tmp_path)
    assert [line["step"] for line in validation_lines(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.patience": 1}, r"config\.eval\.patience needs config\.checkpoint\.best_metric"),
        (
            {"checkpoint.best_metric": "validation/recall@2"},
            r"'validation/recall@2'; there are validation/loss, .*validation/recall@1",
        ),
        (
            {"checkpoint.best_metric": "average/overall", "data.held_out": 0.0},
            r"needs config\.eval\.benchmark or config\.data\.held_out",
        ),
        ({"eval.benchmark": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_scores_that_there_will_not_be_are_refused_before_the_first_step(
    changes, message, place, tmp_path
):
    with pytest.raises((ValueError, OSError), match=message):
        train.train(make_config(place, {**HELD_OUT, **changes}), tmp_path)
    assert not read_metrics(tmp_path)


@pytest.fixture(scope="module")
def corpus(place):
    """A corpus of one's own."""
    folder = place / "corpus"
    folder.mkdir()
    for name, text in (("queries", "which is {}?"), ("corpus", "it is {}")):
        rows = [json.dumps({"_id": f"{name}{i}", "text": text.format(i)}) for i in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    lines = [f"queries{i}\tcorpus{i}\t1" for i in range(12)]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return folder


def test_a_corpus_of_ones_own_is_a_benchmark(corpus, place, tmp_path, capsys):
    changes = {"eval.benchmark": str(corpus), "checkpoint.best_metric": "nDCG@10", "steps": 1}
    train.train(make_config(place, changes), tmp_path)
    scored = {line["step"]: line for line in read_metrics(tmp_path) if "eval/recall@5" in line}
    assert list(scored) == [0, 1]
    best = json.loads((tmp_path / "best/best.json").read_text())
    assert best["value"] == max(line["eval/nDCG@10"] for line in scored.values())
    rows = [line.split() for line in (tmp_path / "results.txt").read_text().splitlines()]
    assert ["metric", "untrained", "trained"] in rows
    expected = [f"{100 * line['eval/recall@5']:.1f}" for line in scored.values()]
    assert ["recall@5", *expected] in rows


def test_files_of_ones_own_in_mmebs_form_are_a_benchmark(tmp_path):
    row = {"qry_img_path": "", "tgt_text": ["it is 0", "it is 1"], "tgt_img_path": ["", ""]}
    rows = [{**row, "qry_text": f"which is {i}?"} for i in range(6)]
    (tmp_path / "Mine.json").write_text(json.dumps(rows))
    opened = benchmark.open_run_benchmark(str(tmp_path), ("Mine",))
    scores = opened.score(HashEncoder(), tmp_path / "scores")
    (name,) = [name for name in scores if name.endswith("/Mine")]
    (picked,) = (tmp_path / "scores").glob("Mine_score.json")
    assert scores[name] == json.loads(picked.read_text())["acc"]
    table, _ = opened.report({"trained": tmp_path / "scores"}, tmp_path)
    assert re.search(rf"^Mine +\S+ +50\.0 +{100 * scores[name]:.1f}$", table, re.MULTILINE)
    with pytest.raises(ValueError, match=r"config\.eval\.datasets names \['Other'\]; .* has Mine"):
        benchmark.open_run_benchmark(str(tmp_path), ("Other",))


@pytest.mark.parametrize("form", ["{}", "retrieval:{}"])
def test_a_corpus_gets_the_prompts_of_the_model(tmp_path, form):
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "ask"}\n')
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "answer"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    prompts, texts = {"query": "Q: ", "document": "D: ", "other": "no"}, set()

    def encode(items):
        texts.update(item.text for item in items)
        return HashEncoder()(items)

    opened = benchmark.open_run_benchmark(form.format(tmp_path), (), prompts=prompts)
    opened.score(encode, tmp_path / "scores")
    assert texts == {"Q: ask", "D: answer"}


def test_what_a_benchmark_needs_is_looked_for_before_the_first_step(place, tmp_path, monkeypatch):
    monkeypatch.setattr(video_decode, "av", None)
    with pytest.raises(MissingPackage, match=r"need PyAV: pip install 'llave_jax\[video"):
        train.train(make_config(place, {"eval.benchmark": f"msvd:{tmp_path}"}), tmp_path)
    assert not read_metrics(tmp_path)


def test_rows_that_are_all_held_out_are_said(tmp_path):
    row = {"qry": "a", "qry_image_path": "", "pos_text": "b", "pos_image_path": ""}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    config = default_config()
    config.data.path, config.data.held_out = str(tmp_path / "rows.json"), 0.999
    with pytest.raises(ValueError, match=r"rows.json: all 1 rows are held out, none is left"):
        setup.open_sources(config, tmp_path / "rows.json")
