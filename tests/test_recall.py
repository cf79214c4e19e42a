"""The memory at inference: by text, by picture, by both, and what is passed over."""

import numpy as np
import pytest

from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.retrieval import bank_build
from cm3leon_jax.retrieval.recall import Memory


class Letters:
    """An encoder of two directions a document: its first letter, its brightness."""

    name, size = "letters", 30

    def texts(self, texts):
        rows = np.eye(self.size, dtype=np.float32)
        return np.stack([rows[ord(text[0]) - ord("a")] for text in texts])

    def images(self, images):
        made = np.zeros((len(images), self.size), np.float32)
        made[:, 26] = 1
        made[:, 27] = [np.mean(x) / 255 for x in images]
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    def documents(self, documents):
        texts = self.texts([d.segments[0].text for d in documents])
        images = self.images([d.segments[1].array for d in documents])
        # Signatures that find nothing: a query must not be one.
        return ((texts + images) / np.sqrt(2)).astype(np.float32), -images


def picture(level):
    return np.full((8, 8, 3), level, np.uint8)


def test_the_memory_finds_by_text_by_picture_and_by_both(tmp_path):
    documents = [
        Document((Text(letter), Image(picture(level))), id=f"{letter}{level}")
        for letter, level in zip("aabbc", (0, 250, 100, 101, 200), strict=True)
    ]
    bank = bank_build.build(tmp_path, Letters(), documents)
    memory = Memory(bank, Letters(), skip_above=0.995)
    assert len(memory) == 5 and memory.ids == [d.id for d in documents]
    black, white = picture(0), picture(255)

    def ids(*questions, k=2):
        found = memory.find(*zip(*questions, strict=True), k)
        return [[document.id for document in row] for row in found]

    by_text, by_picture, both = ids(("a", None), (None, white), ("a", black))
    assert sorted(by_text) == ["a0", "a250"]
    assert by_picture == ["a250", "c200"] and both == ["a0", "a250"]
    # The two pictures of b are near-duplicates of each other: one of them is enough.
    ((first, second),) = ids(("b", None))
    assert first in ("b100", "b101") and second[0] != "b"
    # All that is alike counts once, then there is no more.
    assert len(ids(("c", None), k=9)[0]) == 4
    assert [found.alike for found in memory.look(["c"], [None], 9)] == [1]
    extra = Document((Text("z"), Image(black)), id="z")
    memory.add([extra])
    memory.add([])
    assert ids(("z", None), k=1) == [["z"]] and memory.ids[-1] == "z"
    memory.remove(["a0"])
    assert "a0" not in memory.ids and ids(("a", None), k=1) == [["a250"]]
    for question, message in (
        ((None, None), "query 0 is empty"),
        (("  ", None), "0 is"),
    ):
        with pytest.raises(ValueError, match=message):
            ids(question)
    with pytest.raises(ValueError, match="k=0"):
        ids(("a", None), k=0)
    other = Letters()
    other.name = "others"
    with pytest.raises(ValueError, match="made with encoder letters"):
        Memory(bank, other, skip_above=0.9)
    with pytest.raises(FileNotFoundError):
        Memory.load(tmp_path, Letters(), skip_above=None)
    (tmp_path / "calibration.json").write_text('{"skip_above": 0.25}')
    assert Memory.load(tmp_path, Letters(), skip_above=None).skip_above == 0.25
    assert Memory.load(tmp_path, Letters(), skip_above=0.5).skip_above == 0.5


def test_changes_that_are_not_kept_stay_in_memory(tmp_path):
    documents = [
        Document((Text(letter), Image(picture(level))), id=letter)
        for letter, level in (("a", 0), ("b", 120), ("c", 250))
    ]
    bank_build.build(tmp_path, Letters(), documents)
    memory = Memory.load(tmp_path, Letters(), skip_above=0.999)
    memory.remove(["a"], keep=False)
    assert memory.ids == ["b", "c"]
    with pytest.raises(ValueError, match="keep=False"):
        memory.remove(["b"])
    memory.remove(["b", "c"], keep=False)
    with pytest.raises(ValueError, match="is empty: all of it was removed"):
        memory.find(["a"], [None], 1)
    memory.add(documents[:1], keep=False)
    assert [d.id for d in memory.find(["b"], [None], 2)[0]] == ["a"]
    again = Memory.load(tmp_path, Letters(), skip_above=0.999)
    assert again.ids == ["a", "b", "c"]
