"""Scores of edits: has what was asked for changed, and everything else stayed?

`changed`: of the places that an instruction changes (for a new background, the
background) the share that are exactly as it says. `kept`: F1 of the objects in all
other places, an object that nobody asked for is wrong; `kept_background`: the share of
backgrounds that stay. Each also by kind of edit, for instructions that mean an object
by where it is (`_spatial`), and for those that mean several (`_several`).
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data import shape_tasks
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shapes import ShapesConfig
from cm3leon_jax.evaluation import oracle, scenes
from cm3leon_jax.evaluation.examples import asked, column, enough, evaluator, picture
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, Score
from cm3leon_jax.evaluation.scenes import Objects

_BACKGROUND = "background"  # a kind, and what it changes


def edit(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Pictures and instructions alone."""
    painted = asked(
        documents,
        lambda given, wording: model.edit(
            given["source"], given["instruction"], wording=wording, seed=seed
        ),
    )
    return outcome(scenes.world_of(model), documents, painted)


def edit_region(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Within a box around what is to change: all codes outside it are copied, so
    `kept` tells of objects in the box's cells and of the image tokenizer. Examples that
    do not fit into the context are left out: `left_out` of each score."""
    fitting = [document for document in documents if _fits(model, document)]
    painted = asked(
        fitting,
        lambda given, wording: model.edit(
            given["source"],
            given["instruction"],
            regions=[tuple(d.metadata["region"]) for d in given["example"]],
            wording=wording,
            seed=seed,
        ),
    )
    found = outcome(scenes.world_of(model), fitting, painted)
    scenes.partial(found.scores, documents, fitting)
    return found


def two_edits(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Two edits in one instruction, where training has one: `changed` and `kept` as of
    one, `first` and `second`: the share of places right of that edit, in the order of
    the instruction; `both`: of pictures with all of them right."""
    world = scenes.world_of(model)
    made = shape_tasks.two_edits(world, "test")
    some = enough(model, "two_edits", made, len(documents), changes)
    images, texts = column(some, "source"), column(some, "instruction")
    painted = model.edit(images, texts, wording=0, seed=seed)
    whole = outcome(world, some, painted)
    rights = []
    for document, image in zip(some, painted, strict=True):
        found = oracle.parse(world, np.asarray(image))
        wanted = frozenset(scenes.shown(document, "target_scene").objects)
        parts = document.metadata["edit"]["parts"]
        hits = [[_at(wanted, c) == _at(found, c) for c in part] for part in parts]
        rights.append([(sum(part), len(part)) for part in hits])
    counts = np.array(rights)  # [B, 2, 2]: of the first and second edit, right and all
    names = ("changed", "kept", "changed_spatial", "kept_background")
    scores = {name: whole.scores[name] for name in names if name in whole.scores}
    for name, part in (("first", counts[:, 0]), ("second", counts[:, 1])):
        scores[name] = scenes.ratio(part)
    scores["both"] = scenes.share((counts[..., 0] == counts[..., 1]).all(1))
    return Outcome(scores, whole.samples)


def untaught_edits(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Edits of kinds that no training example has, in words that it has."""
    world = scenes.world_of(model)
    made = shape_tasks.untaught_edits(world, "test")
    some = enough(model, "untaught_edits", made, len(documents), changes)
    images, texts = column(some, "source"), column(some, "instruction")
    return outcome(world, some, model.edit(images, texts, wording=0, seed=seed))


def outcome(
    world: ShapesConfig, documents: Sequence[Document], painted: Sequence[Pillow.Image]
) -> Outcome:
    """Scores and samples of edited pictures."""
    found = [oracle.parse(world, np.asarray(image)) for image in painted]
    grounds = [oracle.background(world, np.asarray(image)) for image in painted]
    changed, kept, stays = [], [], []
    for document, objects, ground in zip(documents, found, grounds, strict=True):
        before = scenes.shown(document)
        after = scenes.shown(document, "target_scene")
        facts = document.metadata["edit"]
        rights = [
            _at(frozenset(after.objects), cell) == _at(objects, cell)
            for cell in facts["cells"]
        ]
        new = facts["kind"] == _BACKGROUND
        changed.append([ground == after.background] if new else rights)
        cells = set(facts["kept"])
        kept.append(
            tuple(
                frozenset(o for o in some if o.cell in cells)
                for some in (frozenset(before.objects), objects)
            )
        )
        stays.append(ground == after.background)
    scores = _scores(documents, changed, kept, stays)
    sources = column(documents, "source")
    truth = column(documents, "image")
    samples = []
    for i, document in enumerate(documents):
        wanted = frozenset(scenes.shown(document, "target_scene").objects)
        note = scenes.difference(wanted, found[i])
        shown = {"source": picture(sources[i]), "edited": painted[i]}
        samples.append(
            Sample(
                text=column([document], "instruction")[0],
                pictures=shown | {"wanted": picture(truth[i])},
                ok=found[i] == wanted and stays[i],
                note=note if stays[i] else f"{note}; background: {grounds[i]}",
            )
        )
    return Outcome(scores, samples)


def changes(document: Document) -> int:
    """The places that an edit changes."""
    return max(len(document.metadata["edit"]["cells"]), 1)


def _fits(model: CM3Leon, document: Document) -> bool:
    """Whether the context holds an example, its `<break>`s and the first `<eos>`."""
    texts = sum(len(model.codec.pieces(text, 0)) for text in document.texts)
    length = texts + len(document.pictures) * model.codec.image_tokens
    return length + len(document.segments) <= model.system.decoder_config.length


def _at(objects: Objects, cell: int) -> Objects:
    return frozenset(o for o in objects if o.cell == cell)


def _scores(
    documents: Sequence[Document],
    changed: Sequence[list[bool]],
    kept: Sequence[tuple],
    stays: Sequence[bool],
) -> dict[str, Score]:
    facts = [d.metadata["edit"] for d in documents]
    groups = {"": np.full(len(facts), True)}
    for kind in sorted({fact["kind"] for fact in facts}):
        groups[f"_{kind}"] = np.array([fact["kind"] == kind for fact in facts])
    for name in ("spatial", "several"):
        groups[f"_{name}"] = np.array([fact[name] for fact in facts])
    arrangements = scenes.wanted(documents)
    scores: dict[str, Score] = {}
    for name, mine in groups.items():
        places = np.flatnonzero(mine).tolist()
        if not places:
            continue
        counts = np.array([(sum(changed[i]), len(changed[i])) for i in places])
        scores[f"changed{name}"] = scenes.ratio(counts)
        rest = [kept[i] for i in places]
        if any(before or after for before, after in rest):
            scores[f"kept{name}"] = scenes.f1(
                *scenes.columns(rest), [arrangements[i] for i in places]
            )
    both = zip(stays, facts, strict=True)
    others = [x for x, fact in both if fact["kind"] != _BACKGROUND]
    if others:
        scores["kept_background"] = scenes.share(others)
    return scores


_MAIN = ("changed", "kept")
TASKS: dict[str, Evaluator] = {
    "edit": evaluator("edit", edit, changes, again=_MAIN),
    "edit_region": evaluator("edit_region", edit_region, changes, again=_MAIN),
    "two_edits": two_edits,
    "untaught_edits": untaught_edits,
}
