"""A small MMEB-train tree in the real layout, for tests: parquet rows, images in folders and zips."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet

# subset -> (query, query has image, target, target has image); {n} is the row's number.
TEMPLATES = {
    "ImageNet_1K": ("<|image_1|>\nRepresent the given image for classification", 1, "{label}", 0),
    "HatefulMemes": ("<|image_1|>\nRepresent the given image, is it hateful?", 1, "{answer}", 0),
    "CIRR": ("<|image_1|>\nGiven an image, find: more {label} in {n}", 1, "<|image_1|>\nimage.", 1),
    "NIGHTS": ("<|image_1|>\n", 1, "<|image_1|>\nRepresent the given image.", 1),
    "VisDial": ("Represent the dialogue {n} about a {label}", 0, "<|image_1|>\nthe image.", 1),
    "MSCOCO_i2t": ("<|image_1|>\nFind an image caption", 1, "a {label} beside the {n}th tree", 0),
    # Its queries have a marker and no image.
    "WebQA": (
        "<|image_1|>\nFind a Wikipedia image that answers this question: What is at house {n}?",
        0,
        "<|image_1|>\nRepresent the given Wikipedia image with related text: {label} {n}",
        1,
    ),
}
WITH_NEGATIVES = ("CIRR", "WebQA")
LABELS = ("tench", "goldfish", "great white shark", "hen", "jay", "newt")
IMAGES_A_SUBSET = 24


def encode(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(
    rng: np.random.Generator, width: int, height: int, mode: str = "RGB"
) -> PIL.Image.Image:
    """Smooth colours with some noise: compresses like a photograph."""
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), PIL.Image.Resampling.BICUBIC).convert(mode)


def image_files(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    files = []
    for number in range(IMAGES_A_SUBSET):
        width, height = rng.integers(20, 220, 2)
        mode = ("RGB", "RGB", "L", "P", "RGBA")[number % 5]
        image = picture(rng, int(width), int(height), mode)
        if mode in ("RGB", "L"):
            files.append((f"{number}.jpg", encode(image, "JPEG")))
        else:
            files.append((f"{number}.png", encode(image, "PNG")))
    return files


def make_rows(subset: str, count: int, names: list[str]) -> list[dict[str, str]]:
    query, query_image, target, target_image = TEMPLATES[subset]

    def path(number: int) -> str:
        return f"images/{subset}/Train/{names[number % len(names)]}"

    rows = []
    for n in range(count):
        words = {"n": n, "label": LABELS[n % len(LABELS)], "answer": ("Yes", "No")[n % 2]}
        row = {
            "qry": query.format(**words),
            "qry_image_path": path(n) if query_image else "",
            "pos_text": target.format(**words),
            "pos_image_path": path(7 * n + 3) if target_image else "",
        }
        if subset in WITH_NEGATIVES:
            row["neg_text"] = target.format(n=n + 1, label="pike", answer="Perhaps")
            row["neg_image_path"] = path(5 * n + 2) if target_image else ""
            if n % 4 == 0:
                row["neg_text"] = row["neg_image_path"] = ""
        rows.append(row)
    return rows


def make_tree(
    root: Path,
    rows_a_subset: int,
    split: str = "original",
    zipped: Collection[str] = ("ImageNet_1K", "CIRR", "NIGHTS"),
) -> dict[str, list[dict]]:
    """Writes the tree below `root`, the same whichever subsets' images are `zipped`; returns the rows."""
    rng = np.random.default_rng(0)
    (root / "images_zip").mkdir(parents=True)
    rows = {}
    for subset in TEMPLATES:
        files = image_files(rng)
        rows[subset] = make_rows(subset, rows_a_subset, [name for name, _ in files])
        if subset in zipped:
            with zipfile.ZipFile(root / f"images_zip/{subset}.zip", "w") as archive:
                for number, (name, data) in enumerate(files):
                    method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
                    archive.writestr(f"{subset}/Train/{name}", data, method)
        else:
            folder = root / "images" / subset / "Train"
            folder.mkdir(parents=True)
            for name, data in files:
                (folder / name).write_bytes(data)
        (root / subset).mkdir()
        half = -(-rows_a_subset // 2)
        for part in range(2):
            pyarrow.parquet.write_table(
                pa.Table.from_pylist(rows[subset][part * half : (part + 1) * half]),
                root / subset / f"{split}-0000{part}-of-00002.parquet",
            )
    return rows


def write_json(root: Path, rows: dict[str, list[dict]]) -> None:
    """The same rows as JSON lists and JSON lines."""
    root.mkdir(parents=True, exist_ok=True)
    for number, (subset, records) in enumerate(rows.items()):
        if number % 2:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (root / f"{subset}.jsonl").write_text(lines)
        else:
            (root / f"{subset}.json").write_text(json.dumps(records))
