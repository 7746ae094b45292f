"""The bundled benchmark: a miniature MMEB of handwritten digits, built on first use.

Owns the rows and files. They have MMEB's format and layout, so training and evaluation read them as
they read MMEB. What the pictures show and what the texts say is `scenes.py`.

    DIRECTORY/digits.json                                   version, seed and sizes of what was built
    DIRECTORY/annotations.json                              what every picture shows, by its path
    DIRECTORY/train/<subset>.json                           rows as in MMEB-train
    DIRECTORY/train_images/<subset>/*.png
    DIRECTORY/eval/<subset>/test-00000-of-00001.parquet     rows as in MMEB-eval
    DIRECTORY/eval/images/<subset>/*.png
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet

from llave_jax.common.directories import make_directory
from llave_jax.common.files import replace_directory, scratch_directory
from llave_jax.digits import scenes
from llave_jax.evaluation.task import TaskInfo

# Raise the version with every change of the files' content: older directories are then rebuilt.
VERSION = 4

CLASSIFICATION = "Digits-Classification"
VQA = "Digits-VQA"
RETRIEVAL_I2T = "Digits-Retrieval_i2t"
RETRIEVAL_T2I = "Digits-Retrieval_t2i"
GROUNDING = "Digits-Grounding"

# Meta-task of each subset.
SUBSETS: dict[str, str] = {
    CLASSIFICATION: "classification",
    VQA: "vqa",
    RETRIEVAL_I2T: "retrieval",
    RETRIEVAL_T2I: "retrieval",
    GROUNDING: "grounding",
}
INFOS = tuple(TaskInfo(name, meta_task) for name, meta_task in SUBSETS.items())
# Folder of the pictures that several subsets share.
SCENES = "Digits-Scenes"

CLASSIFY = "<|image_1|>\nRepresent the given image for classification"
ANSWER = "<|image_1|>\nRepresent the given image with the following question: {}"
FIND_CAPTION = "<|image_1|>\nFind an image caption describing the given image."
FIND_IMAGE = "Find me an image that matches the given caption: {}"
IMAGE = "<|image_1|>\nRepresent the given image."
SELECT = '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "{}"'
CROP = "<|image_1|>\nRepresent the given cropped image of the object"
CLASS = "the digit {}"

# Candidates of a query. Classification has ten, the classes.
CANDIDATES = 20
# Scenes come in pairs of the same scans in different cells: each is the other's hard negative.
_FAMILY = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is built.

    Attributes:
      train: rows of each training subset; even, since scenes come in pairs.
      eval: queries of each eval subset; even, at least 40. Classification has at most one query for each
        held-out scan.

    Raises:
      ValueError: a number is too small or odd.
    """

    train: int = 6000
    eval: int = 400

    def __post_init__(self):
        for name, value, least in (("train", self.train, _FAMILY), ("eval", self.eval, 40)):
            if value < least or value % _FAMILY:
                raise ValueError(
                    f"sizes: {name} is {value}; expected a multiple of {_FAMILY}, at least {least}"
                )


def build(directory: str | os.PathLike, *, seed: int = 0, sizes: Sizes | None = None) -> Path:
    """Build the benchmark for this seed and these sizes, unless `directory` holds it already.

    Building takes seconds. The directory appears when it is whole. The same arguments give the same
    files, byte for byte.

    Args:
      directory: to make, or to replace if it holds another version, seed or sizes.
      seed: of the split into training and test scans, and of everything drawn.
      sizes: None: the default sizes.

    Returns:
      The directory.

    Raises:
      FileExistsError: the directory holds something else.
    """
    directory = Path(directory)
    sizes = sizes or Sizes()
    built = {"version": VERSION, "seed": seed, "sizes": dataclasses.asdict(sizes)}
    if _read_marker(directory) == built:
        return directory
    with scratch_directory(directory) as new:
        _write(new, seed, sizes)
        (new / "digits.json").write_text(json.dumps(built, indent=1) + "\n", encoding="utf-8")
        # Another process may have been faster.
        if _read_marker(directory) != built:
            replace_directory(directory, new)
    return directory


