"""Adapters (LoRA) of LLaVE-2B on four TPU v5e chips (v5e:2x2), one pool of all pairs of the step.

    python -m llave_jax.train --config configs/lora_2b_v5e.py --workdir runs/lora-2b \\
        --config.model.path=models/aquila-vl-2b --config.data.path=data/MMEB-train

The base stays as it is stored, in bfloat16, divided over the chips. docs/training.md, "Adapters".
"""

from llave_jax.config import Config, paper_config


def get_config() -> Config:
    config = paper_config()
    # Sizes for `tools/compile_ahead.py`; training reads them from `model.path`.
    config.model.preset = "llave-2b"

    config.lora.rank = 16
    config.lora.alpha = 32.0
    # Adapters begin as nothing and are few: ten times the learning rate of the whole model, and more.
    config.optim.learning_rate = 1e-4

    # Micro-batches of 6 slots a chip, a row for each.
    config.batch.pairs = 96
    config.batch.micro_batches = 4
    config.batch.row_length = 15_360
    config.batch.tokens_per_pair = 2560.0
    config.batch.crops_per_pair = 4.33
    config.batch.fill = 0.789
    config.loss.pool = "global"

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.remat = "block"
    config.data.num_workers = 8
    return config
