"""tokens/ -> pretrain/: the decoder, by the CM3 objective.

python launch/pretrain.py --config configs/shapes.py:quick --workdir runs/quick
"""

import command

if __name__ == "__main__":  # data workers import this file again
    command.run_stages("pretrain")
