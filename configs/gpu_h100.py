"""One or several hosts of 8 H100, one pool of all pairs of the step. The model's size is an argument.

    --config configs/gpu_h100.py:2b                              8 devices, one host
    --config configs/gpu_h100.py:7b --config.batch.pairs=1152    16 devices, two hosts

A step has 72 slots for pairs a device, of which about 62 are filled.

Parameters are divided within a host, where NVLink is, and repeated between hosts; for 7B on
several hosts of 40 GB devices use `--config.mesh.data=1 --config.mesh.fsdp=-1`.
"""

from llave_jax.config import default_config

# Preset, learning rate of the paper, micro-batches.
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

    # 72 slots a device in micro-batches of 9: block inputs kept for the whole batch take 8 GiB
    # (0.5B), 16 GiB (2B), 37 GiB (7B, beside 11 GiB of parameters and moments) of 80.
    config.batch.pairs = 576
    # One row for 9 slots. The longer it is, the less is left over at its end, and the attention kernel
    # takes no longer for it. Slots cost nothing, and with some to spare it is tokens that run out.
    # docs/scaling.md, "Packing".
    config.batch.row_length = 24_576
    config.batch.tokens_per_pair = 2730.0
    config.batch.crops_per_pair = 4.66
    config.batch.fill = 0.857
    config.loss.pool = "global"

    config.mesh.data = -1
    config.mesh.fsdp = 8
    config.attention = config.vision_attention = "auto"
    config.remat = "block"
    config.data.num_workers = 12
    return config
