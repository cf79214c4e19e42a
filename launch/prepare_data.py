"""Source -> documents/: pairs of pictures and text as ArrayRecord shards.

python launch/prepare_data.py --config configs/shapes.py:quick --workdir runs/quick
"""

import command

if __name__ == "__main__":  # data workers import this file again
    command.run_stages("prepare_data")
