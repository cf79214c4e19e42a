"""The rule table: logical axis names of arrays -> axes of the mesh.

Parameters carry logical names where they are declared (`out_sharding=("embed",
"mlp")`), activations at block borders (`shard(x_BLD, ("batch", "length", "embed"))`).
There are two mappings, one for *storing* parameters and optimizer state and one for
*computing* with activations; fully sharded data parallelism is the difference between
them: a weight's `embed` axis is stored over `fsdp` and gathered just before its use,
because the batch of the activations is what lies over `fsdp` there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cm3leon_jax.parallel.mesh import AXES

_WHERE_EVEN = ("sequence", "replica", "table")  # split only where it comes out even
LARGE = 64 << 20  # bytes; a leaf up to this size may be copied to every device
HOST = "pinned_host"  # the kind of memory
Shard = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


@dataclass(frozen=True, kw_only=True)
class AxisTable:
    """For each logical axis the mesh axes over which it is split, () for none.

    Of activations only: `sequence` is the length between the products of a layer (see
    Korthikanti et al. 2022), `replica` the rows and `table` the width where tokens are
    looked up by columns.
    """

    embed: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    replica: tuple[str, ...] = ()
    table: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            for axis in getattr(self, entry.name):
                if axis not in AXES:
                    raise ValueError(
                        f"rules: {entry.name} -> {axis!r} is no axis of the mesh, "
                        f"choose from {AXES}"
                    )

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """`("embed", "mlp")` -> `PartitionSpec("fsdp", "tensor")`.

        Raises ValueError for an unknown name, or where two dimensions would be split
        over one mesh axis.
        """
        known = {entry.name for entry in dataclasses.fields(self)}
        for name in names:
            if name is not None and name not in known:
                raise ValueError(
                    f"rules: logical axis {name!r} of {tuple(names)} is not one of "
                    f"{sorted(known)}"
                )
        split = [() if name is None else getattr(self, name) for name in names]
        used = [axis for axes in split for axis in axes]
        if len(set(used)) < len(used):
            raise ValueError(
                f"rules: {tuple(names)} -> {tuple(split)} uses a mesh axis twice"
            )
        return PartitionSpec(*(axes or None for axes in split))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The two mappings; the defaults suit every mesh of `parallel/mesh.py`.

    `offload`: the optimizer's state is stored in the memory of the hosts, and comes to
    the devices for the update alone.
    """

    offload: bool = False
    store: AxisTable = field(
        default=AxisTable(
            embed=("fsdp",), mlp=("tensor",), heads=("tensor",), vocab=("tensor",)
        )
    )
    compute: AxisTable = field(
        default=AxisTable(
            batch=("data", "fsdp"),
            mlp=("tensor",),
            heads=("tensor",),
            vocab=("tensor",),
            sequence=("tensor",),
            replica=("data",),
            table=("fsdp",),
        )
    )


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def shardings(abstract_state: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every leaf of a state, as a tree of the state's structure.

    `abstract_state` comes from `jax.eval_shape`. Leaves inside an NNX variable with
    logical names (parameters, and the optimizer moments that mirror them) follow
    `rules.store`; all others are replicated. So is, with a line in the log, a dimension
    that cannot be split evenly, unless the leaf is larger than `LARGE` bytes: then it
    is a ValueError that names the leaf. Arrays of `.opt` lie in the hosts' memory if
    `rules.offload`; ValueError where the devices have no such memory.
    """

    def place(path: Any, node: Any) -> Any:
        names = node.get_metadata("out_sharding", None) if _is_variable(node) else None
        spec = PartitionSpec() if names is None else rules.store.spec(names)
        away = rules.offload and path and getattr(path[0], "name", None) == "opt"

        def leaf_sharding(leaf: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path)
            # Counters stay: an array that small is never worth fetching.
            kind = HOST if away and leaf.ndim else None
            return NamedSharding(mesh, _even(name, leaf, spec, mesh), memory_kind=kind)

        return jax.tree.map(leaf_sharding, node)

    return jax.tree_util.tree_map_with_path(place, abstract_state, is_leaf=_is_variable)


def _even(name: str, leaf: Any, spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """`spec` without the splits that do not come out even."""
    shape, bytes_ = leaf.shape, leaf.size * leaf.dtype.itemsize
    if len(spec) > len(shape):
        raise ValueError(f"{name} has shape {shape} but {len(spec)} axis names: {spec}")
    entries: list[Any] = []
    for size, entry in zip(shape, spec, strict=False):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts == 0:
            entries.append(entry)
            continue
        why = (
            f"{name} of shape {shape}: its dimension of {size} cannot be split over "
            f"{parts} devices (mesh axes {axes})"
        )
        if bytes_ > LARGE:
            raise ValueError(f"{why}: change the mesh or the size")
        logging.info("%s, so every device has a copy of it", why)
        entries.append(None)
    return PartitionSpec(*entries)


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """How host batches lie on the mesh: the leading axis is `batch`."""
    return NamedSharding(mesh, rules.compute.spec(("batch",)))


def row_share(sharding: NamedSharding) -> tuple[int, int]:
    """(index, count): this process reads share `index` of the `count` equal ones of a
    batch with that sharding. Processes whose devices hold the same rows, as where
    `tensor` spans hosts, read the same; rows of a share need not lie side by side.

    Raises ValueError where two processes share some rows, or have unequally many.
    """
    size = sharding.num_devices
    parts = size // sharding.shard_shape((size,))[0]
    held: dict[int, set[int]] = {}
    for device, (where,) in sharding.devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).add(where.indices(parts)[0])
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if any(len(rows) * len(shares) != parts for rows in shares):
        raise ValueError(
            f"mesh={tuple(sharding.mesh.shape.values())}: the processes do not hold "
            "equal shares of a batch's rows, the same or apart: choose a mesh.tensor "
            "that divides the devices of a process, or is a multiple of them"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def shard_fn(mesh: Mesh, rules: Rules) -> Shard:
    """The callable that models take to place activations: `shard(x_BLD, names)`."""
    if mesh.size == 1:  # nothing to place; keeps one-device programs free of it
        return lambda x, names: x

    def shard(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        spec = list(rules.compute.spec(names))
        for i, name in enumerate(names):
            axes = getattr(rules.compute, name) if name else ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if name in _WHERE_EVEN and x.shape[i] % parts:
                spec[i] = None
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.lax.with_sharding_constraint(x, sharding)

    return shard
