"""Adapters (LoRA) of LLaVE-7B on one H100, or any GPU with 80 GB, one pool of all pairs of the step.

    XLA_CLIENT_MEM_FRACTION=0.95 python -m llave_jax.train --config configs/lora_7b_h100x1.py --workdir runs/lora-7b \\
        --config.model.path=models/llave-7b --config.data.path=data/MMEB-train

The base stays as it is stored, in bfloat16: 15 GiB, of which nothing has a gradient or moments. docs/training.md,
"Adapters".
"""

from llave_jax.config import Config, paper_config


def get_config() -> Config:
    config = paper_config()
    # Sizes for `tools/compile_ahead.py`; training reads them from `model.path`.
    config.model.preset = "llave-7b"

    config.lora.rank = 16
    config.lora.alpha = 32.0
    # Adapters begin as nothing and are few: ten times the learning rate of the whole model, and more.
    config.optim.learning_rate = 1e-4

    # 72 slots in micro-batches of 9, a row for each; block inputs of all of them are kept. gpu_h100.py says more
    # of these numbers.
    config.batch.pairs = 72
    config.batch.micro_batches = 8
    config.batch.row_length = 24_576
    config.batch.tokens_per_pair = 2730.0
    config.batch.crops_per_pair = 4.66
    config.batch.fill = 0.857
    config.loss.pool = "global"

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.remat = "block"
    config.data.num_workers = 12
    return config
