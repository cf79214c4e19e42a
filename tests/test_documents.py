"""Documents survive their bytes; other bytes are refused by name."""

import msgpack
import numpy as np
import pytest

from cm3leon_jax.data import documents
from cm3leon_jax.data.documents import Document, Image, Mask, Text


def _same(a, b):
    assert type(a) is type(b)
    if isinstance(a, Text):
        assert a == b
        return
    for x, y in ((a.array, b.array), (a.codes, b.codes)):
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_array_equal(x, y)


def test_documents_survive_their_bytes():
    rng = np.random.default_rng(0)
    segments = (
        Text("zwei Äpfel 🍎\n"),
        Image(rng.integers(0, 256, (5, 7, 3), np.uint8)),
        Image(None, rng.integers(0, 9, (2, 3), np.int32)),
        Image(np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), np.int32)),
        Mask(rng.integers(0, 20, (4, 6))),
        Mask(rng.integers(0, 65_536, (4, 6))),
        Mask(None, np.ones((2, 2), np.int32)),
    )
    document = Document(segments, "one/1", {"licence": "CC0", "boxes": [[0, 1, 2, 3]]})
    again = documents.from_bytes(documents.to_bytes(document))
    assert (again.id, again.metadata) == (document.id, document.metadata)
    assert len(again.segments) == len(segments)
    for a, b in zip(segments, again.segments, strict=True):
        _same(a, b)


@pytest.mark.parametrize("case", ["noise", "list", "schema", "keys", "kind", "png"])
def test_other_bytes_are_a_clear_error(case):
    good = msgpack.unpackb(
        documents.to_bytes(Document((Image(np.zeros((2, 2, 3), np.uint8)),), "x"))
    )
    if case == "noise":
        data = b"\xc1\x00nonsense"
    elif case == "list":
        data = msgpack.packb([1, 2])
    else:
        if case == "schema":
            good["schema"] = "somebody/else/9"
        elif case == "keys":
            del good["segments"]
        elif case == "kind":
            good["segments"][0]["kind"] = "sound"
        else:
            good["segments"][0]["png"] = good["segments"][0]["png"][:40]
        data = msgpack.packb(good)
    with pytest.raises(ValueError, match="record|kind|schema"):
        documents.from_bytes(data)


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        Image(np.zeros((2, 2, 3), np.float32))
    with pytest.raises(ValueError, match="int32"):
        Image(None, np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="array or codes"):
        Mask()
    with pytest.raises(ValueError, match="segment"):
        Document(("a caption",))


def test_a_document_gives_its_texts_and_its_pixels_in_order():
    pixels = [np.full((4, 4, 3), i, np.uint8) for i in range(2)]
    codes = Image(codes=np.zeros((2, 2), np.int32))
    parts = (Text("a"), Image(pixels[0]), codes, Text("b"), Image(pixels[1]))
    document = Document(parts)
    assert document.texts == ["a", "b"]
    assert [int(x[0, 0, 0]) for x in document.pictures] == [0, 1]
    assert Document(()).texts == Document(()).pictures == []
