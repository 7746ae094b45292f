"""A small MMEB-eval tree in the real layout, for tests: 36 datasets, parquet, images."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pyarrow as pa
import pyarrow.parquet as pq

from llave_jax.evaluation import run
from llave_jax.evaluation.benchmarks.base import Options
from llave_jax.evaluation.benchmarks.mmeb import MMEB_DATASETS, Mmeb

# Datasets whose rows have no image at all, images on one side, or images on both.
TEXT_ONLY = ("Wiki-SS-NQ",)
IMAGE_TARGETS = ("VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA", "EDIS")
# Datasets whose queries have a marker and no image.
MARKER_ALONE = ("WebQA", "EDIS")
IMAGE_BOTH = ("CIRR", "NIGHTS", "FashionIQ", "MSCOCO", "RefCOCO", "RefCOCO-Matching")


def _picture(rng: np.random.Generator) -> PIL.Image.Image:
    colour = tuple(int(value) for value in rng.integers(0, 255, 3))
    picture = PIL.Image.new("RGB", tuple(int(side) for side in rng.integers(40, 90, 2)), colour)
    box = [int(value) for value in rng.integers(0, 30, 2)]
    PIL.ImageDraw.Draw(picture).ellipse([*box, box[0] + 30, box[1] + 25], fill="white")
    return picture


def _rows(name: str, rng: np.random.Generator, count: int, pool: int) -> list[dict]:
    query_image = name not in (*TEXT_ONLY, *IMAGE_TARGETS)
    target_image = name in (*IMAGE_TARGETS, *IMAGE_BOTH)
    rows = []
    for number in range(count):
        # Uneven lengths; drawn with repetition, so that lists hold duplicates.
        targets = rng.integers(0, pool, rng.integers(2, 9)).tolist()
        texts = [
            "<|image_1|>\nRepresent the given image." if target_image else f"{name} {t}"
            for t in targets
        ]
        rows.append(
            {
                "qry_text": ("<|image_1|>\n" if query_image or name in MARKER_ALONE else "")
                + f"question {number} of {name}",
                "qry_img_path": f"{name}/{number % pool}.jpg" if query_image else "",
                "tgt_text": texts,
                "tgt_img_path": [f"{name}/{t}.jpg" if target_image else "" for t in targets],
            }
        )
    return rows


def make_tree(root: Path, rows_a_dataset: int = 4, *, zipped: bool = False, seed: int = 0) -> dict:
    """Write the tree; returns the rows by dataset. Every third dataset has two parquet files."""
    rng = np.random.default_rng(seed)
    folder = root / "images"
    rows = {}
    for number, info in enumerate(MMEB_DATASETS):
        rows[info.name] = _rows(info.name, rng, rows_a_dataset + number % 3, pool=6)
        (root / info.name).mkdir(parents=True)
        parts = np.array_split(np.arange(len(rows[info.name])), 2 if number % 3 == 0 else 1)
        for part, indices in enumerate(parts):
            table = pa.Table.from_pylist([rows[info.name][i] for i in indices])
            pq.write_table(table, root / info.name / f"test-{part:05}-of-{len(parts):05}.parquet")
        (folder / info.name).mkdir(parents=True)
        for picture in range(6):
            _picture(rng).save(folder / info.name / f"{picture}.jpg")
    if zipped:
        with zipfile.ZipFile(root / "images.zip", "w") as archive:
            for path in sorted(folder.rglob("*.jpg")):
                archive.write(path, path.relative_to(root).as_posix())
                path.unlink()
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir()
        folder.rmdir()
    return rows


def score_mmeb(encode, data, tasks=None, output=None, *, images=None, infos=None, **options):
    """Results of data sets in MMEB's form."""
    benchmark = Mmeb(data, Options(images=images), infos=infos)
    return run.evaluate(encode, benchmark, tasks, output, **options)


def predictions(data, result):
    """Position of the chosen candidate in each row's list."""
    task = Mmeb(data).read(result.info.name)
    chosen = result.answers.ranking[:, 0]
    return [int(np.argmax(p == c)) for p, c in zip(task.pools, chosen, strict=True)]
