"""Outputs in parts, parquet and Lance: what they hold, shards, and that a job continues from any state."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest

from llave_jax import embed
from llave_jax.common import files
from llave_jax.embedding import bulk, entries, parts, store
from llave_jax.embedding.item_sources import open_items
from llave_jax.embedding.item_tables import Columns
from llave_jax.embedding.precision import quantise, truncate
from llave_jax.inputs.content import item_key
from tests.embedding.test_embed import SIZE, FakeEmbedder, Killed, kill_at
from tests.evaluation.fake_encoder import hash_vector

FORMATS = ["parquet", "lance"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks and shards' pieces of four texts."""
    monkeypatch.setattr(entries, "CHUNK_WEIGHT", 4)
    monkeypatch.setattr(entries, "PIECE_ENTRIES", 4)


@pytest.fixture(params=FORMATS)
def job(request, tmp_path):
    if request.param == "lance":
        pytest.importorskip("lance")
    return Job(tmp_path, request.param)


class Job:
    """An input of texts, and runs over it."""

    def __init__(self, folder, kind):
        self.folder, self.kind = folder, kind
        self.input, self.output = folder / "items.jsonl", folder / "out"

    def write(self, *values):
        lines = [value if isinstance(value, dict) else {"text": value} for value in values]
        self.input.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(self, shard=(0, 1), model="model", **options):
        """Texts that were encoded."""
        embedder, source = FakeEmbedder(), open_items(self.input, shard=shard)
        options = {"format": self.kind, "on_error": "skip"} | options
        self.result = bulk.embed_file(embedder, source, self.output, model, **options)
        return embedder.texts

    def rows(self):
        """The data set as its users read it: id -> row."""
        if self.kind == "lance":
            import lance

            table = lance.dataset(str(self.output)).to_table()
        else:
            table = pyarrow.parquet.read_table(self.output)
        rows = table.to_pylist()
        assert len({row["id"] for row in rows}) == len(rows)
        return {row["id"]: row for row in rows}

    def check(self):
        """Every item once, with its own vector and metadata."""
        expected = {}
        for entry in open_items(self.input):
            if entry.item is not None:
                row = {"vector": hash_vector(item_key(entry.item)).tolist(), "metadata": None}
                if entry.metadata:
                    row["metadata"] = json.dumps(entry.metadata)
                expected[parts.id_text(entry.id)] = row | {"id": parts.id_text(entry.id)}
        assert self.rows() == expected

    def files(self):
        pattern = "data/*.lance" if self.kind == "lance" else "*.parquet"
        return {path: path.stat().st_mtime_ns for path in self.output.glob(pattern)}


TEXTS = [f"text {i}" for i in range(11)]


def test_what_is_written(job):
    job.write(*TEXTS[:5], {"text": "b", "id": "x", "metadata": {"year": 1}}, {"id": "broken"})
    assert job.run() == [*TEXTS[:5], "b"]
    assert job.result[:3] == (job.output, 6, 1)
    job.check()
    (skipped,) = (job.output / "_skipped-00000-of-00001.jsonl").read_text().splitlines()
    assert json.loads(skipped)["id"] == "broken"
    assert all(path.name.startswith(("_", "part-", "data")) for path in job.output.iterdir())
    before = job.files()
    assert len(before) == 2
    assert job.run() == []
    assert job.files() == before


def test_changes_of_the_input(job):
    job.write(*TEXTS)
    job.run()
    job.write(*TEXTS, "more")
    assert job.run() == ["more"]
    job.check()
    job.write(*TEXTS[:4], "other", *TEXTS[5:], "more")
    assert job.run() == ["other", *TEXTS[5:8]]
    job.check()
    job.write(*TEXTS[:3])
    assert job.run() == TEXTS[:3]
    job.check()
    assert len(job.rows()) == 3
    if job.kind == "parquet":
        assert len(job.files()) == 1


