"""What an image tokenizer keeps of 256-pixel pictures: rFID, PSNR, SSIM, codes in use.

    python launch/evaluate.py --config configs/eval/tokenizer_256.py \
        --workdir runs/7b --checkpoint image_tokenizer --data data/imagenet_val

Any pictures in `DATA/images`, 50,000 of them (ImageNet's validation set is usual);
`DATA/pt_inception-2015-12-05-6726825d.pth` for rFID. `offline` has the features of
EfficientNet-Lite0 instead, under their own name. No decoder needs to be trained. The
paper gives no number for its tokenizer.
"""

from ml_collections import ConfigDict

# Features of pictures.
VARIANTS = {"inception": "inception", "offline": "efficientnet_lite0"}


def get_config(variant: str = "inception") -> ConfigDict:
    features = VARIANTS[variant]
    return ConfigDict(
        {
            "name": "tokenizer_256" + ":offline" * (variant == "offline"),
            "world": "public",
            "split": "validation",
            "documents": 50_000,
            "tasks": ("reconstruction",),
            "shown": 24,
            "seed": 0,
            "public": {
                "set": "pictures",
                "metrics": ("fid",),
                "features": features,
            },
        }
    ).lock()
