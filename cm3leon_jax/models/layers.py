"""The small parts of the decoder: initialisers, norms, rotary positions, casting.

Parameters are declared in one place each: shape, initialiser and the logical names of
the axes. Names become shardings in `parallel/rules.py`; nothing here knows a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

WEIGHT_STD = 0.006  # paper section 1.2, for every weight that does not start at zero
POSITION_RATIO = 1 / 30  # learned positions: 0.0002, paper section 1.2
ROPE_THETA = 10_000.0  # Chameleon; paper section 2.7

Axes = tuple[str | None, ...]
Shard = Callable[[jax.Array, Axes], jax.Array]


def identity(x: jax.Array, names: Axes) -> jax.Array:
    """The `shard` callable of a single device: leaves activations where they are."""
    del names
    return x


def normal(rngs: nnx.Rngs, shape: Sequence[int], axes: Axes, std: float) -> nnx.Param:
    """A float32 parameter from a normal distribution cut at three deviations."""
    x = jax.random.truncated_normal(rngs.params(), -3.0, 3.0, tuple(shape)) * std
    return nnx.Param(x, out_sharding=axes)


def constant(value: float, shape: Sequence[int], axes: Axes) -> nnx.Param:
    """A float32 parameter that starts as `value` everywhere."""
    return nnx.Param(jnp.full(tuple(shape), value, jnp.float32), out_sharding=axes)


def cast(tree: Any, dtype: str) -> Any:
    """Every array of a pytree in the compute dtype; master weights stay float32."""
    return jax.tree.map(lambda w: w.astype(dtype), tree)


def layer_norm(
    x: jax.Array,
    eps: float,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """LayerNorm over the last axis, statistics in float32, result in x's dtype.

    Without `scale` and `bias` it is the paper's LayerNorm (section 1.2: "remove
    learnable LN parameters").
    """
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def rms_norm(x: jax.Array, eps: float, scale: jax.Array) -> jax.Array:
    """RMSNorm over the last axis (Chameleon), float32 inside, result in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def rotate(x_BLHK: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """Rotary positions: turns channel pairs (i, i + K/2) by position · θ^(-2i/K).

    The score of a rotated query and a rotated key depends on the difference of their
    positions only. Angles in float32; the result has x's dtype. Weights that pair
    neighbouring channels (the original Llama and Chameleon files) need their query and
    key channels permuted.
    """
    half = x_BLHK.shape[-1] // 2
    frequency = ROPE_THETA ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BLK = positions_BL.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle_BLK)[:, :, None], jnp.sin(angle_BLK)[:, :, None]
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)
