"""The files of a Hugging Face tokenizer: copied, compared, and given special tokens.

What is not changed on purpose stays as it is, byte for byte or key for key.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llave_jax.common.directories import make_directory
from llave_jax.weights.json_files import read_json, section, write_json
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


# Between these stands what an item says (`inputs.chat`).
_CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# Far beyond any tokenizer, so that a table of tokens by id cannot exhaust memory.
_MAX_TOKEN_ID = 1 << 24


def load_tokenizer(directory: Path) -> Any:
    """Loads a tokenizer. All of the package does it here: offline, and without code of the directory.

    Args:
      directory: with the tokenizer's files.

    Returns:
      A `transformers` tokenizer.

    Raises:
      CheckpointError: a file is missing or damaged, or the tokenizer wants code of its own.
    """
    check_tokenizer_files(directory)
    missing = [token for token in _CHAT_TOKENS if token not in token_ids(directory)]
    if missing:
        raise CheckpointError(
            f"{directory}: the tokenizer lacks {' and '.join(missing)}, of which every input is made; half of its files "
            "are missing, or it is that of another model"
        )
    # Imported here: where torch is installed, transformers takes seconds to import.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        tokenizer("a text")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except (
        BaseException
    ) as error:  # broken files raise anything, panics of the Rust library included
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{directory}: transformers cannot load the tokenizer ({type(error).__name__}: {reason:.200}). Is a file "
            "damaged? Fetch the tokenizer's files again"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{directory}: the tokenizer {type(tokenizer).__name__} has no fast form; expected a tokenizer.json"
        )
    return tokenizer


def check_tokenizer_files(directory: Path) -> None:
    """Refuse a directory that lacks a file that `AutoTokenizer` needs, or that brings code for it.

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
    path = directory / "tokenizer_config.json"
    if read_json(path).get("auto_map"):
        raise CheckpointError(
            f"{path}: auto_map names code that comes with the checkpoint. It is never run: take auto_map out if "
            "tokenizer_class is one of transformers' own"
        )


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copies the tokenizer's files of one directory into another.

    Args:
      source: directory to copy from.
      target: directory to copy to; it is made if it is missing.
    """
    make_directory(target)
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

    Raises:
      CheckpointError: a file is missing, or does not have a tokenizer's form.
    """
    known: dict[str, int] = {}

    def add(path: Path, tokens: Any, listed: Any = ()) -> None:
        """Tokens are token -> id; listed ones are objects with content and id."""
        if not isinstance(tokens, dict) or not isinstance(listed, list | tuple):
            raise CheckpointError(f"{path}: {_NO_TOKENS}")
        if not all(isinstance(entry, dict) for entry in listed):
            raise CheckpointError(f"{path}: {_NO_TOKENS}")
        pairs = [*tokens.items(), *((entry.get("content"), entry.get("id")) for entry in listed)]
        for token, number in pairs:
            if (
                not isinstance(token, str)
                or type(number) is not int
                or not 0 <= number <= _MAX_TOKEN_ID
            ):
                raise CheckpointError(
                    f"{path}: the token {token!r:.60} has the id {number!r:.60}; expected a text with a number from 0 "
                    f"to {_MAX_TOKEN_ID}"
                )
        known.update(pairs)

    for name in ("vocab.json", "added_tokens.json"):
        if (directory / name).is_file():
            add(directory / name, read_json(directory / name))
    path = directory / "tokenizer_config.json"
    decoder = section(read_json(path), "added_tokens_decoder", path)
    add(path, {}, [_decoded(number, entry) for number, entry in decoder.items()])
    path = directory / "tokenizer.json"
    if path.is_file():
        fast = read_json(path)
        model = section(fast, "model", path)
        add(path, model.get("vocab"), fast.get("added_tokens"))
    return known


_NO_TOKENS = (
    "is no tokenizer's file: its vocabulary or its added tokens are missing or of another form"
)


def _decoded(number: str, entry: Any) -> Any:
    """An entry of `added_tokens_decoder` with its id."""
    if not isinstance(entry, dict):
        return entry
    return {**entry, "id": int(number) if number.isdecimal() and len(number) < 10 else number}


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
