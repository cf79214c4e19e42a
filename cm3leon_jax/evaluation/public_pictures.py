"""Pictures of public sets: drawn for captions, or taken apart into codes and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.evaluation import (
    clip_scores,
    frechet,
    inception_score,
    precision_recall,
)
from cm3leon_jax.evaluation.precision_recall import Batches
from cm3leon_jax.evaluation.protocol import Outcome, Sample, Score, interval
from cm3leon_jax.evaluation.public_job import Job
from cm3leon_jax.evaluation.public_sets import Example
from cm3leon_jax.evaluation.reconstruction import code_use, psnr, ssim
from cm3leon_jax.retrieval.embed import Embedder


def text_to_image(job: Job) -> Outcome:
    """A picture for the first caption of each example; what it is compared with are the
    examples' own. Of the candidates the first n are what n would have been."""
    config, scores, samples = job.config, {}, []
    if not config.metrics:
        raise ValueError("public.metrics is empty: nothing scores the pictures")
    job.check_side()
    embedder = _embedder(job) if "clip_score" in config.metrics else None
    compared = set(config.metrics) - {"clip_score"}
    most = max(config.candidates)

    def work(own: slice, k: int) -> dict[str, Any]:
        prompts = [example.references[0] for example in job.examples[own]]
        asked = job.options(own, k)
        if most == 1:
            drawn = [[x] for x in job.model.text_to_image(prompts, **asked)]
            order = [((0,), (0.0,))] * len(drawn)
        else:
            ranked = job.model.text_to_image(
                prompts,
                candidates=most,
                rerank=config.rerank,
                return_scores=True,
                **asked,
            )
            drawn = [row.outputs for row in ranked]
            order = [(row.numbers, row.scores) for row in ranked]
        made: dict[str, Any] = {"shown": [], "features": {}, "clip": {}}
        chosen = {n: _best(drawn, order, n) for n in config.candidates}
        for n, pictures in chosen.items():
            folder = job.place / f"pictures@{_suffix(k, n)}"
            _save(folder, job.examples[own], pictures)
            stack = np.stack([np.asarray(picture) for picture in pictures])
            if compared:
                made["features"][n] = job.network(stack)
            if embedder is not None:
                texts, images = embedder.texts(prompts), embedder.images(stack)
                made["clip"][n] = clip_scores.clip_score(images, texts)
        made["shown"] = [[chosen[n][i] for n in chosen] for i in job.shown(own)]
        return made

    def originals(own: slice) -> np.ndarray:
        return job.network(np.stack(job.pictures(own)))

    reals = functools.partial(job.parts, "originals", originals)
    real = Real(job, compared, reals) if compared else None
    for k in config.retrieve:
        run = functools.partial(job.parts, "pictures", functools.partial(work, k=k), k)
        for n in config.candidates:

            def made(n: int = n, run: Callable[[], Any] = run) -> Iterator[np.ndarray]:
                return (part["features"][n] for part in run())

            found = real.compared(made) if real is not None else {}
            if embedder is not None:
                values = np.concatenate([part["clip"][n] for part in run()])
                key = clip_scores.key(embedder.name)
                found[key] = interval(values, np.mean, len(values))
            suffix = _suffix(k, n)
            scores |= {f"{name}@{suffix}": score for name, score in found.items()}
        rows = [row for part in run() for row in part["shown"]]
        samples.append([dict(zip(config.candidates, row, strict=True)) for row in rows])
    return Outcome(
        scores,
        [
            Sample(
                text=example.references[0],
                pictures={
                    **{
                        f"after {k}, of {n}": picture
                        for k, row in zip(config.retrieve, rows, strict=True)
                        for n, picture in row.items()
                    },
                    "original": Pillow.fromarray(job.picture(example.picture)),
                },
            )
            for example, *rows in zip(job.examples, *samples, strict=False)
        ],
    )


