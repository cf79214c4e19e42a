"""The paper's: zero-shot MS-COCO FID of 30,000 captions (paper 1.10, 3.1).

    python launch/evaluate.py --config configs/eval/coco_fid30k.py --workdir runs/7b \
        --checkpoint pretrain --data data/coco

After 0, 1 and 2 retrieved documents, one picture a caption and the best of 8 by the
retriever's CLIP. One caption each of 30,000 pictures of val2014 (in the order of a
hash: the paper's choice is not known), compared with those pictures, their centred
squares at 256 pixels. `--data` also holds `pt_inception-2015-12-05-6726825d.pth`;
`offline` has the features of EfficientNet-Lite0 instead, under their own name, and no
Inception score.

The paper (7B): 10.82, 5.78 and 4.88 of 8. What it samples with is not given: these are
the defaults of its authors' script.
"""

from ml_collections import ConfigDict

# Features of pictures, and what is scored by them.
VARIANTS = {
    "inception": ("inception", ("fid", "inception_score", "precision_recall")),
    "offline": ("efficientnet_lite0", ("fid", "precision_recall")),
}


def get_config(variant: str = "inception") -> ConfigDict:
    features, scores = VARIANTS[variant]
    return ConfigDict(
        {
            "name": "coco_fid30k" + ":offline" * (variant == "offline"),
            "world": "public",
            "split": "validation",
            "documents": 30_000,
            "tasks": ("text_to_image",),
            "shown": 24,
            "seed": 0,
            "public": {
                "set": "coco_prompts",
                "metrics": (*scores, "clip_score"),
                "retrieve": (0, 1, 2),
                "candidates": (1, 8),
                "sampler": {"temperature": 1.0, "top_p": 0.9, "guidance": 4.0},
                "rerank": {"similarity": 1.0},
                "features": features,
            },
        }
    ).lock()
