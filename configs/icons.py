"""Real artwork: some 30,000 colour icons and emoji of two dozen artists, with names.

    bash launch/setup.sh icons
    python launch/run_all.py --config configs/icons.py:quick --workdir runs/icons

The first run fetches 110 MB from the npm registry (needs `npm`). `quick` is the whole
path at 32x32 pixels in about 25 minutes on 2 cores. It shows that every part works on
pictures that nobody made for it: expect recognisable colours and outlines of common
subjects, not drawings. Licences and artists of every picture are in its metadata.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "quick") -> ConfigDict:
    variants = {"quick": _quick}
    if variant not in variants:
        raise ValueError(f"configs/icons.py:{variant}: choose from {list(variants)}")
    return variants[variant]().lock()


def _quick() -> ConfigDict:
    return ConfigDict(
        {
            "name": "icons:quick",
            "seed": 0,
            "data": {"source": "icons", "settings": {"image_size": 32}},
            "vocabulary": {"text": 2048, "sentinels": 32},
            "image_tokenizer": {
                "model": {
                    "image_size": 32,
                    "patch": 4,
                    "channels": 128,
                    "multipliers": (1,),
                    "res_blocks": 2,
                    "attention": (),
                    "middle": "none",
                    "kernel": 1,
                    "norm": "layer",
                    "latent": 128,
                    "codebook": 1024,
                    "code_dim": 32,
                },
                "training": {
                    "optimizer": {
                        "peak": 2e-3,
                        "warmup": 50,
                        "steps": 3000,
                        "weight_decay": 0.0,
                        "schedule": "cosine",
                        "floor": 0.02,
                    },
                    "batch_size": 32,
                    "unquantised_steps": 500,
                    "restart_until": 2000,
                },
                "regions_per_image": 2,
            },
            "decoder": {
                "layers": 4,
                "width": 192,
                "heads": 6,
                "mlp": 768,
                "length": 128,
                "positions": "rope",
                "qk_norm": True,
            },
            "pretrain": {
                "infill": {
                    "spans": 0.5,
                    "segment": 0.25,
                    "region": 0.2,
                    "region_without_text": 0.3,
                },
                "packing": {"kind": "first_fit", "row_length": 127},
                "batch_size": 48,
                "optimizer": {
                    "peak": 2e-3,
                    "warmup": 100,
                    "steps": 1500,
                    "schedule": "cosine",
                },
                "log_every": 20,
                "checkpoint_every": 500,
                "validate_every": 500,
            },
            "protocol": "configs/eval/pairs.py",
            "sampling": {
                "text_to_image": {"temperature": 1.0, "top_p": 0.9, "guidance": 3.0},
                "caption": {"temperature": 0.0},
                "infill": {"temperature": 1.0, "top_p": 0.9, "guidance": 2.0},
            },
        }
    )
