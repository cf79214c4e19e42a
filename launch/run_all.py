"""Every stage of a config in order, then its protocol and the report.

    python launch/run_all.py --config configs/shapes.py:quick --workdir runs/quick

What is done is skipped, so the same command goes on after an interruption.
"""

from pathlib import Path

import command

CONFIG = command.define_config(command.complete_system)


def main() -> dict:
    from cm3leon_jax import config, stages
    from cm3leon_jax.evaluation import report
    from cm3leon_jax.evaluation.protocol import Protocol, result_file

    workdir = Path(command.WORKDIR.value)
    system = command.given_config(CONFIG)
    measured = command.read_config_file(system["protocol"], "protocol")
    protocol = config.make(Protocol, measured, "protocol")
    stages.check_protocol(protocol)  # now rather than after hours of training
    stages.run(system, workdir, overwrite=command.OVERWRITE.value)
    checkpoint = "pretrain" if system["sft"] is None else "sft"
    result = stages.evaluate(workdir, protocol, checkpoint)
    return {
        "report": str(report.write(workdir)),
        "scores_file": str(result_file(workdir, protocol, checkpoint)),
        "scores": {key: score["value"] for key, score in result["scores"].items()},
    }


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
