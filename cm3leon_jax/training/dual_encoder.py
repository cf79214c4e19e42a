"""Training of the dual encoder in the common loop: pairs, loop, held-out scores."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from cm3leon_jax.config import essential, write_whole
from cm3leon_jax.data.hashing import uniform
from cm3leon_jax.models.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    parameter_count,
)
from cm3leon_jax.parallel.rules import Rules, batch_sharding, row_share, shard_fn
from cm3leon_jax.training import loop, state
from cm3leon_jax.training.dual_encoder_step import (
    DualEncoderTrainConfig,
    loss_terms,
    train_step,
)
from cm3leon_jax.training.metrics import Work
from cm3leon_jax.training.optimizer import make_optimizer

Encode = Callable[[str], list[int]]
Pairs = tuple[Sequence[str], Sequence[np.ndarray]]  # texts, pictures uint8 [Y, X, 3]
SETTINGS = "dual_encoder.json"  # beside the checkpoints: the model's sizes

_READERS = 4  # threads that fetch pairs: enough to hide the decoding of PNGs
_DROP = 401  # purpose of the random numbers of `view`


def train(
    config: DualEncoderTrainConfig,
    model_config: DualEncoderConfig,
    *,
    pairs: Pairs,
    validation: Pairs,
    encode: Encode,
    directory: str | Path,
    mesh: Mesh,
    rules: Rules,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains, or goes on where `directory` left off; `encoders.py` loads the result.

    `pairs` is random access to texts and to their pictures (all texts are read once
    at the start, to count words); `encode` gives the pieces of a text, all below
    `model_config.text_vocab - 1`, which is the end-of-text id. `validation` pairs are
    scored in batches like the training's; what does not fill one is left out.

    Returns the held-out loss and accuracies with `steps`, `parameters` and `cut_texts`,
    the share of held-out texts that are too long for the encoder. Raises
    ValueError for pairs that do not fit the model, and what the loop raises.
    """
    _check(config, model_config, pairs, validation, encode)
    tx = make_optimizer(config.optimizer)
    shard = shard_fn(mesh, rules)
    keep = keep_words(pairs[0], config.rare) if config.text_views else {}
    sharding = batch_sharding(mesh, rules)
    send = loop.sender(sharding, config.batch_size)
    batches = functools.partial(
        pair_batches,
        keep=keep,
        encode=encode,
        model_config=model_config,
        config=config,
        seed=seed,
        share=row_share(sharding),
    )
    held_out = jax.jit(functools.partial(loss_terms, config=config, shard=shard))

    def validate(trained: state.TrainState) -> Mapping[str, float]:
        steps = len(validation[0]) // config.batch_size
        found = []
        for batch in batches(validation, 0, steps=steps, epochs=False):
            loss, metrics = held_out(trained.model, send(batch))
            found.append(jax.device_get(metrics | {"loss": loss}))
        return {key: float(np.mean([x[key] for x in found])) for key in found[0]}

    def init(key: jax.Array) -> state.TrainState:
        made = DualEncoder(model_config, nnx.Rngs(key), config.first_scale)
        return state.create(made, tx)

    steps = config.optimizer.steps
    final = loop.run(
        config=loop.LoopConfig(
            steps=steps,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            seed=seed,
        ),
        step_fn=functools.partial(train_step, config=config, seed=seed, shard=shard),
        init_fn=init,
        batches=lambda start: batches(pairs, start, steps=steps),
        batch_size=config.batch_size,
        directory=directory,
        mesh=mesh,
        rules=rules,
        settings={
            "model": dataclasses.asdict(model_config),
            "training": essential(config),
            "seed": seed,
        },
        work=Work(unit="pairs", per_step=config.batch_size),
        evaluations={"validation": (config.validate_every, validate)},
        name="dual encoder",
    )
    if jax.process_index() == 0:
        sizes = json.dumps(dataclasses.asdict(model_config), indent=1)
        write_whole(Path(directory) / SETTINGS, sizes)
    return {
        **validate(final),
        "steps": steps,
        "parameters": parameter_count(model_config),
        "cut_texts": _cut(validation[0], encode, model_config),
    }


