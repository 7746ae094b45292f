"""Rows of several targets and hard negatives, with scores: every form is read alike, mistakes are named."""

import collections
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llave_jax.data import order
from llave_jax.data.order import Composition
from llave_jax.data.pipeline import train_iterator
from llave_jax.data.prepare import prepare
from llave_jax.data.row_forms import Rest, Side, read_record
from llave_jax.data.rows import Row, RowError
from llave_jax.data.sources import MmebSource, open_source
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.content import content_id

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
SCORES = st.floats(-1e6, 1e6)


def mmeb(**changes) -> dict:
    return {"qry": "q", "qry_image_path": "", "pos_text": "t", "pos_image_path": "", **changes}


def open_rows(path) -> MmebSource:
    source = open_source(path)
    assert isinstance(source, MmebSource)
    return source


def texts(*values) -> list[tuple[str, str]]:
    return [(value, "") for value in values]


# record -> its targets, its hard negatives, the scores of the first target and the hard negatives
FORMS = {
    "MMEB": (mmeb(neg_text="n"), texts("t"), texts("n"), ()),
    "one listed": (mmeb(pos_text=["t"], neg_text=["n"]), texts("t"), texts("n"), ()),
    "lists": (
        mmeb(neg_text=["n", "", "m"], neg_image_path=["a.png", "b.png", ""]),
        texts("t"),
        [("n", "a.png"), ("", "b.png"), ("m", "")],
        (),
    ),
    "several targets": (
        mmeb(pos_text=["t", "u"], pos_image_path=["", "a.png"]),
        [("t", ""), ("u", "a.png")],
        [],
        (),
    ),
    "images alone": (
        mmeb(pos_text="", pos_image_path=["a.png", "b.png"], neg_image_path=["c.png"]),
        [("", "a.png"), ("", "b.png")],
        [("", "c.png")],
        (),
    ),
    "empty ones": (
        mmeb(
            pos_text=["", "t"], neg_text=["n", None, "m"], pos_scores=[1, 2], neg_scores=[3, 4, 5]
        ),
        texts("t"),
        texts("n", "m"),
        (2, 3, 5),
    ),
    "scores": (
        mmeb(neg_text=["n", "m"], pos_scores=[0.5], neg_scores=[1, -2.5]),
        texts("t"),
        texts("n", "m"),
        (0.5, 1, -2.5),
    ),
    "one score each": (
        mmeb(neg_text="n", pos_scores=0.5, neg_scores=0.25),
        texts("t"),
        texts("n"),
        (0.5, 0.25),
    ),
    "a target's score": (mmeb(pos_scores=[0.5], neg_scores=[]), texts("t"), [], (0.5,)),
    "FlagEmbedding": (
        {"query": "q", "pos": ["t", "u"], "neg": ["n", "m"], "prompt": "p", "type": "normal"},
        texts("t", "u"),
        texts("n", "m"),
        (),
    ),
    "FlagEmbedding with a teacher": (
        {"query": "q", "pos": ["t", "u"], "neg": ["n"], "pos_scores": [3, 2], "neg_scores": [1]},
        texts("t", "u"),
        texts("n"),
        (3, 1),
    ),
    "a pair": ({"anchor": "q", "positive": "t"}, texts("t"), [], ()),
    "a triplet": ({"anchor": "q", "positive": "t", "negative": "n"}, texts("t"), texts("n"), ()),
    "numbered": (
        {"query": "q", "positive": "t"} | {f"negative_{n}": f"n{n}" for n in range(1, 12)},
        texts("t"),
        texts(*(f"n{n}" for n in range(1, 12))),
        (),
    ),
    "numbered after the first": (
        {"query": "q", "positive": "t", "negative": "n", "negative_2": "o", "negative_1": None},
        texts("t"),
        texts("n", "o"),
        (),
    ),
    "mined with scores": (
        {"query": "q", "positive": "t", "negative_1": "n", "negative_2": "m", "scores": [3, 2, 1]},
        texts("t"),
        texts("n", "m"),
        (3, 2, 1),
    ),
}


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    return tmp_path


