"""Tasks of tuned checkpoints: prompts are the beginnings of training samples."""

import jax
import numpy as np
import pytest
import tiny_api
from PIL import Image as Pillow
from tiny_api import CODEC, MASKS, SIDE
from tiny_data import LAYOUT, make_documents, tokenize

from cm3leon_jax.codec import HOLE
from cm3leon_jax.data import controls, tasks
from cm3leon_jax.data.documents import Document, Text
from cm3leon_jax.data.infill import infill
from cm3leon_jax.data.task_templates import BREAK, TASKS
from cm3leon_jax.inputs import touched
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.retrieval.recall import Found
from cm3leon_jax.sampling import prompts
from cm3leon_jax.sampling.sampler import ContrastiveTopK, Sampler
from cm3leon_jax.tokenizers.regions import GREY

EOS, BRK, EOSS, S0 = LAYOUT.eos, LAYOUT.brk, LAYOUT.eoss, LAYOUT.sentinels[0]
LIMIT = 400
RNG = np.random.default_rng(0)
ONE, TWO, THREE = RNG.integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
BOX, REGION = (1, 2, 5, 6), np.zeros((SIDE, SIDE), bool)
REGION[2:6, 1:5] = True
WHY, EDIT = ["why?"], ["make it blue"]
GREYED = np.where(REGION[..., None], np.uint8(GREY), ONE)
LABELS = RNG.integers(0, len(MASKS.classes), (SIDE, SIDE))
COLOURED = controls.class_picture(LABELS, len(MASKS.classes))
# Fields of every task, and how a user asks for it.
SOURCES = {"source": ONE, "reference": ONE, "region": GREYED, "mask": LABELS}
FIELDS = (
    SOURCES
    | {
        "image": TWO,
        "caption": "a red star",
        "question": "what <mask> is it?",
        "context": "the star is large",
        "options": "(A) one (B) two",
        "explanation": "I see a star.",
        "answer": "(A)",
        "instruction": "make it blue",
        "content": "EXIT",
        "objects": [("red star", (1, 2, 5, 6)), ("circle", (0, 0, 8, 8))],
        "strength": "moderately",
    }
    | {kind: ONE for kind in ("edge", "hed", "pose", "depth", "normal", "scribble")}
)
FIELDS["segmentation"] = COLOURED
SCIENCE = ([FIELDS["question"]], [["one", "two"]])


def _control(kind, **options):
    picture = COLOURED if kind == "segmentation" else ONE
    return lambda m, w: m.control(
        [picture], kind, [FIELDS["caption"]], wording=w, **options
    )


CALLS = {
    "text_to_image": lambda m, w: m.text_to_image([FIELDS["caption"]]),
    "caption_short": lambda m, w: m.caption([TWO], wording=w),
    "caption_detailed": lambda m, w: m.caption([TWO], style="detailed", wording=w),
    "caption_long": lambda m, w: m.caption([TWO], style="long", wording=w),
    "answer": lambda m, w: m.answer([TWO], [FIELDS["question"]], wording=w),
    "science": lambda m, w: m.science([TWO], *SCIENCE, contexts=[FIELDS["context"]]),
    "science_cot": lambda m, w: m.explain(
        [TWO], *SCIENCE, contexts=[FIELDS["context"]]
    ),
    "edit": lambda m, w: m.edit([ONE], [FIELDS["instruction"]], wording=w),
    "edit_region": lambda m, w: m.edit(
        [ONE], [FIELDS["instruction"]], regions=[BOX], wording=w
    ),
    "write": lambda m, w: m.write([FIELDS["content"]], wording=w),
    "ground": lambda m, w: m.ground(
        [FIELDS["caption"]], [FIELDS["objects"]], wording=w
    ),
    "segment": lambda m, w: m.segment([TWO], wording=w),
    "variation": lambda m, w: m.variation([ONE], wording=w),
} | {
    name: _control(name.partition("_")[2])
    for name in TASKS
    if name.startswith("control_")
}
CALLS |= {
    f"reference_{kind}": _control(kind, strength=0.6)
    for kind in ("style", "composition", "content")
}


def test_every_task_has_a_method():
    # Infilling needs no words of its own: `tests/test_prompts.py` has its forms.
    assert set(CALLS) == set(TASKS) - {"infill"}


