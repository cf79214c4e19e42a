r"""Rows of the data pipeline with retrieval against what the train step eats.

    python tests/benchmarks/pipeline.py [--config configs/shapes.py:study] [--rounds 3]

Token records and neighbours of the config's size (its own documents and captions; codes
and neighbours are random, which costs the pipeline the same), then in turn: so many
batches from the pipeline, so many updates of its decoder on one batch. Where other jobs
disturb, `cpu_ratio_vs_train_step`, of processor time, still tells something; rows are
built by one thread unless `--workers` says otherwise. The last line is one JSON object.
"""

import argparse
import functools
import importlib
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[2]))

from cm3leon_jax.data import records, sources
from cm3leon_jax.data.documents import Text
from cm3leon_jax.data.mixing import Neighbours
from cm3leon_jax.data.pipeline import Rows, batches
from cm3leon_jax.data.tokenization import Encoders
from cm3leon_jax.models.attention import xla_attention
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.models.layers import identity
from cm3leon_jax.system import System
from cm3leon_jax.tokenizers.text import TextTokenizer, train
from cm3leon_jax.training import state, step
from cm3leon_jax.training.optimizer import make_optimizer


class RandomCodes:
    """In place of an image tokenizer."""

    def __init__(self, model):
        self.image_size, self.codebook = model.image_size, model.codebook
        self.grid = (model.grid, model.grid)
        self._rng = np.random.default_rng(0)

    def encode(self, images):
        return self._rng.integers(0, self.codebook, (len(images), *self.grid))


def make_rows(system, folder, count):
    """The rows of a system of `count` training documents."""
    _, read = sources.SOURCES[system.data.source]
    documents = list(itertools.islice(read(system.source, "train"), count))
    texts = [s.text for d in documents for s in d.segments if isinstance(s, Text)]
    train(texts, folder / "text", system.vocabulary.text, 0)
    records.build(
        *(documents, folder, "train", 4),
        encoders=Encoders(
            TextTokenizer.load(folder / "text"),
            RandomCodes(system.image_tokenizer.model),
            system.layout,
        ),
        regions_per_image=system.image_tokenizer.regions_per_image,
        seed=0,
    )
    cache = records.TokenRecords(folder, "train", layout=system.layout)
    rng, retrieval = np.random.default_rng(0), system.retrieval
    found = rng.integers(0, count - 1, (count, sum(retrieval.per_query)), np.int32)
    found += found >= np.arange(count)[:, None]  # never itself
    np.save(folder / "neighbours.npy", found)
    neighbours = Neighbours(
        folder / "neighbours.npy",
        cache,
        documents=retrieval.documents,
        fewest=retrieval.fewest,
    )
    settings = system.pretrain
    arguments = (settings.infill, settings.packing, 0, neighbours)
    return Rows(cache, system.layout, *arguments)


def make_step(system):
    """A compiled update, and the state to begin with."""
    settings = system.pretrain
    tx = make_optimizer(settings.optimizer)
    config = step.StepConfig(
        segmented=settings.packing.kind == "first_fit",
        microbatches=settings.microbatches,
        loss_blocks=settings.loss_blocks,
    )
    update = functools.partial(
        step.train_step,
        tx=tx,
        layout=system.layout,
        config=config,
        shard=identity,
        attention=xla_attention,
    )
    begin = jax.jit(
        lambda key: state.create(Decoder(system.decoder_config, nnx.Rngs(key)), tx)
    )
    with nnx.use_eager_sharding(False):
        first = begin(jax.random.key(0))
    return jax.jit(update, donate_argnums=0), first


def timed(work, rows):
    """(rows a second, rows a second of processor time) of a call."""
    began, worked = time.perf_counter(), time.process_time()
    work()
    seconds = time.perf_counter() - began
    return rows / seconds, rows / (time.process_time() - worked)


def main(options):
    path, _, variant = options.config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    system = System.make(module.get_config(variant).to_dict())
    if system.retrieval is None:
        raise SystemExit(f"{options.config} has no section retrieval")
    size, measured = system.pretrain.batch_size, {"pipeline": [], "train_step": []}
    with tempfile.TemporaryDirectory() as name:
        rows = make_rows(system, Path(name), options.documents)
        update, current = make_step(system)
        stream = functools.partial(
            batches,
            rows,
            batch_size=size,
            process_index=0,
            process_count=1,
            workers=options.workers,
        )
        first = next(iter(stream(start_step=0, steps=1)))
        resident = {k: jax.numpy.asarray(x) for k, x in first.items() if k != "row"}
        current, _ = update(current, resident)  # compiles

        def build(start):
            for _ in stream(start_step=start, steps=options.batches):
                pass

        def learn():
            nonlocal current
            for _ in range(options.steps):
                current, metrics = update(current, resident)
            jax.block_until_ready(metrics)

        build(0)
        for turn in range(options.rounds):
            start = turn * options.batches
            work = functools.partial(build, start)
            measured["pipeline"].append(timed(work, options.batches * size))
            measured["train_step"].append(timed(learn, options.steps * size))
            for side, found in measured.items():
                print(f"round {turn}: {side} {found[-1][0]:.0f} rows/s", flush=True)
        fill = float(np.mean(first["segments"] > 0))
    ours, theirs = (np.array(measured[x]) for x in ("pipeline", "train_step"))
    wall, cpu = np.median(ours / theirs, axis=0)
    print(
        json.dumps(
            {
                "ratio_vs_train_step": round(float(wall), 2),
                "cpu_ratio_vs_train_step": round(float(cpu), 2),
                "rows_per_second": {
                    side: [round(x, 1) for x, _ in found]
                    for side, found in measured.items()
                },
                "cpu_rows_per_second": {
                    side: [round(x, 1) for _, x in found]
                    for side, found in measured.items()
                },
                "config": options.config,
                "tokens_a_row": system.pretrain.packing.row_length,
                "filled": round(fill, 3),
                "workers": options.workers,
                "cores": os.cpu_count(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shapes.py:study")
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    main(parser.parse_args())
