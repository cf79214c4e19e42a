"""The device mesh: one, with the axes data, fsdp and tensor.

`data` holds copies of the parameters (it spans slices or nodes), `fsdp` shards the
parameters and the batch, `tensor` splits the matrices inside a layer. Which array
dimension goes where is the business of `parallel/rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes
        for name, size in zip(AXES, sizes, strict=True):
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{name}={size} must be positive, or -1")
        if sizes.count(-1) > 1:
            raise ValueError(f"mesh={sizes}: only one of {AXES} can be -1")

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.data, self.fsdp, self.tensor


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of every process), axes of type Auto.

    Several slices (pods of TPUs, or partitions of GPUs, joined by a slower network)
    share out the axis `data`. Of GPUs they need not: XLA calls every host without a
    fabric of NVLink to other hosts a slice, and the mesh then goes host by host.
    Raises ValueError where the sizes do not multiply to the number of devices, and
    where `data` cannot be shared out.
    """
    devices = jax.devices() if devices is None else list(devices)
    known = math.prod(size for size in config.sizes if size != -1)
    sizes = tuple(
        len(devices) // known if size == -1 else size for size in config.sizes
    )
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor="
            f"{config.tensor} cannot cover {len(devices)} devices: choose sizes whose "
            "product is the number of devices, or -1 for one of them"
        )
    # Auto: the compiler places intermediate arrays; jax's default is Explicit.
    auto = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)
    if sizes[0] % slices and devices[0].platform in ("gpu", "cuda"):
        placed = np.empty(len(devices), object)
        placed[:] = sorted(devices, key=lambda device: (device.slice_index, device.id))
        return Mesh(placed.reshape(sizes), AXES, axis_types=auto)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data={sizes[0]} on {slices} slices: choose a multiple of {slices}, "
            "so that only gradients cross the slow network between them"
        )
    inside = (sizes[0] // slices, *sizes[1:])
    placed = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    return Mesh(placed, AXES, axis_types=auto)
