"""What a stage would need of hardware that is not here, by its compiler's word.

    python launch/plan.py --config configs/cm3leon_7b.py --stage pretrain \
        --topology v5p:4x4x4 --rows_per_device 4

Compiles the real program on this machine's CPU and prints a table, then one line of
JSON. Needs the compilers: the extra `tpu`, for GPUs `cuda`, best in an environment of
their own. `--search` tries meshes, rematerialisation and accumulation, from little
communication and recomputation to little memory, and stops at the first that fits.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything starts a backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import command
from absl import flags

STAGE = flags.DEFINE_enum(
    "stage",
    "pretrain",
    ["pretrain", "sft", "decode", "tokenize", "embed", "search"],
    "What is to run there.",
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5p:4x4x4, 2*v5e:16x16, H100:1x32x8, …", required=True
)
ROWS = flags.DEFINE_integer(
    "rows_per_device",
    None,
    "Rows that a device works on together (of a microbatch, in training).",
    lower_bound=1,
)
SEARCH = flags.DEFINE_bool("search", False, "Look for settings that fit.")


def main() -> dict:
    import jax

    from cm3leon_jax import planning
    from cm3leon_jax.parallel import plan, topologies
    from cm3leon_jax.system import System

    if CONFIG.value is None:
        raise ValueError("--config is missing: give the file of a system")
    # What is compiled for absent hardware cannot be kept: it only warns.
    jax.config.update("jax_enable_compilation_cache", False)
    system = System.make(CONFIG.value.to_dict())
    topology = topologies.find(TOPOLOGY.value)
    if not SEARCH.value:
        found = planning.plan(system, STAGE.value, topology, rows=ROWS.value)
        print(plan.table(found))
        return found
    if ROWS.value is not None:
        raise ValueError("--search chooses --rows_per_device itself: leave it out")
    found = None
    for candidate in planning.candidates(system, STAGE.value, topology):
        found = planning.plan(candidate, STAGE.value, topology)
        tried = {key: found[key] for key in ("mesh", "remat", "rows_per_device")}
        print(json.dumps(tried | {"fits": found["fits"]}), file=sys.stderr, flush=True)
        if found["fits"]:
            print(plan.table(found))
            return found
    if found is None:
        raise ValueError(
            f"no mesh on {TOPOLOGY.value} divides batch_size and the heads, and "
            "has room for the parameters: change one of them, or the devices"
        )
    raise ValueError(
        f"nothing fits on {TOPOLOGY.value}: use more devices, or a smaller batch_size"
    )


if __name__ == "__main__":
    flags.FLAGS.set_default("workdir", ".")  # nothing is read or written
    CONFIG = command.define_config(command.complete_system)
    command.run(main)
