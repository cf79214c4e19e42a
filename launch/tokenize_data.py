"""documents/ -> tokens/: every document as ids of the one vocabulary.

python launch/tokenize_data.py --config configs/shapes.py:quick --workdir runs/quick
"""

import command

if __name__ == "__main__":  # data workers import this file again
    command.run_stages("tokenize_data")
