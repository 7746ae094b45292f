"""The stream of batches: every row once an epoch, exact resumption, compositions, skipped rows."""

import collections
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llave_jax.data import order as order_lib
from llave_jax.data.order import (
    Composition,
    Members,
    UniformOrder,
    UniformPart,
    row_order,
    rows_of_process,
)
from llave_jax.data.pipeline import train_iterator
from llave_jax.data.rows import EMPTY_SIDE, Row, RowError
from llave_jax.data.skips import SkipLog, TooManySkips
from llave_jax.data.sources import PairSource, make_pair, open_source
from llave_jax.data.workers import WorkerLost
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.content import content_id
from llave_jax.inputs.images import ImageError
from llave_jax.inputs.item import Item
from tests.data.mmeb_tree import encode, make_tree, picture

# grain's shuffle takes 10 ms a row for a handful of rows and 5 us for thousands: sources here have
# about a hundred.
BUDGET = Budget(rows=3, row_length=512, crops=14, groups=4)
# The largest pair fills it, so that most batches leave pairs waiting for the next one.
TIGHT = Budget(rows=3, row_length=512, crops=10, groups=4)


class Pairs(PairSource):
    """Small rows in memory: text of different lengths, some with images, some that are broken."""

    def __init__(self, sizes: dict[str, int], broken: tuple[int, ...] = ()):
        ends = list(itertools.accumulate(sizes.values(), initial=0))
        self.subsets = {n: range(a, b) for n, a, b in zip(sizes, ends, ends[1:], strict=False)}
        rng = np.random.default_rng(0)
        sizes = [(30, 20), (100, 40), (90, 90)]
        self._images = [encode(picture(rng, *size), "PNG") for size in sizes]
        self._broken = broken

    def pair_id(self, index):
        return f"{self.subset(index)}:{index - self.subsets[self.subset(index)].start}"

    def usable(self, index):
        return index >= 0 and index not in self._broken  # below 0: no row

    def digest(self, index):
        return index

    def __getitem__(self, index):
        if index in self._broken:
            raise RowError(f"rows.json row {index}", "the query has neither text nor an image")
        image = self._images[index % 3]
        paths = ("" if index % 2 else "a.png", "" if index % 5 else "b.png")
        negative = f"not {index}" if index % 3 == 0 else ""
        row = Row(
            f"query {index} " * (index % 7), paths[0], f"a {index % 4}", paths[1], negative, ""
        )
        return make_pair(self.pair_id(index), f"rows.json row {index}", row, (image, image, b""))


def make(source, builder, **options):
    options = {"seed": 1, "num_shards": 2, "lookahead": 4, "prefetch": 1, **options}
    return train_iterator(source, builder, options.pop("budget", BUDGET), **options)


def uniform_order(source, *, num_slots, seed=1):
    starts = np.array([rows.start for rows in source.subsets.values()])
    return UniformOrder(source.contents(), starts, num_slots=num_slots, seed=seed)


def order_of(source, *, composition, process=0, processes=1, seed=1, epochs=None):
    rows = rows_of_process(
        source, source.contents(), seed=seed, process_index=process, process_count=processes
    )
    return row_order(rows, seed=seed, epochs=epochs, composition=composition)


def ids_of(batch) -> list[str]:
    return [name for pack in batch.ids for shard in pack for name in shard if name]


def stall_warnings(caplog):
    return [message for message in caplog.messages if message.startswith("no row has come for")]


def continue_once_warned(pid, caplog):
    until = time.monotonic() + 60
    while not stall_warnings(caplog) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(pid, signal.SIGCONT)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Reads until it is killed; says the pids of its workers first.
READ_ON = """
import json, multiprocessing
if __name__ == "__main__":
    from tests.data.test_pipeline import *
    from tests.data.conftest import new_builder
    iterator = make(Pairs({"a": 60, "b": 11}), new_builder(Path("tests/golden")), num_workers=2)
    next(iterator)
    print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
    while True:
        next(iterator)
"""


