"""Continuous batching: items of all clients share the device's batches.

Owns the queue, the threads and the moment at which a batch goes. What an item is, how it becomes a sequence and
how sequences are packed and run is the `Engine`'s matter; nothing here knows HTTP.

An item passes three stages: threads prepare it, one thread packs what is prepared and starts the device, one waits
for the device. Two batches are under way at most: while one is on the device, the next is packed. Memory is bounded:
`max_waiting` items wait as they came, and no more are prepared than a few batches hold.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from llave_jax.inputs.batch import PackedBatch
from llave_jax.inputs.sequence import TokenSequence

log = logging.getLogger(__name__)

# Batches that the device has or that are packed for it.
IN_FLIGHT = 2
# Items of one request that a thread prepares in a turn; handing them over costs about as much as a short text.
ITEMS_PER_TURN = 8
# Batches whose sequences may be ready before preparing pauses.
READY_BATCHES = 3


class Engine(Protocol):
    """What the batcher runs. All methods but `prepare` are called by one thread."""

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of the largest batch, over all devices."""
        ...

    def prepare(self, item: Any) -> TokenSequence:
        """An item's sequence; called by several threads. ValueError: the item cannot be used."""
        ...

    def pack(self, sequences: Sequence[TokenSequence]) -> tuple[PackedBatch, np.ndarray]:
        """A batch that holds a prefix of the sequences, and int32 [S, G]: which is in each slot, or -1."""
        ...

    def forward(self, batch: PackedBatch) -> Any:
        """float32 [S, G, D], perhaps still being computed: `np.asarray` waits for it."""
        ...


class Embedded(NamedTuple):
    """An item's result.

    Attributes:
      vector: float32 [D], L2-normalised.
      tokens: of its sequence, with the prompt and the visual tokens.
    """

    vector: np.ndarray
    tokens: int


