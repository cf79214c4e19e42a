"""Hardware that is not here: devices to compile for, and what their data sheets say.

    v5p:4x4x4        64 chips of a TPU pod; `2*v5e:16x16` is two such slices
    H100:1x32x8      slices x hosts x GPUs of a host

Compilers come with the extras `tpu` and `cuda`; neither needs its hardware, and of the
second the two wheels that `_gpus` names are enough. Devices made here can be compiled
for, but not computed on.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Of one chip: bfloat16 FLOP/s, bytes of memory and its bytes/s, bytes/s that it
    sends to its neighbours (ICI, NVLink) and out of its slice or host."""

    flops: float
    memory: float
    bandwidth: float
    near: float
    far: float


# Vendors' data sheets; ICI is the sum of a chip's links, one way. What leaves a slice
# of TPUs is what Google's guide to scaling assumes of a chip's share of its host.
_TPU = {
    "v4": Chip(flops=275e12, memory=32 * GIB, bandwidth=1228e9, near=270e9, far=6e9),
    "v5e": Chip(flops=197e12, memory=16 * GIB, bandwidth=819e9, near=180e9, far=3e9),
    "v5p": Chip(flops=459e12, memory=95 * GIB, bandwidth=2765e9, near=540e9, far=6e9),
    "v6e": Chip(flops=918e12, memory=32 * GIB, bandwidth=1640e9, near=360e9, far=12e9),
}
# NVLink one way; one port of 400 Gbit/s for each H100 or H200, of 200 for an A100.
_GPU = {
    "A100": Chip(flops=312e12, memory=85e9, bandwidth=2039e9, near=300e9, far=25e9),
    "H100": Chip(flops=989e12, memory=85e9, bandwidth=3352e9, near=450e9, far=50e9),
    "H200": Chip(flops=989e12, memory=150e9, bandwidth=4800e9, near=450e9, far=50e9),
}
_HOPPER = {"cores": 132, "l2": 52428800, "core_memory": 233472, "block": 232448}
_GPU_CORES = {
    "A100": {
        **{"cores": 108, "l2": 41943040, "core_memory": 167936, "block": 166912},
        **{"clock": 1.41, "fpus": 64, "major": 8, "name": "NVIDIA A100-SXM4-80GB"},
    },
    "H100": {
        **_HOPPER,
        **{"clock": 1.98, "fpus": 128, "major": 9, "name": "NVIDIA H100 80GB HBM3"},
    },
    "H200": {
        **_HOPPER,
        **{"clock": 1.98, "fpus": 128, "major": 9, "name": "NVIDIA H200"},
    },
}
# XLA's GpuTargetConfigProto, from the data sheets.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {core_memory}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory:.0f} shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices of a cluster, in `slices` of them, and what one of them can do.

    `near` devices are joined by ICI or NVLink: a slice of TPUs, a host of GPUs.
    """

    name: str
    devices: tuple[Any, ...]
    slices: int
    near: int
    chip: Chip


def find(name: str) -> Topology:
    """The topology of that name.

    Raises ValueError for a name that is none, or that the compiler does not know, and
    where the compiler is not installed.
    """
    gpus = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name)
    if gpus and gpus[1].upper() in _GPU:
        return _gpus(name, gpus[1].upper(), *(int(n) for n in gpus.groups()[1:]))
    tpus = re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+):(\d+(?:x\d+)+)", name)
    if tpus and tpus[2] in _TPU:
        return _tpus(name, int(tpus[1] or 1), tpus[2], tpus[3])
    raise ValueError(
        f"topology={name!r}: give TPUs as v5p:4x4x4 (or 2*v5p:4x4x4, two slices) with "
        f"one of {', '.join(_TPU)}, GPUs as H100:1x32x8 (slices x hosts x GPUs) with "
        f"one of {', '.join(_GPU)}"
    )


@contextlib.contextmanager
def _asking(name: str, package: str) -> Iterator[None]:
    """Says in one line what a compiler thinks of a topology."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"topology={name!r} needs its compiler: pip install {package}"
        ) from error
    except Exception as error:  # every backend has exceptions of its own
        reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
        raise ValueError(
            f"topology={name!r} is not one that its compiler knows: {reason}"
        ) from error


def _tpus(name: str, slices: int, kind: str, shape: str) -> Topology:
    chips = math.prod(int(n) for n in shape.split("x"))
    # Else libtpu asks the network which TPU this machine is, and locks it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    options = {"num_slices": slices} if slices > 1 else {}
    with _asking(name, "'cm3leon-jax[tpu]'"):
        importlib.import_module("libtpu")
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        )
    devices, chip = tuple(found.devices), _TPU[kind]
    cores = len(devices) // (slices * chips)
    if cores > 1:  # v4 lists two devices a chip
        chip = Chip(**{key: value / cores for key, value in vars(chip).items()})
    near = len(devices) // slices
    return Topology(name=name, devices=devices, slices=slices, near=near, chip=chip)


def _gpus(name: str, kind: str, slices: int, hosts: int, gpus: int) -> Topology:
    chip, shape = _GPU[kind], f"{slices}x{hosts}x{gpus}"
    sheet = {"memory": chip.memory, "bandwidth": chip.bandwidth}
    # cuDNN alone is enough to compile with, where it is there.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    with _asking(name, "jax-cuda13-plugin jax-cuda13-pjrt (of jax's version)"):
        importlib.import_module("jax_plugins.xla_cuda13")
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=shape,
            topology=shape,
            target_config=_TARGET.format(**_GPU_CORES[kind], **sheet),
        )
    devices = tuple(found.devices)
    return Topology(name=name, devices=devices, slices=slices, near=gpus, chip=chip)