def chance(rows: Iterable[dict[str, Any]]) -> float:
    """Expected precision@1 of guessing among the candidates.

    Args:
      rows: of an eval subset; a row's candidates are as many as its `tgt_text`.

    Returns:
      The mean over the rows.
    """
    return float(np.mean([1 / len(row["tgt_text"]) for row in rows]))


def _read_marker(directory: Path) -> dict[str, Any] | None:
    """What a directory was built with; None if there is nothing yet."""
    marker = directory / "digits.json"
    if marker.is_file():
        try:
            built = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            built = None
        # A marker that is damaged is none of this version.
        return built if isinstance(built, dict) else {}
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} exists and was not built by the digits benchmark (it has no digits.json); "
            "name another directory, or remove this one"
        )
    return None


def _write(root: Path, seed: int, sizes: Sizes) -> None:
    """Write everything but digits.json into the empty directory `root`."""
    scans = scenes.load_scans()
    train, test = scenes.split_scans(scans.labels, seed)
    annotations: dict[str, Any] = {}

    images = _Images(root, "train_images", annotations)
    rows = _train_rows(scans, train, sizes.train, np.random.default_rng([seed, 1]), images)
    make_directory(root / "train")
    for subset, subset_rows in rows.items():
        text = json.dumps(subset_rows, indent=1)
        (root / "train" / f"{subset}.json").write_text(text + "\n", encoding="utf-8")

    images = _Images(root, "eval/images", annotations)
    rows = _eval_rows(scans, test, sizes.eval, np.random.default_rng([seed, 2]), images)
    for subset, subset_rows in rows.items():
        make_directory(root / "eval" / subset)
        table = pyarrow.Table.from_pylist(subset_rows, schema=_EVAL_SCHEMA)
        pyarrow.parquet.write_table(table, root / "eval" / subset / "test-00000-of-00001.parquet")

    text = json.dumps(annotations, indent=None, separators=(",", ":"))
    (root / "annotations.json").write_text(text + "\n", encoding="utf-8")


class _Images:
    """Writes pictures below one image root, and enters what they show into `annotations`."""

    def __init__(self, root: Path, image_root: str, annotations: dict[str, Any]):
        self._root = root / image_root
        self._image_root = image_root
        self._annotations = annotations
        for folder in (*SUBSETS, SCENES):
            if folder not in (VQA, RETRIEVAL_I2T, RETRIEVAL_T2I):
                make_directory(self._root / folder)

    def save(
        self,
        folder: str,
        name: str,
        pixels: np.ndarray,
        scans: Sequence[int] | np.ndarray,
        digits: Sequence[int] | np.ndarray,
    ) -> str:
        """Write a picture uint8 [height, width]. Returns its path as rows give it."""
        path = f"{folder}/{name}.png"
        # Level 1 is the fastest. There are ten thousand pictures of a few hundred bytes.
        PIL.Image.fromarray(pixels).save(self._root / path, compress_level=1)
        self._annotations[f"{self._image_root}/{path}"] = {
            "scans": [int(index) for index in scans],
            "digits": [int(digit) for digit in digits],
        }
        return path


class _Picture(NamedTuple):
    scene: scenes.Scene
    pixels: np.ndarray
    path: str
    twin: int  # index of the picture of the same scans in different cells


def _draw_pictures(
    scans: scenes.Scans, members: np.ndarray, count: int, rng: np.random.Generator, images: _Images
) -> list[_Picture]:
    """Draw and save `count` scenes, made of the scans `members`."""
    pools = [members[scans.labels[members] == digit] for digit in range(10)]
    pictures: list[_Picture] = []
    while len(pictures) < count:
        for scene in scenes.make_family(rng, pools, _FAMILY):
            index = len(pictures)
            pixels = scenes.draw_scene(scene, scans, rng)
            path = images.save(SCENES, f"{index:05d}", pixels, scene.scans, scene.digits)
            pictures.append(_Picture(scene, pixels, path, twin=index ^ 1))
    return pictures


def _save_crop(
    name: str, picture: _Picture, cell: int, rng: np.random.Generator, images: _Images
) -> str:
    pixels = scenes.crop_cell(picture.pixels, cell, rng)
    scene = picture.scene
    return images.save(GROUNDING, name, pixels, [scene.scans[cell]], [scene.digits[cell]])


# Training rows.


