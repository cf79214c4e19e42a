"""Which parameters of a decoder are trained, their running average, and what to load.

A step differentiates by, keeps optimizer state for, and updates what `Parts.take` takes
out of the model. All else is not part of the update at all: no gradient is computed,
nothing of it decays, and it stays the same to the bit. Rows of a table (the image ids
of the head: how Anole taught Chameleon to draw) are cut out and put back, so the
optimizer holds them only.

    Parts(PartsConfig(train=("head_image_rows",)), layout)
    Parts(PartsConfig(train=("lora", "embed_class_rows", "head_class_rows"),
                      rank=16, alpha=32.0), layout)

The second is low-rank tuning that also learns ids which pretraining has never seen:
without their own rows, which start out alike, low-rank changes of the blocks could not
tell one class id from another.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from cm3leon_jax.models.decoder import Decoder, DecoderConfig, abstract
from cm3leon_jax.parallel.rules import Rules, shardings
from cm3leon_jax.training import lora
from cm3leon_jax.training.checkpoint import latest_step, leaf_names, load_model
from cm3leon_jax.vocab import Layout

ALL, LORA = "all", "lora"
# The parameters of a part, by their names in the model, and the rows of ids it takes.
PARTS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "head": (("unembed",), None),
    "head_image_rows": (("unembed",), "image"),
    "head_class_rows": (("unembed",), "classes"),
    "embed": (("embed",), None),
    "embed_class_rows": (("embed",), "classes"),
    "attention": (
        tuple(f"blocks.w_{name}" for name in ("q", "k", "v", "out"))
        + tuple(f"blocks.{x}_{kind}" for x in "qk" for kind in ("scale", "bias")),
        None,
    ),
}
_OVERLAPS = (
    {"head", "head_image_rows"},
    {"head", "head_class_rows"},
    {"embed", "embed_class_rows"},
    {"attention", LORA},
)


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """The trained parts: ("all",), or any of

    `head`              the output matrix
    `head_image_rows`   its weights of image ids only (the Anole recipe)
    `head_class_rows`   its weights of class ids only
    `embed`             the token embeddings; the head too where they are tied
    `embed_class_rows`  the embeddings of class ids only
    `attention`         the four projections and QK-norm of every block
    `lora`              low-rank changes of every matrix of the blocks
                        (`training/lora.py`), of `rank`, scaled by `alpha`/`rank`

    `rank` and `alpha` are 0 without `lora`.
    """

    train: tuple[str, ...] = (ALL,)
    rank: int = 0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        known = (ALL, *PARTS, LORA)
        if isinstance(self.train, str) or not self.train:
            raise ValueError(f"parts.train={self.train!r}: give a tuple of {known}")
        for name in self.train:
            if name not in known:
                raise ValueError(
                    f"parts.train: no part {name!r}, choose from {', '.join(known)}"
                )
        names = set(self.train)
        overlap = [sorted(both) for both in _OVERLAPS if both <= names]
        if len(names) < len(self.train) or overlap or (ALL in names and names != {ALL}):
            raise ValueError(
                f"parts.train={self.train} takes a parameter twice"
                + "".join(f": {a} and {b}" for a, b in overlap[:1])
            )
        if LORA in names and (self.rank < 1 or not self.alpha > 0):
            raise ValueError(
                f"parts.rank={self.rank} and parts.alpha={self.alpha} must be positive "
                "for lora: 16 and 32.0 are common"
            )
        if LORA not in names and (self.rank or self.alpha):
            raise ValueError(
                f"parts.rank={self.rank} and parts.alpha={self.alpha} are lora's, and "
                f"parts.train={self.train} has none: leave them at 0"
            )


@dataclass(frozen=True)
class Parts:
    """`config` in one id space; without any, all parameters. Raises ValueError where a
    part has no ids."""

    config: PartsConfig = PartsConfig()
    layout: Layout | None = None
    # Name of what is trained -> (name of the parameter, its rows or None).
    pieces: dict[str, tuple[str, range | None]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        pieces = {}
        for part in self.config.train:
            names, kind = PARTS[part] if part in PARTS else ((), None)
            rows = None
            if kind is not None:
                rows = getattr(self.layout, kind, None)
                if not rows:
                    raise ValueError(f"parts.train: {part!r}, but there are no {kind}")
            for name in names:
                pieces[name if kind is None else f"{name}.{kind}"] = name, rows
        object.__setattr__(self, "pieces", pieces)

    def prepared(self, model: Decoder, key: jax.Array) -> Decoder:
        """The decoder to train: with fresh factors where lora is trained."""
        if LORA not in self.config.train:
            return model
        return lora.adapted(model, self.config.rank, self.config.alpha, key)

    def take(self, model: Decoder) -> Any:
        """What is trained of `prepared`'s decoder: the decoder itself for all of it,
        else a dict of NNX variables that know their logical axes."""
        if ALL in self.config.train:
            return model
        taken = {}
        for name, (source, rows) in self.pieces.items():
            variable = _variable(model, source)
            if variable is not None:
                taken[name] = variable if rows is None else _cut(variable, rows)
            elif source == "unembed":
                raise ValueError(
                    f"parts.train={self.config.train}: this decoder has no head of its "
                    "own (decoder.tie_embeddings): train 'embed'"
                )
        if LORA in self.config.train:
            names = (x for x in leaf_names(model) if x.startswith("blocks.lora."))
            taken |= {name: _variable(model, name) for name in names}
        return taken

    def put(self, model: Decoder, taken: Any) -> Decoder:
        """The decoder with what `take` took replaced; differentiable by it."""
        if ALL in self.config.train:
            return taken
        leaves, structure = jax.tree.flatten(model)
        place = {name: i for i, name in enumerate(leaf_names(model))}
        for name, variable in taken.items():
            source, rows = self.pieces.get(name, (name, None))
            (value,) = jax.tree.leaves(variable)
            if rows is not None:
                value = jax.lax.dynamic_update_slice_in_dim(
                    leaves[place[source]], value, rows.start, _ids_axis(variable)
                )
            leaves[place[source]] = value
        return structure.unflatten(leaves)


def _variable(model: Any, name: str) -> nnx.Variable | None:
    """The parameter of a dotted name; None where this kind of decoder has none."""
    return functools.reduce(
        lambda x, key: getattr(x, key, None), name.split("."), model
    )


def _ids_axis(table: nnx.Variable) -> int:
    return table.get_metadata("out_sharding").index("vocab")


def _cut(table: nnx.Variable, rows: range) -> nnx.Variable:
    start, stop, axis = rows.start, rows.stop, _ids_axis(table)
    return jax.tree.map(
        lambda w: jax.lax.slice_in_dim(w, start, stop, axis=axis), table
    )


EVERYTHING = Parts()


def averaged(ema: Any, trained: Any, decay: float) -> Any:
    """decay · ema + (1 − decay) · trained, leaf by leaf in float32.

    It starts as the initial parameters and has no correction for that: `decay` should
    forget them within the run, 1/(1 − decay) being the updates it averages over.
    """
    return jax.tree.map(
        lambda old, new: old + (1.0 - decay) * (new - old), ema, trained
    )


def finished(model: Decoder, ema: Any, parts: Parts) -> Decoder:
    """The plain decoder of a state's `model` and `ema` (None: the last weights), with
    low-rank changes merged: what is evaluated, sampled from and exported."""
    return lora.merged(model if ema is None else parts.put(model, ema))


def load_finished(
    directory: str | Path,
    config: DecoderConfig,
    parts: Parts,
    *,
    ema: bool,
    mesh: Mesh,
    rules: Rules,
    step: int | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Decoder:
    """`finished` of a checkpoint, sharded by `rules`; of the averages if `ema`.

    `step` None is the newest; `settings` as for `load_model`, whose errors it raises.
    `dtype` is what weights are read as that need no merging (None: float32), without
    being held in another.
    """
    step = latest_step(directory) if step is None else step
    shapes = jax.eval_shape(
        lambda: parts.prepared(Decoder(config, nnx.Rngs(0)), jax.random.key(0))
    )
    whole = ALL in parts.config.train
    plain = LORA not in parts.config.train and (whole or not ema)
    low = dtype if plain else None

    def read(name: str, wanted: Any) -> Any:
        wanted = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(
                x.shape, low or x.dtype, sharding=place
            ),
            wanted,
            shardings(wanted, mesh, rules),
        )
        return load_model(directory, wanted, step, field=name, settings=settings)

    model = read("ema" if ema and whole else "model", shapes)
    if plain:
        return model
    average = None
    if ema and not whole:
        average = read("ema", jax.eval_shape(parts.take, shapes))
    out = shardings(abstract(config), mesh, rules)
    build = functools.partial(finished, parts=parts)
    return jax.jit(build, out_shardings=out)(model, average)
