"""The 36 image tasks of MMEB-V2: rows of `ziyjiang/MMEB_Test_Instruct` as texts and pictures.

Owns the wording. The texts are VLM2Vec's, with LLaVE's `<image>` as the marker: for most tasks they equal those of
MMEB (V1), in which a newline follows the marker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llave_jax.data.image_store import ImageStore
from llave_jax.evaluation.benchmarks.base import Options
from llave_jax.evaluation.benchmarks.builder import Make, TaskBuilder
from llave_jax.evaluation.benchmarks.mmeb_v2.hub import HubData, Table
from llave_jax.evaluation.benchmarks.mmeb_v2.pixels import Pixels
from llave_jax.evaluation.benchmarks.mmeb_v2.tasks import METRICS, Spec
from llave_jax.evaluation.benchmarks.mmeb_v2.words import IMAGE, compose
from llave_jax.evaluation.task import Task
from llave_jax.inputs.item import Item, missing_image

# As the rows mark a picture.
_MARKER = "<|image_1|>"
_TEXTS = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst")
_LISTS = ("tgt_text", "tgt_img_path")


class Row(NamedTuple):
    """A row of the dataset; the first target is the right one."""

    qry_inst: str
    qry_text: str
    qry_img_path: str
    tgt_inst: str
    tgt_text: list[str]
    tgt_img_path: list[str]


class Side(NamedTuple):
    """A query or a candidate.

    Attributes:
      text: with LLaVE's marker.
      picture: below the picture folder; "" for none.
      name: of a candidate.
    """

    text: str
    picture: str = ""
    name: str = ""


def _joined(text: str) -> str:
    """Text whose marker is followed by a newline without a space, as in MMEB (V1)."""
    return text.replace(" \n", "\n")


def _of_picture(row: Row) -> Side:
    text = compose(IMAGE, row.qry_inst.replace(_MARKER, ""), row.qry_text)
    return Side(_joined(text) + "\n", row.qry_img_path)


def _of_picture_stripped(row: Row) -> Side:
    instruction = "\n" + row.qry_inst.replace(_MARKER, "").strip()
    return Side(_joined(compose(IMAGE, instruction, row.qry_text)) + "\n", row.qry_img_path)


def _of_text(row: Row, newlines: str) -> Side:
    return Side(f"{row.qry_inst.replace(_MARKER, IMAGE)} {row.qry_text}{newlines}")


def _texts(row: Row) -> list[Side]:
    return [Side(text, "", text) for text in row.tgt_text]


def _pictures(row: Row, end: str) -> list[Side]:
    """Pictures, with captions if the first one has one; `end` is for those without."""
    instruction = row.tgt_inst.replace(_MARKER, "")
    if row.tgt_text[0].strip():
        texts = [
            _joined(compose(IMAGE, f"{instruction} {caption}")) + "\n" for caption in row.tgt_text
        ]
    else:
        texts = [_joined(compose(IMAGE, instruction)) + end] * len(row.tgt_text)
    return [Side(text, path) for text, path in zip(texts, row.tgt_img_path, strict=True)]


def _image_t2i(row: Row, newlines: str = "\n") -> tuple[Side, list[Side]]:
    pictures = [side._replace(name=side.picture) for side in _pictures(row, "\n")]
    return _of_text(row, newlines), pictures


def _image_i2i_vg(row: Row) -> tuple[Side, list[Side]]:
    pictures = [
        side._replace(name=f"{side.picture}:{caption.strip(_QUOTE)}")
        for side, caption in zip(_pictures(row, ""), row.tgt_text, strict=True)
    ]
    return _of_picture_stripped(row), pictures


_QUOTE = '"'
# Parser -> (row -> query, candidates).
_PARSERS: Mapping[str, Callable[[Row], tuple[Side, list[Side]]]] = {
    "image_cls": lambda row: (_of_picture(row), _texts(row)),
    "image_qa": lambda row: (_of_picture_stripped(row), _texts(row)),
    "image_i2t": lambda row: (_of_picture(row), _texts(row)),
    "image_t2i": _image_t2i,
    "image_i2i_vg": _image_i2i_vg,
}


def _parser(spec: Spec) -> Callable[[Row], tuple[Side, list[Side]]]:
    if spec.name == "VisDial":
        return functools.partial(_image_t2i, newlines="\n\n")
    assert spec.parser is not None
    return _PARSERS[spec.parser]


def read(spec: Spec, data: HubData, pixels: Pixels, options: Options) -> Task:
    """Reads a task. With several processes all call this alike.

    Args:
      spec: the task.
      data: where its annotations are.
      pixels: where its pictures are.
      options: none concern it.

    Returns:
      The task: each row ranks its own candidates.

    Raises:
      FileNotFoundError, ValueError: data is missing or malformed; it names file and row.
    """
    del options
    table, parse = _table(spec, data), _parser(spec)
    store = pixels.store(spec, first_picture(spec, data))
    builder = TaskBuilder(spec.info, METRICS, local=True)
    for number, values in enumerate(table.rows(*_TEXTS, *_LISTS)):
        where = table.where(number)
        query, candidates = parse(_row(values, where))
        pool = [builder.add_candidate(c.name, _make(c, store, where)) for c in candidates]
        builder.add_query(str(number), _make(query, store, where), {candidates[0].name: 1}, pool)
    return builder.task(where=str(table.source))


def first_picture(spec: Spec, data: HubData) -> str:
    """A picture of the first row, which shows where the pictures are.

    Args:
      spec: the task.
      data: where its annotations are.

    Returns:
      Its path below the picture folder; "" if the row has none.

    Raises:
      FileNotFoundError, ValueError: annotations are missing or malformed.
    """
    table = _table(spec, data)
    for values in table.rows(*_TEXTS, *_LISTS, first=1):
        query, candidates = _parser(spec)(_row(values, table.where(0)))
        return query.picture or candidates[0].picture
    return ""


def _table(spec: Spec, data: HubData) -> Table:
    return data.table(spec.repository, spec.configs[0], spec.split, spec.local)


def _row(values: Mapping[str, Any], where: str) -> Row:
    texts = {key: "" if values[key] is None else values[key] for key in _TEXTS}
    lists = {key: values[key] for key in _LISTS}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be a text; found {value!r:.100}")
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{where}: {key} must be a list of texts; found {value!r:.100}")
    first, second = lists.values()
    if len(first) != len(second) or not first:
        raise ValueError(
            f"{where}: {' and '.join(_LISTS)} must be lists of one length, at least 1; found lengths "
            f"{len(first)} and {len(second)}"
        )
    return Row(**texts, **lists)


def _make(side: Side, store: ImageStore, where: str) -> Make:
    return functools.partial(_item, side.text, side.picture, store, where)


def _item(text: str, picture: str, store: ImageStore, where: str) -> Item:
    """The item of a side. A marker without a picture holds the zero picture, as in MMEB (V1)."""
    images = (store.find(picture, where),) if picture else missing_image(text)
    return Item(text, images=images, name=where)
