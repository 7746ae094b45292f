"""All 78 tasks in one command: scored right, alike in every layout, on any number of devices, after kills."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import Success, nDCG

from llave_jax import evaluate
from llave_jax.evaluation.benchmarks.mmeb_v2.benchmark import MmebV2
from llave_jax.evaluation.cache import EmbeddingCache
from llave_jax.evaluation.run import evaluate as evaluate_tasks
from llave_jax.models.config import PRESETS
from tests.evaluation.fake_encoder import HashEncoder
from tests.evaluation.mmeb_v2.miniature import CATEGORIES, Miniature
from tests.xla_flags import xla_flags

MODALITIES = {"I": "image", "V": "video", "VD": "visdoc"}


def modality(category: str) -> str:
    return MODALITIES[category.split("-")[0]]


@pytest.fixture
def encoder(tmp_path, monkeypatch) -> HashEncoder:
    """Takes the place of the model in tmp_path/model."""
    (tmp_path / "model/tokenizer").mkdir(parents=True)
    (tmp_path / "model/config.json").write_text('{"llave_jax_format": 1}')
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    encoder = HashEncoder()
    embedder = types.SimpleNamespace(
        model=types.SimpleNamespace(dtype=np.dtype("float32")),
        config=PRESETS["tiny"],
        encode=lambda items, batch_size, show_progress: encoder(items),
    )
    monkeypatch.setattr(evaluate.Embedder, "from_pretrained", lambda path, **options: embedder)
    return encoder


def score(data: Path, model: Path, output: Path, *flags: str) -> dict[str, dict[str, float]]:
    """What the command finds: task -> content of its score file."""
    command = ["--model", str(model), "--benchmark", "mmeb-v2", "--data", str(data)]
    assert evaluate.main([*command, "--output", str(output), *flags]) == 0
    return read_scores(output)


def read_scores(output: Path) -> dict[str, dict[str, float]]:
    return {
        path.name.removesuffix("_score.json"): json.loads(path.read_text())
        for folder in MODALITIES.values()
        for path in (output / folder).glob("*_score.json")
    }


def found_in(output: Path) -> dict[str, tuple]:
    """Task -> its score file, and what was ranked."""
    rankings = {
        path.name.removesuffix("_pred.jsonl"): [
            json.loads(line)["prediction"] for line in path.read_text().splitlines()
        ]
        for path in output.glob("*/*_pred.jsonl")
    }
    return {name: (values, rankings[name]) for name, values in read_scores(output).items()}


def recomputed(path: Path) -> tuple[float, float]:
    """hit@1 and nDCG@5 of a predictions file by ir-measures."""
    qrels, run = {}, {}
    for number, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line)
        grades = row["rel_scores"] or [1] * len(row["label"])
        assert set(row["label"])
        qrels[str(number)] = dict(zip(row["label"], map(int, grades), strict=True))
        run[str(number)] = {name: -rank for rank, name in enumerate(row["prediction"])}
    found = ir_measures.calc_aggregate([Success @ 1, nDCG @ 5], qrels, run)
    return found[Success @ 1], found[nDCG @ 5]


def test_all_tasks_in_every_layout(encoder, tmp_path):
    data, output = Miniature(tmp_path / "data").write(), tmp_path / "out"
    scores = score(data, tmp_path / "model", output)
    other = Miniature(tmp_path / "other", saved=True, archived=True).write()
    evaluate_tasks(HashEncoder(), MmebV2(other), output_dir=tmp_path / "other out")
    assert found_in(tmp_path / "other out") == found_in(output)
    # Equal pictures and texts are encoded once.
    assert len(encoder.keys) == len(set(encoder.keys))

    means = {}
    for category, names in CATEGORIES.items():
        main = "ndcg_linear@5" if category.startswith("VD") else "hit@1"
        for name in names:
            pred = output / modality(category) / f"{name}_pred.jsonl"
            hit, ndcg = recomputed(pred)
            assert scores[name]["hit@1"] == pytest.approx(hit, abs=1e-9)
            assert scores[name]["ndcg_linear@5"] == pytest.approx(ndcg, abs=1e-6)
            assert scores[name]["num_pred"] == len(pred.read_text().splitlines())
        means[category] = [scores[name][main] for name in names]
    assert len(scores) == sum(map(len, means.values())) == 78
    for kind in MODALITIES.values():
        means[kind] = [
            v for category in CATEGORIES if modality(category) == kind for v in means[category]
        ]
    means["overall"] = [v for kind in MODALITIES.values() for v in means[kind]]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["averages"] == {
        label: pytest.approx(np.mean(values)) for label, values in means.items()
    }
    frames = {n: t.get("settings", {}).get("frames") for n, t in summary["tasks"].items()}
    videos = [n for category, names in CATEGORIES.items() if category[:2] == "V-" for n in names]
    assert frames == {
        name: "all" if name == "MomentSeeker" else 8 if name in videos else None for name in scores
    }
    runs = json.loads((output / "run.json").read_text())
    assert runs["K700"]["frames"] == 8


def test_an_evaluation_that_was_stopped_goes_on(tmp_path):
    names = [name for names in CATEGORIES.values() for name in names[-2:]]
    data = Miniature(tmp_path / "data").write(names)

    def run(output: Path, encoder: HashEncoder) -> HashEncoder:
        cache = EmbeddingCache(output / "embeddings", "model")
        evaluate_tasks(encoder, MmebV2(data), names, output, cache=cache)
        return encoder

    whole = run(tmp_path / "whole", HashEncoder())
    stopped = HashEncoder(fail_after=len(whole.keys) // 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stopped)
    assert 0 < len(read_scores(tmp_path / "out")) < len(names)
    continued = run(tmp_path / "out", HashEncoder())
    assert len(continued.keys) < len(whole.keys)
    assert set(stopped.keys) | set(continued.keys) == set(whole.keys)
    assert found_in(tmp_path / "out") == found_in(tmp_path / "whole")
    assert len(read_scores(tmp_path / "out")) == len(names)


def start(data: Path, model: Path, output: Path, devices: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "llave_jax.evaluate", "--model", str(model)]
    command += ["--benchmark", "mmeb-v2", "--data", str(data), "--output", str(output), *flags]
    # The tiny model has 20 tokens a frame. Batches with room for a real one's frames would take minutes here.
    command += ["--max-length", "2048"]
    xla = xla_flags(devices)
    return subprocess.Popen(
        command,
        cwd=Path(evaluate.__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_devices_processes_and_kills_change_nothing(golden_model, tmp_path):
    """With a real, tiny model: one device, eight of a run that is killed, two processes with archives."""
    model, data = golden_model.directory, Miniature(tmp_path / "data").write()
    one = start(data, model, tmp_path / "one", 1)
    said = one.communicate(timeout=900)[0]
    assert one.returncode == 0, said
    expected = found_in(tmp_path / "one")
    assert len(expected) == 78

    seed = random.SystemRandom().randrange(10**6)
    draw, output = random.Random(seed), tmp_path / "eight"
    process, done = start(data, model, output, 8), draw.randrange(60)
    while process.poll() is None and len(read_scores(output)) <= done:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < len(read_scores(output)) < 78, f"seed {seed}"
    process = start(data, model, output, 8)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, f"seed {seed}: {said}"
    assert found_in(output) == expected, f"seed {seed}"

    data = Miniature(tmp_path / "archives", saved=True, archived=True).write()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--coordinator", place, "--num_processes", "2", "--process_id")
    both = [start(data, model, tmp_path / "two", 1, *flags, str(number)) for number in range(2)]
    outputs = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert found_in(tmp_path / "two") == expected
