"""What one row of training data may say, in the names that people use, and what it means.

Owns the forms of a record. Files of records are `rows.py`.

A row names a query, one target or several, any number of hard negatives, and a teacher's scores of targets and
hard negatives. MMEB's names hold texts and image paths; FlagEmbedding's and sentence-transformers' hold texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from llave_jax.inputs.item import is_empty

REQUIRED = ("qry", "qry_image_path", "pos_text", "pos_image_path")
OPTIONAL = ("neg_text", "neg_image_path")
FIELDS = REQUIRED + OPTIONAL
# Lists of numbers. "scores" has those of the target and of its hard negatives in one list, as
# sentence-transformers' `mine_hard_negatives` writes them.
SCORES = ("pos_scores", "neg_scores", "scores")
# Of rows of texts: field -> what it is called elsewhere. A row with any of REQUIRED is in MMEB's names.
_NAMES = {
    "qry": ("query", "anchor"),
    "pos_text": ("pos", "positive"),
    "neg_text": ("neg", "negative"),
}
_NUMBERED = re.compile(r"negative_(\d+)")
NAMES_OF_TEXTS = (
    "query (or anchor), pos (or positive), neg (or negative, negative_1, negative_2, ...)"
)


class Side(NamedTuple):
    """A target or a hard negative.

    Attributes:
      text: "" if it has none.
      image_path: relative to the image root; "" if it has none.
    """

    text: str
    image_path: str

    def is_empty(self) -> bool:
        """Whether there is neither text nor image."""
        return is_empty(self.text, self.image_path)


class Rest(NamedTuple):
    """What a row says beyond one target and one hard negative.

    Attributes:
      positives: the other targets.
      negatives: the other hard negatives.
      pos_scores: a teacher's score of each target, the first included; () without a teacher.
      neg_scores: of each hard negative, the first included.
    """

    positives: tuple[Side, ...] = ()
    negatives: tuple[Side, ...] = ()
    pos_scores: tuple[float, ...] = ()
    neg_scores: tuple[float, ...] = ()

    def to_text(self) -> str:
        """The rest as JSON, the same for the same content; "" if there is nothing."""
        parts = {name: value for name, value in self._asdict().items() if value}
        return json.dumps(parts, ensure_ascii=False, separators=(",", ":")) if parts else ""

    @classmethod
    def from_text(cls, text: str) -> Rest:
        """Reads what `to_text` wrote.

        Args:
          text: JSON, or "".

        Returns:
          The rest.
        """
        if not text:
            return cls()
        parts = json.loads(text)
        for name in ("positives", "negatives"):
            parts[name] = tuple(Side(*side) for side in parts.get(name, ()))
        return cls(**{name: tuple(value) for name, value in parts.items()})


class _Problem(Exception):
    """Why a row cannot be used."""


def columns_to_read(names: Sequence[str]) -> list[str] | None:
    """Of a table's columns, those that its rows are made of.

    Args:
      names: of all its columns.

    Returns:
      Names of columns; None if rows lack some that they need.
    """
    if any(name in REQUIRED for name in names):
        known = {*FIELDS, *SCORES}
        is_whole = all(name in names for name in REQUIRED)
    else:
        known = {name for theirs in _NAMES.values() for name in theirs} | {*SCORES}
        is_whole = all(any(name in names for name in _NAMES[ours]) for ours in ("qry", "pos_text"))
    if not is_whole:
        return None
    is_texts = "qry" not in names
    return [name for name in names if name in known or (is_texts and _NUMBERED.fullmatch(name))]


def read_record(record: Any, null_is_empty: bool = False) -> dict[str, str | None]:
    """Reads one row.

    Args:
      record: a dict as JSON or a table has it; anything else is a row that cannot be used, and an error says why.
      null_is_empty: None is an empty text, as in tables. Otherwise it is a missing field.

    Returns:
      The fields of `rows.Row`, where "more" is None if there is no more; or only "problem", why the row
      cannot be used. Hard negatives and targets of neither text nor image are left out of lists.
    """
    try:
        return _read_record(record, null_is_empty)
    except _Problem as problem:
        return {"problem": str(problem)}


def _read_record(record: Any, null_is_empty: bool) -> dict[str, str | None]:
    if isinstance(record, UnicodeDecodeError):
        raise _Problem(f"is not Unicode text: {record}")
    if not isinstance(record, dict):
        raise _Problem(f"expected an object, found {type(record).__name__}")
    called: dict[str, str] = {}
    if not any(field in record for field in REQUIRED):
        record, called = _in_our_names(record)
    if record.get("scores") is not None:
        record, called = _with_split_scores(record, called)
    if null_is_empty:
        record = {
            name: "" if value is None and name in FIELDS else value
            for name, value in record.items()
        }
    clean = {field: _text(record.get(field), called.get(field, field)) for field in FIELDS[:2]}
    positives = _sides(record, "pos", clean, called)
    negatives = _sides(record, "neg", clean, called)
    scores = [_scores(record, side, called) for side in ("pos", "neg")]
    if positives is None and negatives is None and scores == [None, None]:
        return clean
    rest = _rest(clean, called, positives, negatives, *scores)
    return {**clean, "more": rest.to_text() or None}


def _in_our_names(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A row of texts in our names, and what each field is called there."""
    ours: dict[str, Any] = {}
    called: dict[str, str] = {}
    for field, names in _NAMES.items():
        given = [name for name in names if name in record]
        if len(given) > 1:
            raise _Problem(f"has both {given[0]} and {given[1]}; give one")
        for name in given:
            ours[field], called[field] = record[name], name
    if "qry" not in ours:
        return record, {}
    if "pos_text" not in ours:
        raise _Problem(f"has {called['qry']} but neither pos nor positive")
    numbered = sorted(filter(_NUMBERED.fullmatch, record), key=lambda name: (len(name), name))
    if numbered:
        names = [called[field] for field in ("neg_text",) if field in called] + numbered
        for name in names:
            _text(record[name], name)
        ours["neg_text"], called["neg_text"] = [record[name] for name in names], "negatives"
    scores = {name: record[name] for name in SCORES if name in record}
    return {"qry_image_path": "", "pos_image_path": "", **ours, **scores}, called


