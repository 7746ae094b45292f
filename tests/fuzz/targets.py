"""What is fuzzed: for each target, how a good input is made, broken, and read."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet

from llave_jax.common.json_text import parse_json
from llave_jax.data.image_store import ImageStore
from llave_jax.data.rows import RowError
from llave_jax.data.sources import open_source
from llave_jax.embedding import check_vectors
from llave_jax.embedding.item_sources import open_items
from llave_jax.embedding.item_tables import Columns
from llave_jax.evaluation.benchmarks import mmeb
from llave_jax.evaluation.benchmarks.corpus import read_task
from llave_jax.inputs import anyres, video_decode
from llave_jax.inputs.config import InputConfig
from llave_jax.inputs.images import ImageError, load_image
from llave_jax.models.config import PRESETS, LlaveConfig
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.hf_names import LAYOUTS
from llave_jax.weights.resolve import is_checkpoint
from llave_jax.weights.to_hf import CHECK_VECTORS, convert_to_hf
from tests.fuzz import http_requests
from tests.fuzz.mutations import (
    TEXTS,
    mutate_bytes,
    mutate_json,
    mutate_json_text,
    value_of_any_kind,
)
from tests.weights.convert_checkpoints import write_hf

Rng = random.Random


class Target(NamedTuple):
    """A kind of input.

    Attributes:
      make: writes good inputs below a folder, once.
      run: breaks one of them at random and reads it: (folder of good inputs, folder of the case, rng). What it
        reads lies in `in` of the case's folder, what it writes in `out`.
    """

    make: Callable[[Path], Any]
    run: Callable[[Path, Path, Rng], Any]


def _copy(source: Path, target: Path) -> None:
    """Hard links: a file that is to be changed is replaced, not written to."""
    shutil.copytree(source, target, copy_function=os.link)


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(change(data))


def _mutate_safetensors(data: bytes, rng: Rng) -> bytes:
    size = int.from_bytes(data[:8], "little")
    match rng.randrange(4):
        case 0:
            return mutate_bytes(data, rng)
        case 1:
            values = np.frombuffer(data[8 + size :], np.float32).copy()
            values[rng.randrange(len(values))] = rng.choice((np.nan, np.inf, 1e38, 0))
            return data[: 8 + size] + values.tobytes()
    header = mutate_json_text(data[8 : 8 + size], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, 10**9, len(header) + 1))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def _mutate_tree(folder: Path, rng: Rng) -> None:
    """Breaks one file of a folder: its content, or the file itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Most of the time a file that decides much.
    important = [p for p in files if p.name in _IMPORTANT or p.suffix == ".safetensors"]
    path = rng.choice(important if rng.random() < 0.85 else files)
    match rng.randrange(20):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.symlink_to(
                rng.choice(("/etc/passwd", "../..", "config.json", path.name, "nowhere"))
            )
        case 2:
            path.unlink()
            rng.choice((os.mkfifo, os.mkdir))(path)
        case 3:
            (folder / rng.choice(("link", "README.md.link"))).symlink_to("/etc")
        case _:
            if path.suffix == ".safetensors":
                _rewrite(path, lambda data: _mutate_safetensors(data, rng))
            elif path.suffix == ".json":
                _rewrite(path, lambda data: mutate_json_text(data, rng))
            else:
                _rewrite(path, lambda data: mutate_bytes(data, rng))


