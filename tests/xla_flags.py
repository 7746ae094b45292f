"""XLA's flags of tests, in this process and in those that tests start."""

import os


def xla_flags(devices: int = 1) -> str:
    """The value of XLA_FLAGS for a process with that many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
        # The other way to compile fusions takes nearly twice as long for the programs of the tests.
        flags += " --xla_cpu_use_fusion_emitters=false"
    return flags
