"""A TPU v4 slice, one pool of all pairs of the step. The model's size is an argument.

    --config configs/tpu_v4.py:0.5b    v4:2x2x4 (16 chips), 1024 pairs a step
    --config configs/tpu_v4.py:2b      v4:2x2x4 (16 chips), 1024 pairs a step
    --config configs/tpu_v4.py:7b      v4:4x4x4 (64 chips), 1024 pairs a step

Larger slices: keep as many pairs a chip and micro-batch (`batch.pairs / chips /
batch.micro_batches`), which is what the budgets below are for. Memory and speed of each are in
docs/scaling.md; `tools/compile_ahead.py` makes the same table for other slices and chips.
"""

from llave_jax.config import default_config

# Preset, learning rate of the paper, micro-batches (on the slices above 16, 8 and 4 pairs a chip
# each: what memory holds), crops a pair, and the share of pair slots that is filled.
SIZES = {
    "0.5b": ("llave-0.5b", 1e-5, 4, 5.0, 0.93),
    "2b": ("llave-2b", 1e-5, 8, 5.0, 0.92),
    "7b": ("llave-7b", 5e-6, 4, 5.2, 0.90),
}


def get_config(size: str = "0.5b"):
    if size not in SIZES:
        raise ValueError(f"configs/tpu_v4.py:{size}: expected one of {', '.join(SIZES)}")
    config = default_config()
    preset, learning_rate, micro_batches, crops, fill = SIZES[size]
    config.model.preset, config.optim.learning_rate = preset, learning_rate

    config.batch.pairs = 1024
    config.batch.micro_batches = micro_batches
    # A row holds two images of the commonest size (640 x 480: 2929 tokens) with their texts, and is
    # 12 blocks of the attention kernel, which would otherwise pad it to that in every layer.
    # 4 rows and 40 crops for 8 pairs: docs/scaling.md, "Packing".
    config.batch.row_length = 6144
    config.batch.tokens_per_pair = 3072.0
    config.batch.crops_per_pair = crops
    config.batch.fill = fill
    config.loss.pool = "global"

    # Everything divided over all chips: a layer's parameters are gathered while the one before
    # computes, and a chip's share of parameters and moments is small. Heads are few (2 or 4 of
    # keys), so the tensor axis is not for these sizes.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.attention = config.vision_attention = "auto"
    # Block inputs of the whole batch are kept, the rest is computed again: one extra forward pass
    # without its last products.
    config.remat = "block"
    config.data.num_workers = 32
    return config
