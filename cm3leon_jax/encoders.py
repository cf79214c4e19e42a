"""The three kinds of encoder that a memory bank can be made with.

* trained: the dual encoder of this work directory (`training/dual_encoder.py`)
* clip:    a CLIP in Hugging Face's layout, frozen
* frozen:  EfficientNet-Lite0 for pictures, MiniLM for texts, each with axes of its own:
           a text finds by texts, a picture by pictures, a document by both
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cm3leon_jax import workdir as workdirs
from cm3leon_jax.codec import load_text_tokenizer
from cm3leon_jax.config import make, read_json
from cm3leon_jax.interop import clip, efficientnet, minilm
from cm3leon_jax.models import dual_encoder
from cm3leon_jax.models.bert import Bert
from cm3leon_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from cm3leon_jax.models.efficientnet import HEAD
from cm3leon_jax.models.efficientnet import EfficientNetLite0 as Network
from cm3leon_jax.models.vqgan import to_float
from cm3leon_jax.retrieval.embed import Embedder, normalised
from cm3leon_jax.training.checkpoint import load_model
from cm3leon_jax.training.dual_encoder import SETTINGS, text_ids

ToIds = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
FOLDER = "dual_encoder"
KINDS = ("trained", "clip", "frozen")
_BATCH = 256
_PIXELS = 1 << 22  # of a batch: bounds the memory of one call
_FROZEN_SIDE = 96  # pixels; a network of ImageNet sees little in fewer


class Section(Protocol):
    """What `load` reads of a config's section: a kind of `KINDS` and where it is."""

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> str: ...


def load(section: Section, workdir: str | Path) -> Embedder:
    """The encoder of a system. FileNotFoundError where its stage has not finished or
    its files are not there, ValueError where they are damaged or of another kind."""
    if section.kind == "trained":
        return load_trained(Path(workdir))
    if section.kind == "clip":
        return load_clip(section.path)
    if section.kind == "frozen":
        return load_frozen(section.path or minilm.weights_folder())
    raise ValueError(f"encoder.kind={section.kind!r}: choose from {', '.join(KINDS)}")


def either(folder: Path) -> Embedder:
    """A work directory's dual encoder, or a CLIP."""
    trained = (folder / FOLDER).is_dir()
    return load_trained(folder) if trained else load_clip(folder)


def load_trained(workdir: Path) -> Embedder:
    """The dual encoder that was trained in a work directory."""
    workdirs.results(workdir / FOLDER)
    file = workdir / FOLDER / SETTINGS
    saved = read_json(file, "train the dual encoder again")
    config = make(DualEncoderConfig, saved, FOLDER)
    abstract = dual_encoder.abstract(config)
    model = load_model(workdir / FOLDER, abstract, settings={"model": saved})
    tokenizer = load_text_tokenizer(workdir)
    if tokenizer.size + 1 != config.text_vocab:
        raise ValueError(
            f"{workdir}: the dual encoder was trained with {config.text_vocab - 1} "
            f"text pieces, the text tokenizer has {tokenizer.size}"
        )
    pieces = (workdir / "text_tokenizer" / "model").read_bytes()
    return from_model(
        "trained",
        config,
        model,
        lambda texts: text_ids(texts, tokenizer.encode, config),
        pieces,
    )


def load_clip(folder: str | Path) -> Embedder:
    """A CLIP in Hugging Face's layout: settings, safetensors and tokenizer.json."""
    config, model = clip.load(folder)
    pieces = (Path(folder) / "tokenizer.json").read_bytes()
    return from_model("clip", config, model, clip.tokenizer(folder, config), pieces)


def load_frozen(folder: str | Path) -> Embedder:
    """EfficientNet-Lite0 and a sentence encoder, side by side: E is their widths' sum.

    The two share no axis, so a text's score with a picture is 0, and the score of two
    documents is the mean of the scores of their texts and of their pictures.
    """
    network = efficientnet.features()
    words = minilm.load(folder)
    to_ids = minilm.tokenizer(folder, words.config)
    width = words.config.width
    embed_texts = Batched(_bert_text, words, _BATCH)
    embed_images = Batched(_network_image, network, _fitting(_FROZEN_SIDE))

    def texts(strings: list[str]) -> np.ndarray:
        vectors_BE = normalised(embed_texts(*to_ids(strings)))
        return np.pad(vectors_BE, ((0, 0), (0, HEAD)))

    def images(images_BYXC: np.ndarray) -> np.ndarray:
        vectors_BE = normalised(embed_images(images_BYXC))
        return np.pad(vectors_BE, ((0, 0), (width, 0)))

    pieces = (Path(folder) / "tokenizer.json").read_bytes()
    return Embedder(
        name=_name("frozen", pieces, words.config, network, words),
        size=width + HEAD,
        image_size=_FROZEN_SIDE,
        texts=texts,
        images=images,
    )


def from_model(
    kind: str,
    config: DualEncoderConfig,
    model: DualEncoder,
    to_ids: ToIds,
    pieces: bytes,
) -> Embedder:
    """The embedder of a dual encoder; `pieces` is its tokenizer's file."""
    embed_texts = Batched(_text, model, _BATCH)
    embed_images = Batched(_image, model, _fitting(config.image_size))
    return Embedder(
        name=_name(kind, pieces, config, model),
        size=config.embed,
        image_size=config.image_size,
        texts=lambda texts: embed_texts(*to_ids(texts)),
        images=embed_images,
    )


def _text(model: DualEncoder, ids_BL: jax.Array, length_B: jax.Array) -> jax.Array:
    return model.text(ids_BL, length_B)


def _image(model: DualEncoder, images_BYXC: jax.Array) -> jax.Array:
    return model.image(dual_encoder.to_float(images_BYXC))


def _bert_text(model: Bert, ids_BL: jax.Array, length_B: jax.Array) -> jax.Array:
    return model.text(ids_BL, length_B)


def _network_image(model: Network, images_BYXC: jax.Array) -> jax.Array:
    return model.pooled(to_float(images_BYXC))


class Batched:
    """A function of a model and arrays [B, …], in batches of one size over this
    process's devices, so that no number of rows compiles anew."""

    def __init__(self, function: Callable[..., jax.Array], model: Any, batch: int):
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("batch",))
        self.rows = NamedSharding(mesh, PartitionSpec("batch"))
        self.model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
        self.batch = -(-batch // len(devices)) * len(devices)
        self.call = jax.jit(function)

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        made = []
        for start in range(0, len(arrays[0]), self.batch):
            part = [x[start : start + self.batch] for x in arrays]
            count = len(part[0])
            # Filled up with copies of the first row: an embedding of zeros need not be.
            order = np.arange(self.batch) * (np.arange(self.batch) < count)
            sent = jax.device_put([x[order] for x in part], self.rows)
            made.append(np.asarray(self.call(self.model, *sent))[:count])
        return np.concatenate(made)


def _fitting(side: int) -> int:
    return min(max(_PIXELS // side**2, 1), _BATCH)


def _name(kind: str, pieces: bytes, config: Any, *models: Any) -> str:
    """The kind and 12 hex digits of all that decides an embedding."""
    digest = hashlib.sha256(pieces)
    digest.update(repr((config, _FROZEN_SIDE, minilm.LENGTH)).encode())
    for model in models:
        for leaf in jax.tree.leaves(model):
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return f"{kind}-{digest.hexdigest()[:12]}"
