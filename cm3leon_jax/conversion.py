"""Foreign weights <-> work directories (`launch/convert.py`).

    import_chameleon   a folder of Hugging Face -> a work directory, as if trained here
    import_images      a VQGAN of taming-transformers, Meta, LlamaGen -> image tokenizer
    export             a work directory -> a folder that `transformers` loads

All is written beside the target first, which gets its name once it is whole.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm3leon_jax import config as configs
from cm3leon_jax import workdir
from cm3leon_jax.codec import load_image_tokenizer
from cm3leon_jax.interop import chameleon, hub, llamagen, taming
from cm3leon_jax.interop.shards import Shards
from cm3leon_jax.models.decoder import Decoder, abstract, parameter_count
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import make_mesh
from cm3leon_jax.parallel.rules import shardings
from cm3leon_jax.system import System
from cm3leon_jax.tokenizers import bytelevel
from cm3leon_jax.tokenizers import image as image_tokenizer
from cm3leon_jax.training.checkpoint import Checkpoints, latest_step, load_model
from cm3leon_jax.training.parts import Parts, load_finished

Results = dict[str, Any]
# Small files of a folder that nothing here reads, but that are handed back.
_KEPT = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_KEPT += ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


def import_chameleon(
    source: Path,
    target: Path,
    config: Mapping[str, Any],
    image_checkpoint: Path | None = None,
) -> Results:
    """A Chameleon or Anole -> a work directory that `CM3Leon.load` reads.

    `config` is one of `configs/chameleon_*.py`; sizes are the folder's own. Raises
    FileNotFoundError or ValueError, naming file and tensor, before anything is written.
    """
    _check_new(target)
    shards, file = Shards(source), chameleon.read_settings(source)
    tokenizer = chameleon.load_tokenizer(source)
    made = chameleon.system(config, file, shards, tokenizer.size)
    made = System.complete(made | {"origin": "chameleon"})
    system = System.make(made)
    codes = chameleon.check_vocabulary(tokenizer, system.layout)
    model = system.image_tokenizer.model
    images = chameleon.read_images(shards, model, codes, image_checkpoint)
    mesh = make_mesh(system.mesh)
    decoder = chameleon.read_decoder(shards, system.decoder_config, mesh, system.rules)
    with _whole(target) as folder:
        if jax.process_index() == 0:
            configs.write(folder, made)

            def texts() -> Results:
                place = folder / "text_tokenizer"
                shutil.copy(tokenizer.path, place / bytelevel.FILE)
                for name in _KEPT:
                    if (Path(source) / name).is_file():
                        shutil.copy(Path(source) / name, place / name)
                return {"size": tokenizer.size}

            def pictures() -> Results:
                image_tokenizer.save(folder / "image_tokenizer", model, images)
                return {"codebook": model.codebook}

            for stage, work in (
                ("text_tokenizer", texts),
                ("image_tokenizer", pictures),
            ):
                workdir.run_stage(folder / stage, system.stage_inputs[stage], work)
        facts = _save_decoder(folder / "pretrain", decoder, system)
    return facts | {"workdir": str(target), "text": tokenizer.size}


def _save_decoder(folder: Path, decoder: Decoder, system: System) -> Results:
    inputs = system.stage_inputs["pretrain"]
    leaves = jax.tree.leaves(decoder)
    largest = max(x.addressable_shards[0].data.nbytes for x in leaves)
    # Copies of one array at a time.
    held = math.ceil(largest / 1e9)
    with Checkpoints(folder, settings=inputs, keep=1, held=held) as checkpoints:
        checkpoints.save(0, {"model": decoder}, 0)
    facts = {
        "parameters": sum(x.size for x in leaves),
        "dtype": str(leaves[0].dtype),
        "bytes": sum(x.nbytes for x in leaves),
        "largest_shard_bytes": largest,
    }
    if jax.process_index() == 0:
        workdir.run_stage(folder, inputs, lambda: facts | {"steps": 0})
    return facts


def import_images(source: Path, target: Path, image_size: int = 256) -> Results:
    """A VQGAN's checkpoint -> a folder for `ImageTokenizer.load`: a .ckpt of taming or
    Meta with a YAML file of its name, or the first one beside it; else LlamaGen's."""
    _check_new(target)
    beside = [source.with_suffix(".yaml"), *sorted(source.parent.glob("*.yaml"))]
    if source.suffix == ".ckpt":
        found = [path for path in beside if path.is_file()]
        config, model = taming.load(source, found[0] if found else beside[0])
    else:
        config, model = llamagen.load(source, image_size)
    with _whole(target) as folder:
        image_tokenizer.save(folder, config, model)
    return {"image_tokenizer": str(target), "codebook": config.codebook}


