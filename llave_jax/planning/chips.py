"""Chips that programs can be compiled for without having them: their figures and topologies.

Owns what vendors publish of a chip, the rates assumed of its attention kernels, and descriptions of the
devices of a TPU slice or a host of GPUs. What these mean for a program is `prediction.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

from jax.experimental import topologies

GIB = 2**30


class NoCompilerError(RuntimeError):
    """The compiler for a kind of chip is not installed; the message says how to install it."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      flops: bf16 operations a second.
      hbm: bytes of memory that a program can use.
      links: bytes a second to other chips, over all links together.
    """

    flops: float
    hbm: int
    links: float


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """A TPU, with figures from cloud.google.com/tpu/docs/system-architecture-tpu-vm.

    Attributes:
      clock: cycles a second in XLA's estimates: the clock at which its matrix units reach `flops`.
      options: of the topology description. They make a chip one device, as slices of v4 and v5p do.
    """

    clock: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """A GPU, with figures from NVIDIA's data sheets and tuning guides.

    Attributes:
      name: the device's own name.
      capability: compute capability, major and minor.
      cores: streaming multiprocessors.
      clock: cycles a second, boosted.
      bandwidth: bytes a second from and to its memory.
      l2: bytes of its level 2 cache.
      shared_memory: bytes of shared memory of a core; a block of threads can use 1 KiB less.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock: float
    bandwidth: float
    l2: int
    shared_memory: int

    def target(self) -> str:
        """XLA's description of the device (a GpuTargetConfigProto in text form)."""
        major, minor = self.capability
        feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        versions = " ".join(
            f'{part}_version: "12.8.0"' for part in ("driver", "runtime", "compile_time_toolkit")
        )
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
            gpu_device_info {{
              {versions}
              device_address_bits: 64
              cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
              core_count: {self.cores}
              clock_rate_ghz: {self.clock / 1e9}
              memory_bandwidth: {self.bandwidth:.0f}
              device_memory_size: {self.hbm}
              l2_cache_size: {self.l2}
              shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block: {48 * 1024}
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              fpus_per_core: {128 if major >= 9 else 64}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}"""


CHIPS: dict[str, Tpu | Gpu] = {
    "v4": Tpu(275e12, 32 * GIB, 300e9, 1.05e9, {"chip_config_name": "megacore"}),
    "v5e": Tpu(197e12, 16 * GIB, 200e9, 1.5e9),
    "v5p": Tpu(459e12, 95 * GIB, 600e9, 1.75e9, {"chip_config_name": "megacore"}),
    "v6e": Tpu(918e12, 32 * GIB, 448e9, 1.75e9),
    "a100": Gpu(
        312e12, 79 * GIB, 600e9, "NVIDIA A100-SXM4-80GB",
        (8, 0), 108, 1.41e9, 2.04e12, 40 * 2**20, 164 * 1024,
    ),
    "h100": Gpu(
        989e12, 79 * GIB, 900e9, "NVIDIA H100 80GB HBM3",
        (9, 0), 132, 1.98e9, 3.35e12, 50 * 2**20, 228 * 1024,
    ),
}  # fmt: skip
# The share of a chip's links that a collective over one mesh axis can use.
LINKS_SHARE = 0.5
# The share of the matrix units' rate that the TPU attention kernels reach, if all scores that they compute
# count and heads are padded to full lanes. benchmarks/tpu_kernels.py reads the shares off the scheduled
# instructions. Higher readings are cut to 0.95.
KERNEL_RATES = {
    "v4": {"causal_fwd": 0.52, "causal_bwd": 0.88, "full_fwd": 0.46, "full_bwd": 0.79},
    "v5e": {"causal_fwd": 0.76, "causal_bwd": 0.95, "full_fwd": 0.64, "full_bwd": 0.85},
    "v5p": {"causal_fwd": 0.75, "causal_bwd": 0.92, "full_fwd": 0.61, "full_bwd": 0.83},
    "v6e": {"causal_fwd": 0.20, "causal_bwd": 0.35, "full_fwd": 0.20, "full_bwd": 0.33},
}


def topology_devices(topology: str) -> tuple[list[Any], str]:
    """Devices to compile for. They need not exist.

    Args:
      topology: a TPU slice such as "v4:4x4x4", or the GPUs of one host such as "h100:8".

    Returns:
      The devices, and the kind of chip, a key of CHIPS.

    Raises:
      ValueError: the chip is not known, or does not come in this shape.
      NoCompilerError: the compiler for this kind of chip is not installed.
    """
    kind, _, shape = topology.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not shape:
        raise ValueError(f"topology {topology!r}: expected CHIP:SHAPE with CHIP of {list(CHIPS)}")
    if isinstance(chip, Gpu):
        return _gpu_host(chip, topology, shape), kind
    # Without these, libtpu asks the cloud's metadata server about the machine, and locks its chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompilerError(
            f"topology {topology!r}: compiling for TPUs needs libtpu, but no TPU: "
            "pip install llave_jax[tpu]"
        )
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **chip.options)
    return described.devices, kind


def _gpu_host(chip: Gpu, topology: str, shape: str) -> list[Any]:
    if not shape.isdigit() or int(shape) == 0:
        raise ValueError(f"topology {topology!r}: expected the GPUs of one host, such as h100:8")
    try:
        described = topologies.get_topology_desc(
            topology_name=chip.name,
            platform="cuda",
            topology=f"1x1x{shape}",
            target_config=chip.target(),
        )
    except NotImplementedError as error:
        raise NoCompilerError(
            f"topology {topology!r}: compiling for GPUs needs jax's CUDA plugin, but no GPU: "
            "pip install llave_jax[cuda]"
        ) from error
    return described.devices
