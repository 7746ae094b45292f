"""The 36 image tasks of MMEB-V2: rows of `ziyjiang/MMEB_Test_Instruct` as texts and pictures.

Owns the wording. The texts are VLM2Vec's, with LLaVE's `<image>` as the marker: for most tasks they equal those of
MMEB (V1), in which a newline follows the marker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from llave_jax.data.image_store import ImageStore
from llave_jax.evaluation.benchmarks.builder import Make, TaskBuilder
from llave_jax.evaluation.benchmarks.mmeb_v2 import fields
from llave_jax.evaluation.benchmarks.mmeb_v2.fields import Row
from llave_jax.evaluation.benchmarks.mmeb_v2.hub import HubData
from llave_jax.evaluation.benchmarks.mmeb_v2.pixels import Pixels
from llave_jax.evaluation.benchmarks.mmeb_v2.tasks import METRICS, Spec
from llave_jax.evaluation.task import Task
from llave_jax.inputs.item import Item, missing_image

# As the rows mark a picture, and as LLaVE does.
_MARKER, _IMAGE = "<|image_1|>", "<image>"
_QUERY = ("qry_inst", "qry_text")


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


class Parser(NamedTuple):
    """How rows are read.

    Attributes:
      columns: that are read.
      query: row -> query.
      candidates: row -> candidates, the right one first.
    """

    columns: tuple[str, ...]
    query: Callable[[Row], Side]
    candidates: Callable[[Row], list[Side]]


def _joined(*parts: str) -> str:
    """Parts with spaces between them, but none before a newline, as in MMEB (V1)."""
    return fields.join(*parts).replace(" \n", "\n")


def _plain_query(row: Row) -> Side:
    instruction = row.text("qry_inst").replace(_MARKER, "")
    text = _joined(_IMAGE, instruction, row.text("qry_text"))
    return Side(text + "\n", row.text("qry_img_path"))


def _stripped_query(row: Row) -> Side:
    instruction = row.text("qry_inst").replace(_MARKER, "").strip()
    text = _joined(_IMAGE, "\n" + instruction, row.text("qry_text"))
    return Side(text + "\n", row.text("qry_img_path"))


def _text_query(row: Row, newlines: str = "\n") -> Side:
    instruction = row.text("qry_inst").replace(_MARKER, _IMAGE)
    return Side(f"{instruction} {row.text('qry_text')}{newlines}")


def _texts(row: Row) -> list[Side]:
    return [Side(text, "", text) for text in row.texts("tgt_text")]


def _pictures(row: Row, end: str) -> Iterator[tuple[Side, str]]:
    """Pictures and their captions. `end` follows the text of pictures without captions."""
    paths, captions = row.texts("tgt_img_path"), row.texts("tgt_text")
    has_captions = bool(captions[0].strip())
    if len(captions) == 1 and not has_captions:
        captions = captions * len(paths)
    if len(captions) != len(paths):
        raise row.wrong("tgt_text", f"{len(paths)} texts, one for each of tgt_img_path")
    instruction = row.text("tgt_inst").replace(_MARKER, "")
    for path, caption in zip(paths, captions, strict=True):
        if has_captions:
            text = _joined(_IMAGE, f"{instruction} {caption}") + "\n"
        else:
            text = _joined(_IMAGE, instruction) + end
        yield Side(text, path), caption


def _named_by_path(row: Row) -> list[Side]:
    return [side._replace(name=side.picture) for side, _ in _pictures(row, "\n")]


def _named_by_caption(row: Row) -> list[Side]:
    quote = '"'
    return [
        side._replace(name=f"{side.picture}:{caption.strip(quote)}")
        for side, caption in _pictures(row, "")
    ]


_TEXT_TARGETS = (*_QUERY, "qry_img_path", "tgt_text")
_PICTURE_TARGETS = ("tgt_inst", "tgt_text", "tgt_img_path")
_PARSERS: Mapping[str, Parser] = {
    "image_cls": Parser(_TEXT_TARGETS, _plain_query, _texts),
    "image_i2t": Parser(_TEXT_TARGETS, _plain_query, _texts),
    "image_qa": Parser(_TEXT_TARGETS, _stripped_query, _texts),
    "image_t2i": Parser((*_QUERY, *_PICTURE_TARGETS), _text_query, _named_by_path),
    "image_i2i_vg": Parser(
        (*_QUERY, "qry_img_path", *_PICTURE_TARGETS), _stripped_query, _named_by_caption
    ),
}


def _parser(spec: Spec) -> Parser:
    parser = _PARSERS[spec.parser or ""]
    if spec.name == "VisDial":
        return parser._replace(query=functools.partial(_text_query, newlines="\n\n"))
    return parser


def read(spec: Spec, data: HubData, pixels: Pixels) -> Task:
    """Reads a task. With several processes all call this alike.

    Args:
      spec: the task.
      data: where its annotations are.
      pixels: where its pictures are.

    Returns:
      The task: each row ranks its own candidates.

    Raises:
      FileNotFoundError, ValueError: data is missing or malformed; it names file and row.
    """
    parser = _parser(spec)
    store = pixels.store(spec, first_picture(spec, data))
    builder = TaskBuilder(spec.info, METRICS, local=True)
    for number, row in enumerate(_rows(spec, data)):
        candidates = parser.candidates(row)
        pool = [builder.add_candidate(c.name, _make(c, store, row.where)) for c in candidates]
        query = _make(parser.query(row), store, row.where)
        builder.add_query(str(number), query, {candidates[0].name: 1}, pool)
    return builder.task()


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
    parser = _parser(spec)
    for row in _rows(spec, data, first=1):
        return parser.query(row).picture or parser.candidates(row)[0].picture
    return ""


def _rows(spec: Spec, data: HubData, first: int | None = None) -> Iterator[Row]:
    table = data.table(spec.repository, spec.configs[0], spec.split, spec.local)
    for number, values in enumerate(table.rows(*_parser(spec).columns, first=first)):
        yield Row({key: _without_nulls(values[key]) for key in values}, table.where(number))


def _without_nulls(value: object) -> object:
    """Null is a blank text, as in MMEB (V1)."""
    if isinstance(value, list):
        return ["" if entry is None else entry for entry in value]
    return "" if value is None else value


def _make(side: Side, store: ImageStore, where: str) -> Make:
    return functools.partial(_item, side.text, side.picture, store, where)


def _item(text: str, picture: str, store: ImageStore, where: str) -> Item:
    """The item of a side. A marker without a picture holds the zero picture, as in MMEB (V1)."""
    images = (store.find(picture, where),) if picture else missing_image(text)
    return Item(text, images=images, name=where)
