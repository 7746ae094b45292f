"""How much memory of the machine this process can still take."""

from __future__ import annotations

from pathlib import Path

import psutil

# A limit as large as this is the control group's way to say that there is none.
_NO_LIMIT = 2**60


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
