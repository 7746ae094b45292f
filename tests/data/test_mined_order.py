"""The order of mined neighbours: clusters of each other's hard negatives, and batches made of them."""

import collections
import itertools
import pickle
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llave_jax.data.mined_order import (
    Graph,
    MinedOrder,
    deal_clusters,
    find_clusters,
    read_graph,
)
from llave_jax.data.order import HOLE, Composition
from llave_jax.data.pipeline import train_iterator
from llave_jax.inputs.batch import Budget
from llave_jax.training import resume
from tests.data.test_order import Rows, Run, same_batches


def write(path, contents, neighbours):
    table = pa.table(
        {
            "content": pa.array(contents, pa.uint64()),
            "neighbours": pa.array(neighbours, pa.list_(pa.uint64())),
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def graph_of(neighbours) -> Graph:
    starts = np.concatenate([[0], np.cumsum([len(links) for links in neighbours])])
    return Graph(starts.astype(np.int64), np.array(list(itertools.chain(*neighbours)), np.int32))


def planted(groups, size, links, noise, seed=0):
    """Neighbours of nodes in hidden groups: `links` of the own group, and `noise` of any other node."""
    rng = np.random.default_rng(seed)
    hidden = rng.permutation(groups * size).reshape(groups, size)
    neighbours = [[] for _ in range(groups * size)]
    for group in hidden:
        for node in group:
            own = rng.permutation(group[group != node])[:links]
            others = rng.integers(0, groups * size, noise)
            neighbours[node] = rng.permutation([*own, *others[others != node]]).tolist()
    return neighbours, hidden


def orders_of(contents, path, *, processes=1, seed=0, size) -> list[MinedOrder]:
    return [
        MinedOrder(
            deal_clusters(
                contents,
                path,
                size=size,
                seed=seed,
                process_index=process,
                process_count=processes,
            ),
            seed=seed,
            process_index=process,
            epochs=None,
        )
        for process in range(processes)
    ]


class TestClusters:
    @hypothesis.given(
        count=st.integers(1, 60),
        degree=st.integers(0, 6),
        size=st.integers(1, 9),
        seed=st.integers(0, 2**31),
    )
    def test_every_node_is_in_one_and_all_but_the_last_are_full(self, count, degree, size, seed):
        rng = np.random.default_rng(seed)
        neighbours = [
            rng.integers(0, count, rng.integers(0, degree + 1)).tolist() for _ in range(count)
        ]
        clusters = find_clusters(graph_of(neighbours), size, seed)
        assert sorted(np.concatenate(clusters).tolist()) == list(range(count))
        assert {len(cluster) for cluster in clusters[:-1]} <= {size}
        assert 1 <= len(clusters[-1]) <= size
        again = find_clusters(graph_of(neighbours), size, seed)
        for cluster, other in zip(clusters, again, strict=True):
            np.testing.assert_array_equal(cluster, other)

    def test_groups_that_only_know_themselves_are_the_clusters(self):
        neighbours, hidden = planted(groups=40, size=8, links=3, noise=0)
        clusters = find_clusters(graph_of(neighbours), 8, seed=1)
        assert {frozenset(c.tolist()) for c in clusters} == {frozenset(g.tolist()) for g in hidden}

    def test_groups_are_found_among_other_links(self):
        """A third of all links lead anywhere: a cluster takes the node that has the most with it."""
        neighbours, _ = planted(groups=30, size=16, links=6, noise=3)
        clusters = find_clusters(graph_of(neighbours), 16, seed=1)
        of = {node: number for number, c in enumerate(clusters) for node in c.tolist()}
        inside = [of[node] == of[link] for node, links in enumerate(neighbours) for link in links]
        assert np.mean(inside) > 0.95 * 2 / 3

    def test_pieces_stay_whole_where_they_fit(self):
        """Groups of 3 and of 5 make clusters of 8."""
        neighbours, first = [], 0
        for size in [3, 5] * 6:
            group = list(range(first, first + size))
            neighbours += [[n for n in group if n != node] for node in group]
            first += size
        clusters = find_clusters(graph_of(neighbours), 8, seed=1)
        assert len(clusters) == 6
        of = {node: number for number, c in enumerate(clusters) for node in c.tolist()}
        for node, links in enumerate(neighbours):
            assert {of[node]} == {of[other] for other in links}

    def test_a_link_counts_in_both_directions(self):
        """All link to node 0 alone, which links to none: they share its cluster, as far as they fit."""
        neighbours = [[]] + [[0]] * 7 + [[]] * 8
        clusters = find_clusters(graph_of(neighbours), 8, seed=0)
        of = {node: number for number, c in enumerate(clusters) for node in c.tolist()}
        assert len({of[node] for node in range(8)}) == 1


class TestFile:
    @hypothesis.given(
        listed=st.lists(st.integers(0, 40), min_size=1, max_size=30),
        data=st.data(),
    )
    def test_links_are_those_of_the_file(self, listed, data, tmp_path_factory):
        """Contents of rows that are not trained on, copies, nulls and empty lists among them."""
        path = tmp_path_factory.mktemp("mined") / "n.parquet"
        draws = st.one_of(st.none(), st.lists(st.integers(0, 60), max_size=5, unique=True))
        neighbours = [data.draw(draws) for _ in listed]
        write(
            path,
            [1000 * content for content in listed],
            [links and [1000 * link for link in links] for links in neighbours],
        )
        trained = sorted({*data.draw(st.sets(st.integers(0, 60), max_size=5)), *listed[::2]})
        hypothesis.assume(sum(content in listed for content in trained) >= len(trained) / 2)
        graph = read_graph(path, 1000 * np.array(trained, np.uint64))
        for number, content in enumerate(trained):
            links = graph.links[graph.starts[number] : graph.starts[number + 1]]
            first = listed.index(content) if content in listed else None
            expected = (first is not None and neighbours[first]) or []
            expected = [link for link in expected if link in trained and link != content]
            assert [trained[link] for link in links] == expected

    def test_what_is_wrong_is_named(self, tmp_path):
        contents = np.arange(10, dtype=np.uint64)
        path = tmp_path / "n.parquet"
        with pytest.raises(ValueError, match=r"mined:.*n.parquet.*no such file; llave_jax.mine"):
            read_graph(path, contents)
        path.write_bytes(b"PAR1 no")
        with pytest.raises(ValueError, match=r"n\.parquet: not a readable parquet file"):
            read_graph(path, contents)
        pyarrow.parquet.write_table(pa.table({"content": pa.array([1], pa.uint64())}), path)
        with pytest.raises(ValueError, match="the column neighbours is not there; expected list<u"):
            read_graph(path, contents)
        pyarrow.parquet.write_table(pa.table({"content": ["a"], "neighbours": [[1]]}), path)
        with pytest.raises(ValueError, match="the column content is string; expected uint64"):
            read_graph(path, contents)
        table = pa.table({"content": pa.array([1], pa.uint64()), "neighbours": [[1]]})
        pyarrow.parquet.write_table(table, path)
        with pytest.raises(ValueError, match="neighbours is list<int64>; expected list<uint64>"):
            read_graph(path, contents)
        write(path, [0, 1, 2, 3, 100, 101], [[1]] * 6)
        with pytest.raises(
            ValueError, match=r"lists 40.0% of the different rows .* 50% are needed"
        ):
            read_graph(path, contents)

    def test_the_order_needs_a_size_and_no_weights(self):
        for options in ({}, {"sub_batch": 4, "weights": {"a": 1.0}}):
            with pytest.raises(ValueError, match=r"rows of a cluster from data.sub_batch"):
                Composition(order="mined:n.parquet", **options)
        with pytest.raises(ValueError, match=r"expected one of .* or mined:FILE"):
            Composition(order="mined:", sub_batch=2)


class TestMinedOrder:
    @hypothesis.given(
        contents=st.lists(st.integers(0, 60), min_size=1, max_size=120),
        processes=st.integers(1, 5),
        size=st.integers(2, 12),
        seed=st.integers(0, 2**31),
    )
    @hypothesis.example(contents=[5] * 50, processes=1, size=4, seed=0)
    @hypothesis.example(contents=list(range(9)), processes=5, size=12, seed=0)
    def test_each_row_once_an_epoch_and_equal_contents_belong_to_one_process(
        self, contents, processes, size, seed, tmp_path_factory
    ):
        hypothesis.assume(len(set(contents)) >= processes)
        path = tmp_path_factory.mktemp("mined") / "n.parquet"
        rng = np.random.default_rng(seed)
        write(path, contents, [rng.integers(0, 70, 4).tolist() for _ in contents])
        contents = np.array(contents, np.uint64)
        orders = orders_of(contents, path, processes=processes, size=size, seed=seed)
        owner = {}
        for epoch in range(3):
            read = []
            for process, order in enumerate(orders):
                rows = [int(order[epoch * order.size + n]) for n in range(order.size)]
                rows = [row for row in rows if row != HOLE]
                assert rows
                read += rows
                for row in rows:
                    assert owner.setdefault(contents[row], process) == process
            assert sorted(read) == list(range(len(contents)))
        if len(set(contents.tolist())) == len(contents):
            loads = collections.Counter(owner.values())
            assert max(loads.values()) - min(loads.values()) <= size

    def test_it_is_random_in_every_epoch_and_the_same_again(self, tmp_path):
        contents = np.arange(100, dtype=np.uint64)
        path = write(tmp_path / "n.parquet", contents, [[(n + 1) % 100] for n in range(100)])
        (order,) = orders_of(contents, path, size=4, seed=1)
        (other,) = orders_of(contents, path, size=4, seed=2)
        again = pickle.loads(pickle.dumps(order))
        assert order.size == 100
        epochs = [
            [int(o[100 * epoch + n]) for n in range(100)]
            for o, epoch in [(order, 0), (order, 1), (other, 0), (again, 1)]
        ]
        assert epochs[0] != epochs[1] == epochs[3] != epochs[2]
        # Clusters are the same in both epochs.
        clusters = [{tuple(epoch[n : n + 4]) for n in range(0, 100, 4)} for epoch in epochs]
        assert clusters[0] == clusters[1] != clusters[2]
        two = orders_of(contents, path, size=4, processes=2)
        places = [[int(o._epoch(0)[n]) for n in range(12)] for o in two]
        assert places[0] != places[1]


class TestMinedBatches:
    @pytest.fixture
    def composition(self, tmp_path):
        path = write(
            tmp_path / "n.parquet",
            [n * 2**32 for n in range(70)],
            [[(n ^ 1) * 2**32, (n ^ 2) * 2**32] for n in range(70)],
        )
        return Composition(order=f"mined:{path}", sub_batch=4)

    @hypothesis.given(
        repeats=st.sampled_from([1, 1, 2, 5]),
        processes=st.sampled_from([1, 2, 4]),
        row_length=st.sampled_from([64, 96, 512]),
        micro_batches=st.integers(1, 2),
        stop=st.integers(0, 6),
    )
    @hypothesis.settings(
        max_examples=12,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    def test_no_step_has_a_content_twice_and_a_stopped_run_continues(
        self, builder, composition, repeats, processes, row_length, micro_batches, stop
    ):
        source = Rows(np.ones(70), contents=np.arange(70) // repeats)
        options = {
            "processes": processes,
            "steps": 7,
            "budget": Budget(rows=2, row_length=row_length, crops=0, groups=3),
            "num_shards": 2,
            "micro_batches": micro_batches,
            "composition": composition,
            "lookahead": 2,
        }
        run = Run(source, builder, **options)
        for number in range(7):
            contents = [source.digest(row) for row in run.rows(number)]
            assert len(set(contents)) == len(contents)
        stopped = Run(source, builder, stop=stop, **options)
        same_batches(stopped, run)
        assert stopped.waiting == run.waiting

    @pytest.mark.parametrize(("processes", "copies"), [(4, 1), (2, 3)])
    def test_neighbours_share_steps(self, builder, tmp_path, processes, copies):
        """Of planted groups and some noise: almost as many as can be, where a shuffle has what chance gives.

        Also late in a run, when processes are apart, and with rows that have copies.
        """
        neighbours, _ = planted(groups=32, size=8, links=7, noise=1)
        rng = np.random.default_rng(0)
        contents = np.concatenate([np.arange(256), np.repeat(np.arange(0, 256, 16), copies - 1)])
        source = Rows(
            np.ones(len(contents)), contents=contents, words=rng.integers(1, 30, len(contents))
        )
        named = [[int(link) * 2**32 for link in links] for links in neighbours]
        path = write(tmp_path / "n.parquet", [n * 2**32 for n in range(256)], named)
        shares = {}
        for composition in (Composition(order=f"mined:{path}", sub_batch=8), Composition()):
            run = Run(
                source,
                builder,
                processes=processes,
                steps=30,
                num_shards=4 // processes,
                budget=Budget(rows=4, row_length=256, crops=0, groups=20),
                composition=composition,
            )
            found = []
            for step in range(10, 30):
                together = {int(contents[row]) for row in run.rows(step)}
                # Copies come without their neighbours.
                rows = [row for row in run.rows(step) if row < 256]
                found += [link in together for row in rows for link in neighbours[row]]
            shares[composition.order] = np.mean(found)
            pairs = np.mean([len(run.rows(step)) for step in range(30)])
        # Of a row's 8 neighbours one is noise. Where a process's step ends, it cuts a cluster of 8 anywhere: on
        # average that parts 21 of 56 links, or 3 of each of the step's pairs together. Pairs that wait part more.
        own = pairs / processes
        assert shares["uniform"] < 1.5 * pairs / 256
        assert shares[f"mined:{path}"] > (7 / 8) * (1 - 2 * 3 / own)

    @pytest.mark.slow  # a worker process takes seconds to start
    def test_workers_make_the_same_batches(self, builder, composition):
        source = Rows(np.ones(70))
        options = {
            "processes": 2,
            "steps": 6,
            "budget": Budget(rows=1, row_length=96, crops=0, groups=3),
            "num_shards": 2,
            "composition": composition,
        }
        same_batches(
            Run(source, builder, stop=3, workers=2, **options), Run(source, builder, **options)
        )

    def test_the_file_counts_by_what_it_holds(self, builder, composition, tmp_path):
        source = Rows(np.ones(70))
        budget = Budget(rows=2, row_length=64, crops=0, groups=4)
        options = {"seed": 0, "num_shards": 2}
        state = train_iterator(
            source, builder, budget, composition=composition, **options
        ).get_state()
        moved = tmp_path / "moved.parquet"
        shutil.copy(composition.mined, moved)
        elsewhere = Composition(order=f"mined:{moved}", sub_batch=4)
        train_iterator(source, builder, budget, composition=elsewhere, **options).set_state(state)
        write(moved, [n * 2**32 for n in range(70)], [[]] * 70)
        with pytest.raises(ValueError, match="the saved data position is for order"):
            train_iterator(source, builder, budget, composition=elsewhere, **options).set_state(
                state
            )

    def test_a_config_may_name_the_file_elsewhere(self):
        def refused(before, now):
            before, now = ({"data": {"order": order}} for order in (before, now))
            return resume.refused_changes(before, now)

        assert refused("mined:a.parquet", "mined:b.parquet") == []
        assert refused("uniform", "mined:b.parquet") != []
        assert refused("mined:a.parquet", "modality") != []
