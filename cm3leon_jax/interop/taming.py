"""VQGANs as taming-transformers names their parts: Esser's, and Chameleon's.

FILE.ckpt and a YAML file of settings beside it (taming's `configs/model.yaml`, Meta's
`vqgan.yaml`), or a folder of Hugging Face, where the same names have a prefix. Torch
files are loaded with `weights_only`: tensors and plain containers, nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cm3leon_jax.config import make
from cm3leon_jax.interop.packages import library, torch_file
from cm3leon_jax.models import vqgan
from cm3leon_jax.models.convolution import Conv, Norm
from cm3leon_jax.models.vqgan import VQGAN, VQGANConfig


@dataclass(frozen=True)
class Names:
    """How a family calls the levels (number in order of execution, of so many), their
    blocks, and the three parts of the middle."""

    down: Callable[[int, int], str]
    up: Callable[[int, int], str]
    block: str
    middle: tuple[str, str, str]


NAMES = Names(
    down=lambda i, levels: f"down.{i}",
    up=lambda i, levels: f"up.{levels - 1 - i}",
    block="block",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
)


def load(checkpoint: str | Path, settings: str | Path) -> tuple[VQGANConfig, VQGAN]:
    """A model of taming-transformers or Meta: `vqgan.ckpt`, `vqgan.yaml`."""
    config = read_settings(settings)
    return config, load_as(config, checkpoint)


def load_as(config: VQGANConfig, checkpoint: str | Path) -> VQGAN:
    """A `vqgan.ckpt` whose settings are known."""
    state = torch_file(checkpoint, "state_dict")
    return read(config, NAMES, state, lambda name: f"{checkpoint}: {name}")


def read_settings(path: str | Path) -> VQGANConfig:
    """The sizes in a YAML file; ValueError for what is no VQGAN that we can build."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it has the model's settings")
    yaml = library("yaml")
    try:
        file = yaml.safe_load(path.read_text())
        file = file["model"] if "model" in file else file
        sizes = file["params"]
        sizes = {
            "num_embeddings": sizes["n_embed"],
            "embed_dim": sizes["embed_dim"],
        } | {
            name: sizes["ddconfig"][theirs]
            for name, theirs in (
                ("latent_channels", "z_channels"),
                ("resolution", "resolution"),
                ("base_channels", "ch"),
                ("channel_multiplier", "ch_mult"),
                ("num_res_blocks", "num_res_blocks"),
                ("attn_resolutions", "attn_resolutions"),
                ("double_latent", "double_z"),
            )
        }
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not the settings of a VQGAN with a codebook ({error!r})"
        ) from error
    return config_of(sizes, path)


def config_of(sizes: Mapping[str, Any], where: str | Path) -> VQGANConfig:
    """Our settings of those of a `vq_config` of Hugging Face."""
    plain = {"in_channels": 3, "double_latent": False, "attn_type": "vanilla"}
    for key, wanted in plain.items():
        if key in sizes and sizes[key] != wanted:
            raise ValueError(f"{where}: {key}={sizes[key]!r}, only {wanted!r} is read")
    for key in ("channel_multiplier", "attn_resolutions"):
        if not isinstance(sizes[key] or [], list | tuple):
            raise ValueError(f"{where}: {key}={sizes[key]!r} must be a list")
    multipliers = tuple(sizes["channel_multiplier"] or ())
    if multipliers[:1] != (1,):
        raise ValueError(
            f"{where}: channel multipliers {multipliers} must begin with 1 here"
        )
    return make(
        VQGANConfig,
        {
            "image_size": sizes["resolution"],
            "channels": sizes["base_channels"],
            "multipliers": multipliers,
            "res_blocks": sizes["num_res_blocks"],
            "attention": tuple(sizes["attn_resolutions"] or ()),
            "latent": sizes["latent_channels"],
            "codebook": sizes["num_embeddings"],
            "code_dim": sizes["embed_dim"],
            "free_latents": True,
        },
        str(where),
    )


