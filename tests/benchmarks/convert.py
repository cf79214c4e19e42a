"""Host memory while a Chameleon of the published shape is converted.

    python tests/benchmarks/convert.py --layers 32      (7B: 13 GB, and as much again)

Writes random bfloat16 weights in shards, converts them in a process of its own and
watches that process: what it holds beyond its own shards (on a CPU the whole decoder,
and the image tokenizer in float32) is to be at most 1.3 times the largest tensor of the
files. Pages of the mapped files, which the system may drop at any time, are told apart.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tiny_chameleon as tiny

from cm3leon_jax.interop import shards

ROOT = Path(__file__).resolve().parents[2]
TOTAL, CODES, TEXT = 65_536, 8192, 49_152
CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cm3leon_jax import conversion
from configs import chameleon_7b
config = chameleon_7b.get_config().to_dict()
import jax
jax.devices()
print("ready", flush=True)
sys.stdin.readline()
facts = conversion.import_chameleon(Path(sys.argv[2]), Path(sys.argv[3]), config)
print(json.dumps(facts), flush=True)
"""


def words() -> dict[str, int]:
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += [f"IMGIMG{str(code).translate(letters)}Z" for code in range(CODES)]
    names += ["<eoss>", "<racm3:break>"]
    reserved = TOTAL - TEXT - len(names)
    names += [f"<reserved{CODES + 2 + i:05}>" for i in range(reserved)]
    names[names.index("<reserved08706>") + 1] = "<image>"
    names += [f"piece{i}" for i in range(TEXT)]
    return {name: i for i, name in enumerate(names)}


def published(folder: Path, layers: int) -> tuple[int, int]:
    """Writes the folder; the bytes of its largest tensor and of the image tokenizer."""
    folder.mkdir()
    vocabulary = words()
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": TOTAL,
        "max_position_embeddings": 4096,
        "vq_config": {},
    }
    file = tiny.settings() | sizes
    (folder / "config.json").write_text(json.dumps(file))
    tiny.tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    images = tiny.IMAGES | {
        **{"embed_dim": 256, "num_embeddings": CODES, "latent_channels": 256},
        **{"resolution": 512, "base_channels": 128, "num_res_blocks": 2},
        "channel_multiplier": [1, 1, 2, 2, 4],
    }
    tokenizer = tiny.image_shapes(images, "model.vqmodel.")
    shapes = tiny.decoder_shapes(file, qk_norm=True) | tokenizer
    generator = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            # Numbers of their own, as those of a model: they are hard to compress.
            x = generator.standard_normal(shape, np.float32)
            yield name, (0.02 * x).astype(jnp.bfloat16)

    shards.write(folder, tensors())
    largest = max(math.prod(shape) for shape in shapes.values())
    return 2 * largest, 4 * sum(math.prod(shape) for shape in tokenizer.values())


def memory(process: int) -> dict[str, int]:
    """Bytes of a process: its own (anonymous), and of mapped files."""
    found = {}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found[name] = 1024 * int(value.split()[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", default=None, help="where there is room")
    flags = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=flags.folder))
    try:
        tensor, images = published(place / "published", flags.layers)
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, ROOT, place / "published", place / "work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        begun = memory(child.pid)
        peak, start = dict(begun), time.monotonic()
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            now = memory(child.pid)
            peak = {key: max(x, now.get(key, 0)) for key, x in peak.items()}
            time.sleep(0.05)
        seconds = time.monotonic() - start
        if child.returncode:
            sys.exit(child.returncode)  # what was wrong it has said
        facts = json.loads(child.stdout.read())
        own = facts["bytes"] + images
        beyond = peak["RssAnon"] - begun["RssAnon"] - own
        print(
            json.dumps(
                {
                    "parameters": facts["parameters"],
                    "seconds": round(seconds, 1),
                    "shards_bytes": own,
                    "largest_array_bytes": facts["largest_shard_bytes"],
                    "largest_tensor_bytes": tensor,
                    "peak_bytes": peak["RssAnon"],
                    "peak_mapped_bytes": peak["RssFile"],
                    "beyond_shards_bytes": beyond,
                    "ratio": round(beyond / tensor, 3),
                }
            )
        )
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
