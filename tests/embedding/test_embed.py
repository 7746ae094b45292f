"""`llave_jax.embed`: what it writes, and that it continues from any state it can be left in."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest

from llave_jax.common import files
from llave_jax.embedding import array_store, bulk, entries, store
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.item_sources import open_items
from llave_jax.inputs import images
from llave_jax.inputs.content import item_key
from llave_jax.inputs.item import as_item
from tests.evaluation.fake_encoder import hash_vector
from tests.training.test_processes import free_port
from tests.xla_flags import xla_flags

SIZE = 16


SMALL_CHUNKS = """
from llave_jax import embed
from llave_jax.embedding import entries

entries.CHUNK_WEIGHT = 16
raise SystemExit(embed.main())
"""


class FakeEmbedder:
    """Vectors that depend on content only; remembers what it was asked to encode."""

    config = types.SimpleNamespace(text=types.SimpleNamespace(hidden_size=SIZE))

    def __init__(self):
        self.texts = []

    def encode(self, items, batch_size=None, *, on_error="raise"):
        items = list(items)
        vectors, failures = np.zeros((len(items), SIZE), np.float32), {}
        for i, item in enumerate(items):
            self.texts.append(item.text)
            try:
                for image in filter(None, item.images):
                    images.load_image(image, item.name)
                vectors[i] = hash_vector(item_key(item))
            except ValueError as error:
                if on_error == "raise":
                    raise
                failures[i] = str(error)
        return (vectors, failures) if on_error == "skip" else vectors


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """4 texts or 2 pictures each."""
    monkeypatch.setattr(entries, "CHUNK_WEIGHT", 4)
    monkeypatch.setattr(entries, "IMAGE_WEIGHT", 2)


class Case:
    """An input file with pictures beside it, and the output of runs over it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.input, self.output = folder / "items.jsonl", folder / "out"
        folder.mkdir(exist_ok=True)

    def write(self, *values):
        """Texts, objects, or bytes as they are."""
        lines = []
        for entry in values:
            if isinstance(entry, str):
                entry = {"text": entry}
            lines.append(entry if isinstance(entry, bytes) else json.dumps(entry).encode())
        self.input.write_bytes(b"".join(line + b"\n" for line in lines))

    def picture(self, name, colour, time_ns=None):
        PIL.Image.new("RGB", (5, 4), (colour, 0, 0)).save(self.folder / name, "BMP")
        if time_ns is not None:
            os.utime(self.folder / name, ns=(time_ns, time_ns))

    def run(self, embedder=None, model="model", **options):
        """Texts that were encoded."""
        embedder = FakeEmbedder() if embedder is None else embedder
        self.result = bulk.embed_file(embedder, self.input, self.output, model, **options)
        self.check()
        return getattr(embedder, "texts", None)

    def check(self):
        """Only finished files, and the vectors are those of the items that are listed."""
        names = {path.name for path in self.output.iterdir()}
        assert names - {"skipped.jsonl"} == {"embeddings.npy", "ids.jsonl", "progress.jsonl"}
        skipped = {entry["line"] for entry in self.skipped()}
        lines = [line for line in open_items(self.input) if line.number not in skipped]
        assert self.ids() == [line.id for line in lines]
        assert self.result[:3] == (self.output / "embeddings.npy", len(lines), len(skipped))
        vectors = np.load(self.output / "embeddings.npy")
        assert vectors.dtype == np.float32
        expected = [hash_vector(item_key(line.item)) for line in lines]
        np.testing.assert_array_equal(vectors, np.reshape(expected, (-1, SIZE)))

    def ids(self):
        return [json.loads(line) for line in (self.output / "ids.jsonl").open()]

    def skipped(self):
        path = self.output / "skipped.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


TEXTS = [f"text {i}" for i in range(11)]


def test_nothing_is_encoded_twice(case):
    case.write(*TEXTS)
    assert case.run() == TEXTS
    files = {path: path.stat().st_mtime_ns for path in case.output.glob("embeddings*")}
    assert case.run() == []
    assert files == {path: path.stat().st_mtime_ns for path in case.output.glob("embeddings*")}