def pair_batches(
    pairs: Pairs,
    start: int,
    *,
    steps: int,
    keep: Mapping[str, float],
    encode: Encode,
    model_config: DualEncoderConfig,
    config: DualEncoderTrainConfig,
    seed: int,
    share: tuple[int, int] = (0, 1),
    epochs: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """A `share` (index, count) of batches `start`, `start + 1`, … up to `steps`.

    Batch t is rows [t·B, (t+1)·B) of all epochs in a row, each epoch in its own order
    (`epochs=False`: in the order of the pairs, no further than their end); a pure
    function of (seed, t). Dicts of `images`, `ids` and `lengths` as
    `dual_encoder_step.loss_terms` takes them and of the pairs' numbers `row`.
    """
    whole, images = pairs
    part = config.batch_size // share[1]
    order = grain.MapDataset.range(len(whole))
    if epochs:
        order = order.seed(seed).shuffle().repeat()

    def fetch(local: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(local), part)
        place = step * config.batch_size + share[0] * part + place
        row = order[place]
        assert row is not None  # no filter that could have dropped it
        texts = [whole[int(row)]]
        for number in range(1, config.views):
            draw = functools.partial(uniform, seed, _DROP, place, number)
            texts.append(view(texts[0], keep, draw))
        ids_GL, length_G = text_ids(texts, encode, model_config)
        return {
            "images": np.asarray(images[int(row)]),
            "ids": ids_GL,
            "lengths": length_G,
            "row": np.asarray(row, np.int64),
        }

    # Exactly the remaining rows; reading ahead is bounded by two batches.
    rows = grain.MapDataset.range(start * part, steps * part).map(fetch)
    options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=2 * part)
    return iter(rows.to_iter_dataset(options).batch(part))


def keep_words(texts: Iterable[str], rare: float) -> dict[str, float]:
    """With what probability a view keeps each word: sqrt(rare / its share), at most 1.

    Words are what white space separates.
    """
    counts = collections.Counter(word for text in texts for word in text.split())
    total = sum(counts.values())
    return {
        word: min(1.0, math.sqrt(rare * total / count))
        for word, count in counts.items()
    }


def view(text: str, keep: Mapping[str, float], draw: Callable[[Any], Any]) -> str:
    """The text without some of its words; `draw` gives a number in [0, 1) for each.

    A word that `keep` does not know is kept, and so is the likeliest where none is.
    """
    words = re.findall(r"\s*\S+", text)  # with the space before: it is of their pieces
    names = [word.strip() for word in words]
    chances = np.array([keep[name] if name in keep else 1.0 for name in names])
    ahead = chances - draw(np.arange(len(words)))
    kept = [word for word, x in zip(words, ahead, strict=True) if x > 0]
    return "".join(kept) if kept or not words else words[int(ahead.argmax())]


def text_ids(
    texts: Sequence[str], encode: Encode, config: DualEncoderConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> ids int32 [B, L] and lengths int32 [B], of a dual encoder trained here.

    The last id of the vocabulary ends every text and fills its row; a text that is too
    long loses its end.
    """
    L, end = config.text_length, config.text_vocab - 1
    ids_BL = np.full((len(texts), L), end, np.int32)
    length_B = np.zeros(len(texts), np.int32)
    for i, text in enumerate(texts):
        pieces = encode(text)[: L - 1]
        ids_BL[i, : len(pieces)] = pieces
        length_B[i] = len(pieces) + 1
    return ids_BL, length_B


def _cut(texts: Sequence[str], encode: Encode, config: DualEncoderConfig) -> float:
    """The share of texts that lose their end; a line says so."""
    cut = sum(len(encode(text)) >= config.text_length for text in texts) / len(texts)
    if cut:
        logging.warning(
            "%.1f %% of the held-out texts lose their end, longer than retrieval."
            "encoder.model.text_length=%d holds with the end of text: raise it",
            *(100 * cut, config.text_length),
        )
    return cut


def _check(
    config: DualEncoderTrainConfig,
    model_config: DualEncoderConfig,
    pairs: Pairs,
    validation: Pairs,
    encode: Encode,
) -> None:
    """ValueError for pairs that cannot be learnt from."""
    side, batch = model_config.image_size, config.batch_size
    for name, (texts, images) in (("training", pairs), ("validation", validation)):
        if len(texts) != len(images):
            raise ValueError(f"{len(texts)} {name} texts for {len(images)} pictures")
        if len(texts) < batch:
            raise ValueError(
                f"{len(texts)} {name} pairs do not fill a batch: dual_encoder.training."
                f"batch_size={batch}"
            )
        image = images[0]
        if image.dtype != np.uint8 or image.shape != (side, side, 3):
            raise ValueError(
                f"{name} pictures are {image.dtype} {list(image.shape)}, the dual "
                f"encoder takes uint8 [{side}, {side}, 3] (dual_encoder.image_size)"
            )
        highest = max(encode(texts[0]), default=0)
        if highest >= model_config.text_vocab - 1:
            raise ValueError(
                f"a {name} text has piece {highest}: dual_encoder.text_vocab="
                f"{model_config.text_vocab} must be the tokenizer's size and one more"
            )
