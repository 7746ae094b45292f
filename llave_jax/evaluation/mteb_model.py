"""Run tasks of the `mteb` package (MTEB, MIEB) on a model (extra `mteb`, which brings PyTorch).

    python -m llave_jax.evaluation.mteb_model --model DIR --tasks CIRRIT2IRetrieval --output DIR

Owns the adapter to mteb's encoder protocol and the wording of its inputs for LLaVE. Tasks, data and
metrics are mteb's.
"""

# mteb is an extra that is often not installed.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.embedding.embedder import Embedder
from llave_jax.evaluation.cache import Encode
from llave_jax.inputs.item import Item
from llave_jax.weights.fingerprint import model_fingerprint

try:
    import mteb
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError("mteb's tasks need mteb: pip install 'llave_jax[mteb]'") from error

# Images are held decoded until this many items are encoded together.
_CHUNK_ITEMS = 512


class MtebEncoder(AbsEncoder):
    """A LLaVE model for `mteb.evaluate`: texts, images, or both in one item.

    Args:
      encode: items -> float32 [n, D], L2-normalised.
      name: of the model in mteb's results, "organisation/model".
      revision: identity of its weights. mteb keeps results by name and revision, and does not
        compute again what it has.
      dimension: D.
      max_length: tokens of the longest item.
    """

    def __init__(
        self, encode: Encode, *, name: str, revision: str, dimension: int, max_length: int
    ):
        self._encode = encode
        self.instruction_template = None
        self.model_prompts = None
        self.prompts_dict = None
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name,
            revision=revision,
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=max_length,
            embed_dim=dimension,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=[],
            similarity_fn_name="cosine",
            use_instructions=True,
            training_datasets=None,
            modalities=["text", "image"],
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[Any]]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeddings of all batches. Queries get the task's instruction.

        Args:
          inputs: batches of columns.
          task_metadata, hf_split, hf_subset: where they come from.
          prompt_type: whether they are queries or documents.
          kwargs: mteb's settings of other encoders, without meaning here.

        Returns:
          float32 [n, D].
        """
        instruction = ""
        if prompt_type == PromptType.query:
            instruction = self.get_task_instruction(task_metadata, prompt_type)
        parts, items = [], []
        for batch in inputs:
            items += batch_items(
                batch, instruction, f"{task_metadata.name}: {hf_subset}/{hf_split}"
            )
            if len(items) >= _CHUNK_ITEMS:
                parts.append(self._encode(items))
                items = []
        if items:
            parts.append(self._encode(items))
        return np.concatenate(parts)


def batch_items(batch: Mapping[str, Sequence[Any]], instruction: str, name: str) -> list[Item]:
    """A batch of mteb's as items.

    Args:
      batch: columns; those other than `text` and `image` repeat the content in other forms.
      instruction: put in front of the texts; "" for none.
      name: where the batch comes from, for errors.

    Returns:
      One item a row of the batch.

    Raises:
      ValueError: the batch has neither text nor image, but for example audio or video.
    """
    columns = [column for column in ("text", "image") if column in batch]
    if not columns:
        raise ValueError(
            f"{name}: inputs have columns {sorted(batch)}; this model takes text and image"
        )
    count = len(batch[columns[0]])
    texts = batch["text"] if "text" in batch else [""] * count
    images = batch["image"] if "image" in batch else [None] * count
    return [
        Item(
            text=content(text or "", image is not None, instruction),
            images=() if image is None else (image,),
            name=name,
        )
        for text, image in zip(texts, images, strict=True)
    ]


def content(text: str, has_image: bool, instruction: str) -> str:
    r"""User content in the form of MMEB's rows.

    >>> content("", True, "")
    '<image>\nRepresent the given image.'
    >>> content("make it red", True, "Find an image with the described changes")
    '<image>\nFind an image with the described changes: make it red'

    Args:
      text: of the item; "" for none.
      has_image: whether it has an image.
      instruction: put in front of the text; "" for none.

    Returns:
      The content, with a marker for the image.
    """
    body = ": ".join(part for part in (instruction.rstrip(" .:"), text) if part)
    if not has_image:
        return body
    return "<image>\n" + (body or "Represent the given image.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
      argv: the command line without the program; None: the process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llave_jax.evaluation.mteb_model",
        description="Score a model on tasks of mteb, which fetches their data.",
    )
    parser.add_argument("--model", required=True, help="model directory, or a training run's")
    parser.add_argument("--tasks", required=True, help="comma-separated names of mteb's tasks")
    parser.add_argument("--output", required=True, help="where mteb keeps its results")
    args = parser.parse_args(argv)
    embedder = Embedder.from_pretrained(args.model)
    encoder = MtebEncoder(
        lambda items: embedder.encode(items, show_progress=True),
        name=f"llave_jax/{Path(args.model).resolve().name}",
        revision=model_fingerprint(args.model, embedder.model.dtype, embedder.config),
        dimension=embedder.config.text.hidden_size,
        max_length=embedder.config.inputs.max_length,
    )
    tasks = mteb.get_tasks(tasks=args.tasks.split(","))
    results = mteb.evaluate(encoder, tasks, cache=mteb.ResultCache(args.output))
    for task in results.task_results:
        print(f"{task.task_name}  {task.get_score():.4f}")


if __name__ == "__main__":
    main()
