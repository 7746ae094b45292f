"""The order by modality, as the authors trained, and copies of rows kept out of each other's pools."""

import collections
import functools
import itertools
import json
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llave_jax.config import default_config
from llave_jax.data.modality_order import IMAGE, MIXED, TEXT, ModalityOrder
from llave_jax.data.order import HOLE, Composition, UniformOrder
from llave_jax.data.pipeline import train_iterator
from llave_jax.data.rows import Row
from llave_jax.data.sources import PairSource, make_pair, open_source, split_held_out
from llave_jax.inputs.batch import Budget
from llave_jax.training.batch_shape import batch_budget, total_steps

MODALITY = Composition(order="modality")


class Rows(PairSource):
    """Rows of text alone, some of which say that their query has an image: reading them costs nothing.

    Args:
      image_query: of each row.
      contents: equal for rows of the same text.
    """

    def __init__(self, image_query, contents=None, words=None):
        count = len(image_query)
        self.subsets = {"a": range(count // 2), "b": range(count // 2, count)}
        self.image_query = np.array(image_query, bool)
        self._contents = np.arange(count) if contents is None else np.array(contents)
        self.words = self._contents % 23 if words is None else np.array(words)

    def pair_id(self, index):
        return f"{self.subset(index)}:{index}"

    def digest(self, index):
        return int(self._contents[index]) * 2**32

    def queries(self):
        return self.image_query, self.words.astype(np.int32)

    def __getitem__(self, index):
        text = f"{self._contents[index]}" + " w" * int(self.words[index])
        return make_pair(
            self.pair_id(index), f"row {index}", Row(text, "", "t", "", "", ""), [b""] * 3
        )

    def row_of(self, pair_id):
        return int(pair_id.rpartition(":")[2])


def deal_by_authors(words, groups):
    """Words of each group: a batch, the longest first, each to the shortest group with room."""
    size = len(words) // groups
    dealt = [[] for _ in range(groups)]
    for count in sorted(words, reverse=True):
        shortest = min((g for g in dealt if len(g) < size), key=sum)
        shortest.append(count)
    return dealt


class TestModalityOrder:
    @hypothesis.given(
        images=st.integers(0, 90),
        texts=st.integers(0, 90),
        num_groups=st.integers(1, 6),
        group_size=st.integers(1, 4),
        most_words=st.integers(1, 60),
        seed=st.integers(0, 2**31),
    )
    @hypothesis.example(images=64, texts=0, num_groups=4, group_size=4, most_words=9, seed=0)
    @hypothesis.example(images=70, texts=3, num_groups=4, group_size=4, most_words=9, seed=0)
    @hypothesis.example(images=9, texts=5, num_groups=4, group_size=4, most_words=9, seed=0)
    def test_it_is_the_authors_grouping(
        self, images, texts, num_groups, group_size, most_words, seed
    ):
        hypothesis.assume(images + texts)
        rng = np.random.default_rng(seed)
        image_query = rng.permutation(np.arange(images + texts) < images)
        words = rng.integers(0, most_words, images + texts)
        order = ModalityOrder(
            image_query, words, num_groups=num_groups, group_size=group_size, seed=seed
        )
        size = num_groups * group_size
        full = {IMAGE: images // size, TEXT: texts // size}
        steps = (images + texts) // size
        assert order.batches_per_epoch == max(1, steps)
        for epoch in range(2):
            numbers = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
            seen = []
            for number in numbers:
                rows = order.rows(number)
                present = rows[rows != HOLE]
                seen += present.tolist()
                kinds = set(image_query[present].tolist())
                of_kind = {MIXED: {True, False}, IMAGE: {True}, TEXT: {False}}
                assert kinds == of_kind[order.modality(number)]
                assert (order.modality(number) == MIXED) <= (number == numbers[-1])
                if steps:
                    assert len(present) == size
                    found = [words[group].tolist() for group in rows]
                    assert found == deal_by_authors(words[present].tolist(), num_groups)
                else:  # as many in each group, but for one
                    counts = np.sum(rows != HOLE, axis=1)
                    assert counts.max() - counts.min() <= 1
            assert len(set(seen)) == len(seen)
            assert len(seen) == (steps * size or images + texts)
            kinds = collections.Counter(order.modality(number) for number in numbers)
            if min(images, texts) >= size:  # as the authors' code cuts them
                left = images + texts - size * sum(full.values())
                assert kinds[IMAGE] == full[IMAGE]
                assert kinds[TEXT] == full[TEXT]
                assert kinds[MIXED] == (left >= size)
            elif min(images, texts) and max(images, texts) >= size:
                scarce = np.flatnonzero(image_query == (images < texts))
                assert set(scarce.tolist()) <= set(seen)

    def test_it_is_random_in_every_epoch_and_the_same_again(self):
        image_query, words = np.arange(400) % 4 > 0, np.arange(400) % 7
        options = {"num_groups": 4, "group_size": 4}
        order = ModalityOrder(image_query, words, seed=1, **options)
        again = pickle.loads(pickle.dumps(order))
        other = ModalityOrder(image_query, words, seed=2, **options)
        epochs = [
            np.stack([o.rows(25 * epoch + i) for i in range(25)])
            for o, epoch in [(order, 0), (order, 1), (other, 0), (again, 1)]
        ]
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], epochs[2])
        np.testing.assert_array_equal(epochs[1], epochs[3])
        kinds = [[order.modality(25 * epoch + i) for i in range(25)] for epoch in range(2)]
        assert kinds[0] != kinds[1]

    def test_the_papers_epoch(self):
        """662 178 rows, a quarter of them without an image in the query: 2 586 steps."""
        image_query = np.arange(662_178) >= 167_166
        order = ModalityOrder(
            image_query, np.ones(662_178, int), num_groups=64, group_size=4, seed=0
        )
        kinds = collections.Counter(order.modality(number) for number in range(2586))
        assert order.batches_per_epoch == 2586
        assert kinds == {IMAGE: 495_012 // 256, TEXT: 167_166 // 256, MIXED: 1}
        assert order.modality(2585) == MIXED


class TestUniformOrder:
    @hypothesis.given(
        contents=st.lists(st.integers(0, 60), min_size=1, max_size=120),
        cut=st.integers(0, 120),
        num_slots=st.integers(1, 40),
        seed=st.integers(0, 2**31),
    )
    @hypothesis.example(contents=list(range(61)), cut=9, num_slots=12, seed=0)
    @hypothesis.example(contents=[5] * 50, cut=9, num_slots=12, seed=0)
    def test_each_row_once_an_epoch_and_no_content_twice_in_a_batch(
        self, contents, cut, num_slots, seed
    ):
        contents, starts = np.array(contents, np.uint64), np.array([0, min(cut, len(contents))])
        order = UniformOrder(contents, starts, num_slots=num_slots, seed=seed)
        least = -(-len(contents) // num_slots)
        slot_of = {}
        for epoch in range(3):
            batches = [
                order.rows(epoch * order.batches_per_epoch + i)
                for i in range(order.batches_per_epoch)
            ]
            rows = np.concatenate([batch[batch != HOLE] for batch in batches])
            assert len(set(rows.tolist())) == len(rows)
            counts = collections.Counter(contents.tolist())
            expected = {content: min(count, least) for content, count in counts.items()}
            assert collections.Counter(contents[rows].tolist()) == expected
            for batch in batches:
                found = contents[batch[batch != HOLE]].tolist()
                assert len(set(found)) == len(found)
                for slot, row in enumerate(batch):
                    if row != HOLE:  # a content keeps its slot, and so its process
                        assert slot_of.setdefault(contents[row], slot) == slot
        if max(counts.values()) == 1:
            assert order.batches_per_epoch == least
            of_slots = collections.Counter(slot_of.values())
            assert max(of_slots.values()) <= least
            of_a = collections.Counter(slot_of[content] for content in contents[: starts[1]])
            assert max(of_a.values(), default=0) <= -(-int(starts[1]) // num_slots)

    def test_it_is_random_in_every_epoch_and_the_same_again(self):
        contents, starts = np.arange(100, dtype=np.uint64), np.array([0])
        order = UniformOrder(contents, starts, num_slots=10, seed=1)
        again = pickle.loads(pickle.dumps(order))
        other = UniformOrder(contents, starts, num_slots=10, seed=2)
        epochs = [
            np.stack([o.rows(10 * epoch + i) for i in range(10)])
            for o, epoch in [(order, 0), (order, 1), (other, 0), (again, 1)]
        ]
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], epochs[2])
        np.testing.assert_array_equal(epochs[1], epochs[3])

    def test_small_data_makes_batches_of_about_one_size(self):
        order = UniformOrder(np.arange(260, dtype=np.uint64), np.array([0]), num_slots=256, seed=0)
        sizes = [np.sum(order.rows(number) != HOLE) for number in range(2)]
        assert sum(sizes) == 260
        assert min(sizes) > 90


class Run:
    """Steps of all processes of a run, with what each has and what still waits."""

    def __init__(self, source, builder, *, processes, steps, stop=None, workers=0, **options):
        self.source = source
        self.steps = [[] for _ in range(steps)]
        self.waiting = []
        self.batches = []
        for process in range(processes):
            fresh = functools.partial(
                train_iterator,
                source,
                builder,
                process_index=process,
                process_count=processes,
                seed=3,
                prefetch=1,
                **options,
            )
            iterator = fresh()
            for number in range(steps):
                if number == stop:
                    state = json.loads(json.dumps(iterator.get_state()))
                    iterator.close()
                    iterator = fresh(num_workers=workers)
                    iterator.set_state(state)
                batch = next(iterator)
                self.batches.append(batch)
                self.steps[number].append(batch.ids)
            self.waiting.append(iterator.get_state())
            iterator.close()

    def rows(self, step, micro_batch=None):
        """Rows of a step over all processes, or of one micro-batch of it."""
        packs = itertools.chain.from_iterable(
            ids if micro_batch is None else [ids[micro_batch]] for ids in self.steps[step]
        )
        return [self.source.row_of(name) for pack in packs for s in pack for name in s if name]


def same_batches(run, other):
    for batch, expected in zip(run.batches, other.batches, strict=True):
        assert (batch.ids, batch.epoch) == (expected.ids, expected.epoch)
        np.testing.assert_array_equal(batch.packed.tokens, expected.packed.tokens)


SHAPES = {
    "processes": st.integers(1, 4),
    "num_shards": st.integers(1, 2),
    "micro_batches": st.integers(1, 2),
    "group_size": st.integers(1, 3),
}


class TestModalityBatches:
    @hypothesis.given(
        image_query=st.lists(st.booleans(), min_size=1, max_size=120),
        **SHAPES,
        row_length=st.sampled_from([64, 96, 512]),
        repeats=st.sampled_from([1, 1, 2, 9]),
        stop=st.integers(0, 6),
    )
    @hypothesis.settings(max_examples=40, deadline=None)
    def test_pools_have_one_kind_and_no_pair_is_lost(
        self, builder, image_query, row_length, group_size, repeats, stop, **shape
    ):
        """With budgets of all sizes, down to one pair in a shard."""
        source = Rows(image_query, contents=np.arange(len(image_query)) // repeats)
        hypothesis.assume(len(set(source.contents().tolist())) >= shape["processes"])
        order = ModalityOrder(
            *source.queries(),
            num_groups=shape["processes"] * shape["micro_batches"] * shape["num_shards"],
            group_size=group_size,
            seed=3,
        )
        steps = min(7, 2 * order.batches_per_epoch + 1)
        budget = Budget(rows=2, row_length=row_length, crops=0, groups=group_size + 1)
        options = {**shape, "composition": MODALITY, "group_size": group_size, "lookahead": 2}
        run = Run(source, builder, budget=budget, steps=steps, **options)
        placed, released = collections.Counter(), collections.Counter()
        for number in range(steps):
            rows = run.rows(number)
            kinds = {bool(source.image_query[row]) for row in rows}
            if order.modality(number) != MIXED:
                assert kinds <= {order.modality(number) == IMAGE}
            contents = [source.digest(row) for row in rows]
            assert len(set(contents)) == len(contents)
            placed.update(rows)
            batch = order.rows(number)
            released.update(batch[batch != HOLE].tolist())
        for state in run.waiting:
            assert state["next"] == steps * order.batch_size // shape["processes"]
            placed.update(position % len(source) for position in state["carry"])
        assert placed == released
        stopped = Run(source, builder, budget=budget, steps=steps, stop=stop % steps, **options)
        same_batches(stopped, run)
        assert stopped.waiting == run.waiting

    @hypothesis.given(
        image_query=st.lists(st.booleans(), min_size=20, max_size=90),
        **SHAPES,
    )
    @hypothesis.settings(max_examples=15, deadline=None)
    def test_with_room_enough_every_group_has_its_place(
        self, builder, image_query, group_size, processes, micro_batches, num_shards
    ):
        """On any number of processes: micro-batches are runs of groups, shards have a group each."""
        source = Rows(image_query)
        shards = processes * num_shards
        order = ModalityOrder(
            *source.queries(), num_groups=micro_batches * shards, group_size=group_size, seed=3
        )
        steps = order.batches_per_epoch + 1
        run = Run(
            source,
            builder,
            processes=processes,
            steps=steps,
            budget=Budget(rows=8, row_length=512, crops=0, groups=group_size),
            num_shards=num_shards,
            micro_batches=micro_batches,
            composition=MODALITY,
        )
        for number in range(steps):
            groups = order.rows(number).reshape(micro_batches, shards, group_size)
            for micro_batch, shard in np.ndindex(micro_batches, shards):
                process, local = divmod(shard, num_shards)
                ids = run.steps[number][process][micro_batch][local]
                found = [source.row_of(name) for name in ids if name]
                expected = groups[micro_batch, shard]
                assert found == expected[expected != HOLE].tolist()
        epochs = [batch.epoch for batch in run.batches[:steps]]
        assert epochs[order.batches_per_epoch - 1] == 1

    def test_another_mesh_and_budget_continue_without_loss(self, builder):
        """The same pairs are dealt to twice as many devices, those that waited among them."""
        source = Rows(np.arange(70) % 3 > 0)
        options = {"seed": 3, "composition": MODALITY, "process_count": 2, "micro_batches": 2}
        order = ModalityOrder(*source.queries(), num_groups=8, group_size=2, seed=3)
        placed, waited = collections.Counter(), 0
        for process in range(2):
            first = train_iterator(
                source,
                builder,
                Budget(rows=1, row_length=100, crops=0, groups=3),
                num_shards=2,
                group_size=2,
                process_index=process,
                **options,
            )
            second = train_iterator(
                source,
                builder,
                Budget(rows=2, row_length=200, crops=0, groups=3),
                num_shards=4,
                group_size=1,
                process_index=process,
                **options,
            )
            batches = [next(first) for _ in range(2)]
            waited += len(first.get_state()["carry"])
            second.set_state(json.loads(json.dumps(first.get_state())))
            batches += [next(second) for _ in range(6)]
            ids = [name for batch in batches for m in batch.ids for s in m for name in s if name]
            placed.update(source.row_of(name) for name in ids)
            placed.update(p % 70 for p in second.get_state()["carry"])
        assert waited
        released = np.concatenate([order.rows(number).reshape(-1) for number in range(8)])
        assert placed == collections.Counter(released.tolist())

    @pytest.mark.slow  # a worker process takes seconds to start
    def test_workers_make_the_same_batches(self, builder):
        source = Rows(np.arange(90) % 3 > 0)
        options = {
            "processes": 2,
            "steps": 6,
            "budget": Budget(rows=1, row_length=96, crops=0, groups=3),
            "num_shards": 2,
            "micro_batches": 2,
            "composition": MODALITY,
            "group_size": 2,
        }
        same_batches(
            Run(source, builder, stop=3, workers=2, **options), Run(source, builder, **options)
        )

    def test_pairs_that_wait_are_tried_first_in_the_next_step_of_their_kind(self, builder):
        """Some groups have more long pairs than fit: they join the next batch of their kind."""
        words = np.where(np.arange(64) % 8 == 0, 60, 1)
        source = Rows(np.arange(64) % 2 > 0, words=words)
        options = {
            "processes": 1,
            "num_shards": 2,
            "budget": Budget(rows=1, row_length=300, crops=0, groups=6),
            "composition": MODALITY,
            "group_size": 4,
        }
        order = ModalityOrder(*source.queries(), num_groups=2, group_size=4, seed=3)
        run = Run(source, builder, steps=8, **options)
        late = 0
        for number in range(8):
            expected = set(order.rows(number).reshape(-1).tolist())
            before = [
                number - 1 - i
                for i in range(number)
                if order.modality(number - 1 - i) == order.modality(number)
            ]
            waited = set(run.rows(number)) - expected
            late += len(waited)
            if waited:
                assert waited <= set(order.rows(before[0]).reshape(-1).tolist())
        assert late

    def test_a_backlog_is_told_and_kept_small_in_memory(self, builder, caplog):
        source = Rows(np.arange(60) % 2 > 0)
        options = {"processes": 1, "num_shards": 1, "group_size": 6, "lookahead": 1}
        budget = Budget(rows=1, row_length=96, crops=0, groups=7)
        run = Run(source, builder, steps=10, budget=budget, composition=MODALITY, **options)
        waiting = len(run.waiting[0]["carry"])
        assert waiting > 6
        assert "raise config.batch.tokens_per_pair" in caplog.text
        assert waiting + sum(len(run.rows(number)) for number in range(10)) == 60

    def test_what_does_not_go_with_it_is_refused(self, builder):
        source = Rows([True, False])
        options = {"seed": 0, "num_shards": 1, "composition": MODALITY}
        budget = Budget(rows=2, row_length=64, crops=0, groups=1)
        with pytest.raises(ValueError, match="uniform order without weights; count steps"):
            train_iterator(source, builder, budget, epochs=1, **options)
        state = train_iterator(source, builder, budget, **options).get_state()
        for change in ({"group_size": 2}, {"process_count": 2}, {"composition": Composition()}):
            with pytest.raises(ValueError, match=r"saved data position is for (order|processes)"):
                train_iterator(source, builder, budget, **options | change).set_state(state)


class TestCopies:
    @hypothesis.given(
        contents=st.lists(st.integers(0, 70), min_size=60, max_size=90),
        processes=st.integers(1, 4),
        num_shards=st.integers(1, 2),
        micro_batches=st.integers(1, 2),
        groups=st.sampled_from([3, 12, 40]),
        row_length=st.sampled_from([64, 2048]),
        composed=st.sampled_from([{}, {}, {"weights": {"a": 1.0, "b": 9.0}}, {"sub_batch": 3}]),
    )
    @hypothesis.settings(max_examples=8, deadline=None)
    def test_no_step_has_a_content_twice(
        self, builder, contents, groups, row_length, composed, processes, **shape
    ):
        """However small the data, over ends of epochs, with copies in the data and heavy subsets."""
        source = Rows(np.ones(len(contents)), contents=contents)
        composition = Composition(**composed)
        budget = Budget(rows=2, row_length=row_length, crops=0, groups=groups)
        run = Run(
            source,
            builder,
            processes=processes,
            steps=6,
            stop=4,
            budget=budget,
            composition=composition,
            **shape,
        )
        for number in range(6):
            found = [source.digest(row) for row in run.rows(number)]
            assert found or not composed
            assert len(set(found)) == len(found)

    @pytest.mark.parametrize("rows", [50, 70, 200])
    def test_batches_are_the_same_on_any_number_of_processes(self, builder, rows):
        """64 slots: over ends of epochs, with copies, every row as often as any other."""
        contents = np.minimum(np.arange(rows), rows - 2)
        source = Rows(np.ones(rows), contents=contents, words=np.ones(rows))
        budget = Budget(rows=16, row_length=512, crops=0, groups=8)
        steps = 3 * -(-rows // 64)
        runs = [
            Run(
                source,
                builder,
                processes=processes,
                steps=steps,
                num_shards=4 // processes,
                micro_batches=2,
                budget=budget,
            )
            for processes in (1, 2, 4)
        ]
        read = [[sorted(run.rows(number)) for number in range(steps)] for run in runs]
        assert read[0] == read[1] == read[2]
        counts = collections.Counter(itertools.chain.from_iterable(read[0]))
        if rows > 64:
            assert counts == dict.fromkeys(range(rows), 3)
        else:  # one batch an epoch has one of the copies
            assert counts == dict.fromkeys(range(rows - 1), 3)
        assert runs[0].batches[-1].epoch == runs[2].batches[-1].epoch == 3

    def test_steps_of_small_data_are_counted_as_they_are(self):
        config = default_config()
        config.data.epochs = 10
        assert total_steps(config, 200) == 10  # one step an epoch, of 256 slots
        assert total_steps(config, 512) == 20
        assert total_steps(config, 513) == 30
        config.data.sub_batch = 2
        assert total_steps(config, 513) == 21
        config.data.sub_batch = 1
        config.batch.fill = 0.5
        assert total_steps(config, 200) == 16
        config.data.order, config.batch.fill = "modality", 1.0
        assert total_steps(config, 200) == 10
        assert total_steps(config, 700) == 20
        config.data.epochs = 1
        assert total_steps(config, 662_178) == 2586
        config.batch.fill = 0.86
        config.batch.tokens_per_pair, config.batch.crops_per_pair = 3000.0, 4.0
        with pytest.raises(
            ValueError, match=r"set batch.pairs to about 220, .* to 3488, .* to 4.65"
        ):
            batch_budget(config, 8)


class TestFacts:
    ROWS = (
        {"qry": "<|image_1|>\nWhat is  this?", "qry_image_path": "a.png", "pos_text": "x"},
        {"qry": "<|image_1|>\nFind a page: who", "qry_image_path": "", "pos_text": "x"},
        {"qry": "Find a cat", "qry_image_path": None, "pos_text": "x"},
        {"qry": "", "qry_image_path": "", "pos_text": ""},
        {"qry": "Find a cat", "qry_image_path": "", "pos_text": "x", "neg_text": "y"},
        {"qry": 5},
        {"qry": "Find a cat", "qry_image_path": "", "pos_text": "y"},
    )

    @pytest.fixture
    def source(self, tmp_path):
        rows = [{"pos_image_path": ""} | row for row in self.ROWS]
        (tmp_path / "B.json").write_text(json.dumps(rows))
        (tmp_path / "A.json").write_text(json.dumps(rows[:1]))
        return open_source(tmp_path, subsets=["A", "B"])

    def test_a_marker_without_a_path_is_no_image(self, source):
        image_query, words = source.queries()
        np.testing.assert_array_equal(image_query, [1, 1, 0, 0, 0, 0, 0, 0])
        np.testing.assert_array_equal(words, [4, 4, 5, 3, 0, 3, 0, 3])

    def test_contents_are_query_and_target(self, source):
        contents = source.contents()
        assert contents.dtype == np.uint64
        equal = [
            pair
            for pair in itertools.combinations(range(8), 2)
            if contents[pair[0]] == contents[pair[1]]
        ]
        # The same row in two subsets; null and "", and another hard negative. Unusable rows differ.
        assert equal == [(0, 1), (3, 5)]

    def test_selected_rows_keep_theirs(self, source):
        kept, held = split_held_out(source, 0.5)
        facts = dict(
            zip(source.contents().tolist(), zip(*source.queries(), strict=True), strict=False)
        )
        for part in (kept, held):
            for content, *row in zip(part.contents().tolist(), *part.queries(), strict=True):
                assert tuple(row) == facts[content]
        assert len(kept) + len(held) == 8

    def test_a_source_that_does_not_know_says_so(self, builder):
        class Unknowing(Rows):
            queries = PairSource.queries

        budget = Budget(rows=2, row_length=64, crops=0, groups=1)
        with pytest.raises(ValueError, match=r"Unknowing has no queries\(\)"):
            train_iterator(
                Unknowing([True]), builder, budget, seed=0, num_shards=1, composition=MODALITY
            )
