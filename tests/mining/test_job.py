"""`llave_jax.mine`: what it writes, against plain Python, and that it continues from any state it can be left in."""

import json
import types
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet
import pytest

from llave_jax.common import files
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


def write_data(folder, subsets):
    """Subsets of rows, a row two sides; a side is a text, or a Path of an image whose content is its last part."""
    folder.mkdir(exist_ok=True)
    for name, rows in subsets.items():
        lines = []
        for query, target in rows:
            values = {}
            for fields, side in zip(
                (("qry", "qry_image_path"), ("pos_text", "pos_image_path")),
                (query, target),
                strict=True,
            ):
                text, image = side if isinstance(side, tuple) else (side, "")
                if image:
                    path = folder / image
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(path.stem)
                values |= dict(zip(fields, (text, image), strict=True))
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
    rows = [(name, *row) for name, some in subsets.items() for row in some]
    first = {}
    for index, (_, _, target) in enumerate(rows):
        first.setdefault(content(target), index)
    negatives, neighbours = [], []
    for index, (name, query, target) in enumerate(rows):
        scope = [i for i, row in enumerate(rows) if across or row[0] == name]
        never = {content(t) for _, q, t in rows if content(q) == content(query)} | {content(query)}
        candidates = {content(rows[i][2]) for i in scope} - never
        scored = [(-float(vector(query) @ vector(rows[first[c]][2])), first[c]) for c in candidates]
        ranked = sorted(scored)[rules.first_rank : rules.end_rank]
        positive = float(vector(query) @ vector(target))
        bound = positive - (1 - rules.relative) * abs(positive)
        kept = [(first_row, -score) for score, first_row in ranked if -score < bound]
        found = []
        for first_row, score in kept[: rules.negatives]:
            side = rows[first_row][2]
            text, path = side if isinstance(side, tuple) else (side, "")
            found.append((text, path, float(score)))
        negatives.append(found)
        having = [
            [i for i in scope if content(rows[i][2]) == content(rows[first_row][2])]
            for first_row, _ in kept[: rules.neighbours]
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
pair_lists = st.lists(st.tuples(sides, sides), min_size=1, max_size=14)


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
    given_rows = [row for name in subsets for row in rows[name]]
    for index, row in enumerate(given_rows):
        given = source.row(index)
        assert (row["qry"], row["qry_image_path"]) == (given.qry, given.qry_image_path)
        assert (row["pos_text"], row["pos_image_path"]) == (given.pos_text, given.pos_image_path)


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
    changed = {"A": [*PLANTED["A"][:3], ("1 1 1 1 query", "0 0 0 1")]}
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
    assert counts["B"][:4] == (3, 3, 0, 0)
    assert counts["B"].other_positives + counts["B"].own_content == 6
    assert counts["B"].own_content == 2
    assert counts["A"].outside_ranks == 4
    text = report_text(counts, rules)
    assert "with 1 (%)" in text
    assert text.splitlines()[-3].startswith("all ")
    written = json.loads((tmp_path / "out/mining/report.json").read_text())
    assert written["subsets"]["B"]["own_content"] == 2