def assert_same(batch, other):
    assert batch.ids == other.ids
    assert batch.epoch == other.epoch
    np.testing.assert_array_equal(batch.labels.target_ids, other.labels.target_ids)
    for field, a, b in zip(batch.packed._fields, batch.packed, other.packed, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=field)


class TestRowOrder:
    @hypothesis.given(
        sizes=st.lists(st.sampled_from([0, 1, 97, 130]), min_size=1, max_size=4).filter(any),
        sub_batch=st.integers(2, 5),
        processes=st.integers(1, 4),
        epochs=st.integers(1, 2),
        seed=st.integers(0, 2**31),
    )
    @hypothesis.settings(max_examples=8)
    def test_every_epoch_has_every_row_once(self, sizes, sub_batch, processes, epochs, seed):
        source = Pairs({f"s{i}": size for i, size in enumerate(sizes)})
        hypothesis.assume(len(source) >= processes)
        composition = Composition(sub_batch=sub_batch)
        read = [[] for _ in range(epochs)]
        for process in range(processes):
            options = {"process": process, "processes": processes, "seed": seed}
            order = order_of(source, composition=composition, **options)
            groups = len(order_of(source, composition=composition, epochs=1, **options))
            for epoch in range(epochs):
                for i in range(epoch * groups, (epoch + 1) * groups):
                    rows = [int(row) for row in order[i] if row >= 0]
                    assert len({source.subset(row) for row in rows}) == 1
                    read[epoch] += rows
        for rows in read:
            assert sorted(rows) == list(range(len(source)))

    @hypothesis.given(
        contents=st.lists(st.integers(0, 40), min_size=8, max_size=60),
        cut=st.integers(0, 60),
        processes=st.integers(1, 5),
        seed=st.integers(0, 2**31),
    )
    def test_equal_contents_belong_to_one_process(self, contents, cut, processes, seed):
        cut = min(cut, len(contents))
        source = Pairs({"a": cut, "b": len(contents) - cut})
        hypothesis.assume(len(set(contents)) >= processes)
        contents = np.array(contents, np.uint64)
        owners = {}
        for process in range(processes):
            options = {"process_index": process, "process_count": processes}
            rows = rows_of_process(source, contents, seed=seed, **options)
            assert all(source.subset(row) == name for name in rows for row in rows[name])
            owners |= {int(row): process for part in rows.values() for row in part}
            assert list(rows["b"]) == sorted(rows["b"])
        assert len(owners) == len(contents)
        for i, j in itertools.combinations(range(len(contents)), 2):
            if contents[i] == contents[j]:
                assert owners[i] == owners[j]
        if len(set(contents.tolist())) == len(contents):
            shares = collections.Counter(owners.values())
            assert max(shares.values()) - min(shares.values()) <= 1
            of_a = [sum(owners[row] == p for row in range(cut)) for p in range(processes)]
            assert max(of_a) - min(of_a) <= 1

    def test_more_processes_than_rows_are_refused(self, builder):
        with pytest.raises(ValueError, match=r"2 rows .* do not reach for 3 processes"):
            make(Pairs({"a": 2}), builder, process_count=3)

    def test_epochs_are_shuffled_differently(self):
        source = Pairs({"a": 100, "b": 60})
        composition, n = Composition(sub_batch=4), 25 + 15
        order, other, again = (order_of(source, seed=s, composition=composition) for s in (3, 4, 4))
        epochs = [np.concatenate([order[e * n + i] for i in range(n)]) for e in range(3)]
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[1], epochs[2])
        first = [[int(o[i][0]) for i in range(n)] for o in (order, other, again)]
        assert first[0] != first[1] == first[2]

    @pytest.mark.parametrize("processes", [1, 4])
    def test_weights_are_the_shares_of_every_process(self, processes):
        source = Pairs({"a": 1000, "b": 100, "c": 500})
        composition = Composition(weights={"a": 3.0, "b": 1.0})
        for process in range(processes):
            part = order_of(
                source, composition=composition, process=process, processes=processes, seed=0
            )
            shares = collections.Counter(source.subset(int(part[i][0])) for i in range(400))
            assert set(shares) == {"a", "b"}
            # A binomial share of 400 draws deviates by 0.022.
            assert abs(shares["a"] / 400 - 0.75) < 0.08

    def test_weighted_rows_come_once_before_any_comes_again(self, monkeypatch):
        monkeypatch.setattr(order_lib, "_MIXTURE_WINDOW", 400)
        source = Pairs({"a": 150, "b": 50})
        composition = Composition(weights={"a": 3.0, "b": 1.0})
        order = order_of(source, seed=0, composition=composition)
        for window in range(2):  # each holds two passes over a and two over b
            rows = [int(order[400 * window + i][0]) for i in range(400)]
            assert collections.Counter(rows) == dict.fromkeys(range(200), 2)

    def test_what_cannot_be_composed_is_refused(self):
        source = Pairs({"a": 3})
        with pytest.raises(ValueError, match=r"weights name subsets \['z'\]"):
            order_of(source, composition=Composition(weights={"z": 1}))
        with pytest.raises(ValueError, match="weight of a is 0"):
            Composition(weights={"a": 0})
        with pytest.raises(ValueError, match="sub_batch is 0"):
            Composition(sub_batch=0)
        with pytest.raises(ValueError, match=r"data.order is 'modal'; expected one of"):
            Composition(order="modal")
        for options in ({"sub_batch": 2}, {"weights": {"a": 1.0}}):
            with pytest.raises(ValueError, match="use it without"):
                Composition(order="modality", **options)


