"""The files of a Hugging Face tokenizer: copied, compared, and given special tokens.

What is not changed on purpose stays as it is, byte for byte or key for key.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llave_jax.weights.json_files import read_json, write_json
from llave_jax.weights.safetensors_io import CheckpointError

# All that a tokenizer may consist of.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def check_tokenizer_files(directory: Path) -> None:
    """Refuse a directory that lacks a file that `AutoTokenizer` needs.

    Args:
      directory: to check.

    Raises:
      CheckpointError: naming the directory and what is missing.
    """
    has = {name for name in FILES if (directory / name).is_file()}
    if "tokenizer_config.json" not in has or not (
        "tokenizer.json" in has or {"vocab.json", "merges.txt"} <= has
    ):
        raise CheckpointError(
            f"{directory}: no tokenizer; expected tokenizer_config.json and tokenizer.json (or "
            "vocab.json with merges.txt). Put the tokenizer's files there."
        )


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copies the tokenizer's files of one directory into another.

    Args:
      source: directory to copy from.
      target: directory to copy to; it is made if it is missing.
    """
    target.mkdir(exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def same_tokenizer_files(first: Path, second: Path) -> bool:
    """Whether two directories hold the same tokenizer files, byte for byte.

    Args:
      first, second: the directories.

    Returns:
      True if every file is in both, with the same bytes, or in neither.
    """

    def contents(directory: Path) -> dict[str, bytes]:
        files = [directory / name for name in FILES]
        return {file.name: file.read_bytes() for file in files if file.is_file()}

    return contents(first) == contents(second)


def add_special_tokens(directory: Path, tokens: list[str]) -> list[int]:
    """Make `tokens` special tokens of a tokenizer.

    Tokens that it lacks get the ids after its last one, in order.

    Args:
      directory: holds the tokenizer's files.
      tokens: the tokens' texts.

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
    """The ids of all tokens of a tokenizer.

    Args:
      directory: holds its files; several of them list tokens.

    Returns:
      Token -> id.
    """
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
    """Write new tokens, by their ids, to all files that list added tokens."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    fast, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if fast.is_file():
        values = read_json(fast)
        values["added_tokens"] += [
            {"id": number, "content": token, **flags, "special": True}
            for token, number in new.items()
        ]
        write_json(fast, values, sort_keys=False)
    values = read_json(settings)
    if "added_tokens_decoder" in values or not fast.is_file():
        values.setdefault("added_tokens_decoder", {}).update(
            {
                str(number): {"content": token, **flags, "special": True}
                for token, number in new.items()
            }
        )
        write_json(settings, values, sort_keys=False)
    listed = directory / "added_tokens.json"
    if listed.is_file():
        write_json(listed, read_json(listed) | new, sort_keys=False)
