"""Chameleon and Anole as Hugging Face lays them out, read into a work directory.

FOLDER/config.json               sizes, norm order, {word: id} of the vocabulary
FOLDER/model*.safetensors        decoder `model.*`, `lm_head`; image tokenizer
                                 `model.vqmodel.*`, of the official files without its
                                 decoder: that is in Meta's vqgan.ckpt
FOLDER/tokenizer.json            the text tokenizer

Rotary positions pair channels (i, i + K/2) in these files, as here (Meta's own files
pair neighbours). Norms before or after a branch (`swin_norm`: 34B) have the same names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cm3leon_jax import vocab
from cm3leon_jax.interop import huggingface, taming
from cm3leon_jax.interop.shards import Shards
from cm3leon_jax.models.decoder import Decoder, DecoderConfig, abstract
from cm3leon_jax.models.layers import ROPE_THETA
from cm3leon_jax.models.vqgan import VQGAN, VQGANConfig
from cm3leon_jax.parallel.rules import Rules, shardings
from cm3leon_jax.tokenizers.bytelevel import JsonTokenizer
from cm3leon_jax.training.checkpoint import leaf_names

QK_EPS = 1e-5  # of QK-norm, whatever the settings say
IMAGES = "model.vqmodel."
# Our parameter: its axes, the published name, and what that tensor's axes are of ours.
TENSORS = {
    "embed": ("VD", "model.embed_tokens.weight", "V D"),
    "final_scale": ("D", "model.norm.weight", "D"),
    "unembed": ("DV", "lm_head.weight", "V D"),
} | {
    f"blocks.{ours}": (axes, f"model.layers.{{}}.{name}.{kind}", of)
    for ours, axes, name, kind, of in (
        ("w_q", "DHK", "self_attn.q_proj", "weight", "HK D"),
        ("w_k", "DHK", "self_attn.k_proj", "weight", "HK D"),
        ("w_v", "DHK", "self_attn.v_proj", "weight", "HK D"),
        ("w_out", "HKD", "self_attn.o_proj", "weight", "D HK"),
        ("q_scale", "HK", "self_attn.q_norm", "weight", "H K"),
        ("q_bias", "HK", "self_attn.q_norm", "bias", "H K"),
        ("k_scale", "HK", "self_attn.k_norm", "weight", "H K"),
        ("k_bias", "HK", "self_attn.k_norm", "bias", "H K"),
        ("w_gate", "DF", "mlp.gate_proj", "weight", "F D"),
        ("w_up", "DF", "mlp.up_proj", "weight", "F D"),
        ("w_down", "FD", "mlp.down_proj", "weight", "D F"),
        ("attention_scale", "D", "input_layernorm", "weight", "D"),
        ("mlp_scale", "D", "post_attention_layernorm", "weight", "D"),
    )
}
# What a settings file leaves out is as in Chameleon-7B.
_DEFAULTS = {
    **{"vocab_size": 65_536, "hidden_size": 4096, "intermediate_size": 11_008},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None},
    **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
    **{"attention_bias": False, "mlp_bias": False, "swin_norm": False},
    **{"tie_word_embeddings": False, "rope_scaling": None},
}
_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_COUNTS += ("num_attention_heads", "max_position_embeddings")
_IMAGE_DEFAULTS = {
    **{"embed_dim": 256, "num_embeddings": 8192, "latent_channels": 256},
    **{"resolution": 512, "base_channels": 128, "num_res_blocks": 2},
    **{"channel_multiplier": [1, 1, 2, 2, 4], "attn_resolutions": None},
}


def turned(axes: str, of: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """(their shape, theirs with split axes, its order in ours) of a tensor of ours."""
    sizes = dict(zip(axes, shape, strict=True))
    letters = of.replace(" ", "")
    theirs = tuple(math.prod(sizes[x] for x in group) for group in of.split())
    split = tuple(sizes[x] for x in letters)
    return theirs, split, tuple(letters.index(x) for x in axes)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of `config.json`, those left out filled in; ValueError for another
    family, or for what this decoder cannot be."""
    where = f"{folder}/{huggingface.SETTINGS}"
    file = huggingface.settings(folder)
    if not isinstance(file, dict):
        raise ValueError(f"{where} has no settings: download it again")
    family = file["model_type"] if "model_type" in file else None
    if family != "chameleon":
        raise ValueError(f"{where} describes a {family!r}, not a 'chameleon'")
    file = _DEFAULTS | file
    for key in _COUNTS:
        if type(file[key]) is not int or file[key] < 1:
            raise ValueError(f"{where}: {key}={file[key]!r} must be a positive number")
    rope = (file["rope_parameters"] if "rope_parameters" in file else None) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: rope_parameters={rope!r} is no section")
    theta = (rope or file).get("rope_theta", ROPE_THETA)
    kind = rope.get("rope_type", "default")
    for key, found, wanted in (
        ("hidden_act", file["hidden_act"], "silu"),
        ("attention_bias", file["attention_bias"], False),
        ("mlp_bias", file["mlp_bias"], False),
        ("rope_theta", theta, ROPE_THETA),
        ("rope_type", kind, "default"),
        ("rope_scaling", file["rope_scaling"], None),
        ("rms_norm_eps", file["rms_norm_eps"], QK_EPS),
    ):
        if found != wanted:
            raise ValueError(
                f"{where}: {key}={found!r} is not supported, only {wanted}"
            )
    return file


