"""Items of many requests share batches; each request gets its own results, in order, whatever the others do."""

import threading
import time

import numpy as np
import pytest

from llave_jax.serving.batcher import (
    Batcher,
    Cancelled,
    Closing,
    DeviceError,
    Embedded,
    Observer,
    QueueFull,
)
from tests.serving.fake_engine import FakeEngine, vector_of


class Client:
    """Submits items and waits for their outcomes."""

    def __init__(self, batcher, items, **options):
        self.done = threading.Event()
        self.calls = 0
        self.ticket = batcher.submit(items, self._finished, **options)

    def _finished(self):
        self.calls += 1
        self.done.set()

    def outcomes(self):
        assert self.done.wait(20)
        return self.ticket.outcomes


@pytest.fixture
def make():
    made = []

    def make(engine, **options):
        made.append(Batcher(engine, **options))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close(0.0)


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_results_are_each_requests_own(make):
    batcher = make(FakeEngine(), workers=3)
    rng = np.random.default_rng(0)
    texts = [[f"{n} {m}" for m in range(rng.integers(1, 30))] for n in range(60)]
    clients: list[Client] = []
    lock = threading.Lock()

    def submit(part):
        for items in part:
            client = Client(batcher, items)
            with lock:
                clients.append(client)

    threads = [threading.Thread(target=submit, args=(texts[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clients) == 60
    for client in clients:
        for item, outcome in zip(client.ticket.items, client.outcomes(), strict=True):
            np.testing.assert_array_equal(outcome.vector, vector_of(item))
            assert outcome.tokens == len(item)
        assert client.calls == 1
    assert batcher.unfinished == batcher.waiting == 0


def test_requests_share_batches(make):
    engine = FakeEngine(slots=8)
    engine.gate.clear()
    batcher = make(engine, deadline=0.0)
    # The first ones go alone, two batches at most; all that comes meanwhile waits and goes together.
    first = [Client(batcher, ["a"])]
    wait_until(lambda: batcher._in_flight == 1)
    first.append(Client(batcher, ["b"]))
    wait_until(lambda: batcher._in_flight == 2)
    others = [Client(batcher, [f"c{n}"]) for n in range(10)]
    wait_until(lambda: len(batcher._ready) == 10)
    engine.gate.set()
    for client in first + others:
        client.outcomes()
    assert [len(batch) for batch in engine.batches] == [1, 1, 10]


def test_a_batch_waits_for_others_until_the_deadline_or_until_it_is_full(make):
    engine = FakeEngine(slots=8, tokens_per_batch=40)
    batcher = make(engine, deadline=60.0)
    clients = [Client(batcher, ["ten tokens"]) for _ in range(3)]
    wait_until(lambda: len(batcher._ready) == 3)
    time.sleep(0.05)
    assert not engine.batches
    clients.append(Client(batcher, ["ten tokens"]))
    for client in clients:
        client.outcomes()
    assert len(engine.batches) == 1
    batcher = make(engine, deadline=0.02)
    Client(batcher, ["alone"]).outcomes()


def test_a_long_request_does_not_block_a_short_one(make):
    engine = FakeEngine()
    batcher = make(engine, deadline=0.0, workers=1)
    long = Client(batcher, [f"long {n}" for n in range(500)])
    short = Client(batcher, ["short"])
    short.outcomes()
    assert engine.prepared.index("short") < 200
    assert all(isinstance(outcome, Embedded) for outcome in long.outcomes())


def test_the_queue_is_bounded_and_what_is_prepared_too(make):
    engine = FakeEngine(tokens_per_batch=100)
    engine.gate.clear()
    batcher = make(engine, max_waiting=100, deadline=0.0)
    clients = [Client(batcher, ["x" * 50 + str(n)]) for n in range(60)]
    wait_until(lambda: batcher._in_flight == 2 and len(batcher._ready) >= 5)
    time.sleep(0.05)
    # Two batches of at most 8, three batches' tokens ready, and one item in the hands of each thread.
    assert len(engine.prepared) <= 2 * 8 + 3 * 2 + 2 * 2
    assert batcher.waiting >= 60 - len(engine.prepared) - 2
    with pytest.raises(QueueFull) as full:
        Client(batcher, ["y"] * (101 - batcher.waiting))
    assert 1 <= full.value.retry_after <= 60
    engine.gate.set()
    for client in clients:
        assert isinstance(client.outcomes()[0], Embedded)
    Client(batcher, ["y"] * 100).outcomes()


def test_what_is_given_up_is_not_computed(make):
    engine = FakeEngine(slots=1)
    engine.gate.clear()
    batcher = make(engine, deadline=0.0, workers=1)
    first = Client(batcher, ["a", "b", "c", "d"])
    wait_until(lambda: batcher._in_flight == 2)
    gone = Client(batcher, [f"gone {n}" for n in range(50)])
    last = Client(batcher, ["last"])
    wait_until(lambda: "last" in engine.prepared)
    batcher.cancel(gone.ticket)
    batcher.cancel(gone.ticket)
    assert all(isinstance(outcome, Cancelled) for outcome in gone.outcomes())
    engine.gate.set()
    assert isinstance(last.outcomes()[0], Embedded)
    assert isinstance(first.outcomes()[3], Embedded)
    wait_until(lambda: batcher.unfinished == 0)
    assert gone.calls == 1
    assert not any("gone" in name for batch in engine.batches for name in batch)
    # After it is finished there is nothing to give up.
    batcher.cancel(first.ticket)
    assert first.calls == 1


@pytest.mark.parametrize("stop", [True, False])
def test_one_item_that_cannot_be_read(make, stop):
    batcher = make(FakeEngine(), workers=1)
    client = Client(batcher, ["good", "UNREADABLE", "also good"], stop=stop)
    kinds = [type(outcome) for outcome in client.outcomes()]
    assert kinds[1] is ValueError
    assert kinds[2] is (Cancelled if stop else Embedded)
    assert client.calls == 1
    assert batcher.unfinished == batcher.waiting == 0
    assert isinstance(Client(batcher, ["next"]).outcomes()[0], Embedded)
    assert [type(o) for o in Client(batcher, ["UNREADABLE"]).outcomes()] == [ValueError]


@pytest.mark.parametrize("where", ["pack", "forward", "result"])
def test_a_batch_that_fails_fails_its_own_items_only(make, where, caplog):
    engine = FakeEngine(slots=1)
    engine.broken = where
    batcher = make(engine, deadline=0.0)
    bad = Client(batcher, ["NOT FINITE" if where == "result" else "POISON"], stop=False)
    assert isinstance(bad.outcomes()[0], DeviceError)
    assert isinstance(Client(batcher, ["good"]).outcomes()[0], Embedded)
    assert batcher.alive
    assert batcher._in_flight == 0


def test_closing_finishes_what_is_there(make):
    engine = FakeEngine(slots=1)
    engine.gate.clear()
    batcher = make(engine, deadline=60.0)
    client = Client(batcher, ["a", "b", "c"])
    closed = []
    closer = threading.Thread(target=lambda: closed.append(batcher.close(20.0)))
    closer.start()
    wait_until(lambda: batcher._closing)
    with pytest.raises(Closing):
        Client(batcher, ["d"])
    engine.gate.set()
    closer.join()
    assert closed == [True]
    assert all(isinstance(outcome, Embedded) for outcome in client.outcomes())
    assert not batcher.alive


def test_closing_does_not_wait_for_ever(make):
    engine = FakeEngine()
    engine.gate.clear()
    batcher = make(engine)
    Client(batcher, ["a"])
    assert not batcher.close(0.05)
    engine.gate.set()


def test_the_observer_is_told(make):
    class Notes(Observer):
        def __init__(self):
            self.batches, self.stages = [], []

        def batch(self, items, tokens, room):
            self.batches.append((items, tokens, room))

        def stage(self, name, seconds):
            assert seconds >= 0
            self.stages.append(name)

    notes = Notes()
    batcher = make(FakeEngine(), observer=notes)
    Client(batcher, ["abc", "de"]).outcomes()
    assert sum(items for items, _, _ in notes.batches) == 2
    assert sum(tokens for _, tokens, _ in notes.batches) == 5
    assert {room for _, _, room in notes.batches} == {2000}
    assert {name: notes.stages.count(name) for name in ("prepare", "pack")} == {
        "prepare": 2,
        "pack": 2,
    }
