"""tasks/ -> task_tokens/ -> sft/: the pretrained decoder, tuned on all tasks.

python launch/sft.py --config configs/shapes.py:full --workdir runs/full
"""

import command

if __name__ == "__main__":  # data workers import this file again
    command.run_stages("tokenize_tasks", "sft")
