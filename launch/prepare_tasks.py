"""Task sources -> tasks/: examples of every task of the section `sft`.

python launch/prepare_tasks.py --config configs/shapes.py:full --workdir runs/full
"""

import command

if __name__ == "__main__":  # data workers import this file again
    command.run_stages("prepare_tasks")
