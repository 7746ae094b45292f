"""`llave_jax.mine`: what it writes, against plain Python, and that it continues from any state it can be left in."""

import json
import types
from operator import itemgetter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet
import pytest

from llave_jax.common import files
from llave_jax.data.mined_order import read_graph
from llave_jax.data.sources import open_source
from llave_jax.embedding import entries, store
from llave_jax.mining import contents, job, parts
from llave_jax.mining.candidates import Rules
from llave_jax.mining.job import Mining, mine, report_text

SIZE = 4


def unit(text):
    numbers = np.array([float(word) for word in text.split()[:SIZE]])
    return numbers / np.linalg.norm(numbers)


class FakeEmbedder:
    """Text "1 -1 1 1 word", or an image file of the same words, has the vector (1, -1, 1, 1) / 2.

    Vectors have one number or four, so that their lengths are 1 and 2: scores are exact, and many tie.
    """

    config = types.SimpleNamespace(text=types.SimpleNamespace(hidden_size=SIZE))

    def __init__(self):
        self.encoded = 0

    def encode(self, items, batch_size=None, *, on_error="raise"):
        vectors, failures = [], {}
        for i, item in enumerate(items):
            self.encoded += 1
            text = Path(item.images[0]).read_text() if item.images else item.text
            vectors.append([0.0] * SIZE)
            if text.startswith("broken"):
                if on_error == "raise":
                    raise ValueError(f"{item.name}: is broken")
                failures[i] = f"{item.name}: is broken"
            else:
                vectors[-1] = unit(text)
        found = np.array(vectors, np.float32).reshape(-1, SIZE)
        return (found, failures) if on_error == "skip" else found


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(entries, "CHUNK_WEIGHT", 5)
    monkeypatch.setattr(contents, "_ROWS_PER_PART", 3)
    for module in (job, parts):
        monkeypatch.setattr(module, "PART_ROWS", 4)


def targets_of(row):
    """A row is a query and a target or a list of them; a side is a text, or a text and the path of an image."""
    return row[1] if isinstance(row[1], list) else [row[1]]


def as_tuple(side):
    return side if isinstance(side, tuple) else (side, "")


