"""A base model and a fine-tuned LLaVE-0.5B of true size, as on the hub but for the weights' values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hub_checkpoints import FORMS, ROWS, write_checkpoint
from llave_jax.inputs.config import grid_pinpoints
from llave_jax.models.config import PRESETS
from llave_jax.weights import model_dir
from tests.weights.convert_checkpoints import assert_same_files
from tests.xla_flags import xla_flags
from tools import convert_hf

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_conversion_and_the_published_example(golden, tmp_path, form):
    source, ours, back = (tmp_path / name for name in ("hf", "ours", "back"))
    write_checkpoint(source, form)
    assert convert_hf.main(["--input", str(source), "--output", str(ours)]) == 0

    config = model_dir.load_config(ours)
    preset = PRESETS["llave-0.5b"]
    assert config.vision == preset.vision
    assert config.text.vocab_size == ROWS[form]
    assert config.text.tie_word_embeddings
    fine_tuned = form == "llave-0.5b"
    assert config.inputs.pinpoints == grid_pinpoints(384, *((2, 2) if fine_tuned else (6, 6)))
    assert config.inputs.max_length == (4096 if fine_tuned else 32768)
    assert config.inputs.newline_position == ("grid" if fine_tuned else "one_token")
    tokenizer = model_dir.load_tokenizer(ours)
    assert tokenizer("<|im_end|>").input_ids == [151645]

    assert convert_hf.main(["--to-hf", "llave", "--input", str(ours), "--output", str(back)]) == 0
    assert_same_files(back, source)

    # Random weights do not give the published cosines. One device, as a user's machine has.
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    picture = str(golden / "images" / "tiny.png")
    done = subprocess.run(
        [sys.executable, "tools/check_example.py", "--model", str(ours), "--image", picture],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("differs\n") == 4
    assert "differs by more than 0.01" in done.stdout
