"""`Embedder`: items in, embeddings out, in order. What most users need of this package.

Reading and laying out items, sorting them into batches and putting the results back in order is
done here; the model is `models/llave.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.experimental import multihost_utils

from llave_jax.common.progress import Progress
from llave_jax.embedding.embedding_step import build_embedding_step
from llave_jax.inputs.batch import Budget, PackedBatch, empty_batch
from llave_jax.inputs.cuts import CutWarnings
from llave_jax.inputs.item import Item, ItemLike, as_item
from llave_jax.inputs.packing import Packer, Planner
from llave_jax.inputs.sequence import SequenceBuilder, TokenSequence
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave
from llave_jax.ops.attention import on_mesh
from llave_jax.parallel import sharding

# Rows for texts: (longest text, row length). Plain attention costs as much as a row is long, and
# texts of at most half a row fill it well.
TEXT_ROWS = ((64, 128), (512, 512))
# Texts that a thread lays out in one go: fewer cost more in handing them over.
TEXTS_AT_ONCE = 64
# After so many full batches of a kind, the rest of its items takes a full batch as well: that costs
# less than compiling a program for it.
FULL_BATCHES_BEFORE_REST = 4


class Embedder:
    """A model with its parameters on a mesh.

    >>> model = Embedder.from_pretrained("converted/llave-0.5b")        # doctest: +SKIP
    >>> vectors = model.encode(["A cat and a dog", {"image": "cat.jpg"}])  # doctest: +SKIP
    >>> model.encode("A cat and a dog").shape                              # doctest: +SKIP
    (896,)
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
        self.builder = SequenceBuilder(tokenizer, model.config.input_spec)
        self._cuts = CutWarnings()
        self._tokens_per_batch = tokens_per_batch
        self._apply = build_embedding_step(model, self.mesh)

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
        from llave_jax.weights import model_dir

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
            attention=on_mesh(attention, mesh),
            vision_attention=on_mesh(attention, mesh),
            freeze_vision=True,
        )
        params = model_dir.load_params(directory, mesh=mesh, dtype=jnp.dtype(dtype))
        return cls(model, params, model_dir.load_tokenizer(directory), mesh, **options)

    def encode(
        self,
        items: ItemLike | Iterable[ItemLike],
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings of items: float32 [n, D], L2-normalised, in the items' order; [D] for one item.

        In a job of several processes all call this with the same items, and all get the result. An item
        that is longer than the model reads is cut at its end, with a warning.

        Args:
          items: one item, or any iterable of them (a generator's are not kept in memory). An item
            is a text, an image, or a dict with any of `text`, `image`, `images`, `video` (paths or
            PIL images; a video may be a list of frames). Text is user content as in MMEB rows, with
            or without `<image>` markers; an image without one goes in front, and a marker whose
            image is None holds the authors' zero picture.
          batch_size: at most so many items in a batch and device; None: as many as fit.
          show_progress: show a progress bar (plain lines where there is no terminal).

        Raises:
          ValueError: an item is empty or cannot be read; it names the item.
        """
        if isinstance(items, _NOT_SEVERAL):
            return self.encode([items], batch_size, show_progress)[0]
        # In several processes the others wait for this one's batches: they fail together, at the end.
        stop = jax.process_count() == 1
        vectors, failures = self._encode(items, batch_size, show_progress, stop)
        for message in failures.values():
            raise ValueError(message)
        return vectors

    def encode_skipping(
        self, items: Iterable[ItemLike], batch_size: int | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """As `encode`, but unreadable items do not stop it.

        Returns:
          float32 [n, D], zeros for items that cannot be read; and why, by the item's index.
        """
        return self._encode(items, batch_size, show_progress=False, stop=False)

    def _encode(
        self, items: Iterable[ItemLike], batch_size: int | None, show_progress: bool, stop: bool
    ) -> tuple[np.ndarray, dict[int, str]]:
        total = len(items) if isinstance(items, Sized) else None
        result = np.zeros((total or 0, self.config.text.hidden_size), np.float32)
        work = _Work(stop=stop)
        batches = self._batches(self._sequences(items, work), batch_size)
        if jax.process_count() > 1:
            batches = _in_step(batches, self._num_shards, self.config)
        with Progress(total, "encoding", enabled=show_progress) as progress:
            for vectors, indices in self._run(batches):
                filled = indices >= 0
                needed = int(indices.max(initial=-1)) + 1
                if needed > len(result):
                    result.resize((max(needed, 2 * len(result)), result.shape[1]), refcheck=False)
                result[indices[filled]] = vectors[filled]
                progress.update(int(filled.sum()))
        result.resize((work.count, result.shape[1]), refcheck=False)
        return result, _of_all_processes(work.failures)

    def _run(self, batches: Iterator[Indexed]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Vectors and indices of each batch; the device works on one while the next is filled."""
        running: tuple[jax.Array, np.ndarray] | None = None
        for packed, indices in batches:
            vectors = self._apply(self.params, sharding.device_put_batch(packed, self.mesh))
            if running is not None:
                yield np.asarray(running[0])[:, 0], running[1]
            running = vectors, indices
        if running is not None:
            yield np.asarray(running[0])[:, 0], running[1]

    def _sequences(
        self, items: Iterable[ItemLike], work: _Work
    ) -> Iterator[tuple[int, TokenSequence]]:
        """Read and lay out this process's share of the items, in threads, a bounded number ahead."""
        workers = os.cpu_count() or 1
        waiting: collections.deque = collections.deque()
        with ThreadPoolExecutor(workers) as pool:
            for group in _groups(items, work):
                waiting.append(pool.submit(self._lay_out, group, work))
                if len(waiting) > 4 * workers:
                    yield from self._checked(waiting.popleft().result())
            while waiting:
                yield from self._checked(waiting.popleft().result())
        self._cuts.report()

    def _checked(self, group: list[tuple[int, TokenSequence]]) -> list[tuple[int, TokenSequence]]:
        for _, sequence in group:
            self._cuts.note(sequence)
        return group

    def _lay_out(
        self, group: list[tuple[int, Item]], work: _Work
    ) -> list[tuple[int, TokenSequence]]:
        sequences = []
        for index, item in group:
            try:
                sequences.append((index, self.builder(item)))
            except ValueError as error:
                work.fail(index, error)
        return sequences

    def _batches(
        self, sequences: Iterable[tuple[int, TokenSequence]], batch_size: int | None
    ) -> Iterator[Indexed]:
        """Sequences of a kind in batches of a fixed shape, the last ones in smaller ones."""
        packers: dict[Budget, Packer] = {}
        members: dict[Budget, list[tuple[int, TokenSequence]]] = collections.defaultdict(list)
        emitted: collections.Counter[Budget] = collections.Counter()
        budgets: dict[tuple[int, int, int], Budget] = {}
        for index, sequence in sequences:
            kind = self._kind(sequence)
            if kind not in budgets:
                budgets[kind] = self._budget(*kind, batch_size)
            budget = budgets[kind]
            if budget not in packers:
                packers[budget] = Packer(budget, self._num_shards, self.config.vision.crop)
            if not packers[budget].add([sequence], str(index)):
                yield _emit(packers[budget])
                emitted[budget] += 1
                members[budget].clear()
                packers[budget].add([sequence], str(index))
            members[budget].append((index, sequence))
        for budget, rest in members.items():
            packer = packers[budget]
            if emitted[budget] < FULL_BATCHES_BEFORE_REST:
                small = self._smallest([sequence for _, sequence in rest], budget)
                packer = Packer(small, self._num_shards, self.config.vision.crop)
                for index, sequence in rest:
                    packer.add([sequence], str(index))
            yield _emit(packer)

    @property
    def _num_shards(self) -> int:
        return len(sharding.local_shards(self.mesh))

    def _kind(self, sequence: TokenSequence) -> tuple[int, int, int]:
        """What decides a sequence's batch: row length, room for crops (0: none), width of taps."""
        longest = _power_of_two(self.config.inputs.max_length)
        crops = len(sequence.crops)
        if crops:
            return longest, _power_of_two(crops), sequence.taps.width
        row_length = next((row for most, row in TEXT_ROWS if len(sequence) <= most), longest)
        return min(row_length, longest), 0, sequence.taps.width

    def _budget(self, row_length: int, crops: int, taps: int, batch_size: int | None) -> Budget:
        """The full-size batch for sequences of a kind."""
        rows = max(1, self._tokens_per_batch // row_length)
        if crops:
            # Tokens of a crop: at least those that pooling leaves, at most all its patches.
            patches = self.config.vision.num_patches
            crops = max(2 * rows * row_length // patches, crops)
        # The chat format alone has more than 16 tokens.
        groups = batch_size or rows * max(1, row_length // 16)
        return Budget(rows, row_length, crops, groups, sides=1, taps=taps)

    def _smallest(self, sequences: list[TokenSequence], full: Budget) -> Budget:
        """A budget that just holds all of these, from few enough shapes to compile each once."""
        lengths = [len(sequence) for sequence in sequences]
        crops = [len(sequence.crops) for sequence in sequences]
        # Crops cost most: up to 8 exactly, above in steps of 8.
        all_crops = sum(crops) if sum(crops) <= 8 else -(-sum(crops) // 8) * 8
        row_length = min(full.row_length, _power_of_two(max(lengths), least=64))
        num_crops = max(-(-all_crops // self._num_shards), max(crops))
        rows = 1
        while True:
            # Slots in proportion to rows: fewer shapes than with as many as there are items.
            slots = max(1, full.groups * rows // full.rows)
            budget = Budget(rows, row_length, num_crops, slots, sides=1, taps=full.taps)
            planner = Planner(budget, self._num_shards)
            sizes = zip(lengths, crops, strict=True)
            if all(planner.place([length], c) is not None for length, c in sizes):
                return budget
            rows, num_crops = 2 * rows, min(all_crops, 2 * num_crops)


class _Work:
    """What is known of the items while they are read: how many there are, and which cannot be."""

    def __init__(self, stop: bool):
        self.count = 0
        self.failures: dict[int, str] = {}
        self._stop = stop

    def fail(self, index: int, error: ValueError) -> None:
        """Remember that an item cannot be read, or raise."""
        if self._stop:
            raise error
        self.failures[index] = str(error)


def _groups(items: Iterable[ItemLike], work: _Work) -> Iterator[list[tuple[int, Item]]]:
    """This process's items in the groups that threads work on: several texts, or one other item."""
    texts: list[tuple[int, Item]] = []
    for index, value in enumerate(items):
        work.count = index + 1
        if index % jax.process_count() != jax.process_index():
            continue
        try:
            item = as_item(value, f"item {index}")
        except ValueError as error:
            work.fail(index, error)
            continue
        if item.images or item.video is not None:
            yield [(index, item)]
            continue
        texts.append((index, item))
        if len(texts) == TEXTS_AT_ONCE:
            yield texts
            texts = []
    if texts:
        yield texts


def _of_all_processes(failures: dict[int, str]) -> dict[int, str]:
    """What failed in any process, by the item's index, in order; the same in all."""
    if jax.process_count() > 1:
        encoded = np.frombuffer(json.dumps(failures).encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.int32(len(encoded)))
        padded = np.full(sizes.max(), ord(" "), np.uint8)
        padded[: len(encoded)] = encoded
        everyone = multihost_utils.process_allgather(padded)
        failures = {int(i): m for row in everyone for i, m in json.loads(row.tobytes()).items()}
    return dict(sorted(failures.items()))


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
            packed = empty_batch(budget, num_shards, vision.crop)
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


# What `encode` takes for one item, or for a slip, rather than for several items.
_NOT_SEVERAL = (str, bytes, os.PathLike, PIL.Image.Image, Mapping, Item)


def _power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length()) if n else least
