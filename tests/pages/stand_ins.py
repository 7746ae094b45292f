"""What the names on the pages lead to in tests: tiny models, a few rows, generated pictures and clips."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import sklearn.datasets

from llave_jax.weights.from_hf import convert_from_hf
from tests.data import mmeb_tree
from tests.evaluation import mmeb_eval_tree
from tests.evaluation.mmeb_v2.miniature import Miniature
from tests.pages.blocks import ROOT, Block
from tests.weights.convert_checkpoints import write_hf

# Of the repository, as it is.
OF_THE_TREE = ("llave_jax", "tools", "configs", "benchmarks", "launch", "pyproject.toml")
CHECKPOINTS = (
    *("LLaVE-0.5B", "LLaVE-2B", "LLaVE-7B", "Aquila-VL-2B-llava-qwen"),
    *("llava-onevision-qwen2-0.5b-ov", "llava-onevision-qwen2-7b-ov"),
)
MODELS = (
    *("llave-0.5b", "aquila-vl-2b"),
    *("llava-onevision-0.5b", "llava-onevision-7b"),
)
PAIRS = 40
# Of MMEB-eval: those that pages name, and one without pictures.
DATASETS = ("SUN397", "DocVQA", "VOC2007", "MSCOCO", "MSCOCO_t2i", "Wiki-SS-NQ")
CLIP_SIDE = 64


def make_folder(folder: Path, blocks: list[Block]) -> None:
    """Fills a page's working folder.

    Args:
      folder: a new one.
      blocks: the page's. A model, a file or a folder is made if it is named there, and a model that the page
        itself converts is left to it.
    """
    folder.mkdir()
    for name in OF_THE_TREE:
        (folder / name).symlink_to(ROOT / name)
    commands = "\n".join(block.text for block in blocks if block.mark is None)
    for name, make in _makers().items():
        made = any(f"{flag} {name}" in commands for flag in ("--output", "--workdir"))
        if name in commands and not made:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            make(folder / name)
    if re.search(r"data/pairs(?![\w./])", commands):
        _pairs(folder / "data/pairs", [])
    if "data/pairs.json" in commands:
        _pairs(folder / "data", [row for b in blocks if b.language == "json" for row in _rows(b)])


def _makers() -> dict[str, Callable[[Path], object]]:
    makers: dict[str, Callable[[Path], object]] = {}
    makers |= dict.fromkeys(("hub/LLaVE-$size",), _all_sizes)
    makers |= dict.fromkeys((f"hub/{name}" for name in CHECKPOINTS), _checkpoint)
    makers |= dict.fromkeys((f"models/{name}" for name in MODELS), _model)
    makers |= dict.fromkeys((f"runs/seed-{seed}" for seed in range(3)), _model)
    makers |= dict.fromkeys(("photo.jpg", "a.jpg", "b.jpg", "example.jpg"), _picture)
    return makers | {
        "clip.mp4": _clip,
        "items.jsonl": _items,
        "captions.txt": lambda path: path.write_text("a cat\n\na dog\n"),
        "photos/": _photos,
        "runs/quickstart": _quickstart,
        "data/MMEB-train": lambda path: mmeb_tree.make_tree(path, 6),
        "data/MMEB-eval": _mmeb_eval,
        "data/MMEB-V2": lambda path: Miniature(path).write(),
        "data/MSRVTT": _msrvtt,
        "data/MSVD": _msvd,
    }


def _checkpoint(path: Path) -> None:
    if not path.exists():
        write_hf(path)


def _all_sizes(path: Path) -> None:
    for size in ("0.5B", "2B", "7B"):
        _checkpoint(path.with_name(f"LLaVE-{size}"))


def _model(path: Path) -> None:
    convert_from_hf(ROOT / "tests/golden/checkpoint", path, show_progress=False)


def _picture(path: Path) -> None:
    shutil.copyfile(ROOT / "tests/golden/images/exif_rotated.jpg", path)


def _rows(block: Block) -> list[dict]:
    rows = json.loads(block.text)
    assert all(row.keys() <= {*_row(0, ""), "neg_text", "neg_image_path"} for row in rows), block
    return rows


def _row(number: int, target: str) -> dict[str, str]:
    return {
        "qry": "<|image_1|>\nFind an image caption describing the given everyday image.",
        "qry_image_path": f"images/{number:04}.jpg",
        "pos_text": target,
        "pos_image_path": "",
    }


def _pairs(folder: Path, first: list[dict]) -> None:
    """Scans of digits with their names; in front the rows that the page shows."""
    digits = sklearn.datasets.load_digits()
    (folder / "images").mkdir(parents=True)
    rows = list(first)
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        if number == PAIRS:
            break
        scan = PIL.Image.fromarray((pixels * 15).astype(np.uint8))
        scan.resize((90, 120)).save(folder / f"images/{number:04}.jpg")
        rows.append(_row(number, f"The digit {digit}, scan {number}."))
    (folder / "pairs.json").write_text(json.dumps(rows))


def _items(path: Path) -> None:
    _picture(path.with_name("first.jpg"))
    items = [{"id": "a", "text": "a cat"}, {"image": "first.jpg"}, {"text": "a dog"}]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def _photos(path: Path) -> None:
    path.mkdir()
    for number in range(3):
        _picture(path / f"{number}.jpg")


def _quickstart(path: Path) -> None:
    """A model, with pictures where its run has those of the benchmark."""
    _model(path)
    pictures = path / "digits/eval/images/Digits-Classification"
    pictures.parent.mkdir(parents=True)
    _photos(pictures)


def _clip(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(5))
        stream.width, stream.height, stream.pix_fmt = CLIP_SIDE, CLIP_SIDE, "yuv420p"
        for number in range(4):
            pixels = np.full((CLIP_SIDE, CLIP_SIDE, 3), 60 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _mmeb_eval(path: Path) -> None:
    for name in mmeb_eval_tree.make_tree(path, 3):
        if name not in DATASETS:
            shutil.rmtree(path / name)


def _msrvtt(path: Path) -> None:
    path.mkdir()
    lines = [f'r{n},m{n},video{n},"caption {n}"\n' for n in range(3)]
    header = "key,vid_key,video_id,sentence\n"
    (path / "MSRVTT_JSFUSION_test.csv").write_text(header + "".join(lines))
    for number in range(3):
        _clip(path / f"video{number}.mp4")


def _msvd(path: Path) -> None:
    path.mkdir()
    (path / "test_list.txt").write_text("b_1_9\na_0_5\n")
    captions = {"a_0_5": [["a", "man"], ["someone"]], "b_1_9": [["a", "bird"]]}
    (path / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    for name in captions:
        _clip(path / f"{name}.avi")


def hub_files(folder: Path) -> Path:
    """The checkpoint that a hub serves under every name: its configuration is whole in itself.

    Args:
      folder: a new one.
    """
    return write_hf(folder / "checkpoint", "hub")
