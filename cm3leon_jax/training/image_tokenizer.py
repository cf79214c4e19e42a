"""Training of the image tokenizer in the common loop: data, loop, scores, saving."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cm3leon_jax.config import essential
from cm3leon_jax.models.vqgan import VQGAN, VQGANConfig, parameter_count
from cm3leon_jax.parallel.rules import Rules, batch_sharding, row_share, shard_fn
from cm3leon_jax.tokenizers.image import ImageTokenizer, save
from cm3leon_jax.training import loop
from cm3leon_jax.training.image_step import (
    Features,
    ImageTokenizerState,
    ImageTokenizerTrainConfig,
    create,
    train_step,
)
from cm3leon_jax.training.metrics import Work

# (pictures, reconstructions: uint8 [B, Y, X, 3]; codes [B, Yg, Xg]; Z) -> scores
Score = Callable[[np.ndarray, np.ndarray, np.ndarray, int], Mapping[str, float]]

_READERS = 4  # threads that fetch pictures: enough to hide the decoding of PNGs


def train(
    config: ImageTokenizerTrainConfig,
    model_config: VQGANConfig,
    *,
    images: Sequence[np.ndarray],
    validation: np.ndarray,
    directory: str | Path,
    mesh: Mesh,
    rules: Rules,
    score: Score,
    seed: int = 0,
    features: Features | None = None,
) -> dict[str, Any]:
    """Trains, or goes on where `directory` left off, and saves for `ImageTokenizer`.

    `images` is random access to uint8 [Y, X, 3] pictures (an array or a data source),
    `validation` an array of them for the scores, which `score` computes. `features`
    maps pictures in [-1, 1] to feature maps for the perceptual term.

    Returns the scores with `steps` and `parameters`. Raises ValueError for pictures of
    another size or settings that do not go together, and what the loop raises.
    """
    if config.perceptual and features is None:
        raise ValueError(
            f"image_tokenizer.training.perceptual={config.perceptual} needs features "
            "to compare: give them, or set it to 0"
        )
    side = model_config.image_size
    for name, pictures in (("training", images), ("validation", validation)):
        if not len(pictures):
            raise ValueError(f"no {name} pictures for the image tokenizer")
        if pictures[0].shape != (side, side, 3) or pictures[0].dtype != np.uint8:
            raise ValueError(
                f"{name} pictures are {pictures[0].dtype} {list(pictures[0].shape)}, "
                f"the image tokenizer takes uint8 [{side}, {side}, 3]"
            )

    def validate(state: ImageTokenizerState) -> Mapping[str, float]:
        tokenizer = ImageTokenizer(model_config, _on_one_device(state.model, mesh))
        codes = tokenizer.encode(validation)
        return score(validation, tokenizer.decode(codes), codes, tokenizer.codebook)

    state = loop.run(
        config=loop.LoopConfig(
            steps=config.optimizer.steps,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            seed=seed,
        ),
        step_fn=functools.partial(
            train_step,
            config=config,
            seed=seed,
            features=features,
            shard=shard_fn(mesh, rules),
        ),
        init_fn=lambda key: create(key, config, model_config),
        batches=functools.partial(
            image_batches,
            images,
            batch=config.batch_size,
            steps=config.optimizer.steps,
            seed=seed,
            share=row_share(batch_sharding(mesh, rules)),
        ),
        batch_size=config.batch_size,
        directory=directory,
        mesh=mesh,
        rules=rules,
        settings={
            "model": model_config.essential,
            "training": essential(config),
            "seed": seed,
        },
        work=Work(unit="images", per_step=config.batch_size),
        evaluations={"validation": (config.validate_every, validate)},
        name="image tokenizer",
    )
    model = _on_one_device(state.model, mesh)
    if jax.process_index() == 0:
        save(directory, model_config, model)
    return {
        **validate(state),
        "steps": int(state.step),
        "parameters": parameter_count(model_config),
    }


def image_batches(
    images: Sequence[np.ndarray],
    start: int,
    *,
    batch: int,
    steps: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """A `share` (index, count) of batches `start`, `start + 1`, … up to `steps`.

    Batch t is rows [t·batch, (t+1)·batch) of all epochs in a row, each epoch in its own
    order; a pure function of (seed, t). Dicts of `images` uint8 [b, Y, X, 3] and of the
    pictures' numbers `row`.
    """
    part = batch // share[1]
    order = grain.MapDataset.range(len(images)).seed(seed).shuffle().repeat()

    def fetch(local: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(local), part)
        row = order[step * batch + share[0] * part + place]
        assert row is not None  # no filter that could have dropped it
        return {"images": np.asarray(images[row]), "row": np.asarray(row, np.int64)}

    # Exactly the remaining rows; reading ahead is bounded by two batches.
    rows = grain.MapDataset.range(start * part, steps * part).map(fetch)
    options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=2 * part)
    return iter(rows.to_iter_dataset(options).batch(part))


def _on_one_device(model: VQGAN, mesh: Mesh) -> VQGAN:
    """A whole copy on this process's first device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    gathered = jax.jit(lambda model: model, out_shardings=everywhere)(model)
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)
