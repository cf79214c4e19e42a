r"""A checkpoint, measured by a frozen protocol: eval/NAME.CHECKPOINT.json, samples/.

    python launch/evaluate.py --config configs/eval/shapes.py:quick \
        --workdir runs/quick --checkpoint pretrain
"""

from pathlib import Path

import command
from absl import flags

CONFIG = command.define_config(command.complete_protocol)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "pretrain", "A folder of the work directory, or FOLDER@STEP."
)


def main() -> dict:
    from cm3leon_jax import config, stages
    from cm3leon_jax.evaluation import report
    from cm3leon_jax.evaluation.protocol import Protocol
    from cm3leon_jax.parallel import distributed

    distributed.initialize()
    if CONFIG.value is None:
        raise ValueError("give a protocol: --config configs/eval/….py")
    protocol = config.make(Protocol, CONFIG.value.to_dict(), "protocol")
    workdir = Path(command.WORKDIR.value)
    result = stages.evaluate(workdir, protocol, CHECKPOINT.value)
    report.write(workdir)
    return result


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
