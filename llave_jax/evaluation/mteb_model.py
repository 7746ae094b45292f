"""A model as the `mteb` package (MTEB, MIEB, MMTEB's video tasks) asks for one.

Owns the adapter to mteb's encoder protocol and the wording of its inputs for LLaVE. Tasks, data and metrics are
mteb's; `mteb_run.py` runs them.
"""

# mteb is an extra that is often not installed; where it is, its own types are not checked here.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image

from llave_jax.evaluation.cache import EmbeddingCache, embed
from llave_jax.inputs.chat import IMAGE_MARKER
from llave_jax.inputs.item import ImageLike, Item, with_prompt
from llave_jax.inputs.video import sample_frame_indices
from llave_jax.parallel.processes import from_first_process
from llave_jax.weights.model_card import LICENSE

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError("mteb's tasks need mteb: pip install 'llave_jax[mteb]'") from error

# Images are held decoded until this many items are encoded together.
_CHUNK_ITEMS = 512
_MODALITIES = ("text", "image", "video")
# mteb's tasks that are made of the data sets whose training splits MMEB-train holds (VLM2Vec, arXiv 2410.05160, table
# 1), so that mteb does not count them as zero-shot. MMEB's other data sets are not in mteb.
TRAINING_DATASETS = frozenset(
    [
        "Imagenet1k",
        "Imagenet1kZeroShot",
        "SUN397",
        "SUN397ZeroShot",
        "VOC2007.v2",
        "HatefulMemesI2TRetrieval",
        "HatefulMemesT2IRetrieval",
        "OKVQAIT2TRetrieval",
        "VidoreDocVQARetrieval",
        "JinaVDRDocVQARetrieval",
        "VidoreInfoVQARetrieval",
        "JinaVDRInfovqaRetrieval",
        "VisRAGRetInfoVQA",
        "JinaVDRChartQARetrieval",
        "VisRAGRetChartQA",
        "CIRRIT2IRetrieval",
        "NIGHTSI2IRetrieval",
        "WebQAT2ITRetrieval",
        "WebQAT2TRetrieval",
        "VisualNewsI2TRetrieval",
        "VisualNewsT2IRetrieval",
        "MSCOCOI2TRetrieval",
        "MSCOCOT2IRetrieval",
    ]
)


class Encoder(Protocol):
    """What the adapter asks of a model: `Embedder.encode`, or a stand-in in tests."""

    def __call__(
        self, items: Sequence[Item], *, batch_size: int | None, show_progress: bool
    ) -> np.ndarray:
        """float32 [n, D], L2-normalised, in order."""
        ...


def model_meta(
    name: str,
    revision: str,
    *,
    dimension: int,
    max_length: int,
    parameters: int | None = None,
    parameter_bytes: int | None = None,
    dims: Sequence[int] = (),
    adapted_from: str | None = None,
) -> ModelMeta:
    """What mteb's results say of a model.

    Args:
      name: "organisation/model".
      revision: identity of its weights. mteb keeps results by name and revision, and does not compute again what it
        has.
      dimension: D.
      max_length: tokens of the longest item.
      parameters: how many; None: unknown.
      parameter_bytes: that they take; None: unknown.
      dims: prefixes that the model was trained for, besides D.
      adapted_from: name of the model that this one was trained from.

    Returns:
      The metadata.
    """
    sizes = sorted({*dims, dimension})
    return ModelMeta(
        loader=None,
        name=name,
        revision=revision,
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=parameters,
        memory_usage_mb=None if parameter_bytes is None else parameter_bytes / 2**20,
        max_tokens=max_length,
        embed_dim=sizes if len(sizes) > 1 else dimension,
        license=LICENSE,
        open_weights=True,
        public_training_code="https://github.com/DeepLearnXMU/LLaVE",
        public_training_data="https://huggingface.co/datasets/TIGER-Lab/MMEB-train",
        framework=["JAX", "safetensors"],
        reference="https://arxiv.org/abs/2503.04812",
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=set(TRAINING_DATASETS),
        adapted_from=adapted_from,
        modalities=list(_MODALITIES),
    )


