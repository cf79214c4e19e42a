"""Real artwork: some 30,000 colour icons and emoji of two dozen artists, with names.

    bash launch/setup.sh icons
    python launch/run_all.py --config configs/icons.py:quick --workdir runs/icons

The first run fetches 110 MB from the npm registry (needs `npm`). `quick` is the whole
path at 32x32 pixels, 36 minutes on 2 cores that were busy with other work too. It shows
that every part works on pictures that nobody made for it. What a held-out name makes it
draw has the right background and an artist's palette and line, rarely the subject.
Licences and artists of every picture are in its metadata. `retrieval` is the same with
a memory bank, by frozen networks (`bash launch/setup.sh features`). `tasks` is tuned on
all tasks that artwork serves, by other artists than three, whose styles are then new
(`bash launch/setup.sh icons controls features`): 100 minutes beside other trainings
teach palettes, looks and rough places; README has the scores.
"""

from ml_collections import ConfigDict

from cm3leon_jax.data.icon_scenes import CLASSES
from cm3leon_jax.data.icon_sets import SETS

NEW_ARTISTS = ("fxemoji", "emojione-v1", "streamline-freehand-color")


def get_config(variant: str = "quick") -> ConfigDict:
    variants = {"quick": _quick, "retrieval": _retrieval, "tasks": _tasks}
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
                    "channels": 96,
                    "multipliers": (1,),
                    "res_blocks": 2,
                    "attention": (),
                    "middle": "none",
                    "kernel": 1,
                    "norm": "layer",
                    "latent": 32,
                    "codebook": 1024,
                    "code_dim": 16,
                },
                "training": {
                    "optimizer": {
                        "peak": 2e-3,
                        "warmup": 30,
                        "steps": 2000,
                        "schedule": "cosine",
                        "floor": 0.02,
                        "b2": 0.99,
                        "weight_decay": 0.0,
                    },
                    "batch_size": 32,
                    "unquantised_steps": 300,
                    "restart_until": 1600,
                    "l1": 2.0,
                    "l2": 20.0,
                },
                "regions_per_image": 1,
            },
            "decoder": {
                "layers": 4,
                "width": 160,
                "heads": 5,
                "mlp": 640,
                "length": 256,
                "positions": "both",
                "qk_norm": True,
                "init_std": 0.05,
            },
            "pretrain": {
                "infill": {
                    "spans": 0.5,
                    "segment": 0.3,
                    "region": 0.2,
                    "region_without_text": 0.2,
                },
                "packing": {"kind": "first_fit", "row_length": 256},
                "batch_size": 8,
                "optimizer": {
                    "kind": "muon",
                    "peak": 4e-3,
                    "warmup": 100,
                    "steps": 1800,
                    "schedule": "cosine",
                    "floor": 0.02,
                },
                "log_every": 50,
                "checkpoint_every": 600,
                "validate_every": 600,
            },
            "protocol": "configs/eval/pairs.py",
            "sampling": {
                "text_to_image": {"temperature": 1.0, "top_p": 0.9, "guidance": 3.0},
                "caption": {"temperature": 0.0},
                "infill": {"temperature": 1.0, "top_p": 0.9, "guidance": 2.0},
            },
        }
    )


def _retrieval() -> ConfigDict:
    c = _quick()
    c.name = "icons:retrieval"
    # Texts find by texts and pictures by pictures; near-duplicates are those that
    # copies of validation icons, and icons of one subject, tell apart.
    c.retrieval = {
        "encoder": {"kind": "frozen"},
        "per_query": (2, 2),
        "documents": 2,  # an icon has some 75 ids: a row holds it and two others
        "skip_above": None,
    }
    return c


def _tasks() -> ConfigDict:
    c = _quick()
    c.name = "icons:tasks"
    c.data.settings.sets = tuple(name for name in SETS if name not in NEW_ARTISTS)
    c.vocabulary.classes = len(CLASSES)
    c.decoder.length = 384
    controls = tuple(f"control_{x}" for x in ("edge", "scribble", "segmentation"))
    references = tuple(f"reference_{x}" for x in ("style", "composition", "content"))
    c.sft = {
        "tasks": {
            **dict.fromkeys(("text_to_image", "infill", "answer", "edit"), 2.0),
            **dict.fromkeys(("caption_short", "caption_detailed", "segment"), 1.0),
            **dict.fromkeys(("caption_long", "edit_region", "ground"), 1.0),
            **dict.fromkeys(("variation", *references, *controls), 0.7),
        },
        "examples": {"train": 6_000, "validation": 200, "test": 200},
        # Words of the tasks, and pictures that no document shows.
        "tokenizers": (
            *("answer", "caption_long", "edit", "edit_region", "ground", *controls),
        ),
        "answer": 0.8,
        "infill": {
            "spans": 0.3,
            "segment": 0.3,
            "region": 0.2,
            "region_without_text": 0.3,
        },
        # A picture of 64 codes, 256 class tokens and their text; or three pictures.
        "packing": {"kind": "first_fit", "row_length": 384},
        "batch_size": 4,
        "optimizer": {
            "kind": "muon",
            "peak": 3e-3,
            "warmup": 100,
            "steps": 2_500,
            "schedule": "cosine",
            "floor": 0.02,
        },
        "log_every": 50,
        "checkpoint_every": 1000,
        "validate_every": 1000,
    }
    c.protocol = "configs/eval/icon_tasks.py"
    c.sampling.control = {"temperature": 1.0, "top_p": 0.9, "guidance": 2.0}
    c.sampling.edit = {"temperature": 1.0, "top_p": 0.9, "guidance": (2.0, 1.2)}
    return c
