"""Adding special tokens to the files of a tokenizer, leaving everything else in them as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llave_jax.weights.hf_config import read_json


def add_special_tokens(directory: Path, tokens: list[str]) -> list[int]:
    """Make sure that a tokenizer directory has `tokens`, each as one special token.

    Tokens it lacks get the ids behind its last one, in order.

    Returns:
      The ids of `tokens`.
    """
    known = token_ids(directory)
    free = max(known.values()) + 1
    new: dict[str, int] = {}
    for token in tokens:
        if token not in known:
            new[token] = free + len(new)
    if new:
        _add(directory, new)
    return [(known | new)[token] for token in tokens]


def token_ids(directory: Path) -> dict[str, int]:
    """token -> id, from all files that list some."""
    known: dict[str, int] = {}
    if (directory / "vocab.json").is_file():
        known |= read_json(directory / "vocab.json")
    if (directory / "added_tokens.json").is_file():
        known |= read_json(directory / "added_tokens.json")
    decoder = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
    known |= {entry["content"]: int(number) for number, entry in decoder.items()}
    if (directory / "tokenizer.json").is_file():
        fast = read_json(directory / "tokenizer.json")
        known |= fast["model"]["vocab"]
        known |= {entry["content"]: entry["id"] for entry in fast["added_tokens"]}
    return known


def _add(directory: Path, new: dict[str, int]) -> None:
    kinds = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    fast, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if fast.is_file():
        values = read_json(fast)
        values["added_tokens"] += [
            {"id": number, "content": token, **kinds, "special": True}
            for token, number in new.items()
        ]
        _write(fast, values)
    values = read_json(settings)
    if "added_tokens_decoder" in values or not fast.is_file():
        values.setdefault("added_tokens_decoder", {}).update(
            {
                str(number): {"content": token, **kinds, "special": True}
                for token, number in new.items()
            }
        )
        _write(settings, values)
    listed = directory / "added_tokens.json"
    if listed.is_file():
        _write(listed, read_json(listed) | new)


def _write(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
