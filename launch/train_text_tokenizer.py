r"""documents/ -> text_tokenizer/: byte-pair pieces of the training texts.

    python launch/train_text_tokenizer.py --config configs/shapes.py:quick \
        --workdir runs/quick
"""

import command

if __name__ == "__main__":  # data workers import this file again
    command.run_stages("train_text_tokenizer")
