"""Captions of COCO's Karpathy test split: 5,000 pictures, 5 references each.

    bash launch/setup.sh captions
    python launch/evaluate.py --config configs/eval/coco_caption.py --workdir runs/7b \
        --checkpoint sft --data data/coco

CIDEr-D, BLEU, ROUGE-L and METEOR by pycocoevalcap, as fractions: papers print CIDEr
times 100. The paper (tuned 7B, "0-shot"): CIDEr 61.6.

`hallucination` counts the things that captions make up too (CHAIR; the paper has none):
put `annotations/instances_val2014.json` there, and CHAIR's list of words as
`synonyms.txt`.
"""

from ml_collections import ConfigDict

VARIANTS = {"captions": (), "hallucination": ("hallucination",)}


def get_config(variant: str = "captions") -> ConfigDict:
    metrics = VARIANTS[variant]
    return ConfigDict(
        {
            "name": "coco_caption" + ":hallucination" * bool(metrics),
            "world": "public",
            "split": "test",
            "documents": 5_000,
            "tasks": ("caption",),
            "shown": 24,
            "seed": 0,
            "public": {
                "set": "coco_karpathy",
                "metrics": metrics,
                "sampler": {"temperature": 0.0},
                # Of hallucination, 1 counted a thing once however often it was named.
                "version": 1 + bool(metrics),
            },
        }
    ).lock()
