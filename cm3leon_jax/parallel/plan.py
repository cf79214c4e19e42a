"""Compiles a program for hardware that is not here, and says what it will need.

Every figure is *predicted*: bytes by the compiler's memory analysis, FLOPs and traffic
counted in its text (`parallel/compiled.py`), seconds by dividing those by what data
sheets promise (`parallel/topologies.py`). The step time is therefore the least that
the slowest of arithmetic, memory and network allows, the others hidden behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from cm3leon_jax.parallel import compiled
from cm3leon_jax.parallel.topologies import GIB, Topology

_USABLE = 0.95  # of a device's memory; the runtime keeps some to itself


@dataclass(frozen=True, kw_only=True)
class Program:
    """A function to be jitted, and shapes, with shardings, of what it is given.

    `groups` names parts of the arguments (parameters, optimizer, …), trees of the same
    shapes. `unit` says of what the program does `per_run`; `model_flops` is what these
    cost by formula, on all devices together; None where there is none.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    groups: Mapping[str, Any]
    unit: str
    per_run: int
    model_flops: float | None
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def compile_program(program: Program) -> Any:
    """The program, compiled for the devices of its arguments' shardings."""
    options: dict[str, Any] = {"donate_argnums": program.donate}
    if program.out_shardings is not None:
        options["out_shardings"] = program.out_shardings
    lowered = jax.jit(program.function, **options).lower(*program.arguments)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
        # A GPU would try out tiles; without one, the products of its library will do.
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def report(program: Program, topology: Topology) -> dict[str, Any]:
    """What one run of the program needs of each device: all of it predicted.

    Activations are among the `temporaries`: the compiler does not part them. `flops`
    are at least those where `loops_counted_once` says that some have no known end.
    `fits` is False, and nothing else is known, where the compiler itself runs out of
    memory. `hosts_bytes` of a device's arguments lie in its host's memory.
    """
    base = {
        "predicted": True,
        "topology": topology.name,
        "devices": len(topology.devices),
        **program.settings,
    }
    try:
        executable = compile_program(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next(line for line in str(error).splitlines() if line)
        return base | {"fits": False, "reason": reason[:200]}
    memory = executable.memory_analysis()
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes
    total = memory.argument_size_in_bytes + new - memory.alias_size_in_bytes
    counts = compiled.count(executable.as_text(), topology.near)
    # What is given is read once at least; counted is what was made on the way.
    traffic = counts.traffic + memory.argument_size_in_bytes
    chip, devices = topology.chip, len(topology.devices)
    seconds = {
        "compute": counts.flops / chip.flops,
        "memory": traffic / chip.bandwidth,
        "network": counts.near / chip.near,
    }
    seconds["network"] = max(seconds["network"], counts.far / chip.far)
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    by_formula = {}
    if program.model_flops is not None:
        by_formula["model_flops"] = program.model_flops / devices
        by_formula["mfu_at_most"] = program.model_flops / devices / chip.flops / step
    if memory.host_argument_size_in_bytes:
        by_formula["hosts_bytes"] = memory.host_argument_size_in_bytes
    if counts.unknown:
        by_formula["loops_counted_once"] = counts.unknown
    return base | {
        "fits": total <= _USABLE * chip.memory,
        **{
            f"{name}_bytes": sum(map(_local_bytes, jax.tree.leaves(tree)))
            for name, tree in program.groups.items()
        },
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "total_bytes": total,
        "memory_bytes": int(chip.memory),
        "flops": counts.flops,
        "traffic_bytes": traffic,
        "collective_bytes": dict(counts.collectives),
        "seconds_at_least": {**seconds, "step": step},
        "bound": bound,
        **by_formula,
        f"{program.unit}_per_second": program.per_run / step,
    }


def _local_bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize


def _size(count: float) -> str:
    large = count >= GIB / 10
    return f"{count / GIB:10.2f} GiB" if large else f"{count / 2**20:10.2f} MiB"


def table(found: Mapping[str, Any]) -> str:
    """A report for people, of one device where nothing else is said."""
    lines = [f"predicted for {found['devices']} devices of {found['topology']}"]

    def line(name: str, value: str) -> None:
        lines.append(f"  {name:<28}{value}")

    for name, value in found.items():
        if name in ("predicted", "topology", "devices"):
            continue
        if name.endswith("_bytes") and isinstance(value, Mapping):
            for kind, size in value.items():
                line(f"{kind} (sent)", _size(size))
        elif name.endswith("_bytes"):
            line(name.removesuffix("_bytes"), _size(value))
        elif name.endswith("flops"):
            line(name, f"{value / 1e12:10.4g} TFLOP")
        elif name == "mesh":
            line(name, " ".join(f"{axis}={size}" for axis, size in value.items()))
        elif isinstance(value, Mapping):
            for kind, seconds in value.items():
                line(f"{kind}, at least", f"{1e3 * seconds:10.2f} ms")
        elif isinstance(value, float):
            line(name, f"{value:10.3g}")
        else:
            line(name, f"{value!s:>10}")
    return "\n".join(lines)