def decoder_settings(file: Mapping[str, Any], shards: Shards) -> dict[str, Any]:
    """The section `decoder` of a config, as published."""
    heads, keys = file["num_attention_heads"], file["num_key_value_heads"]
    return {
        "layers": file["num_hidden_layers"],
        "width": file["hidden_size"],
        "heads": heads,
        "kv_heads": 0 if keys in (None, heads) else keys,
        "mlp": file["intermediate_size"],
        "length": file["max_position_embeddings"],
        "norm": "rms",
        "norm_eps": file["rms_norm_eps"],
        "activation": "swiglu",
        "positions": "rope",
        "qk_norm": any(".q_norm." in name for name in shards.places),
        "post_norm": bool(file["swin_norm"]),
        "tie_embeddings": bool(file["tie_word_embeddings"]),
    }


def image_settings(file: Mapping[str, Any], folder: str | Path) -> VQGANConfig:
    """The image tokenizer's sizes."""
    given = (file["vq_config"] if "vq_config" in file else None) or {}
    where = f"{folder}/{huggingface.SETTINGS}: vq_config"
    if not isinstance(given, dict):
        raise ValueError(f"{where}={given!r} is no section")
    return taming.config_of(_IMAGE_DEFAULTS | given, where)


def check_vocabulary(tokenizer: JsonTokenizer, layout: vocab.Layout) -> np.ndarray:
    """The codes that the image ids stand for, in the order of the ids.

    ValueError where the words of `tokenizer.json` lie elsewhere than in `layout`.
    """
    ids, wanted = tokenizer.ids, {"<s>": layout.bos, "<pad>": layout.pad}
    wanted |= {"</s>": layout.eos, "<eoss>": layout.eoss, "<racm3:break>": layout.brk}
    _check_words(tokenizer, wanted)
    if tokenizer.text != layout.text or max(ids.values()) >= layout.size:
        raise ValueError(
            f"{tokenizer.path} has text pieces {tokenizer.text.start} to "
            f"{tokenizer.text.stop - 1} and ids up to {max(ids.values())}, the decoder "
            f"has {layout.text.start} to {layout.text.stop - 1}: of another size"
        )
    assert layout.turn is not None  # of this family
    placeholder = "<image>" if "<image>" in ids else "<reserved08707>"
    wanted = {"<reserved08706>": layout.turn, placeholder: layout.turn + 1}
    _check_words(tokenizer, wanted)
    words = {i: word for word, i in ids.items() if word.startswith("IMGIMG")}
    for word in words.values():
        if not re.fullmatch("IMGIMG[A-J]+Z", word):
            raise ValueError(f"{tokenizer.path}: {word} is no image word")
    digits = str.maketrans("ABCDEFGHIJ", "0123456789")
    codes = [int(words[i][6:-1].translate(digits)) for i in sorted(words)]
    if sorted(words) != list(layout.image) or sorted(codes) != list(range(len(codes))):
        raise ValueError(
            f"{tokenizer.path} has {len(words)} image words, the image tokenizer has "
            f"{len(layout.image)} codes, from id {layout.image.start} on"
        )
    return np.array(codes)


