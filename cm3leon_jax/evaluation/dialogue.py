"""How likely a tuned model holds each of several answers: VisDial's task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cm3leon_jax.data import tasks
from cm3leon_jax.data.documents import Image
from cm3leon_jax.instructed import check_trained, piece
from cm3leon_jax.sampling import rerank
from cm3leon_jax.writer import Telling

TASK = "answer"


def log_likelihoods(
    model: Any,
    pictures: Sequence[np.ndarray],
    questions: Sequence[str],
    options: Sequence[Sequence[str]],
    wording: int,
) -> np.ndarray:
    """log p of each option as the answer to a question about a picture, in nats:
    float64 [questions, options]. `pictures` are uint8 [Y, X, 3].

    Raises ValueError for a checkpoint that cannot answer, and questions with different
    numbers of options.
    """
    writer = model.writer
    check_trained(writer, TASK)
    if len({len(row) for row in options}) != 1:
        raise ValueError("every question needs as many options as the others")
    last = writer.system.sft.autoregressive
    order = "autoregressive" if last else "cm3"
    images = [Image(array) for array in writer.codec.arrays(pictures)]
    asked = [
        tasks.prompt(TASK, {"image": image, "question": question}, wording, order=order)
        for image, question in zip(images, questions, strict=True)
    ]
    every = writer.codec.parts([[*map(piece, parts)] for parts in asked])
    prompts, texts = [], []
    for parts, row in zip(every, options, strict=True):
        telling = Telling(parts=[*parts[:-1]] if last else parts, last=last)
        for option in row:
            # The space before an answer belongs to it, as in training.
            pieces = np.asarray(writer.codec.text.encode(f" {option}"))
            prompts.append(writer.text_form(telling, len(pieces)))
            end = [] if last else [writer.layout.eoss]
            texts.append(np.array([*writer.layout.text_ids(pieces), *end], np.int32))
    found = rerank.log_likelihoods(writer.engine, prompts, texts)
    return found.reshape(len(questions), -1)
