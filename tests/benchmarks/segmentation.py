r"""A small U-Net beside class tokens: the same pictures, the same time.

    python tests/benchmarks/segmentation.py --workdir runs/full [--seconds 1500]

Trains the U-Net on the examples of the task `segment` in a work directory, for as long
as tuning the decoder took (`sft/DONE.json`) unless `--seconds` says otherwise, and
scores it on the pictures that `launch/evaluate.py` scores the decoder on: the first
test examples that have `--objects` objects together (of icons, so many examples), as
many as the protocol has documents. `unet` are its scores: `miou_of_ceiling` is above 1
where pixels beat the best that the grid of class tokens can say. `unet_in_cells` are
those of its masks brought to that grid and back, as the decoder's are; the decoder's
own are `segment/…` of `launch/evaluate.py`. How many updates fit is measured first, in
a short run that counts too. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cm3leon_jax import config as configs
from cm3leon_jax import workdir
from cm3leon_jax.data.documents import Document, Mask
from cm3leon_jax.data.icons import IconsConfig
from cm3leon_jax.data.sources import read_documents
from cm3leon_jax.evaluation import examples
from cm3leon_jax.evaluation import segmentation as scoring
from cm3leon_jax.evaluation.protocol import hardware
from cm3leon_jax.models.unet import UNetConfig, parameter_count
from cm3leon_jax.parallel.mesh import make_mesh
from cm3leon_jax.preparation import task_folders
from cm3leon_jax.sft import section
from cm3leon_jax.system import System
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer
from cm3leon_jax.training import metrics, segmenter
from cm3leon_jax.training.optimizer import OptimizerConfig

TRIAL = 30  # updates, to measure the speed
MARGIN = 0.95  # of the time that is left is planned for


class Part(Sequence[np.ndarray]):
    """What `take` finds in each document."""

    def __init__(self, documents, take):
        self.documents, self.take = documents, take

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, row):
        return self.take(self.documents[int(row)])


def picture(document: Document) -> np.ndarray:
    return document.pictures[0]


def mask(document: Document) -> np.ndarray:
    return next(s.array for s in document.segments if isinstance(s, Mask))


def held_out_of(system: System, objects: int) -> list[Document]:
    """What the evaluators of both worlds draw for the task `segment`."""
    icons = isinstance(system.source, IconsConfig)
    model: Any = SimpleNamespace(system=system)  # whose world is read, no more
    return examples.drawn(
        model, "segment", objects, examples.one if icons else examples.objects
    )


def training(options, steps: int) -> segmenter.SegmenterTrainConfig:
    return segmenter.SegmenterTrainConfig(
        optimizer=OptimizerConfig(
            peak=options.peak,
            warmup=min(50, steps),
            steps=steps,
            schedule="cosine",
            floor=0.02,
            b2=0.99,
            weight_decay=0.01,
        ),
        batch_size=options.batch_size,
        log_every=max(1, min(TRIAL, steps) // 3),
        checkpoint_every=steps,
    )


def main(options: argparse.Namespace) -> None:
    directory = Path(options.workdir)
    system = System.make(configs.read(directory))
    grid = section(system).class_grid * system.image_tokenizer.model.grid
    classes = section(system).class_names(system.data.source)
    seconds = options.seconds or workdir.results(directory / "sft")["seconds"]
    (folder,) = task_folders(directory, ["segment"])
    documents = read_documents(folder, "train")
    model_config = UNetConfig(
        image_size=system.image_tokenizer.model.image_size,
        classes=len(classes),
        channels=options.channels,
    )

    def train(steps, where):
        return segmenter.train(
            training(options, steps),
            model_config,
            images=Part(documents, picture),
            masks=Part(documents, mask),
            directory=where,
            mesh=make_mesh(system.mesh),
            rules=system.rules,
            seed=options.seed,
        )

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        train(TRIAL, Path(name) / "trial")
        rate = metrics.read(Path(name) / "trial")[-1]["images_per_second"]
        # Everything so far but the updates themselves is to be paid once more.
        spent = time.perf_counter() - began
        start = spent - TRIAL * options.batch_size / rate
        left = MARGIN * (seconds - spent) - max(start, 0)
        steps = int(left * rate / options.batch_size)
        if steps < TRIAL:
            raise SystemExit(f"{seconds} seconds are not enough: give --seconds more")
        model = train(steps, Path(name) / "run")
    took = time.perf_counter() - began

    held_out = held_out_of(system, options.objects)
    truth = np.stack([mask(document) for document in held_out])
    made = segmenter.segment(model, np.stack([picture(d) for d in held_out]))
    tokenizer = SegmentationTokenizer(grid, classes)
    best, coarse = (
        np.stack([tokenizer.ceiling(x) for x in masks]) for masks in (truth, made)
    )
    result = {
        "unet": scoring.scores(truth, made, best, classes),
        "unet_in_cells": scoring.scores(truth, coarse, best, classes),
        "grid": grid,
        "seconds": round(took, 1),
        "steps": steps,
        "batch_size": options.batch_size,
        "training_pictures": len(documents),
        "scored_pictures": len(held_out),
        "parameters": parameter_count(model_config),
        "seed": options.seed,
        "config": system.name,
        "config_hash": configs.config_hash(configs.read(directory)),
        "hardware": hardware(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--seconds", type=float, help="default: what sft/ took")
    parser.add_argument("--objects", type=int, default=1000, help="scored")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
