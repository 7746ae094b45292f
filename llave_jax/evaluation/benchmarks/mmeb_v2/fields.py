"""Rows of an annotation table, field by field, with errors that say where a field is wrong.

Owns the checks of single fields, and how an instruction and a text are joined. Which fields a task has is said by its
parser.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from llave_jax.evaluation.benchmarks.builder import Make
from llave_jax.inputs.item import Item


def join(*parts: str) -> str:
    """Marker, instruction and text with spaces between them.

    Args:
      parts: in order; empty ones are left out with their space.

    Returns:
      The text of an item.
    """
    return " ".join(part for part in parts if part)


def text_item(text: str, where: str) -> Make:
    """An item that is a text alone.

    Args:
      text: of the item.
      where: the row that names it, for errors.

    Returns:
      What makes the item.
    """
    return functools.partial(Item, text, name=where)


class Row:
    """One row of a table.

    Args:
      values: field -> value, with all fields that are asked for.
      where: file and row, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def text(self, field: str) -> str:
        """A text, which may be empty.

        Args:
          field: of the row.

        Returns:
          The text.

        Raises:
          ValueError: it is no text.
        """
        return self._checked(field, self.values[field], str, "a text")

    def texts(self, field: str) -> list[str]:
        """A list of texts, at least one.

        Args:
          field: of the row.

        Returns:
          The texts.

        Raises:
          ValueError: it is empty, or no list of texts.
        """
        found = self._checked(field, self.values[field], Sequence, "a list of texts")
        if isinstance(found, str) or not found:
            raise self.wrong(field, "a list of texts")
        return [self._checked(field, text, str, "a list of texts") for text in found]

    def id(self, field: str) -> str:
        """A text or a whole number, as text.

        Args:
          field: of the row.

        Returns:
          The text, never empty.

        Raises:
          ValueError: it is neither.
        """
        value = self.values[field]
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.wrong(field, "a text or a whole number")
        return str(value)

    def index(self, field: str, count: int) -> int:
        """A place in a list, written as a number or as text.

        Args:
          field: of the row.
          count: length of the list.

        Returns:
          0 to count - 1.

        Raises:
          ValueError: it is no such number.
        """
        value = self.id(field)
        if not value.isdecimal() or int(value) >= count:
            raise self.wrong(field, f"a number from 0 to {count - 1}")
        return int(value)

    def wrong(self, field: str, expected: str) -> ValueError:
        """The error that a field is not what was expected.

        Args:
          field: of the row.
          expected: in words.

        Returns:
          The error, not raised.
        """
        return ValueError(
            f"{self.where}: {field}: expected {expected}; found {self.values[field]!r:.120}"
        )

    def _checked(self, field: str, value: Any, kind: type, expected: str) -> Any:
        if not isinstance(value, kind):
            raise self.wrong(field, expected)
        return value
