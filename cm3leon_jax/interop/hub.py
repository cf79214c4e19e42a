"""Our decoders and image tokenizers as folders that `transformers` loads.

decoder                                        as
RMSNorm, SwiGLU, rotary positions, QK-norm     Chameleon
the same without QK-norm, norms first          Llama
as published for CM3Leon (norm "layer", …)     OPT
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm3leon_jax.config import write_whole
from cm3leon_jax.interop import shards, taming
from cm3leon_jax.interop.chameleon import IMAGES, QK_EPS, TENSORS, turned
from cm3leon_jax.models.decoder import Decoder, DecoderConfig
from cm3leon_jax.models.layers import ROPE_THETA
from cm3leon_jax.models.vqgan import VQGAN, VQGANConfig
from cm3leon_jax.training.checkpoint import leaf_names
from cm3leon_jax.vocab import Layout

_OPT_OFFSET = 2  # rows of OPT's table of positions that stand for padding
_OPT = {
    "embed": ("VD", "model.decoder.embed_tokens.weight", "V D"),
    "position": ("LD", "model.decoder.embed_positions.weight", "L D"),
    "unembed": ("DV", "lm_head.weight", "V D"),
} | {
    f"blocks.{ours}": (axes, f"model.decoder.layers.{{}}.{name}.weight", of)
    for ours, axes, name, of in (
        ("w_q", "DHK", "self_attn.q_proj", "HK D"),
        ("w_k", "DHK", "self_attn.k_proj", "HK D"),
        ("w_v", "DHK", "self_attn.v_proj", "HK D"),
        ("w_out", "HKD", "self_attn.out_proj", "D HK"),
        ("w_up", "DF", "fc1", "F D"),
        ("w_down", "FD", "fc2", "D F"),
    )
}


def settings(config: DecoderConfig, layout: Layout) -> dict[str, Any]:
    """What `config.json` says of a decoder; ValueError naming the setting for which
    transformers has no model."""
    shared = {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.length,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": layout.eos if layout.bos is None else layout.bos,
        "eos_token_id": layout.eos,
        "pad_token_id": layout.pad,
    }
    kind = (config.norm, config.activation, config.positions)
    if kind == ("rms", "swiglu", "rope"):
        if config.qk_norm and config.norm_eps != QK_EPS:
            raise _refusal("norm_eps", config.norm_eps, "for Chameleon 1e-5")
        if config.post_norm and not config.qk_norm:
            raise _refusal("post_norm", True, "without QK-norm")
        family = "Chameleon" if config.qk_norm else "Llama"
        head = "ConditionalGeneration" if config.qk_norm else "CausalLM"
        made = shared | {
            "model_type": family.lower(),
            "architectures": [f"{family}For{head}"],
            "intermediate_size": config.mlp,
            "num_key_value_heads": config.key_heads,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": ROPE_THETA,
            "hidden_act": "silu",
        }
        return made | ({"swin_norm": config.post_norm} if config.qk_norm else {})
    for name, wanted in (
        ("norm", "layer"),
        ("activation", "relu"),
        ("positions", "learned"),
        ("qk_norm", False),
        ("post_norm", False),
        ("norm_eps", 1e-5),
        ("kv_heads", 0),
    ):
        if getattr(config, name) != wanted:
            raise _refusal(name, getattr(config, name), f"beside {kind}")
    return shared | {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "ffn_dim": config.mlp,
        "word_embed_proj_dim": config.width,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "dropout": 0.0,
    }


def _refusal(name: str, value: Any, where: str) -> ValueError:
    return ValueError(
        f"transformers has no model with decoder.{name}={value!r} {where}: this "
        "decoder cannot be written for it"
    )


def image_settings(config: VQGANConfig) -> dict[str, Any]:
    """`vq_config` of an image tokenizer; ValueError for what it cannot say."""
    for name, wanted in (
        ("free_latents", True),
        ("patch", 1),
        ("kernel", 3),
        ("norm", "group"),
        ("middle", "attention"),
    ):
        if getattr(config, name) != wanted:
            raise ValueError(
                f"transformers has no image tokenizer with image_tokenizer.model."
                f"{name}={getattr(config, name)!r}: it cannot be written for it"
            )
    return {
        "model_type": "chameleon_vqgan",
        "embed_dim": config.code_dim,
        "num_embeddings": config.codebook,
        "latent_channels": config.latent,
        "resolution": config.image_size,
        "base_channels": config.channels,
        "channel_multiplier": list(config.multipliers),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": list(config.attention) or None,
    }


def tensors(decoder: Decoder, family: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a decoder by its published name, one at a time on the host."""
    table = _OPT if family == "opt" else TENSORS
    leaves = dict(zip(leaf_names(decoder), jax.tree.leaves(decoder), strict=True))
    for name, leaf in leaves.items():
        axes, theirs, of = table[name]
        stacked = name.startswith("blocks.")
        for n in range(leaf.shape[0]) if stacked else (0,):
            x = np.asarray(leaf[n] if stacked else leaf)
            shape, _, order = turned(axes, of, x.shape)
            x = x.transpose(np.argsort(order)).reshape(shape)
            if name == "position":
                x = np.pad(x, ((_OPT_OFFSET, 0), (0, 0)))
            yield theirs.format(n), x


def write(
    folder: Path,
    decoder: Decoder,
    layout: Layout,
    image: tuple[VQGANConfig, VQGAN] | None,
    *,
    words: Mapping[str, int] | None,
    card: str,
) -> None:
    """Writes a folder: settings, shards of tensors, model card.

    The image tokenizer is part of a Chameleon; `words` is its vocabulary, without which
    the words of the image ids are made here.
    """
    made = settings(decoder.config, layout)
    family = made["model_type"]
    images: Iterator[tuple[str, np.ndarray]] = iter(())
    if family == "chameleon":
        if image is None:
            raise ValueError("a Chameleon is written with its image tokenizer")
        made["vq_config"] = image_settings(image[0])
        made["vocabulary_map"] = dict(words or _words(layout))
        found = taming.tensors(image[1], taming.NAMES)
        images = ((IMAGES + name, x) for name, x in found)
    dtype = str(jax.tree.leaves(decoder)[0].dtype)
    folder.mkdir(parents=True, exist_ok=True)

    def everything() -> Iterator[tuple[str, np.ndarray]]:
        yield from tensors(decoder, family)
        yield from images

    shards.write(folder, everything())
    write_whole(folder / "README.md", card)
    write_whole(folder / "config.json", json.dumps(made | {"dtype": dtype}, indent=1))


def _words(layout: Layout) -> dict[str, int]:
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    return {
        f"IMGIMG{str(code).translate(letters)}Z": i
        for code, i in enumerate(layout.image)
    }
