"""From a base model as it is downloaded to scores, over data as the hub has it, by configs/llave_2b.py.

The commands are those of a user. Only the batch is cut down to what a CPU can do.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llave_jax.inputs.config import grid_pinpoints
from llave_jax.weights import model_dir
from llave_jax.weights.run_params import latest_params
from tests.data import mmeb_tree
from tests.evaluation import mmeb_eval_tree
from tests.weights.convert_checkpoints import golden_config, write_hf
from tests.xla_flags import xla_flags

ROOT = Path(__file__).parents[2]
# What a CPU can do: 24 pairs a step, a row of the longest sequence for 6 of them.
CPU_BATCH = {
    "batch.pairs": 24,
    "batch.micro_batches": 2,
    "batch.row_length": 4096,
    "batch.tokens_per_pair": 680.0,
}
DEVICES = 2
ROWS = 6
STEPS = len(mmeb_tree.TEMPLATES) * ROWS // CPU_BATCH["batch.pairs"]
EMPTY_ROWS = {"WebQA": 2, "MSCOCO_i2t": 1}

pytestmark = pytest.mark.slow


def run(*command):
    """A command of the README with simulated devices; returns all that it says."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(DEVICES),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model as the hub has Aquila-VL: called qwen2, with inputs of its own, as downloaded."""
    config = golden_config("llave")
    del config["mm_newline_position"]
    hf = write_hf(
        tmp_path_factory.mktemp("base") / "hf",
        config=config,
        changes={
            "model_type": "qwen2",
            "image_grid_pinpoints": "(1x1),...,(6x6)",
            "tokenizer_model_max_length": 32768,
        },
    )
    path = hf / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 32768}))
    return hf


@pytest.fixture(scope="module")
def training_data(tmp_path_factory):
    """MMEB-train as cloned: WebQA has a marker and no image, and some rows have an empty side."""
    root = tmp_path_factory.mktemp("MMEB-train")
    mmeb_tree.make_tree(root, ROWS)
    for subset, count in EMPTY_ROWS.items():
        path = root / subset / "original-00001-of-00002.parquet"
        rows = pq.read_table(path).to_pylist()
        empty = {**rows[0], "pos_text": "", "pos_image_path": ""}
        pq.write_table(pa.Table.from_pylist(rows + [empty] * count), path)
    return root


@pytest.fixture(scope="module")
def evaluation_data(tmp_path_factory):
    """MMEB-eval as cloned: queries of WebQA and EDIS have a marker and no image; some sides are empty."""
    root = tmp_path_factory.mktemp("MMEB-eval") / "data"
    mmeb_eval_tree.make_tree(root)
    path = sorted((root / "GQA").glob("*.parquet"))[0]
    rows = pq.read_table(path).to_pylist()
    rows += [{**rows[0], "qry_text": "", "qry_img_path": ""}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return root


@pytest.fixture(scope="module")
def trained(base, training_data, tmp_path_factory):
    """(the run's folder, what was said)."""
    work = tmp_path_factory.mktemp("trained")
    run("tools/convert_hf.py", "--input", base, "--output", work / "base")
    said = run(
        *("-m", "llave_jax.train", "--config", "configs/llave_2b.py", "--workdir", work / "run"),
        f"--config.model.path={work / 'base'}",
        f"--config.data.path={training_data}",
        *(f"--config.{key}={value}" for key, value in CPU_BATCH.items()),
    )
    return work / "run", said


def test_training_runs_to_the_end_and_says_what_it_skipped(trained):
    workdir, said = trained
    # Steps whose loss is not finite end a run; so does a row that cannot be used.
    assert f"training: {STEPS} of {STEPS} steps" in said
    assert latest_params(workdir).parent.name == str(STEPS)
    skipped = [
        json.loads(line)
        for path in workdir.glob("skipped_*.jsonl")
        for line in path.read_text().splitlines()
    ]
    counts = {name: sum(row["subset"] == name for row in skipped) for name in EMPTY_ROWS}
    assert counts == EMPTY_ROWS
    assert len(skipped) == sum(EMPTY_ROWS.values())
    for name, count in EMPTY_ROWS.items():
        assert f"{name} {count}" in said


def test_the_model_has_the_papers_inputs_not_its_bases(trained, tmp_path):
    """In the run, and in what is exported from it to Hugging Face and read back."""
    workdir, _ = trained
    before = model_dir.load_config(workdir.parent / "base")
    assert (len(before.inputs.pinpoints), before.inputs.max_length) == (36, 32768)
    assert before.inputs.newline_position == "one_token"
    for layout in ("llave", "onevision"):
        hf = tmp_path / layout / "hf"
        run("tools/convert_hf.py", "--to-hf", layout, "--input", workdir, "--output", hf)
        vision = ROOT / "tests/golden/siglip-tiny-open-patch30-224"
        shutil.copytree(vision, tmp_path / layout / vision.name)
        run("tools/convert_hf.py", "--input", hf, "--output", tmp_path / layout / "back")
    for path in (workdir, tmp_path / "llave/back", tmp_path / "onevision/back"):
        inputs = model_dir.load_config(path).inputs
        assert inputs.pinpoints == grid_pinpoints(224, 2, 2)
        assert (inputs.max_length, inputs.max_text_length) == (4096, 4096)
        assert (inputs.newline_position, inputs.anyres_max) == ("grid", 9)


def test_evaluation_runs_to_the_end_and_says_what_it_skipped(trained, evaluation_data, tmp_path):
    workdir, _ = trained
    said = run(
        *("-m", "llave_jax.evaluate", "--model", workdir, "--benchmark", "mmeb"),
        *("--data", evaluation_data, "--output", tmp_path / "scores"),
    )
    scores = list((tmp_path / "scores").glob("*_score.json"))
    assert len(scores) == 36
    assert {"WebQA_score.json", "EDIS_score.json"} <= {path.name for path in scores}
    # All were scored, so there is an average of all.
    assert "overall" in said
    assert "Skipped, with neither text nor image: GQA 1 rows" in said
