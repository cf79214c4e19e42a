"""The VQ tokenizers of LlamaGen (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, …): f = 16 or 8,
codes compared by direction (paper section 2.6). Their files have no settings: sizes
follow from the tensors, and the side of pictures is the reader's choice."""

from __future__ import annotations

from pathlib import Path

from cm3leon_jax.config import make
from cm3leon_jax.interop.packages import torch_file
from cm3leon_jax.interop.taming import Names, read
from cm3leon_jax.models.vqgan import VQGAN, VQGANConfig

NAMES = Names(
    down=lambda i, levels: f"conv_blocks.{i}",
    up=lambda i, levels: f"conv_blocks.{i}",
    block="res",
    middle=("mid.0", "mid.1", "mid.2"),
)


def load(
    checkpoint: str | Path, image_size: int = 256, *, normalize_codes: bool = True
) -> tuple[VQGANConfig, VQGAN]:
    """The model of a checkpoint; ValueError naming the tensor that does not fit."""
    state = torch_file(checkpoint, "ema", "model", "state_dict")

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(
                f"{checkpoint} has no tensor {name}: no LlamaGen tokenizer"
            )
        return tuple(state[name].shape)

    levels = len(
        {n.split(".")[2] for n in state if n.startswith("encoder.conv_blocks")}
    )
    if not levels:
        raise ValueError(
            f"{checkpoint} has no tensor encoder.conv_blocks.…: no LlamaGen tokenizer; "
            "one of taming-transformers is read by the name of a .ckpt"
        )
    channels = shape("encoder.conv_in.weight")[0]
    level = "encoder.conv_blocks.{}.res."
    widths = [shape(f"{level.format(i)}0.conv1.bias")[0] for i in range(levels)]
    last = level.format(levels - 1)
    codebook, code_dim = shape("quantize.embedding.weight")
    config = make(
        VQGANConfig,
        {
            "image_size": image_size,
            "channels": channels,
            "multipliers": tuple(width // channels for width in widths),
            "res_blocks": len({n.split(".")[4] for n in state if n.startswith(last)}),
            # Only at the side of the codes, wherever the pictures' side puts it.
            "attention": (image_size >> (levels - 1),),
            "latent": shape("encoder.conv_out.bias")[0],
            "codebook": codebook,
            "code_dim": code_dim,
            "normalize_codes": normalize_codes,
            "free_latents": not normalize_codes,
        },
        str(checkpoint),
    )
    return config, read(config, NAMES, state, lambda name: f"{checkpoint}: {name}")