def _check_words(tokenizer: JsonTokenizer, wanted: Mapping[str, int | None]) -> None:
    ids = tokenizer.ids
    for word, place in wanted.items():
        if word not in ids or ids[word] != place:
            has = ids[word] if word in ids else "nothing"
            raise ValueError(
                f"{tokenizer.path}: {word} is {has}, in Chameleon's order it is {place}"
            )


def read_images(
    shards: Shards, config: VQGANConfig, codes: np.ndarray, checkpoint: Path | None
) -> VQGAN:
    """The image tokenizer, its codebook in the order of the image ids.

    `checkpoint` is Meta's vqgan.ckpt, for folders without the decoder; ValueError
    where it is not of the same model as what the folder has.
    """
    if checkpoint is not None:
        model = taming.load_as(config, checkpoint)
        _check_same(shards, model, checkpoint)
    else:
        state = {
            name.removeprefix(IMAGES): shards.view(name)
            for name in shards.places
            if name.startswith(IMAGES)
        }
        if "decoder.conv_in.weight" not in state:
            raise ValueError(
                f"{shards.folder} has no decoder of pictures (no tensor {IMAGES}"
                "decoder.conv_in.weight): give Meta's vqgan.ckpt with --image_tokenizer"
            )

        def label(name: str) -> str:
            return f"{shards.path(IMAGES + name)}: {IMAGES}{name}"

        model = taming.read(config, taming.NAMES, state, label, known="")
    if (codes != np.arange(len(codes))).any():
        model.codebook = jax.tree.map(lambda x: x[codes], model.codebook)
    return model


def _check_same(shards: Shards, model: VQGAN, checkpoint: Path) -> None:
    for name, x in taming.tensors(model, taming.NAMES):
        if name.startswith("decoder.") or IMAGES + name not in shards.places:
            continue
        there = np.asarray(shards.view(IMAGES + name, x.shape), np.float32)
        # The folder may have fewer bits.
        if not np.abs(x - there).max() <= 0.01 * np.abs(there).max():
            raise ValueError(
                f"{checkpoint}: {name} is not {IMAGES}{name} of "
                f"{shards.path(IMAGES + name)}: it is of another model"
            )


def read_decoder(
    shards: Shards, config: DecoderConfig, mesh: Mesh, rules: Rules
) -> Decoder:
    """The decoder, every tensor read straight into the shards of its array.

    A process reads what its own devices hold, one tensor at a time. Arrays are bfloat16
    where all of the file's are, else float32; `load_model` makes them float32.
    """
    shapes = abstract(config)
    wanted = dict(zip(leaf_names(shapes), jax.tree.leaves(shapes), strict=True))
    check_tensors(shards, wanted, config.layers)
    low = all(place.dtype == jnp.bfloat16 for place in _decoder_places(shards).values())
    dtype = np.dtype(jnp.bfloat16 if low else np.float32)
    places = jax.tree.leaves(shardings(shapes, mesh, rules))
    leaves = [
        _read(shards, name, leaf.shape, place, dtype)
        for (name, leaf), place in zip(wanted.items(), places, strict=True)
    ]
    return jax.tree.structure(shapes).unflatten(leaves)