class QueueFull(Exception):
    """There is no room for a request's items.

    Attributes:
      retry_after: seconds after which there probably is.
    """

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} items are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The batcher takes no more items."""


class Cancelled(Exception):
    """The request was given up before this item was embedded."""


class DeviceError(Exception):
    """A batch could not be computed. The cause is in the log."""


class Observer:
    """Is told what happens; metrics override what they count. Methods are called by all threads."""

    def batch(self, items: int, tokens: int, room: int) -> None:
        """A batch is packed: how many items and tokens it has, and for how many tokens it has room."""

    def stage(self, name: str, seconds: float) -> None:
        """An item has passed the stage `queue`, `prepare` or `pack`, or a batch `device`."""


class Ticket:
    """The items of one request and what has come of them.

    Attributes:
      outcomes: an `Embedded` or an exception for each item, once it is known.
    """

    def __init__(self, items: Sequence[Any], stop: bool, done: Callable[[], None]):
        self.items = items
        self.outcomes: list[Embedded | Exception | None] = [None] * len(items)
        self.submitted = time.monotonic()
        # Below, guarded by the batcher's lock.
        self.next = 0
        self.open = len(items)
        self.given_up = False
        self.stop = stop
        self.done = done

    @property
    def left(self) -> int:
        """Items that no thread has begun to prepare."""
        return len(self.items) - self.next


class _Ready(NamedTuple):
    """A prepared item."""

    ticket: Ticket
    index: int
    sequence: TokenSequence
    since: float


class _Running(NamedTuple):
    """A batch on the device."""

    entries: list[_Ready]
    indices: np.ndarray
    vectors: Any
    since: float


class Batcher:
    """Embeds items of many requests together.

    Args:
      engine: prepares, packs and runs.
      max_waiting: items that may wait to be prepared.
      deadline: seconds that a prepared item may wait for others to fill its batch.
      workers: threads that prepare.
      observer: is told what happens.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 1024,
        deadline: float = 0.005,
        workers: int = 2,
        observer: Observer | None = None,
    ):
        self._engine = engine
        self._max_waiting = max_waiting
        self._deadline = deadline
        self._observer = observer or Observer()
        lock = threading.Lock()
        self._lock = lock
        self._work = threading.Condition(lock)
        self._packable = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        # Requests with items to prepare. Each gives some in turn, so that a long one does not block short ones.
        self._requests: collections.deque[Ticket] = collections.deque()
        self._waiting = 0
        self._ready: collections.deque[_Ready] = collections.deque()
        self._ready_tokens = 0
        # `_ready` holds items of requests that were given up.
        self._stale = False
        self._unfinished = 0
        self._in_flight = 0
        self._closing = self._closed = False
        # Items that were finished lately: (when, how many).
        self._finished: collections.deque[tuple[float, int]] = collections.deque(maxlen=64)
        self._running: queue.SimpleQueue[_Running | None] = queue.SimpleQueue()
        names = [*((self._prepare, f"prepare-{n}") for n in range(workers))]
        names += [(self._pack, "pack"), (self._collect, "collect")]
        self._threads = [threading.Thread(target=t, name=n, daemon=True) for t, n in names]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Items that wait to be prepared."""
        return self._waiting

    @property
    def unfinished(self) -> int:
        """Items whose outcome is not known yet."""
        return self._unfinished

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(
        self, items: Sequence[Any], done: Callable[[], None], *, stop: bool = True
    ) -> Ticket:
        """Takes a request's items.

        Args:
          items: at least one, as the engine's `prepare` takes them.
          done: is called once, in any thread, when all outcomes are known.
          stop: after one item that cannot be used, the request's others are given up.

        Returns:
          The ticket, which gets the outcomes.

        Raises:
          QueueFull: there is no room for them.
          Closing: the batcher is being closed.
        """
        ticket = Ticket(items, stop, done)
        with self._lock:
            if self._closing:
                raise Closing("the server is shutting down")
            if self._waiting + len(items) > self._max_waiting:
                raise QueueFull(self._waiting, self._seconds_to_empty())
            self._requests.append(ticket)
            self._waiting += len(items)
            self._unfinished += len(items)
            self._work.notify(len(items))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Gives up the items of a request that are not on the device yet. `done` is called nonetheless.

        Args:
          ticket: finished or not.
        """
        with self._lock:
            self._give_up(ticket)
            # Those in `_ready` are dropped when the next batch is packed.
            self._packable.notify()

    def close(self, timeout: float) -> bool:
        """Takes no more items, finishes those that are there, and ends the threads.

        Args:
          timeout: seconds after which items that are not finished are left.

        Returns:
          Whether all were finished.
        """
        end = time.monotonic() + timeout
        with self._lock:
            self._closing = True
            self._packable.notify()
            while self._unfinished and (left := end - time.monotonic()) > 0:
                self._idle.wait(left)
            finished = not self._unfinished
            self._closed = True
            for condition in (self._work, self._packable):
                condition.notify_all()
        self._running.put(None)
        for thread in self._threads:
            thread.join(max(0.1, end - time.monotonic()) if finished else 0.1)
        return finished

    # Preparing.

    def _prepare(self) -> None:
        while True:
            with self._lock:
                while not (self._requests and self._has_room()):
                    if self._closed:
                        return
                    self._work.wait()
                ticket, indices = self._take_turn()
            now = time.monotonic()
            self._observer.stage("queue", now - ticket.submitted)
            for index in indices:
                if ticket.given_up:
                    break
                outcome = self._sequence(ticket.items[index])
                self._observer.stage("prepare", -now + (now := time.monotonic()))
                with self._lock:
                    if isinstance(outcome, Exception):
                        self._finish(ticket, index, outcome)
                    elif not ticket.given_up:
                        self._ready.append(_Ready(ticket, index, outcome, now))
                        self._ready_tokens += len(outcome)
                        # In between, the packing thread waits for the deadline or for the device.
                        if len(self._ready) == 1 or self._is_full():
                            self._packable.notify()

    def _is_full(self) -> bool:
        return self._ready_tokens >= self._engine.tokens_per_batch

    def _has_room(self) -> bool:
        return self._ready_tokens < READY_BATCHES * self._engine.tokens_per_batch

    def _take_turn(self) -> tuple[Ticket, range]:
        """The next items to prepare; the request then goes to the end of the line."""
        ticket = self._requests.popleft()
        count = min(ITEMS_PER_TURN, ticket.left)
        indices = range(ticket.next, ticket.next + count)
        ticket.next += count
        self._waiting -= count
        if ticket.left:
            self._requests.append(ticket)
        return ticket, indices

    def _sequence(self, item: Any) -> TokenSequence | Exception:
        try:
            return self._engine.prepare(item)
        except ValueError as error:
            return error
        except Exception as error:
            log.exception("an item could not be prepared")
            return error

    # Packing.

    def _pack(self) -> None:
        while (entries := self._next_entries()) is not None:
            try:
                batch, indices = self._engine.pack([entry.sequence for entry in entries])
                taken = set(indices[indices >= 0].tolist())
                if not taken:
                    raise RuntimeError("the batch holds no item")
            except Exception:
                # The first one is in every batch: without it the others may still be packed.
                log.exception("a batch could not be packed")
                self._put_back(entries[1:], running=False)
                self._fail(entries[:1])
                continue
            held = [entry for n, entry in enumerate(entries) if n in taken]
            self._put_back([entry for n, entry in enumerate(entries) if n not in taken])
            now = time.monotonic()
            for entry in held:
                self._observer.stage("pack", now - entry.since)
            tokens = sum(len(entry.sequence) for entry in held)
            self._observer.batch(len(held), tokens, batch.tokens.size)
            try:
                vectors = self._engine.forward(batch)
            except Exception:
                log.exception("a batch failed on its way to the device")
                self._release()
                self._fail(held)
                continue
            self._running.put(_Running(entries, indices, vectors, now))

    def _next_entries(self) -> list[_Ready] | None:
        """Waits until a batch should go. What is ready for it; None: there will be no more."""
        with self._lock:
            while True:
                if self._stale:
                    self._stale = False
                    living = [entry for entry in self._ready if not entry.ticket.given_up]
                    self._ready = collections.deque(living)
                    self._ready_tokens = sum(len(entry.sequence) for entry in living)
                    self._work.notify_all()
                wait = None
                if self._closed:
                    return None
                if self._ready and self._in_flight < IN_FLIGHT:
                    wait = self._ready[0].since + self._deadline - time.monotonic()
                    if self._is_full() or self._closing or wait <= 0:
                        break
                self._packable.wait(wait)
            entries = list(self._ready)
            self._ready.clear()
            self._in_flight += 1
            return entries

    def _put_back(self, entries: list[_Ready], running: bool = True) -> None:
        """What the batch had no room for is first in the next one."""
        with self._lock:
            self._ready.extendleft(reversed(entries))
            self._ready_tokens = sum(len(entry.sequence) for entry in self._ready)
            if not running:
                self._in_flight -= 1
            self._work.notify_all()

    # Collecting.

    def _collect(self) -> None:
        while (running := self._running.get()) is not None:
            slots = np.argwhere(running.indices >= 0)
            held = [running.entries[running.indices[s, g]] for s, g in slots]
            try:
                vectors = np.asarray(running.vectors)
            except Exception:
                log.exception("a batch failed on the device")
                self._release()
                self._fail(held)
                continue
            now = time.monotonic()
            self._observer.stage("device", now - running.since)
            self._release()
            with self._lock:
                for (s, g), entry in zip(slots, held, strict=True):
                    vector = vectors[s, g]
                    outcome: Embedded | Exception = Embedded(vector, len(entry.sequence))
                    if not np.isfinite(vector).all():
                        outcome = DeviceError("the embedding is not finite")
                    self._finish(entry.ticket, entry.index, outcome)
                self._finished.append((now, len(held)))

    def _release(self) -> None:
        with self._lock:
            self._in_flight -= 1
            self._packable.notify()

    # Outcomes. The caller of these holds the lock, except of `_fail`.

    def _fail(self, entries: Sequence[_Ready]) -> None:
        with self._lock:
            for entry in entries:
                self._finish(entry.ticket, entry.index, DeviceError("the batch failed"))

    def _finish(self, ticket: Ticket, index: int, outcome: Embedded | Exception) -> None:
        if ticket.outcomes[index] is not None:
            return
        ticket.outcomes[index] = outcome
        ticket.open -= 1
        self._unfinished -= 1
        if not ticket.open:
            self._call_done(ticket)
        elif isinstance(outcome, Exception) and ticket.stop:
            self._give_up(ticket)

    def _give_up(self, ticket: Ticket) -> None:
        if not ticket.open:
            return
        ticket.given_up = self._stale = True
        if ticket.left:
            self._waiting -= ticket.left
            ticket.next = len(ticket.items)
            self._requests.remove(ticket)
        for index, outcome in enumerate(ticket.outcomes):
            if outcome is None:
                ticket.outcomes[index] = Cancelled("given up")
        self._unfinished -= ticket.open
        ticket.open = 0
        self._call_done(ticket)

    def _call_done(self, ticket: Ticket) -> None:
        if not self._unfinished:
            self._idle.notify_all()
        try:
            ticket.done()
        except RuntimeError:  # the event loop is closed: nobody waits any more
            log.debug("nobody waits for a request", exc_info=True)

    def _seconds_to_empty(self) -> int:
        """When half of what waits will be done, from how fast items were finished lately."""
        if len(self._finished) < 2:
            return 1
        seconds = time.monotonic() - self._finished[0][0]
        rate = sum(count for _, count in self._finished) / max(seconds, 1e-3)
        return int(min(max(1.0, self._waiting / 2 / rate), 60.0))
