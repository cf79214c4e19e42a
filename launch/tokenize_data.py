"""documents/ -> tokens/: every document as ids of the one vocabulary.

python launch/tokenize_data.py --config configs/shapes.py:quick --workdir runs/quick
"""

import command

command.run_stages("tokenize_data")