class TestEpoch:
    @pytest.mark.parametrize("micro_batches", [1, 3])
    def test_finite_epochs_lose_and_repeat_nothing(self, builder, micro_batches):
        source = Pairs({"a": 21, "b": 16})
        batches = list(make(source, builder, epochs=2, micro_batches=micro_batches))
        counts = collections.Counter(name for batch in batches for name in ids_of(batch))
        assert counts == {source.pair_id(i): 2 for i in range(37)}
        assert batches[-1].epoch == 2.0
        for batch in batches:
            assert batch.packed.tokens.shape == (micro_batches, 2, 3, 512)
            for pack, packed_ids in enumerate(batch.ids):
                names = np.array(packed_ids)
                np.testing.assert_array_equal(batch.packed.valid[pack], names != "")

    def test_epochs_of_several_processes_are_refused(self, builder):
        with pytest.raises(ValueError, match="count steps instead"):
            make(Pairs({"a": 4}), builder, epochs=1, process_count=2)


def read(fresh, runs, positions):
    """What several runs read of a stream, each continuing the one before from its saved state.

    Args:
      fresh: num_workers -> a new iterator.
      runs: (num_workers, batches) of each run; another one reads on to `positions` of the stream.

    Returns:
      The batches and the last state.
    """
    found, state = [], None
    for workers, batches in [*runs, (0, math.inf)]:
        iterator = fresh(num_workers=workers)
        if state is not None:
            iterator.set_state(json.loads(state))
        end = len(found) + batches
        while len(found) < end and iterator.get_state()["next"] < positions:
            found.append(next(iterator))
        state = json.dumps(iterator.get_state())
        iterator.close()
    return found, json.loads(state)


