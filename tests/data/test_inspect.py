"""Measuring and showing training data: figures are those of the real sequences."""

import dataclasses
import json
import re

import numpy as np
import pytest

from llave_jax import config as config_lib
from llave_jax.common.command_line import load_config
from llave_jax.data.inspection_page import write_page
from llave_jax.data.measure import LayoutBuilder, measure_subset, mixed_sizes
from llave_jax.data.sources import open_source
from llave_jax.digits.tokenizer import build_tokenizer
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.inspect_data import inspect
from llave_jax.training import batch_shape
from tests.data.mmeb_tree import TEMPLATES, make_tree

ROWS = 12


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmeb") / "tree"
    make_tree(root, ROWS)
    return root


def test_layout_without_pixels_has_the_sizes_of_real_sequences(tree, builder):
    layout = LayoutBuilder(builder.tokenizer, builder.spec)
    source = open_source(tree)
    for index in range(len(source)):
        pair = source[index]
        for item in (pair.query, pair.target, *pair.negatives):
            real, measured = builder(item), layout(item)
            np.testing.assert_array_equal(measured.tokens, real.tokens)
            np.testing.assert_array_equal(measured.taps.index, real.taps.index)
            assert len(measured.crops) == len(real.crops)
            assert measured.zero_crops == real.zero_crops


def test_a_subset_is_measured(tree, builder):
    source = open_source(tree)
    part = measure_subset(source, "CIRR", builder, count=6, sides=3)
    pairs = [source[source.subsets["CIRR"].start + 2 * i] for i in range(6)]
    items = [[p.query, p.target, *p.negatives] for p in pairs]
    expected = [[len(builder(i)) for i in row] + [0] * (3 - len(row)) for row in items]
    np.testing.assert_array_equal(part.lengths, expected)
    assert part.rows == ROWS
    assert part.negatives.tolist() == [len(pair.negatives) for pair in pairs] == [0, 1] * 3
    assert part.targets.tolist() == [1] * 6
    assert part.scored == 0
    assert len(part.images) == sum(len(row) for row in items)
    sizes = mixed_sizes({"CIRR": part}, 50)
    assert sizes.lengths.shape == sizes.crops.shape == (50, 3)
    assert {tuple(row) for row in sizes.lengths} <= {tuple(row) for row in part.lengths}


def test_targets_negatives_and_scores_are_counted_and_shown(tokenizer, builder, tmp_path):
    rows = [
        {"query": f"q{n}", "pos": ["a", "longer " * 30][: 1 + n % 2], "neg": ["b"] * (n % 4)}
        for n in range(8)
    ]
    for row in rows[4:]:
        row |= {"pos_scores": [9.5, 2][: len(row["pos"])], "neg_scores": [1] * len(row["neg"])}
    (tmp_path / "A.jsonl").write_text("\n".join(map(json.dumps, rows)))
    part = measure_subset(open_source(tmp_path), "A", builder, count=8, sides=3)
    assert part.targets.tolist() == [1, 2] * 4
    assert part.negatives.tolist() == [0, 1, 2, 3] * 2
    assert part.scored == 4
    lengths = part.lengths[1::2, 1]  # second targets at odd numbers
    assert lengths.min() > 2 * part.lengths[::2, 1].max()
    np.testing.assert_array_equal(part.lengths[:, 2] > 0, part.negatives > 0)
    report = inspect(run_config(tmp_path, tokenizer), tmp_path / "out", rows=8, samples=8, shards=2)
    assert re.search(
        r"targets +negatives +scored +unusable *\n-+\n.* 1\.5 \(2\) +1\.5 \(3\) +50% ", report
    )
    page = (tmp_path / "out/data.html").read_text()
    assert "A:5 query" in page
    assert "A:5 target (score 9.5)" in page
    assert "A:5 hard negative (score 1)" in page
    assert page.count("another target: ") == 4


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A directory with a tokenizer of the tiny preset's vocabulary."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run_config(tree, tokenizer):
    config = config_lib.default_config()
    config.model.preset = "tiny"
    config.model.tokenizer = str(tokenizer)
    config.data.path = str(tree)
    config.batch.pairs = 16
    config.batch.row_length = 512
    config.batch.tokens_per_pair = 400.0
    config.batch.crops_per_pair = 10.0
    config.batch.fill = 1.0
    return config


