"""bfloat16 against float32 embeddings, and what results say about the precision they come from."""

import json

import numpy as np
import pytest

from llave_jax import embed, evaluate
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.run_info import record_run
from tests.test_golden import REFUSED, load_cases, make_item

# bfloat16 keeps 8 bits. Sixteen roundings of 2^-8 in a row, all in one direction, through three layers
# and the tower, move a vector by 1/16 of its length.
LEAST_COSINE = 1 - (16 * 2**-8) ** 2 / 2


@pytest.mark.slow
def test_bfloat16_embeddings_are_close_to_float32(golden, golden_model):
    items = [make_item(c, golden) for c in load_cases(golden)["cases"] if c["name"] not in REFUSED]
    whole, half = (
        Embedder.from_pretrained(golden_model.directory, dtype=dtype).encode(items)
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    cosines = np.sum(whole * half, axis=1)
    print(f"{len(items)} cosines: least {cosines.min():.5f}, mean {cosines.mean():.5f}")
    assert cosines.min() > LEAST_COSINE
    # One rounding at least is seen: the precision that was asked for is the one computed in.
    assert cosines.min() < 1 - 1e-5


@pytest.mark.slow
def test_evaluation_says_its_precision(golden, golden_model, tmp_path, capsys):
    model = str(golden_model.directory)
    command = ["--model", model, "--benchmark", "mmeb", "--subsets", "TinyCls"]
    command += ["--data", str(golden / "eval"), "--output", str(tmp_path)]
    for dtype in ("float32", "bfloat16"):
        evaluate.main([*command, "--dtype", dtype])
        run = json.loads((tmp_path / "run.json").read_text())["TinyCls"]
        assert (run["model"], run["dtype"], run["max_length"]) == (model, dtype, 512)
        assert f"{model} in {dtype}." in capsys.readouterr().out
        assert f"in {dtype}" in (tmp_path / "report.html").read_text()
    score = json.loads((tmp_path / "TinyCls_score.json").read_text())
    assert set(score) == {"acc", "num_correct", "num_pred"}
    # The two share no embeddings.
    assert len(list((tmp_path / "embeddings").iterdir())) == 2


def test_embeddings_say_their_precision(golden_model, tmp_path):
    (tmp_path / "items.jsonl").write_text('{"text": "A cat"}\n{"text": "A dog"}\n')
    vectors = {}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        command = ["--model", str(golden_model.directory), "--input", str(tmp_path / "items.jsonl")]
        embed.main([*command, "--output", str(output), "--dtype", dtype])
        runs = json.loads((output / "run.json").read_text())
        assert runs["embeddings.npy"]["dtype"] == dtype
        vectors[dtype] = np.load(output / "embeddings.npy")
        assert vectors[dtype].dtype == np.float32
    cosines = np.sum(vectors["float32"] * vectors["bfloat16"], axis=1)
    assert (cosines > LEAST_COSINE).all()
    assert (cosines < 1).all()


def test_what_is_no_longer_known_is_not_said(tmp_path):
    record_run(tmp_path, "SUN397", None)
    assert not (tmp_path / "run.json").exists()
    record_run(tmp_path, "SUN397", {"dtype": "float32"})
    record_run(tmp_path, "VOC2007", {"dtype": "bfloat16"})
    record_run(tmp_path, "SUN397", None)
    assert json.loads((tmp_path / "run.json").read_text()) == {"VOC2007": {"dtype": "bfloat16"}}