class Real:
    """What made pictures are compared with: what `metrics` need of it, found once."""

    def __init__(self, job: Job, metrics: set[str], batches: Callable[[], Batches]):
        self.network, self.metrics = job.network, metrics
        if "fid" in metrics:
            self.moments = frechet.moments(batches(), self.network.width)
        if "precision_recall" in metrics:
            self.balls = precision_recall.Balls.around(batches())

    def compared(self, made: Callable[[], Batches]) -> dict[str, Score]:
        """Scores of features of made pictures."""
        network, found = self.network, {}
        if "fid" in self.metrics:
            moments = frechet.subsets(made(), network.width)
            found[network.key] = frechet.score(moments, self.moments)
        if "inception_score" in self.metrics:
            logits = np.concatenate([network.logits(batch) for batch in made()])
            # By other weights than the published ones it is another score.
            of = "" if network.standard else f"_{network.name}"
            found[f"inception_score{of}"] = inception_score.score(logits)
        if "precision_recall" in self.metrics:
            found |= precision_recall.scores(self.balls, made())
        return found


def reconstruction(job: Job) -> Outcome:
    """Pictures through the image tokenizer and back; how much of the codebook they
    use."""
    job.check_side()
    metrics, tokenizer = set(job.config.metrics), job.model.codec.image

    def work(own: slice) -> dict[str, Any]:
        originals = np.stack(job.pictures(own))
        codes = tokenizer.encode(originals)
        made = np.asarray(tokenizer.decode(codes))
        found: dict[str, Any] = {
            "psnr": psnr(originals, made),
            "ssim": ssim(originals, made),
            "codes": codes.reshape(len(codes), -1),
            "shown": [Pillow.fromarray(made[i]) for i in job.shown(own)],
        }
        if "fid" in metrics:
            found |= {"made": job.network(made), "real": job.network(originals)}
        return found

    def run(key: str) -> Iterator[np.ndarray]:
        return (part[key] for part in job.parts("pictures and codes", work))

    values = {key: np.concatenate([*run(key)]) for key in ("psnr", "ssim")}
    scores = {key: interval(x, np.mean, len(x)) for key, x in values.items()}
    used = code_scores(np.concatenate([*run("codes")]), tokenizer.codebook)
    scores |= {f"codes_{key}": score for key, score in used.items()}
    if "fid" in metrics:
        found = Real(job, {"fid"}, lambda: run("real")).compared(lambda: run("made"))
        scores |= {"r" * (key == "fid") + key: score for key, score in found.items()}
    shown = [picture for part in run("shown") for picture in part]
    return Outcome(
        scores,
        [
            Sample(
                text="",
                pictures={
                    "original": Pillow.fromarray(job.picture(example.picture)),
                    "reconstruction": picture,
                },
            )
            for example, picture in zip(job.examples, shown, strict=False)
        ],
    )


def code_scores(codes_NL: np.ndarray, codebook: int) -> dict[str, Score]:
    """`code_use` with intervals over pictures, many in 256 groups. Drawn anew, fewer of
    them differ and use fewer codes: draws are moved, so that their mean is the value.
    """
    n = len(codes_NL)
    groups = min(n, 256)
    index_NL = np.arange(n)[:, None] % groups * codebook + codes_NL
    counts = np.bincount(index_NL.ravel(), minlength=groups * codebook)
    counts_GZ, found = counts.reshape(groups, codebook), {}
    for key, most in code_use(np.ones(codebook)).items():
        score = interval(counts_GZ, lambda x, key=key: code_use(x.sum(0))[key], n)
        score.draws += (shift := score["value"] - score.draws.mean())
        high = min(score["high"] + shift, most)
        found[key] = score
        score |= {"low": round(score["low"] + shift, 5), "high": round(high, 5)}
    return found


def _best(
    drawn: Sequence[Sequence[Pillow.Image]], order: Sequence[Any], n: int
) -> list[Pillow.Image]:
    """Of each prompt's pictures, best first, the best of its first n candidates."""
    found = []
    for pictures, (numbers, _) in zip(drawn, order, strict=True):
        found.append(pictures[next(i for i, c in enumerate(numbers) if c < n)])
    return found


def _suffix(k: int, n: int) -> str:
    return f"{k}" if n == 1 else f"{k}_of_{n}"


def _save(
    folder: Path, examples: Sequence[Example], pictures: Sequence[Pillow.Image]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for example, picture in zip(examples, pictures, strict=True):
        picture.save(folder / f"{example.id.replace('/', '_')}.png", compress_level=1)


def _embedder(job: Job) -> Embedder:
    if (found := job.kept.embedder) is None:
        raise ValueError(
            f"public.metrics has clip_score, and {job.model.system.name} has no "
            "section `retrieval` with an encoder that compares texts with pictures: "
            "give one by --encoder, or leave it out"
        )
    return found