_IMPORTANT = (
    "config.json",
    "layout.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)


def _make_checkpoints(base: Path) -> None:
    write_hf(base / "llave" / "hf", "llave")
    write_hf(base / "onevision" / "hf", "hub")
    write_hf(base / "shards" / "hf", "llave", shards=3)


def _checkpoint(base: Path, case: Path, rng: Rng) -> None:
    _copy(base / rng.choice(("llave", "onevision", "shards")), case / "in")
    _mutate_tree(case / "in" / "hf", rng)
    is_checkpoint(case / "in" / "hf")
    convert_from_hf(case / "in" / "hf", case / "out" / "model", show_progress=False)


def _make_models(base: Path) -> None:
    _make_checkpoints(base / "hf")
    for name in ("llave", "onevision"):
        convert_from_hf(base / "hf" / name / "hf", base / name, show_progress=False)
        (base / name / "prompts.json").write_text(json.dumps({"query": "Find: ", "document": ""}))


def _model_dir(base: Path, case: Path, rng: Rng) -> None:
    _copy(base / rng.choice(("llave", "onevision")), case / "in")
    _mutate_tree(case / "in", rng)
    if rng.random() < 0.15:
        path = case / "in" / "source" / "layout.json"
        values = json.loads((base / "llave" / "source" / "layout.json").read_text())
        values["weights"][0]["file"] = rng.choice(TEXTS)
        if path.is_file():
            _rewrite(path, lambda _: json.dumps(values).encode())
    model_dir.load_config(case / "in")
    model_dir.open_params(case / "in")
    model_dir.load_prompts(case / "in")
    if rng.random() < 0.3:
        model_dir.load_tokenizer(case / "in")
    convert_to_hf(case / "in", case / "out" / "hf", rng.choice(list(LAYOUTS)), show_progress=False)


def _picture(seed: int, name: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 20, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, name)
    return file.getvalue()


TRAIN_ROWS = [
    {
        "qry": "<|image_1|>\nwhat is it" if n % 2 else "a text",
        "qry_image_path": f"images/{n}.png" if n % 2 else "",
        "pos_text": f"answer {n}",
        "pos_image_path": "",
        "neg_text": "another",
        "neg_image_path": "",
    }
    for n in range(5)
]
EVAL_ROWS = [
    {
        "qry_text": "<|image_1|>\nwhat is it",
        "qry_img_path": f"images/{n}.png",
        "tgt_text": ["a", "b", "c"],
        "tgt_img_path": ["", "", "images/1.png"],
    }
    for n in range(4)
]


def _make_rows(base: Path) -> None:
    (base / "images").mkdir(parents=True)
    for n in range(5):
        (base / "images" / f"{n}.png").write_bytes(_picture(n, "PNG"))
    for name, rows in (("train", TRAIN_ROWS), ("test", EVAL_ROWS)):
        (base / name / "Set").mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(
            table, base / name / "Set" / f"{'original' if name == 'train' else name}-0.parquet"
        )


def _rows(base: Path, case: Path, rng: Rng) -> None:
    folder = case / "in"
    folder.mkdir()
    _copy(base / "images", folder / "images")
    kind = rng.choice(("train", "test"))
    if rng.random() < 0.2:
        _copy(base / kind / "Set", folder / "Set")
        _rewrite(next((folder / "Set").iterdir()), lambda data: mutate_bytes(data, rng))
    else:
        rows = TRAIN_ROWS if kind == "train" else EVAL_ROWS
        if kind == "train" and rng.random() < 0.5:
            lines = [json.dumps(row).encode() for row in rows]
            lines[rng.randrange(5)] = mutate_json_text(lines[0], rng)
            (folder / "Set.jsonl").write_bytes(b"\n".join(lines))
        else:
            (folder / "Set.json").write_bytes(mutate_json_text(json.dumps(rows).encode(), rng))
    if rng.random() < 0.1:
        path = folder / "images" / "1.png"
        path.unlink()
        path.symlink_to(rng.choice(("/etc/passwd", "1.png", "../Set.json")))
    if kind == "train":
        _read_pairs(folder)
    else:
        dataset = mmeb.read_rows(folder, "Set")
        images = mmeb.open_images(folder)
        for index in range(len(dataset.contents)):
            try:
                mmeb.make_item(dataset, index, images)
            except ImageError:
                continue


def _read_pairs(folder: Path) -> None:
    source = open_source(folder)
    source.contents(), source.queries()
    for index in range(len(source)):
        source.pair_id(index), source.digest(index)
        try:
            source[index]
        except (RowError, ImageError):
            continue


ITEMS = [
    {"id": 1, "text": "a text"},
    {"id": "b", "text": "<image>\nlook", "image": "0.png"},
    {"images": ["0.png", "1.png"]},
    {"text": "x", "image": None},
    {"video": "v.mp4", "text": "v"},
]
CORPUS = [
    {"_id": f"d{n}", "title": "t", "text": f"document {n}", "image": "0.png"} for n in range(4)
]


TABLE = {
    "id": ["a", "b", "c", "d"],
    "text": ["a text", "<image>\nlook", None, ""],
    "image": [None, {"bytes": b"x", "path": "0.png"}, {"bytes": None, "path": "0.png"}, None],
    "images": [["0.png"], [], None, ["0.png", None]],
    "year": [1, None, 3, 4],
}


def _table(base: Path, case: Path, rng: Rng) -> None:
    folder = case / "in"
    folder.mkdir()
    columns = dict(TABLE)
    for name in rng.sample(list(columns), rng.randrange(3)):
        columns[name] = rng.choice(
            (
                [b"\xff", None, b"", b"0.png"],
                [rng.choice(TEXTS).replace("\ud800", "") for _ in range(4)],
                [1, 2, None, 2**60],
                [None] * 4,
                [{"bytes": "x"}, {"bytes": ""}, None, {"bytes": None}],
                [[b"x"], [b""], [None], None],
            )
        )
    if rng.random() < 0.2:
        del columns[rng.choice(list(columns))]
    path = folder / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rng.randint(1, 4))
    if rng.random() < 0.6:
        _rewrite(path, lambda data: mutate_bytes(data, rng))
    chosen = Columns(
        text=rng.choice((None, "text", "image")), metadata=rng.choice(((), ("year", "images")))
    )
    for entry in open_items(rng.choice((path, folder)), columns=chosen):
        assert entry.weight > 0
        assert entry.num_bytes >= 0
        assert entry.item is not None or "t.parquet" in entry.error, entry


