"""Rows, archives and folders that are made to do harm: real files, refused by name."""

from __future__ import annotations

import json
import os
import struct
import zipfile

import numpy as np
import PIL.Image
import pytest

from llave_jax.common.directories import make_directory
from llave_jax.common.json_text import MAX_LINE_BYTES, json_lines, parse_json
from llave_jax.data.image_store import ImageStore
from llave_jax.data.sources import open_source
from llave_jax.embedding.item_sources import open_items
from llave_jax.evaluation.benchmarks import mmeb
from llave_jax.evaluation.benchmarks.corpus import read_task
from llave_jax.inputs.images import ImageError


@pytest.fixture
def folder(tmp_path):
    """A root with a picture, and a picture outside of it."""
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    for path in (tmp_path / "secret.png", root / "images" / "0.png"):
        PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    (root / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "images" / "same.png").symlink_to("0.png")
    (root / "images" / "up").symlink_to(tmp_path)
    return root


OUTSIDE = [
    "../secret.png",
    "images/../../secret.png",
    "/etc/hostname",
    "images/link.png",
    "images/up/secret.png",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_out_of_a_root(folder, path):
    with pytest.raises(ImageError, match=r"row 7.* leaves the image root"):
        ImageStore(folder).read(path, "row 7")
    for name, key in (("queries", "q"), ("corpus", "d")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"_id": key, "text": "x"}) + "\n")
    (folder / "qrels.tsv").write_text("q\td\t1\n")
    read_task(folder)
    (folder / "corpus.jsonl").write_text(json.dumps({"_id": "d", "image": path}) + "\n")
    with pytest.raises(ValueError, match=r"corpus.jsonl: line 1: .*(leaves|leads out of)"):
        read_task(folder)


def test_links_within_a_root_and_linked_folders(folder, tmp_path):
    store = ImageStore(folder)
    assert store.read("images/same.png") == store.read("images/0.png")
    (tmp_path / "other").mkdir()
    os.rename(folder / "images" / "0.png", tmp_path / "other" / "0.png")
    (folder / "more").symlink_to(tmp_path / "other")
    assert store.read("more/0.png")


@pytest.mark.parametrize("name", ["../root/Set", "/etc/passwd", "a/b", "..", ""])
def test_names_of_datasets_are_no_paths(folder, name):
    (folder / "Set.json").write_text("[]")
    with pytest.raises(ValueError, match="expected the name of a dataset"):
        mmeb.read_rows(folder / "images", name)


def archive_of(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_bomb_in_an_archive_is_not_unpacked(tmp_path):
    path = archive_of(tmp_path / "a.zip", {"bomb.png": bytes(64 << 20), "b.bmp": bytes(1 << 20)})
    store = ImageStore(path)
    with pytest.raises(ImageError, match=r"bomb\.png.*more than 100 times as many"):
        store.read("bomb.png")
    assert len(store.read("b.bmp")) == 1 << 20


def test_damaged_lists_of_archives(tmp_path):
    whole = archive_of(tmp_path / "a.zip", {"a.png": b"x", "b.png": b"y"}).read_bytes()
    place = whole.rfind(b"PK\1\2")
    damaged = {
        "version": whole[: place + 6] + b"\xff\xff" + whole[place + 8 :],
        "offset": whole[: place + 42] + b"\xff\xff\xff\xff" + whole[place + 46 :],
        "cut": whole[:-10],
        "encrypted": whole[: place + 8] + b"\1\0" + whole[place + 10 :],
        "empty": b"",
    }
    for kind, data in damaged.items():
        path = tmp_path / f"{kind}.zip"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{kind}\.zip"):
            ImageStore(path).read("b.png")


def test_a_list_of_members_beyond_the_limit(tmp_path, monkeypatch):
    from llave_jax.data import image_store

    path = archive_of(tmp_path / "a.zip", {f"{n}.png": b"x" for n in range(50)})
    monkeypatch.setattr(image_store, "MAX_DIRECTORY_BYTES", 1000)
    with pytest.raises(
        ValueError, match=r"a\.zip: its list of members has \d+ bytes; the limit is 1000"
    ):
        ImageStore(path)
    claimed = path.read_bytes()
    place = claimed.rfind(b"PK\5\6")
    path.write_bytes(claimed[: place + 12] + struct.pack("<L", 2**31) + claimed[place + 16 :])
    with pytest.raises(ValueError, match="its list of members has"):
        ImageStore(path)


STRICT = [
    ('{"a": NaN}', "NaN is not a number"),
    ('{"a": -Infinity}', "-Infinity is not"),
    ('{"a": 1e999}', "the number 1e999 is too large"),
    ('{"a": 1, "a": 2}', "names a twice"),
    ("[" * 100_000, "nested more than"),
    ("[" * 101 + "]" * 101, "nested more than 100"),
    ("9" * 5000, "digits"),
    (b"\xff", "decode"),
]


@pytest.mark.parametrize(("text", "message"), STRICT, ids=[message for _, message in STRICT])
def test_json(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_json(text)
    assert type(error.value) is ValueError or "twice" in message
    assert len(str(error.value)) < 300


def test_depth_that_is_allowed():
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json('{"a": [1, {"b": 2}]}') == {"a": [1, {"b": 2}]}


def test_a_line_without_end_is_an_error_of_its_line(tmp_path):
    path = tmp_path / "items.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n\n{"text": "')
        for _ in range(3):
            file.write(b"x" * (MAX_LINE_BYTES // 2))
        file.write(b'"}\n{"id": NaN, "text": "b"}\n{"text": "c"}')
    with path.open("rb") as file:
        assert [(number, line is None) for number, line in json_lines(file)] == [
            (1, False),
            (3, True),
            (4, False),
            (5, False),
        ]
    lines = list(open_items(path))
    assert [bool(line.error) for line in lines] == [False, True, True, False]
    assert f"{path}:3: the line has more than 16 MiB" in lines[1].error
    assert "NaN" in lines[2].error
    assert open_items(path).count() == 4
    os.rename(path, tmp_path / "Set.jsonl")
    with pytest.raises(ValueError, match=r"Set\.jsonl line 3"):
        open_source(tmp_path / "Set.jsonl")


def test_directories_are_not_writable_for_others(tmp_path):
    before = os.umask(0)
    try:
        make_directory(tmp_path / "run" / "more")
        make_directory(tmp_path / "cache" / "models", private=True)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert modes == {"run": 0o755, "more": 0o755, "cache": 0o700, "models": 0o700}


def test_prepared_data_names_no_classes_of_others(tmp_path):
    (tmp_path / "Set").mkdir()
    (tmp_path / "Set" / "dataset_info.json").write_text("{}")
    (tmp_path / "Set" / "features.json").write_text('{"pythonClassName": "evil.Features"}')
    with pytest.raises(ValueError, match=r"features\.json: names the class 'evil\.Features'"):
        open_source(tmp_path)
