"""One or several hosts of 8 H100, one pool of all pairs of the step. The model's size is an argument.

    --config configs/gpu_h100.py:2b                       8 devices, 512 pairs a step
    --config configs/gpu_h100.py:7b --config.batch.pairs=1024    16 devices, two hosts

Parameters are divided within a host, where NVLink is, and repeated between hosts; for 7B on
several hosts of 40 GB devices use `--config.mesh.data=1 --config.mesh.fsdp=-1`.
"""

from llave_jax.config import default_config

# Preset, learning rate of the paper, micro-batches of 8 pairs a device.
SIZES = {
    "0.5b": ("llave-0.5b", 1e-5, 8),
    "2b": ("llave-2b", 1e-5, 8),
    "7b": ("llave-7b", 5e-6, 8),
}


def get_config(size: str = "0.5b"):
    if size not in SIZES:
        raise ValueError(f"configs/gpu_h100.py:{size}: expected one of {', '.join(SIZES)}")
    config = default_config()
    config.model.preset, config.optim.learning_rate, config.batch.micro_batches = SIZES[size]

    # 64 pairs a device in micro-batches of 8: block inputs kept for the whole batch take 8 GiB
    # (0.5B), 16 GiB (2B), 37 GiB (7B, beside 11 GiB of parameters and moments) of 80.
    config.batch.pairs = 512
    # A row holds two images of the commonest size (640 x 480: 2929 tokens) with their texts, and is 47
    # blocks of the attention kernel, which computes the scores between its sequences too: longer rows
    # would be filled better, but cost more. 4 rows and 40 crops for 8 pairs.
    config.batch.row_length = 6016
    config.batch.tokens_per_pair = 3008.0
    config.batch.crops_per_pair = 5.0
    config.batch.fill = 0.91
    config.loss.pool = "global"

    config.mesh.data = -1
    config.mesh.fsdp = 8
    config.attention = config.vision_attention = "auto"
    config.remat = "block"
    config.data.num_workers = 12
    return config
