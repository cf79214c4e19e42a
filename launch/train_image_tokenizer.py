r"""documents/ -> image_tokenizer/: the VQGAN that turns pictures into codes.

    python launch/train_image_tokenizer.py --config configs/shapes.py:quick \
        --workdir runs/quick
"""

import command

if __name__ == "__main__":  # data workers import this file again
    command.run_stages("train_image_tokenizer")