def test_ids(case):
    case.write("a", {"text": "b", "id": "x"}, b"", b"  ", {"text": "c", "id": None}, "d")
    case.run()
    assert case.ids() == [0, "x", None, 3]
    case.write("a", {"text": "b", "id": {"other": [1, "é", "\ud800"]}}, "c", "d")
    assert case.run() == []
    assert case.ids()[1] == {"other": [1, "é", "\ud800"]}


def test_lines_added_later(case):
    case.write(*TEXTS[:6])
    case.run()
    for end in (7, 11):
        case.write(*TEXTS[:end])
        assert case.run() == TEXTS[6 if end == 7 else 7 : end]


def test_lines_taken_away(case):
    case.write(*TEXTS)
    case.run()
    case.write(*TEXTS[:8])
    assert case.run() == []
    case.write(*TEXTS[:5])
    assert case.run() == TEXTS[4:5]


def test_changed_lines(case):
    case.write(*TEXTS)
    case.run()
    changed = [*TEXTS[:5], "other", *TEXTS[6:]]
    case.write(*changed)
    assert case.run() == changed[4:8]


def test_a_picture_changed_under_its_name(case, caplog):
    case.write(*({"text": f"{i}", "image": f"{i}.bmp"} for i in range(6)))
    for i in range(6):
        case.picture(f"{i}.bmp", i)
    case.run()
    assert case.run() == []
    case.picture("3.bmp", 200)
    caplog.set_level("INFO")
    assert case.run() == ["2", "3"]
    assert f"items from {case.input}:3 to {case.input}:4 have changed" in caplog.text


def test_a_picture_changed_while_work_was_stopped(case, monkeypatch):
    case.write(*({"text": f"{i}", "image": f"{i}.bmp"} for i in range(6)))
    for i in range(6):
        case.picture(f"{i}.bmp", i)
    with kill_at(monkeypatch, 6), pytest.raises(Killed):
        case.run()
    done = len((case.output / "progress.jsonl").read_text().splitlines()) - 1
    assert done == 2
    case.picture("0.bmp", 100)
    assert case.run() == ["0", "1", "4", "5"]


def test_files_with_other_times_and_places_but_the_same_content(case):
    case.write({"text": "a", "image": "a.bmp"}, {"text": "b", "image": "b.bmp"})
    case.picture("a.bmp", 1)
    case.picture("b.bmp", 2)
    case.run()
    os.utime(case.folder / "a.bmp", ns=(1, 1))
    (case.folder / "b.bmp").rename(case.folder / "c.bmp")
    case.write({"text": "a", "image": "a.bmp"}, {"text": "b", "image": "c.bmp"})
    assert case.run() == []


def test_content_is_read_once_after_a_change_of_times(case, monkeypatch):
    case.write({"text": "a", "image": "a.bmp"})
    case.picture("a.bmp", 1)
    case.run()
    os.utime(case.folder / "a.bmp", ns=(1, 1))
    case.run()
    monkeypatch.setattr(bulk, "item_key", None)
    monkeypatch.setattr(Case, "check", lambda self: None)
    assert case.run() == []


@pytest.mark.parametrize("how", ["written", "renamed"])
def test_a_picture_replaced_by_one_of_the_same_size_and_time(case, how):
    case.write({"text": "a", "image": "a.bmp"})
    case.picture("a.bmp", 1, time_ns=10)
    case.run()
    if how == "renamed":
        case.picture("b.bmp", 2, time_ns=10)
        (case.folder / "b.bmp").rename(case.folder / "a.bmp")
    else:
        case.picture("a.bmp", 2, time_ns=10)
    assert case.run() == ["a"]


def test_other_work_is_not_continued(case, tmp_path):
    case.write(*TEXTS)
    case.run()
    before = np.load(case.output / "embeddings.npy")
    with pytest.raises(ValueError, match="another model"):
        case.run(model="other")
    other = Case(tmp_path / "other")
    other.output = case.output
    other.write("another input", *TEXTS)
    with pytest.raises(ValueError, match=r"other items, from .*items\.jsonl; use another --output"):
        other.run()
    assert {path.name for path in case.output.iterdir()} == {
        "embeddings.npy",
        "ids.jsonl",
        "progress.jsonl",
    }
    np.testing.assert_array_equal(before, np.load(case.output / "embeddings.npy"))
    # The same items elsewhere, and more of them, are the same work.
    other.write(*TEXTS, "more")
    assert other.run() == ["more"]
    (case.output / "progress.jsonl").unlink()
    with pytest.raises(ValueError, match=r"embeddings\.npy: has no progress\.jsonl"):
        case.run()


