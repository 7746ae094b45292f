"""Adapters (LoRA) of LLaVE-7B on one H100, or any GPU with 80 GB (or 48), one pool of all pairs of the step.

    python -m llave_jax.train --config configs/lora_7b_h100x1.py --workdir runs/lora-7b \\
        --config.model.path=models/llave-7b --config.data.path=data/MMEB-train

The base stays as it is stored, in bfloat16: 15 GiB, of which nothing has a gradient or moments; with all else 39 GiB,
however large the pool is. docs/training.md, "Adapters".
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

    # Micro-batches of 9 slots, a row for each; gpu_h100.py says more of these numbers. More of them make a larger
    # pool and take longer.
    config.batch.pairs = 144
    config.batch.micro_batches = 16
    config.batch.row_length = 24_576
    config.batch.tokens_per_pair = 2730.0
    config.batch.crops_per_pair = 4.66
    config.batch.fill = 0.857
    config.loss.pool = "global"

    config.mesh.data = 1
    config.mesh.fsdp = -1
    # Activations of one micro-batch at a time. "block" is a third faster with up to 36 slots in 4 micro-batches, each
    # of which takes 5 GiB more.
    config.remat = "both"
    config.data.num_workers = 12
    return config
