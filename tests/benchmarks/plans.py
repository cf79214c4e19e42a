"""The README's table of plans: the three published sizes on pods and clusters.

    python tests/benchmarks/plans.py                  train, offline stages, decoding
    python tests/benchmarks/plans.py v5p A100         of some topologies only
    python tests/benchmarks/plans.py maxtext          temporaries beside MaxText's

Compiles one program after another, a minute each, and needs the compilers: see
`launch/plan.py`, whose figures these are. All of it is predicted, nothing measured.
"""

import dataclasses
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from cm3leon_jax import planning
from cm3leon_jax.parallel import topologies
from cm3leon_jax.system import System
from configs import cm3leon_7b, cm3leon_350m, cm3leon_760m

CONFIGS = {"350M": cm3leon_350m, "760M": cm3leon_760m, "7B": cm3leon_7b}
PODS = ("v5p:4x4x4", "v5e:16x16", "v6e:16x16")
GPUS = {"350M": "1x32x8", "760M": "1x32x8", "7B": "1x64x8"}  # as in the paper
TRAINING = [
    *((size, topology, 4) for topology in PODS for size in CONFIGS),
    *((size, f"{gpu}:{GPUS[size]}", 4) for gpu in ("H100", "A100") for size in CONFIGS),
]
OFFLINE = [
    *(
        (stage, "350M", topology, None)
        for stage in ("tokenize", "embed", "search")
        for topology in ("v5e:4x4", "H100:1x1x8")
    ),
    *(("decode", "7B", topology, 32) for topology in ("v5e:4x4", "H100:1x1x8")),
]
# MaxText 0.2.5's own compile (jax 0.12.0.1, libtpu 0.0.50.1): temporaries in GiB.
MAXTEXT = {
    ("v5p:4x4x4", 1): 4.18,
    ("v5p:4x4x4", 4): 13.09,
    ("v5e:16x16", 1): 3.86,
    ("v5e:16x16", 4): 10.35,
    ("v6e:16x16", 1): 3.63,
    ("v6e:16x16", 4): 13.31,
}


def system(size: str, **decoder) -> System:
    config = CONFIGS[size].get_config().to_dict()
    config["decoder"] |= decoder
    return System.make(config)


def row(*cells) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def memory(found: dict) -> str:
    given, made = (found[f"{x}_bytes"] / 2**30 for x in ("arguments", "temporaries"))
    return f"{given:.2f} + {made:.2f}"


def train(size: str, topology: str, rows: int) -> None:
    found = planning.plan(system(size), "pretrain", topologies.find(topology), rows)
    if not found["fits"]:
        row(size, topology, rows, "does not fit", *("",) * 5)
        return
    row(
        *(size, topology, rows, memory(found), found["microbatches"]),
        f"{found['seconds_at_least']['step']:.2f}",
        found["bound"],
        f"{found['mfu_at_most']:.2f}",
        f"{found['device_hours_at_least']:,.0f}",
    )


def offline(stage: str, size: str, topology: str, rows: int | None) -> None:
    planned = system(size)
    if stage == "decode":
        mesh = dataclasses.replace(planned.mesh, fsdp=1, tensor=-1)
        planned = dataclasses.replace(planned, mesh=mesh)
    found = planning.plan(planned, stage, topologies.find(topology), rows)
    unit = next(key for key in found if key.endswith("_per_second"))
    hours = found.get("device_hours_at_least")
    row(
        *(stage, size, topology, memory(found), found["bound"]),
        f"{found[unit]:,.0f} {unit.removesuffix('_per_second')}/s",
        "" if hours is None else f"{hours:,.1f}",
    )


def beside_maxtext(topology: str, rows: int, theirs: float) -> None:
    found = topologies.find(topology)
    tied = system("7B", tie_embeddings=True)
    batch = rows * len(found.devices)
    run = dataclasses.replace(tied.pretrain, batch_size=batch, loss_blocks=16)
    tied = dataclasses.replace(tied, pretrain=run)
    ours = planning.plan(tied, "pretrain", found, rows)["temporaries_bytes"] / 2**30
    row(topology, rows, f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}")


def main(wanted: list[str]) -> None:
    if "maxtext" in wanted:
        row("topology", "rows per device", "MaxText, GiB", "here", "ratio")
        for (topology, rows), theirs in MAXTEXT.items():
            beside_maxtext(topology, rows, theirs)
        return

    def chosen(topology: str) -> bool:
        return not wanted or any(topology.startswith(name) for name in wanted)

    known = {plan[1] for plan in TRAINING} | {plan[2] for plan in OFFLINE}
    for name in wanted:
        if not any(topology.startswith(name) for topology in known):
            raise ValueError(f"{name!r} begins none of {', '.join(sorted(known))}")
    for planned in filter(lambda plan: chosen(plan[1]), TRAINING):
        train(*planned)
    for planned in filter(lambda plan: chosen(plan[2]), OFFLINE):
        offline(*planned)


if __name__ == "__main__":
    main(sys.argv[1:])