def assert_epoch(source, builder, runs, *, processes=1, sub_batch=1, lookahead=4, **options):
    """Every process, interrupted as `runs` say, makes the uninterrupted batches of an epoch, and
    together they have every usable row of it once: in a batch, or waiting for the next one."""
    composition = Composition(sub_batch=sub_batch)
    counts = collections.Counter()
    for process in range(processes):
        if sub_batch == 1:
            shards = options.get("num_shards", 2) * options.get("micro_batches", 1)
            slots = processes * shards * TIGHT.groups
            uniform = uniform_order(source, num_slots=slots)
            part = UniformPart(uniform, process_index=process, process_count=processes, epochs=None)
            epoch = uniform.batches_per_epoch * part.size
        else:
            of_process = {"process": process, "processes": processes, "composition": composition}
            part = Members(order_of(source, **of_process), sub_batch)
            epoch = sub_batch * len(order_of(source, epochs=1, **of_process))

        fresh = functools.partial(
            make,
            source,
            builder,
            budget=TIGHT,
            process_index=process,
            process_count=processes,
            composition=composition,
            lookahead=lookahead,
            on_error="skip",
            skip_file="/dev/null",
            max_skip_share=1.0,
            **options,
        )
        expected, _ = read(fresh, [], epoch)
        found, state = read(fresh, runs, epoch)
        for batch, other in zip(found, expected, strict=True):
            assert_same(batch, other)
        counts.update(name for batch in found for name in ids_of(batch))
        copies = max(0, state["next"] - epoch)  # of rows that the last batch has from both epochs
        assert len(state["carry"]) <= lookahead + copies
        counts.update(source.pair_id(int(part[position])) for position in state["carry"])
        # The last batch may have begun the next epoch.
        later = [int(part[position]) for position in range(epoch, state["next"])]
        counts.subtract(source.pair_id(row) for row in later if source.usable(row))
    counts = {name: count for name, count in counts.items() if count}
    assert counts == {source.pair_id(i): 1 for i in range(len(source)) if source.usable(i)}