def _with_split_scores(
    record: dict[str, Any], called: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """A row with the scores of its one target and of its hard negatives apart."""
    both = record["scores"]
    for name in ("pos_scores", "neg_scores"):
        if record.get(name) is not None:
            raise _Problem(f"has both scores and {name}; give one")
    if not isinstance(both, list) or not both:
        raise _Problem(f"scores is {both!r:.40}; expected a list, the target's score first")
    names = {"pos_scores": "scores", "neg_scores": "scores, after the target's,"}
    return {**record, "pos_scores": both[:1], "neg_scores": both[1:]}, {**called, **names}


def _text(value: Any, name: str) -> str | None:
    """A text that can be stored, or None as it is."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise _Problem(f"{name} is {type(value).__name__}; expected a string")
    try:
        return value.encode().decode()
    except UnicodeEncodeError as error:
        raise _Problem(f"{name} is not Unicode text (it has half a surrogate pair)") from error


def _sides(
    record: dict[str, Any], side: str, clean: dict[str, str | None], called: dict[str, str]
) -> list[Side] | None:
    """The targets or the hard negatives of a row that lists them; None if it has one at most.

    One that is not listed goes into `clean`.
    """
    fields = f"{side}_text", f"{side}_image_path"
    texts, paths = (record.get(field) for field in fields)
    text_name, path_name = (called.get(field, field) for field in fields)
    if not isinstance(texts, list) and not isinstance(paths, list):
        expected = "a string or a list of strings"
        for field, name, value in zip(fields, (text_name, path_name), (texts, paths), strict=True):
            if value is not None and not isinstance(value, str):
                raise _Problem(f"{name} is {type(value).__name__}; expected {expected}")
            clean[field] = _text(value, name)
        return None
    count = next(len(values) for values in (texts, paths) if isinstance(values, list))
    listed = [
        _listed(texts, text_name, count, path_name),
        _listed(paths, path_name, count, text_name),
    ]
    return [Side(*both) for both in zip(*listed, strict=True)]


def _listed(values: Any, name: str, count: int, other: str) -> list[str]:
    """The texts or the paths of listed targets or hard negatives. Without any, each is ""."""
    if values is None or values == "":
        return [""] * count
    if not isinstance(values, list):
        raise _Problem(
            f"{other} is a list and {name} is {type(values).__name__}; give a list of {count} for {name}, too"
        )
    if len(values) != count:
        raise _Problem(f"{name} lists {len(values)} and {other} {count}; give as many of each")
    return [_text(value, f"{name} {n}") or "" for n, value in enumerate(values, 1)]


def _scores(record: dict[str, Any], side: str, called: dict[str, str]) -> list[float] | None:
    """The teacher's scores of a row's targets or hard negatives; None without."""
    name = called.get(f"{side}_scores", f"{side}_scores")
    values = record.get(f"{side}_scores")
    if values is None:
        return None
    values = values if isinstance(values, list) else [values]
    for n, value in enumerate(values, 1):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise _Problem(f"{name} {n} is {value!r:.40}; expected a finite number")
    return [float(value) for value in values]


def _rest(
    clean: dict[str, str | None],
    called: dict[str, str],
    positives: list[Side] | None,
    negatives: list[Side] | None,
    pos_scores: list[float] | None,
    neg_scores: list[float] | None,
) -> Rest:
    """What goes beyond the first target and the first hard negative, which are written into `clean`."""
    if positives is None:  # if it is missing or empty, reading the row says so
        positives = [Side(clean["pos_text"] or "", clean["pos_image_path"] or "")]
    else:
        clean["pos_text"], clean["pos_image_path"] = "", ""
    if negatives is None:
        negative = Side(clean["neg_text"] or "", clean["neg_image_path"] or "")
        negatives = [] if negative.is_empty() else [negative]
    if negatives and (pos_scores is None) != (neg_scores is None):
        names = ("pos_scores", "neg_scores")
        there, lacking = names if neg_scores is None else names[::-1]
        raise _Problem(f"has {there} but no {lacking}; give both")
    positives, pos_scores = _without_empty(positives, pos_scores, "target", "pos", called)
    negatives, neg_scores = _without_empty(negatives, neg_scores, "hard negative", "neg", called)
    for side, found in (("pos", positives), ("neg", negatives)):
        if found:
            clean[f"{side}_text"], clean[f"{side}_image_path"] = found[0]
    return Rest(tuple(positives[1:]), tuple(negatives[1:]), tuple(pos_scores), tuple(neg_scores))


def _without_empty(
    sides: list[Side], scores: list[float] | None, what: str, side: str, called: dict[str, str]
) -> tuple[list[Side], list[float]]:
    """The targets or the hard negatives that have content, and their scores."""
    if scores is not None and len(scores) != len(sides):
        name = called.get(f"{side}_scores", f"{side}_scores")
        raise _Problem(f"{name} has {len(scores)} for {len(sides)} {what}(s)")
    kept = [n for n, side in enumerate(sides) if not side.is_empty()]
    return [sides[n] for n in kept], [scores[n] for n in kept] if scores else []