def _items(base: Path, case: Path, rng: Rng) -> None:
    folder = case / "in"
    folder.mkdir()
    (folder / "0.png").write_bytes(_picture(0, "PNG"))
    if rng.random() < 0.6:
        lines = [json.dumps(item).encode() for item in ITEMS]
        number = rng.randrange(len(lines))
        lines[number] = mutate_json_text(lines[number], rng)
        (folder / "items.jsonl").write_bytes(b"\n".join(lines))
        for line in open_items(folder / "items.jsonl"):
            json.dumps(line.id), line.weight
            assert line.item is not None or "items.jsonl" in line.error, line
        return
    lines = [json.dumps(row).encode() for row in CORPUS]
    number = rng.randrange(len(lines))
    lines[number] = mutate_json_text(lines[number], rng)
    if rng.random() < 0.2:
        (folder / "0.png").unlink()
        (folder / "0.png").symlink_to("/etc/passwd")
    (folder / "corpus.jsonl").write_bytes(b"\n".join(lines))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "query"}\n')
    qrels = b"query-id\tcorpus-id\tscore\nq\td1\t1\n"
    (folder / "qrels.tsv").write_bytes(qrels if rng.random() < 0.7 else mutate_bytes(qrels, rng))
    task = read_task(folder)
    assert all(str(path).startswith(str(folder)) for item in task.documents for path in item.images)


def _archive(base: Path, case: Path, rng: Rng) -> None:
    folder = case / "in"
    folder.mkdir()
    file = io.BytesIO()
    with zipfile.ZipFile(
        file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for n in range(4):
            archive.writestr(f"images/{n}.png", _picture(n, "PNG"))
        archive.writestr("images/white.bmp", bytes(200_000))
        archive.writestr(rng.choice(TEXTS).replace("\0", "0").replace("\ud800", "") or "e", b"x")
        if rng.random() < 0.3:
            archive.writestr(
                "images/bomb.png", bytes(rng.choice((1, 33, 40)) << 20), zipfile.ZIP_DEFLATED
            )
    (folder / "a.zip").write_bytes(mutate_bytes(file.getvalue(), rng))
    for root in (folder, folder / "a.zip"):
        store = ImageStore(root)
        for name in (
            *(f"images/{n}.png" for n in range(4)),
            "images/bomb.png",
            rng.choice(TEXTS) or "x",
        ):
            try:
                store.read(name, "row 1")
            except ImageError:
                continue


def _make_images(base: Path) -> None:
    base.mkdir()
    for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "AVIF"):
        if name in PIL.Image.SAVE or name in PIL.Image.OPEN:
            try:
                (base / name).write_bytes(_picture(1, name))
            except (KeyError, OSError):  # this build of Pillow cannot write it
                continue


