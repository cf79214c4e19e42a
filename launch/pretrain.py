"""tokens/ -> pretrain/: the decoder, by the CM3 objective.

python launch/pretrain.py --config configs/shapes.py:quick --workdir runs/quick
"""

import command

command.run_stages("pretrain")