def test_the_report_and_the_page_show_every_subset(tree, tokenizer, tmp_path):
    report = inspect(run_config(tree, tokenizer), tmp_path, rows=4, samples=2, shards=2)
    page = (tmp_path / "data.html").read_text()
    for subset in TEMPLATES:
        assert re.search(rf"^{subset} +{ROWS} ", report, re.MULTILINE)
        assert f"<h2>{subset}</h2>" in page
        assert f"{subset}:0 query" in page
    assert re.search(r"filled, by simulation: [\d.]+% of row tokens", report)
    assert re.search(
        rf"an epoch of {ROWS * len(TEMPLATES)} pairs takes about \d+ steps; a run of this config makes "
        r"6, [\d.]+ epochs",
        report,
    )
    assert page.count("<div class='pair'>") == 2 * len(TEMPLATES)
    assert "visual tokens</span>" in page
    assert "hard negative" in page
    assert "|im_start|" in page
    assert "http" not in page  # self-contained


def test_a_model_without_tiles_has_a_page(tree, builder, tmp_path):
    config = dataclasses.replace(builder.spec.config, pinpoints=())
    spec = dataclasses.replace(builder.spec, config=config)
    source = open_source(tree)
    write_page(tmp_path / "page.html", "", source, SequenceBuilder(builder.tokenizer, spec), 1)
    page = (tmp_path / "page.html").read_text()
    assert "base crop" in page
    assert " tiles</figure>" not in page
    assert "class='side error'" not in page


def test_unusable_rows_are_shown_where_they_stand(tokenizer, tmp_path):
    good = {"qry": "a <b>", "qry_image_path": "", "pos_text": "t", "pos_image_path": ""}
    rows = [good, {**good, "qry_image_path": "gone.png"}]
    (tmp_path / "Mine.json").write_text(json.dumps(rows))
    config = run_config(tmp_path / "Mine.json", tokenizer)
    report = inspect(config, tmp_path / "out", rows=4, samples=2, shards=2)
    assert "1 of 2" in report
    assert "gone.png): the file does not exist" in report
    page = (tmp_path / "out/data.html").read_text()
    assert "gone.png" in page.split("<div class='side error'>")[1]
    assert "a &lt;b&gt;" in page


def test_a_set_without_a_usable_row_is_refused_with_the_reason(tokenizer, tmp_path):
    row = {"qry": "a", "qry_image_path": "gone.png", "pos_text": "t", "pos_image_path": ""}
    (tmp_path / "Mine.json").write_text(json.dumps([row] * 3))
    config = run_config(tmp_path / "Mine.json", tokenizer)
    config.batch.row_length = None
    expected = (
        r"^none of the measured rows can be used; Mine:0: .*gone\.png\): the file does not exist"
    )
    with pytest.raises(ValueError, match=expected):
        inspect(config, tmp_path / "out", rows=4, samples=2)


def test_a_budget_that_is_too_small_is_said(tree, tokenizer, tmp_path):
    config = run_config(tree, tokenizer)
    config.batch.crops_per_pair = 0.5
    report = inspect(config, tmp_path, rows=4, samples=0, shards=2)
    assert re.search(r"TOO SMALL .* need crops \d+", report)


@pytest.mark.slow
def test_a_planned_batch_is_shown_with_the_flags_that_set_it_by_hand(tree, tokenizer, tmp_path):
    config = run_config(tree, tokenizer)
    for field in (
        "pairs",
        "micro_batches",
        "row_length",
        "tokens_per_pair",
        "crops_per_pair",
        "fill",
    ):
        config.batch[field] = None
    config.model.inputs.max_length = 512
    config.data.on_error = "skip"
    report = inspect(config, tmp_path, rows=4, samples=0)
    pairs = re.search(r"^(\d+) pairs a step in 1 micro-batch", report, re.MULTILINE)
    room = re.search(r"has (\d+) row\(s\) of (\d+) tokens, (\d+) crops", report)
    flags = re.findall(r"^--config\.batch\.\w+=[\d.]+$", report, re.MULTILINE)
    assert len(flags) == 7
    by_hand = tmp_path / "by_hand.py"
    by_hand.write_text("from llave_jax.config import default_config as get_config")
    batch = load_config(str(by_hand), flags).batch
    budget = batch_shape.batch_budget(load_config(str(by_hand), flags), 8)
    # 84 rows make ten steps of 8 pairs, and one pair for each of the 8 devices here.
    assert batch.pairs == int(pairs.group(1)) == 8
    assert [budget.rows, budget.row_length, budget.crops] == [int(n) for n in room.groups()]
    assert 0.5 < batch.fill <= 1
    with pytest.raises(ValueError, match=r"--shards is 3: .* there are 8 here"):
        inspect(config, tmp_path, rows=4, samples=0, shards=3)
