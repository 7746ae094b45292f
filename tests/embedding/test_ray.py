"""`--engine ray` on a cluster of several nodes, each of them processes of this machine."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest

from llave_jax import embed
from llave_jax.embedding import bulk, entries
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.item_sources import open_items
from tools import prepare_data

pytestmark = pytest.mark.slow

ITEMS = 300


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(entries, "CHUNK_WEIGHT", 16)
    monkeypatch.setattr(entries, "PIECE_ENTRIES", 8)


@pytest.fixture
def job(tmp_path, small):
    for i in range(4):
        PIL.Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [{"text": f"caption {i} " + "word " * (i % 9), "id": f"c{i}"} for i in range(ITEMS)]
    for i in range(4):
        lines[50 * i + 3]["image"] = f"{i}.png"
    lines[77] = {"image": "nowhere.png", "id": "missing"}
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return bulk.Job(
        open_items(tmp_path / "items.jsonl"),
        tmp_path / "out",
        "",
        format="parquet",
        on_error="skip",
    )


def rows(path):
    table = pyarrow.parquet.read_table(path).to_pydict()
    assert len(set(table["id"])) == len(table["id"])
    return dict(zip(table["id"], map(np.array, table["vector"]), strict=True))


def test_a_node_is_lost(cluster, job, golden_model, monkeypatch):
    """Every id once, and no vector differs from those of a job without the engine. The next start has
    nothing to embed, in either engine."""
    import ray

    from llave_jax.embedding import ray_bulk

    nodes = [cluster.add_node(num_cpus=1, resources={"MODEL": 1}) for _ in range(2)]
    cluster.wait_for_nodes()
    resources = {"CPU": 0, "MODEL": 1}
    model = ray_bulk.find_model(golden_model.directory, None, None, resources)
    job = dataclasses.replace(job, fingerprint=model.fingerprint)
    seen = []
    enter = ray_bulk._enter

    def counted(store, progress, chunk):
        seen.append(chunk)
        if len(seen) == 3:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1, resources={"MODEL": 1}))
        enter(store, progress, chunk)

    monkeypatch.setattr(ray_bulk, "_enter", counted)
    result = ray_bulk.embed_on_ray(model, job, actors=2, resources=resources)
    assert result[1:3] == (ITEMS - 1, 1)
    assert len(seen) > 15
    assert sum(not node["Alive"] for node in ray.nodes()) == 1
    embedder = Embedder.from_pretrained(golden_model.directory)
    alone = dataclasses.replace(job, output=job.output.with_name("alone"))
    bulk.embed_items(embedder, alone)
    expected, found = rows(alone.output), rows(job.output)
    assert found.keys() == expected.keys()
    for key, vector in expected.items():
        np.testing.assert_array_equal(found[key], vector)
    (skipped,) = (job.output / "_skipped-00000-of-00001.jsonl").read_text().splitlines()
    assert json.loads(skipped)["id"] == "missing"
    assert "nowhere.png" in json.loads(skipped)["reason"]

    monkeypatch.setattr(Embedder, "encode", None)
    assert bulk.embed_items(embedder, job)[1:3] == (ITEMS - 1, 1)
    seen.clear()
    assert ray_bulk.embed_on_ray(model, alone, actors=1, resources=resources)[1] == ITEMS - 1
    assert all(chunk.state.kept for chunk in seen)


def test_commands(cluster, tmp_path, golden_model, capsys):
    """Flags choose the workers; mistakes are one line."""
    cluster.add_node(num_cpus=1, resources={"B": 1})
    (tmp_path / "items.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    model = ["--model", str(golden_model.directory), "--engine=ray", "--worker-resources=B=1"]

    def run(*options, name="items", status=2):
        files = ["--input", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / name)]
        assert embed.main([*model, *files, *options]) == status
        said = capsys.readouterr()
        return said.err if status else said.out

    assert "no node of the cluster has {'GPU': 1.0}" in run("--worker-resources=GPU=1")
    assert "leave the cluster no CPU for tasks" in run("--worker-resources=CPU=1", "--workers=9")
    assert "embeddings.npy has one writer" in run()
    assert "this model's prompts are: none" in run("--format=parquet", "--prompt-name=q")
    assert "2 embeddings of 64 numbers" in run("--format=parquet", status=0)
    assert "broken.jsonl:1: is not JSON" in run("--format=parquet", name="broken")


def test_training_data(cluster, tmp_path, capsys):
    """tools/prepare_data.py writes the same records, and names a broken row."""
    for i in range(10):
        PIL.Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    row = {"qry": "<|image_1|>\nwhat", "pos_text": "a", "pos_image_path": ""}
    rows = [row | {"qry_image_path": f"{i}.png", "pos_text": f"answer {i}"} for i in range(10)]
    (tmp_path / "Set.json").write_text(json.dumps(rows))
    script = ["--input", str(tmp_path / "Set.json"), "--image-root", str(tmp_path)]
    script += ["--rows-per-shard=4", "--num-workers=1"]
    for engine in ("ray", "local"):
        assert (
            prepare_data.main([*script, f"--output={tmp_path / engine}", f"--engine={engine}"]) == 0
        )
    files = sorted((tmp_path / "ray").rglob("*.array_record-*"))
    assert len(files) == 6
    for path in files:
        other = tmp_path / "local" / path.relative_to(tmp_path / "ray")
        if path.suffix == ".json":
            ours, theirs = (json.loads(p.read_text()) for p in (path, other))
            # The bytes of a record have no fixed order.
            assert (ours["rows"], ours["digests"]) == (theirs["rows"], theirs["digests"])
    (tmp_path / "7.png").write_bytes(b"broken")
    assert prepare_data.main([*script, f"--output={tmp_path / 'b'}", "--engine=ray"]) == 2
    assert "7.png" in capsys.readouterr().err
