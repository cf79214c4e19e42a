"""Foreign weights -> a work directory, and back.

    python launch/convert.py --from chameleon-7b --to runs/chameleon
    python launch/convert.py --from anole --to runs/anole --image_tokenizer vqgan.ckpt
    python launch/convert.py --from runs/chameleon --to my-chameleon --checkpoint sft
    python launch/convert.py --from vqgan.ckpt --to image_tokenizer

A folder of Hugging Face (Chameleon, Anole) becomes a work directory, a work directory a
folder that transformers loads, and a VQGAN's checkpoint (taming-transformers, Meta: a
.ckpt with its .yaml; LlamaGen: a .pt) a folder for `ImageTokenizer.load`.
"""

from pathlib import Path

import command
from absl import flags

for _name in ("workdir", "overwrite"):  # of the scripts that run stages
    delattr(flags.FLAGS, _name)
FROM = flags.DEFINE_string("from", None, "What is read.", required=True)
TO = flags.DEFINE_string("to", None, "The folder that is made.", required=True)
CONFIG = flags.DEFINE_string("config", None, "Of a Chameleon: by its norm order.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "pretrain", "Of a work directory.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of a folder.")
IMAGES = flags.DEFINE_string("image_tokenizer", None, "Meta's vqgan.ckpt.")
SIZE = flags.DEFINE_integer("image_size", 256, "Of LlamaGen's pictures.")


def _only(what: str, *known: str) -> None:
    for name in ("config", "checkpoint", "dtype", "image_tokenizer", "image_size"):
        if name not in known and flags.FLAGS[name].present:
            raise ValueError(f"--{name} says nothing to {what}: leave it out")


def main() -> dict:
    from cm3leon_jax import conversion
    from cm3leon_jax.config import read_json
    from cm3leon_jax.parallel import distributed
    from cm3leon_jax.storage import is_url

    for name in (FROM.value, TO.value):
        if is_url(name):
            raise ValueError(f"{name} is in a bucket: give folders of this machine")
    distributed.initialize()
    source, target = Path(FROM.value), Path(TO.value)
    if source.is_file():
        _only("a VQGAN's checkpoint", "image_size")
        return conversion.import_images(source, target, SIZE.value)
    settings = source / "config.json"
    if not settings.is_file():
        raise FileNotFoundError(f"{settings} does not exist: nothing to convert there")
    found = read_json(settings, "download it again")
    if not isinstance(found, dict):
        raise ValueError(f"{settings} has no settings: download it again")
    if "vocabulary" in found:
        _only("a work directory", "checkpoint", "dtype")
        return conversion.export(source, target, CHECKPOINT.value, DTYPE.value)
    _only("a folder of Hugging Face", "config", "image_tokenizer")
    size = "34b" if "swin_norm" in found and found["swin_norm"] else "7b"
    name = CONFIG.value or f"configs/chameleon_{size}.py"
    config = command.read_config_file(name, "--config")
    checkpoint = Path(IMAGES.value) if IMAGES.value else None
    return conversion.import_chameleon(source, target, config, checkpoint)


if __name__ == "__main__":
    command.run(main)