def write_data(folder, subsets):
    """Writes subsets of rows; an image holds its own name."""
    folder.mkdir(exist_ok=True)
    for name, rows in subsets.items():
        lines = []
        for row in rows:
            sides = [as_tuple(side) for side in (row[0], *targets_of(row))]
            for _, image in filter(itemgetter(1), sides):
                path = folder / image
                path.parent.mkdir(exist_ok=True)
                path.write_text(path.stem)
            values = dict(zip(("qry", "qry_image_path"), sides[0], strict=True))
            for number, field in enumerate(("pos_text", "pos_image_path")):
                listed = [side[number] for side in sides[1:]]
                values[field] = listed if len(listed) > 1 else listed[0]
            lines.append(json.dumps(values) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


def run(folder, output, embedder=None, **options):
    source = open_source(folder)
    mining = Mining(source, str(folder), output, "a model", **options)
    return mine(embedder or FakeEmbedder(), mining)


def result(output):
    rows = {
        path.stem: [json.loads(line) for line in path.open()] for path in output.glob("*.jsonl")
    }
    table = pyarrow.parquet.read_table(output / "neighbours.parquet")
    return rows, table.to_pydict()


def content(side):
    return (side[0], side[1].rpartition("/")[2]) if isinstance(side, tuple) else (side, "")


def vector(side):
    text, image = content(side)
    return unit(image.partition(".")[0] or text)


def expected(subsets, rules, across):
    """Negatives (text, path, score) of each row, and the rows that are its neighbours, by plain loops."""
    rows = [(name, row[0], targets_of(row)) for name, some in subsets.items() for row in some]
    first = {}
    for _, _, targets in rows:
        for target in targets:
            first.setdefault(content(target), target)
    order = list(first)
    negatives, neighbours = [], []
    for index, (name, query, targets) in enumerate(rows):
        scope = [i for i, row in enumerate(rows) if across or row[0] == name]
        never = {content(query)}
        never |= {content(t) for _, q, ts in rows if content(q) == content(query) for t in ts}
        candidates = {content(t) for i in scope for t in rows[i][2]} - never
        scored = [(-float(vector(query) @ vector(first[c])), order.index(c)) for c in candidates]
        ranked = sorted(scored)[rules.first_rank : rules.end_rank]
        bounds = [float(vector(query) @ vector(target)) for target in targets]
        bound = min(bounds) - (1 - rules.relative) * abs(min(bounds))
        kept = [(order[number], -score) for score, number in ranked if -score < bound]
        negatives.append([(*as_tuple(first[c]), score) for c, score in kept[: rules.negatives]])
        having = [
            [i for i in scope for t in rows[i][2] if content(t) == c]
            for c, _ in kept[: rules.neighbours]
        ]
        neighbours.append([some[index % len(some)] for some in having])
    return negatives, neighbours


# Few vectors, two words and two folders: rows, queries, targets and their pictures occur repeatedly.
full = st.tuples(*[st.sampled_from([-1, 1])] * SIZE).map(lambda v: " ".join(map(str, v)))
vectors = full | st.sampled_from(["1 0 0 0", "0 0 1 0", "0 0 0 -1"])
texts = st.tuples(vectors, st.sampled_from(["", " a", " b"])).map("".join)
pictures = st.tuples(
    st.just(""), st.tuples(st.sampled_from("xy"), vectors).map("{0[0]}/{0[1]}.png".format)
)
sides = texts | pictures
targets = sides | st.lists(sides, min_size=1, max_size=3)
pair_lists = st.lists(st.tuples(sides, targets), min_size=1, max_size=14)


@hypothesis.settings(
    max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    first=pair_lists,
    second=pair_lists,
    across=st.booleans(),
    ranks=st.sampled_from([(0, 100), (1, 4), (0, 2)]),
    negatives=st.integers(1, 4),
    memory=st.sampled_from([200, 1 << 20]),
)
def test_equals_plain_loops(tmp_path_factory, first, second, across, ranks, negatives, memory):
    folder = tmp_path_factory.mktemp("case")
    subsets = {"A": first, "B": second}
    write_data(folder / "data", subsets)
    rules = Rules(*ranks, negatives=negatives, neighbours=3)
    counts = run(folder / "data", folder / "out", rules=rules, across=across, memory=memory)
    rows, table = result(folder / "out")
    expected_negatives, expected_neighbours = expected(subsets, rules, across)
    found = [
        list(zip(row["neg_text"], row["neg_image_path"], row["neg_scores"], strict=True))
        for name in subsets
        for row in rows[name]
    ]
    assert found == expected_negatives
    assert sum(count.negatives for count in counts.values()) == sum(map(len, found))
    assert sum(count.full for count in counts.values()) == sum(len(f) == negatives for f in found)
    source = open_source(folder / "data")
    hashes = source.contents()
    assert table["content"] == hashes.tolist()
    assert table["neighbours"] == [hashes[n].tolist() for n in expected_neighbours]
    # Training reads the rows as they were, with their negatives and all scores.
    mined = open_source(folder / "out", image_root=folder / "data")
    for index in range(len(source)):
        before, after = source.row(index), mined.row(index)
        assert after[:2] == before[:2]
        assert after.positives() == before.positives()
        assert [tuple(side) for side in after.negatives()] == [f[:2] for f in found[index]]
        rest = after.rest()
        own = [
            float(vector(tuple(before[:2])) @ vector(tuple(side))) for side in before.positives()
        ]
        assert list(rest.pos_scores) == own
        assert list(rest.neg_scores) == [f[2] for f in found[index]]


PLANTED = {
    # The first query's positive is no more similar than two other targets.
    "A": [
        ("1 0 0 0 query", "1 1 1 1"),
        ("0 1 0 0 query", "1 0 0 0"),
        ("0 0 1 0 query", "1 -1 1 1"),
        ("1 1 1 1 query", "0 1 0 0"),
    ]
}


def test_a_positive_outside_the_top_list(tmp_path):
    write_data(tmp_path / "data", PLANTED)
    counts = run(tmp_path / "data", tmp_path / "out", rules=Rules(end_rank=2))
    rows, _ = result(tmp_path / "out")
    # Its two nearest targets are more similar than the positive: none is taken, and it is said.
    assert rows["A"][0]["pos_scores"] == [0.5]
    assert rows["A"][0]["neg_scores"] == []
    assert counts["A"].above_margin >= 2
    run(tmp_path / "data", tmp_path / "out", rules=Rules(end_rank=2, relative=None))
    rows, _ = result(tmp_path / "out")
    assert rows["A"][0]["neg_scores"] == [1.0, 0.5]


def test_rows_that_cannot_be_used(tmp_path):
    subsets = {
        "A": [
            *PLANTED["A"],
            ("broken", "1 1 1 -1"),
            ("0 0 0 1", "broken"),
            ("1 0 0 0 b", ("", "x/1 1 1 1.png")),
        ]
    }
    write_data(tmp_path / "data", subsets)
    (tmp_path / "data/x/1 1 1 1.png").unlink()
    with pytest.raises(ValueError, match=r"A.jsonl row 6, target.*does not exist"):
        run(tmp_path / "data", tmp_path / "out")
    (tmp_path / "data/A.jsonl").open("a").write('{"qry": "1 0 0 0"}\n')
    counts = run(tmp_path / "data", tmp_path / "out", on_error="skip")
    rows, table = result(tmp_path / "out")
    assert [row["qry"] for row in rows["A"]] == [query for query, _ in PLANTED["A"]]
    assert (counts["A"].rows, counts["A"].used) == (8, 4)
    assert not any("broken" in text for row in rows["A"] for text in row["neg_text"])
    skipped = [json.loads(line) for line in (tmp_path / "out/mining/skipped.jsonl").open()]
    assert [entry["row"] for entry in skipped] == [4, 5, 6, 7]
    assert "is broken" in skipped[0]["reason"]
    assert "missing fields" in skipped[3]["reason"]
    assert len(table["content"]) == 4
    # What was repaired is read again; what was skipped is an error again.
    (tmp_path / "data/x/1 1 1 1.png").write_text("1 1 1 1")
    counts = run(tmp_path / "data", tmp_path / "out", on_error="skip")
    assert counts["A"].used == 5
    with pytest.raises(ValueError, match="missing fields"):
        run(tmp_path / "data", tmp_path / "out")


def test_no_row_can_be_used(tmp_path):
    write_data(tmp_path / "data", {"A": [("broken", "1 0 0 0")]})
    with pytest.raises(ValueError, match="no query can be embedded"):
        run(tmp_path / "data", tmp_path / "out", on_error="skip")


def test_other_rules_keep_the_embeddings(tmp_path):
    write_data(tmp_path / "data", PLANTED)
    embedder = FakeEmbedder()
    run(tmp_path / "data", tmp_path / "out", embedder)
    assert embedder.encoded == 8
    before = result(tmp_path / "out")
    run(tmp_path / "data", tmp_path / "out", embedder, rules=Rules(negatives=1))
    assert embedder.encoded == 8
    assert result(tmp_path / "out") != before
    assert len(list((tmp_path / "out/mining").glob("parts-*"))) == 1


def test_a_row_that_changes(tmp_path):
    write_data(tmp_path / "data", PLANTED)
    run(tmp_path / "data", tmp_path / "out")
    # It has the first row's query now, and its target is no negative of that one any more.
    changed = {"A": [*PLANTED["A"][:3], ("1 0 0 0 query", "0 0 0 1")]}
    write_data(tmp_path / "data", changed)
    run(tmp_path / "data", tmp_path / "out")
    write_data(tmp_path / "other", changed)
    run(tmp_path / "other", tmp_path / "fresh")
    assert result(tmp_path / "out") == result(tmp_path / "fresh")


def test_a_picture_that_changes(tmp_path):
    subsets = {"A": [*PLANTED["A"], ("1 1 1 1 c", ("", "x/1 1 1 1.png"))]}
    write_data(tmp_path / "data", subsets)
    run(tmp_path / "data", tmp_path / "out")
    before = result(tmp_path / "out")
    (tmp_path / "data/x/1 1 1 1.png").write_text("1 0 0 0")
    run(tmp_path / "data", tmp_path / "out")
    after = result(tmp_path / "out")
    assert after != before
    assert after[0]["A"][4]["pos_scores"] == [0.5]


def test_files_of_others_stay(tmp_path):
    write_data(tmp_path / "data", PLANTED)
    with pytest.raises(ValueError, match=r"is the data itself|was not written by"):
        run(tmp_path / "data", tmp_path / "data")
    out = tmp_path / "out"
    out.mkdir()
    (out / "A.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"A.jsonl: was not written by llave_jax.mine"):
        run(tmp_path / "data", out)
    assert (out / "A.jsonl").read_text() == "mine"


def test_subsets_that_are_gone_leave_no_rows(tmp_path):
    write_data(tmp_path / "data", PLANTED | {"B": PLANTED["A"]})
    run(tmp_path / "data", tmp_path / "out")
    (tmp_path / "data/B.jsonl").unlink()
    run(tmp_path / "data", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "A.jsonl",
        "mining",
        "neighbours.parquet",
    ]


def test_an_order_of_rows_reads_the_neighbours(tmp_path):
    write_data(tmp_path / "data", PLANTED)
    run(tmp_path / "data", tmp_path / "out", rules=Rules(relative=None))
    hashes = open_source(tmp_path / "data").contents()
    # Rows as they are trained on: the mined ones, whose hard negatives are no part of their contents.
    mined = open_source(tmp_path / "out", image_root=tmp_path / "data").contents()
    assert np.array_equal(hashes, mined)
    order = np.argsort(mined)
    graph = read_graph(tmp_path / "out/neighbours.parquet", mined[order])
    _, table = result(tmp_path / "out")
    for node, row in enumerate(order.tolist()):
        links = graph.links[graph.starts[node] : graph.starts[node + 1]]
        assert mined[order][links].tolist() == table["neighbours"][row]


class Killed(BaseException):
    pass


def test_killed_at_any_write_it_continues_to_the_same_files(tmp_path, monkeypatch):
    subsets = {
        "A": [
            *PLANTED["A"],
            ("1 1 1 1 c", ("", "x/1 1 1 1.png")),
            ("-1 1 1 1 c", ("", "y/1 1 1 1.png")),
        ],
        "B": PLANTED["A"][:2],
    }
    write_data(tmp_path / "data", subsets)
    run(tmp_path / "data", tmp_path / "whole")
    expected_files = files_of(tmp_path / "whole")
    writes, limit = [0], [0]

    def counting(real):
        def write(*args):
            writes[0] += 1
            if writes[0] == limit[0]:
                raise Killed
            return real(*args)

        return write

    monkeypatch.setattr(files, "_sync", counting(files._sync))
    monkeypatch.setattr(store, "sync", counting(store.sync))
    finished = False
    while not finished:
        limit[0] += 1
        output = tmp_path / f"killed{limit[0]}"
        writes[0] = 0
        try:
            run(tmp_path / "data", output)
            finished = True
        except Killed:
            embedder = FakeEmbedder()
            run(tmp_path / "data", output, embedder)
        assert files_of(output) == expected_files
    assert limit[0] > 15
    # Killed in the last write, nothing is embedded again.
    assert embedder.encoded == 0


def files_of(output):
    """Contents of the results, which do not depend on the time or the output's place."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_damaged_parts_are_made_again(tmp_path):
    write_data(tmp_path / "data", PLANTED)
    run(tmp_path / "data", tmp_path / "out")
    before = files_of(tmp_path / "out")
    for path in (tmp_path / "out/mining").rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    run(tmp_path / "data", tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_report(tmp_path):
    subsets = {
        "A": PLANTED["A"],
        "B": [("1 0 0 0", "1 0 0 0"), ("1 0 0 0", "0 1 0 0"), ("1 0 0 0", "0 0 1 0")],
    }
    write_data(tmp_path / "data", subsets)
    rules = Rules(1, 3, negatives=1)
    counts = run(tmp_path / "data", tmp_path / "out", rules=rules)
    # Each row of B has the targets of the two others as positives of its query, and no candidate.
    assert counts["B"][:5] == (3, 3, 0, 3, 0)
    assert counts["B"].other_positives + counts["B"].own_content == 6
    assert counts["B"].own_content == 2
    assert counts["A"].outside_ranks == 4
    text = report_text(counts, rules)
    assert "with 1 (%)" in text
    assert text.splitlines()[-3].startswith("all ")
    written = json.loads((tmp_path / "out/mining/report.json").read_text())
    assert written["subsets"]["B"]["own_content"] == 2
