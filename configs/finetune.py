"""Pairs of your own, on whatever devices there are: a laptop, one GPU or a host of eight.

    python -m llave_jax.train --config configs/finetune.py --workdir runs/mine \\
        --config.model.path=models/llave-0.5b --config.data.path=data/pairs.json

The batch is planned from your data, the model and the devices' memory; one line says what was planned, and
`llave_jax.inspect_data` shows it before a run. Inputs are laid out as the model has it.
"""

from llave_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    # Sizes for `tools/compile_ahead.py`; training reads them from `model.path`.
    config.model.preset = "llave-0.5b"

    config.batch.pairs = None
    config.batch.micro_batches = None
    # Every pair of the step is a negative of every other, however many micro-batches there are.
    config.loss.pool = "global"

    config.data.epochs = 3
    config.data.held_out = 0.1
    config.data.num_workers = 2
    # Of your own rows a few may be broken: they are listed, and training goes on.
    config.data.on_error = "skip"
    config.data.max_skip_share = 0.1
    config.optim.warmup_fraction = 0.1

    # Parameters, moments and gradients divided over all devices.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.checkpoint.every = 200
    return config
