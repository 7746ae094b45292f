"""How much memory a device has for a training step, and how much a compiled step takes.

Which batch is chosen by it is `batch_search.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import psutil

# Shares of the memory that a step may take. On an accelerator the rest is for the batch that comes next,
# evaluation and fragments. On a CPU it is also for loading processes, checkpoints that are being
# written, and the system.
ACCELERATOR_SHARE, HOST_SHARE = 0.9, 0.6
# A limit as large as this is the control group's way to say that there is none.
_NO_LIMIT = 2**60


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


def available_host_memory(proc: Path = Path("/proc"), sys: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new arrays of this process can take: what is free or a cache, within its control group.

    Args:
      proc: where the kernel says which control group the process is in.
      sys: where control groups are mounted, of version 1 or 2.
    """
    return min([psutil.virtual_memory().available, *_control_group_rooms(proc, sys)])


def _control_group_rooms(proc: Path, sys: Path) -> list[int]:
    """Bytes that are left in the process's control group and in those around it."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = sys, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = sys / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # A container sees its own group as the root, whatever the path says.
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            room = _room(folder, limit, usage, cache)
            if room is not None:
                rooms.append(room)
    return rooms


def _room(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes left in a control group: its limit, less what is used and no cache; None without a limit."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max" or int(most) >= _NO_LIMIT:
            return None
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(most) - used + int(stat.get(cache, 0)))
