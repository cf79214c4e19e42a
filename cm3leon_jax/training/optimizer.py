"""AdamW with warm-up, decay and clipping (paper section 1.3: inferred, OPT's values).

Raw gradients are clipped to a global L2 norm, moments are float32 and lie where the
parameters lie, and decoupled weight decay touches matrices only.

`muon` is not the paper's: it orthogonalises the momentum of the blocks' matrices
(Jordan et al. 2024) and leaves embeddings, head and vectors to AdamW. Its updates are
scaled to the size of AdamW's (Liu et al., arXiv:2502.16982), so both have one rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

_ADAM_RMS = 0.2  # of the entries of a typical Adam update, at a rate of 1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`steps` updates in all, the first `warmup` of them rising linearly to `peak`.

    The last update uses `floor * peak`. `clip` is the global norm of the gradient.
    `b1`, `b2` and `eps` are AdamW's, also where `kind` is "muon".
    """

    kind: Literal["adamw", "muon"] = "adamw"
    peak: float
    warmup: int
    steps: int
    floor: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.clip <= 0 or self.eps <= 0:
            raise ValueError(
                f"optimizer.peak={self.peak}, optimizer.clip={self.clip} and "
                f"optimizer.eps={self.eps} must be positive"
            )
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"optimizer.warmup={self.warmup} must lie between 0 and "
                f"optimizer.steps={self.steps}, which must be positive"
            )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} is not in [0, 1)"
                )
        if not 0 <= self.floor <= 1 or self.weight_decay < 0:
            raise ValueError(
                f"optimizer.floor={self.floor} must be in [0, 1] and "
                f"optimizer.weight_decay={self.weight_decay} not negative"
            )
        for name, choices in (
            ("kind", ("adamw", "muon")),
            ("schedule", ("linear", "cosine")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)!r}: choose one of {choices}"
                )


def learning_rate(config: OptimizerConfig, step: jax.typing.ArrayLike) -> jax.Array:
    """The rate of update `step` (0-based), float32.

    With n = step + 1: peak·n/warmup up to n = warmup, then down to floor·peak at
    n = steps, and constant after that. No update is wasted on a rate of zero.
    """
    n = jnp.asarray(step, jnp.float32) + 1.0
    rising = n / max(config.warmup, 1)
    progress = (n - config.warmup) / max(config.steps - config.warmup, 1)
    progress = jnp.clip(progress, 0.0, 1.0)
    if config.schedule == "cosine":
        progress = 0.5 - 0.5 * jnp.cos(jnp.pi * progress)
    falling = 1.0 - (1.0 - config.floor) * progress
    return config.peak * jnp.where(n < config.warmup, rising, falling)


def is_matrix(variable: Any) -> bool:
    """Whether a parameter gets weight decay: two or more axes besides `layers`.

    Blocks are stacked along `layers`, so a norm's scale has two dimensions there and
    is still a vector; so is one per head, `heads` and `head` being one axis in two.
    """
    if not isinstance(variable, nnx.Variable):
        return variable.ndim >= 2
    names = variable.get_metadata("out_sharding", None) or ()
    split = names.count("layers") + ({"heads", "head"} <= set(names))
    return variable.get_value().ndim - split >= 2


def _decayed(params: Any) -> Any:
    def mark(node: Any) -> Any:
        return jax.tree.map(lambda _: is_matrix(node), node)

    return jax.tree.map(mark, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _orthogonalised(params: Any) -> Any:
    """Which axes of a block's matrix are its inputs and its outputs; None for Adam.

    A block's weights map `embed` to the axes after it, or the axes before it to
    `embed`; each layer is a matrix of its own. So are the factors of a low-rank change,
    whose axis without a name takes the place of `embed` where they have none.
    """

    def axes(node: Any) -> Any:
        names = node.get_metadata("out_sharding", None) or ()
        if "layers" not in names or not is_matrix(node):
            return None
        embed = names.index("embed" if "embed" in names else None)
        rest = tuple(
            i for i in range(len(names)) if names[i] != "layers" and i != embed
        )
        sides = ((embed,), rest) if embed < rest[0] else (rest, (embed,))
        return optax.contrib.MuonDimensionNumbers(*sides)

    def mark(node: Any) -> Any:
        return jax.tree.map(lambda _: axes(node), node)

    marked = jax.tree.map(mark, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    if not jax.tree.leaves(marked):
        raise ValueError(
            "optimizer.kind='muon' is for the matrices of stacked blocks, and this "
            "model has none: choose 'adamw'"
        )
    return marked


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax transformation of `config`."""
    direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.kind == "muon":
        direction = optax.contrib.muon(
            -1.0,  # upwards like Adam's: the rate below turns it
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            muon_weight_dimension_numbers=_orthogonalised,
            consistent_rms=_ADAM_RMS,
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        direction,
        optax.add_decayed_weights(config.weight_decay, _decayed),
        optax.scale_by_learning_rate(lambda count: learning_rate(config, count)),
    )


def updated(
    tx: optax.GradientTransformation, module: Any, opt: optax.OptState, grads: Any
) -> tuple[Any, optax.OptState]:
    """A module and its optimizer's state after one update; the state is fetched from
    the hosts' memory where it lies there (`Rules.offload`)."""
    opt = jax.tree.map(
        lambda x: (
            jax.device_put(x, jax.memory.Space.Device)
            if jax.typeof(x).memory_space == jax.memory.Space.Host
            else x
        ),
        opt,
    )
    updates, opt = tx.update(grads, opt, module)
    return optax.apply_updates(module, updates), opt