class TestResume:
    @hypothesis.given(
        stops=st.lists(st.integers(0, 9), max_size=3),
        processes=st.integers(1, 3),
        num_shards=st.integers(1, 3),
        micro_batches=st.integers(1, 2),
        sub_batch=st.integers(1, 3),
        lookahead=st.integers(1, 5),
    )
    @hypothesis.settings(max_examples=6)
    def test_stopping_anywhere_changes_nothing(self, builder, stops, **options):
        source = Pairs({"a": 60, "b": 45, "c": 1}, broken=(5,))
        assert_epoch(source, builder, [(0, stop) for stop in stops], **options)

    @pytest.mark.slow  # a worker process takes seconds to start
    @hypothesis.given(
        runs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=2, max_size=3),
        processes=st.integers(1, 2),
    )
    @hypothesis.example(runs=[(2, 3), (0, 1), (1, 2)], processes=2)
    @hypothesis.settings(max_examples=2)
    def test_stopping_anywhere_with_workers_changes_nothing(self, builder, runs, processes):
        source = Pairs({"a": 60, "b": 45}, broken=(5,))
        assert_epoch(source, builder, runs, processes=processes)

    @hypothesis.given(stops=st.lists(st.integers(0, 3), min_size=1, max_size=2))
    @hypothesis.settings(max_examples=4)
    def test_weighted_streams_continue(self, builder, stops):
        source = Pairs({"a": 60, "b": 45, "c": 1})
        weights = Composition(2, {"a": 1.0, "b": 2.5})
        fresh = functools.partial(make, source, builder, budget=TIGHT, composition=weights)
        expected, _ = read(fresh, [], 60)
        found, _ = read(fresh, [(0, stop) for stop in stops], 60)
        for batch, other in zip(found, expected, strict=True):
            assert_same(batch, other)

    def test_finite_epochs_continue_after_every_batch(self, builder):
        source = Pairs({"a": 60, "b": 45})
        iterator = make(source, builder, budget=TIGHT, epochs=1)
        expected, states = [], [iterator.get_state()]
        for batch in iterator:
            expected.append(batch)
            states.append(iterator.get_state())
        names = [name for batch in expected for name in ids_of(batch)]
        assert sorted(names) == sorted(source.pair_id(i) for i in range(105))
        for done, state in enumerate(states):
            iterator = make(source, builder, budget=TIGHT, epochs=1)
            iterator.set_state(json.loads(json.dumps(state)))
            for batch, other in zip(list(iterator), expected[done:], strict=True):
                assert_same(batch, other)

    def test_workers_make_the_same_stream(self, builder):
        source = Pairs({"a": 60, "b": 11})
        expected, _ = read(functools.partial(make, source, builder), [], 60)
        found, _ = read(functools.partial(make, source, builder), [(2, 2), (1, 3)], 60)
        for batch, other in zip(found, expected, strict=True):
            assert_same(batch, other)

    def test_workers_outlive_sigterm(self, builder):
        """SLURM sends it to every process of a job that is to save and end."""
        source = Pairs({"a": 60, "b": 11})
        expected, _ = read(functools.partial(make, source, builder), [], 60)
        iterator = make(source, builder, num_workers=1)
        found = [next(iterator)]
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM)
        found += itertools.islice(iterator, len(expected) - 1)
        assert worker.is_alive()
        iterator.close()
        assert not worker.is_alive()
        for batch, other in zip(found, expected, strict=True):
            assert_same(batch, other)

    def test_a_worker_that_stalls_or_dies_is_named_with_its_row(self, builder, caplog):
        iterator = make(Pairs({"a": 60, "b": 11}), builder, num_workers=1, stall_warning=0.5)
        next(iterator)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGSTOP)
        caplog.clear()
        # The rows made before are read; then the stream waits until the warning is there.
        threading.Thread(target=continue_once_warned, args=(worker.pid, caplog)).start()
        while not stall_warnings(caplog):
            next(iterator)
        assert re.search(
            rf"loading process 0 of 1 \(pid {worker.pid}, stopped\) is at [ab]:\d+",
            stall_warnings(caplog)[0],
        )
        worker.kill()
        with pytest.raises(
            WorkerLost, match=rf"0 of 1 \(pid {worker.pid}.* status -9; .* [ab]:\d+"
        ):
            collections.deque(iterator, maxlen=0)
        iterator.close()

    @pytest.mark.slow
    def test_workers_and_shared_memory_do_not_outlive_a_killed_parent(self, tmp_path):
        parent = subprocess.Popen(
            [sys.executable, "-c", READ_ON], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
        )
        pids = json.loads(parent.stdout.readline())
        assert len(pids) == 2
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (parent.pid, *pids)]
        segments = set(re.findall(r"/dev/shm/\S+", "".join(maps)))
        assert segments
        parent.kill()
        parent.wait()
        until = time.monotonic() + 60
        while any(map(is_running, pids)) or any(map(os.path.exists, segments)):
            assert time.monotonic() < until, (pids, segments)
            time.sleep(0.1)

    def test_rows_rewritten_in_place_are_refused(self, builder):
        state = make(Pairs({"a": 8}), builder).get_state()
        rewritten = Pairs({"a": 8})
        rewritten.digest = lambda index: 99 if index == 3 else Pairs.digest(rewritten, index)
        with pytest.raises(ValueError, match=r"as many as when the run began, and not the same"):
            make(rewritten, builder).set_state(state)
        del state["rows"]  # of a run that an earlier version began
        make(rewritten, builder).set_state(state)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"process_count": 2}, "processes: 1, this run has 2"),
            ({"seed": 2}, "seed: 1"),
            ({"composition": Composition(sub_batch=2)}, "order:"),
        ],
    )
    def test_a_position_of_another_stream_is_refused(self, builder, change, named):
        source = Pairs({"a": 8})
        state = make(source, builder).get_state()
        with pytest.raises(ValueError, match=named):
            make(source, builder, **change).set_state(state)
        with pytest.raises(ValueError, match="order: 8 rows"):
            make(Pairs({"a": 9}), builder).set_state(state)

    def test_another_budget_continues_without_loss(self, builder):
        source = Pairs({"a": 40})
        first = make(source, builder, epochs=1)
        seen = ids_of(next(first))
        state = first.get_state()
        first.close()
        larger = Budget(rows=6, row_length=512, crops=30, groups=8)
        second = make(source, builder, epochs=1, budget=larger, num_shards=1)
        second.set_state(state)
        seen += [name for batch in second for name in ids_of(batch)]
        assert sorted(seen) == sorted(source.pair_id(i) for i in range(40))