def _image(base: Path, case: Path, rng: Rng) -> None:
    path = rng.choice(sorted(base.iterdir()))
    load_image(mutate_bytes(path.read_bytes(), rng), f"{path}")


def _make_videos(base: Path) -> None:
    import av

    base.mkdir()
    av_any: Any = av
    for name, codec in (
        ("a.mp4", "libx264"),
        ("b.avi", "mpeg4"),
        ("c.mkv", "mpeg4"),
        ("d.webm", "libvpx"),
        ("e.mpg", "mpeg2video"),
    ):
        with av_any.open(str(base / name), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(25))
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(12):
                pixels = np.full((48, 64, 3), number * 20, np.uint8)
                container.mux(stream.encode(av_any.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    (base / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n")
    (base / "list.ffconcat").write_text("ffconcat version 1.0\nfile a.mp4\n")


def _video(base: Path, case: Path, rng: Rng) -> None:
    path = rng.choice(sorted(base.iterdir()))
    (case / "in").mkdir()
    broken = case / "in" / rng.choice((path.name, "x.mp4"))
    broken.write_bytes(mutate_bytes(path.read_bytes(), rng))
    video_decode.decode_frames(broken, lambda count, fps: range(0, count, max(1, count // 8)))


def _json(base: Path, case: Path, rng: Rng) -> None:
    text = json.dumps({"a": [1, 2.5, "x", {"b": None}], "c": value_of_any_kind(rng)}).encode()
    parse_json(mutate_json_text(text, rng))


def _make_check_vectors(base: Path) -> None:
    items = check_vectors.check_items(28)
    vectors = np.eye(len(items), 8, dtype=np.float32)
    mistakes = (check_vectors.Mistake("no text", vectors[1]),)
    check_vectors.write(base, check_vectors.CheckVectors(items, vectors, mistakes))


def _check_vectors(base: Path, case: Path, rng: Rng) -> None:
    _copy(base, case / "in")
    path = case / "in" / CHECK_VECTORS
    if rng.random() < 0.5:
        _rewrite(path, lambda data: mutate_json_text(data, rng))
    else:
        values = mutate_json(json.loads(path.read_text()), rng)
        _rewrite(path, lambda _: json.dumps(values).encode())
    check = check_vectors.read(case / "in")
    rows = [check_vectors.compare(check, i, check.vectors[i]) for i in range(len(check.items))]
    check_vectors.explain(rows)
    for item in check.items:
        item.item()


def _config(base: Path, case: Path, rng: Rng) -> None:
    preset = rng.choice(list(PRESETS.values()))
    values = json.loads(json.dumps(preset.to_dict()))
    config = LlaveConfig.from_dict(mutate_json(values, rng))
    assert isinstance(config.inputs, InputConfig)
    anyres.image_taps(500, 375, config.inputs, config.vision.crop)


def _nothing(base: Path) -> None:
    return None


TARGETS: dict[str, Target] = {
    "checkpoint": Target(_make_checkpoints, _checkpoint),
    "model_dir": Target(_make_models, _model_dir),
    "rows": Target(_make_rows, _rows),
    "items": Target(_nothing, _items),
    "table": Target(_nothing, _table),
    "archive": Target(_nothing, _archive),
    "image": Target(_make_images, _image),
    "video": Target(_make_videos, _video),
    "json": Target(_nothing, _json),
    "check_vectors": Target(_make_check_vectors, _check_vectors),
    "config": Target(_nothing, _config),
    "http": Target(http_requests.make, http_requests.run),
}
