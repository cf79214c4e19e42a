"""A machine of made-up speed, of the devices that are here: what plans are made for."""

import jax

from cm3leon_jax.parallel import topologies

CPU = topologies.Topology(
    name="cpu",
    devices=tuple(jax.devices()),
    slices=1,
    near=4,
    chip=topologies.Chip(flops=1e12, memory=2**34, bandwidth=1e11, near=1e10, far=1e9),
)
