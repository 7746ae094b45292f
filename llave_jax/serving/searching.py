"""Requests of /search: what is searched for, and what is told of each hit.

The index itself is `search/index.py`; filters are `filters.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from llave_jax.search.columns import Hit
from llave_jax.search.index import Index
from llave_jax.serving import filters
from llave_jax.serving import items as client_items
from llave_jax.serving.errors import invalid
from llave_jax.serving.items import ClientItem
from llave_jax.serving.settings import Limits

_FIELDS = (
    "text",
    "image",
    "content",
    "like",
    "where",
    "k",
    "model",
    "prompt_name",
    "input_type",
    "truncate",
)
_MANY_CHARACTERS = 2000
_EXAMPLES = 40


@dataclasses.dataclass(frozen=True)
class SearchRequest:
    """What a client searches for.

    Attributes:
      item: to be embedded; None: `like` says what to search for.
      like: the id of an item of the index.
      k: how many results.
      where: of `Index.search`.
    """

    item: ClientItem | None
    like: str | None
    k: int
    where: str | None


def parse(
    fields: Mapping[str, Any], columns: Mapping[str, str], prompts: Sequence[str], limits: Limits
) -> SearchRequest:
    """Reads a request.

    Args:
      fields: of its body.
      columns: metadata columns of the index.
      prompts: names of the model's prompts; `query` is the default.
      limits: of items.

    Returns:
      What it asks for.

    Raises:
      ApiError: it is of another form.
    """
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise invalid(f"the field {unknown[0][:60]!r} is not known", unknown[0][:60])
    given = [key for key in ("text", "image", "content", "like") if fields.get(key) is not None]
    if given not in (["text"], ["image"], ["text", "image"], ["content"], ["like"]):
        raise invalid(
            "expected one of: text, image, text with image, content (a list of parts), like (an id)",
            "text",
        )
    k = fields.get("k")
    if k is None:
        k = min(20, limits.results)
    if type(k) is not int or not 1 <= k <= limits.results:
        raise invalid(f"k: expected a number from 1 to {limits.results}", "k")
    where = filters.build(fields.get("where"), columns)
    if given == ["like"]:
        if not isinstance(fields["like"], str):
            raise invalid("like: expected the id of an item", "like")
        return SearchRequest(None, fields["like"], k, where)
    for key in ("text", "image"):
        if not isinstance(fields.get(key), str | None):
            raise invalid(f"{key}: expected a string", key)
    if given == ["content"]:
        item = client_items.parse_content(fields["content"], "content", limits)
    elif "image" in given:
        parts = [{"type": "image_url", "image_url": {"url": fields["image"]}}]
        if (fields.get("text") or "").strip():
            parts.append({"type": "text", "text": fields["text"]})
        item = client_items.parse_content(parts, "image", limits)
    else:
        item = client_items.parse_content(fields["text"], "text", limits)
    prompt = client_items.prompt_of({"input_type": "query", **_set(fields)}, prompts)
    return SearchRequest(
        dataclasses.replace(item, prompt_name=prompt, truncate=fields.get("truncate") is True),
        None,
        k,
        where,
    )


def _set(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that name a prompt; `prompt_name` takes the place of the default."""
    given = {
        key: fields[key] for key in ("prompt_name", "input_type") if fields.get(key) is not None
    }
    if "prompt_name" in given:
        given.setdefault("input_type", None)
    return given


def result(hit: Hit, thumbnails: bool) -> dict[str, Any]:
    """A hit for the client: no path of this machine.

    Args:
      hit: of the index.
      thumbnails: the index has some.

    Returns:
      Values for JSON. `thumbnail` is a path of this server, or null.
    """
    shows = thumbnails and hit.kind != "text"
    return {
        "id": hit.id,
        "score": round(hit.score, 6),
        "kind": hit.kind,
        "text": hit.text[:_MANY_CHARACTERS],
        "name": PurePath(hit.path).name,
        "metadata": hit.metadata,
        "thumbnail": f"/items/{quote(hit.id, safe='')}/thumbnail" if shows else None,
    }


def describe(index: Index, limits: Limits) -> dict[str, Any]:
    """What clients are told of an index.

    Args:
      index: open.
      limits: of searches.

    Returns:
      Values for JSON: how many items of which kinds, the columns that filters may name, the values of those that
      have few, some items, and what a search may have.
    """
    info = index.info()
    columns = {**filters.OWN, **info["columns"]}
    examples = [result(hit, info["thumbnails"]) for hit in index.examples(_EXAMPLES)]
    for example in examples:
        del example["score"]
    return {
        "items": info["items"],
        "kinds": info["kinds"],
        "columns": {name: filters.kind_of(kind) for name, kind in columns.items()},
        "thumbnails": info["thumbnails"],
        "approximate": info["ann"] is not None,
        "values": index.values(),
        "examples": examples,
        "limits": {name: getattr(limits, name) for name in ("body_bytes", "pixels", "results")},
    }
