"""How much memory a device has for a training step, and how much a compiled step takes.

Which batch is chosen by it is `batch_search.py`.
"""

from __future__ import annotations

from typing import Any

import jax

from llave_jax.common.host_memory import available_host_memory

# Shares of the memory that a step may take. On an accelerator the rest is for the batch that comes next,
# evaluation and fragments. On a CPU it is also for loading processes, checkpoints that are being
# written, and the system.
ACCELERATOR_SHARE, HOST_SHARE = 0.9, 0.6


def device_limit(device: Any) -> int:
    """Bytes that a training step may take on each device of this process.

    Args:
      device: one of this process. Devices of a CPU share the memory of the machine.

    Raises:
      ValueError: the device does not say how much memory it has.
    """
    if device.platform == "cpu":
        return int(HOST_SHARE * available_host_memory()) // jax.local_device_count()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ValueError(
            f"{device.device_kind} does not say how much memory it has, so no batch can be planned for it; "
            "set --config.batch.pairs and --config.batch.micro_batches"
        )
    return int(ACCELERATOR_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))


def step_bytes(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program takes on each device at most, its arguments included.

    Raises:
      RuntimeError: this version of jax does not say.
    """
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("this version of jax does not say how much memory the program needs")
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
