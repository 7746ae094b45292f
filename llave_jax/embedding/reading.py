"""Items as users give them to token sequences: in threads, a bounded number ahead of the device.

Owns this process's share of the items and what is wrong with them. What an item is, and how it is
laid out, is `inputs/`.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from llave_jax.common.text import shortened
from llave_jax.inputs.cuts import CutWarnings
from llave_jax.inputs.item import ItemLike, with_prompt
from llave_jax.inputs.item_forms import Fetch, is_text, read_item
from llave_jax.inputs.sequence import SequenceBuilder, TokenSequence

# Texts in one task of a thread: with fewer, handing tasks over costs more than the work in them.
TEXTS_PER_TASK = 64
# Tasks for each thread that wait or run: what is held of a generator's items.
_TASKS_AHEAD = 4


class ItemReader:
    """One reading of items.

    Attributes:
      count: items that were looked at, in all processes.
      failures: why an item of this process cannot be read, by the item's index.

    Args:
      builder: lays items out.
      cuts: counts the items that are cut at the model's length, and warns.
      stop: an item that cannot be read raises; otherwise it goes to `failures`.
      prompt: goes before each item's text; "" for none.
      fetch: reads URLs; None: they are refused.
    """

    def __init__(
        self,
        builder: SequenceBuilder,
        cuts: CutWarnings,
        *,
        stop: bool,
        prompt: str = "",
        fetch: Fetch | None = None,
    ):
        self.count = 0
        self.failures: dict[int, str] = {}
        self._builder = builder
        self._cuts = cuts
        self._stop = stop
        self._prompt = prompt
        self._fetch = fetch

    def sequences(self, items: Iterable[ItemLike]) -> Iterator[tuple[int, TokenSequence]]:
        """Read and lay out this process's share of the items.

        Args:
          items: all items of the job, the same in each process. Of a sequence this process looks at its
            own items only, so that one may read files when it is asked for an item.

        Yields:
          (index of the item, its sequence), in order.

        Raises:
          ValueError: with `stop`, an item cannot be read; it names the item.
        """
        if jax.process_count() == 1 and isinstance(items, Sequence) and len(items) == 1:
            # Threads would take longer to start than most single items to read.
            for group in self._groups(items):
                for index, sequence in self._lay_out(group):
                    self._cuts.note(sequence)
                    yield index, sequence
            self._cuts.report()
            return
        workers = os.cpu_count() or 1
        tasks: collections.deque[Future[list[tuple[int, TokenSequence]]]] = collections.deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for group in self._groups(items):
                    tasks.append(pool.submit(self._lay_out, group))
                    if len(tasks) > _TASKS_AHEAD * workers:
                        yield from self._finished(tasks.popleft())
                while tasks:
                    yield from self._finished(tasks.popleft())
            finally:
                # After an error or a signal nobody wants the rest.
                pool.shutdown(wait=False, cancel_futures=True)
        self._cuts.report()

    def _finished(
        self, task: Future[list[tuple[int, TokenSequence]]]
    ) -> list[tuple[int, TokenSequence]]:
        for _, sequence in task.result():
            self._cuts.note(sequence)
        return task.result()

    def _groups(self, items: Iterable[ItemLike]) -> Iterator[list[tuple[int, ItemLike]]]:
        """This process's items in tasks for threads: several texts, or one other item."""
        texts: list[tuple[int, ItemLike]] = []
        for index, get in self._own(items):
            try:
                item = get()
            except ValueError as error:  # of a sequence that reads items when it is asked for them
                self._fail(index, error)
                continue
            if not is_text(item):
                yield [(index, item)]
                continue
            texts.append((index, item))
            if len(texts) == TEXTS_PER_TASK:
                yield texts
                texts = []
        if texts:
            yield texts

    def _own(self, items: Iterable[ItemLike]) -> Iterator[tuple[int, Callable[[], ItemLike]]]:
        """The index of each item of this process, and what gives the item."""
        process, step = jax.process_index(), jax.process_count()
        if isinstance(items, Sequence):
            self.count = len(items)
            for index in range(process, len(items), step):
                yield index, functools.partial(items.__getitem__, index)
            return
        for index, value in enumerate(items):
            self.count = index + 1
            if index % step == process:
                yield index, functools.partial(_same, value)

    def _lay_out(self, group: list[tuple[int, ItemLike]]) -> list[tuple[int, TokenSequence]]:
        sequences = []
        for index, value in group:
            try:
                item = read_item(value, f"item {index}", self._fetch)
                sequences.append((index, self._builder(with_prompt(item, self._prompt))))
            except ValueError as error:
                self._fail(index, error)
        return sequences

    def _fail(self, index: int, error: ValueError) -> None:
        if self._stop:
            raise error
        self.failures[index] = shortened(str(error))


def _same(value: ItemLike) -> ItemLike:
    return value
