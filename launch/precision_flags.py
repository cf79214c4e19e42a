"""Flags that say how a decoder is kept while it decodes."""

from typing import Any

from absl import flags

PRECISION = {
    "weights": flags.DEFINE_enum(
        "weights", None, ["int8"], "How weights are kept (default: as trained)."
    ),
    "cache": flags.DEFINE_enum(
        "cache", None, ["bfloat16", "int8"], "How keys and values are kept."
    ),
}


def precision() -> Any:
    """How the decoder is kept while it decodes."""
    from cm3leon_jax.sampling.engine import Precision

    return Precision(**{name: flag.value for name, flag in PRECISION.items()})
