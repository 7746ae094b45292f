"""A model as the `mteb` package (MTEB, MIEB, MMTEB's video tasks) asks for one.

Owns the adapter to mteb's encoder protocol and the wording of its inputs for LLaVE. Tasks, data and metrics are
mteb's; `mteb_run.py` runs them.
"""

# mteb is an extra that is often not installed; where it is, its own types are not checked here.
# pyright: reportMissingImports=false

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, get_args

import jax
import numpy as np
import PIL.Image

from llave_jax.common.content import digest
from llave_jax.evaluation.cache import EmbeddingCache, embed
from llave_jax.inputs import chat
from llave_jax.inputs.item import ImageLike, Item
from llave_jax.inputs.video import sample_frame_indices
from llave_jax.parallel.processes import from_first_process, require_same
from llave_jax.weights.model_card import CITATION, LICENSE

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import Licenses, OutputDType, PromptType
except ImportError as error:
    raise ImportError("mteb's tasks need mteb: pip install 'llave_jax[mteb]'") from error

# Items that are encoded together, and the images and frames that are held decoded for it.
_CHUNK_ITEMS, _CHUNK_PICTURES = 1024, 512
_MODALITIES = ("text", "image", "video")
_MARKER = re.compile(r"<(image|\|image_\d+\|)>")
# mteb's tasks that are made of the data sets whose training splits MMEB-train holds (VLM2Vec, arXiv 2410.05160, table
# 1), so that mteb does not count them as zero-shot. MMEB's other data sets are not in mteb.
TRAINING_DATASETS = frozenset(
    [
        "Imagenet1k",
        "Imagenet1kZeroShot",
        "SUN397",
        "SUN397ZeroShot",
        "VOC2007",
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
    embedding_parameters: int | None = None,
    parameter_bytes: int | None = None,
    dims: Sequence[int] = (),
    truncate_dim: int | None = None,
    half_precision: bool = False,
    licence: str = LICENSE,
    adapted_from: str | None = None,
    reference: str | None = None,
) -> ModelMeta:
    """What mteb's results say of a model.

    Args:
      name: "organisation/model".
      revision: identity of its weights. mteb keeps results by name and revision, and does not compute again what it
        has.
      dimension: D.
      max_length: tokens of the longest item.
      parameters: how many; None: unknown.
      embedding_parameters: of these, those of the table of tokens; None: unknown.
      parameter_bytes: that they take; None: unknown.
      dims: prefixes that the model was trained for, besides D.
      truncate_dim: numbers that are used of each embedding; mteb keeps such results as an experiment. None: D.
      half_precision: whether the model computes in bfloat16.
      licence: of the weights, as the hub calls it. One that mteb does not know is "not specified".
      adapted_from: name of the model that this one was trained from.
      reference: URL of the model; None: of the paper.

    Returns:
      The metadata. Training data is MMEB's for every model: mteb's zero-shot scores are then too few rather than too
      many for a model that was trained on other data.
    """
    sizes = sorted({*dims, dimension})
    if truncate_dim is not None:
        sizes = [truncate_dim]
    known = [name for kind in get_args(Licenses) for name in get_args(kind) or (kind,)]
    return ModelMeta(
        loader=None,
        name=name,
        revision=revision,
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=parameters,
        n_embedding_parameters=embedding_parameters,
        memory_usage_mb=None if parameter_bytes is None else parameter_bytes / 2**20,
        max_tokens=max_length,
        embed_dim=sizes if len(sizes) > 1 else sizes[0],
        license=licence if licence in known else "not specified",
        open_weights=True,
        public_training_code="https://github.com/DeepLearnXMU/LLaVE",
        public_training_data="https://huggingface.co/datasets/TIGER-Lab/MMEB-train",
        framework=["JAX", "safetensors"],
        reference=reference or "https://arxiv.org/abs/2503.04812",
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=set(TRAINING_DATASETS),
        adapted_from=adapted_from,
        modalities=list(_MODALITIES),
        citation=CITATION,
        output_dtypes=OutputDType.BF16 if half_precision else OutputDType.FLOAT32,
        experiment_kwargs=None if truncate_dim is None else {"embed_dim": truncate_dim},
    )


class MtebEncoder(AbsEncoder):
    """A LLaVE model for `mteb.evaluate`: texts, images, videos, or several of these in one item.

    A prompt of the model goes before each text, chosen by mteb's order: of task and side ("TASK-query"), of the task,
    of its type and side, of its type, of the side ("query", "document"). Where the model has none for queries, the
    task's own instruction does.

    With several processes all run the same tasks and get the same embeddings; the first one's cache is used.

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
        # mteb's encoders show a bar unless told otherwise.
        show = bool(kwargs.get("show_progress_bar", True)) and jax.process_index() == 0
        prompt, instruction = self._words(task_metadata, prompt_type)
        where = f"{task_metadata.name}: {hf_subset}/{hf_split}"
        items = (
            item
            for batch in inputs
            for item in batch_items(batch, where, prompt, instruction, self._frames)
        )
        vectors = [self._vectors(chunk, batch_size, show, where) for chunk in _chunks(items)]
        return np.concatenate([np.zeros((0, self._width), np.float32), *vectors])

    def prompts_of(self, task_metadata: Any) -> dict[str, str]:
        """What goes before the texts of a task.

        Args:
          task_metadata: of the task.

        Returns:
          "query_prompt" and "document_prompt", or "prompt" of a task without sides; only those that are not empty.
        """
        sides: dict[str, PromptType | None] = {"prompt": None}
        if task_metadata.simplified_task_type == "retrieval":
            sides = {f"{side.value}_prompt": side for side in PromptType}
        words = {name: "".join(self._words(task_metadata, side)) for name, side in sides.items()}
        return {name: text for name, text in words.items() if text}

    def _words(self, task_metadata: Any, prompt_type: PromptType | None) -> tuple[str, str]:
        """(prompt of the model, instruction of the task); one of them is empty."""
        name = get_prompt_name(self._prompts, task_metadata, prompt_type)
        if name is not None:
            return self._prompts[name], ""
        if prompt_type != PromptType.query:
            return "", ""
        return "", self.get_instruction(task_metadata, prompt_type)

    def _vectors(
        self, items: list[Item], batch_size: int | None, show: bool, where: str
    ) -> np.ndarray:
        def encode(chosen: Sequence[Item]) -> np.ndarray:
            return self._encode(chosen, batch_size=batch_size, show_progress=show)

        if jax.process_count() > 1:
            texts = digest(*(item.text.encode() for item in items)).hex()
            require_same({"items": [len(items), texts]}, f"{where}: all must read the same data")
        if self._cache is None:
            return encode(items)
        embedded = embed(encode, items, self._cache)
        found = np.zeros((len(items), self._width), np.float32)
        if embedded is not None:
            found = embedded.vectors[embedded.rows]
        return from_first_process(found)


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    chunk, pictures = [], 0
    for item in items:
        chunk.append(item)
        pictures += len(item.images)
        pictures += len(item.video) if isinstance(item.video, list) else 0
        if len(chunk) == _CHUNK_ITEMS or pictures >= _CHUNK_PICTURES:
            yield chunk
            chunk, pictures = [], 0
    if chunk:
        yield chunk


def batch_items(
    batch: Mapping[str, Sequence[Any]],
    name: str,
    prompt: str = "",
    instruction: str = "",
    frames: tuple[int, int] = (3, 32),
) -> list[Item]:
    """A batch of mteb's as items.

    Args:
      batch: columns; those other than `text`, `image` and `video` repeat the content in other forms, or are of a
        modality that the model has not (`audio`): mteb decides which tasks such a model may run. An image may be a list
        of images. A video is what torchcodec decodes, or its frames [n, C, H, W].
      name: where the batch comes from, for errors.
      prompt, instruction: as of `content`.
      frames: (frames of a second, most frames) that are taken of a video.

    Returns:
      One item a row of the batch.

    Raises:
      ValueError: the batch has neither text nor image nor video, or a row has both images and a video.
    """
    columns = [column for column in _MODALITIES if column in batch]
    if not columns:
        raise ValueError(
            f"{name}: inputs have columns {sorted(batch)}; this model takes {', '.join(_MODALITIES)}"
        )
    absent = [None] * len(batch[columns[0]])
    items = []
    for text, image, video in zip(*(batch.get(m, absent) for m in _MODALITIES), strict=True):
        images = image if isinstance(image, list | tuple) else [image]
        images = tuple(one for one in images if one is not None)
        if video is not None and images:
            raise ValueError(f"{name}: an input has both images and a video; this model takes one")
        kind, markers = ("image", len(images)) if video is None else ("video", 1)
        words = content(text or "", markers, prompt, instruction, kind)
        pictures = None if video is None else video_frames(video, name, *frames)
        items.append(Item(words, images, video=pictures, name=name))
    return items


def video_frames(video: Any, name: str, frames_per_second: int, max_frames: int) -> list[ImageLike]:
    """The frames of a video that the model sees.

    Args:
      video: a decoder of torchcodec, which has `get_frames_at` and `metadata`; or frames [n, C, H, W], uint8 or floats
        from 0 to 1, all of which are taken up to `max_frames`.
      name: where it comes from, for errors.
      frames_per_second: frames to take of each second, as the model was made for.
      max_frames: the most frames to take; 0: no limit.

    Returns:
      Images of mode "RGB".

    Raises:
      ValueError: it has no frames, or another form.
    """
    if hasattr(video, "get_frames_at"):
        pixels = _decoded(video, name, frames_per_second, max_frames)
    else:
        pixels = np.asarray(video)
        if max_frames and len(pixels) > max_frames:
            pixels = pixels[np.linspace(0, len(pixels) - 1, max_frames, dtype=int)]
    if pixels.ndim != 4 or not len(pixels) or pixels.shape[1] not in (1, 3):
        raise ValueError(
            f"{name}: a video must be frames [n, 3, H, W]; found an array {pixels.shape}"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.round(255 * np.clip(pixels, 0, 1))
    pixels = np.repeat(pixels, 3 // pixels.shape[1], 1).astype(np.uint8).transpose(0, 2, 3, 1)
    return [PIL.Image.fromarray(np.ascontiguousarray(frame)) for frame in pixels]


def _decoded(video: Any, name: str, frames_per_second: int, max_frames: int) -> np.ndarray:
    """Frames of a decoder. A file may announce more frames at its end than can be decoded: those count as absent."""
    rate = video.metadata.average_fps or frames_per_second
    limits = {"frames_per_second": frames_per_second, "max_frames": max_frames}
    for count in range(len(video), 0, -1):
        try:
            chosen = video.get_frames_at(indices=sample_frame_indices(count, rate, **limits))
            return np.asarray(chosen.data)
        except RuntimeError as error:
            if "no more frames" not in str(error):
                raise ValueError(f"{name}: a video cannot be decoded: {error}") from error
    raise ValueError(f"{name}: a video has no frame that can be decoded")


def content(
    text: str, markers: int, prompt: str = "", instruction: str = "", kind: str = "image"
) -> str:
    r"""User content in the form of MMEB's rows.

    >>> content("", 1)
    '<image>\nRepresent the given image.'
    >>> content("make it red", 1, instruction="Find an image with the described changes.")
    '<image>\nFind an image with the described changes: make it red'
    >>> content("make it red", 1, prompt="Change it: ")
    '<image>\nChange it: make it red'
    >>> content("<image> and <image>: what differs?", 2, prompt="Answer: ")
    '<image> Answer: and <image>: what differs?'
    >>> content("An <image> of HTML", 0)
    'An < image> of HTML'

    Args:
      text: of the item; "" for none. Its own markers count if there is one for each image, and are plain words if not.
      markers: images of the item, or 1 for its video.
      prompt: of the model, put before the text as it is.
      instruction: of the task, put before the text as a clause of its own, if there is no prompt.
      kind: what the markers stand for, "image" or "video".

    Returns:
      The content, with markers.
    """
    if instruction and not prompt:
        prompt = f"{instruction.rstrip(' .:')}: " if text else instruction
    if markers and chat.count_markers(text) == markers:
        start = chat.end_of_leading_markers(text)
        return text[:start] + prompt + text[start:]
    text = _MARKER.sub(r"< \1>", text)
    body = prompt + text if text else prompt.rstrip()
    if not markers:
        return body
    return f"{chat.IMAGE_MARKER}\n" * markers + (body or f"Represent the given {kind}.")