def test_two_jobs_at_once(case):
    pytest.importorskip("fcntl")
    case.write(*TEXTS)
    with (
        array_store.ArrayStore(case.output, model="model", dimension=SIZE, source=""),
        pytest.raises(
            ValueError, match=f"out: another job is writing to it: process {os.getpid()} "
        ),
    ):
        case.run()
    assert case.run() == TEXTS


BAD_LINES = [
    (b"{", "is not JSON"),
    (b"\xff\xfe\xfd", "is not JSON"),
    (b"[]", "is list; expected an object"),
    ({"txt": "a"}, "unknown key"),
    ({"image": 7}, "image holds int; expected a path"),
    ({"images": ["a.bmp", {}]}, "images holds dict; expected a path"),
    ({"text": "half \ud800"}, "surrogates not allowed"),
    ({"image": ""}, "image has an empty path"),
    ({"text": None, "image": None}, "is empty; expected a text"),
    ({"text": " "}, "is empty; expected a text"),
    ({"image": "nowhere.bmp"}, "does not exist"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_end_the_job(case, line, message):
    case.write(*TEXTS[:5], line, "fine")
    with pytest.raises(ValueError, match=rf"items\.jsonl:6.*{message}"):
        case.run()
    assert not (case.output / "embeddings.npy").exists()
    case.write(*TEXTS[:5], "repaired", "fine")
    assert case.run() == ["text 4", "repaired", "fine"]


def test_bad_lines_are_skipped_and_listed(case):
    lines = [line for line, _ in BAD_LINES]
    case.write("a", *lines, {"text": "b", "id": "b"}, *TEXTS)
    case.run(on_error="skip")
    assert case.ids() == [0, "b", *range(len(lines) + 2, len(lines) + 13)]
    entries = case.skipped()
    assert [entry["line"] for entry in entries] == list(range(2, 2 + len(lines)))
    assert [entry["id"] for entry in entries] == list(range(1, 1 + len(lines)))
    for entry, (_, message) in zip(entries, BAD_LINES, strict=True):
        assert message in entry["reason"]
        assert f"items.jsonl:{entry['line']}" in entry["reason"]
    assert case.run(on_error="skip") == []
    with pytest.raises(ValueError, match=r"items\.jsonl:2: is not JSON"):
        case.run()


def test_a_skipped_item_that_is_repaired(case):
    for i in (0, 1, 4, 5):
        case.picture(f"{i}.bmp", i)
    (case.folder / "2.bmp").write_bytes(b"BM no picture")
    case.write(*({"text": f"{i}", "image": f"{i}.bmp"} for i in range(6)))
    case.run(on_error="skip")
    assert [entry["line"] for entry in case.skipped()] == [3, 4]
    assert case.run(on_error="skip") == []
    with pytest.raises(ValueError, match=r"items\.jsonl:3 .*2\.bmp"):
        case.run()
    case.picture("3.bmp", 3)
    assert case.run(on_error="skip") == ["2", "3"]
    case.picture("2.bmp", 2)
    assert case.run() == ["2", "3"]
    assert not (case.output / "skipped.jsonl").exists()
    # One that is broken later leaves.
    (case.folder / "0.bmp").unlink()
    assert case.run(on_error="skip") == ["0", "1"]


def test_null_is_a_missing_picture(case):
    case.picture("a.bmp", 1)
    case.write(
        {"text": "<|image_1|>\nWhat is it?", "image": None},
        {"text": "<image> beside <image>", "images": ["a.bmp", None]},
        {"text": "no picture", "image": None, "images": None, "video": None},
    )
    pictures = [line.item.images for line in iter(open_items(case.input))]
    assert pictures == [(None,), (str(case.folder / "a.bmp"), None), ()]


def test_all_are_skipped(case):
    case.write(*(line for line, _ in BAD_LINES))
    case.run(on_error="skip")
    assert np.load(case.output / "embeddings.npy").shape == (0, SIZE)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_items(case, content):
    case.input.write_bytes(content)
    with pytest.raises(ValueError, match=r"items\.jsonl: has no items"):
        case.run()


def test_not_finite(case):
    class Broken(FakeEmbedder):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def encode(self, items, batch_size=None, *, on_error="raise"):
            items = list(items)
            vectors, failures = super().encode(items, on_error="skip")
            vectors[[item.text == "text 9" for item in items]] = self.value
            return (vectors, failures) if on_error == "skip" else vectors

    case.write(*TEXTS)
    for value, problem in [
        (np.nan, "is not finite"),
        (np.inf, "is not finite"),
        (0, "has length 0"),
    ]:
        message = rf"items\.jsonl:10: the embedding {problem}.* check the weights of the/model,"
        for on_error in ("raise", "skip"):
            with pytest.raises(ValueError, match=message):
                bulk.embed_file(
                    Broken(value),
                    case.input,
                    case.output,
                    "model",
                    model="the/model",
                    on_error=on_error,
                )
    assert case.run() == TEXTS[8:]


@pytest.mark.parametrize("cut", [1, 4 * SIZE, 4 * SIZE * 4 + 1, 10**6])
def test_a_truncated_array_is_not_taken_for_finished(case, cut):
    case.write(*TEXTS)
    case.run()
    path = case.output / "embeddings.npy"
    size = path.stat().st_size
    os.truncate(path, max(0, size - cut))
    encoded = case.run()
    assert encoded == (TEXTS[8:] if cut <= 4 * SIZE * 3 else TEXTS[4:] if cut < 10**6 else TEXTS)


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((11, SIZE + 1), np.float32),
        np.zeros((11, SIZE)),
        np.asfortranarray(np.zeros((11, SIZE), np.float32)),
        np.zeros(11 * SIZE, np.float32),
    ],
)
def test_another_array_is_not_taken_for_finished(case, other):
    case.write(*TEXTS)
    case.run()
    np.save(case.output / "embeddings.npy", other)
    assert case.run() == TEXTS