def _read(
    shards: Shards,
    name: str,
    shape: tuple[int, ...],
    place: NamedSharding,
    dtype: np.dtype,
) -> jax.Array:
    """A parameter of ours. Layers, which are stacked here, are put into their places on
    the devices one after another: all of one kind are too many for a host."""
    if not name.startswith("blocks."):
        return _tensor(shards, name, 0, shape, place, dtype)
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()
    put = jax.jit(
        lambda stack, x, n: jax.lax.dynamic_update_index_in_dim(stack, x, n, 0),
        donate_argnums=0,
        out_shardings=place,
    )
    of_one = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    for n in range(shape[0]):
        stack = put(stack, _tensor(shards, name, n, shape[1:], of_one, dtype), n)
    return jax.block_until_ready(stack)


def _tensor(
    shards: Shards,
    name: str,
    layer: int,
    shape: tuple[int, ...],
    place: NamedSharding,
    dtype: np.dtype,
) -> jax.Array:
    """One tensor of the file in our shape; waited for, so that its copy is gone."""
    axes, theirs, of = TENSORS[name]
    _, split, order = turned(axes, of, shape)
    view = shards.view(theirs.format(layer)).reshape(split).transpose(order)
    return jax.block_until_ready(
        jax.make_array_from_callback(
            shape, place, lambda index: np.array(view[index], dtype, order="C")
        )
    )


def _decoder_places(shards: Shards) -> dict[str, Any]:
    return {n: p for n, p in shards.places.items() if not n.startswith(IMAGES)}


def check_tensors(shards: Shards, wanted: Mapping[str, Any], layers: int) -> None:
    """ValueError naming a tensor that is not there, has another shape, or is unknown:
    before anything is written."""
    known = set()
    for name, leaf in wanted.items():
        axes, theirs, of = TENSORS[name]
        shape, numbers = leaf.shape, [0]
        if name.startswith("blocks."):
            shape, numbers = shape[1:], range(layers)
        their_shape, _, _ = turned(axes, of, shape)
        for n in numbers:
            shards.view(theirs.format(n), their_shape)
            known.add(theirs.format(n))
    if "unembed" not in wanted:
        known.add("lm_head.weight")
    unknown = {
        name
        for name in set(_decoder_places(shards)) - known
        if not name.endswith("rotary_emb.inv_freq")
    }
    if unknown:
        name = min(unknown)
        raise ValueError(
            f"{shards.places[name].path} has the tensor {name}, which a Chameleon of "
            "these settings has not"
        )


def system(
    config: Mapping[str, Any], file: Mapping[str, Any], shards: Shards, text: int
) -> dict[str, Any]:
    """A config of this family with the sizes of a folder in place of its own.

    `text` is the number of text pieces. Lengths of rows and sentinels shrink with the
    context and the vocabulary.
    """
    images = image_settings(file, shards.folder)
    decoder = config["decoder"] | decoder_settings(file, shards)
    total, codes = file["vocab_size"], images.codebook
    free = total - text - codes - 8  # 4 specials, two of images, turn, placeholder
    sizes = {"text": text, "total": total, "sentinels": min(512, free), "classes": 0}
    if free < 0:
        raise ValueError(
            f"{shards.folder}: {total} ids do not hold {text} text pieces and "
            f"{codes} image codes: the tokenizer is of another size"
        )
    tokenizer = config["image_tokenizer"]
    model = {
        key: value
        for key, value in vars(images).items()
        if key not in ("dtype", "patch", "kernel", "norm", "middle", "normalize_codes")
    }
    made = dict(config) | {"decoder": decoder, "vocabulary": sizes}
    made["image_tokenizer"] = tokenizer | {"model": tokenizer["model"] | model}
    size = {"image_size": images.image_size}
    made["data"] = config["data"] | {"settings": config["data"]["settings"] | size}
    for run in ("pretrain", "sft"):
        if run in config and config[run]:
            packing = config[run]["packing"]
            length = min(packing["row_length"], decoder["length"])
            made[run] = config[run] | {"packing": packing | {"row_length": length}}
    return made


def load_tokenizer(folder: str | Path) -> JsonTokenizer:
    """The text tokenizer of a folder."""
    return JsonTokenizer(Path(folder) / huggingface.TOKENIZER)
