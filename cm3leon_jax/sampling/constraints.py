"""What may stand where: scripts and the state of a row as masks over ids.

See `sampling/prompts.py` for what a script says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.sampling.prompts import CLASS, FREE, IMAGE, SAY, TALK, TEXT, Batch
from cm3leon_jax.vocab import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Written:
    """Where a row of tokens stands, from which follows what may come next."""

    previous_B: jax.Array  # the last token that was read
    image_left_B: jax.Array  # codes that the image under way still needs
    stopped_B: jax.Array  # bool: the run has ended, the rest of it is <pad>


def begun(batch: Batch, image_tokens: int, layout: Layout) -> Written:
    """The state after the prompts of the first stream, one entry for each that is
    different; a prompt that ends within an image goes on in that image."""
    left = []
    for prefix_L, length, last in zip(
        batch.prefix_UL[0], batch.length_U[0], batch.last_U[0], strict=True
    ):
        backwards = np.append(prefix_L[:length], last)[::-1]
        is_code = (backwards >= layout.image.start) & (backwards < layout.image.stop)
        codes = len(is_code) if is_code.all() else int(is_code.argmin())
        left.append(-codes % image_tokens)
    return Written(
        previous_B=jnp.asarray(batch.last_U[0]),
        image_left_B=jnp.asarray(left, jnp.int32),
        stopped_B=jnp.zeros(len(left), bool),
    )


def writable(script_GBT: np.ndarray, layout: Layout) -> range:
    """A range with all ids that scripts let be sampled: the whole vocabulary unless
    half of it is enough."""
    codes = set(np.unique(script_GBT[script_GBT < 0]).tolist())
    parts = [
        part
        for code, part in (
            (IMAGE, layout.image),
            (TEXT, layout.text),
            (TEXT, range(layout.eoss, layout.eoss + 1)),
            (CLASS, layout.classes),
            (FREE, range(layout.size)),
            (TALK, range(layout.size)),
            (SAY, range(layout.size)),
        )
        if code in codes and part
    ]
    start = min((part.start for part in parts), default=0)
    stop = max((part.stop for part in parts), default=1)
    return (
        range(layout.size) if 2 * (stop - start) > layout.size else range(start, stop)
    )


def runs(script_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs of one code: where they begin, and how many positions are left of them.

    script    5 -2 -2 -2 -1
    begins    1  1  0  0  1
    left      1  3  2  1  1
    """
    T = script_BT.shape[1]
    script_BT = jnp.where(script_BT == SAY, TALK, script_BT)
    change_BT = script_BT[:, 1:] != script_BT[:, :-1]
    begins_BT = jnp.pad(change_BT, ((0, 0), (1, 0)), constant_values=True)
    ends_BT = jnp.pad(change_BT, ((0, 0), (0, 1)), constant_values=True)
    at_T = jnp.arange(T)
    end_BT = jax.lax.cummin(jnp.where(ends_BT, at_T, T), axis=1, reverse=True)
    return begins_BT, end_BT - at_T + 1


def allowed(
    state: Written,
    code_B: jax.Array,
    run_left_B: jax.Array,
    image_tokens: jax.Array,
    class_V: jax.Array,
    layout: Layout,
    ids: range,
) -> jax.Array:
    """Which of `ids` the script and the state allow: bool allowed_BV, V = len(ids),
    never an empty row. `class_V` are the classes among `ids`.

    FREE: an image starts only right after <break> and only if all of it still fits;
    inside an image there are image ids only; after it comes <break> or <eos>; no
    segment is empty.
    """
    ids_V = jnp.arange(ids.start, ids.stop)
    previous_B = state.previous_B
    inside_B = state.image_left_B > 0
    image_before_B = (previous_B >= layout.image.start) & (
        previous_B < layout.image.stop
    )
    opened_B = (previous_B == layout.brk) | (previous_B == layout.eos)
    text_B, image_B, free_B = code_B == TEXT, code_B == IMAGE, code_B == FREE
    talk_B = (code_B == TALK) | (code_B == SAY)
    starts_B = (previous_B == layout.brk) & (run_left_B >= image_tokens)
    pieces_B = (text_B & (run_left_B > 1)) | (free_B & ~inside_B & ~image_before_B)
    codes_B = image_B | (free_B & (inside_B | starts_B))
    pieces_B |= talk_B
    closing_B = (free_B & ~inside_B & ~opened_B) | talk_B
    breaks_B = closing_B & (code_B != SAY) & (talk_B | (run_left_B > 1))

    def where(ids, rows_B):
        return ids[None] & rows_B[:, None]

    return (
        where((ids_V >= layout.text.start) & (ids_V < layout.text.stop), pieces_B)
        | where((ids_V >= layout.image.start) & (ids_V < layout.image.stop), codes_B)
        | where(ids_V == layout.brk, breaks_B)
        | where(ids_V == layout.eos, closing_B)
        | where(ids_V == layout.eoss, text_B)
        | where(class_V, code_B == CLASS)
    )


def class_mask(labels: Sequence[int] | None, layout: Layout) -> np.ndarray:
    """The ids that CLASS allows: bool [V]."""
    class_V = np.zeros(layout.size, bool)
    if labels is None:
        class_V[layout.classes.start : layout.classes.stop] = True
    elif len(labels) == 0:
        raise ValueError("classes is empty: allow at least one")
    else:
        class_V[layout.class_ids(labels)] = True
    return class_V


def advance(
    state: Written,
    token_B: jax.Array,
    code_B: jax.Array,
    image_tokens: jax.Array,
    layout: Layout,
) -> Written:
    """The state after `token_B` was written under the script's `code_B`."""
    is_code_B = (token_B >= layout.image.start) & (token_B < layout.image.stop)
    left_B = state.image_left_B
    left_B = jnp.where(left_B > 0, left_B, image_tokens) - 1
    ends_B = ((code_B == TEXT) & (token_B == layout.eoss)) | (
        (code_B == FREE) & (token_B == layout.eos)
    )
    talk_B = (code_B == TALK) | (code_B == SAY)
    ends_B |= talk_B & ((token_B == layout.eos) | (token_B == layout.brk))
    return Written(
        previous_B=jnp.where(token_B == layout.pad, state.previous_B, token_B),
        image_left_B=jnp.where(is_code_B & (code_B != IMAGE), left_B, 0),
        stopped_B=state.stopped_B | ends_B,
    )
