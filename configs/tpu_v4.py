"""A TPU v4 slice, one pool of all pairs of the step. The model's size is an argument.

    --config configs/tpu_v4.py:0.5b    v4:2x2x4 (16 chips)
    --config configs/tpu_v4.py:2b      v4:2x2x4 (16 chips)
    --config configs/tpu_v4.py:7b      v4:4x4x4 (64 chips)

A step has 1152 slots for pairs, of which about 990 are filled. Other slices: keep as many slots a chip
and micro-batch (`batch.pairs / chips / batch.micro_batches`) or a multiple, which is what the budgets
below are for. Memory and speed of each are in docs/scaling.md; `tools/compile_ahead.py` makes the
same table for other slices and chips.
"""

from llave_jax.config import Config, paper_config

# Preset, learning rate of the paper, micro-batches (what memory holds: 18, 9 and 6 slots a chip each on
# the slices above), tokens of a row, and the share of slots that is filled.
SIZES = {
    "0.5b": ("llave-0.5b", 1e-5, 4, 24_576, 0.865),
    "2b": ("llave-2b", 1e-5, 8, 24_576, 0.857),
    "7b": ("llave-7b", 5e-6, 3, 16_384, 0.843),
}


def get_config(size: str = "0.5b") -> Config:
    if size not in SIZES:
        raise ValueError(f"configs/tpu_v4.py:{size}: expected one of {', '.join(SIZES)}")
    config = paper_config()
    preset, learning_rate, micro_batches, row_length, fill = SIZES[size]
    config.model.preset, config.optim.learning_rate = preset, learning_rate

    config.batch.pairs = 1152
    config.batch.micro_batches = micro_batches
    # A row for 9 slots (7B: 6). The longer it is, the less is left over at its end, and the attention
    # kernel takes no longer for it. The mix averages 3092 tokens and 5.15 crops a pair: slots cost
    # nothing, and with some to spare it is tokens that run out. docs/scaling.md, "Packing".
    config.batch.row_length = row_length
    config.batch.tokens_per_pair = 2730.0
    config.batch.crops_per_pair = 4.66
    config.batch.fill = fill
    config.loss.pool = "global"

    # Everything divided over all chips: a layer's parameters are gathered while the one before
    # computes, and a chip's share of parameters and moments is small. Heads are few (2 or 4 of
    # keys), so the tensor axis is not for these sizes.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    # Block inputs of the whole batch are kept, the rest is computed again: one extra forward pass
    # without its last products.
    config.remat = "block"
    config.data.num_workers = 32
    return config
