"""`llave_jax.index`: from files to results, and back to a state that follows the files."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("lancedb")

from llave_jax import index as command
from llave_jax.embedding.embedder import Embedder
from llave_jax.search.index import Index
from llave_jax.search.thumbnails import SIDE


def draw(path, seed, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture
def run(capsys):
    """Runs a command; its output, or its error."""

    def run(*args, fails=False):
        status = command.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert status == (2 if fails else 0), err
        if fails:
            *progress, said = err.splitlines()
            assert said.startswith("error: ")
            assert all(line.startswith("indexing: ") for line in progress)
            return said
        return out + err

    return run


@pytest.fixture(scope="module")
def built(golden_model, tmp_path_factory):
    """Photos (one of them broken), lines with metadata, and their index."""
    folder = tmp_path_factory.mktemp("built")
    for i in range(5):
        draw(folder / "photos" / f"{i}.png", i, (300 + i, 500))
    (folder / "photos" / "broken.jpg").write_bytes(b"no picture")
    lines = [
        {"id": "mixed", "text": "<image>\nA caption", "image": "photos/1.png"},
        {"id": "cat", "text": "A cat", "metadata": {"year": 2020, "by": "it's me"}},
        {"id": "cat", "text": "Another cat"},
        {"id": 7, "text": "A dog", "metadata": {"year": 2021}},
        {"id": "old", "text": "A bird", "metadata": {"year": "before"}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "items.jsonl").write_text(text + "no JSON\n")
    inputs = [str(folder / "photos"), str(folder / "items.jsonl")]
    model = str(golden_model.directory)
    arguments = ["build", "--model", model, "--input", *inputs, "--output", str(folder / "a.lance")]
    assert command.main(arguments) == 0
    return folder, golden_model.directory


def ids_of(output):
    return [hit["id"] for hit in json.loads(output)]


def test_what_is_in_the_index(built, run):
    folder, model = built
    info = json.loads(run("info", "--index", folder / "a.lance", "--json"))
    assert info["items"] == 8
    assert info["kinds"] == {"image": 5, "text": 2, "mixed": 1}
    assert info["columns"] == {"year": "int64", "by": "string"}
    assert info["model"]["model"] == str(model)
    reasons = (folder / "a.lance" / "skipped.txt").read_text().splitlines()
    assert len(reasons) == 4
    for words in ("broken.jpg", "'cat' was given before", "metadata year is 'before'", "not JSON"):
        assert sum(words in reason for reason in reasons) == 1
    facts = dict(
        line.split(None, 1) for line in run("info", "--index", folder / "a.lance").splitlines()
    )
    assert facts["items"] == "8 (2 text, 5 image, 1 mixed)"
    assert facts["search"] == "exact"
    with Index.open(folder / "a.lance") as index:
        picture = PIL.Image.open(io.BytesIO(index.thumbnail(str(folder / "photos" / "2.png"))))
        assert (picture.format, max(picture.size)) == ("JPEG", SIDE)
        assert index.thumbnail("cat") is None


def test_searches(built, run):
    folder, model = built
    photo = folder / "photos" / "3.png"
    search = ["search", "--index", folder / "a.lance"]
    hits = json.loads(run(*search, "--image", photo, "-k", 3, "--json"))
    assert (len(hits), hits[0]["id"], hits[0]["kind"]) == (3, str(photo), "image")
    assert hits[0]["score"] == pytest.approx(1, abs=1e-4)
    embedder = Embedder.from_pretrained(model)
    queries = {
        ("--text", "A dog"): "A dog",
        ("--text", "A caption", "--image", str(photo)): {"text": "A caption", "image": str(photo)},
    }
    with Index.open(folder / "a.lance") as index:
        for flags, item in queries.items():
            expected = [hit.id for hit in index.search(embedder.encode(item), 8)]
            assert ids_of(run(*search, *flags, "--json")) == expected
    assert ids_of(run(*search, "--like", "cat", "--json"))[0] == "cat"
    some = run(*search, "--text", "A dog", "--where", "year = 2020 AND kind = 'text'", "--json")
    assert json.loads(some)[0]["metadata"] == {"year": 2020, "by": "it's me"}
    assert len(json.loads(some)) == 1
    table = run(*search, "--text", "A dog", "-k", 2)
    assert table.splitlines()[0].split() == ["id", "text", "metadata", "kind", "score"]
    assert table.splitlines()[2].split()[-2:] == ["text", "1.0000"]
    assert run(*search, "--text", "x", "--where", "year > 3000") == "nothing found\n"


def test_what_searches_refuse(built, run, tmp_path):
    folder, model = built
    search = ["search", "--index", folder / "a.lance"]
    assert "nothing to search for" in run(*search, fails=True)
    assert "not both" in run(*search, "--image", "a.png", "--video", "b.mp4", fails=True)
    assert "has no item 'x'" in run(*search, "--like", "x", fails=True)
    assert "--like takes no" in run(*search, "--like", "cat", "--text", "x", fails=True)
    assert "No field named yeer" in run(*search, "--text", "x", "--where", "yeer > 1", fails=True)
    assert "at least 1" in run(*search, "--text", "x", "-k", 0, fails=True)
    assert "does not exist" in run(*search, "--image", tmp_path / "absent.png", fails=True)
    assert "is no index" in run("info", "--index", tmp_path / "absent", fails=True)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    for action in (
        [*search, "--text", "x"],
        ["add", "--index", search[2], "--input", folder / "items.jsonl"],
    ):
        said = run(*action, "--model", other, fails=True)
        assert "was made with" in said
        assert str(other) in said
    command = ["build", "--model", model, "--input", folder / "photos", "--output", search[2]]
    assert "--precision 'float32', not 'float16'" in run(
        *command, "--precision", "float16", fails=True
    )
    moved = tmp_path / "a.lance"
    shutil.copytree(search[2], moved)
    with Index.open(moved, write=True) as index:
        settings = index.settings
        made = {**settings.model, "model": str(tmp_path / "gone")}
        index._keep(type(settings)(**{**settings.__dict__, "model": made}))
    assert "say with --model" in run("search", "--index", moved, "--text", "x", fails=True)
    run("search", "--index", moved, "--text", "x", "--model", model)


def test_the_index_follows_the_files(built, run, tmp_path, monkeypatch):
    folder, model = built
    shutil.copytree(folder / "photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    encoded = []
    encode = Embedder.encode

    def counting(self, items, *args, **options):
        if isinstance(items, list):  # queries come one by one
            encoded.extend(items)
        return encode(self, items, *args, **options)

    monkeypatch.setattr(Embedder, "encode", counting)
    build = ["build", "--model", model, "--input", "photos", "--output", "b.lance"]
    build += ["--precision", "float16", "--no-thumbnails", "--prompt", "Represent: "]
    said = run(*build)
    assert "5 items in" in said
    assert ": 5 new\n" in said
    assert "1 items skipped" in said
    assert len(encoded) == 6
    assert ": 0 new, 5 unchanged\n" in run(*build)
    assert len(encoded) == 7  # the broken one is tried again
    os.utime("photos/0.png", (1, 1))
    assert ": 0 new, 1 with new metadata or files, 4 unchanged\n" in run(*build)
    assert ": 0 new, 5 unchanged\n" in run(*build)
    draw(tmp_path / "photos" / "1.png", 99)
    draw(tmp_path / "photos" / "sub" / "new.png", 98)
    (tmp_path / "photos" / "broken.jpg").unlink()
    del encoded[:]
    assert ": 1 new, 1 changed, 4 unchanged\n" in run(*build)
    assert not (tmp_path / "b.lance" / "skipped.txt").exists()
    assert [str(item.images[0]) for item in encoded] == ["photos/1.png", "photos/sub/new.png"]
    (tmp_path / "more.jsonl").write_text('{"id": "x", "text": "A cat", "metadata": {"year": 1}}\n')
    add = ["add", "--index", "b.lance", "--input", "more.jsonl"]
    assert ": 1 new\n" in run(*add)
    (tmp_path / "more.jsonl").write_text('{"id": "x", "text": "A cat", "metadata": {"year": 2}}\n')
    assert ": 0 new, 1 with new metadata or files\n" in run(*add)
    with Index.open("b.lance") as index:
        vector = Embedder.from_pretrained(model).encode("Represent: A cat")
        hit = index.search(vector, 1, where="year = 2")[0]
        assert (hit.id, hit.score) == ("x", pytest.approx(1, abs=1e-3))
        assert index.thumbnail("photos/1.png") is None
        assert index.settings.precision == "float16"
    search = ["search", "--index", "b.lance", "--text", "A cat", "--prompt", "Represent: "]
    assert run(*search).splitlines()[2].split()[-1] == "1.0000"
    assert "1 items deleted, 6 left" in run("delete", "--index", "b.lance", "--id", "x", "none")
    assert "No field named" in run("delete", "--index", "b.lance", "--where", "foo = 1", fails=True)
    assert "give one of them" in run("delete", "--index", "b.lance", fails=True)
    assert "5 items deleted, 1 left" in run(
        "delete", "--index", "b.lance", "--where", "NOT starts_with(path, 'photos/s')"
    )
    assert "search is exact" in run("compact", "--index", "b.lance")
    stop = [*build, "--on-error", "raise"]
    (tmp_path / "photos" / "0.png").write_bytes(b"")
    assert "0.png" in run(*stop, fails=True)


SMALL_CHUNKS = """
from llave_jax import index
from llave_jax.embedding import entries

