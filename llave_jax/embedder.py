"""`Embedder`: items in, embeddings out, in order. What most users need of this package.

Reading and laying out items, sorting them into batches and putting the results back in order is
done here; the model is `models/llave.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Union

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.experimental import multihost_utils

from llave_jax import sharding
from llave_jax.inputs.item import Item
from llave_jax.inputs.packing import Budget, PackedBatch, Packer, Planner, empty_batch
from llave_jax.inputs.sequence import Sequence, SequenceBuilder
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave
from llave_jax.progress import Progress

ItemLike = Union[str, PIL.Image.Image, Mapping[str, Any], Item]

# Texts and captions are short: rows of this length cost least attention.
SHORT_ROW = 512


class Embedder:
    """A model with its parameters on a mesh.

    >>> model = Embedder.from_pretrained("converted/llave-0.5b")        # doctest: +SKIP
    >>> vectors = model.encode(["A cat and a dog", {"image": "cat.jpg"}])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Llave,
        params: Any,
        tokenizer: Any,
        mesh: jax.sharding.Mesh | None = None,
        *,
        tokens_per_batch: int = 16_384,
    ):
        """Args:
        model: the module; its config says how inputs are laid out.
        params: its parameter tree, on `mesh`.
        tokenizer: a Hugging Face fast tokenizer.
        mesh: None: all devices along `data`.
        tokens_per_batch: tokens a device works on at once; fewer need less memory.
        """
        self.model = model
        self.config = model.config
        self.params = params
        self.mesh = mesh or sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
        self.builder = SequenceBuilder(tokenizer, model.config)
        self._tokens_per_batch = tokens_per_batch

        def apply(params: Any, batch: PackedBatch) -> jax.Array:
            with sharding.use_mesh(self.mesh):
                return model.apply({"params": params}, batch)[:, 0]

        self._apply = jax.jit(apply, out_shardings=sharding.replicated(self.mesh))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        *,
        dtype: str | None = None,
        attention: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> Embedder:
        """Load a converted model directory, or the latest checkpoint of a training run.

        Args:
          directory: made by `tools/convert_hf.py`, or the `--workdir` of a run.
          dtype: of parameters and activations; None: bfloat16 on accelerators, float32 on CPUs.
          attention: implementation (`llave_jax.ops.attention`).
          max_length: tokens of the longest sequence; None: as the model was trained. Videos of 32
            frames need 8192.
        """
        from llave_jax import model_dir

        mesh = mesh or sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        config = model_dir.load_config(directory)
        if max_length is not None:
            inputs = dataclasses.replace(config.inputs, max_length=max_length)
            config = dataclasses.replace(config, inputs=inputs)
        model = Llave(
            config,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(dtype),
            attention=attention,
            vision_attention=attention,
            freeze_vision=True,
        )
        params = model_dir.load_params(directory, mesh=mesh, dtype=jnp.dtype(dtype))
        return cls(model, params, model_dir.load_tokenizer(directory), mesh, **options)

    def encode(
        self,
        items: Iterable[ItemLike],
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings of items: float32 [n, D], L2-normalised, in the items' order.

        In a job of several processes all call this with the same items, and all get the result.

        Args:
          items: each a text, an image, or a dict with any of `text`, `image`, `images`, `video`
            (paths or PIL images; a video may be a list of frames). Text is user content as in
            MMEB rows, with or without `<image>` markers; an image without one goes in front.
          batch_size: at most so many items in a batch and device; None: as many as fit.
          show_progress: show a progress bar (plain lines where there is no terminal).

        Raises:
          ValueError: an item cannot be read; it names the item.
        """
        items = [as_item(item, f"item {i}") for i, item in enumerate(items)]
        result = np.zeros((len(items), self.config.text.hidden_size), np.float32)
        # Each process reads its share of the items; all get all embeddings.
        share = range(jax.process_index(), len(items), jax.process_count())
        batches = self._batches(self._sequences(items, share), batch_size)
        if jax.process_count() > 1:
            batches = _in_step(batches, self._num_shards, self.config)
        with Progress(len(items), "encoding", enabled=show_progress) as progress:
            for packed, indices in batches:
                batch = sharding.device_put_batch(packed, self.mesh)
                vectors = np.asarray(self._apply(self.params, batch))
                filled = indices >= 0
                result[indices[filled]] = vectors[filled]
                progress.update(int(filled.sum()))
        return result

    def _sequences(self, items: list[Item], share: range) -> Iterator[tuple[int, Sequence]]:
        """Read and lay out items in threads, a bounded number ahead of the device."""
        workers = os.cpu_count() or 1
        waiting: collections.deque = collections.deque()
        with ThreadPoolExecutor(workers) as pool:
            for i in share:
                waiting.append((i, pool.submit(self.builder, items[i])))
                if len(waiting) > 4 * workers:
                    index, future = waiting.popleft()
                    yield index, future.result()
            for index, future in waiting:
                yield index, future.result()

    def _batches(
        self, sequences: Iterable[tuple[int, Sequence]], batch_size: int | None
    ) -> Iterator[Indexed]:
        """Sequences of a kind in batches of a fixed shape, the last ones in smaller ones."""
        packers: dict[Budget, Packer] = {}
        members: dict[Budget, list[tuple[int, Sequence]]] = collections.defaultdict(list)
        for index, sequence in sequences:
            budget = self._budget(sequence, batch_size)
            if budget not in packers:
                packers[budget] = Packer(budget, self._num_shards, self.config)
            if not packers[budget].add([sequence], str(index)):
                yield _emit(packers[budget])
                members[budget].clear()
                packers[budget].add([sequence], str(index))
            members[budget].append((index, sequence))
        for budget, rest in members.items():
            small = self._smallest([sequence for _, sequence in rest], budget)
            packer = Packer(small, self._num_shards, self.config)
            for index, sequence in rest:
                packer.add([sequence], str(index))
            yield _emit(packer)

    @property
    def _num_shards(self) -> int:
        return len(sharding.local_shards(self.mesh))

    def _budget(self, sequence: Sequence, batch_size: int | None) -> Budget:
        """The full-size batch for sequences of this one's kind."""
        longest = _power_of_two(self.config.inputs.max_length)
        has_crops = len(sequence.crops) > 0
        row_length = longest
        if not has_crops and len(sequence) <= SHORT_ROW:
            row_length = min(SHORT_ROW, longest)
        rows = max(1, self._tokens_per_batch // row_length)
        crops = 0
        if has_crops:
            # Tokens of a crop: at least those that pooling leaves, at most all its patches.
            patches = self.config.vision.num_patches
            crops = max(2 * rows * row_length // patches, _power_of_two(len(sequence.crops)))
        # The chat format alone has more than 16 tokens.
        groups = batch_size or rows * max(1, row_length // 16)
        return Budget(rows, row_length, crops, groups, sides=1, taps=sequence.taps.width)

    def _smallest(self, sequences: list[Sequence], full: Budget) -> Budget:
        """A budget that just holds all of these, from few enough shapes to compile each once."""
        lengths = [len(sequence) for sequence in sequences]
        crops = [len(sequence.crops) for sequence in sequences]
        # Crops cost most: up to 8 exactly, above in steps of 8.
        all_crops = sum(crops) if sum(crops) <= 8 else -(-sum(crops) // 8) * 8
        budget = dataclasses.replace(
            full,
            rows=1,
            row_length=min(full.row_length, _power_of_two(max(lengths), least=64)),
            crops=max(-(-all_crops // self._num_shards), max(crops)),
            groups=_power_of_two(-(-len(sequences) // self._num_shards)),
        )
        while True:
            planner = Planner(budget, self._num_shards)
            sizes = zip(lengths, crops, strict=True)
            if all(planner.place([length], c) is not None for length, c in sizes):
                return budget
            budget = dataclasses.replace(
                budget,
                rows=2 * budget.rows,
                crops=min(all_crops, 2 * budget.crops),
                groups=2 * budget.groups if self._num_shards > 1 else budget.groups,
            )


class Indexed(NamedTuple):
    """A batch, and which item each of its slots holds: int [S, G], -1 where empty."""

    packed: PackedBatch
    indices: np.ndarray


def _emit(packer: Packer) -> Indexed:
    packed, ids = packer.emit()
    indices = [[int(index) if index else -1 for index in shard] for shard in ids]
    return Indexed(packed, np.array(indices, np.int32))


def _in_step(batches: Iterator[Indexed], num_shards: int, config: LlaveConfig) -> Iterator[Indexed]:
    """Batches of the same shapes, and as many of them, in every process.

    In each round the first process that has something left decides the shape; the others join
    with a batch of that shape or an empty one. Indices are those of all processes' shards.
    """
    waiting = next(batches, None)
    while True:
        offers = multihost_utils.process_allgather(_shape_of(waiting))
        offers = offers[offers.any(axis=1)]
        if not len(offers):
            return
        shape = offers[0]
        if waiting is not None and np.array_equal(_shape_of(waiting), shape):
            packed, indices = waiting
            waiting = next(batches, None)
        else:
            budget = Budget(*map(int, shape[:-2]), sides=1, taps=int(shape[-1]))
            vision = config.vision
            packed = empty_batch(budget, num_shards, vision.num_patches, vision.patch_dim)
            indices = np.full((num_shards, budget.groups), -1, np.int32)
        everyone = multihost_utils.process_allgather(indices)
        yield Indexed(packed, everyone.reshape(-1, everyone.shape[-1]))


def _shape_of(batch: Indexed | None) -> np.ndarray:
    """rows, row length, crops, groups, sides, taps; zeros for None."""
    if batch is None:
        return np.zeros(6, np.int32)
    packed = batch.packed
    rows, length, taps = packed.tap_index.shape[1:]
    crops, groups = packed.patches.shape[1], packed.valid.shape[1]
    return np.array([rows, length, crops, groups, 1, taps], np.int32)


def as_item(item: ItemLike, name: str) -> Item:
    """Any form of item that `Embedder.encode` takes, as an Item."""
    if isinstance(item, Item):
        return item
    if isinstance(item, str):
        return Item(item, name=name)
    if isinstance(item, PIL.Image.Image):
        return Item(images=(item,), name=name)
    if not isinstance(item, Mapping):
        raise ValueError(
            f"{name}: is {type(item).__name__}; expected a text, an image, or a dict with any of "
            "text, image, images, video"
        )
    unknown = set(item) - {"text", "image", "images", "video"}
    if unknown:
        raise ValueError(
            f"{name}: unknown key(s) {sorted(unknown)}; known are text, image, images, video"
        )
    if item.get("image") is not None and item.get("images"):
        raise ValueError(f"{name}: has both image and images; give one")
    images = tuple(item.get("images") or ())
    if item.get("image") is not None:
        images = (item["image"],)
    text = item.get("text") or ""
    if not isinstance(text, str):
        raise ValueError(f"{name}: text is {type(text).__name__}; expected a string")
    return Item(text, images=images, video=item.get("video"), name=name)


def _power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length()) if n else least