def export(
    source: Path, target: Path, checkpoint: str = "pretrain", dtype: str | None = None
) -> Results:
    """A finished checkpoint of a work directory -> a folder of Hugging Face.

    `dtype` "float32" or "bfloat16" (None: as the checkpoint has it). ValueError where
    transformers has no such model.
    """
    if jax.process_count() > 1:
        raise ValueError("one process alone writes for transformers: start no others")
    _check_new(target)
    system = System.load(source)
    hub.settings(system.decoder_config, system.layout)  # before anything is read
    decoder = _finished(source / checkpoint, system)
    if dtype is not None:
        decoder = jax.tree.map(lambda x: x.astype(dtype), decoder)
    images = load_image_tokenizer(source)
    texts, words = source / "text_tokenizer", None
    if (texts / bytelevel.FILE).is_file():
        tokenizer = bytelevel.JsonTokenizer(texts / bytelevel.FILE)
        words = tokenizer.ids
        # Back into the order of the words, as the import put it in that of the ids.
        order = np.argsort(chameleon.check_vocabulary(tokenizer, system.layout))
        model = images.model
        model.codebook = jax.tree.map(lambda x: x[order], model.codebook)
    with _whole(target) as folder:
        card = _card(source, checkpoint, system)
        pictures = (images.config, images.model)
        hub.write(folder, decoder, system.layout, pictures, words=words, card=card)
        for path in texts.iterdir():
            if path.name in (*_KEPT, bytelevel.FILE, "model"):
                name = "sentencepiece.model" if path.name == "model" else path.name
                shutil.copy(path, folder / name)
    return {"folder": str(target), "parameters": parameter_count(system.decoder_config)}


def _finished(folder: Path, system: System) -> Decoder:
    """The weights of a checkpoint: in its own dtype where nothing is to be merged."""
    mesh = make_mesh(system.mesh)
    sft = None if folder.name == "pretrain" else system.sft
    settings = system.checkpoint_settings
    if sft is not None:
        return load_finished(
            *(folder, system.decoder_config, Parts(sft.parts, system.layout)),
            ema=sft.ema > 0,
            mesh=mesh,
            rules=system.rules,
            settings=settings,
        )
    facts = workdir.results(folder)
    dtype = facts["dtype"] if "dtype" in facts else "float32"
    shapes = abstract(system.decoder_config)
    wanted = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place),
        *(shapes, shardings(shapes, mesh, system.rules)),
    )
    return load_model(folder, wanted, settings=settings)


def _card(source: Path, checkpoint: str, system: System) -> str:
    """What the folder's README.md says of a model."""
    facts = workdir.results(source / checkpoint)
    decoder, layout = system.decoder_config, system.layout
    sft = None if checkpoint == "pretrain" else system.sft
    run = sft or system.pretrain
    rows = {
        "system": system.name,
        "checkpoint": f"{checkpoint}, step {latest_step(source / checkpoint)}",
        "converted from": system.origin or "nothing: trained from scratch",
        "parameters": f"{parameter_count(decoder):,}",
        "layers, width, heads": f"{decoder.layers}, {decoder.width}, {decoder.heads}",
        "context": f"{decoder.length} tokens",
        "ids": f"{layout.size}: text {layout.text}, image codes {layout.image}, begin "
        f"and end of an image {layout.brk} and {layout.eoss}",
    }
    if system.origin and sft is None:
        rows["training"] = "converted, not trained here"
    else:
        rows |= {
            "rows of a batch, of tokens": f"{run.batch_size}, {run.packing.row_length}",
            "optimizer": json.dumps(vars(run.optimizer), default=str),
            "seed": str(system.seed_of(run)),
            "data": Path(sft.path).name if sft and sft.path else system.data.source,
        }
    if sft is not None:
        rows |= {
            "tuned from": sft.start,
            "tasks and weights": json.dumps(dict(sft.tasks)),
            "parameters trained": json.dumps(vars(sft.parts), default=list),
        }
    left_out = ("inputs_hash", "overlong_ids")
    rows |= {
        "settings (hash)": configs.config_hash(configs.read(source)),
        "results": json.dumps({k: v for k, v in facts.items() if k not in left_out}),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        "---\nlibrary_name: transformers\ntags: [text-to-image, image-to-text, cm3leon]"
        f"\n---\n\n# {system.name}\n\nA decoder over text and image tokens, written by "
        f"cm3leon_jax.\n\n| | |\n| --- | --- |\n{table}\n\nWhoever publishes this "
        "folder adds the licence of the weights that it came from, and its limits.\n"
    )


def _check_new(target: Path) -> None:
    if Path(target).exists():
        raise FileExistsError(f"{target} exists: give a new folder, or delete that one")


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` at the end; FileExistsError where that is."""
    _check_new(target)
    target = Path(target).absolute()
    partial = target.with_name(f".{target.name}.partial")
    together("begun")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    together("made")
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    together("written")
    if jax.process_index() == 0:
        partial.rename(target)
    together("named")
