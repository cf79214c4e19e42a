"""The compiled loop: prompts and scripts in, tokens out (paper section 1.11).

A row is one candidate of one prompt; its guidance streams are decoded side by side and
all read the token that was sampled from their combination. What a row gets depends on
the key, the numbers of its prompt and candidate, and the position only, never on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.models import cache as caches
from cm3leon_jax.models.attention import Attention, xla_attention
from cm3leon_jax.models.cache import Cache, CacheType, Prefix
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.models.layers import Axes, Shard, identity
from cm3leon_jax.models.unrolled import Unrolled, unroll
from cm3leon_jax.sampling import constraints
from cm3leon_jax.sampling.constraints import Written
from cm3leon_jax.sampling.prompts import Batch
from cm3leon_jax.sampling.sampler import Sampler, Settings, draw, settings, token_scores
from cm3leon_jax.vocab import Layout

_FIRST_STAGE = 128


@dataclass(frozen=True)
class _OneForAll:
    """A `shard` for arrays that all rows share: their batch axis is not split."""

    shard: Shard

    def __call__(self, x: jax.Array, names: Axes) -> jax.Array:
        return self.shard(x, tuple(None if n == "batch" else n for n in names))


def read(
    model: Decoder | Unrolled,
    batch: Batch,
    *,
    amateur: Decoder | Unrolled | None = None,
    known: Sequence[Prefix | None] = (),
    cache: CacheType | None = None,
    shard: Shard = identity,
    attention: Attention = xla_attention,
) -> tuple[Prefix, ...]:
    """Prefills every stream of a batch; a stream that is equal in all prompts once.

    The last stream is read by the amateur, if there is one. `known` has the streams
    that need not be read, None for the others.
    """
    model = _unrolled(model, shard)
    amateur = model if amateur is None else _unrolled(amateur, shard)
    prefixes, last = [], len(batch.prefix_UL) - 1
    for g, tokens_UL in enumerate(batch.prefix_UL):
        if g < len(known) and known[g] is not None:
            prefixes.append(known[g])
            continue
        prefixes.append(
            _prefill(
                amateur if g == last else model,
                tokens_UL,
                batch.length_U[g],
                cache=cache,
                shard=shard if len(tokens_UL) > 1 else _OneForAll(shard),
                attention=attention,
            )
        )
    return tuple(prefixes)


def generate(
    model: Decoder | Unrolled,
    batch: Batch,
    key: jax.Array,
    samplers: Sampler | Sequence[Sampler],
    layout: Layout,
    *,
    image_tokens: int,
    classes: Sequence[int] | None = None,
    index_B: np.ndarray | None = None,
    candidate_C: np.ndarray | None = None,
    amateur: Decoder | Unrolled | None = None,
    prefixes: Sequence[Prefix] | None = None,
    cache: CacheType | None = None,
    shard: Shard = identity,
    attention: Attention = xla_attention,
) -> jax.Array:
    """What the scripts allow, sampled: int32 tokens [B · C, T], the C candidates of a
    prompt after each other.

    `key` is a typed PRNG key; noise is keyed by (key, number of the prompt, number of
    the candidate, position). Give a prompt the same number (`index_B`, default 0, 1, …)
    to see the same sample in another batch; `candidate_C` (default: 0 alone) are the
    numbers of the candidates. One sampler for all, or one a row. `image_tokens` is the
    length of a whole image (used by FREE), `classes` the labels that CLASS allows
    (None: every id for classes, the reserved ones too).

    `amateur` decodes the last stream in place of the model; `prefixes` are what `read`
    gave for the same streams, if it was called before. What a run leaves unused is
    <pad>. One program is compiled per shape of `batch`, number of candidates and pair
    of callables: hand in the same `shard` and `attention` objects every time.

    Raises ValueError for a vocabulary of another size, a wrong number of samplers,
    guidance without a second stream, or labels that are no classes.
    """
    prompts = batch.script_GBT.shape[1]
    for each in (model, model if amateur is None else amateur):
        if layout.size != each.config.vocab:
            raise ValueError(
                f"the layout has {layout.size} ids but the decoder "
                f"{each.config.vocab}: they are of different systems"
            )
    if image_tokens < 1:
        raise ValueError(f"image_tokens={image_tokens} must be at least 1")
    index_B = np.arange(prompts) if index_B is None else np.asarray(index_B)
    candidate_C = np.arange(1) if candidate_C is None else np.asarray(candidate_C)
    rows = prompts * len(candidate_C)
    each = [samplers] * rows if isinstance(samplers, Sampler) else list(samplers)
    if len(each) != rows or index_B.shape != (prompts,):
        raise ValueError(
            f"{prompts} prompts x {len(candidate_C)} candidates need as many samplers, "
            f"and one index a prompt; got {len(each)} and {index_B.shape}"
        )
    model = _unrolled(model, shard)
    models = (model,) if amateur is None else (model, _unrolled(amateur, shard))
    if prefixes is None:
        prefixes = read(
            *models[:1],
            batch,
            amateur=models[-1],
            cache=cache,
            shard=shard,
            attention=attention,
        )
    return _decode(
        models,
        tuple(prefixes),
        batch.last_U,
        batch.script_GBT,
        constraints.begun(batch, image_tokens, layout),
        settings(each, batch.script_GBT, amateur=amateur is not None),
        key,
        index_B.astype(np.uint32),
        candidate_C.astype(np.uint32),
        jnp.asarray(image_tokens, jnp.int32),
        constraints.class_mask(classes, layout),
        layout=layout,
        ids=constraints.writable(batch.script_GBT, layout),
        cache=cache,
        shard=shard,
    )


def _unrolled(model: Decoder | Unrolled, shard: Shard) -> Unrolled:
    return unroll(model, shard=shard) if isinstance(model, Decoder) else model


@partial(jax.jit, static_argnames=("cache", "shard", "attention"))
def _prefill(
    model: Unrolled,
    tokens_UL: jax.Array,
    length_U: jax.Array,
    *,
    cache: CacheType | None,
    shard: Shard,
    attention: Attention,
) -> Prefix:
    return caches.prefill(
        model, tokens_UL, length_U, cache=cache, shard=shard, attention=attention
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What one step hands to the next."""

    t: jax.Array
    tokens_BT: jax.Array  # written so far
    token_BG: jax.Array  # to be read next, <pad> for none
    logits_BGV: jax.Array  # after the last token that was read
    caches: tuple[Cache, ...]  # one a model
    written: Written
    done: jax.Array