class MtebEncoder(AbsEncoder):
    """A LLaVE model for `mteb.evaluate`: texts, images, videos, or several of these in one item.

    A prompt of the model goes before each text, chosen by mteb's order: of task and side ("TASK-query"), of the task,
    of its type, of the side ("query", "document"). Where the model has none for queries, the task's own instruction
    does.

    With several processes all run the same tasks; the first one's cache is used.

    Args:
      encode: items -> float32 [n, D], L2-normalised.
      meta: of `model_meta`.
      prompts: of the model, by name.
      cache: takes and gives embeddings; None: they are not kept.
      automatic_batches: `batch_size` of mteb's encode_kwargs is not passed on, as mteb sets one where none is given.
      frames: (frames of a second, most frames) that are taken of a video.
    """

    def __init__(
        self,
        encode: Encoder,
        meta: ModelMeta,
        *,
        prompts: Mapping[str, str] | None = None,
        cache: EmbeddingCache | None = None,
        automatic_batches: bool = False,
        frames: tuple[int, int] = (3, 32),
    ):
        self._encode, self._cache, self._frames = encode, cache, frames
        self._automatic = automatic_batches
        self._prompts = dict(prompts or {})
        self.model_prompts, self.mteb_model_meta = self._prompts, meta
        width = meta.embed_dim
        self._width = width if isinstance(width, int) else max(width or (0,))

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
        """Embeddings of all batches.

        Args:
          inputs: batches of columns.
          task_metadata, hf_split, hf_subset: where they come from.
          prompt_type: whether they are queries or documents.
          kwargs: mteb's encode_kwargs: `batch_size`, `show_progress_bar`; `precision` is refused, as vectors are
            quantised elsewhere (`llave_jax.evaluate --precision`).

        Returns:
          float32 [n, D].

        Raises:
          ValueError: an input has neither text nor image nor video, or cannot be read.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise ValueError(f"precision is {kwargs['precision']!r}; expected float32")
        batch_size = None if self._automatic else kwargs.get("batch_size")
        show = bool(kwargs.get("show_progress_bar"))
        prompt, instruction = self._words(task_metadata, prompt_type)
        where = f"{task_metadata.name}: {hf_subset}/{hf_split}"
        vectors = [
            self._vectors(chunk, batch_size, show)
            for chunk in _chunks(
                with_prompt(item, prompt)
                for batch in inputs
                for item in batch_items(batch, instruction, where, self._frames)
            )
        ]
        return np.concatenate(vectors)

    def _words(self, task_metadata: Any, prompt_type: PromptType | None) -> tuple[str, str]:
        """(prompt of the model, instruction of the task); one of them is empty."""
        name = get_prompt_name(self._prompts, task_metadata, prompt_type)
        if name is not None:
            return self._prompts[name], ""
        if prompt_type != PromptType.query:
            return "", ""
        return "", self.get_instruction(task_metadata, prompt_type)

    def _vectors(self, items: list[Item], batch_size: int | None, show: bool) -> np.ndarray:
        def encode(chosen: Sequence[Item]) -> np.ndarray:
            return self._encode(chosen, batch_size=batch_size, show_progress=show)

        if self._cache is None:
            return encode(items)
        embedded = embed(encode, items, self._cache)
        found = np.zeros((len(items), self._width), np.float32)
        if embedded is not None:
            found = embedded.vectors[embedded.rows]
        return from_first_process(found)


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK_ITEMS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def batch_items(
    batch: Mapping[str, Sequence[Any]],
    instruction: str,
    name: str,
    frames: tuple[int, int] = (3, 32),
) -> list[Item]:
    """A batch of mteb's as items.

    Args:
      batch: columns; those other than `text`, `image` and `video` repeat the content in other forms. An image may be a
        list of images. A video is what torchcodec decodes, or its frames [n, C, H, W].
      instruction: put in front of the texts; "" for none.
      name: where the batch comes from, for errors.
      frames: (frames of a second, most frames) that are taken of a video.

    Returns:
      One item a row of the batch.

    Raises:
      ValueError: the batch has neither text nor image nor video, or a row has nothing.
    """
    columns = [column for column in _MODALITIES if column in batch]
    if not columns or "audio" in batch:
        raise ValueError(
            f"{name}: inputs have columns {sorted(batch)}; this model takes {', '.join(_MODALITIES)}"
        )
    count = len(batch[columns[0]])
    absent = [None] * count
    items = []
    for text, image, video in zip(*(batch.get(m, absent) for m in _MODALITIES), strict=True):
        images = (
            tuple(image) if isinstance(image, list | tuple) else () if image is None else (image,)
        )
        pictures = None if video is None else video_frames(video, name, *frames)
        if pictures is not None and images:
            raise ValueError(f"{name}: an input has both images and a video; this model takes one")
        kind = "video" if pictures is not None else "image"
        markers = len(images) if pictures is None else 1
        items.append(
            Item(content(text or "", markers, instruction, kind), images, video=pictures, name=name)
        )
    return items


def video_frames(video: Any, name: str, frames_per_second: int, max_frames: int) -> list[ImageLike]:
    """The frames of a video that the model sees.

    Args:
      video: a decoder of torchcodec, which has `get_frames_at` and `metadata`; or frames [n, C, H, W], uint8 or floats
        from 0 to 1, all of which are taken up to `max_frames`.
      name: where it comes from, for errors.
      frames_per_second: frames to take of each second, as the model was made for.
      max_frames: the most frames to take.

    Returns:
      Images of mode "RGB".

    Raises:
      ValueError: it has no frames, or another form.
    """
    if hasattr(video, "get_frames_at"):
        rate = video.metadata.average_fps or frames_per_second
        limits = {"frames_per_second": frames_per_second, "max_frames": max_frames}
        chosen = video.get_frames_at(indices=sample_frame_indices(len(video), rate, **limits))
        pixels = np.asarray(chosen.data)
    else:
        pixels = np.asarray(video)
        if len(pixels) > max_frames:
            pixels = pixels[np.linspace(0, len(pixels) - 1, max_frames, dtype=int)]
    if pixels.ndim != 4 or not len(pixels) or pixels.shape[1] not in (1, 3):
        raise ValueError(
            f"{name}: a video must be frames [n, 3, H, W]; found an array {pixels.shape}"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.round(255 * np.clip(pixels, 0, 1))
    pixels = np.repeat(pixels, 3 // pixels.shape[1], 1).astype(np.uint8).transpose(0, 2, 3, 1)
    return [PIL.Image.fromarray(np.ascontiguousarray(frame)) for frame in pixels]


def content(text: str, markers: int, instruction: str, kind: str = "image") -> str:
    r"""User content in the form of MMEB's rows.

    >>> content("", 1, "")
    '<image>\nRepresent the given image.'
    >>> content("make it red", 1, "Find an image with the described changes")
    '<image>\nFind an image with the described changes: make it red'
    >>> content("", 1, "", "video")
    '<image>\nRepresent the given video.'

    Args:
      text: of the item; "" for none.
      markers: images of the item, or 1 for its video.
      instruction: put in front of the text; "" for none.
      kind: what the markers stand for, "image" or "video".

    Returns:
      The content, with markers.
    """
    body = ": ".join(part for part in (instruction.rstrip(" .:"), text) if part)
    if not markers:
        return body
    return f"{IMAGE_MARKER}\n" * markers + (body or f"Represent the given {kind}.")
