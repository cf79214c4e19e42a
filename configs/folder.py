"""Your own folder: pictures with a caption in a .txt beside each, from about 200 up.

    python launch/run_all.py --config configs/folder.py:FOLDER --workdir runs/mine
    python launch/inspect_data.py --workdir runs/mine

What stands after the colon is the folder. Every part of the way at 64x64 pixels, sized
for some 200 pictures and 15 minutes on 2 idle cores: it shows that the pictures
come through, not what thousands of them and hours could do. A quarter is held out,
10 % for validation and 15 % for test. Near-duplicates of what is held out are left out
of training.

With thousands of pictures: smaller `validation_percent` and `test_percent`, more text
pieces (`vocabulary.text`), more codes (`image_tokenizer.model.codebook`), more steps of
both optimizers. Tars, parquet, JSON lines and TFDS: `cm3leon_jax/data/README.md`.
"""

from ml_collections import ConfigDict


def get_config(path: str = "my_pictures") -> ConfigDict:
    return ConfigDict(
        {
            "name": "folder",
            "seed": 0,
            "data": {
                "source": "folder",
                "settings": {
                    "path": path,
                    "image_size": 64,
                    "validation_percent": 10.0,
                    "test_percent": 15.0,
                },
                "ingest": {"duplicates": 4},
            },
            # 257 pieces are bytes; short captions of 200 pictures give few others.
            "vocabulary": {"text": 320, "sentinels": 16},
            "image_tokenizer": {
                "model": {
                    "image_size": 64,
                    "patch": 8,
                    "channels": 96,
                    "multipliers": (1,),
                    "res_blocks": 1,
                    "attention": (),
                    "middle": "none",
                    "kernel": 1,
                    "norm": "layer",
                    "latent": 32,
                    "codebook": 256,
                    "code_dim": 16,
                },
                "training": {
                    "optimizer": {
                        "peak": 2e-3,
                        "warmup": 30,
                        "steps": 1500,
                        "schedule": "cosine",
                        "floor": 0.02,
                        "b2": 0.99,
                        "weight_decay": 0.0,
                    },
                    "batch_size": 16,
                    "unquantised_steps": 300,
                    "restart_until": 1200,
                    "l1": 2.0,
                    "l2": 20.0,
                },
                # So few pictures are seen often, and should not be hidden alike.
                "regions_per_image": 4,
            },
            "decoder": {
                "layers": 4,
                "width": 128,
                "heads": 4,
                "mlp": 512,
                "length": 192,
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
                "packing": {"kind": "first_fit", "row_length": 192},
                "batch_size": 8,
                "optimizer": {
                    "kind": "muon",
                    "peak": 4e-3,
                    "warmup": 50,
                    "steps": 2000,
                    "schedule": "cosine",
                    "floor": 0.02,
                },
                "log_every": 50,
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
    ).lock()
