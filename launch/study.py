r"""Does retrieval pay for itself? Twelve runs, curves and the ratio, in one command.

    python launch/study.py --config configs/shapes.py:study --workdir runs/study
    python launch/study.py --config configs/shapes.py:study --workdir runs/study \
        --runs retrieval-0,baseline-0

Two arms (`retrieval`, with two documents, and `baseline`, without any) of three seeds;
retrieval with a third and a fifth of the updates, its rate decayed by then; and an
ablation each of: half of the neighbours random, all of them random, no CM3 masking, RA-
CM3's loss weight for retrieved documents. What comes before pretraining is made once,
in WORKDIR/shared, and linked into WORKDIR/runs/NAME, a work directory like any other.
What is done is skipped, so the same command goes on after an interruption, and `--runs`
makes some only. Writes WORKDIR/study.json and WORKDIR/study.html from all runs that are
there.
"""

import json
import os
import shlex
import sys
import time
from pathlib import Path

import command
from absl import flags

CONFIG = command.define_config(command.complete_system)
PROTOCOL = "configs/eval/entities.py"
SCORED = 1000  # documents of the mixed test set
SEEDS = (0, 1, 2)
SHORT = {"third": 3, "fifth": 5}  # runs, and what their updates are divided by
# (arm, settings that differ from the config's, None drops a section)
RUNS = {
    **{f"retrieval-{n}": ("retrieval", {"pretrain.seed": n}) for n in SEEDS},
    **{
        f"baseline-{n}": ("baseline", {"pretrain.seed": n, "retrieval": None})
        for n in SEEDS
    },
    **{name: ("short", {}) for name in SHORT},
    "noisy": ("ablation", {"retrieval.noise": 0.5}),
    "random": ("ablation", {"retrieval.noise": 1.0}),
    "causal": (
        "ablation",
        {f"pretrain.infill.{key}": 0.0 for key in ("spans", "segment", "region")},
    ),
    "weighted": ("ablation", {"retrieval.weight": 0.1}),
}
NAMES = flags.DEFINE_list("runs", list(RUNS), f"Some of {', '.join(RUNS)}.")


def main() -> dict:
    from cm3leon_jax import stages
    from cm3leon_jax.evaluation import study
    from cm3leon_jax.system import System

    unknown = set(NAMES.value) - set(RUNS)
    if unknown:
        raise ValueError(f"--runs {sorted(unknown)[0]}: choose from {', '.join(RUNS)}")
    workdir = Path(command.WORKDIR.value)
    config = command.given_config(CONFIG)
    if config["retrieval"] is None:
        raise ValueError("a retrieval study needs a config with the section retrieval")
    _check_checkpoints(System.make(config).pretrain)
    names = stages.stages_of(System.make(config))
    shared = names[: names.index("pretrain")]
    overwrite = command.OVERWRITE.value
    stages.run(config, workdir / "shared", shared, overwrite)
    for name in RUNS:  # in this order, whatever --runs says
        if name in NAMES.value:
            _make(config, workdir, name, overwrite)
    result = _collect(config, workdir)
    (workdir / "study.json").write_text(json.dumps(result, indent=1))
    page = workdir / "study.html"
    page.write_text(study.page(result), encoding="utf-8")
    return {
        "study": str(workdir / "study.json"),
        "page": str(page),
        "runs": list(result["runs"]),
        "ratio": {key: found["value"] for key, found in result["ratio"].items()},
    }