class TestContent:
    def test_batches_hold_the_pairs_own_sequences(self, builder):
        source = Pairs({"a": 20})
        index = {source.pair_id(i): i for i in range(20)}
        for batch in make(source, builder, epochs=1):
            packed, ids = batch.packed, batch.ids[0]
            for shard, slot in np.ndindex(2, BUDGET.groups):
                if not ids[shard][slot]:
                    continue
                pair = source[index[ids[shard][slot]]]
                for side, item in enumerate((pair.query, pair.target)):
                    end = int(packed.pooled[0, shard, side, slot])
                    tokens = builder(item).tokens
                    row, stop = divmod(end + 1, 512)
                    row, stop = (row - 1, 512) if stop == 0 else (row, stop)
                    found = packed.tokens[0, shard, row, stop - len(tokens) : stop]
                    np.testing.assert_array_equal(found, tokens)

    def test_equal_targets_have_equal_ids(self, builder):
        source = Pairs({"a": 40})
        index = {source.pair_id(i): i for i in range(40)}
        ids = {}
        for batch in make(source, builder, epochs=1):
            for place in np.ndindex(1, 2, BUDGET.groups):
                pack, shard, slot = place
                if name := batch.ids[pack][shard][slot]:
                    ids[index[name]] = int(batch.labels.target_ids[pack, shard, 0, slot])
        for i, j in itertools.combinations(range(40), 2):
            a, b = source[i].target, source[j].target
            assert (ids[i] == ids[j]) == ((a.text, a.images) == (b.text, b.images))

    def test_content_ids_know_text_and_image(self, tmp_path, builder):
        image = picture(np.random.default_rng(0), 20, 20)
        data = encode(image, "PNG")
        path = tmp_path / "a.png"
        path.write_bytes(data)
        assert content_id(Item("a", (data,))) == content_id(Item("a", (path,)))
        different = {
            content_id(item)
            for item in (
                Item("a"),
                Item("b"),
                Item("a", (data,)),
                Item("a", (data, data)),
                Item("a", (image,)),
                Item("", (data,)),
                Item("<image> a", (None,)),
                Item("<image> a"),
                Item("<image> a", (data,)),
                Item("<image> <image>", (None, data)),
                Item("<image> <image>", (data, None)),
            )
        }
        assert len(different) == 11

    def test_negatives_are_a_third_side(self, builder):
        source = Pairs({"a": 24})
        index = {source.pair_id(i): i for i in range(24)}
        budget = Budget(rows=3, row_length=512, crops=14, groups=4, sides=3)
        with_negative = 0
        for batch in make(source, builder, epochs=1, budget=budget):
            assert batch.labels.target_ids.shape == batch.labels.scores.shape == (1, 2, 2, 4)
            assert batch.labels.subsets.shape == (1, 2, 4)
            for shard, slot in np.ndindex(2, 4):
                if name := batch.ids[0][shard][slot]:
                    pair = source[index[name]]
                    assert (batch.packed.pooled[0, shard, 2, slot] >= 0) == bool(pair.negatives)
                    if pair.negatives:
                        with_negative += 1
                        expected = content_id(pair.negatives[0])
                        assert batch.labels.target_ids[0, shard, 1, slot] == expected
        assert with_negative == 8

    def test_labels_lie_in_the_slots_of_their_pairs(self, builder):
        class Scored(Pairs):
            """Rows of 0 to 3 negatives; some have a score of the target and of each."""

            def __getitem__(self, index):
                negatives = tuple(Item(f"not {index}, {n}") for n in range(index % 4))
                scores = tuple(index + n / 10 for n in range(1 + index % 4)) if index % 3 else ()
                return dataclasses.replace(
                    super().__getitem__(index), negatives=negatives, scores=scores
                )

        source = Scored({"a": 9, "b": 12})
        index = {source.pair_id(i): i for i in range(21)}
        budget = Budget(rows=3, row_length=512, crops=14, groups=4, sides=4)
        seen = set()
        for batch in make(source, builder, epochs=1, budget=budget):
            for shard, slot in np.ndindex(2, 4):
                if name := batch.ids[0][shard][slot]:
                    seen.add(name)
                    pair = source[index[name]]
                    assert batch.labels.subsets[0, shard, slot] == "ab".index(pair.subset)
                    scores = [*pair.scores[:3], *[np.nan] * (3 - len(pair.scores))]
                    actual = batch.labels.scores[0, shard, :, slot]
                    np.testing.assert_array_equal(actual, np.array(scores, np.float32))
                    present = batch.packed.pooled[0, shard, 2:, slot] >= 0
                    np.testing.assert_array_equal(present, np.arange(2) < len(pair.negatives))
        assert seen == set(index)

    def test_the_mmeb_tree_streams_completely(self, tmp_path, builder):
        make_tree(tmp_path / "tree", 9)
        source = open_source(tmp_path / "tree")
        counts = collections.Counter(
            name for batch in make(source, builder, epochs=1) for name in ids_of(batch)
        )
        assert counts == {source.pair_id(i): 1 for i in range(63)}