def test_ids_and_metadata_change_without_the_model(job):
    job.write(*TEXTS)
    job.run()
    before = job.files()
    job.write(
        *TEXTS[:4], *({"text": text, "id": text, "metadata": {"a": text}} for text in TEXTS[4:])
    )
    assert job.run() == []
    job.check()
    unchanged = [path for path, time in before.items() if job.files().get(path) == time]
    assert len(unchanged) == (3 if job.kind == "lance" else 1)


@pytest.mark.parametrize("damage", ["a bit", "cut", "removed"])
def test_a_part_that_has_changed_is_embedded_again(job, damage, caplog):
    job.write(*TEXTS)
    job.run()
    log = job.output / "_progress-00000-of-00001.jsonl"
    name = json.loads(log.read_text().splitlines()[2])["part"]
    path = next(path for path in job.files() if path.name in name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "removed":
        path.write_bytes(data if damage == "a bit" else data[:-5])
    assert job.run() == TEXTS[4:8]
    assert f"{path}: is not what was written to it" in caplog.text
    job.check()
    assert job.run() == []


def test_shards_share_a_data_set(job):
    job.write(*TEXTS, *(f"more {i}" for i in range(20)))
    texts = []
    for i in (2, 0, 1):
        texts += job.run((i, 3))
    assert sorted(texts) == sorted([*TEXTS, *(f"more {i}" for i in range(20))])
    job.check()
    assert job.run((1, 3)) == []
    with pytest.raises(ValueError, match=r"holds a job of 3 shard\(s\), not 2"):
        job.run((0, 2))
    with pytest.raises(ValueError, match=r"another model .* by another shard"):
        job.run((0, 3), model="other")
    job.check()


def test_a_shard_without_items(job):
    job.write("a")
    assert job.run((1, 2)) == []
    assert job.run((0, 2)) == ["a"]
    job.check()


def test_other_work(job):
    job.write(*TEXTS)
    job.run()
    with pytest.raises(ValueError, match="another model"):
        job.run(model="other")
    if job.kind == "parquet":
        (job.output / "_progress-00000-of-00001.jsonl").unlink()
        with pytest.raises(ValueError, match=r"has no _progress-00000-of-00001\.jsonl"):
            job.run()


def test_killed_at_each_step(job, monkeypatch):
    """A data set that is finished, whose input changes; the run over the change dies at every step."""
    for step in range(40):
        job.output = job.folder / f"{step}"
        job.write(*TEXTS)
        job.run()
        job.write(TEXTS[0], "other", *TEXTS[2:8], "more")
        with kill_at(monkeypatch, step):
            try:
                job.run()
            except Killed:
                died = True
            else:
                died = False
        job.run()
        job.check()
        assert job.run() == []
        if not died:
            assert step > 3
            return
    raise AssertionError("the run never ended")


def test_a_full_disk_is_named(job, monkeypatch):
    if job.kind == "lance":
        pytest.skip("its files are written by the library")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    job.write(*TEXTS)
    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(files.DiskFull, match=r"part-.*make room and run the same command again"):
        job.run()
    monkeypatch.undo()
    job.run()
    job.check()


def test_columns_of_a_table_become_columns(tmp_path, monkeypatch):
    table = pyarrow.table({"text": TEXTS, "id": range(11), "year": range(11), "tags": [["a"]] * 11})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    source = open_items(tmp_path / "t.parquet", columns=Columns(metadata=("year", "tags")))
    bulk.embed_file(FakeEmbedder(), source, tmp_path / "out", "model", format="parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out")
    assert found.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), SIZE)
    assert found.schema.field("year").type == pyarrow.int64()
    assert found.column("year").to_pylist() == list(range(11))
    assert found.column("id").to_pylist() == [str(i) for i in range(11)]
    assert found.column("tags").to_pylist() == [["a"]] * 11
    source = open_items(tmp_path / "t.parquet", columns=Columns(metadata=("id",)))
    with pytest.raises(
        ValueError, match="metadata column id has the name of a column of the output"
    ):
        bulk.embed_file(FakeEmbedder(), source, tmp_path / "b", "model", format="parquet")