@partial(jax.jit, static_argnames=("layout", "ids", "cache", "shard"))
def _decode(
    models: tuple[Unrolled, ...],
    prefixes: tuple[Prefix, ...],
    last_U: tuple[jax.Array, ...],
    script_GPT: jax.Array,
    written: Written,
    how: Settings,
    key: jax.Array,
    index_P: jax.Array,
    candidate_C: jax.Array,
    image_tokens: jax.Array,
    class_V: jax.Array,
    *,
    layout: Layout,
    ids: range,
    cache: CacheType | None,
    shard: Shard,
) -> jax.Array:
    """P prompts, B = P · C rows."""
    (G, P, T), C = script_GPT.shape, len(candidate_C)
    B = P * C

    def rows(x_U: jax.Array) -> jax.Array:
        return jnp.repeat(x_U, B // len(x_U), axis=0)

    script_GBT = jnp.repeat(script_GPT, C, axis=1)
    script_BT = script_GBT[0]
    begins_BT, run_left_BT = constraints.runs(script_BT)
    used_BT = (script_GBT != layout.pad).any(axis=0)
    end_B = jnp.max(jnp.where(used_BT, jnp.arange(T) + 1, 0), axis=1)
    fold = jax.random.fold_in
    key_B = jax.vmap(lambda prompt, candidate: fold(fold(key, prompt), candidate))(
        rows(index_P), jnp.tile(candidate_C, P)
    )

    models = tuple(model.narrow(ids) for model in models)
    class_V = class_V[ids.start : ids.stop]
    # The amateur has the last stream to itself.
    split = [prefixes] if len(models) == 1 else [prefixes[:-1], prefixes[-1:]]
    parts = list(zip(models, split, strict=True))

    def body(loop: _Loop) -> _Loop:
        t, read_BG = loop.t, loop.token_BG != layout.pad
        logits, after, g = [], [], 0
        for (model, own), old in zip(parts, loop.caches, strict=True):
            mine = slice(g, g := g + len(own))
            logits_BgV, new = caches.step(
                model,
                loop.token_BG[:, mine],
                own,
                old,
                read_BG=read_BG[:, mine],
                shard=shard,
            )
            logits.append(logits_BgV)
            after.append(new)
        logits_BGV = jnp.where(
            read_BG[..., None], jnp.concatenate(logits, axis=1), loop.logits_BGV
        )
        code_B, begins_B = script_BT[:, t], begins_BT[:, t]
        written = replace(loop.written, stopped_B=loop.written.stopped_B & ~begins_B)
        allowed_BV = constraints.allowed(
            written, code_B, run_left_BT[:, t], image_tokens, class_V, layout, ids
        )
        with jax.named_scope("sample"):
            logits_GBV = logits_BGV.swapaxes(0, 1)
            scores_BV = token_scores(logits_GBV, allowed_BV, how, t)
            now_B = jax.vmap(lambda key: fold(key, t))(key_B)
            sampled_B = draw(now_B, scores_BV, how.temperature_B) + ids.start
        sampled_B = jnp.where(written.stopped_B, layout.pad, sampled_B)
        # Forced tokens may differ between the streams; sampled ones never do.
        forced_BG = script_GBT[:, :, t].T
        token_BG = jnp.where(forced_BG >= 0, forced_BG, sampled_B[:, None])
        written = constraints.advance(
            written, token_BG[:, 0], code_B, image_tokens, layout
        )
        done_B = (t + 1 >= end_B) | (
            written.stopped_B & (t + run_left_BT[:, t] >= end_B)
        )
        return _Loop(
            t=t + 1,
            tokens_BT=jax.lax.dynamic_update_slice(
                loop.tokens_BT, token_BG[:, :1], (0, t)
            ),
            token_BG=token_BG,
            logits_BGV=logits_BGV,
            caches=tuple(after),
            written=written,
            done=done_B.all(),
        )

    stages = _stages(T)
    loop = _Loop(
        t=jnp.asarray(0, jnp.int32),
        tokens_BT=jnp.full((B, T), layout.pad, jnp.int32),
        token_BG=jnp.stack([rows(last) for last in last_U], axis=1),
        logits_BGV=jnp.zeros((B, G, len(ids)), jnp.float32),
        caches=tuple(
            caches.begin(model, own, B, stages[0], cache=cache, shard=shard)
            for model, own in parts
        ),
        written=jax.tree.map(rows, written),
        done=(end_B == 0).all(),
    )
    for slots in stages:
        loop = jax.lax.while_loop(_unfinished(slots), body, _grown(loop, slots))
    return loop.tokens_BT


def _stages(steps: int) -> list[int]:
    """Sizes of the cache: a step attends to every slot there is, so it starts small and
    doubles; each stage is a loop of its own."""
    sizes = []
    size = _FIRST_STAGE
    while size < steps:
        sizes.append(size)
        size *= 2
    return [*sizes, steps]


def _unfinished(slots: int) -> Callable[[_Loop], jax.Array]:
    return lambda loop: ~loop.done & (loop.t < slots)


def _grown(loop: _Loop, slots: int) -> _Loop:
    grown = tuple(caches.grow(cache, slots) for cache in loop.caches)
    return replace(loop, caches=grown)
