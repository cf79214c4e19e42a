"""Answers that are kept: everything comes back, and every cause changes the name."""

import threading

import numpy as np
import pytest
from PIL import Image as Pillow

from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.evaluation import kept
from cm3leon_jax.evaluation.kept import Kept, Parts, digest
from cm3leon_jax.sampling.sampler import Sampler

GREY = np.full((4, 4, 3), 128, np.uint8)


def test_what_is_packed_comes_back():
    value = {
        "texts": ("a", "…"),
        "numbers": (1, 2.5, True, None),
        "arrays": (np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 2))),
        8: Pillow.fromarray(GREY),
        "document": Document((Text("x"), Image(GREY)), id="d", metadata={"a": 1}),
    }
    found = kept.unpack(kept.pack(value))
    assert found["texts"] == value["texts"] and found["numbers"] == value["numbers"]
    for a, b in zip(found["arrays"], value["arrays"], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert found[8].tobytes() == GREY.tobytes() and found[8].mode == "RGB"
    assert digest(found["document"]) == digest(value["document"])
    with pytest.raises(ValueError, match="object cannot be kept"):
        kept.pack(object())


def test_a_digest_tells_everything_apart():
    other = GREY.copy()
    other[0, 0, 0] += 1
    values = [
        *(
            1,
            1.5,
            "1",
            None,
            True,
            (1,),
            ((1,),),
            (1, 2),
            ((1,), 2),
            {"a": 1},
            {"a": 2},
        ),
        *(GREY, other, GREY.astype(np.int32), GREY.reshape(4, 12), Sampler()),
        *(Sampler(top_p=0.5), Document((Text("a"),)), Document((Text("a"),), id="a")),
        *(Document((Text("a"), Image(GREY))), Document((Text("a"), Image(other)))),
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(Pillow.fromarray(GREY)) == digest(GREY)
    assert digest(np.float64(0.5)) == digest(0.5)


class Model:
    memory = None

    def __init__(self):
        self.calls = []

    def caption(self, images, *, style="short", numbers, retrieve=0):
        self.calls.append((list(numbers), retrieve))
        return [
            f"{style} {image.sum()} {n}"
            for image, n in zip(images, numbers, strict=True)
        ]

    def control(self, images, kind, prompts, *, numbers, sampler):
        return [
            f"{kind} {p} {n} {len(sampler)}"
            for p, n in zip(prompts, numbers, strict=True)
        ]

    def other(self):
        return "not kept"


@pytest.fixture
def ask(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "PART", 2)

    def make(identity="a"):
        model = Model()
        return model, Kept(model, Parts(tmp_path), identity)

    return make


def test_lists_are_asked_for_in_parts_and_once(ask):
    images = [GREY + i for i in range(5)]
    documents = [[Document((Text(str(i)),))] for i in range(5)]
    model, one = ask()
    first = one.caption(images, retrieve=documents)
    assert first == [f"short {GREY.sum() + 48 * i} {i}" for i in range(5)]
    numbers = [[0, 1], [2, 3], [4]]
    assert model.calls == [(n, [documents[i] for i in n]) for n in numbers]
    model, again = ask()
    assert again.caption(images, retrieve=documents) == first and not model.calls
    assert again.other() == "not kept"
    made = one.control(images, "edge", list("abcde"), sampler=(1, 2, 3, 4, 5))
    assert made == [f"edge {p} {i} 5" for i, p in enumerate("abcde")]
    assert one.caption(images[:1], numbers=[7]) == [f"short {GREY.sum()} 7"]


@pytest.mark.parametrize(
    "change",
    [{"style": "long"}, {"numbers": [3, 4]}, {"retrieve": 2}, {"identity": "b"}],
)
def test_every_cause_is_asked_about_anew(ask, change):
    images = [GREY, GREY]
    _, one = ask()
    one.caption(images)
    model, other = ask(change.get("identity", "a"))
    options = {key: x for key, x in change.items() if key != "identity"}
    other.caption(images, **options)
    assert len(model.calls) == 1


def test_the_processes_of_a_job_share_the_parts(tmp_path, monkeypatch):
    barrier, here = threading.Barrier(2, timeout=60), threading.local()
    monkeypatch.setattr(kept.jax, "process_count", lambda: 2)
    monkeypatch.setattr(kept.jax, "process_index", lambda: here.index)
    monkeypatch.setattr(kept, "together", lambda _: barrier.wait())
    monkeypatch.setattr(kept, "PART", 2)
    images = [GREY + i for i in range(5)]
    models, found = [Model(), Model()], {}

    def process(index):
        here.index = index
        found[index] = Kept(models[index], Parts(tmp_path), "a").caption(images)

    threads = [threading.Thread(target=process, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[n for n, _ in model.calls] for model in models] == [
        [[0, 1], [4]],
        [[2, 3]],
    ]
    assert found[0] == found[1] == Model().caption(images, numbers=range(5))


def test_a_damaged_part_is_named(ask, tmp_path):
    _, one = ask()
    one.caption([GREY])
    (file,) = tmp_path.glob("*.part")
    file.write_bytes(file.read_bytes()[:3])
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*: delete it"):
        one.caption([GREY])
