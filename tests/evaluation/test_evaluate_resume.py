"""All 36 datasets in one command: killed in the middle, continued, averages checked."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llave_jax.common.files import partial_path
from llave_jax.evaluation.benchmarks.mmeb import MMEB_DATASETS
from llave_jax.evaluation.cache import EmbeddingCache
from llave_jax.inputs.content import item_key
from tests.evaluation.fake_encoder import HashEncoder, hash_vector
from tests.evaluation.mmeb_eval_tree import make_tree, score_mmeb

# Runs the evaluation with a stand-in for the model, and kills itself after some items.
PROGRAM = """
import os, signal, sys
from llave_jax.evaluation.cache import EmbeddingCache
from tests.evaluation.fake_encoder import HashEncoder
from tests.evaluation.mmeb_eval_tree import score_mmeb

data, output, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
encode = HashEncoder()

def encode_or_die(items):
    vectors = encode(items)
    if limit and len(encode.keys) > limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return vectors

results = score_mmeb(
    encode_or_die, data, None, output, cache=EmbeddingCache(output + "/embeddings", "model")
)
print(len(encode.keys))
print(results.table())
"""


def run(data, output, limit):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(data), str(output), str(limit)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def independent_accuracies(rows, folder):
    """Precision@1 by dataset, from the rows themselves: one loop, no shared code but the vectors."""
    from llave_jax.inputs.item import Item

    def vector(text, image):
        # A marker without an image holds the zero picture, None.
        images = (str(folder / image),) if image else (None,) * ("<|image_1|>" in text)
        return hash_vector(item_key(Item(text, images))).astype(np.float64)

    accuracies = {}
    for name, entries in rows.items():
        right = 0
        for row in entries:
            query = vector(row["qry_text"], row["qry_img_path"])
            pairs = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
            scores = [float(query @ vector(*pair)) for pair in pairs]
            right += pairs[scores.index(max(scores))] == pairs[0]
        accuracies[name] = right / len(entries)
    return accuracies


def test_killed_and_continued(tmp_path):
    rows = make_tree(tmp_path / "data")
    output = tmp_path / "out"
    killed = run(tmp_path / "data", output, 150)
    assert killed.returncode == -signal.SIGKILL
    done = {path.name for path in output.glob("*_score.json")}
    assert 0 < len(done) < 36
    kept = len(EmbeddingCache(output / "embeddings", "model"))
    assert kept > 100

    continued = run(tmp_path / "data", output, 0)
    assert continued.returncode == 0, continued.stderr
    encoded, table = continued.stdout.split("\n", 1)
    whole = HashEncoder()
    results = score_mmeb(whole, tmp_path / "data", None, tmp_path / "whole")
    assert int(encoded) + kept == len(whole.keys) == len(set(whole.keys))
    assert table.strip() == results.table()
    for name in rows:
        again, once = (
            directory / f"{name}_score.json" for directory in (output, tmp_path / "whole")
        )
        assert again.read_bytes() == once.read_bytes()

    expected = independent_accuracies(rows, tmp_path / "data/images")
    assert {result.info.name: result.score for result in results.tasks} == expected
    infos = MMEB_DATASETS
    groups = {
        "IND": [expected[i.name] for i in infos if i.in_distribution],
        "OOD": [expected[i.name] for i in infos if not i.in_distribution],
        "overall": list(expected.values()),
    }
    for task in ("classification", "vqa", "retrieval", "grounding"):
        groups[task] = [expected[i.name] for i in infos if i.meta_task == task]
    assert {a.label: a.value for a in results.averages()} == {
        label: pytest.approx(sum(values) / len(values)) for label, values in groups.items()
    }


def test_archive_and_folder_give_the_same(tmp_path):
    make_tree(tmp_path / "folder")
    make_tree(tmp_path / "archive", zipped=True)
    assert (tmp_path / "archive/images.zip").is_file()
    tables = [score_mmeb(HashEncoder(), tmp_path / name).table() for name in ("folder", "archive")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit", "NaN", "of another model", "foreign"])
def test_a_damaged_shard_is_encoded_again(tmp_path, damage, caplog):
    make_tree(tmp_path / "data")

    def evaluate(model="model"):
        encode = HashEncoder()
        cache = EmbeddingCache(tmp_path / "cache", model)
        score_mmeb(encode, tmp_path / "data", ["GQA"], tmp_path / "out", cache=cache)
        return len(encode.keys), (tmp_path / "out/GQA_score.json").read_text()

    whole = evaluate()
    assert evaluate() == (0, whole[1])
    (shard,) = (tmp_path / "cache/model").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(content[:-1])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "a bit":
        content[-5] ^= 1
        shard.write_bytes(content)
    elif damage == "NaN":  # of an earlier version, without a checksum
        arrays = load_file(shard)
        arrays["embeddings"][1, 2] = np.nan
        save_file(arrays, shard)
    elif damage == "of another model":
        evaluate("other")
        (other,) = (tmp_path / "cache/other").glob("*.safetensors")
        shutil.copyfile(other, shard)
    else:
        save_file({"weights": np.zeros(3, np.float32)}, shard)
    caplog.clear()
    assert evaluate() == whole
    assert f"{shard}: " in caplog.text
    assert "its items are encoded again" in caplog.text
    assert evaluate() == (0, whole[1])
    assert not shard.exists()


def test_what_a_killed_writer_leaves_is_no_shard_and_is_removed(tmp_path):
    left = partial_path(tmp_path / "cache/model/0.safetensors")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert len(EmbeddingCache(tmp_path / "cache", "model")) == 0
    assert not left.exists()


def test_scores_are_kept_for_the_similarity_analysis(tmp_path, capsys):
    from llave_jax import similarity
    from llave_jax.evaluation.similarity_comparison import read_similarity

    make_tree(tmp_path / "data")
    for label in ("a", "b"):
        score_mmeb(HashEncoder(), tmp_path / "data", ["GQA", "CIRR"], tmp_path / label)
    runs = [f"{label}={tmp_path / label}" for label in ("a", "b")]
    similarity.main(["--evaluations", *runs, "--output", str(tmp_path / "out")])
    table = (tmp_path / "out/similarity.txt").read_text()
    numbers = json.loads((tmp_path / "out/similarity.json").read_text())["stats"]
    assert set(numbers) == {f"{r}/{d}" for r in "ab" for d in ("GQA", "CIRR", "all")}
    assert numbers["a/all"] == numbers["b/all"]
    assert f"{numbers['a/GQA']['positive']['mean']:.2f}" in table
    assert (tmp_path / "out/similarity.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="evaluate EDIS into"):
        read_similarity(tmp_path / "a", ["EDIS"])
    capsys.readouterr()
    command = ["--evaluations", *runs, "--subsets", "EDIS", "--output", str(tmp_path / "out")]
    assert similarity.main(command) == 2
    assert re.fullmatch(
        r"error: .*EDIS_similarity\.npz does not exist.*\n", capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        similarity.main(["--evaluations", str(tmp_path / "a"), "--output", str(tmp_path / "out")])
