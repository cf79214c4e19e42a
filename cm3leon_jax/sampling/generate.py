"""The compiled loop: prompts and scripts in, tokens out (paper section 1.11).

All guidance streams of all prompts are rows of one batch; each reads the token that was
sampled from their combination. What a prompt gets depends on the key, its own index and
the position only, never on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.models.attention import Attention, xla_attention
from cm3leon_jax.models.cache import Cache, prefill, step, unroll
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.models.layers import Shard, identity
from cm3leon_jax.sampling.prompts import CLASS, FREE, IMAGE, TEXT, Batch
from cm3leon_jax.sampling.sampler import (
    Sampler,
    Settings,
    draw,
    settings,
    token_scores,
)
from cm3leon_jax.vocab import Layout


def generate(
    model: Decoder,
    batch: Batch,
    key: jax.Array,
    samplers: Sampler | Sequence[Sampler],
    layout: Layout,
    *,
    image_tokens: int,
    classes: Sequence[int] | None = None,
    index_B: np.ndarray | None = None,
    shard: Shard = identity,
    attention: Attention = xla_attention,
) -> jax.Array:
    """What the script of each prompt allows, sampled: int32 tokens_BT.

    `key` is a typed PRNG key; noise is keyed by (key, `index_B`, position), so give a
    prompt the same index (default 0, 1, 2, …) to see the same sample in another batch.
    One sampler for all, or one a prompt. `image_tokens` is the length of a whole image
    (used by FREE), `classes` the labels that CLASS allows (None: every id for classes,
    the reserved ones too). T and the streams are those of `batch`; what a run leaves
    unused is <pad>. One program is compiled per shape of `batch` and pair of callables:
    hand in the same `shard` and `attention` objects every time.

    Raises ValueError for a vocabulary of another size, a wrong number of samplers,
    guidance without a second stream, or labels that are no classes.
    """
    rows = batch.script_GBT.shape[1]
    if layout.size != model.config.vocab:
        raise ValueError(
            f"the layout has {layout.size} ids but the decoder {model.config.vocab}: "
            "they are of different systems"
        )
    if image_tokens < 1:
        raise ValueError(f"image_tokens={image_tokens} must be at least 1")
    each = [samplers] * rows if isinstance(samplers, Sampler) else list(samplers)
    index_B = np.arange(rows) if index_B is None else np.asarray(index_B)
    if len(each) != rows or index_B.shape != (rows,):
        raise ValueError(
            f"{rows} prompts need as many samplers and indices, got {len(each)} "
            f"and {index_B.shape}"
        )
    return _generate(
        model,
        batch.prompt_GBL,
        batch.length_GB,
        batch.script_GBT,
        settings(each, batch.script_GBT),
        key,
        index_B.astype(np.uint32),
        jnp.asarray(image_tokens, jnp.int32),
        _classes(classes, layout),
        layout=layout,
        shard=shard,
        attention=attention,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Written:
    """Where a row of tokens stands, from which follows what may come next."""

    previous_B: jax.Array  # the last token that was read
    image_left_B: jax.Array  # codes that the image under way still needs
    stopped_B: jax.Array  # bool: the run has ended, the rest of it is <pad>


@partial(jax.jit, static_argnames=("layout", "shard", "attention"))
def _generate(
    model: Decoder,
    prompt_GBL: jax.Array,
    length_GB: jax.Array,
    script_GBT: jax.Array,
    how: Settings,
    key: jax.Array,
    index_B: jax.Array,
    image_tokens: jax.Array,
    class_V: jax.Array,
    *,
    layout: Layout,
    shard: Shard,
    attention: Attention,
) -> jax.Array:
    G, B, T = script_GBT.shape
    L = prompt_GBL.shape[-1]
    key_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(index_B)
    script_BT = script_GBT[0]
    begins_BT, run_left_BT = _runs(script_BT)
    used_BT = (script_GBT != layout.pad).any(axis=0)
    end_B = jnp.max(jnp.where(used_BT, jnp.arange(T) + 1, 0), axis=1)

    decoder = unroll(model)
    logits_RV, cache = prefill(
        model,
        prompt_GBL.reshape(G * B, L),
        length_GB.reshape(G * B),
        size=L + T,
        shard=shard,
        attention=attention,
    )
    state = _Written(
        previous_B=jnp.take_along_axis(
            prompt_GBL[0], length_GB[0][:, None] - 1, axis=1
        )[:, 0],
        image_left_B=jnp.zeros(B, jnp.int32),
        stopped_B=jnp.zeros(B, bool),
    )

    def more(loop) -> jax.Array:
        return ~loop[-1]

    def body(loop):
        t, tokens_BT, logits_GBV, cache, state, _ = loop
        code_B, begins_B = script_BT[:, t], begins_BT[:, t]
        run_left_B = run_left_BT[:, t]
        state = _Written(
            previous_B=state.previous_B,
            image_left_B=jnp.where(begins_B, 0, state.image_left_B),
            stopped_B=state.stopped_B & ~begins_B,
        )
        allowed_BV = _allowed(state, code_B, run_left_B, image_tokens, class_V, layout)
        with jax.named_scope("sample"):
            scores_BV = token_scores(logits_GBV, allowed_BV, how, t)
            now_B = jax.vmap(lambda k: jax.random.fold_in(k, t))(key_B)
            sampled_B = draw(now_B, scores_BV, how.temperature_B)
        sampled_B = jnp.where(state.stopped_B, layout.pad, sampled_B)
        # Forced tokens may differ between the streams; sampled ones never do.
        token_GB = jnp.where(script_GBT[:, :, t] >= 0, script_GBT[:, :, t], sampled_B)
        state = _advance(state, token_GB[0], code_B, image_tokens, layout)
        read_GB = token_GB != layout.pad
        next_RV, cache = step(
            decoder,
            token_GB.reshape(G * B),
            cache,
            read_B=read_GB.reshape(G * B),
            shard=shard,
        )
        logits_GBV = jnp.where(
            read_GB[..., None], next_RV.reshape(G, B, -1), logits_GBV
        )
        tokens_BT = jax.lax.dynamic_update_slice(
            tokens_BT, token_GB[0][:, None], (0, t)
        )
        done_B = (t + 1 >= end_B) | (state.stopped_B & (t + run_left_B >= end_B))
        return t + 1, tokens_BT, logits_GBV, cache, state, done_B.all()

    loop: tuple[jax.Array, jax.Array, jax.Array, Cache, _Written, jax.Array] = (
        jnp.asarray(0, jnp.int32),
        jnp.full((B, T), layout.pad, jnp.int32),
        logits_RV.reshape(G, B, -1),
        cache,
        state,
        (end_B == 0).all(),
    )
    return jax.lax.while_loop(more, body, loop)[1]


def _runs(script_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs of one code: where they begin, and how many positions are left of them.

    script    5 -2 -2 -2 -1
    begins    1  1  0  0  1
    left      1  3  2  1  1
    """
    T = script_BT.shape[1]
    change_BT = script_BT[:, 1:] != script_BT[:, :-1]
    begins_BT = jnp.pad(change_BT, ((0, 0), (1, 0)), constant_values=True)
    ends_BT = jnp.pad(change_BT, ((0, 0), (0, 1)), constant_values=True)
    at_T = jnp.arange(T)
    end_BT = jax.lax.cummin(jnp.where(ends_BT, at_T, T), axis=1, reverse=True)
    return begins_BT, end_BT - at_T + 1