def test_two_shards_at_once(tmp_path):
    """In processes: both append to one Lance data set."""
    pytest.importorskip("lance")
    job = Job(tmp_path, "lance")
    job.write(*(f"text {i}" for i in range(60)))
    script = f"""
import sys, tests.embedding.test_parts as t
from llave_jax.embedding import entries
entries.CHUNK_WEIGHT = entries.PIECE_ENTRIES = 2
from pathlib import Path
t.Job(Path({str(job.folder)!r}), {job.kind!r}).run((int(sys.argv[1]), 2))
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], stderr=subprocess.PIPE)
        for i in (0, 1)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
    job.check()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"precision": "float16", "truncate_dim": 8}, np.float16),
        ({"precision": "int8"}, np.int8),
        ({"precision": "binary"}, np.int8),
    ],
)
def test_smaller_vectors(job, tmp_path, options, kind):
    job.write(*TEXTS)
    job.run(**options)
    vectors = np.stack([hash_vector(item_key(entry.item)) for entry in open_items(job.input)])
    expected = quantise(truncate(vectors, options.get("truncate_dim")), options["precision"])
    assert expected.dtype == kind
    found = [row["vector"] for row in job.rows().values()]
    np.testing.assert_array_equal(np.array(found, kind), expected)
    assert job.run(**options) == []
    with pytest.raises(ValueError, match="of other settings"):
        job.run()
    if job.kind == "parquet":
        options = options | {"format": "npy"}
        bulk.embed_file(FakeEmbedder(), job.input, tmp_path / "npy", "model", **options)
        np.testing.assert_array_equal(np.load(tmp_path / "npy" / "embeddings.npy"), expected)


def test_a_prompt_is_part_of_what_a_vector_is(job):
    job.write("a")
    assert job.run(prompt="find: ") == ["find: a"]
    assert job.run(prompt="find: ") == []
    with pytest.raises(ValueError, match="of other settings"):
        job.run(prompt="other: ")


def test_the_command(golden_model, tmp_path, capsys):
    (tmp_path / "items.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    model = ["--model", str(golden_model.directory), "--input", str(tmp_path / "items.jsonl")]
    command = [*model, "--output", str(tmp_path / "out")]
    for shard in ("0/2", "1/2"):
        options = ["--format=parquet", f"--shard={shard}", "--truncate-dim=16", "--prompt=find: "]
        assert embed.main([*command, *options]) == 0
    assert "4 embeddings of 16 numbers in" in capsys.readouterr().out
    table = pyarrow.parquet.read_table(tmp_path / "out")
    assert sorted(table.column("id").to_pylist(), key=int) == [str(i) for i in range(11)]
    settings = json.loads((tmp_path / "out" / "_run-00001-of-00002.json").read_text())["out"]
    assert settings["truncate_dim"] == 16
    assert settings["prompt"] == "find: "
    assert embed.main([*command, "--shard=0/2"]) == 2
    assert "shards need --format parquet or lance" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        embed.main([*command, "--shard=2/2"])
    assert "'2/2': expected I/N, such as 0/4, with I from 0 to N - 1" in capsys.readouterr().err


def test_halves_of_surrogate_pairs(job):
    job.write({"text": "a", "id": "\ud800", "metadata": {"b": "\ud800"}})
    job.run()
    assert list(job.rows()) == ["\\ud800"]


def test_vectors_of_a_part(job, tmp_path):
    job.write(*TEXTS)
    job.run()
    chunk = store.whole_lines(job.output / "_progress-00000-of-00001.jsonl")[1]
    writer = parts.WRITERS[job.kind](job.output, dimension=SIZE, dtype="float32")
    expected = [hash_vector(item_key(entry.item)) for entry in open_items(job.input)][:4]
    np.testing.assert_array_equal(writer.vectors(chunk["part"]), expected)