def _train_row(
    query: str, query_image: str, target: str, target_image: str, neg: str = "", neg_image: str = ""
) -> dict[str, str]:
    return {
        "qry": query,
        "qry_image_path": query_image,
        "pos_text": target,
        "pos_image_path": target_image,
        "neg_text": neg,
        "neg_image_path": neg_image,
    }


def _train_rows(
    scans: scenes.Scans, members: np.ndarray, count: int, rng: np.random.Generator, images: _Images
) -> dict[str, list[dict[str, str]]]:
    """`count` rows of each subset, made of the scans `members`. Retrieval rows have a negative: the twin."""
    rows: dict[str, list[dict[str, str]]] = {subset: [] for subset in SUBSETS}
    rounds = -(-count // len(members))
    order = np.concatenate([rng.permutation(members) for _ in range(rounds)])[:count]
    for number, index in enumerate(order):
        digit = scans.labels[index]
        pixels = scenes.draw_scan(scans.pixels[index], rng)
        path = images.save(CLASSIFICATION, f"{number:05d}", pixels, [int(index)], [int(digit)])
        rows[CLASSIFICATION].append(
            _train_row(CLASSIFY, path, CLASS.format(scenes.DIGITS[digit]), "")
        )

    pictures = _draw_pictures(scans, members, count, rng, images)
    for number, picture in enumerate(pictures):
        scene, path = picture.scene, picture.path
        twin = pictures[picture.twin]
        question, answer = scenes.ask(scene, rng)
        rows[VQA].append(_train_row(ANSWER.format(question), path, answer, ""))

        facts = scenes.choose_facts(scene, [twin.scene], rng)
        swapped = scenes.describe(twin.scene, [fact.cell for fact in facts])
        texts = scenes.caption(facts), scenes.caption(swapped)
        rows[RETRIEVAL_I2T].append(_train_row(FIND_CAPTION, path, texts[0], "", texts[1], ""))

        facts = scenes.choose_facts(scene, [twin.scene], rng)
        query = FIND_IMAGE.format(scenes.caption(facts))
        rows[RETRIEVAL_T2I].append(_train_row(query, "", IMAGE, path, IMAGE, twin.path))

        cell = int(rng.integers(4))
        label = rng.choice(scenes.labels(scene, cell))
        crop = _save_crop(f"{number:05d}", picture, cell, rng, images)
        rows[GROUNDING].append(_train_row(SELECT.format(label), path, CROP, crop))
    return rows


# Eval rows.

_EVAL_SCHEMA = pyarrow.schema(
    [
        ("qry_text", pyarrow.string()),
        ("qry_img_path", pyarrow.string()),
        ("tgt_text", pyarrow.list_(pyarrow.string())),
        ("tgt_img_path", pyarrow.list_(pyarrow.string())),
    ]
)


def _eval_row(query: str, query_image: str, targets: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """`targets` are (text, image path), the positive first; "" where there is no text or image."""
    texts, paths = zip(*targets, strict=True)
    return {
        "qry_text": query,
        "qry_img_path": query_image,
        "tgt_text": list(texts),
        "tgt_img_path": list(paths),
    }


def _candidates(
    positive: str,
    hard: Iterable[str],
    draw: Callable[[], str | None],
    rng: np.random.Generator,
) -> list[str]:
    """CANDIDATES different candidates: the positive, then hard negatives and drawn ones in random order.

    `draw` gives a wrong candidate, or None if the one it drew could be right.
    """
    found = dict.fromkeys([positive, *hard])
    while len(found) < CANDIDATES:
        candidate = draw()
        if candidate is not None:
            found.setdefault(candidate)
    rest = list(found)[1:CANDIDATES]
    return [positive, *(rest[index] for index in rng.permutation(len(rest)))]


def _eval_rows(
    scans: scenes.Scans, members: np.ndarray, count: int, rng: np.random.Generator, images: _Images
) -> dict[str, list[dict[str, Any]]]:
    """`count` queries of each subset, made of the scans `members`, with their candidates."""
    pictures = _draw_pictures(scans, members, count, rng, images)
    return {
        CLASSIFICATION: _classification(scans, rng.permutation(members)[:count], rng, images),
        VQA: [_vqa(picture.scene, picture.path, rng) for picture in pictures],
        RETRIEVAL_I2T: [_image_to_text(picture, pictures, rng) for picture in pictures],
        RETRIEVAL_T2I: [_text_to_image(picture, pictures, rng) for picture in pictures],
        GROUNDING: _grounding(pictures, rng, images),
    }


def _classification(
    scans: scenes.Scans, members: np.ndarray, rng: np.random.Generator, images: _Images
) -> list[dict[str, Any]]:
    rows = []
    for number, index in enumerate(members):
        digit = int(scans.labels[index])
        pixels = scenes.draw_scan(scans.pixels[index])
        path = images.save(CLASSIFICATION, f"{number:05d}", pixels, [int(index)], [int(digit)])
        others = [other for other in rng.permutation(10) if other != digit]
        texts = [CLASS.format(scenes.DIGITS[other]) for other in (digit, *others)]
        rows.append(_eval_row(CLASSIFY, path, [(text, "") for text in texts]))
    return rows


def _vqa(scene: scenes.Scene, path: str, rng: np.random.Generator) -> dict[str, Any]:
    """Candidates are all ten digit words, and readings: those of the scene, both ways, then random ones."""
    question, answer = scenes.ask(scene, rng)
    lines = [reading for _, reading in scenes.questions(scene)["reading"]]
    backwards = [" ".join(reversed(reading.split())) for reading in lines]
    hard = [text for text in (*scenes.DIGITS, *lines, *backwards) if text != answer]

    def draw() -> str:
        return " ".join(rng.choice(scenes.DIGITS, 2))

    texts = _candidates(answer, hard, draw, rng)
    return _eval_row(ANSWER.format(question), path, [(text, "") for text in texts])


def _image_to_text(
    picture: _Picture, pictures: Sequence[_Picture], rng: np.random.Generator
) -> dict[str, Any]:
    """The hard negative is a caption of the same cells of the twin."""
    twin = pictures[picture.twin].scene
    facts = scenes.choose_facts(picture.scene, [twin], rng)
    swapped = scenes.describe(twin, [fact.cell for fact in facts])

    def draw() -> str | None:
        other = pictures[int(rng.integers(len(pictures)))].scene
        wrong = scenes.choose_facts(other, [], rng)
        return None if scenes.holds(wrong, picture.scene) else scenes.caption(wrong)

    texts = _candidates(scenes.caption(facts), [scenes.caption(swapped)], draw, rng)
    return _eval_row(FIND_CAPTION, picture.path, [(text, "") for text in texts])


def _text_to_image(
    picture: _Picture, pictures: Sequence[_Picture], rng: np.random.Generator
) -> dict[str, Any]:
    """The hard negative is the twin's picture."""
    twin = pictures[picture.twin]
    facts = scenes.choose_facts(picture.scene, [twin.scene], rng)

    def draw() -> str | None:
        other = pictures[int(rng.integers(len(pictures)))]
        return None if scenes.holds(facts, other.scene) else other.path

    paths = _candidates(picture.path, [twin.path], draw, rng)
    query = FIND_IMAGE.format(scenes.caption(facts))
    return _eval_row(query, "", [(IMAGE, path) for path in paths])


def _grounding(
    pictures: Sequence[_Picture], rng: np.random.Generator, images: _Images
) -> list[dict[str, Any]]:
    """Hard negatives are crops of the scene's other cells. No negative shows the positive's scan."""
    crops = [
        [_save_crop(f"{number:05d}_{cell}", picture, cell, rng, images) for cell in range(4)]
        for number, picture in enumerate(pictures)
    ]
    rows = []
    for number, picture in enumerate(pictures):
        cell = int(rng.integers(4))
        scan = picture.scene.scans[cell]

        def draw(scan: int = scan) -> str | None:
            other, where = int(rng.integers(len(pictures))), int(rng.integers(4))
            return None if pictures[other].scene.scans[where] == scan else crops[other][where]

        hard = [crop for where, crop in enumerate(crops[number]) if where != cell]
        paths = _candidates(crops[number][cell], hard, draw, rng)
        label = rng.choice(scenes.labels(picture.scene, cell))
        targets = [(CROP, path) for path in paths]
        rows.append(_eval_row(SELECT.format(label), picture.path, targets))
    return rows
