r"""documents/ -> dual_encoder/: the retriever's encoder of texts and pictures.

    python launch/train_dual_encoder.py --config configs/shapes.py:study \
        --workdir runs/study
"""

import command

if __name__ == "__main__":  # data workers import this file again
    command.run_stages("train_dual_encoder")
