"""Pairs of your own, all of them: 256 a step in one pool, on one machine with 8 devices.

    python -m llave_jax.train --config configs/own_data.py --workdir runs/mine \\
        --config.model.path=models/llave-0.5b --config.data.path=data/pairs.json

Inputs are laid out as the model has it; a base model with larger canvases or longer sequences than LLaVE's
needs larger batches or `model.inputs`, and training says which. `llave_jax.inspect_data` says how well the
batch's numbers suit your data.
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
    # Room for pairs as large as MMEB's.
    config.batch.row_length = 15_360
    config.batch.tokens_per_pair = 3840.0
    config.batch.crops_per_pair = 6.0
    config.batch.fill = 0.985

    # Parameters, moments and gradients divided over all devices.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.checkpoint.every = 200
    return config
