"""Scores of the tasks that write text: answers, choices, captions of three lengths.

Captions are read back by the oracle. The short form names colours and shapes only
(`pairs`), the other two every fact (`objects`).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shapes import CELL_NAMES, SIZE_WORDS, ShapesConfig
from cm3leon_jax.evaluation import hallucination, oracle, scenes, shapes
from cm3leon_jax.evaluation.examples import (
    UNSEEN,
    asked,
    column,
    drawn,
    evaluator,
    objects,
    one,
    picture,
)
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, Score

_OPTION = re.compile(r"\([A-Z]\) (.*?)(?= \([A-Z]\) |$)")
_KEYS = {  # of what is right in captions of each form, and of what is made up
    "short": ("pairs", "hallucinated_pairs"),
    "detailed": ("objects", "hallucinated"),
    "long": ("objects_long", "hallucinated_long"),
}
FORMS = tuple(_KEYS)
_SENTENCE = re.compile(r"[.!?](?:\s|$)")


def _answers(
    documents: Sequence[Document], texts: Sequence[str], notes: Sequence[str]
) -> Outcome:
    """`accuracy`: exactly the right answer, but for capitals and a full stop; and
    `accuracy_KIND` of every kind of question."""
    truth = [d.metadata["answer_text"] for d in documents]
    right = np.array(
        [_plain(a) == _plain(b) for a, b in zip(texts, truth, strict=True)]
    )
    kinds = np.array([d.metadata["question_kind"] for d in documents])
    scores = {"accuracy": scenes.share(right)}
    for kind in sorted(set(kinds.tolist())):
        scores[f"accuracy_{kind}"] = scenes.share(right[kinds == kind])
    pictures = column(documents, "image")
    samples = [
        Sample(
            text=f"{d.metadata['question']} — {text}",
            pictures={"picture": picture(shown)},
            ok=bool(ok),
            note=note if ok else f"right: {wanted}. {note}".strip(),
        )
        for d, text, shown, ok, wanted, note in zip(
            documents, texts, pictures, right, truth, notes, strict=True
        )
    ]
    return Outcome(scores, samples)


def answer(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Questions about pictures, in the three forms of the template."""
    texts = asked(
        documents,
        lambda given, wording: model.answer(
            given["image"], given["question"], wording=wording, seed=seed
        ),
    )
    return _answers(documents, texts, [""] * len(texts))


def science(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """The same with a choice of answers."""
    texts = _chosen(documents, model.science, seed)
    return _answers(documents, texts, [""] * len(texts))


def science_cot(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """And thought out first; an explanation without an end has no answer."""
    both = _chosen(documents, model.explain, seed)
    return _answers(documents, [b for _, b in both], [a for a, _ in both])


def _chosen(documents: Sequence[Document], ask: Callable, seed: int) -> list[Any]:
    def work(given: dict[str, list], _: int) -> list[Any]:
        choices = [_OPTION.findall(text) for text in given["options"]]
        how: dict[str, Any] = {"contexts": given["context"], "seed": seed}
        return ask(given["image"], given["question"], choices, **how)

    return asked(documents, work)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def caption(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Captions of three lengths, of scenes that have as many objects as `documents`.

    `objects` (detailed), `objects_long`: F1 over exact objects; `pairs`: F1 over the
    colours and shapes of the short one. `style`: captions of the form that was asked
    for, by `form_of`. `length`: scenes whose short caption is shorter than the
    detailed one, and that than the long one. `hallucinated`, `hallucinated_pairs`,
    `hallucinated_long`: of the objects that captions name, those that no picture
    shows; less is better. Of a checkpoint that was tuned on some of the lengths, these
    alone; one that was not tuned on captions is asked and scored as before tuning.
    """
    forms = [form for form in FORMS if f"caption_{form}" in model.writer.tasks]
    if not forms:
        return shapes.caption(model, documents, seed)
    scores: dict[str, Score] = {}
    samples: list[Sample] = []
    world, least = scenes.world_of(model), len(documents)
    for unseen, suffix in ((False, ""), (True, f"_{UNSEEN}")):
        sets = {
            form: drawn(model, f"caption_{form}", least, objects, unseen)
            for form in forms
        }
        texts = {
            form: _captions(model, mine, form, seed) for form, mine in sets.items()
        }
        for form, mine in sets.items():
            found = [_named(world, form, text) for text in texts[form]]
            truth = [_shown(world, form, document) for document in mine]
            key, wrong = _KEYS[form]
            scores[key + suffix] = scenes.f1(truth, found, scenes.wanted(mine))
            if not unseen:
                made_up = hallucination.scores(found, truth)
                scores[wrong] = made_up["hallucinated"]
                if form == "detailed" or len(forms) == 1:
                    shown = [picture(x) for x in column(mine, "image")]
                    samples = scenes.samples(texts[form], shown, truth, found)
                if form == "detailed" and len(forms) == len(FORMS):
                    scores["length"] = _in_order(model, mine, texts[form], seed)
        every = [form_of(world, text) == form for form in forms for text in texts[form]]
        scores["style" + suffix] = scenes.share(every)
    first = {key: scores.pop(key) for key in ("objects",) if key in scores}
    return Outcome(first | scores, samples)


def _in_order(
    model: CM3Leon, documents: Sequence[Document], detailed: Sequence[str], seed: int
) -> Score:
    """How often the detailed caption of a picture is between the two others."""
    short, long = (_captions(model, documents, form, seed) for form in FORMS[::2])
    lengths = [[len(text.split()) for text in x] for x in (short, detailed, long)]
    return scenes.share([a < b < c for a, b, c in zip(*lengths, strict=True)])


def form_of(world: ShapesConfig, text: str) -> str:
    """ "long" for several sentences, "short" for one without a place or a size."""
    if len(_SENTENCE.findall(text)) > 1:
        return "long"
    words = [*CELL_NAMES[world.layout], *(w for x in SIZE_WORDS.values() for w in x)]
    told = re.search(rf"\b({'|'.join(words)})\b", text)
    return "detailed" if told else "short"


def _captions(
    model: CM3Leon, documents: Sequence[Document], form: str, seed: int
) -> list[str]:
    """Of the pictures of these examples, which may be of another form."""
    if documents[0].metadata["task"] != f"caption_{form}":
        images = column(documents, "image")
        return model.caption(images, style=form, seed=seed)
    return asked(
        documents,
        lambda given, wording: model.caption(
            given["image"], style=form, wording=wording, seed=seed
        ),
    )


def _named(world: ShapesConfig, form: str, text: str) -> frozenset:
    if form == "short":
        return _numbered(oracle.parse_pairs(text))
    return oracle.parse_caption(world, text)


def _shown(world: ShapesConfig, form: str, document: Document) -> frozenset:
    truth = scenes.shown(document).objects
    if form == "short":
        return _numbered(Counter((o.colour, o.shape) for o in truth))
    return frozenset(truth)


def _numbered(pairs: Counter) -> frozenset:
    """What occurs twice is two."""
    return frozenset((*pair, i) for pair, n in pairs.items() for i in range(n))


TASKS: dict[str, Evaluator] = {
    "caption": caption,
    "answer": evaluator("answer", answer, one, again=("accuracy",)),
    "science": evaluator("science", science, one),
    "science_cot": evaluator("science_cot", science_cot, one),
}
