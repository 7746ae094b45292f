"""LLaVE-0.5B as it was most likely trained: 256 pairs a step on 8 devices, pools of 32 candidates.

The authors publish the script of the 2B model only; the paper gives the same batch and devices for 0.5B.

    python -m llave_jax.train --config configs/llave_0_5b.py --workdir runs/llave-0.5b \\
        --config.model.path=models/llava-onevision-0.5b --config.data.path=data/MMEB-train

For one pool of all 256 pairs: `--config.loss.pool=global`; for still larger ones tpu_v4.py and
gpu_h100.py.
"""

from llave_jax.config import Config, paper_config


def get_config() -> Config:
    config = paper_config()
    # Sizes for `tools/compile_ahead.py`; training reads them from `model.path`.
    config.model.preset = "llave-0.5b"

    # 8 devices x 4 pairs x 8 accumulation steps, each step its own pool.
    config.data.order = "modality"
    config.batch.pairs = 256
    config.batch.micro_batches = 8
    config.loss.pool = "micro"
    config.loss.alpha = 9.0
    config.optim.learning_rate = 1e-5

    # Parameters, moments and gradients divided over all devices; nothing is replicated that need
    # not be.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.remat = "block"
    config.checkpoint.every = 200
    return config
