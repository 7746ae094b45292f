"""From a user's query to its vector, with the model that made the index."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp

from llave_jax.embedding.embedder import Embedder
from llave_jax.inputs.item import Item, as_item
from llave_jax.search.index import Index
from llave_jax.weights import model_dir
from llave_jax.weights.fingerprint import model_fingerprint
from llave_jax.weights.resolve import resolve_model


def load_model(
    index: Index, model: str | None, *, adapter: str | None = None, dtype: str | None = None
) -> Embedder:
    """The model that made an index.

    The same weights in another precision are the same model: an index that was built on an accelerator can be
    searched on a laptop.

    Args:
      index: it knows its model.
      model: where the model is; None: where it was when the index was made.
      adapter: where the adapter is that was added to it; None: where it was then, if there was one.
      dtype: of the computation; None: as for `Embedder.from_pretrained`.

    Returns:
      The model, with inputs laid out as they were for the index.

    Raises:
      ValueError: it is another model, or there is none.
    """
    made = index.settings.model
    name = model or made.get("model")
    if not name or not {"fingerprint", "max_length", "dtype"} <= made.keys():
        raise ValueError(
            f"{index.path}: does not say which model made its vectors; search it by vectors, in Python"
        )
    directory = _resolve(index, str(name), given=model is not None)
    config = model_dir.load_config(directory)
    inputs = dataclasses.replace(config.inputs, max_length=made["max_length"])
    config = dataclasses.replace(config, inputs=inputs)
    adapter = made.get("adapter") if adapter is None else adapter
    found = model_fingerprint(directory, jnp.dtype(made["dtype"]), config, adapter)
    if found != made["fingerprint"]:
        raise ValueError(
            f"{index.path}: was made with {made['model']} (fingerprint {made['fingerprint'][:12]}), not with "
            f"{name} ({found[:12]}); give that --model, or build another index"
        )
    return Embedder.from_pretrained(
        directory, adapter=adapter, dtype=dtype, max_length=made["max_length"]
    )


def _resolve(index: Index, name: str, *, given: bool) -> Path:
    try:
        return resolve_model(name)
    except ValueError as error:
        if given:
            raise
        raise ValueError(
            f"{index.path}: the model that made it is not to be had ({error}); say with --model where it is"
        ) from error


def query_item(
    text: str | None, image: str | os.PathLike | None, video: str | os.PathLike | None
) -> Item:
    """A query, for `Embedder.encode`.

    Args:
      text, image, video: what to search for; an image or a video may have a text beside it.

    Returns:
      The item.

    Raises:
      ValueError: there is nothing, or both an image and a video.
    """
    if image is not None and video is not None:
        raise ValueError("a query has an image or a video, not both")
    given = {"text": text, "image": image, "video": video}
    values = {key: value for key, value in given.items() if value is not None}
    if not values:
        raise ValueError("there is nothing to search for: give a text, an image or a video")
    return as_item(values, "the query")
