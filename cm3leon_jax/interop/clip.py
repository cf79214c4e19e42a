"""Reader of CLIP in Hugging Face's layout (safetensors) -> `models/dual_encoder.py`.

Reads OpenAI's and OpenCLIP's ViTs with one class token (ViT-B/32, B/16, L/14, H/14 …).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cm3leon_jax.config import make
from cm3leon_jax.interop import huggingface
from cm3leon_jax.interop.huggingface import Reader
from cm3leon_jax.models import dual_encoder
from cm3leon_jax.models.dual_encoder import (
    NORM_EPS,
    PIXEL_MEAN,
    PIXEL_STD,
    Blocks,
    DualEncoder,
    DualEncoderConfig,
)

# What a settings file leaves out is as in ViT-B/32.
_SHARED = {"hidden_act": "quick_gelu", "layer_norm_eps": NORM_EPS}
_TEXT = _SHARED | {
    **{"vocab_size": 49_408, "max_position_embeddings": 77, "hidden_size": 512},
    **{"intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
}
_VISION = _SHARED | {
    **{"image_size": 224, "patch_size": 32, "hidden_size": 768},
    **{"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
_WHOLE = {"model_type": "clip", "projection_dim": 512}
START, END = "<|startoftext|>", "<|endoftext|>"


def load(folder: str | Path) -> tuple[DualEncoderConfig, DualEncoder]:
    """The model of a folder. FileNotFoundError or ValueError saying what is wrong."""
    config = read_config(folder)
    check_preprocessing(folder, config)
    reader = Reader(folder, huggingface.arrays(folder))
    model = dual_encoder.abstract(config)
    vision, words = model.vision, model.words

    # PyTorch's convolution has [D, C, Y, X]; ours takes patches with channels last.
    patch = reader.take("vision_model.embeddings.patch_embedding.weight")
    reader.put(vision, "w_patch", patch.transpose(2, 3, 1, 0))
    embeddings = "vision_model.embeddings"
    for ours, theirs in (
        ("class_token", f"{embeddings}.class_embedding"),
        ("position", f"{embeddings}.position_embedding.weight"),
        ("scale_first", "vision_model.pre_layrnorm.weight"),  # so spelt in the files
        ("bias_first", "vision_model.pre_layrnorm.bias"),
        ("scale_last", "vision_model.post_layernorm.weight"),
        ("bias_last", "vision_model.post_layernorm.bias"),
    ):
        reader.put(vision, ours, reader.take(theirs))
    reader.put(vision, "projection", reader.take("visual_projection.weight").T)
    for ours, theirs in (
        ("embed", "text_model.embeddings.token_embedding.weight"),
        ("position", "text_model.embeddings.position_embedding.weight"),
        ("scale_last", "text_model.final_layer_norm.weight"),
        ("bias_last", "text_model.final_layer_norm.bias"),
    ):
        reader.put(words, ours, reader.take(theirs))
    reader.put(words, "projection", reader.take("text_projection.weight").T)
    reader.put(model, "logit_scale", reader.take("logit_scale"))
    _read_blocks(reader, vision.blocks, "vision_model", config.vision_layers)
    _read_blocks(reader, words.blocks, "text_model", config.text_layers)
    reader.finish("position_ids")
    return config, model


def tokenizer(folder: str | Path, config: DualEncoderConfig):
    """Texts -> (ids int32 [B, L], lengths int32 [B]) as `DualEncoder.text` takes them.

    Longer texts lose their end. ValueError for the tokenizer of another model.
    """
    encode = huggingface.tokenizer(folder, config.text_length)
    [empty] = encode([""])
    if len(empty) != 2 or max(empty) >= config.text_vocab:
        raise ValueError(
            f"{folder}/{huggingface.TOKENIZER} writes {empty} for an empty text: a "
            f"CLIP has {START} and {END}, below {config.text_vocab}"
        )

    def to_ids(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        found = encode(texts)
        ids_BL = np.full((len(texts), config.text_length), empty[-1], np.int32)
        for row, ids in zip(ids_BL, found, strict=True):
            row[: len(ids)] = ids
        return ids_BL, np.array([len(ids) for ids in found], np.int32)

    return to_ids


def read_config(folder: str | Path) -> DualEncoderConfig:
    """The sizes in `config.json`; ValueError for what is no CLIP that we can build."""
    file = _WHOLE | huggingface.settings(folder)
    if file["model_type"] != "clip":
        raise ValueError(
            f"{folder}/{huggingface.SETTINGS} describes a {file['model_type']!r}, "
            "not a 'clip'"
        )
    text = _TEXT | _section(file, "text_config")
    vision = _VISION | _section(file, "vision_config")
    ratio = text["intermediate_size"] // text["hidden_size"]
    for name, part in (("text_config", text), ("vision_config", vision)):
        for key, wanted in (
            ("intermediate_size", ratio * part["hidden_size"]),
            ("hidden_act", text["hidden_act"]),
            ("layer_norm_eps", NORM_EPS),
        ):
            if part[key] != wanted:
                raise ValueError(
                    f"{folder}: {name}.{key}={part[key]!r} is not supported here, only "
                    f"{wanted!r}"
                )
    settings = {
        "image_size": vision["image_size"],
        "patch": vision["patch_size"],
        "vision_layers": vision["num_hidden_layers"],
        "vision_width": vision["hidden_size"],
        "vision_heads": vision["num_attention_heads"],
        "text_vocab": text["vocab_size"],
        "text_length": text["max_position_embeddings"],
        "text_layers": text["num_hidden_layers"],
        "text_width": text["hidden_size"],
        "text_heads": text["num_attention_heads"],
        "embed": file["projection_dim"],
        "mlp_ratio": ratio,
        "activation": text["hidden_act"],
    }
    return make(DualEncoderConfig, settings, f"{folder}/{huggingface.SETTINGS}")


def check_preprocessing(folder: str | Path, config: DualEncoderConfig) -> None:
    """ValueError where the folder says that pictures were scaled in another way."""
    if not (Path(folder) / "preprocessor_config.json").is_file():
        return
    file = huggingface.settings(folder, "preprocessor_config.json")
    for key, ours in (("image_mean", PIXEL_MEAN), ("image_std", PIXEL_STD)):
        if key in file and not np.allclose(file[key], ours, atol=1e-4):
            raise ValueError(
                f"{folder}/preprocessor_config.json: {key}={file[key]}, pictures are "
                f"scaled with {list(ours)} here"
            )


def _section(file: dict[str, Any], name: str) -> dict[str, Any]:
    return file[name] if name in file and file[name] else {}


def _read_blocks(reader: Reader, blocks: Blocks, tower: str, layers: int) -> None:
    layer = f"{tower}.encoder.layers.{{}}."

    def read(ours: str, theirs: str, turn=lambda x: x) -> None:
        reader.put(blocks, ours, reader.stack(layer + theirs, layers, turn))

    # PyTorch keeps matrices as [out, in]; heads are the major part of q, k and v.
    for ours in "qkv":
        read(f"w_{ours}", f"self_attn.{ours}_proj.weight", np.transpose)
        read(f"b_{ours}", f"self_attn.{ours}_proj.bias")
    for ours, theirs in (
        ("out", "self_attn.out_proj"),
        ("up", "mlp.fc1"),
        ("down", "mlp.fc2"),
    ):
        read(f"w_{ours}", f"{theirs}.weight", np.transpose)
        read(f"b_{ours}", f"{theirs}.bias")
    for i in "12":
        read(f"scale_{i}", f"layer_norm{i}.weight")
        read(f"bias_{i}", f"layer_norm{i}.bias")
