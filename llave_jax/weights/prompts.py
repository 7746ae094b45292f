"""The named prompts of a model: `prompts.json` in a model directory, {"query": "...", "document": "..."}.

A prompt is an instruction that goes in front of an item's text. Names are those of sentence-transformers and mteb: a
side ("query", "document"), a task, or both ("CIRR-query"). A model directory without the file has none. A Hugging Face
checkpoint has them in the settings of sentence-transformers. `mmeb_prompts.json` is MMEB's set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llave_jax.weights.json_files import read_json, write_json
from llave_jax.weights.safetensors_io import CheckpointError
from llave_jax.weights.sentence_transformers import SETTINGS

PROMPTS = Path("prompts.json")
# Sets that come with the package, by the names that commands take.
SETS = {"mmeb": Path(__file__).with_name("mmeb_prompts.json")}
DOCUMENT_NAMES = ("document", "passage", "corpus")


def read_prompts(directory: Path) -> dict[str, str]:
    """The prompts of a model directory.

    Args:
      directory: a model directory; of a training run, the one in it.

    Returns:
      name -> text; empty if the directory has no prompts.json.

    Raises:
      CheckpointError: the file is not an object of strings.
    """
    file = directory / PROMPTS
    return _checked(read_json(file), file) if file.exists() else {}


def read_prompt_set(name: str) -> dict[str, str]:
    """A set of prompts that is put into a model directory.

    Args:
      name: one of SETS, or a JSON file of {name: text}.

    Returns:
      name -> text.

    Raises:
      FileNotFoundError: there is no such set and no such file.
      CheckpointError: the file is not an object of strings.
    """
    file = SETS.get(name, Path(name))
    if not file.is_file():
        raise FileNotFoundError(
            f"prompts {name!r:.100}: neither a file nor one of the sets {', '.join(SETS)}"
        )
    return _checked(read_json(file), file)


def side_prompts(prompts: Mapping[str, str]) -> tuple[str, str]:
    """The prompts of queries and of documents, whatever the task.

    Args:
      prompts: of the model.

    Returns:
      (query, document); "" for each that the model has not.
    """
    document = next((prompts[name] for name in DOCUMENT_NAMES if name in prompts), "")
    return prompts.get("query", ""), document


def write_prompts(directory: Path, prompts: Mapping[str, str]) -> None:
    """Writes prompts into a model directory that is being staged; nothing if there are none.

    Args:
      directory: the model directory.
      prompts: name -> text.
    """
    if prompts:
        write_json(directory / PROMPTS, dict(prompts))


def read_hf_prompts(directory: Path) -> dict[str, str]:
    """The prompts of a Hugging Face checkpoint, as sentence-transformers has them.

    Args:
      directory: of the checkpoint.

    Returns:
      name -> text; empty without such settings. sentence-transformers writes an empty text for a prompt
      that is not set: these are left out.

    Raises:
      CheckpointError: the settings are not in its form.
    """
    file = directory / SETTINGS
    if not file.is_file():
        return {}
    values = read_json(file).get("prompts")
    prompts = _checked({} if values is None else values, file)
    return {name: text for name, text in prompts.items() if text}


def find_prompt(prompts: Mapping[str, str], name: str | None, text: str | None) -> str:
    """The prompt that a caller means.

    Args:
      prompts: of the model.
      name: one of them, if no text is given.
      text: a prompt of the caller's own.

    Returns:
      Its text; "" if neither is given.

    Raises:
      ValueError: the model has no prompt of that name.
    """
    if text is not None:
        return text
    if name is None:
        return ""
    if name not in prompts:
        known = ", ".join(prompts) or "none"
        raise ValueError(f"prompt_name is {name!r:.80}; this model's prompts are: {known}")
    return prompts[name]


def _checked(values: Any, file: Path) -> dict[str, str]:
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: prompts is {values!r:.60}; expected an object of texts")
    for name, text in values.items():
        if not isinstance(text, str):
            raise CheckpointError(
                f"{file}: the prompt {name!r:.60} is {text!r:.60}; expected a text"
            )
    return values
