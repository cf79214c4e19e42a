"""CM3Leon-350M as published: paper Table 3, sections 2.1 to 2.4.

    python launch/pretrain.py --config configs/cm3leon_350m.py --workdir DIR
    python launch/sft.py --config configs/cm3leon_350m.py:sft --workdir DIR

24 layers of width 1,024, rows of 4,096 tokens, 8M tokens per update, 1.4T in all.
Expected: zero-shot COCO FID-30K 14.2 with two retrieved documents (paper Table 1).
Not in the paper and filled in here: heads and ReLU (OPT's), AdamW's settings and the
linear decay to 10 % (metaseq's OPT launcher), the shares of the masking modes (ours).
`data.settings.path` is a folder of webdataset tars with pictures and captions,
`retrieval.encoder.path` one with CLIP ViT-B/32 in Hugging Face's layout (`config.json`,
`model.safetensors`, `tokenizer.json`): both are yours to give.

`:sft` adds fine-tuning on the tasks of paper 1.12 as in its Table 4, of which the paper
says 760M and 7B: rows of 4,096 tokens, 2M per update, 30B in all. Its examples are
yours too: a folder `sft.path` with `TASK.jsonl` for each (`data/task_sources.py`).
Weights are 1 where the paper says none: a task's share is its size, within bounds.
"""

from ml_collections import ConfigDict

CONTROLS = ("edge", "segmentation", "hed", "pose", "depth", "normal", "scribble")
TASKS = (
    *("edit", "write", "ground", *(f"control_{kind}" for kind in CONTROLS)),
    *("caption_short", "caption_detailed", "caption_long", "answer"),
    *("science", "science_cot"),
)


def get_config(variant: str = "") -> ConfigDict:
    tokens_per_update = 8 * 2**20
    row = 4096
    config = ConfigDict(
        {
            "name": "cm3leon_350m",
            "seed": 0,
            "data": {
                "source": "webdataset",
                "settings": {"path": "pairs", "image_size": 256},
            },
            # 56,320 text + 8,192 image + 1,024 for everything else = 65,536.
            "vocabulary": {"text": 56_320, "sentinels": 512, "total": 65_536},
            "image_tokenizer": {
                "model": {"image_size": 256, "codebook": 8192, "dtype": "bfloat16"},
                # The VQGAN's losses (paper 2.5); batch and steps of Make-A-Scene.
                "training": {
                    "optimizer": {
                        "peak": 1e-4,
                        "warmup": 1000,
                        "steps": 800_000,
                        "b1": 0.5,
                        "b2": 0.9,
                        "weight_decay": 0.0,
                    },
                    "batch_size": 192,
                    "restart_until": 400_000,
                    "perceptual": 1.0,
                    "adversarial": 0.8,
                    "adversarial_start": 250_001,
                },
                "regions_per_image": 1,
                # In place of VGG-16, which no package registry ships.
                "features": "efficientnet_lite0",
            },
            # Paper 1.8: two neighbours by text and two by picture, three of them used.
            "retrieval": {
                "encoder": {"kind": "clip", "path": "clip-vit-base-patch32"},
                "storage": "int8",
                "per_query": (2, 2),
                "documents": 3,
                "skip_above": 0.9,
                "query_dropout": 0.2,
            },
            "decoder": {
                "layers": 24,
                "width": 1024,
                "heads": 16,
                "mlp": 4096,
                "length": row,
                "dtype": "bfloat16",
                "remat": "full",
            },
            "pretrain": {
                "infill": {
                    "spans": 1.0,
                    "segment": 0.1,
                    "region": 0.1,
                    "region_without_text": 0.3,
                },
                "packing": {"kind": "concatenate", "row_length": row},
                "batch_size": tokens_per_update // row,
                "loss_blocks": 8,
                "optimizer": {"peak": 6e-4, "warmup": 1500, "steps": 175_000},
                "log_every": 10,
                "checkpoint_every": 1000,
                "validate_every": 1000,
                "workers": 8,
                "spike": 1.0,
            },
            # Temperature, top-p and guidance: metaseq's demo (the paper's figure 4
            # says one guidance suits all sizes, but not which).
            "sampling": {
                "text_to_image": {"temperature": 1.0, "top_p": 0.8, "guidance": 3.0},
                "caption": {"temperature": 0.0},
                "infill": {"temperature": 1.0, "top_p": 0.8, "guidance": 3.0},
            },
            "protocol": "configs/eval/pairs.py",
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            # True keeps the optimizer's state in the memory of the hosts.
            "rules": {"offload": False},
        }
    )
    if variant not in ("", "sft"):
        raise ValueError(f"{config.name}:{variant}: choose sft, or none")
    if variant:
        config.sft = {
            "infill": config.pretrain.infill.to_dict(),
            "tasks": dict.fromkeys(TASKS, 1.0),
            "path": "tasks",
            "examples": {"train": 3_000_000, "validation": 1_000, "test": 1_000},
            "packing": {"kind": "first_fit", "row_length": row},
            "batch_size": 2 * 2**20 // row,
            "loss_blocks": 8,
            "optimizer": {"peak": 5e-5, "warmup": 150, "steps": 14_305},
            "workers": 8,
            "spike": 1.0,
        }
    return config.lock()