def read(
    config: VQGANConfig,
    names: Names,
    state: Mapping[str, Any],
    label: Callable[[str], str],
    known: str | tuple[str, ...] = ("encoder.", "decoder."),
) -> VQGAN:
    """The model of settings and tensors (PyTorch's or arrays) by their names.

    ValueError with the `label` (file and name) of a tensor that is not there, has
    another shape, or is unknown though its name begins with one of `known`.
    """
    model = jax.tree.map(lambda x: x, vqgan.abstract(config))
    wanted = list(places(model, names))
    unknown = {x for x in state if x.startswith(known)}
    unknown -= {name for _, _, name, _ in wanted}
    if unknown:
        raise ValueError(
            f"{label(min(unknown))} is of another architecture: a VQGAN of these "
            "settings has no such tensor"
        )
    for module, ours, name, axes in wanted:
        if name not in state:
            raise ValueError(f"{label(name)} is missing: another architecture")
        x, old = _numpy(state[name]), getattr(module, ours)
        shape = tuple(np.array(old.get_value().shape)[np.argsort(axes)].tolist())
        if x.shape != shape:
            raise ValueError(
                f"{label(name)} is {list(x.shape)}, the settings say {list(shape)}"
            )
        with nnx.use_eager_sharding(False):  # the names only
            value = nnx.Param(
                jnp.asarray(x.transpose(axes)),
                out_sharding=old.get_metadata("out_sharding"),
            )
        setattr(module, ours, value)
    return model


def _numpy(x: Any) -> np.ndarray:
    return np.asarray(x if isinstance(x, np.ndarray) else x.float(), np.float32)


def tensors(model: VQGAN, names: Names) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `read`: every tensor by its published name."""
    for module, ours, name, axes in places(model, names):
        x = np.asarray(getattr(module, ours).get_value())
        yield name, x.transpose(np.argsort(axes))


Place = tuple[nnx.Module, str, str, tuple[int, ...]]


def places(model: VQGAN, names: Names) -> Iterator[Place]:
    """(module, its parameter, published name, axes of theirs in our order)."""
    encoder, decoder, levels = model.encoder, model.decoder, model.config.levels
    yield model, "codebook", "quantize.embedding.weight", (0, 1)
    yield from _leaf(encoder.to_code, "quant_conv")
    yield from _leaf(decoder.from_code, "post_quant_conv")
    for side, part, name_of, resample in (
        (encoder, "encoder", names.down, "downsample"),
        (decoder, "decoder", names.up, "upsample"),
    ):
        yield from _leaf(side.stem, f"{part}.conv_in")
        yield from _leaf(side.norm, f"{part}.norm_out")
        yield from _leaf(side.out, f"{part}.conv_out")
        bottom = side.bottom
        assert bottom is not None
        middle = [f"{part}.{name}" for name in names.middle]
        yield from _block(bottom.first, middle[0])
        yield from _attention(bottom.attention, middle[1])
        yield from _block(bottom.second, middle[2])
        between = encoder.down if side is encoder else decoder.up
        for i, level in enumerate(side.levels):
            name = f"{part}.{name_of(i, levels)}"
            for j, block in enumerate(level.blocks):
                yield from _block(block, f"{name}.{names.block}.{j}")
            for j, attention in enumerate(level.attention):
                yield from _attention(attention, f"{name}.attn.{j}")
            if i < len(between):
                yield from _leaf(between[i], f"{name}.{resample}.conv")


def _leaf(module: Conv | Norm, name: str) -> Iterator[Place]:
    if isinstance(module, Conv):  # PyTorch's [out, in, Y, X]
        yield module, "kernel", f"{name}.weight", (2, 3, 1, 0)
    else:
        yield module, "scale", f"{name}.weight", (0,)
    yield module, "bias", f"{name}.bias", (0,)


def _block(block: Any, name: str) -> Iterator[Place]:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield from _leaf(getattr(block, part), f"{name}.{part}")
    if block.shortcut is not None:
        yield from _leaf(block.shortcut, f"{name}.nin_shortcut")


def _attention(module: Any, name: str) -> Iterator[Place]:
    for ours, theirs in (
        ("norm", "norm"),
        ("query", "q"),
        ("key", "k"),
        ("value", "v"),
        ("out", "proj_out"),
    ):
        yield from _leaf(getattr(module, ours), f"{name}.{theirs}")
