"""Int8 weights: one scale for each output channel, products in the compute dtype.

By `qwix` (Google, Apache-2.0; extra `int8`), which brings the quantised array and the
products with it. Its own way of turning a model over, interception at run time, fails
on this decoder: the weights are stacked, and decoding does not call the module.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def quantized(w: jax.Array, summed: int) -> Any:
    """A weight as int8, rounded to 127 steps up to the largest entry of each channel.

    `summed` is how many leading axes a product sums over. The scales have the dtype
    of `w`. Raises ImportError without `qwix`.
    """
    try:
        import qwix
    except ImportError:
        raise ImportError(
            "int8 weights need qwix: pip install 'cm3leon-jax[int8]'"
        ) from None
    channels = tuple(range(summed, w.ndim))
    return qwix.quantize(w, jnp.int8, channelwise_axes=channels)


def product(equation: str, x: jax.Array, w: Any, **kwargs: Any) -> jax.Array:
    """`jnp.einsum(equation, x, w)` with a weight that may be int8."""
    if isinstance(w, jax.Array):
        return jnp.einsum(equation, x, w, **kwargs)
    import qwix

    return qwix.einsum(equation, x, w, **kwargs)
