"""`Embedder`: items in, embeddings out, in order. What most users need of this package.

Owns the model on its mesh, running batches and the order of the results. Items are read by
`reading.py`, sorted into batches by `shapes.py`; processes of a job keep in step by `lockstep.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, cast, overload

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.common.fetch import Fetcher
from llave_jax.common.progress import Progress
from llave_jax.embedding.compilation_cache import use_compilation_cache
from llave_jax.embedding.embedding_step import build_embedding_step, model_costs
from llave_jax.embedding.lockstep import in_lockstep, merge_failures
from llave_jax.embedding.precision import normalised, quantise, truncate
from llave_jax.embedding.reading import ItemReader
from llave_jax.embedding.shapes import BatchShapes, IndexedBatch
from llave_jax.inputs.batch import Budget, PackedBatch, budget_of, empty_batch
from llave_jax.inputs.cuts import CutWarnings
from llave_jax.inputs.item import ItemLike, refuse_paths, with_prompt
from llave_jax.inputs.item_forms import Fetch, is_one_item, read_item
from llave_jax.inputs.sequence import SequenceBuilder, TokenSequence
from llave_jax.models.llave import Llave, attention_cases
from llave_jax.ops.attention_choice import choose
from llave_jax.parallel import sharding
from llave_jax.weights import model_dir
from llave_jax.weights.prompts import DOCUMENT_NAMES, find_prompt
from llave_jax.weights.resolve import resolve_model

log = logging.getLogger(__name__)


class Embedder:
    """A model with its parameters on a mesh.

    >>> model = Embedder.from_pretrained("converted/llave-0.5b")        # doctest: +SKIP
    >>> vectors = model.encode(["A cat and a dog", {"image": "cat.jpg"}])  # doctest: +SKIP
    >>> model.encode("A cat and a dog").shape                              # doctest: +SKIP
    (896,)

    Args:
      model: the module; its config says how inputs are laid out.
      params: its parameter tree, on `mesh`.
      tokenizer: a Hugging Face fast tokenizer.
      mesh: the devices to run on; None: all of them along `data`.
      tokens_per_batch: tokens a device works on at once; fewer need less memory.
      prompts: named prompts: name -> text.
    """

    def __init__(
        self,
        model: Llave,
        params: Any,
        tokenizer: Any,
        mesh: jax.sharding.Mesh | None = None,
        *,
        tokens_per_batch: int = 16_384,
        prompts: Mapping[str, str] | None = None,
    ):
        self.model = model
        self.config = model.config
        self.params = params
        self.mesh = mesh or sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
        self.builder = SequenceBuilder(tokenizer, model.config.input_spec)
        self.prompts = dict(prompts or {})
        self._cuts = CutWarnings()
        self._num_shards = len(sharding.local_shards(self.mesh))
        self._shapes = BatchShapes(
            model.config.input_spec, self._num_shards, tokens_per_batch, model_costs(model.config)
        )
        step = build_embedding_step(model, self.mesh)
        self._step = jax.jit(lambda params, batch: step(params, batch)[:, 0])
        self._programs: dict[Budget, Any] = {}
        self._compiling, self._noting = threading.Lock(), threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        *,
        adapter: str | os.PathLike | None = None,
        dtype: str | None = None,
        attention: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> Embedder:
        """Load a model from the disk, or from the Hugging Face hub.

        Args:
          model: a model directory; the `--workdir` of a training run, whose latest checkpoint is taken; a
            Hugging Face checkpoint, as a directory or as its name on the hub, `org/name` or
            `org/name@revision`. The last two are converted once and kept (`weights.resolve`).
          adapter: a LoRA that is added to the model's weights: a directory in the format of the peft library, or
            a run that trained adapters on this model. A run as `model` has its own already.
          dtype: of parameters and activations; None: bfloat16 on accelerators, float32 on CPUs.
          attention: implementation (`llave_jax.ops.attention`); "auto": the one for the devices, checked
            against the reference first on a kind of device that is new (`ops.attention_choice`).
          mesh: where the parameters go; None: all devices along `data`.
          max_length: tokens of the longest sequence; None: as the model was trained. Videos of 32
            frames need 8192.
          options: further arguments of the constructor.

        Returns:
          The embedder, with the parameters on the mesh.

        Raises:
          CheckpointError: there is no such model, or it is incomplete or of a form that is not known; or the
            adapter is, or does not belong to it.
        """
        use_compilation_cache()
        directory = resolve_model(model)
        mesh = mesh or sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        config = model_dir.load_config(directory)
        if max_length is not None:
            inputs = dataclasses.replace(config.inputs, max_length=max_length)
            config = dataclasses.replace(config, inputs=inputs)
        packed, crops = attention_cases(config, dtype)
        module = Llave(
            config,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(dtype),
            attention=choose(attention, mesh, packed),
            vision_attention=choose(attention, mesh, crops),
            freeze_vision=True,
        )
        params = model_dir.load_params(
            directory, mesh=mesh, dtype=jnp.dtype(dtype), adapter=adapter
        )
        options.setdefault("prompts", model_dir.load_prompts(directory))
        return cls(module, params, model_dir.load_tokenizer(directory), mesh, **options)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of the largest batch, over the devices of this process."""
        return self._shapes.tokens

    def prepare(
        self,
        item: ItemLike,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        allow_paths: bool = True,
    ) -> TokenSequence:
        """Reads an item and lays it out. Any number of threads may do so.

        Args:
          item: as for `encode`; errors name an `Item` by its name.
          prompt_name: one of `prompts`, if no prompt is given.
          prompt: goes before the item's text, behind the image markers at its start.
          allow_paths: whether images and videos may be files of this machine.

        Returns:
          What `pack` takes.

        Raises:
          ValueError: the item is empty, cannot be read, or names a file that it may not; or there is no such
            prompt.
        """
        item = read_item(item, "item")
        if not allow_paths:
            refuse_paths(item)
        sequence = self.builder(with_prompt(item, self._prompt(prompt_name, prompt)))
        with self._noting:
            self._cuts.note(sequence)
        return sequence

    def _prompt(self, name: str | None, text: str | None) -> str:
        return find_prompt(self.prompts, name, text)

    def pack(self, sequences: Sequence[TokenSequence]) -> IndexedBatch:
        """One batch, of a shape of the ladder.

        Args:
          sequences: at least one. The first is in the batch, and of the others, in order, those that have
            room. A batch whose first sequence is a text has texts only.

        Returns:
          The batch, and int32 [S, G]: the index of the sequence in each slot, -1 where a slot is empty.

        Raises:
          ValueError: there are no sequences.
        """
        return self._shapes.pack(sequences)

    def forward(self, batch: PackedBatch) -> jax.Array:
        """Starts the device on a batch. Its program is compiled if this is the first batch of its shape.

        Args:
          batch: of `pack`.

        Returns:
          float32 [S, G, D], L2-normalised, without meaning in empty slots. `np.asarray` waits for it.
        """
        program = self._program(budget_of(batch))
        return program(self.params, sharding.device_put_batch(batch, self.mesh))

    def warm_up(self, *, show_progress: bool = False) -> None:
        """Compiles every shape that batches have, unless it is known: afterwards nothing compiles.

        Nothing is run, so this takes no memory of the device beyond the parameters. Programs that an earlier
        process has compiled are read from the disk (`compilation_cache`).

        Args:
          show_progress: show a progress bar (plain lines where there is no terminal).
        """
        ladder = self._shapes.ladder
        with Progress(len(ladder), "compiling", enabled=show_progress) as progress:
            for budget in ladder:
                self._program(budget)
                progress.update(1)

    def _program(self, budget: Budget) -> Any:
        with self._compiling:
            if budget not in self._programs:
                batch = empty_batch(budget, self._num_shards, self.config.input_spec.crop)
                shapes = sharding.abstract_batch(batch, self.mesh)
                self._programs[budget] = self._step.lower(self.params, shapes).compile()
            return self._programs[budget]

    @overload
    def encode(
        self,
        items: ItemLike | Iterable[ItemLike],
        batch_size: int | None = ...,
        show_progress: bool = ...,
        *,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        truncate_dim: int | None = ...,
        precision: str = ...,
        on_error: Literal["raise"] = ...,
        show_progress_bar: bool | None = ...,
        allow_urls: bool | Fetch = ...,
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        items: ItemLike | Iterable[ItemLike],
        batch_size: int | None = ...,
        show_progress: bool = ...,
        *,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        truncate_dim: int | None = ...,
        precision: str = ...,
        on_error: Literal["skip"],
        show_progress_bar: bool | None = ...,
        allow_urls: bool | Fetch = ...,
    ) -> tuple[np.ndarray, dict[int, str]]: ...

    def encode(
        self,
        items: ItemLike | Iterable[ItemLike],
        batch_size: int | None = None,
        show_progress: bool = False,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        on_error: Literal["raise", "skip"] = "raise",
        show_progress_bar: bool | None = None,
        allow_urls: bool | Fetch = False,
    ) -> np.ndarray | tuple[np.ndarray, dict[int, str]]:
        """Embeddings of items, L2-normalised, in the order of the items.

        In a job of several processes all call this with the same items, and all get the result. An item
        that is longer than the model reads is cut at its end, with a warning.

        Args:
          items: one item, or any iterable of them; those of a generator are not kept in memory. An
            item is a text, an image, or a dict with any of `text`, `image`, `images`, `video`; or a list of
            chat messages (`item_forms.read_item`). An image is a `pathlib.Path`, bytes, pixels (uint8 [H, W, 3])
            or of Pillow, in a dict also a path as string or a data URI; a video is a path or a list of frames. A
            plain string is a text. Text is user content as in MMEB rows, with or without `<image>` markers. An
            image without a marker goes in front of the text. A marker whose image is None holds the authors'
            zero picture.
          batch_size: at most so many items in a batch and device; None: as many as fit.
          show_progress: show a progress bar (plain lines where there is no terminal).
          prompt_name: one of `prompts`, if no prompt is given.
          prompt: goes before each item's text, behind the image markers at its start.
          truncate_dim: keep only the first numbers of each vector, L2-normalised again; None: all.
          precision: float32, float16, int8 or binary, as of `precision.quantise`.
          on_error: "raise" at the first item that cannot be read, or "skip" such items.
          show_progress_bar: another name of `show_progress`.
          allow_urls: whether images may be http(s) URLs, which are fetched from public addresses only; or what
            fetches them (`common.fetch.Fetcher` limits the hosts).

        Returns:
          float32 [n, D] (or what `truncate_dim` and `precision` make of it); [D] if `items` is one item. With
          `on_error="skip"`, these vectors, of zeros for what was skipped, and why: index of the item -> reason.

        Raises:
          ValueError: an item is empty or cannot be read (it is named), or an argument is not possible.
        """
        options = _Options(
            self._prompt(prompt_name, prompt),
            truncate_dim,
            precision,
            on_error,
            self.config.text.hidden_size,
            Fetcher(None) if allow_urls is True else allow_urls or None,
        )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected a positive number, or None")
        single = is_one_item(items)
        several = cast(Iterable[ItemLike], [items] if single else items)
        show = show_progress or bool(show_progress_bar)
        vectors, failures = self._encode(several, batch_size, show, options)
        if on_error == "raise":
            for message in failures.values():
                raise ValueError(message)
        vectors = vectors[0] if single else vectors
        return vectors if on_error == "raise" else (vectors, failures)

    def encode_query(self, items: ItemLike | Iterable[ItemLike], **options: Any) -> Any:
        """`encode` with the prompt `query`, if the model has one and no other is given.

        Args:
          items, options: as for `encode`.

        Returns:
          As `encode`.
        """
        return self.encode(items, **self._with_prompt(options, ("query",)))

    def encode_document(self, items: ItemLike | Iterable[ItemLike], **options: Any) -> Any:
        """`encode` with the prompt `document`, `passage` or `corpus`: the first that the model has, if no other is given.

        Args:
          items, options: as for `encode`.

        Returns:
          As `encode`.
        """
        return self.encode(items, **self._with_prompt(options, DOCUMENT_NAMES))

    def _with_prompt(self, options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt_name"] = next((name for name in names if name in self.prompts), None)
        return options

    def encode_stream(
        self,
        items: Iterable[ItemLike],
        batch_size: int | None = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        on_error: Literal["raise", "skip"] = "raise",
        allow_urls: bool | Fetch = False,
    ) -> Iterator[np.ndarray | None]:
        """Embeddings of items, one by one and in their order, while items come.

        It is for iterables of any length, also without end: the items that are read but not yet
        answered are a bounded number, those of a few batches. They are answered when these have come, so what
        waits for a vector before it gives the next item waits for ever.

        Args:
          items: any iterable of items, as for `encode`.
          batch_size, prompt_name, prompt, truncate_dim, precision, allow_urls: as for `encode`.
          on_error: "raise", or "skip": a warning, and None in the place of the vector.

        Yields:
          A vector for each item, as a row of what `encode` returns.

        Raises:
          ValueError: as `encode`, after the vectors of the items before the one that cannot be read; or there
            are several processes.
        """
        if is_one_item(items):
            raise ValueError("encode_stream takes an iterable of items; this is one item")
        if jax.process_count() > 1:
            raise ValueError("encode_stream runs in one process; encode runs in all of a job")
        options = _Options(
            self._prompt(prompt_name, prompt),
            truncate_dim,
            precision,
            on_error,
            self.config.text.hidden_size,
            Fetcher(None) if allow_urls is True else allow_urls or None,
        )
        reader = self._reader(options, stop=False)
        done: dict[int, np.ndarray] = {}
        following = 0

        def ready() -> Iterator[np.ndarray | None]:
            nonlocal following
            while True:
                if following in done:
                    yield done.pop(following)
                elif following in reader.failures:
                    reason = reader.failures.pop(following)
                    if on_error == "raise":
                        raise ValueError(reason)
                    log.warning("skipped: %s", reason)
                    yield None
                else:
                    return
                following += 1

        for vectors, indices in self._run(
            self._shapes.batches(reader.sequences(items), batch_size)
        ):
            filled = indices >= 0
            done.update(zip(indices[filled].tolist(), options(vectors[filled]), strict=True))
            yield from ready()
        yield from ready()

    @staticmethod
    def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Cosines of all pairs of vectors.

        Args:
          first: [n, D] or [D], in any precision but binary.
          second: [m, D] or [D].

        Returns:
          float32 [n, m].
        """
        first, second = (np.atleast_2d(_unit(vectors)) for vectors in (first, second))
        return first @ second.T

    @staticmethod
    def similarity_pairwise(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Cosines of vectors with those in the same place.

        Args:
          first, second: [n, D], in any precision but binary.

        Returns:
          float32 [n].
        """
        return (_unit(first) * _unit(second)).sum(axis=-1)

    def _reader(self, options: _Options, stop: bool) -> ItemReader:
        return ItemReader(
            self.builder, self._cuts, stop=stop, prompt=options.prompt, fetch=options.fetch
        )

    def _encode(
        self,
        items: Iterable[ItemLike],
        batch_size: int | None,
        show_progress: bool,
        options: _Options,
    ) -> tuple[np.ndarray, dict[int, str]]:
        total = len(items) if isinstance(items, Sized) else None
        empty = options(np.zeros((1, self.config.text.hidden_size), np.float32))
        result = np.repeat(empty, total or 0, axis=0)
        # With several processes, the others wait for this one's batches: all fail together at the end.
        stop = options.on_error == "raise" and jax.process_count() == 1
        reader = self._reader(options, stop)
        batches = self._shapes.batches(reader.sequences(items), batch_size)
        if jax.process_count() > 1:
            batches = in_lockstep(batches, self._num_shards, self.config.input_spec.crop)
        with Progress(total, "encoding", enabled=show_progress) as progress:
            for vectors, indices in self._run(batches):
                filled = indices >= 0
                needed = int(indices.max(initial=-1)) + 1
                if needed > len(result):
                    more = max(needed, 2 * len(result)) - len(result)
                    result = np.concatenate([result, np.repeat(empty, more, axis=0)])
                result[indices[filled]] = options(vectors[filled])
                progress.update(int(filled.sum()))
        if reader.count > len(result):
            # The last items could not be read.
            more = reader.count - len(result)
            result = np.concatenate([result, np.repeat(empty, more, axis=0)])
        return result[: reader.count], merge_failures(reader.failures)

    def _run(self, batches: Iterator[IndexedBatch]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Embeddings [S, G, D] and item indices [S, G] of each batch.

        One batch is on the device while the next one is filled.
        """
        running: tuple[jax.Array, np.ndarray] | None = None
        for packed, indices in batches:
            vectors = self.forward(packed)
            if running is not None:
                yield np.asarray(running[0]), running[1]
            running = vectors, indices
        if running is not None:
            yield np.asarray(running[0]), running[1]


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is asked for beside the items; called with float32 [n, D], it gives what the user gets.

    Raises:
      ValueError: an option is not possible.
    """

    prompt: str
    truncate_dim: int | None
    precision: str
    on_error: str
    dimension: int
    fetch: Fetch | None

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {self.on_error!r}; expected raise or skip")
        self(np.ones((1, self.dimension), np.float32))

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        return quantise(truncate(vectors, self.truncate_dim), self.precision)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return normalised(np.asarray(vectors).astype(np.float32))
