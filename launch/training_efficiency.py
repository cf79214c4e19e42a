"""How many FLOPs do two runs need to reach a score? (paper section 1.9)

    python launch/training_efficiency.py --config configs/eval/training_efficiency.py \
        --workdir runs/retrieval --baseline runs/plain

Measures every checkpoint of pretraining in both work directories by the protocol (what
is measured is not measured again) and divides the FLOPs of the baseline to reach its
best score, and those on its way, by those of the other. Writes
WORKDIR/training_efficiency.json. FLOPs are those of the decoder's training; of an
encoder that was trained for retrieval, the ratio with its cost and the bank's too.
"""

import json
import sys
from pathlib import Path

import command
from absl import flags

CONFIG = command.define_config(command.complete_protocol)
BASELINE = flags.DEFINE_string(
    "baseline", None, "The work directory to compare with.", required=True
)
SCORE = flags.DEFINE_string("score", "likelihood/nats", "A score of the protocol.")


def main() -> dict:
    from cm3leon_jax import config
    from cm3leon_jax.config import write_whole
    from cm3leon_jax.evaluation import study
    from cm3leon_jax.evaluation.protocol import Protocol
    from cm3leon_jax.parallel import distributed
    from cm3leon_jax.system import System

    distributed.initialize()
    if CONFIG.value is None:
        raise ValueError(
            "give a protocol: --config configs/eval/training_efficiency.py"
        )
    protocol = config.make(Protocol, CONFIG.value.to_dict(), "protocol")
    folders = [Path(BASELINE.value), Path(command.WORKDIR.value)]
    results = [_results(folder, protocol) for folder in folders]
    hashes = {result["data_hash"] for run in results for result in run}
    if len(hashes) > 1:
        raise ValueError(
            f"{folders[0]} and {folders[1]} have other documents in split "
            f"{protocol.split!r} (data_hash {', '.join(sorted(hashes))}): both runs "
            "must be measured on the same"
        )
    systems = [System.load(folder) for folder in folders]
    curves = [
        _curve(run, study.flops_per_step(system))
        for run, system in zip(results, systems, strict=True)
    ]
    ratio = {"training": study.ratios([(curves[0], curves[1])])}
    retrieval = systems[1].retrieval
    if retrieval is not None and retrieval.encoder.training is not None:
        extra = sum(study.retriever_flops(systems[1]).values())
        ratio["training_and_retriever"] = study.ratios([(curves[0], curves[1])], extra)
    made = {
        "protocol": protocol.name,
        "protocol_hash": protocol.hash,
        "data_hash": hashes.pop(),
        "score": SCORE.value,
        "runs": [str(folder) for folder in folders],
        "curves": curves,
        "ratio": ratio,
    }
    write_whole(folders[1] / "training_efficiency.json", json.dumps(made, indent=1))
    return made | {"ratio": {key: found["value"] for key, found in ratio.items()}}


def _results(folder: Path, protocol) -> list[dict]:
    """Of every checkpoint of a work directory, in order."""
    import orbax.checkpoint as ocp

    from cm3leon_jax import stages
    from cm3leon_jax.evaluation.page import read_object, stage_hash
    from cm3leon_jax.evaluation.protocol import result_file

    saved = folder / "pretrain" / "checkpoints"
    if not saved.is_dir():
        raise FileNotFoundError(f"{saved} does not exist: run launch/pretrain.py first")
    found = []
    for step in sorted(ocp.path.step.checkpoint_steps(saved)):
        name = f"pretrain@{step}"
        result = read_object(result_file(folder, protocol, name))
        if result.get("inputs_hash") != stage_hash(folder / "pretrain"):
            print(f"training_efficiency: {folder} {name}", file=sys.stderr, flush=True)
            result = stages.evaluate(folder, protocol, name)
        found.append(result)
    return found


def _curve(results: list[dict], per_step: float) -> list[tuple[float, float]]:
    """(FLOPs, score), less being better."""
    from cm3leon_jax.evaluation import compare

    key = SCORE.value
    if key not in results[0]["scores"]:
        known = ", ".join(results[0]["scores"])
        raise ValueError(f"--score {key}: the protocol has {known}")
    sign = 1 if compare.lower_is_better(key) else -1
    return [(r["step"] * per_step, sign * r["scores"][key]["value"]) for r in results]


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
