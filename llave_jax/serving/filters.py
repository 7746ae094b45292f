"""Filters of a search, as clients write them, in LanceDB's language.

Clients never write SQL: they name columns and values, both are checked, and the text is made here. A filter is an
object whose every entry must hold:

    {"label": "cat", "year": {"gte": 2020, "lt": 2024}, "kind": ["image", "video"], "tags": {"contains": "red"}}

A plain value means equality, a list any of its values, null that the item has no value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from llave_jax.serving.errors import ApiError, invalid

# Columns of every index that can be filtered by. The others are paths, digests and vectors.
OWN = {"id": "string", "kind": "string", "text": "string"}
MOST_CONDITIONS = 32
MOST_VALUES = 1000
_COMPARISONS = {"eq": "=", "ne": "!=", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_WHOLE = 2**63 - 1
# Arrow's type of a column -> what clients are told it holds.
TYPES = {"string": "text", "int64": "whole number", "double": "number", "bool": "boolean"}


def build(where: Any, columns: Mapping[str, str]) -> str | None:
    """The filter of a request, for `Index.search`.

    Args:
      where: as the client wrote it; None: no filter.
      columns: the metadata columns of the index with their Arrow types.

    Returns:
      A condition; None without one.

    Raises:
      ApiError: it is of another form, names no column of the index, or a value is not of the column's type.
    """
    if where is None or where == {}:
        return None
    if not isinstance(where, dict):
        raise invalid('where: expected an object, such as {"label": "cat"}', "where")
    if len(where) > MOST_CONDITIONS:
        raise invalid(f"where: has more than {MOST_CONDITIONS} columns", "where")
    known = {**columns, **OWN}
    return " AND ".join(_column(name, condition, known) for name, condition in where.items())


def kind_of(arrow_type: str) -> str:
    """What a column holds, for clients.

    Args:
      arrow_type: as `Index` gives it.

    Returns:
      One of the values of TYPES, or "list of texts".
    """
    return TYPES.get(arrow_type, "list of texts")


def _column(name: str, condition: Any, known: Mapping[str, str]) -> str:
    if name not in known or "`" in name:
        raise _wrong(name, f"is no column of this index; it has {', '.join(sorted(known))[:500]}")
    quoted, kind = f"`{name}`", kind_of(known[name])
    if not isinstance(condition, dict):
        condition = {"in": condition} if isinstance(condition, list) else {"eq": condition}
    if not condition:
        raise _wrong(name, "has an empty condition")
    return " AND ".join(_test(name, quoted, kind, test, value) for test, value in condition.items())


def _test(name: str, quoted: str, kind: str, test: str, value: Any) -> str:
    def literal(value: Any) -> str:
        return _literal(name, kind, value)

    if test in ("eq", "ne") and value is None:
        return f"{quoted} IS {'NOT ' if test == 'ne' else ''}NULL"
    if test in ("in", "not_in"):
        return _among(name, quoted, test, value, literal, kind)
    if test == "contains" and kind == "list of texts":
        return f"array_has({quoted}, {_text(name, value)})"
    if test == "contains" and kind == "text":
        return f"strpos({quoted}, {_text(name, value)}) > 0"
    if test in _COMPARISONS and kind != "list of texts":
        return f"{quoted} {_COMPARISONS[test]} {literal(value)}"
    tests = ["contains"] if kind == "list of texts" else [*_COMPARISONS, "in", "not_in"]
    tests += ["contains"] * (kind == "text")
    raise _wrong(
        name, f"has the test {test[:40]!r}; for a column of {kind}s there are {', '.join(tests)}"
    )


def _among(
    name: str, quoted: str, test: str, values: Any, literal: Callable[[Any], str], kind: str
) -> str:
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_VALUES:
        raise _wrong(name, f"{test}: expected a list of 1 to {MOST_VALUES} values")
    if kind == "list of texts":
        any_of = " OR ".join(f"array_has({quoted}, {literal(value)})" for value in values)
        return f"NOT ({any_of})" if test == "not_in" else f"({any_of})"
    return f"{quoted} {'NOT IN' if test == 'not_in' else 'IN'} ({', '.join(map(literal, values))})"


def _literal(name: str, kind: str, value: Any) -> str:
    if kind in ("text", "list of texts"):
        return _text(name, value)
    if kind == "boolean" and isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if (
            kind == "whole number"
            and value == (whole := math.floor(value))
            and abs(whole) <= _WHOLE
        ):
            return str(whole)
        if kind == "number" and abs(value) < 1e300:
            return repr(float(value))
    raise _wrong(name, f"is compared with {json.dumps(value)[:60]}; the column holds {kind}s")


def _text(name: str, value: Any) -> str:
    """A text in quotes. The only character with a meaning in it is the quote itself."""
    if not isinstance(value, str):
        raise _wrong(name, f"is compared with {json.dumps(value)[:60]}; the column holds texts")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _wrong(name, "is compared with a text that is no Unicode") from error
    return "'" + value.replace("'", "''") + "'"


def _wrong(name: str, message: str) -> ApiError:
    return invalid(f"where: {name[:60]!r} {message}", "where")
