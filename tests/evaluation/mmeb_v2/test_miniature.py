"""All 78 tasks in one command: scored right, alike in every layout, on any number of devices, after kills."""

import json
import types
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import Success, nDCG

from llave_jax import evaluate
from llave_jax.models.config import PRESETS
from tests.evaluation.fake_encoder import HashEncoder
from tests.evaluation.mmeb_v2.miniature import CATEGORIES, Miniature

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
    found = {}
    for saved, archived in ((False, False), (True, True)):
        data = Miniature(tmp_path / f"data {saved}", saved=saved, archived=archived).write()
        output = tmp_path / f"out {saved}"
        found[saved] = score(data, tmp_path / "model", output)
    assert found[True] == found[False]
    # Equal pictures and texts were encoded once, in the first layout.
    assert len(encoder.keys) == 2 * len(set(encoder.keys))

    scores, output = found[False], tmp_path / "out False"
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
