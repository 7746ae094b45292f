"""Vectors that can be cut: pairs of your own, trained on the first 64, the first 256 and all numbers.

    python -m llave_jax.train --config configs/matryoshka.py --workdir runs/matryoshka \\
        --config.model.path=models/llave-0.5b --config.data.path=data/pairs.json

`configs/finetune.py` with `loss.dims`. The last of them is the model's width: 896 for 0.5B, 1536 for 2B, 3584 for 7B.
"""

import runpy
from pathlib import Path

from llave_jax.config import Config

FINETUNE = Path(__file__).with_name("finetune.py")


def get_config() -> Config:
    config = runpy.run_path(str(FINETUNE))["get_config"]()
    config.loss.dims = (64, 256, 896)
    return config
