"""`Embedder`: items in, embeddings out, in order. What most users need of this package.

Owns the model on its mesh, running batches and the order of the results. Items are read by
`reading.py`, sorted into batches by `shapes.py`; processes of a job keep in step by `lockstep.py`.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from llave_jax.common.progress import Progress
from llave_jax.embedding.compilation_cache import use_compilation_cache
from llave_jax.embedding.embedding_step import build_embedding_step, crop_cost
from llave_jax.embedding.lockstep import in_lockstep, merge_failures
from llave_jax.embedding.reading import ItemReader
from llave_jax.embedding.shapes import BatchShapes, IndexedBatch
from llave_jax.inputs.batch import Budget, PackedBatch, budget_of, empty_batch
from llave_jax.inputs.cuts import CutWarnings
from llave_jax.inputs.item import Item, ItemLike, as_item, refuse_paths, with_prompt
from llave_jax.inputs.sequence import SequenceBuilder, TokenSequence
from llave_jax.models.llave import Llave, attention_cases
from llave_jax.ops.attention_choice import choose
from llave_jax.parallel import sharding
from llave_jax.weights import model_dir
from llave_jax.weights.resolve import resolve_model


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
            model.config.input_spec, self._num_shards, tokens_per_batch, crop_cost(model.config)
        )
        step = build_embedding_step(model, self.mesh)
        self._step = jax.jit(lambda params, batch: step(params, batch)[:, 0])
        self._programs: dict[Budget, Any] = {}
        self._compiling = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        *,
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
          CheckpointError: there is no such model, or it is incomplete or of a form that is not known.
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
        params = model_dir.load_params(directory, mesh=mesh, dtype=jnp.dtype(dtype))
        options.setdefault("prompts", model_dir.load_prompts(directory))
        return cls(module, params, model_dir.load_tokenizer(directory), mesh, **options)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of the largest batch, over the devices of this process."""
        return self._num_shards * max(b.rows * b.row_length for b in self._shapes.ladder)

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
        item = as_item(item, "item")
        if not allow_paths:
            refuse_paths(item)
        sequence = self.builder(with_prompt(item, self._prompt(prompt_name, prompt)))
        with self._compiling:
            self._cuts.note(sequence)
        return sequence

    def _prompt(self, name: str | None, text: str | None) -> str:
        if text is not None:
            return text
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"prompt_name is {name!r:.80}; this model's prompts are: {known}")
        return self.prompts[name]

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

    def encode(
        self,
        items: ItemLike | Iterable[ItemLike],
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings of items, L2-normalised, in the order of the items.

        In a job of several processes all call this with the same items, and all get the result. An item
        that is longer than the model reads is cut at its end, with a warning.

        Args:
          items: one item, or any iterable of them; those of a generator are not kept in memory. An
            item is a text, an image, or a dict with any of `text`, `image`, `images`, `video`. Images
            and videos are paths or PIL images; a video may be a list of frames. Text is user content
            as in MMEB rows, with or without `<image>` markers. An image without a marker goes in
            front of the text. A marker whose image is None holds the authors' zero picture.
          batch_size: at most so many items in a batch and device; None: as many as fit.
          show_progress: show a progress bar (plain lines where there is no terminal).

        Returns:
          float32 [n, D]; [D] if `items` is one item.

        Raises:
          ValueError: an item is empty or cannot be read; it names the item.
        """
        if isinstance(items, _NOT_SEVERAL):
            return self.encode([cast(ItemLike, items)], batch_size, show_progress)[0]
        # With several processes, the others wait for this one's batches: all fail together at the end.
        stop = jax.process_count() == 1
        vectors, failures = self._encode(items, batch_size, show_progress, stop)
        for message in failures.values():
            raise ValueError(message)
        return vectors

    def encode_skipping(
        self, items: Iterable[ItemLike], batch_size: int | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """As `encode`, but an item that cannot be read does not stop it.

        Args:
          items, batch_size: as for `encode`.

        Returns:
          embeddings: float32 [n, D], zeros for items that cannot be read.
          failures: why an item cannot be read, by its index.
        """
        return self._encode(items, batch_size, show_progress=False, stop=False)

    def _encode(
        self, items: Iterable[ItemLike], batch_size: int | None, show_progress: bool, stop: bool
    ) -> tuple[np.ndarray, dict[int, str]]:
        total = len(items) if isinstance(items, Sized) else None
        result = np.zeros((total or 0, self.config.text.hidden_size), np.float32)
        reader = ItemReader(self.builder, self._cuts, stop=stop)
        batches = self._shapes.batches(reader.sequences(items), batch_size)
        if jax.process_count() > 1:
            batches = in_lockstep(batches, self._num_shards, self.config.input_spec.crop)
        with Progress(total, "encoding", enabled=show_progress) as progress:
            for vectors, indices in self._run(batches):
                filled = indices >= 0
                needed = int(indices.max(initial=-1)) + 1
                if needed > len(result):
                    result.resize((max(needed, 2 * len(result)), result.shape[1]), refcheck=False)
                result[indices[filled]] = vectors[filled]
                progress.update(int(filled.sum()))
        result.resize((reader.count, result.shape[1]), refcheck=False)
        return result, merge_failures(reader.failures)

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


# What `encode` takes for one item, or for one item given by mistake, rather than for several items.
_NOT_SEVERAL = (str, bytes, os.PathLike, PIL.Image.Image, Mapping, Item)
