r"""A checkpoint, measured by a frozen protocol: eval/NAME.CHECKPOINT.json, samples/.

    python launch/evaluate.py --config configs/eval/shapes.py:quick \
        --workdir runs/quick --checkpoint pretrain
    python launch/evaluate.py --config configs/eval/vqa2.py --workdir runs/big \
        --checkpoint sft --data data/vqa2

Several checkpoints, `--checkpoint pretrain,sft`, are measured one after the other and
compared, as `compare.py` does. `--weights int8` or `--cache int8` measures each twice,
as it was trained and so, and compares: what does that precision cost? A run that was
interrupted goes on with the same command; `--overwrite` throws away what it has left.
"""

import itertools
from pathlib import Path

import command
import precision_flags
from absl import flags

CONFIG = command.define_config(command.complete_protocol)
CHECKPOINTS = flags.DEFINE_list(
    "checkpoint", ["pretrain"], "Folders of the work directory, or FOLDER@STEP."
)
DATA = flags.DEFINE_string(
    "data", None, "The folder of a public set; WORKDIR/public/SET without it."
)
ENCODER = flags.DEFINE_string(
    "encoder",
    None,
    "A CLIP, or a work directory with a dual encoder, for scores that compare texts "
    "with pictures; the system's own without it.",
)


def main() -> dict:
    import jax

    from cm3leon_jax import config, stages
    from cm3leon_jax.evaluation import compare, report
    from cm3leon_jax.evaluation.protocol import Protocol, result_file
    from cm3leon_jax.parallel import distributed

    distributed.initialize()
    if CONFIG.value is None:
        raise ValueError("give a protocol: --config configs/eval/….py")
    protocol = config.make(Protocol, CONFIG.value.to_dict(), "protocol")
    workdir = Path(command.WORKDIR.value)
    precision = precision_flags.precision()
    ways = dict.fromkeys(("", str(precision)))
    files, results = [], []
    for checkpoint, how in itertools.product(CHECKPOINTS.value, ways):
        result = stages.evaluate(
            *(workdir, protocol, checkpoint),
            data=None if DATA.value is None else Path(DATA.value),
            encoder=None if ENCODER.value is None else Path(ENCODER.value),
            precision=precision if how else None,
            overwrite=command.OVERWRITE.value,
        )
        results.append(result)
        files.append(result_file(workdir, protocol, checkpoint + f".{how}" * bool(how)))
    if jax.process_index() == 0:
        report.write(workdir)
    if len(files) == 1:
        return results[0]
    found = compare.read_all(files)
    print(compare.markdown(found))
    return compare.summary(found)


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
