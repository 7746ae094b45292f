"""H100 GPUs, as many as there are, one pool of all pairs of the step. The model's size is an argument.

    --config configs/gpu_h100.py:0.5b                     1, 2, 4 or 8 devices of a host
    --config configs/gpu_h100.py:2b                       the same; one alone with XLA_CLIENT_MEM_FRACTION=0.95
    --config configs/gpu_h100.py:7b                       8 devices, with XLA_CLIENT_MEM_FRACTION=0.92
    --config configs/gpu_h100.py:7b --config.mesh.data=2  two hosts of 8

A step has slots for 144 pairs a device (7B: 72), of which 86% are filled: 1152 on 8. Fewer devices make
smaller steps and pools, and more of them. `batch.pairs` sets another number.

Parameters are divided over all devices. On several hosts `mesh.data` is their number: parameters are then
divided within a host, where NVLink is, and repeated between hosts; for 7B on several hosts of 40 GB devices
leave it out.
"""

from llave_jax.config import Config, paper_config

# Preset, learning rate of the paper, slots of a device, micro-batches, share of slots that is filled, and
# what the backward pass recomputes. Block inputs of the whole batch are kept, and of 0.5B, where there
# is room, attention's results too: of 8 devices 41 GiB each (0.5B), 42 (2B), 67 (7B) of 79; of one
# alone 51 (0.5B), 72 (2B). jax takes
# three quarters of the memory unless XLA_CLIENT_MEM_FRACTION says more, as it has to for 7B.
SIZES = {
    "0.5b": ("llave-0.5b", 1e-5, 144, 8, 0.865, "attention"),
    "2b": ("llave-2b", 1e-5, 144, 16, 0.857, "block"),
    "7b": ("llave-7b", 5e-6, 72, 8, 0.857, "block"),
}


def get_config(size: str = "0.5b") -> Config:
    if size not in SIZES:
        raise ValueError(f"configs/gpu_h100.py:{size}: expected one of {', '.join(SIZES)}")
    config = paper_config()
    preset, learning_rate, pairs, micro_batches, fill, remat = SIZES[size]
    config.model.preset, config.optim.learning_rate = preset, learning_rate
    config.batch.pairs = None
    config.batch.pairs_per_device, config.batch.micro_batches = pairs, micro_batches

    # Micro-batches of 9 slots a device (0.5B: 18), and a row for 9. The longer it is, the less is left
    # over at its end, and the attention kernel takes no longer for it. Slots cost nothing, and with
    # some to spare it is tokens that run out. docs/scaling.md, "Packing".
    config.batch.row_length = 24_576
    config.batch.tokens_per_pair = 2730.0
    config.batch.crops_per_pair = 4.66
    config.batch.fill = fill
    config.loss.pool = "global"

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.remat = remat
    config.data.num_workers = 12
    return config