class TestSkipping:
    BROKEN = (3, 17)

    def test_raise_names_file_and_row(self, builder):
        iterator = make(Pairs({"a": 20}, self.BROKEN), builder, epochs=1)
        with pytest.raises(RowError, match=r"rows.json row (3|17): the query"):
            list(iterator)

    def test_skip_leaves_out_exactly_the_broken_rows_and_lists_them_once(self, builder, tmp_path):
        source = Pairs({"a": 15, "b": 5}, self.BROKEN)
        path = tmp_path / "logs/skipped.jsonl"
        options = {"epochs": 3, "on_error": "skip", "skip_file": path, "max_skip_share": 0.1}
        counts = collections.Counter(
            name for batch in make(source, builder, **options) for name in ids_of(batch)
        )
        assert counts == {source.pair_id(i): 3 for i in range(20) if i not in self.BROKEN}
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted((e["subset"], e["row"]) for e in entries) == [("a", 3), ("b", 2)]
        assert all("rows.json row" in entry["reason"] for entry in entries)
        list(make(source, builder, **options))  # a second run does not list them again
        assert len(path.read_text().splitlines()) == 2

    def test_too_many_skips_stop_the_run_with_the_files_name(self, builder, tmp_path):
        path = tmp_path / "skipped.jsonl"
        iterator = make(
            Pairs({"a": 20}, self.BROKEN),
            builder,
            on_error="skip",
            skip_file=path,
            max_skip_share=0.05,
        )
        with pytest.raises(TooManySkips, match=f"2 rows .* 1 allowed: a 2. They are .*{path}"):
            collections.deque(iterator, maxlen=0)

    def test_the_message_counts_by_subset(self, builder, tmp_path):
        source = Pairs({"a": 20, "b": 20}, (3, 21, 22, 23))
        options = {"on_error": "skip", "skip_file": tmp_path / "s.jsonl", "max_skip_share": 0.09}
        with pytest.raises(TooManySkips, match=r"4 rows .* 3 allowed: b 3, a 1\."):
            collections.deque(make(source, builder, **options), maxlen=0)

    def test_where_no_row_is_usable_the_stream_ends(self, builder, tmp_path):
        source = Pairs({"a": 9}, tuple(range(9)))
        options = {"on_error": "skip", "skip_file": tmp_path / "s.jsonl", "max_skip_share": 1.0}
        iterator = make(source, builder, **options)
        with pytest.raises(TooManySkips, match="9 rows could not be used"):
            collections.deque(iterator, maxlen=0)

    def test_the_limit_is_the_runs(self, builder, tmp_path):
        """A process does not stop for rows that may all be its own; batches say what was skipped."""
        source = Pairs({"a": 20}, self.BROKEN)
        skipped = set()
        for process in range(2):
            path = tmp_path / f"skipped_{process}.jsonl"
            iterator = make(
                source,
                builder,
                process_index=process,
                process_count=2,
                on_error="skip",
                skip_file=path,
                max_skip_share=0.05,
            )
            batches = list(itertools.islice(iterator, 12))
            assert [len(b.skipped) for b in batches] == sorted(len(b.skipped) for b in batches)
            lines = path.read_text().splitlines() if path.exists() else []
            assert {f"a:{json.loads(line)['row']}" for line in lines} >= set(batches[-1].skipped)
            skipped |= set(batches[-1].skipped)
        assert skipped == {"a:3", "a:17"}

    @pytest.mark.parametrize("on_error", ["raise", "skip"])
    def test_rows_that_the_source_leaves_out_are_listed_and_do_not_count(
        self, builder, tmp_path, on_error
    ):
        source = Pairs({"a": 6})
        source.left_out = {"a": (100, 103), "b": (0,)}
        path = tmp_path / "skipped.jsonl"
        options = {"on_error": on_error, "skip_file": path, "max_skip_share": 0.0}
        for _ in range(2):  # the second run continues the file
            batches = list(make(source, builder, epochs=1, **options))
            assert all(batch.skipped == () for batch in batches)
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            assert [(e["subset"], e["row"]) for e in entries] == [("a", 100), ("a", 103), ("b", 0)]
            assert {entry["reason"] for entry in entries} == {EMPTY_SIDE}

    def test_rows_that_no_batch_has_room_for(self, builder, tmp_path):
        source = Pairs({"a": 12})
        small = Budget(rows=2, row_length=512, crops=4, groups=4)  # 100 x 40 pixels take 5 crops
        with pytest.raises(ValueError, match=r"a:\d+: needs crops"):
            list(make(source, builder, epochs=1, budget=small))
        path = tmp_path / "skipped.jsonl"
        options = {"on_error": "skip", "skip_file": path, "max_skip_share": 1.0}
        found = list(make(source, builder, epochs=1, budget=small, **options))
        names = {name for batch in found for name in ids_of(batch)}
        listed = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(names) + len(listed) == 12
        assert all("needs crops" in entry["reason"] for entry in listed)

    def test_broken_images_and_markers_are_skipped_too(self, builder, tmp_path):
        rows = [
            {"qry": "q", "qry_image_path": "bad.png", "pos_text": "t", "pos_image_path": ""},
            {"qry": "<image> <image>", "qry_image_path": "", "pos_text": "t", "pos_image_path": ""},
            {"qry": "good", "qry_image_path": "", "pos_text": "t", "pos_image_path": ""},
        ]
        (tmp_path / "Mine.json").write_text(json.dumps(rows))
        (tmp_path / "bad.png").write_bytes(b"not a picture")
        source = open_source(tmp_path)
        log = tmp_path / "skipped.jsonl"
        options = {"on_error": "skip", "skip_file": log, "max_skip_share": 1.0}
        (batch,) = make(source, builder, epochs=1, **options)
        assert ids_of(batch) == ["Mine:2"]
        reasons = {e["row"]: e["reason"] for e in map(json.loads, log.read_text().splitlines())}
        assert "bad.png" in reasons[0]
        assert "not an image" in reasons[0]
        assert "2 image marker(s) for 0 image(s)" in reasons[1]
        with pytest.raises((ImageError, ValueError), match=r"Mine.json row [01]"):
            list(make(source, builder, epochs=1))

    def test_a_line_cut_by_a_kill_is_written_again(self, tmp_path):
        path = tmp_path / "skipped.jsonl"
        log = SkipLog(path, 5)
        log.record("a:1", "x")
        with path.open("a") as file:
            file.write('{"subset": "a", "ro')
        log = SkipLog(path, 5)
        log.record("a:1", "x")
        log.record("a:2", "y")
        rows = [json.loads(line)["row"] for line in path.read_text().splitlines()]
        assert rows == [1, 2]
        assert len(log) == 2

    def test_policy_and_file_go_together(self, builder):
        with pytest.raises(ValueError, match="needs a skip_file"):
            make(Pairs({"a": 3}), builder, on_error="skip")
        with pytest.raises(ValueError, match="on_error is 'ignore'"):
            make(Pairs({"a": 3}), builder, on_error="ignore", skip_file="x")
