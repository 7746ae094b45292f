"""How much memory a process can take, within its control groups."""

import psutil
import pytest

from llave_jax.common.host_memory import available_host_memory

GIB = 2**30


def write_group(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """(proc, sys) of a process in a group "/a/b" of a machine with 100 GiB free."""

    class Free:
        available = 100 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Free)

    def make(line):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(line)
        return tmp_path / "proc", tmp_path / "sys"

    return make


def test_without_control_groups_the_machines_memory_counts(machine, tmp_path):
    assert available_host_memory(tmp_path / "none", tmp_path) == 100 * GIB
    assert available_host_memory(*machine("0::/a/b\n")) == 100 * GIB


def test_control_groups_of_version_2(machine):
    proc, sys = machine("0::/a/b\n")
    write_group(sys / "a/b", {"memory.max": "max"})
    stat = f"anon {GIB}\ninactive_file {2 * GIB}"
    write_group(sys / "a", {"memory.max": 8 * GIB, "memory.current": 5 * GIB, "memory.stat": stat})
    assert available_host_memory(proc, sys) == 5 * GIB


@pytest.mark.parametrize("path", ["/a/b", "/of/the/host"])
def test_control_groups_of_version_1(machine, path):
    """In a container the own group is mounted as the root, and the path is the host's."""
    proc, sys = machine(f"9:cpu:/a\n4:memory:{path}\n0::/\n")
    limit = {"memory.usage_in_bytes": GIB, "memory.stat": f"total_inactive_file {GIB // 2}"}
    write_group(sys / "memory", {**limit, "memory.limit_in_bytes": 3 * GIB})
    write_group(sys / "memory/a/b", {**limit, "memory.limit_in_bytes": 2**63 - 4096})
    assert available_host_memory(proc, sys) == 2.5 * GIB


def test_a_group_that_is_full_has_no_room(machine):
    proc, sys = machine("0::/\n")
    write_group(
        sys, {"memory.max": GIB, "memory.current": 2 * GIB, "memory.stat": "inactive_file 0"}
    )
    assert available_host_memory(proc, sys) == 0