def _check_checkpoints(pretrain) -> None:
    """ValueError where a run would not keep all of its checkpoints."""
    steps, every = pretrain.optimizer.steps, pretrain.checkpoint_every
    made = -(-steps // every)
    if made > pretrain.keep:
        raise ValueError(
            f"pretrain.keep={pretrain.keep} of the {made} checkpoints of a run (steps="
            f"{steps}, checkpoint_every={every}): the curves need all of them, set "
            f"pretrain.keep={made}"
        )


def _config(config: dict, name: str) -> dict:
    """The config of a run."""
    made = json.loads(json.dumps(config))
    for path, value in RUNS[name][1].items():
        *sections, last = path.split(".")
        node = made
        for section in sections:
            node = node[section]
        node[last] = value
    if name in SHORT:
        made["pretrain"]["optimizer"]["steps"] //= SHORT[name]
    return made


def _make(config: dict, workdir: Path, name: str, overwrite: bool) -> None:
    """Links, trains and scores one run, as far as that is not done."""
    from cm3leon_jax import stages
    from cm3leon_jax.evaluation import report
    from cm3leon_jax.evaluation.page import read_object, stage_hash
    from cm3leon_jax.evaluation.protocol import result_file
    from cm3leon_jax.system import System

    directory = workdir / "runs" / name
    mine = _config(config, name)
    directory.mkdir(parents=True, exist_ok=True)
    for folder in System.make(mine).stage_inputs:
        if folder != "pretrain" and not (directory / folder).exists():
            target = os.path.relpath(workdir / "shared" / folder, directory)
            (directory / folder).symlink_to(target, target_is_directory=True)
    print(f"study: {name}", file=sys.stderr, flush=True)
    stages.run(mine, directory, ["pretrain"], overwrite)
    made = stage_hash(directory / "pretrain")
    if read_object(directory / "curve.json").get("inputs_hash") != made:
        curve = {"inputs_hash": made, "points": _curve(directory)}
        (directory / "curve.json").write_text(json.dumps(curve, indent=1))
    protocol = _protocol(mine)
    path = result_file(directory, protocol, "pretrain")
    if read_object(path).get("inputs_hash") != made:
        stages.evaluate(directory, protocol, "pretrain")
        report.write(directory)


def _protocol(config: dict):
    """What a run is scored by."""
    from cm3leon_jax import config as configs
    from cm3leon_jax.evaluation.protocol import Protocol

    variant = "retrieval" if config["retrieval"] else "baseline"
    settings = command.read_config_file(f"{PROTOCOL}:{variant}", "protocol")
    return configs.make(Protocol, settings, "protocol")


def _curve(directory: Path) -> list[dict]:
    """Loss per query image token at every checkpoint of a run, with what it has cost:
    on the first documents of the test split, after two retrieved documents or none."""
    import jax
    import orbax.checkpoint as ocp

    from cm3leon_jax import CM3Leon
    from cm3leon_jax.data.sources import read_documents
    from cm3leon_jax.evaluation import entities, study
    from cm3leon_jax.models.decoder import abstract
    from cm3leon_jax.sampling.engine import Engine
    from cm3leon_jax.training.checkpoint import load_model

    model = CM3Leon.load(directory)
    system = model.system
    documents = read_documents(directory / "documents", "test")[:SCORED]
    found = entities.retrieved(model, documents)
    rows, starts = entities.query_rows(model.codec, documents, found)
    per_step = study.flops_per_step(system)
    points = []
    folder = directory / "pretrain" / "checkpoints"
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for step in sorted(ocp.path.step.checkpoint_steps(folder)):
        decoder = load_model(
            directory / "pretrain",
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                abstract(system.decoder_config),
            ),
            step,
            settings=system.checkpoint_settings,
        )
        engine = Engine(decoder, system.layout, system.rules, None, batch=64)
        nats = entities.nats_per_token(engine, rows, starts).mean()
        points.append({"step": step, "flops": step * per_step, "nats": float(nats)})
    return points


def _collect(config: dict, workdir: Path) -> dict:
    """All runs of this config that are there, as `cm3leon_jax/evaluation/study.py`
    reads them. Those made with other settings are left out, which is said."""
    from cm3leon_jax.config import config_hash
    from cm3leon_jax.evaluation import study
    from cm3leon_jax.evaluation.page import read_object
    from cm3leon_jax.evaluation.protocol import hardware, result_file
    from cm3leon_jax.system import System

    runs = {}
    for name, (arm, _) in RUNS.items():
        directory = workdir / "runs" / name
        done = read_object(directory / "pretrain" / "DONE.json")
        points = read_object(directory / "curve.json")
        mine = _config(config, name)
        result = read_object(result_file(directory, _protocol(mine), "pretrain"))
        wanted = config_hash(System.make(mine).stage_inputs["pretrain"])
        if done and done.get("inputs_hash") != wanted:
            print(
                f"study: {name} was made with other settings: left out",
                file=sys.stderr,
            )
        if any(x.get("inputs_hash") != wanted for x in (done, points, result)):
            continue
        scores = result["scores"]
        nats = {
            k: scores.get(f"likelihood/nats@{k}", {}).get("value") for k in study.NATS
        }
        runs[name] = {
            "arm": arm,
            "seconds": done["seconds"],
            "curve": points["points"],
            "nats": {k: value for k, value in nats.items() if value is not None},
            "scores": scores,
        }
    extra = study.retriever_flops(System.make(config))
    pairs = [
        tuple(study.curve_of(runs[f"{arm}-{n}"]) for arm in ("baseline", "retrieval"))
        for n in SEEDS
        if f"baseline-{n}" in runs and f"retrieval-{n}" in runs
    ]
    ratio = {}
    if pairs:
        ratio["training"] = study.ratios(pairs)
        ratio["training_and_retriever"] = study.ratios(pairs, sum(extra.values()))
    return {
        "config": config["name"],
        "config_hash": config_hash(config),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "runs": runs,
        "extra_flops": extra,
        "ratio": ratio,
    }


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
