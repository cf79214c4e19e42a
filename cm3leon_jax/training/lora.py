"""Low-rank changes of the blocks' matrices, LoRA (Hu et al., arXiv:2106.09685).

A matrix W of a block gets two factors, and maps x to x·W + (x·A)·B · alpha/rank. The
inner product of width `rank` is what saves: neither a dense change nor its gradient is
ever made. W stays as it is. B starts at zero, so the first step is that of the plain
model.

The factors hang on the stacked block itself (`Block.lora`), stacked along `layers` as
the weights are: `lax.scan` slices, remat recomputes and `parallel/rules.py` shards them
like any parameter, with an unsplit axis for the rank. Adapted decoders therefore run
everywhere a decoder does; `merged` makes a plain one, for inference and for export.

Why no library: qwix (0.1.8) intercepts products at run time, which cannot make
parameters inside `lax.scan` and fails on this decoder; lorax is for jax below 0.5;
`nnx.LoRA` wraps two-dimensional layers and knows neither a stack nor heads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.models.layers import constant, normal

MATRICES = ("w_q", "w_k", "w_v", "w_out", "w_up", "w_gate", "w_down")
_RANK = "R"  # its letter in an einsum; the model's own are in the contract of shapes


class Factors(nnx.Module):
    """A and B of one stacked matrix: [layers, *inputs, rank], [layers, rank, *outputs].

    Inputs are `embed` and outputs the axes behind it, or the other way round.
    """

    def __init__(self, weight: nnx.Param, rank: int, rngs: nnx.Rngs):
        layers, *shape = weight.get_value().shape
        _, *names = weight.get_metadata("out_sharding")
        cut = 1 if names[0] == "embed" else len(names) - 1
        inputs, outputs = shape[:cut], shape[cut:]
        self.a = normal(
            rngs,
            (layers, *inputs, rank),
            ("layers", *names[:cut], None),
            math.prod(inputs) ** -0.5,  # x·A has the size of x's entries
        )
        self.b = constant(0.0, (layers, rank, *outputs), ("layers", None, *names[cut:]))


class Lora(nnx.Module):
    """The factors of all of a block's matrices, by the matrices' names.

    `scale` is alpha/rank. Called by the block with the equation and the input of the
    product that they change.
    """

    def __init__(self, block: nnx.Module, rank: int, alpha: float, rngs: nnx.Rngs):
        self.scale = alpha / rank
        for name in MATRICES:
            if hasattr(block, name):
                setattr(self, name, Factors(getattr(block, name), rank, rngs))

    def __call__(self, equation: str, x: jax.Array, name: str) -> jax.Array:
        """What is added to `einsum(equation, x, weight)`, in x's dtype."""
        factors = getattr(self, name)
        into, outof = _split(equation)
        inner = jnp.einsum(into, x, factors.a[...])
        return jnp.einsum(outof, inner, factors.b[...]) * self.scale

    def dense(self, name: str) -> jax.Array:
        """The change A·B · alpha/rank of one stacked matrix, float32, in its shape."""
        factors = getattr(self, name)
        a, b = factors.a[...], factors.b[...]
        product = jnp.einsum(
            "NIR,NRO->NIO",
            a.reshape(len(a), -1, a.shape[-1]),
            b.reshape(*b.shape[:2], -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        return product.reshape(*a.shape[:-1], *b.shape[2:]) * self.scale


def _split(equation: str) -> tuple[str, str]:
    """`BLD,DHK->BLHK` as the two products `BLD,DR->BLR` and `BLR,RHK->BLHK`."""
    operands, out = equation.split("->")
    x, weight = operands.split(",")
    inputs = "".join(axis for axis in weight if axis not in out)
    outputs = weight.removeprefix(inputs)
    inner = "".join(axis for axis in x if axis not in inputs) + _RANK
    return f"{x},{inputs}{_RANK}->{inner}", f"{inner},{_RANK}{outputs}->{out}"


def adapted(model: Decoder, rank: int, alpha: float, key: jax.Array) -> Decoder:
    """The same decoder with fresh factors, which change nothing yet."""
    if model.blocks.lora is not None:
        raise ValueError("this decoder has LoRA factors already: merge them first")
    # The pytree's copy, so that the given module stays as it is.
    model = jax.tree.map(lambda w: w, model)
    with nnx.use_eager_sharding(False):
        model.blocks.lora = Lora(model.blocks, rank, alpha, nnx.Rngs(key))
    return model


def merged(model: Decoder) -> Decoder:
    """A plain decoder with weights W + A·B · alpha/rank; `model` where it is plain."""
    lora = model.blocks.lora
    if lora is None:
        return model
    model = jax.tree.map(lambda w: w, model)
    for name in MATRICES:
        if hasattr(lora, name):
            weight = getattr(model.blocks, name)
            change = lora.dense(name)
            setattr(model.blocks, name, jax.tree.map(lambda w, d=change: w + d, weight))
    model.blocks.lora = None
    return model
