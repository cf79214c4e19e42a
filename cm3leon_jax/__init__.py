"""CM3Leon in JAX: one decoder-only transformer over text and image tokens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cm3leon_jax.api import CM3Leon

__all__ = ["CM3Leon"]


def __getattr__(name: str):
    # Lazily, so that importing the package starts no accelerator and takes no time.
    if name in __all__:
        from cm3leon_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