entries.CHUNK_WEIGHT = 16
raise SystemExit(index.main())
"""


@pytest.mark.slow
def test_a_killed_build_goes_on(built, run, tmp_path):
    """SIGKILL while chunks are embedded: those that are in stay, and the index ends as that of one run."""
    _, model = built
    lines = [json.dumps({"id": f"line {i}", "text": f"text {i * i}"}) for i in range(1000)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    build = ["build", "--model", model, "--input", tmp_path / "items.jsonl", "--output"]
    arguments = [str(part) for part in (*build, tmp_path / "a.lance")]
    for chunks in (2, 4):
        process = subprocess.Popen([sys.executable, "-c", SMALL_CHUNKS, *arguments])
        versions = tmp_path / "a.lance" / "items.lance" / "_versions"
        # One version for the new index, one for each chunk.
        while not versions.is_dir() or len(list(versions.glob("*.manifest"))) < chunks:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with Index.open(tmp_path / "a.lance") as index:
            assert 0 < len(index) < 1000
            kept = len(index)
    said = run(*arguments)
    assert f": {1000 - kept} new, {kept} unchanged\n" in said
    run(*build, tmp_path / "b.lance")
    with Index.open(tmp_path / "a.lance") as one, Index.open(tmp_path / "b.lance") as two:
        ids = [f"line {i}" for i in range(1000)]
        assert one.present(ids).keys() == two.present(ids).keys() == set(ids)
        for id in ids[::100]:
            np.testing.assert_allclose(one.vector(id), two.vector(id), atol=1e-5)
