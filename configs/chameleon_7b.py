"""Chameleon-7B and its descendants (Anole), converted and tuned: paper section 2.7.

    python launch/convert.py --from DIR --to WORKDIR

Conversion writes all sizes of the folder into WORKDIR/config.json (those below are
guesses), and with `--config configs/chameleon_7b.py:VARIANT` the section `sft` too:
launch/prepare_tasks.py and launch/sft.py then need WORKDIR alone. Once there is a
WORKDIR, a config given to them must have its sizes, as `vocabulary.text`. `pretrain`
tells how Meta trained it (8M tokens an update, rate 1e-4) and is not run. Variants have
a section `sft`, with our tasks and templates, that trains all weights (`tuned`), the
rows of image ids of the head alone (`anole`: so Anole taught Chameleon to draw), or
low-rank changes of all matrices (`lora`). The examples are yours: `sft.path` is a
folder with `TASK.jsonl`.
"""

from ml_collections import ConfigDict

PARTS = {
    "tuned": {"train": ("all",)},
    "anole": {"train": ("head_image_rows",)},
    "lora": {"train": ("lora",), "rank": 16, "alpha": 32.0},
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *PARTS):
        raise ValueError(
            f"configs/chameleon_7b.py:{variant}: choose from {list(PARTS)}"
        )
    row = 4096
    infill = {"spans": 1.0, "segment": 0.1, "region": 0.1, "region_without_text": 0.3}
    c = ConfigDict(
        {
            "name": "chameleon_7b",
            "seed": 0,
            "origin": "chameleon",
            "data": {
                "source": "webdataset",
                "settings": {"path": "pairs", "image_size": 512},
            },
            "vocabulary": {"text": 49_152, "sentinels": 512, "total": 65_536},
            "image_tokenizer": {
                "model": {
                    "image_size": 512,
                    "multipliers": (1, 1, 2, 2, 4),
                    "attention": (),
                    "free_latents": True,
                },
                # How it was trained is not known; it is not trained here.
                "training": {
                    "optimizer": {"peak": 1e-4, "warmup": 0, "steps": 1},
                    "batch_size": 1,
                    "restart_until": 0,
                },
            },
            "decoder": {
                "layers": 32,
                "width": 4096,
                "heads": 32,
                "mlp": 11_008,
                "length": row,
                "dtype": "bfloat16",
                "norm": "rms",
                "activation": "swiglu",
                "positions": "rope",
                "qk_norm": True,
                "remat": "full",
            },
            "pretrain": {
                "infill": infill,
                "packing": {"kind": "concatenate", "row_length": row},
                "batch_size": 2048,
                "loss_blocks": 8,
                "z_loss": 1e-5,
                "optimizer": {"peak": 1e-4, "warmup": 4000, "steps": 1_100_000},
            },
            # Temperature, top-p and both scales of guidance: Meta's inference code.
            # Once tuned, a prompt has two streams.
            "sampling": {
                "text_to_image": {
                    "temperature": 0.7,
                    "top_p": 0.9,
                    "guidance": 3.0 if variant else (3.0, 1.2),
                },
                "caption": {"temperature": 0.7, "top_p": 0.9},
                "infill": {"temperature": 0.7, "top_p": 0.9, "guidance": 3.0},
            },
            "protocol": "configs/eval/pairs.py",
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            # True keeps the optimizer's state in the memory of the hosts.
            "rules": {"offload": False},
        }
    )
    if variant:
        c.name += f":{variant}"
        # Rate, decay and batch of Chameleon's own tuning (paper section 2.7).
        c.sft = {
            "tasks": {"text_to_image": 1.0, "caption_short": 1.0},
            "examples": {"train": 64_000, "validation": 1_000, "test": 1_000},
            "path": "examples",
            "infill": infill,
            "packing": {"kind": "first_fit", "row_length": row},
            "batch_size": 128,
            "loss_blocks": 8,
            "z_loss": 1e-5,
            "optimizer": {
                "peak": 1e-5,
                "warmup": 100,
                "steps": 2_000,
                "schedule": "cosine",
            },
            "parts": PARTS[variant],
        }
    return c.lock()
