"""Real runs in seconds: a tiny model with weights, trained on text."""

import json

import jax
import pytest

from llave_jax import train
from llave_jax.config import default_config
from llave_jax.inputs.config import InputConfig, grid_pinpoints
from llave_jax.models.config import LlaveConfig, TextConfig, VisionConfig
from llave_jax.models.llave import Llave, example_batch
from llave_jax.training.checkpoint import Checkpoints
from llave_jax.weights import model_dir

MODEL = LlaveConfig(
    VisionConfig(16, 1, 2, 32, image_size=8, patch_size=4),
    TextConfig(16, 1, 2, 1, 32, vocab_size=600),
    InputConfig(pinpoints=grid_pinpoints(8, 1, 1), max_text_length=128, max_length=128),
)


def write_place(root, tokenizer):
    """Model, data and benchmark, and copies of them elsewhere."""
    params = Llave(MODEL).init(jax.random.key(0), example_batch(MODEL))["params"]
    for name, config in {"model": MODEL, "moved": MODEL}.items():
        model_dir.write_model_dir(root / name, config, params, tokenizer=tokenizer)
    rows = [
        {
            "qry": f"which is {i}?",
            "qry_image_path": "",
            "pos_text": f"it is {i}",
            "pos_image_path": "",
        }
        for i in range(64)
    ]
    for folder, count in {"data": 64, "moved_data": 64, "other_data": 63}.items():
        (root / folder).mkdir()
        (root / folder / "numbers.json").write_text(json.dumps(rows[:count]))
    candidates = [
        {
            "qry_text": f"which is {i}?",
            "qry_img_path": "",
            "tgt_text": [f"it is {i}", f"it is {i + 1}"],
            "tgt_img_path": ["", ""],
        }
        for i in range(4)
    ]
    for folder in ("eval", "moved_eval"):
        (root / folder).mkdir()
        for name in ("VOC2007", "SUN397"):
            (root / folder / f"{name}.json").write_text(json.dumps(candidates))


def make_config(place, changes=()):
    config = default_config()
    config.model.path = str(place / "model")
    config.data.path = str(place / "data")
    config.data.num_workers = 0
    config.steps = 4
    config.batch.pairs = 16
    config.batch.row_length = 128
    config.batch.tokens_per_pair = 128.0
    config.batch.crops_per_pair = 1.0
    config.batch.taps = 1
    config.batch.fill = 1.0
    config.optim.learning_rate = 1e-2
    config.optim.warmup_fraction = 0.0
    config.dtype = "float32"
    config.log_every = 1
    config.eval.benchmark = str(place / "eval")
    config.update_from_flattened_dict(dict(changes))
    return config


def train_until(step, config, workdir):
    """As if the machines were taken away after a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "must_stop", lambda self, at: at == step)
        train.train(config, workdir)
