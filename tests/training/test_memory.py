"""How much memory a step may take, of a device that says so and of a host."""

import pytest

from llave_jax.training import memory

GIB = 2**30


class Device:
    device_kind = "a device"
    platform = "gpu"

    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_an_accelerator_says_what_it_has():
    stats = {"bytes_limit": 60 * GIB, "bytes_in_use": 10 * GIB}
    assert memory.device_limit(Device(stats)) == int(0.9 * 50 * GIB)
    with pytest.raises(
        ValueError, match=r"a device does not say .* set --config\.batch\.pairs and"
    ):
        memory.device_limit(Device(None))


def test_devices_of_a_cpu_share_the_machine(monkeypatch):
    monkeypatch.setattr(memory, "available_host_memory", lambda: 80 * GIB)
    device = Device(None)
    device.platform = "cpu"
    # Tests run with 8 simulated devices.
    assert memory.device_limit(device) == 6 * GIB