def _sample(task, wording, order="cm3"):
    """A training sample as tokens, where its answer is (or None), and its segments."""
    fields = {name: FIELDS[name] for name in TASKS[task].fields}
    document = tasks.fill(task, fields, wording, order=order, id=task)
    (record,) = tokenize([document], segmentation=MASKS, tasks=tuple(TASKS))
    answer = record.answers[0] + 1 if len(record.answers) else None
    return np.array([EOS, *record.tokens, EOS]), answer, record.bounds + 1


EVERY = [
    (name, wording)
    for name in CALLS
    for wording in range(len(TASKS[name].wordings))
    if name != "text_to_image" or wording == 0  # the others are typed by users
]


@pytest.mark.parametrize("task, wording", EVERY)
def test_prompts_are_beginnings_of_training_samples(task, wording, monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    CALLS[task](model, wording)
    (prompt,) = written.pop()
    full, script = prompt.streams[0], prompt.scripts[0]
    tokens, answer, bounds = _sample(task, wording)
    if TASKS[task].writes_text:
        moved = infill(tokens, [tuple(answer)], LAYOUT)
        np.testing.assert_array_equal(full, moved[: len(full)])
        assert full[-1] == S0 and len(prompt.streams) == 1
        assert moved[len(full) :].tolist() == [*tokens[slice(*answer)], EOSS, EOS]
        assert set(script.tolist()) == {prompts.TEXT}
        return
    np.testing.assert_array_equal(full, tokens[: len(full)])
    assert len(full) == bounds[-1][0] and len(script) == bounds[-1][1] - len(full)
    # The unconditional stream, and between the two the pictures without the words.
    assert all(each is script for each in prompt.scripts)
    if task == "segment":
        assert set(script.tolist()) == {prompts.CLASS} and len(prompt.streams) == 1
        return
    assert prompt.streams[-1].tolist() == [EOS, S0, BRK]
    if task in ("edit", "edit_region"):
        said = TASKS[task].wordings[wording].split(BREAK).index("{instruction}")
        hidden = infill(tokens, [tuple(bounds[said])], LAYOUT)
        np.testing.assert_array_equal(
            prompt.streams[1], hidden[: len(prompt.streams[1])]
        )
        assert prompt.streams[1].tolist()[-3:] == [BRK, S0, BRK]
    assert len(prompt.streams) == (3 if task.startswith("edit") else 2)
    assert set(script.tolist()) == {prompts.IMAGE} or task == "edit_region"


@pytest.mark.parametrize("task", CALLS)
def test_any_task_can_be_asked_for_by_its_fields(task, monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    spec = TASKS[task]
    fields = {name: FIELDS[name] for name in spec.fields}
    later = spec.fields.index(spec.begins or spec.output)
    for name in spec.fields[later:]:
        if name not in spec.images or name == spec.output:
            del fields[name]
    found = model.instruct(task, [fields])
    kind = str if spec.writes_text else Pillow.Image
    kind = np.ndarray if spec.masks else getattr(kind, "Image", kind)
    assert len(found) == 1 and isinstance(found[0], kind)
    ((prompt,),) = written
    tokens, answer, _ = _sample(task, 0)
    if answer is not None:
        tokens = infill(tokens, [tuple(answer)], LAYOUT)
    full = prompt.streams[0]
    np.testing.assert_array_equal(full, tokens[: len(full)])
    assert (len(prompt.streams) == 3) == task.startswith("edit")


@pytest.mark.parametrize("task", ["caption_short", "answer", "science_cot"])
def test_prompts_of_autoregressive_systems(task, monkeypatch):
    written = tiny_api.spy(monkeypatch, text=" it is.")
    model = tiny_api.model(LIMIT, tasks=TASKS, autoregressive=True)
    found = CALLS[task](model, 0)
    (prompt,) = written.pop()
    tokens, answer, _ = _sample(task, 0, "autoregressive")
    assert answer is None
    full = prompt.streams[0]
    np.testing.assert_array_equal(full, tokens[: len(full)])
    assert set(prompt.scripts[0].tolist()) == {prompts.FREE}
    rest = bytes(LAYOUT.pieces(tokens[len(full) : -1]).tolist()).decode()
    said = {"caption_short": "a red star", "answer": " (A).", "science_cot": " I see"}
    assert rest.startswith(said[task])
    # What follows the answer is not part of it.
    ends = {"caption_short": "it is.", "answer": "it is", "science_cot": ("it is", "")}
    assert found == [ends[task]]


def test_a_guidance_scale_for_each_step_or_one_for_all(monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    for guidance, streams in ((1.0, 1), (2.0, 2), ((2.0, 3.0), 3)):
        sampler = Sampler(guidance=guidance)
        model.edit([ONE], ["a"], sampler=sampler)
        model.control([ONE], "edge", ["a"], sampler=sampler)
        for (prompt,) in (written.pop(), written.pop()):
            assert len(prompt.streams) == streams
    with pytest.raises(ValueError, match="over 3 streams, but the prompt has 2"):
        model.write(["a"], sampler=Sampler(guidance=(2.0, 3.0)))


def test_control_without_words_hides_them_as_training_does(monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    model.instruct("control_edge", [{"edge": ONE, "caption": None}])
    (asked,) = written.pop()
    model.control([ONE], "edge")
    (prompt,) = written.pop()
    for same, other in zip(asked.streams, prompt.streams, strict=True):
        np.testing.assert_array_equal(same, other)
    tokens, _, bounds = _sample("control_edge", 0)
    hidden = infill(tokens, [tuple(bounds[2])], LAYOUT)
    full = prompt.streams[0]
    np.testing.assert_array_equal(full, hidden[: len(full)])
    assert full.tolist()[-3:] == [BRK, S0, BRK] and len(prompt.streams) == 2


def test_what_is_outside_a_region_is_copied(monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    as_image = Pillow.fromarray(REGION)
    for region in (BOX, REGION, as_image, np.array(BOX)):
        model.edit([ONE], ["make it blue"], regions=[region])
        (prompt,) = written.pop()
        script = prompt.scripts[0].reshape(CODEC.image.grid)
        cells = touched(REGION, CODEC.image.grid)
        codes = LAYOUT.image_ids(CODEC.image.encode(ONE[None])[0])
        assert (script[cells] == prompts.IMAGE).all() and cells.any()
        np.testing.assert_array_equal(script[~cells], codes[~cells])


def _decoder():
    config = DecoderConfig(
        vocab=LAYOUT.size, layers=1, width=16, heads=2, mlp=16, length=LIMIT
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: jax.numpy.asarray(rng.normal(0, 0.3, w.shape), w.dtype),
        abstract(config),
    )


@pytest.mark.parametrize("last", [False, True])
def test_the_other_stream_of_a_text_sees_grey_pictures(last, monkeypatch):
    """So answers are guided, or contrasted, away from what questions alone suggest."""
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS, autoregressive=last)
    grey = np.full_like(ONE, GREY)
    contrast = ContrastiveTopK(alpha=0.1, k=2, amateur_temperature=1.0)
    model.answer([grey], WHY)
    for sampler in (Sampler(guidance=2.0), Sampler(contrastive=contrast)):
        model.answer([ONE], WHY, sampler=sampler)
    ((unseen,), *others) = written
    for (prompt,) in others:
        assert not np.array_equal(prompt.streams[0], unseen.streams[0])
        np.testing.assert_array_equal(prompt.streams[1], unseen.streams[0])
    with pytest.raises(ValueError, match="over 3 streams, but the prompt has 2"):
        model.answer([ONE], WHY, sampler=Sampler(guidance=(1.5, 2.0)))
    with pytest.raises(ValueError, match="nothing to guide in infilling"):
        model.infill([Document((Text(HOLE),))], sampler=sampler)


def test_guidance_of_nothing_writes_what_is_said_of_a_grey_picture():
    model = tiny_api.model(LIMIT, tasks=TASKS, decoder=_decoder())
    blind = Sampler(temperature=0.0, guidance=0.0)
    told = model.answer([ONE, TWO], [*WHY, *WHY], sampler=blind, max_text=6)
    greedy = Sampler(temperature=0.0)
    (grey,) = model.answer([np.full_like(ONE, GREY)], WHY, sampler=greedy, max_text=6)
    assert told == [grey, grey]


def test_a_real_decoder_writes_what_the_scripts_say(monkeypatch):
    model = tiny_api.model(LIMIT, tasks=TASKS, decoder=_decoder())
    painted = []
    monkeypatch.setattr(
        CODEC, "paint", lambda codes: painted.append(codes) or [None] * len(codes)
    )
    model.edit([ONE, TWO], [*EDIT, "a"], regions=[BOX, REGION], seed=1)  # 3 streams
    cells = touched(REGION, CODEC.image.grid)
    for given, codes in zip((ONE, TWO), painted.pop(), strict=True):
        own = CODEC.image.encode(given[None])[0]
        np.testing.assert_array_equal(codes[~cells], own[~cells])
        assert (codes[cells] != own[cells]).any()
    (mask,) = model.segment([ONE], sampler=Sampler(temperature=2.0))
    assert set(np.unique(mask)) <= set(range(len(MASKS.classes)))
    for text in model.answer([ONE, TWO], [*WHY, *WHY], max_text=4, candidates=2):
        assert isinstance(text, str)


def test_segmentation_there_and_back(monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    (mask,) = model.segment([TWO])
    assert mask.shape == (SIDE, SIDE) and (mask == 1).all()  # as the spy writes
    assert model.classes == MASKS.classes and model.classes[0] == "background"
    written.clear()
    # Labels are drawn in the palette of training, at any size.
    large = LABELS.repeat(3, axis=0).repeat(3, axis=1)
    for given in (COLOURED, LABELS, LABELS.astype(np.uint8), large):
        model.control([given], "segmentation", ["a"])
    first, *others = [prompt.streams[0].tolist() for (prompt,) in written]
    assert all(other == first for other in others)


def test_documents_stand_before_instructions(monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    documents = make_documents(2)
    before = [token for ids in CODEC.ids(documents) for token in (*ids.tolist(), BRK)]
    for call in (
        lambda **more: model.edit([ONE], ["make it blue"], **more),
        lambda **more: model.answer([ONE], ["why?"], max_text=8, **more),
        lambda **more: model.segment([ONE], **more),
    ):
        call()
        call(retrieve=[documents])
        (alone,), (whole,) = written
        written.clear()
        for short, long in zip(alone.streams, whole.streams, strict=True):
            assert long.tolist() == [EOS, *before, *short.tolist()[1:]]


def test_questions_ask_the_memory_by_word_and_picture(monkeypatch):
    tiny_api.spy(monkeypatch)

    class Asked:
        calls = []

        def look(self, texts, images, k):
            self.calls.append((texts, [image is not None for image in images], k))
            return [Found([], 0) for _ in texts]

    model = tiny_api.model(LIMIT, Asked(), TASKS)
    model.answer([ONE], ["why?"], retrieve=1)
    model.edit([ONE], ["make it blue"], retrieve=1)
    model.ground(["a star"], [[("a star", BOX)]], retrieve=1)
    model.control([ONE], "style", ["a star"], retrieve=1)
    model.variation([ONE], retrieve=1)
    assert Asked.calls == [
        (["why?"], [True], 1),
        (["make it blue"], [True], 1),
        (["a star"], [False], 1),
        (["a star"], [True], 1),
        ([None], [True], 1),
    ]


def test_texts_that_were_cut_say_so(monkeypatch):
    tiny_api.spy(monkeypatch, text="four")
    model = tiny_api.model(LIMIT, tasks=TASKS)
    assert model.caption([ONE], max_text=5) == ["four"]
    assert model.caption([ONE], max_text=4) == ["four…"]
    assert model.answer([ONE], ["why?"], max_text=4) == ["four…"]
    untuned = tiny_api.model(LIMIT)
    assert untuned.caption([ONE], max_text=4) == ["four…"]


def test_explanations_end_in_a_choice(monkeypatch):
    model = tiny_api.model(LIMIT, tasks=TASKS)
    ask = ([ONE], ["which?"], [["this", "that"]])
    tiny_api.spy(monkeypatch, text=" I see it. So the answer is (B)")
    assert model.explain(*ask) == [("I see it.", "(B)")]
    tiny_api.spy(monkeypatch, text=" I see it and")
    assert model.explain(*ask) == [("I see it and", "")]
    assert model.explain(*ask, max_text=9) == [("I see it and…", "")]


@pytest.mark.parametrize("task", [name for name in CALLS if name != "text_to_image"])
def test_tasks_that_were_not_trained_are_refused(task, monkeypatch):
    tiny_api.spy(monkeypatch)
    if task != "caption_short":  # every checkpoint can
        with pytest.raises(ValueError, match=f"not trained on the task '{task}', but"):
            CALLS[task](tiny_api.model(LIMIT), 0)
    others = tiny_api.model(LIMIT, tasks=set(TASKS) - {task})
    with pytest.raises(ValueError, match="add it to sft.tasks"):
        CALLS[task](others, 1 if task == "caption_short" else 0)
