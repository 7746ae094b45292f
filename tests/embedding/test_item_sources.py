"""Items of JSON lines, tables, folders and patterns: what is read, in which order, under which id."""

import io
import json
import os
import pickle

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from llave_jax.embedding import item_tables
from llave_jax.embedding.entries import Entry, take_chunk
from llave_jax.embedding.item_sources import open_items
from llave_jax.embedding.item_tables import Columns


def picture(colour=0):
    file = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_table(path, group=None, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder as people have it."""
    root = tmp_path / "photos"
    for name in (
        *("b.JPG", "a/2.png", "a/10.webp", "c.tiff", "a/notes.txt", "clip.mov"),
        *(".hidden.png", "._b.jpg", ".thumbnails/b.png"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture())
    (root / "link").symlink_to(root / "a")
    (root / "a" / "up").symlink_to(root)
    return root


def test_a_folder(photos, caplog):
    source = open_items(photos)
    entries = list(source)
    names = ["a/10.webp", "a/2.png", "b.JPG", "c.tiff"]
    assert [entry.id for entry in entries] == [f"{photos}/{name}" for name in names]
    assert [entry.path for entry in entries] == [entry.id for entry in entries]
    assert entries[0].item.images == (f"{photos}/a/10.webp",)
    assert source.count() == 4
    assert "files of other kinds are left out: 1 .txt, 1 .mov" in caplog.text


def test_patterns_and_single_files(photos):
    def names(*inputs):
        return [entry.id.removeprefix(f"{photos}/") for entry in open_items(inputs)]

    assert names(photos / "*") == ["b.JPG", "c.tiff"]
    assert names(f"{photos}/a/*.png", photos / "b.JPG") == ["a/2.png", "b.JPG"]
    (photos / "[1].png").write_bytes(picture())
    assert names(photos / "[1].png") == ["[1].png"]
    with pytest.raises(ValueError, match=r"\*\.gif: holds no pictures and no parquet files"):
        open_items(photos / "*.gif")
    with pytest.raises(FileNotFoundError):
        open_items(photos / "nothing.png")
    write_table(photos / "t.parquet", text=["x"])
    with pytest.raises(ValueError, match=r"holds both pictures and parquet files .*t\.parquet"):
        open_items(photos)


def test_metadata_of_lines(tmp_path):
    lines = [
        {"text": "a", "metadata": {"year": 1999, "tags": ["x"]}},
        {"text": "b", "metadata": None},
        {"text": "c", "metadata": [1]},
    ]
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second, third = open_items(tmp_path / "i.jsonl")
    assert first.metadata == {"year": 1999, "tags": ["x"]}
    assert second.metadata == {}
    assert third.error == f"{tmp_path}/i.jsonl:3: metadata is list; expected an object"


def test_columns_of_their_own_names(tmp_path):
    path = write_table(
        tmp_path / "t.parquet",
        id=["x", "y", "z"],
        text=["a", None, "<image>\nz"],
        image=[{"bytes": picture(), "path": "1.png"}, {"bytes": None, "path": "b/2.png"}, None],
        year=[1, 2, 3],
    )
    a, b, c = open_items(path)
    assert (a.where, a.number, a.id) == (f"{path}: row 1", 1, "x")
    assert (a.item.text, a.item.images, a.path, a.metadata) == ("a", (picture(),), None, {})
    assert (b.item.text, b.item.images) == ("", (f"{tmp_path}/b/2.png",))
    assert b.path == f"{tmp_path}/b/2.png"
    assert c.item.images == (None,)  # the missing picture of a marker, as in JSON lines


@pytest.mark.parametrize("kind", ["binary", "large", "paths", "lists", "images", "dictionary"])
def test_kinds_of_picture_columns(tmp_path, kind):
    values = [picture(1), picture(2)]
    expected = [(value,) for value in values]
    column = {
        "binary": pyarrow.array(values),
        "large": pyarrow.array(values, pyarrow.large_binary()),
        "paths": pyarrow.array(["1.png", "/2.png"]),
        "dictionary": pyarrow.array(["1.png", "/2.png"]).dictionary_encode(),
        "lists": pyarrow.array([values, values[:1]]),
        "images": pyarrow.array([[{"bytes": v, "path": None} for v in values], []]),
    }[kind]
    if kind in ("paths", "dictionary"):
        expected = [(f"{tmp_path}/1.png",), ("/2.png",)]
    if kind == "lists":
        expected = [tuple(values), (values[0],)]
    if kind == "images":
        expected = [tuple(values), ()]
    name = "images" if kind == "images" else "photo"
    path = write_table(tmp_path / "t.parquet", **{name: column, "caption": ["a", "b"]})
    columns = Columns(image=None if kind == "images" else name, text="caption")
    assert [entry.item.images for entry in open_items(path, columns=columns)] == expected


def test_metadata_columns(tmp_path):
    values = {"text": ["a"], "year": [7], "tags": [["x"]]}
    path = write_table(tmp_path / "1.parquet", **values)
    columns = Columns(metadata=("year", "tags", "text"))
    source = open_items(path, columns=columns)
    (entry,) = source
    assert entry.metadata == {"year": 7, "tags": ["x"], "text": "a"}
    assert [field.name for field in source.metadata_fields] == ["year", "tags", "text"]
    write_table(tmp_path / "2.parquet", **(values | {"year": ["7"]}))
    with pytest.raises(ValueError, match=r"2\.parquet: column year is string; it is int64 in"):
        open_items(tmp_path, columns=columns)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (
            {"a": ["x"]},
            Columns(),
            "no column text, image, images or video; its columns are a: name",
        ),
        ({"id": ["x"]}, Columns(), "no column text"),
        (
            {"text": ["x"]},
            Columns(text="cap"),
            r"no column cap \(--text-column\); its columns are text",
        ),
        ({"text": ["x"]}, Columns(metadata=("y",)), r"no column y \(--metadata-columns\)"),
        ({"text": [1]}, Columns(), "column text is int64; expected texts"),
        ({"image": [1.5]}, Columns(), "column image is double; expected bytes"),
        (
            {"text": ["x"], "id": [1.5]},
            Columns(),
            "column id is double; expected texts or integers",
        ),
        ({"text": ["x"]}, Columns(image="text"), "column text is named for text and image"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, content, columns, message):
    path = write_table(tmp_path / "t.parquet", **content)
    with pytest.raises(ValueError, match=message) as raised:
        open_items(path, columns=columns)
    assert str(path) in str(raised.value)


def test_no_table(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match=r"t\.parquet: is not a readable parquet file"):
        open_items(tmp_path / "t.parquet")


def test_broken_rows(tmp_path):
    bad = pyarrow.StringArray.from_buffers(
        4,
        pyarrow.array([0, 1, 2, 3, 4], pyarrow.int32()).buffers()[1],
        pyarrow.py_buffer(b"a\xffcd"),
    )
    path = write_table(
        tmp_path / "t.parquet",
        text=bad,
        id=["a", "b", None, "d"],
        image=pyarrow.array([None, None, None, b""], pyarrow.binary()),
    )
    entries = list(open_items(path))
    assert [entry.item is None for entry in entries] == [False, True, True, True]
    assert "row 2: text cannot be read" in entries[1].error
    assert entries[2].error == f"{path}: row 3: id, the id, is null"
    assert "picture of 0 bytes" in entries[3].error
    # Pages that are damaged behind a footer that is not.
    path = write_table(tmp_path / "damaged.parquet", text=[f"text {i}" for i in range(2000)])
    data = bytearray(path.read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.parquet: row group 0 cannot be read"):
        list(open_items(path))


@pytest.mark.parametrize("key", ["image", "video"])
def test_a_url_is_refused(tmp_path, key):
    path = write_table(tmp_path / "t.parquet", **{key: ["https://example.org/1.png"]})
    (entry,) = open_items(path)
    assert f"row 1: {key} is a URL" in entry.error
    (entry,) = open_items(path, allow_urls=True)
    assert (entry.item is None) == (key == "video")
    assert entry.path is None


def test_several_inputs_have_one_count_of_positions(tmp_path, photos):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    table = write_table(tmp_path / "t.parquet", text=["c", "d", "e"], group=2)
    source = open_items([tmp_path / "a.jsonl", table, photos, tmp_path / "a.jsonl"])
    ids = [entry.id for entry in source]
    assert ids[:5] == [0, 1, 2, 3, 4]
    assert ids[9:] == [9, 10]
    assert source.count() == 11
    assert [entry.id for entry in source] == ids


def test_shards_have_every_item_once(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(item_tables, "PART_ROWS", 3)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(200)))
    table = write_table(tmp_path / "t.parquet", text=[f"{i}" for i in range(50)], group=20)
    inputs = [tmp_path / "a.jsonl", table, photos]
    whole = {str(entry.id): entry.item for entry in open_items(inputs)}
    for count in (2, 3):
        shards = [open_items(inputs, shard=(i, count)) for i in range(count)]
        found = [entry for shard in shards for entry in shard]
        assert len(found) == len(whole) == 254
        assert {str(entry.id): entry.item for entry in found} == whole
        assert sum(shard.count() for shard in shards) == 254
        assert max(shard.count() for shard in shards) < 200
    # Rows behind the others move none of them.
    before = [entry.id for entry in open_items(inputs[:1], shard=(1, 3))]
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n' * 100)
    assert [entry.id for entry in open_items(inputs[:1], shard=(1, 3))][: len(before)] == before


def test_pieces_can_be_read_elsewhere(tmp_path, photos):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    table = write_table(tmp_path / "t.parquet", text=["c", "d", "e"], group=2)
    source = open_items([tmp_path / "a.jsonl", table, photos])
    pieces = [pickle.loads(pickle.dumps(piece)) for piece in source.pieces()]
    assert [len(piece) for piece in pieces] == [2, 2, 1, 4]
    assert [e.id for piece in pieces for e in piece.entries()] == [e.id for e in source]


def test_a_pipe_has_no_count(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert open_items(tmp_path / "pipe").count() is None


def test_pictures_in_tables_bound_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("llave_jax.embedding.entries.CHUNK_BYTES", 2 * len(picture()))
    path = write_table(tmp_path / "t.parquet", image=[picture()] * 5)
    entries = iter(open_items(path))
    sizes = []
    while chunk := take_chunk(entries, 0):
        assert isinstance(chunk[0], Entry)
        sizes.append(len(chunk))
    assert sizes == [2, 2, 1]
