"""Training of the dual encoder in the common loop: pairs, loop, held-out scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cm3leon_jax.config import essential
from cm3leon_jax.data.hashing import uniform
from cm3leon_jax.models.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    parameter_count,
)
from cm3leon_jax.parallel.rules import Rules, batch_sharding, shard_fn
from cm3leon_jax.training import loop, state
from cm3leon_jax.training.dual_encoder_step import (
    DualEncoderTrainConfig,
    loss_terms,
    train_step,
)
from cm3leon_jax.training.metrics import Work
from cm3leon_jax.training.optimizer import make_optimizer

Encode = Callable[[str], list[int]]
Pair = tuple[str, np.ndarray]  # a text and its picture, uint8 [Y, X, 3]

_READERS = 4  # threads that fetch pairs: enough to hide the decoding of PNGs
_DROP = 401  # purpose of the random numbers of `without_words`


def train(
    config: DualEncoderTrainConfig,
    model_config: DualEncoderConfig,
    *,
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
    encode: Encode,
    directory: str | Path,
    mesh: Mesh,
    rules: Rules,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains, or goes on where `directory` left off; `encoders.py` loads the result.

    `pairs` is random access to texts and pictures; `encode` gives the pieces of a text,
    all below `model_config.text_vocab - 1`, which is the end-of-text id. `validation`
    pairs are scored together with the training's batch size; what does not fill a
    batch is left out.

    Returns the held-out loss and accuracies with `steps` and `parameters`. Raises
    ValueError for pairs that do not fit the model, and what the loop raises.
    """
    _check(config, model_config, pairs, validation, encode)
    tx = make_optimizer(config.optimizer)
    shard = shard_fn(mesh, rules)
    batches = functools.partial(
        pair_batches, encode=encode, model_config=model_config, config=config, seed=seed
    )
    held_out = jax.jit(
        functools.partial(loss_terms, config=config, shard=shard),
    )
    sharding = batch_sharding(mesh, rules)

    def validate(trained: state.TrainState) -> Mapping[str, float]:
        steps = len(validation) // config.batch_size
        found = []
        for batch in batches(validation, 0, steps=steps, epochs=False):
            arrays = {
                key: jax.make_array_from_process_local_data(sharding, x)
                for key, x in batch.items()
                if key != loop.HOST_ONLY
            }
            loss, metrics = held_out(trained.model, arrays)
            found.append(jax.device_get(metrics | {"loss": loss}))
        return {key: float(np.mean([x[key] for x in found])) for key in found[0]}

    def init(key: jax.Array) -> state.TrainState:
        return state.create(DualEncoder(model_config, nnx.Rngs(key)), tx)

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
        directory=directory,
        mesh=mesh,
        rules=rules,
        settings={
            "model": checkpoint_model(model_config),
            "training": essential(config),
            "seed": seed,
        },
        work=Work(unit="pairs", per_step=config.batch_size),
        evaluations={"validation": (config.validate_every, validate)},
        name="dual encoder",
    )
    return {
        **validate(final),
        "steps": steps,
        "parameters": parameter_count(model_config),
    }


def checkpoint_model(model_config: DualEncoderConfig) -> dict[str, Any]:
    """What a checkpoint says of its model, and one that is loaded must agree with."""
    return dataclasses.asdict(model_config)


def pair_batches(
    pairs: Sequence[Pair],
    start: int,
    *,
    steps: int,
    encode: Encode,
    model_config: DualEncoderConfig,
    config: DualEncoderTrainConfig,
    seed: int,
    epochs: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of batches `start`, `start + 1`, … up to `steps`.

    Batch t is rows [t·B, (t+1)·B) of all epochs in a row, each epoch in its own order
    (`epochs=False`: in the order of the pairs, no further than their end); a pure
    function of (seed, t). Dicts of `images`, `ids` and `lengths` as
    `dual_encoder_step.loss_terms` takes them and of the pairs' numbers `row`.
    """
    processes, process = jax.process_count(), jax.process_index()
    if config.batch_size % processes:
        raise ValueError(
            f"dual_encoder.training.batch_size={config.batch_size} is not a multiple "
            f"of the {processes} processes"
        )
    part = config.batch_size // processes
    order = grain.MapDataset.range(len(pairs))
    if epochs:
        order = order.seed(seed).shuffle().repeat()

    def fetch(local: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(local), part)
        place = step * config.batch_size + process * part + place
        row = order[place]
        assert row is not None  # no filter that could have dropped it
        text, image = pairs[int(row)]
        views = [text]
        for view in range(1, config.views):
            draw = functools.partial(uniform, seed, _DROP, place, view)
            views.append(without_words(text, config.drop_words, draw))
        ids_GL, length_G = text_ids(views, encode, model_config)
        return {
            "images": np.asarray(image),
            "ids": ids_GL,
            "lengths": length_G,
            "row": np.asarray(row, np.int64),
        }

    # Exactly the remaining rows; reading ahead is bounded by two batches.
    rows = grain.MapDataset.range(start * part, steps * part).map(fetch)
    options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=2 * part)
    return iter(rows.to_iter_dataset(options).batch(part))


def without_words(text: str, share: float, draw: Callable[[Any], Any]) -> str:
    """The text without each of its words with probability `share`; one always stays.

    Words are what white space separates; `draw` gives a number in [0, 1) for each.
    """
    words = text.split()
    draws = draw(np.arange(len(words)))
    kept = [word for word, x in zip(words, draws, strict=True) if x >= share]
    return " ".join(kept) if kept or not words else words[int(draws.argmax())]


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


def _check(
    config: DualEncoderTrainConfig,
    model_config: DualEncoderConfig,
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
    encode: Encode,
) -> None:
    """ValueError for pairs that cannot be learnt from."""
    side, batch = model_config.image_size, config.batch_size
    for name, found in (("training", pairs), ("validation", validation)):
        if len(found) < batch:
            raise ValueError(
                f"{len(found)} {name} pairs do not fill a batch: dual_encoder.training."
                f"batch_size={batch}"
            )
        text, image = found[0]
        if image.dtype != np.uint8 or image.shape != (side, side, 3):
            raise ValueError(
                f"{name} pictures are {image.dtype} {list(image.shape)}, the dual "
                f"encoder takes uint8 [{side}, {side}, 3] (dual_encoder.image_size)"
            )
        highest = max(encode(text), default=0)
        if highest >= model_config.text_vocab - 1:
            raise ValueError(
                f"a {name} text has piece {highest}: dual_encoder.text_vocab="
                f"{model_config.text_vocab} must be the tokenizer's size and one more"
            )
