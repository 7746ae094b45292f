"""The evaluation's command line: with the reference's model, and with a stand-in for one."""

import json
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from llave_jax import evaluate
from llave_jax.digits import dataset as digits
from llave_jax.embedding.embedder import Embedder
from llave_jax.evaluation.output import read_scores
from llave_jax.models.config import PRESETS
from llave_jax.parallel import sharding
from tests.evaluation.fake_encoder import HashEncoder
from tests.evaluation.mmeb_eval_tree import score_mmeb
from tests.xla_flags import xla_flags


def check_recorded_results(golden, output):
    """Score files, predictions and scores below `output` are the authors'."""
    expected = json.loads((golden / "eval/results.json").read_text())["results"]
    arrays = np.load(golden / "eval/embeddings.npz")
    for name, values in expected.items():
        written = json.loads((output / f"{name}_score.json").read_text())
        assert written == {key: values[key] for key in ("acc", "num_correct", "num_pred")}
        lines = (output / f"{name}_predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == values["pred_index"]
        # Embeddings agree to 1e-5 a component: a cosine to 2e-5 times the norm of 64 signs at worst.
        scores = np.stack(read_scores(output / f"{name}_scores.npz"))
        np.testing.assert_allclose(scores, arrays[f"{name}/scores"], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_recorded_results_in_python(golden, golden_model, tmp_path, devices):
    axes = {"data": -1, "fsdp": 1, "tensor": 1}
    mesh = sharding.make_mesh(axes, jax.devices()[:devices])
    embedder = Embedder.from_pretrained(golden_model.directory, mesh=mesh)
    score_mmeb(embedder.encode, golden / "eval", output=tmp_path)
    check_recorded_results(golden, tmp_path)


def test_recorded_results_by_command(golden, golden_model, tmp_path):
    command = ["--model", str(golden_model.directory), "--benchmark", "mmeb"]
    evaluate.main([*command, "--data", str(golden / "eval"), "--output", str(tmp_path)])
    check_recorded_results(golden, tmp_path)
    assert "TinyT2I" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_recorded_results_with_two_processes(golden, golden_model, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llave_jax.evaluate", "--benchmark", "mmeb"]
    command += ["--model", str(golden_model.directory), "--data", str(golden / "eval")]
    command += ["--output", str(tmp_path / "out"), "--coordinator", f"127.0.0.1:{port}"]
    flags = xla_flags(2)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [*command, "--num_processes", "2", "--process_id", str(number)],
            cwd=Path(evaluate.__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    check_recorded_results(golden, tmp_path / "out")
    # The table comes from the first process only.
    assert "TinyCls" in outputs[0][0]
    assert "TinyCls" not in outputs[1][0]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model directory whose "embedder" is a HashEncoder; returns (directory, encoder)."""
    directory = tmp_path / "model"
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "config.json").write_text('{"llave_jax_format": 1}')
    (directory / "model.safetensors").write_bytes(b"weights")
    encoder = HashEncoder()
    embedder = types.SimpleNamespace(
        model=types.SimpleNamespace(dtype=np.dtype("float32")),
        config=PRESETS["tiny"],
        encode=lambda items, batch_size, show_progress: encoder(items),
    )
    monkeypatch.setattr(evaluate.Embedder, "from_pretrained", lambda path, **options: embedder)
    return str(directory), encoder


def test_mmeb_writes_scores_and_a_table(model, golden, tmp_path, capsys):
    directory, _ = model
    output = tmp_path / "out"
    command = ["--model", directory, "--benchmark", "mmeb", "--data", str(golden / "eval")]
    evaluate.main([*command, "--subsets", "TinyT2I", "--output", str(output)])
    score = json.loads((output / "TinyT2I_score.json").read_text())
    assert score["num_pred"] == 12
    assert not (output / "TinyCls_score.json").exists()
    assert (output / "table.txt").read_text() in capsys.readouterr().out


def test_a_baseline(model, golden, tmp_path, capsys):
    directory, encoder = model
    command = ["--model", directory, "--benchmark", "mmeb", "--data", str(golden / "eval")]
    command += ["--cache", str(tmp_path / "cache")]
    assert evaluate.main([*command, "--subsets", "TinyT2I", "--output", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    flags = ["--output", str(tmp_path / "b"), "--baseline", f"base={tmp_path / 'a'}"]
    assert evaluate.main([*command, *flags]) == 0
    score = json.loads((tmp_path / "a/summary.json").read_text())["tasks"]["TinyT2I"]["score"]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["TinyT2I", "precision@1", *2 * [f"{100 * score:.1f}"], "0.0"] in table
    assert next(row for row in table if row[:2] == ["TinyCls", "precision@1"])[-2:] == ["-", "-"]
    # Before the model is loaded.
    asked = len(encoder.keys)
    assert evaluate.main([*command, *flags[:2], "--baseline", str(tmp_path)]) == 2
    assert "two of its summary.json are of mmeb" in capsys.readouterr().err
    assert len(encoder.keys) == asked


def test_another_model_does_not_use_the_same_embeddings(model, golden, tmp_path):
    directory, encoder = model
    command = ["--model", directory, "--benchmark", "mmeb", "--data", str(golden / "eval")]
    command += ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    evaluate.main(command)
    count = len(encoder.keys)
    evaluate.main(command)
    assert len(encoder.keys) == count
    (tmp_path / "model/model.safetensors").write_bytes(b"trained")
    evaluate.main(command)
    assert len(encoder.keys) == 2 * count


def test_digits_are_built_on_first_use(model, tmp_path, few_digits):
    directory, _ = model
    output = tmp_path / "out"
    evaluate.main(["--model", directory, "--benchmark", "digits", "--output", str(output)])
    for name in digits.SUBSETS:
        assert (output / f"{name}_score.json").exists()
    assert "Not scored" not in (output / "table.txt").read_text()


def test_data_is_needed(model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", model[0], "--benchmark", "mmeb", "--output", str(tmp_path)])
    assert "needs --data" in capsys.readouterr().err


def test_a_missing_model_is_one_line(tmp_path, capsys):
    command = ["--model", str(tmp_path / "none"), "--benchmark", "mmeb", "--data", str(tmp_path)]
    assert evaluate.main([*command, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*none: no such directory.*\n", said)


def test_missing_data_are_one_line(model, tmp_path, capsys):
    command = ["--model", model[0], "--benchmark", "mmeb", "--data", str(tmp_path / "none")]
    assert evaluate.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert re.search(r"^error: .*none does not exist", capsys.readouterr().err, flags=re.M)


def test_paragraphs_of_videos_by_command(model, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    entries = {
        f"v_{name}": {"sentences": ["A man. ", f" He {name}."]} for name in ("runs", "sits", "gone")
    }
    (data / "val_1.json").write_text(json.dumps(entries))
    for name in ("v_runs.mp4", "sits.webm"):
        (data / name).write_bytes(name.encode())
    command = ["--model", model[0], "--benchmark", "activitynet", "--data", str(data)]
    assert evaluate.main([*command, "--output", str(tmp_path / "out")]) == 0
    scores = json.loads((tmp_path / "out/activitynet_score.json").read_text())
    assert scores.keys() == {"text_to_video", "video_to_text"}
    rows = (tmp_path / "out/activitynet_t2v_predictions.jsonl").read_text().splitlines()
    assert [json.loads(row)["label"] for row in rows] == [["v_runs"], ["sits"]]
    assert "A man. He runs." in rows[0]
    (data / "val_1.json").write_text('{"v_runs": []}')
    assert evaluate.main([*command, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: .*val_1.json: 'v_runs': expected sentences", error, flags=re.M)


def test_a_models_prompts_are_used_for_a_corpus(model, tmp_path):
    directory, encoder = model
    (tmp_path / "model/prompts.json").write_text('{"query": "Q: ", "passage": "D: "}')
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "found"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "asked"}\n')
    (tmp_path / "qrels.tsv").write_text("q\td\t1\n")
    command = ["--model", directory, "--benchmark", "retrieval", "--data", str(tmp_path)]

    def recorded(*flags):
        assert evaluate.main([*command, "--output", str(tmp_path / "out"), *flags]) == 0
        run = json.loads((tmp_path / "out/run.json").read_text())["retrieval"]
        return run.get("query_prompt"), run.get("document_prompt")

    assert recorded() == ("Q: ", "D: ")
    assert len(encoder.keys) == 2
    assert recorded("--query-prompt=", "--document-prompt=X: ") == (None, "X: ")
    assert len(encoder.keys) == 4


def test_names_in_brackets_are_not_divided():
    args = evaluate.parse_args(
        ["--model", "m", "--output", "o", "--benchmark", "mteb:MTEB(eng, v2),digits, mteb:STS12"]
    )
    assert (args.mteb, args.benchmark) == (["MTEB(eng, v2)", "STS12"], ["digits"])


def test_flags_that_are_not_of_mteb(capsys):
    command = ["--model", "m", "--output", "o", "--benchmark", "mteb:STS12"]
    assert evaluate.parse_args([*command, "--truncate-dim", "64"]).truncate_dim == 64
    for flags in (["--dims", "64"], ["--check-data"], ["--query-prompt", "Find: "]):
        with pytest.raises(SystemExit):
            evaluate.parse_args([*command, *flags])
        assert f"{flags[0]} does not concern mteb's tasks" in capsys.readouterr().err


def test_tasks_of_one_of_two_benchmarks(model, golden, tmp_path, few_digits):
    command = ["--model", model[0], "--benchmark", "digits,mmeb", "--data", f"mmeb={golden}/eval"]
    assert evaluate.main([*command, "--tasks", "TinyCls", "--output", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").rglob("*_score.json")] == [
        "TinyCls_score.json"
    ]
