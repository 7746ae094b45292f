"""Pairs of your own, all of them: 256 a step in one pool, on one machine with 8 devices.

    python -m llave_jax.train --config configs/own_data.py --workdir runs/mine \\
        --config.model.path=models/llave-0.5b --config.data.path=data/pairs.json

Inputs are laid out as the model has it; a base model with larger canvases or longer sequences than LLaVE's
needs larger batches, or smaller `model.inputs`. The room of a batch is planned from your data;
`llave_jax.inspect_data` shows it before a run.
"""

from llave_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    # Sizes for `tools/compile_ahead.py`; training reads them from `model.path`.
    config.model.preset = "llave-0.5b"

    # Eight micro-batches of 4 pairs a device; every pair of the step is a negative of every other.
    config.batch.pairs = 256
    config.batch.micro_batches = 8
    config.loss.pool = "global"

    # Parameters, moments and gradients divided over all devices.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.checkpoint.every = 200
    return config