@pytest.mark.parametrize(
    "damage",
    ["a bit", "NaN", "another array", "rows exchanged", "array removed", "a number in the log"],
)
def test_an_array_that_has_changed_is_not_taken_for_finished(case, damage, caplog):
    case.write(*TEXTS)
    case.run()
    path, log = case.output / "embeddings.npy", case.output / "progress.jsonl"
    vectors, again = np.load(path), TEXTS[4:8]
    if damage == "a bit":
        content = bytearray(path.read_bytes())
        content[-4 * SIZE * 5] ^= 1
        path.write_bytes(content)
    elif damage == "NaN":
        vectors[5, 3] = np.nan
        np.save(path, vectors)
    elif damage == "another array":
        np.save(path, np.roll(vectors, 1, axis=1))
        again = TEXTS
    elif damage == "rows exchanged":
        vectors[[0, 10]] = vectors[[10, 0]]
        np.save(path, vectors)
        again = TEXTS[:4] + TEXTS[8:]
    elif damage == "array removed":
        path.unlink()
        again = TEXTS
    else:
        log.write_text(log.read_text().replace('"rows": 4', '"rows": 3', 1))
        again = TEXTS  # What follows is not where the log says.
    assert case.run() == again
    assert f"{path}: is not what was written to it" in caplog.text
    assert case.run() == []


@pytest.mark.parametrize("name", ["ids.jsonl", "skipped.jsonl"])
@pytest.mark.parametrize("damage", [lambda text: text[:-3], lambda text: "foreign\n", None])
def test_a_list_that_has_changed_is_written_again(case, name, damage, caplog):
    case.write(b"{", *TEXTS)
    case.run(on_error="skip")
    path = case.output / name
    before = path.read_text()
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(before))
    assert case.run(on_error="skip") == []
    assert path.read_text() == before
    assert f"{path}: is not what was written to it; it is written again" in caplog.text
    caplog.clear()
    # New ids are no damage.
    case.write(b"{", *({"text": text, "id": text} for text in TEXTS))
    assert case.run(on_error="skip") == []
    assert case.run(on_error="skip") == []
    assert "is not what was written" not in caplog.text


def test_the_output_of_an_earlier_version_is_continued(case, caplog):
    """Its log has no checksums, and stamps of another form."""
    case.write(*TEXTS)
    case.run()
    path = case.output / "progress.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines() if "finished" not in line]
    for entry in entries[1:]:
        del entry["checksum"]
        entry["stamp"] = "old"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert case.run() == []
    assert caplog.text == ""