def check(source, expected):
    _, positives, negatives, scores = expected
    for number in range(2 * len(positives)):
        pair = source.draw(0, number)
        assert pair.query.text == "q"
        assert pair.num_targets == len(positives)
        for item, (text, path) in zip(
            (pair.target, *pair.negatives),
            (positives[number % len(positives)], *negatives),
            strict=True,
        ):
            assert item.text == text
            assert item.images == ((path[0].encode(),) if path else ())
    assert source[0].scores == pytest.approx(scores)
    for most in range(len(negatives) + 1):
        pair = source.draw(0, 0, most)
        assert pair.negatives == source[0].negatives[:most]
        assert pair.scores == source[0].scores[: 1 + most]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_from_json_and_parquet_and_records(name, folder, in_process):
    record = FORMS[name][0]
    (folder / "A.jsonl").write_text(json.dumps(record))
    source = open_rows(folder / "A.jsonl")
    check(source, FORMS[name])
    (folder / "A").mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), folder / "A/original-0.parquet")
    table = open_source(folder / "A/original-0.parquet", image_root=folder)
    check(table, FORMS[name])
    assert table.digest(0) == source.digest(0)
    assert table.contents() == source.contents()
    prepare(source, folder / "out", split="original", check_images=False)
    records = open_source(folder / "out")
    check(records, FORMS[name])
    assert records.digest(0) == source.digest(0)
    # The same fields as ever where there is nothing more to say.
    assert ("more" in (folder / "out/A/features.json").read_text()) == bool(source.row(0).more)


