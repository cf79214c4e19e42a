r"""documents/ -> bank/: the memory bank, and the neighbours of training documents.

    python launch/build_bank.py --config configs/shapes.py:study --workdir runs/study
    python launch/build_bank.py --workdir runs/study --add new
    python launch/build_bank.py --workdir runs/study --add FOLDER
    python launch/build_bank.py --workdir runs/study --remove IDS.txt

`--add` takes a split of documents/ or a folder of pictures with captions, `--remove` a
file with one id a line. Both change the bank that is there; nothing is trained again.
"""

from pathlib import Path

import command
from absl import flags

CONFIG = command.define_config(command.complete_system)
ADD = flags.DEFINE_string("add", None, "A split of documents/, or a folder.")
REMOVE = flags.DEFINE_string("remove", None, "A file with one id of a document a line.")


def main() -> dict:
    from cm3leon_jax import memory, stages

    workdir = Path(command.WORKDIR.value)
    if ADD.value is None and REMOVE.value is None:
        config = command.given_config(CONFIG)
        return stages.run(config, workdir, ["build_bank"], command.OVERWRITE.value)
    if CONFIG.value is not None:
        raise ValueError(
            "--add and --remove change the bank that is there: no --config"
        )
    command.given_config(CONFIG)  # joins the other processes of a job
    made = {}
    if REMOVE.value is not None:
        lines = Path(REMOVE.value).read_text().splitlines()
        ids = [line.strip() for line in lines if line.strip()]
        if not ids:
            raise ValueError(f"--remove {REMOVE.value}: no ids in that file")
        made |= memory.remove(workdir, ids)
    if ADD.value is not None:
        made |= memory.add(workdir, ADD.value)
    return made


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
