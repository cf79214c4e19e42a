"""Stanford's image paragraphs: 2,489 test pictures, a paragraph of each.

    bash launch/setup.sh captions
    python launch/evaluate.py --config configs/eval/image_paragraph.py \
        --workdir runs/7b --checkpoint sft --data data/paragraphs

Long captions, by pycocoevalcap, as fractions. The paper (tuned 7B): CIDEr 10.5 (times
100).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "image_paragraph",
            "world": "public",
            "split": "test",
            "documents": 2_489,
            "tasks": ("caption",),
            "shown": 24,
            "seed": 0,
            "public": {
                "set": "image_paragraph",
                "style": "long",
                "sampler": {"temperature": 0.0},
            },
        }
    ).lock()