MISTAKES = {
    "lengths": (
        mmeb(neg_text=["n"], neg_image_path=["", "b"]),
        "neg_image_path lists 2 and neg_text 1",
    ),
    "no images": (mmeb(neg_text=["n"], neg_image_path=[]), "neg_image_path lists 0 and neg_text 1"),
    "scalar and list": (
        mmeb(pos_image_path=["a.png", "b.png"]),
        "pos_image_path is a list and pos_text is str; give a list of 2 for pos_text, too",
    ),
    "a number": (mmeb(neg_text=["n", 3]), "neg_text 2 is int; expected a string"),
    "nested": (mmeb(neg_image_path=[["a"]]), "neg_image_path 1 is list; expected a string"),
    "object": (mmeb(pos_text={"a": 1}), "pos_text is dict; expected a string or a list of strings"),
    "query": (mmeb(qry=["q"]), "qry is list; expected a string"),
    "surrogate": (mmeb(neg_text=["\ud800"]), "neg_text 1 is not Unicode text"),
    "no targets": (mmeb(pos_text=[], pos_image_path=[]), "target has neither text nor an image"),
    "empty targets": (mmeb(pos_text=["", " "]), "target has neither text nor an image"),
    "too few scores": (
        mmeb(neg_text=["n", "m"], pos_scores=[1], neg_scores=[1]),
        r"neg_scores has 1 for 2 hard negative\(s\)",
    ),
    "too many scores": (mmeb(pos_scores=[1, 2]), r"pos_scores has 2 for 1 target\(s\)"),
    "one side's scores": (mmeb(neg_text="n", pos_scores=[1]), "has pos_scores but no neg_scores"),
    "other side's scores": (mmeb(neg_text="n", neg_scores=[1]), "has neg_scores but no pos_scores"),
    "a word as score": (mmeb(pos_scores=["1"]), "pos_scores 1 is '1'; expected a finite number"),
    "a truth as score": (mmeb(pos_scores=True), "pos_scores 1 is True; expected a finite number"),
    "two names": ({"query": "q", "anchor": "q", "pos": "t"}, "has both query and anchor; give one"),
    "no target": ({"query": "q", "neg": ["n"]}, "has query but neither pos nor positive"),
    "null target": ({"query": "q", "pos": None}, "missing fields"),
    "their name": ({"query": "q", "pos": ["t", 1]}, "pos 2 is int; expected a string"),
    "numbered": ({"query": "q", "pos": "t", "negative_1": ["n"]}, "negative_1 is list"),
    "all scores": (
        {"query": "q", "pos": "t", "neg": "n", "scores": [1, 2, 3]},
        r"scores, after the target's, has 2 for 1 hard negative\(s\)",
    ),
    "scores twice": (mmeb(scores=[1], pos_scores=[1]), "has both scores and pos_scores; give one"),
    "scores of nothing": (mmeb(scores=[]), r"scores is \[\]; expected a list, the target's score"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_by_file_row_and_field(name, tmp_path):
    record, reason = MISTAKES[name]
    (tmp_path / "Bad.json").write_text(json.dumps([mmeb(), record]))
    source = open_source(tmp_path / "Bad.json")
    assert source[0].target.text == "t"
    with pytest.raises(RowError, match=rf"Bad.json row 1: .*{reason}"):
        source[1]


def test_mistakes_in_parquet_are_of_their_rows(tmp_path):
    rows = [mmeb(neg_text=["n"]), mmeb(neg_text=["n", "m"]), mmeb(neg_text=None), mmeb(qry=" ")]
    rows = [row | {"neg_image_path": ["a"], "pos_scores": [1.0]} for row in rows]
    rows[0]["neg_scores"] = [float("nan")]
    rows[2]["neg_image_path"] = rows[3]["neg_image_path"] = None
    (tmp_path / "A").mkdir()
    schema = pa.schema([(name, pa.string()) for name in mmeb()])
    schema = schema.append(pa.field("neg_text", pa.list_(pa.string())))
    schema = schema.append(pa.field("neg_image_path", pa.large_list(pa.string())))
    for name in ("pos_scores", "neg_scores"):
        schema = schema.append(pa.field(name, pa.list_(pa.float32())))
    pyarrow.parquet.write_table(
        pa.Table.from_pylist(rows, schema=schema), tmp_path / "A/original-0.parquet"
    )
    source = open_source(tmp_path)
    assert source.left_out == {"A": (3,)}
    for row, reason in ((0, "neg_scores 1 is nan"), (1, "neg_image_path lists 1 and neg_text 2")):
        with pytest.raises(RowError, match=rf"original-0.parquet row {row}: {reason}"):
            source[row]
    assert (source[2].negatives, source[2].scores) == ((), (1.0,))
    pyarrow.parquet.write_table(
        pa.table({"query": ["q"], "answer": ["a"]}), tmp_path / "A/original-0.parquet"
    )
    with pytest.raises(
        ValueError, match=r"lacks columns .* for rows of texts, query \(or anchor\)"
    ):
        open_source(tmp_path)


def test_texts_that_are_not_unicode_are_errors_of_their_rows(tmp_path):
    (tmp_path / "A").mkdir()
    bad = pa.array([[b"good"], [b"\xff"], [b"fine"]], pa.list_(pa.binary()))
    bad = pa.ListArray.from_arrays(
        bad.offsets, pa.Array.from_buffers(pa.string(), 3, bad.values.buffers())
    )
    table = pa.table({"query": ["q"] * 3, "pos": bad})
    pyarrow.parquet.write_table(table, tmp_path / "A/original-0.parquet")
    source = open_source(tmp_path)
    assert [source[n].target.text for n in (0, 2)] == ["good", "fine"]
    with pytest.raises(RowError, match=r"original-0.parquet row 1: is not Unicode text"):
        source[1]


@hypothesis.given(
    positives=st.lists(TEXTS, min_size=1, max_size=4),
    negatives=st.lists(TEXTS, max_size=4),
    with_scores=st.booleans(),
    data=st.data(),
)
def test_a_row_says_what_it_was_given(positives, negatives, with_scores, data):
    record = mmeb(pos_text=positives, neg_text=negatives)
    scores = ((), ())
    if with_scores:
        scores = tuple(
            tuple(data.draw(st.lists(SCORES, min_size=len(side), max_size=len(side))))
            for side in (positives, negatives)
        )
        record |= {"pos_scores": list(scores[0]), "neg_scores": list(scores[1])}
    fields = read_record(json.loads(json.dumps(record)))
    row = Row(**{name: fields.get(name) or "" for name in Row._fields})
    assert [side.text for side in row.positives()] == positives
    assert [side.text for side in row.negatives()] == negatives
    assert (row.rest().pos_scores, row.rest().neg_scores) == scores
    assert Rest.from_text(row.rest().to_text()) == row.rest()
    scalar = Row("q", "", positives[0], "", negatives[0] if negatives else "", "")
    is_scalar = len(positives) == 1 and len(negatives) <= 1 and not with_scores
    assert (row.digest() == scalar.digest()) == is_scalar
    assert (row.more == "") == is_scalar


def test_rest_keeps_sides_apart():
    rest = Rest((Side("a", "b"),), (Side("", "c"), Side("d", "")), (1.0, 2.0), (0.5, 0.25, -1.0))
    assert Rest.from_text(rest.to_text()) == rest
    assert Rest().to_text() == ""


def test_each_target_has_its_own_score(tmp_path):
    row = mmeb(pos_text=["good", "fine"], neg_text=["bad"]) | {
        "pos_scores": [0.9, 0.7],
        "neg_scores": [0.1],
    }
    (tmp_path / "Set.json").write_text(json.dumps([row]))
    source = open_source(tmp_path)
    drawn = [source.draw(0, number) for number in (0, 1)]
    assert [(pair.target.text, pair.scores) for pair in drawn] == [
        ("good", (0.9, 0.1)),
        ("fine", (0.7, 0.1)),
    ]


class TestTargetsInTurn:
    """Rows of 1 to 3 targets in every order: which target comes when."""

    COUNTS = tuple(1 + n % 3 for n in range(24))

    @pytest.fixture
    def source(self, tmp_path):
        for name, numbers in (("A", range(16)), ("B", range(16, 24))):
            rows = [
                {"query": f"q{n}", "pos": [f"t{n} {p}" for p in range(self.COUNTS[n])]}
                for n in numbers
            ]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return open_source(tmp_path)

    def iterator(self, source, builder, **options):
        # So few tokens that many pairs wait.
        budget = Budget(rows=1, row_length=64, crops=0, groups=3)
        options = {"seed": 5, "num_shards": 2, "prefetch": 1, "lookahead": 2, **options}
        return train_iterator(source, builder, budget, **options)

    def drawn(self, source, batches) -> list[tuple[int, int]]:
        """(row, number of its target) in the order in which they came."""
        index = {source.pair_id(i): i for i in range(len(source))}
        found = []
        for batch in batches:
            for place in np.ndindex(len(batch.ids), 2, 3):
                pack, shard, slot = place
                if name := batch.ids[pack][shard][slot]:
                    row = index[name]
                    ids = [content_id(source.draw(row, n).target) for n in range(self.COUNTS[row])]
                    target = batch.labels.target_ids[pack, shard, 0, slot]
                    found.append((row, ids.index(target)))
        return found

    @pytest.mark.parametrize(
        "composition",
        [Composition(), Composition(order="modality"), Composition(sub_batch=3)],
        ids=lambda c: f"{c.order}-{c.sub_batch}",
    )
    def test_each_has_its_turn_and_the_same_again(self, source, builder, composition):
        options = {"composition": composition}
        whole = list(itertools.islice(self.iterator(source, builder, **options), 60))
        turns = collections.defaultdict(list)
        for row, number in self.drawn(source, whole):
            turns[row].append(number)
        starts = collections.Counter()
        for row, numbers in turns.items():
            count = self.COUNTS[row]
            assert len(numbers) >= 4
            starts[count, numbers[0]] += 1
            assert numbers == [(numbers[0] + n) % count for n in range(len(numbers))]
        assert len(starts) == 6  # not all begin with their first
        for stop in (1, 7, 30):
            iterator = self.iterator(source, builder, **options)
            batches = list(itertools.islice(iterator, stop))
            state = json.loads(json.dumps(iterator.get_state()))
            resumed = self.iterator(source, builder, **options)
            resumed.set_state(state)
            batches += list(itertools.islice(resumed, 60 - stop))
            assert self.drawn(source, batches) == self.drawn(source, whole)

    def test_weights_give_each_its_turn(self, source, builder, monkeypatch):
        monkeypatch.setattr(order, "_MIXTURE_WINDOW", 8)
        composition = Composition(weights={"A": 1.0, "B": 3.0})
        iterator = self.iterator(source, builder, composition=composition)
        drawn = self.drawn(source, itertools.islice(iterator, 150))
        assert {(row, n) for row in range(24) for n in range(self.COUNTS[row])} == set(drawn)

    @pytest.mark.slow  # a worker process takes seconds to start
    def test_workers_draw_the_same(self, source, builder):
        drawn = []
        for workers in (0, 2):
            iterator = self.iterator(source, builder, num_workers=workers)
            drawn.append(self.drawn(source, itertools.islice(iterator, 20)))
            iterator.close()
        assert drawn[0] == drawn[1]

    def test_another_seed_starts_elsewhere(self, source, builder):
        first = []
        for seed in (5, 6):
            iterator = self.iterator(source, builder, seed=seed)
            first.append(dict(reversed(self.drawn(source, itertools.islice(iterator, 20)))))
        assert first[0] != first[1]


def test_splits_of_other_fields_do_not_share_a_folder(tmp_path, in_process):
    def rows_of(name, row) -> MmebSource:
        (tmp_path / name).mkdir()
        (tmp_path / name / "A.json").write_text(json.dumps([row]))
        return open_rows(tmp_path / name)

    plain, lists = rows_of("plain", mmeb()), rows_of("lists", mmeb(neg_text=["n", "m"]))
    prepare(plain, tmp_path / "out", split="original")
    with pytest.raises(ValueError, match=r"out/A holds the split\(s\) \['original'\]"):
        prepare(lists, tmp_path / "out", split="mined")
    prepare(plain, tmp_path / "out", split="again")
    prepare(plain, tmp_path / "other", split="original")
    with pytest.raises(ValueError, match="holds other rows"):
        prepare(lists, tmp_path / "other", split="original")


def test_broken_images_stop_a_preparation_whichever_side_they_are_of(folder, in_process):
    rows = {
        "pos": mmeb(pos_text=["t", "u"], pos_image_path=["", "a.png"]),
        "neg": mmeb(neg_text=["n", "m"], neg_image_path=["", "b.png"]),
    }
    for name, row in rows.items():
        (folder / f"{name}.json").write_text(json.dumps([row]))
        with pytest.raises(
            ValueError, match=rf"{name}.json row 0, (target|negative) 2 \([ab].png\)"
        ):
            prepare(open_rows(folder / f"{name}.json"), folder / "out", split="original")


def test_only_what_a_step_takes_is_read(folder):
    row = mmeb(
        pos_text=["t", "u"],
        pos_image_path=["", "gone.png"],
        neg_text=["n", "m"],
        neg_image_path=["a.png", "gone.png"],
    )
    (folder / "A.json").write_text(json.dumps([row]))
    source = open_source(folder / "A.json")
    assert source.draw(0, 0, 1).negatives[0].images == (b"a",)
    for positive, negatives in ((1, 0), (0, 2)):
        with pytest.raises(ValueError, match=r"gone\.png"):
            source.draw(0, positive, negatives)