def test_a_log_of_another_form_is_not_believed(case):
    case.write(*TEXTS)
    case.run()
    path = case.output / "progress.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for line in ("[]\n", "{}\n", '{"chunk": 1}\n', lines[2].replace('"rows": 4', '"rows": "4"')):
        path.write_text("".join([*lines[:2], line, *lines[3:]]))
        assert case.run() == TEXTS[4:]
    path.write_text("".join(["{}\n", *lines[1:]]))
    with pytest.raises(ValueError, match=r"has no progress\.jsonl"):
        case.run()


def test_longer_array_is_cut(case):
    case.write(*TEXTS)
    case.run()
    with open(case.output / "embeddings.npy", "ab") as file:
        file.write(b"abc")
    assert case.run() == []


@contextlib.contextmanager
def no_file_above(size):
    """What a full disk does, by the limit of a file's size."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The first chunk; the third; a line of the log in the middle of a chunk.
@pytest.mark.parametrize("size", [200, 128 + 4 * SIZE * 9, 128 + 4 * SIZE * 4 + 40])
def test_a_full_disk_is_named_and_what_is_complete_is_kept(case, size):
    case.write(*TEXTS)
    with no_file_above(size), pytest.raises(files.DiskFull) as raised:
        case.run()
    assert str(raised.value).startswith(f"{case.output}/")
    assert "make room and run the same command again" in str(raised.value)
    names = {path.name for path in case.output.iterdir()}
    assert names <= {"embeddings.partial.npy", "progress.jsonl"}
    done = store.whole_lines(case.output / "progress.jsonl")[1:]
    assert case.run() == TEXTS[4 * len(done) :]


def test_a_full_disk_says_what_is_missing(case, monkeypatch):
    case.write(*TEXTS)
    monkeypatch.setattr(store.Store, "_put", lambda self, i, chunk: self.chunks.update({i: chunk}))
    message = r"embeddings\.partial\.npy: .*needs 192 bytes\)"  # of the last 3 embeddings
    with no_file_above(128 + 4 * SIZE * 9), pytest.raises(files.DiskFull, match=message):
        case.run()


class Killed(BaseException):
    pass


class kill_at:
    """The process dies before the n-th time that anything reaches the disk, and nothing after it does.

    (Buffers are flushed even so; without that, less is on disk, as after `cut_log`.)
    """

    def __init__(self, monkeypatch, count):
        self.left, self.monkeypatch = count, monkeypatch

    def __enter__(self):
        self.patch = self.monkeypatch.context()
        patch = self.patch.__enter__()
        for owner, name in [
            (store, "sync"),
            (files, "_sync"),
            (Path, "replace"),
            (Path, "unlink"),
        ]:
            patch.setattr(owner, name, self.dying(getattr(owner, name)))
        return self

    def __exit__(self, *exc):
        self.patch.__exit__(None, None, None)

    def dying(self, action):
        def act(*args, **options):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return action(*args, **options)

        return act


STATES = st.lists(
    st.tuples(
        st.sampled_from(["append", "edit", "picture", "break", "shorten", "cut log", "cut array"]),
        st.integers(0, 30),  # where
        st.integers(0, 40),  # killed at; beyond what a run does: not killed
    ),
    min_size=1,
    max_size=6,
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(changes=STATES)
@hypothesis.example(
    changes=[("append", 0, 100), ("shorten", 5, 4), ("edit", 5, 100), ("append", 1, 7)]
)
def test_any_history_ends_in_the_same_output(changes, tmp_path_factory):
    """Whatever is changed between runs that are killed anywhere, the last one gives what a first
    and only run would give."""
    case = Case(tmp_path_factory.mktemp("history"))
    entries = [{"text": f"t{i}"} | ({"image": f"{i}.bmp"} if i % 3 == 0 else {}) for i in range(9)]
    for i in (0, 3, 6):
        case.picture(f"{i}.bmp", i, time_ns=i)
    clock = 1000
    patch = pytest.MonkeyPatch()
    for kind, where, killed_at in changes:
        clock += 1
        place = where % len(entries)
        if kind == "append":
            entries += [{"text": f"more {clock} {i}"} for i in range(where % 6)]
        elif kind == "edit":
            entries[place] = {"text": f"edited {clock}"}
        elif kind == "picture":
            case.picture(f"{place // 3 * 3}.bmp", clock % 256, time_ns=clock)
        elif kind == "break":
            path = case.folder / f"{place // 3 * 3}.bmp"
            path.write_bytes(b"broken")
            os.utime(path, ns=(clock, clock))
        elif kind == "shorten":
            del entries[max(1, place) :]
        elif kind == "cut log" and (case.output / "progress.jsonl").exists():
            path = case.output / "progress.jsonl"
            os.truncate(path, max(0, path.stat().st_size - 37 * where))
        elif kind == "cut array":
            for path in case.output.glob("embeddings*.npy"):
                os.truncate(path, max(0, path.stat().st_size - 47 * where))
        case.write(*entries)
        log, array = case.output / "progress.jsonl", case.output / "embeddings.npy"
        if array.exists() and not log.read_bytes().count(b"\n"):
            # A log that was cut to nothing says nothing of the array.
            with pytest.raises(ValueError, match=r"has no progress\.jsonl"):
                case.run(on_error="skip")
            array.unlink()
        with contextlib.suppress(Killed), kill_at(patch, killed_at):
            case.run(on_error="skip")
    case.run(on_error="skip")
    assert case.run(on_error="skip") == []


@pytest.mark.parametrize(
    "second",
    [
        [*TEXTS, "one more"],
        TEXTS[:6],
        [*TEXTS[:5], "other", *TEXTS[6:]],
        [b"{", *TEXTS[1:]],  # a row less
        ["other", *TEXTS[1:5], "other"],
    ],
    ids=["append", "shorten", "edit", "break", "edit and shorten"],
)
@pytest.mark.parametrize("third", ["as the first", "as the second", "longer"])
def test_killed_at_each_step(second, third, tmp_path, monkeypatch):
    """A finished output whose input changes: the next run dies at one step after the other, and the
    input changes again or does not."""
    third = {"as the first": TEXTS, "as the second": second, "longer": [*second, *TEXTS]}[third]
    for step in itertools.count():
        case = Case(tmp_path / f"{step}")
        case.write(*TEXTS)
        case.run()
        case.write(*second)
        killed = False
        with kill_at(monkeypatch, step):
            try:
                case.run(on_error="skip")
            except Killed:
                killed = True
        case.write(*third)
        case.run(on_error="skip")
        assert case.run(on_error="skip") == []
        if not killed:
            assert step > 3
            return


def test_the_input_is_not_held(case, monkeypatch):
    alive = weakref.WeakSet()
    most = 0

    def watched(*args):
        nonlocal most
        item = as_item(*args)
        alive.add(item)
        most = max(most, len(alive))
        return item

    monkeypatch.setattr(entries, "as_item", watched)
    monkeypatch.setattr(Case, "check", lambda self: None)
    case.write(*(f"text {i}" for i in range(400)))
    case.run()
    assert most <= 3 * 4
    case.run()
    assert most <= 3 * 4


def test_weights_bound_chunks(case):
    picture, video = {"image": "a.bmp"}, {"video": "a.mp4"}
    case.write(*["text"] * 5, *[picture] * 5, *[video] * 2)
    lines = iter(open_items(case.input))
    sizes = []
    while chunk := entries.take_chunk(lines, 0):
        sizes.append(len(chunk))
    assert sizes == [4, 3, 2, 2, 1]


# With a real model.


@pytest.fixture(scope="module")
def embedder(golden_model):
    return Embedder.from_pretrained(golden_model.directory)


@pytest.fixture
def real(case, golden):
    picture = PIL.Image.open(golden / "images" / "tiny.png")
    picture.save(case.folder / "tiny.png")
    lines = [{"text": f"caption {i}", "id": f"c{i}"} for i in range(5)]
    lines.insert(2, {"image": "tiny.png", "id": "picture"})
    case.write(*lines, {"image": "nowhere.png", "id": "missing"})
    return case


def test_a_marker_without_a_picture_is_named(embedder, case):
    case.write("fine", {"text": "<|image_1|>\nWhat is it?"})
    with pytest.raises(ValueError, match=r"items\.jsonl:2: the text has 1 image marker\(s\) for 0"):
        bulk.embed_file(embedder, case.input, case.output, "model")


def test_vectors_are_those_of_the_embedder(embedder, real):
    result = bulk.embed_file(embedder, real.input, real.output, "model", on_error="skip")
    assert result[1:3] == (6, 1)
    items = [line.item for line in open_items(real.input)]
    np.testing.assert_allclose(np.load(result.path), embedder.encode(items[:6]), atol=1e-6)
    assert real.ids() == ["c0", "c1", "picture", "c2", "c3", "c4"]
    assert real.skipped()[0]["id"] == "missing"


def command(model, case, *options):
    return [
        *(sys.executable, "-m", "llave_jax.embed", "--model", str(model)),
        *("--input", str(case.input), "--output", str(case.output), *options),
    ]


def test_command_line(golden_model, real):
    run = subprocess.run(command(golden_model.directory, real), capture_output=True, text=True)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "nowhere.png" in run.stderr.splitlines()[-1]
    run = subprocess.run(
        command(golden_model.directory, real, "--on_error", "skip"),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "6 embeddings of 64 numbers" in run.stdout
    assert "1 items skipped" in run.stdout
    assert np.load(real.output / "embeddings.npy").shape == (6, 64)


@pytest.mark.slow
def test_killed_for_real(golden_model, embedder, case):
    """kill -9 several times; with float noise, what a run that is left alone gives."""
    texts = [f"caption {i} " + "word " * (i % 20) for i in range(400)]
    case.write(*texts)
    arguments = [sys.executable, "-c", SMALL_CHUNKS, *command(golden_model.directory, case)[3:]]
    for wanted in (3, 9, 16):
        job = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        progress = case.output / "progress.jsonl"
        try:
            while not progress.exists() or progress.read_bytes().count(b"\n") <= wanted:
                assert job.poll() is None
                time.sleep(0.01)
        finally:
            job.send_signal(signal.SIGKILL)
            job.wait()
        assert not (case.output / "embeddings.npy").exists()
    subprocess.run(arguments, check=True)
    vectors = np.load(case.output / "embeddings.npy")
    np.testing.assert_allclose(vectors, embedder.encode(texts), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_several_processes(golden_model, embedder, case):
    """All fail alike at an item that one of them reads, and together they give what one gives."""
    case.picture("a.bmp", 1)
    lines = [{"text": f"caption {i} " + "word " * (i % 20)} for i in range(40)]
    lines[7:7] = [{"text": "see", "image": "a.bmp"}, {"text": "see", "image": "nowhere.bmp"}]
    case.write(*lines)
    script = [sys.executable, "-c", SMALL_CHUNKS, *command(golden_model.directory, case)[3:]]

    def run(*options, returncode=0):
        port = free_port()
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(2),
        }
        jobs = []
        for i in range(2):
            joining = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
            jobs.append(
                subprocess.Popen(
                    [*script, *options, *joining],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            outputs = [job.communicate(timeout=300) for job in jobs]
        finally:
            for job in jobs:
                job.kill()
        for job, (_, errors) in zip(jobs, outputs, strict=True):
            assert job.returncode == returncode, errors[-4000:]
        return outputs

    for _, errors in run(returncode=2):
        assert "items.jsonl:9" in errors
        assert "nowhere.bmp" in errors
    said = run("--on_error=skip")
    assert "41 embeddings" in said[0][0]
    assert "embeddings" not in said[1][0]
    texts = [line.item for line in iter(open_items(case.input)) if line.number != 9]
    vectors = np.load(case.output / "embeddings.npy")
    np.testing.assert_allclose(vectors, embedder.encode(texts), rtol=0, atol=1e-5)
    assert [entry["line"] for entry in case.skipped()] == [9]

    case.picture("a.bmp", 200)
    run("--on_error=skip")
    changed = np.load(case.output / "embeddings.npy")
    np.testing.assert_allclose(changed, embedder.encode(texts), rtol=0, atol=1e-5)
    assert np.abs(changed[7] - vectors[7]).max() > 1e-3
    np.testing.assert_array_equal(changed[20:], vectors[20:])

    # What only the first process finds ends the others too.
    said = run("--dtype=bfloat16", returncode=2)
    assert "another model" in said[0][1]
    assert "stopped with the first process" in said[1][1]
