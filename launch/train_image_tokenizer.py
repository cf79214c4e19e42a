r"""documents/ -> image_tokenizer/: the VQGAN that turns pictures into codes.

    python launch/train_image_tokenizer.py --config configs/shapes.py:quick \
        --workdir runs/quick
"""

import command

command.run_stages("train_image_tokenizer")