def _allowed(
    state: _Written,
    code_B: jax.Array,
    run_left_B: jax.Array,
    image_tokens: jax.Array,
    class_V: jax.Array,
    layout: Layout,
) -> jax.Array:
    """Which ids the script and the state allow: bool allowed_BV, never an empty row.

    FREE: an image starts only right after <break> and only if all of it still fits;
    inside an image there are image ids only; after it comes <break> or <eos>; no
    segment is empty.
    """
    ids_V = jnp.arange(layout.size)
    previous_B = state.previous_B
    inside_B = state.image_left_B > 0
    image_before_B = (previous_B >= layout.image.start) & (
        previous_B < layout.image.stop
    )
    opened_B = (previous_B == layout.brk) | (previous_B == layout.eos)
    text_B, image_B, free_B = code_B == TEXT, code_B == IMAGE, code_B == FREE
    starts_B = (previous_B == layout.brk) & (run_left_B >= image_tokens)
    pieces_B = (text_B & (run_left_B > 1)) | (free_B & ~inside_B & ~image_before_B)
    codes_B = image_B | (free_B & (inside_B | starts_B))
    closing_B = free_B & ~inside_B & ~opened_B

    def where(ids, rows_B):
        return ids[None] & rows_B[:, None]

    return (
        where((ids_V >= layout.text.start) & (ids_V < layout.text.stop), pieces_B)
        | where((ids_V >= layout.image.start) & (ids_V < layout.image.stop), codes_B)
        | where((ids_V == layout.brk) | (ids_V == layout.eos), closing_B)
        | where(ids_V == layout.eoss, text_B)
        | where(class_V, code_B == CLASS)
    )


def _classes(labels: Sequence[int] | None, layout: Layout) -> np.ndarray:
    """The ids that CLASS allows: bool [V]."""
    class_V = np.zeros(layout.size, bool)
    if labels is None:
        class_V[layout.classes.start : layout.classes.stop] = True
    elif len(labels) == 0:
        raise ValueError("classes is empty: allow at least one")
    else:
        class_V[layout.class_ids(labels)] = True
    return class_V


def _advance(
    state: _Written,
    token_B: jax.Array,
    code_B: jax.Array,
    image_tokens: jax.Array,
    layout: Layout,
) -> _Written:
    """The state after `token_B` was written under the script's `code_B`."""
    is_code_B = (token_B >= layout.image.start) & (token_B < layout.image.stop)
    left_B = state.image_left_B
    left_B = jnp.where(left_B > 0, left_B, image_tokens) - 1
    ends_B = ((code_B == TEXT) & (token_B == layout.eoss)) | (
        (code_B == FREE) & (token_B == layout.eos)
    )
    return _Written(
        previous_B=jnp.where(token_B == layout.pad, state.previous_B, token_B),
        image_left_B=jnp.where(is_code_B & (code_B == FREE), left_B, 0),
        stopped_B=state.stopped_B | ends_B,
    )
