"""Training pairs: every form of the same data gives and trains the same; bad rows say where."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llave_jax import train
from llave_jax.config import default_config
from llave_jax.data.image_store import ImageStore
from llave_jax.data.rows import RowError
from llave_jax.data.sources import MmebSource, PairSource, open_source, split_held_out
from llave_jax.digits.tokenizer import build_tokenizer
from llave_jax.inputs.images import ImageError
from llave_jax.inputs.item import missing_image
from llave_jax.training.metrics import read_metrics
from llave_jax.training.watch import Watch
from tests.data.mmeb_tree import TEMPLATES, WITH_NEGATIVES, make_tree, write_json

ROWS = 300  # of each of the 7 subsets: 2 100 in all
TOOL = Path(__file__).parents[2] / "tools/prepare_data.py"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmeb")
    return root / "MMEB-train", make_tree(root / "MMEB-train", ROWS)


@pytest.fixture(scope="module")
def forms(tree, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """What `open_source` takes for the same rows in every form; "parquet": archives and folders."""
    root, rows = tree
    other = tmp_path_factory.mktemp("other")
    make_tree(other / "folders", ROWS, zipped=())
    make_tree(other / "archives", ROWS, zipped=TEMPLATES)
    write_json(other / "json", rows)
    command = [sys.executable, TOOL, "--input", root, "--output", other / "prepared"]
    subprocess.run([*command, "--rows_per_shard", "128", "--num_workers", "1"], check=True)
    return {
        "parquet": {"path": root},
        "folders": {"path": other / "folders"},
        "archives": {"path": other / "archives"},
        "json": {"path": other / "json", "image_root": root},
        "prepared": {"path": other / "prepared"},
    }


@pytest.fixture(scope="module")
def sources(forms) -> dict[str, PairSource]:
    return {kind: open_source(**options) for kind, options in forms.items()}


def content(pair):
    items = (pair.query, pair.target, *pair.negatives)
    return pair.id, pair.subset, [(item.text, item.images, item.video) for item in items]


def kind_of(item) -> str:
    return "text" if not item.images else "zero" if item.images == (None,) else "image"


def write_rows(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows))
    return path


def row(**changes) -> dict:
    return {"qry": "q", "qry_image_path": "", "pos_text": "t", "pos_image_path": "", **changes}


@pytest.mark.parametrize("kind", ["folders", "archives", "json", "prepared"])
def test_all_forms_give_the_same_pairs(sources, kind):
    reference, source = sources["parquet"], sources[kind]
    assert len(source) == len(reference) == ROWS * len(TEMPLATES)
    assert source.subsets == reference.subsets
    for i in range(len(source)):
        assert content(source[i]) == content(reference[i])
        assert source.digest(i) == reference.digest(i)
        assert source.pair_id(i) == reference.pair_id(i) == source[i].id
    np.testing.assert_array_equal(source.contents(), reference.contents())
    for facts, expected in zip(source.queries(), reference.queries(), strict=True):
        np.testing.assert_array_equal(facts, expected)


def test_pairs_are_the_rows(sources, tree):
    root, rows = tree
    source = sources["parquet"]
    unpacked = {}
    for archive in (root / "images_zip").glob("*.zip"):
        with zipfile.ZipFile(archive) as file:
            unpacked |= {f"images/{name}": file.read(name) for name in file.namelist()}
    for subset, records in rows.items():
        for number, record in enumerate(records):
            pair = source[source.subsets[subset].start + number]
            assert (pair.id, pair.subset) == (f"{subset}:{number}", subset)
            assert (pair.query.text, pair.target.text) == (record["qry"], record["pos_text"])
            for item, field in ((pair.query, "qry_image_path"), (pair.target, "pos_image_path")):
                path = record[field]
                expected = unpacked.get(path) or (root / path).read_bytes() if path else None
                assert item.images == ((expected,) if path else missing_image(item.text))
            has_negative = subset in WITH_NEGATIVES and number % 4 != 0
            assert len(pair.negatives) == has_negative
            if has_negative:
                assert pair.negatives[0].text == record["neg_text"]
                assert bool(pair.negatives[0].images) == bool(record["neg_image_path"])


def train_on(workdir: Path, path: Path, image_root: Path | None = None):
    """(pair ids, losses) of three training steps."""
    config = default_config()
    config.model.preset = "tiny"
    config.model.tokenizer = str(build_tokenizer(workdir / "tokenizer"))
    config.model.inputs.max_length = config.model.inputs.max_text_length = 256
    config.data.path = str(path)
    config.data.image_root = image_root and str(image_root)
    config.data.num_workers = 0
    config.steps = 3
    config.batch.pairs = 16
    config.batch.row_length = config.batch.tokens_per_pair = 256
    config.batch.crops_per_pair = 15  # three images of five crops each
    config.loss.hard_negatives = True
    config.optim.learning_rate = 1e-3
    config.optim.warmup_fraction = 0
    config.dtype = "float32"
    config.remat = "none"
    config.log_every = 1
    ids = []
    finish = Watch._finish

    def watch(self, step, metrics, batch):
        ids.append(batch.ids)
        finish(self, step, metrics, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "_finish", watch)
        train.train(config, workdir)
    return ids, [line["loss"] for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def trained(forms, tmp_path_factory):
    return train_on(tmp_path_factory.mktemp("trained"), **forms["parquet"])


@pytest.mark.slow
def test_training_reads_every_kind_of_row(trained, sources):
    """So that equal losses below say something about images, texts and negatives."""
    ids, losses = trained
    names = {name for step in ids for pack in step for shard in pack for name in shard if name}
    source = sources["parquet"]
    pairs = [source[i] for i in range(len(source)) if source.pair_id(i) in names]
    assert len(pairs) == len(names) == 48
    shapes = {tuple(map(kind_of, (p.query, p.target))) for p in pairs}
    assert shapes == {("image", "text"), ("image",) * 2, ("text", "image"), ("zero", "image")}
    assert any(p.negatives for p in pairs)
    assert len(set(losses)) == 3
    assert np.isfinite(losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folders", "archives", "json", "prepared"])
def test_training_is_the_same_through_every_form(trained, forms, tmp_path, kind):
    ids, losses = train_on(tmp_path, **forms[kind])
    assert ids == trained[0]
    assert losses == trained[1]


@pytest.mark.parametrize("kind", ["parquet", "json", "prepared"])
def test_sources_travel_to_workers(sources, kind):
    source = sources[kind]
    source[0]  # opens archives and readers, which must not travel
    copy = pickle.loads(pickle.dumps(source))
    assert copy.subsets == source.subsets
    for i in (0, len(source) // 2, len(source) - 1):
        assert content(copy[i]) == content(source[i])


@pytest.mark.parametrize("kind", ["parquet", "json", "prepared"])
def test_subsets_and_caps(sources, forms, kind):
    names = ["WebQA", "CIRR"]
    source = open_source(**forms[kind], subsets=names, max_rows=200)
    assert source.subsets == {"WebQA": range(200), "CIRR": range(200, 400)}
    full = sources["parquet"]
    for place, name in ((0, "WebQA"), (200, "CIRR"), (399, "CIRR")):
        index = full.subsets[name].start + place % 200
        assert content(source[place]) == content(full[index])
    some = open_source(**forms[kind], subsets=names, max_rows={"CIRR": 7})
    assert {name: len(part) for name, part in some.subsets.items()} == {"WebQA": ROWS, "CIRR": 7}


def test_subsets_come_in_the_papers_order(sources):
    order = ["ImageNet_1K", "HatefulMemes", "VisDial", "CIRR", "NIGHTS", "WebQA", "MSCOCO_i2t"]
    assert list(sources["parquet"].subsets) == order


def test_what_is_not_there_is_named(tree, forms, tmp_path):
    root, _ = tree
    with pytest.raises(FileNotFoundError, match=r"no subsets \['MSCOCO'\]; it has \['ImageNet_1K'"):
        open_source(root, subsets=["CIRR", "MSCOCO"])
    with pytest.raises(FileNotFoundError, match="no training data; expected SUBSET/diverse"):
        open_source(root, split="diverse_instruction")
    with pytest.raises(FileNotFoundError, match="no training data"):
        open_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="no split 'diverse_instruction'"):
        open_source(**forms["prepared"], split="diverse_instruction")
    with pytest.raises(FileNotFoundError, match="image root"):
        open_source(root, image_root=tmp_path / "nowhere")


def test_held_out_rows_are_the_same_in_every_form(sources):
    ids = {}
    for kind, source in sources.items():
        kept, held = split_held_out(source, 0.1)
        ids[kind] = [{part.pair_id(i) for i in range(len(part))} for part in (kept, held)]
        assert content(held[0])[0] == held.pair_id(0)
        assert sum(len(rows) for rows in held.subsets.values()) == len(held)
        assert ids[kind] == ids["parquet"]
    kept, held = ids["parquet"]
    assert len(kept) + len(held) == len(sources["parquet"])
    assert not kept & held
    # Of different rows (copies stay together), 4 standard deviations of the 0.1 asked for.
    kept, held = split_held_out(sources["parquet"], 0.1)
    different, held_different = (
        len({part.digest(i) for i in range(len(part))}) for part in (sources["parquet"], held)
    )
    assert abs(held_different / different - 0.1) < 4 * np.sqrt(0.09 / different)


def test_held_out_copies_stay_together(tmp_path):
    rows = [row(qry=f"q{n % 50}") for n in range(200)]
    source = open_source(write_rows(tmp_path / "Mine.json", rows))
    kept, held = split_held_out(source, 0.3)
    texts = [{part[i].query.text for i in range(len(part))} for part in (kept, held)]
    assert not texts[0] & texts[1]
    assert len(held) > 0
    with pytest.raises(ValueError, match="share is 1"):
        split_held_out(source, 1)


HOSTILE_ROWS = {
    "missing qry": ({"qry_image_path": "", "pos_text": "t", "pos_image_path": ""}, r"missing.*qry"),
    "null target": (row(pos_text=None), r"missing fields \['pos_text'\]"),
    "empty object": ({}, "missing fields"),
    "a list": (["q", "", "t", ""], "expected an object, found list"),
    "null": (None, "expected an object, found NoneType"),
    "number as text": (row(qry=3), "qry is int; expected a string"),
    "list of paths": (row(qry_image_path=["a.png"]), "qry_image_path is list"),
    "half a surrogate": (row(qry="\ud83d"), "not Unicode"),
    "empty query": (row(qry=""), "query has neither text nor an image"),
    "blank target": (row(pos_text=" \n\t"), "target has neither text nor an image"),
    "both sides empty": (row(qry="", pos_text=""), "neither text nor an image"),
    "absolute path": (row(qry_image_path="/etc/passwd"), "leaves the image root"),
    "climbing path": (row(qry_image_path="../secret.png"), "leaves the image root"),
    "climbing path inside": (row(pos_image_path="a/../../secret.png"), "leaves the image root"),
    "climbing negative": (row(neg_image_path="../secret.png"), "leaves the image root"),
    "path of nothing but a dot": (row(qry_image_path="."), "leaves the image root"),
    "null byte in path": (row(qry_image_path="a\0.png"), "leaves the image root"),
    "missing image": (row(qry_image_path="a/none.png"), "does not exist"),
    "a folder as image": (row(qry_image_path="folder"), "not a regular file"),
    "endless path": (row(qry_image_path="x" * 5000), "cannot be read|too long"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> MmebSource:
    root = tmp_path_factory.mktemp("hostile")
    (root / "folder").mkdir()
    (root.parent / "secret.png").write_bytes(b"not for you")
    return open_source(
        write_rows(root / "Bad.json", [record for record, _ in HOSTILE_ROWS.values()])
    )


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_hostile_rows_are_refused_by_file_and_row(hostile, name):
    index = list(HOSTILE_ROWS).index(name)
    with pytest.raises((RowError, ImageError), match=HOSTILE_ROWS[name][1]) as caught:
        hostile[index]
    assert f"Bad.json row {index}" in str(caught.value)
    assert hostile.pair_id(index) == f"Bad:{index}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def parquet_of(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def test_hostile_files_are_named(tmp_path):
    def refused(name: str, text: str | bytes, reason: str):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=reason) as caught:
            open_source(path if path.suffix != ".parquet" else tmp_path)
        assert name in str(caught.value)
        path.unlink()

    refused("a.json", '[{"qry": ', "not JSON")
    refused("b.json", '{"qry": "q"}', "expected a list")
    refused("d.jsonl", '{"qry": "q"}\n{"qry"', "d.jsonl line 2: not JSON")
    refused("e.json", b"[\xff\xfe]", "not UTF-8")
    refused("S/original-00000-of-00001.parquet", b"PAR1 no", "not a readable parquet file")
    pa_path = tmp_path / "T/original-00000-of-00001.parquet"
    parquet_of(pa_path, [{"query": "q", "qry_image_path": ""}])
    with pytest.raises(ValueError, match=r"lacks columns \['qry', 'pos_text', 'pos_image_path'\]"):
        open_source(tmp_path)
    write_rows(tmp_path / "V.json", [])
    with pytest.raises(ValueError, match=r"subsets \['V'\] have no rows"):
        open_source(tmp_path / "V.json")


def test_parquet_nulls_and_columns_of_other_types(tmp_path):
    nulls = [row(qry=None), row(neg_text=None), row(qry=None, qry_image_path="a.png")]
    parquet_of(tmp_path / "N/original-0.parquet", nulls)
    (tmp_path / "a.png").write_bytes(b"picture")
    source = open_source(tmp_path)
    assert source.left_out == {"N": (0,)}
    assert source[0].negatives == ()
    assert (source[1].query.text, source[1].query.images) == ("", (b"picture",))
    parquet_of(tmp_path / "M/original-0.parquet", [row(pos_text={"a": "b"})])
    with pytest.raises(ValueError, match=r"M/original-0.parquet.*text columns"):
        open_source(tmp_path)


# As on the hub: strings, now and then a null, and sides of neither text nor image.
EMPTY_SIDES = {
    1: {"qry": ""},
    4: {"pos_text": None},
    5: {"qry": " \n\u3000\u2003", "neg_text": "n"},
}


def test_the_hubs_rows_with_an_empty_side_are_left_out(tmp_path):
    rows = [row(qry=f"q{n}") | EMPTY_SIDES.get(n, {}) for n in range(9)]
    rows[6] |= {"qry": "\u3000 \u72d7"}  # blank but for a Chinese character
    rows[7] |= {"qry": "", "qry_image_path": "a.png", "neg_text": "", "neg_image_path": ""}
    (tmp_path / "a.png").write_bytes(b"picture")
    parquet_of(tmp_path / "S/original-0.parquet", rows[:5])
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows[5:]), tmp_path / "S/original-1.parquet")
    source = open_source(tmp_path)
    kept = [0, 2, 3, 6, 7, 8]
    assert source.left_out == {"S": (1, 4, 5)}
    assert source.subsets == {"S": range(6)}
    assert [source.pair_id(i) for i in range(6)] == [f"S:{n}" for n in kept]
    assert [source[i].query.text for i in range(6)] == [rows[n]["qry"] for n in kept]
    assert "S/original-* row 6, query" in source[3].query.name
    assert open_source(tmp_path, max_rows=4).left_out == {"S": (1,)}
    assert len(open_source(tmp_path, max_rows=4)) == 3
    assert split_held_out(source, 0.5)[0].left_out == source.left_out
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows[4:5]), tmp_path / "S/original-0.parquet")
    with pytest.raises(ValueError, match=r"\['S'\] have no rows but 1 of which a side has neither"):
        open_source(tmp_path, max_rows=1)


def test_bytes_that_are_no_text_stop_only_at_their_row(tmp_path):
    (tmp_path / "S").mkdir()
    table = pa.Table.from_pylist([row(), row(qry="bad"), row(qry="")])
    bad = pa.array([b"q", b"\xff\xfe", b""]).view(pa.string())
    pyarrow.parquet.write_table(table.set_column(0, "qry", bad), tmp_path / "S/original-0.parquet")
    source = open_source(tmp_path)
    assert source.left_out == {"S": (2,)}
    with pytest.raises(ValueError, match="codec can't decode"):
        source[1]
    assert len(set(source.contents().tolist())) == 2
    assert source.queries()[1].tolist() == [1, 1]


class TestArchives:
    PATHS = ("images/S/a.png", "S/a.png", "a.png")

    @staticmethod
    def zip_of(path: Path, members: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path

    @pytest.mark.parametrize("inside", PATHS)
    @pytest.mark.parametrize("folder", ["", "images_zip", "images"])
    def test_archives_may_be_packed_at_any_level(self, tmp_path, inside, folder):
        self.zip_of(tmp_path / folder / "S.zip", {inside: b"the picture"})
        self.zip_of(tmp_path / folder / "T.zip", {"a.png": b"another", "S.png": b"x"})
        assert ImageStore(tmp_path).read("images/S/a.png") == b"the picture"

    def test_a_name_in_another_archive_is_not_taken(self, tmp_path):
        self.zip_of(tmp_path / "T.zip", {"a.png": b"another"})
        with pytest.raises(ImageError, match="nor in its 1 zip archive"):
            ImageStore(tmp_path).read("images/S/a.png", "row 1")

    def test_files_come_before_archives(self, tmp_path):
        self.zip_of(tmp_path / "S.zip", {"a.png": b"packed"})
        (tmp_path / "S").mkdir()
        (tmp_path / "S/a.png").write_bytes(b"unpacked")
        assert ImageStore(tmp_path).read("S/a.png") == b"unpacked"

    def test_damage_is_found(self, tmp_path):
        noise = np.random.default_rng(0).bytes(5000)
        path = self.zip_of(tmp_path / "S.zip", {"a.png": noise * 2, "empty.png": b""})
        data = bytearray(path.read_bytes())
        data[200:1200] = bytes(1000)
        path.write_bytes(bytes(data))
        store = ImageStore(tmp_path)
        with pytest.raises(ImageError, match=r"a.png.*(corrupt|truncated)"):
            store.read("S/a.png")
        with pytest.raises(ImageError, match="empty"):
            store.read("S/empty.png")
        path.write_bytes(bytes(data[:3000]))
        with pytest.raises(ValueError, match=r"S.zip: not a readable zip archive"):
            ImageStore(tmp_path)

    def test_a_changed_stored_member_is_found(self, tmp_path):
        path = self.zip_of(tmp_path / "S.zip", {"a.png": b"x" * 5000}, zipfile.ZIP_STORED)
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(ImageError, match="checksum"):
            ImageStore(tmp_path).read("S/a.png")

    def test_archive_replaced_by_a_shorter_one(self, tmp_path):
        path = self.zip_of(tmp_path / "S.zip", {"a.png": b"x" * 50_000}, zipfile.ZIP_STORED)
        store = ImageStore(tmp_path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ImageError, match="truncated in the archive"):
            store.read("S/a.png")

    def test_unusual_compression_is_refused_when_opened(self, tmp_path):
        self.zip_of(tmp_path / "S.zip", {"a.png": b"x" * 500}, zipfile.ZIP_LZMA)
        with pytest.raises(ValueError, match=r"a.png is encrypted or compressed in an unusual way"):
            ImageStore(tmp_path)

    @pytest.mark.parametrize("prefix", ["", "images/", "some/where/"])
    def test_the_root_may_be_an_archive(self, tmp_path, prefix):
        members = {f"{prefix}S/a.png": b"a", f"{prefix}S/b.png": b"b", "other/S/c.png": b"c"}
        store = ImageStore(self.zip_of(tmp_path / "all.zip", members))
        with pytest.raises(
            ImageError, match=r"row 1 \(S/x.png\): .*not exist in the archive .*all.zip"
        ):
            store.find("S/x.png", "row 1")
        assert store.find("S/a.png") == store.read("S/a.png") == b"a"
        assert pickle.loads(pickle.dumps(store)).read("S/b.png") == b"b"
        with pytest.raises(ImageError, match="does not exist in the archive"):
            store.read("S/c.png")

    def test_a_file_is_found_without_reading_it(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"a")
        self.zip_of(tmp_path / "S.zip", {"b.png": b"b"})
        store = ImageStore(tmp_path)
        assert store.find("a.png") == str(tmp_path / "a.png")
        assert store.find("S/b.png") == b"b"
        with pytest.raises(FileNotFoundError, match="neither a folder nor a zip archive"):
            ImageStore(tmp_path / "none")

    def test_forged_size_does_not_inflate(self, tmp_path):
        path = self.zip_of(tmp_path / "S.zip", {"a.png": bytes(10_000_000)})
        data = path.read_bytes().replace((10_000_000).to_bytes(4, "little"), b"\x10\0\0\0")
        path.write_bytes(data)
        with pytest.raises(ImageError, match="truncated in the archive: 17 of 16"):
            ImageStore(tmp_path).read("S/a.png")


def test_a_user_folder_of_json_and_images(tmp_path, tree):
    """The README's case: one JSON file beside its pictures."""
    root, _ = tree
    shutil.copytree(root / "images/MSCOCO_i2t/Train", tmp_path / "pictures")
    records = [row(qry="", qry_image_path="pictures/0.jpg", pos_text="a cat")]
    source = open_source(write_rows(tmp_path / "pairs.json", records))
    pair = source[0]
    assert pair.id == "pairs:0"
    assert pair.query.images == ((tmp_path / "pictures/0.jpg").read_bytes(),)
    assert str(tmp_path / "pairs.json") in pair.query.name


def test_a_marker_without_an_image_holds_the_zero_picture_on_every_side(tmp_path):
    marker = "<|image_1|>\nRepresent it."
    rows = [row(qry=marker, pos_text=marker, neg_text=marker, neg_image_path="")]
    rows += [row(neg_text="plain"), row(qry="<image> <image>")]
    pair, plain, two = list(
        map(open_source(write_rows(tmp_path / "Mine.json", rows)).__getitem__, range(3))
    )
    assert [item.images for item in (pair.query, pair.target, *pair.negatives)] == [(None,)] * 3
    assert [item.images for item in (plain.query, plain.target, *plain.negatives)] == [()] * 3
    assert two.query.images == ()
