"""The id space: every range round-trips, nothing overlaps, bad ids are named."""

import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax import vocab


@pytest.fixture
def layout():
    return vocab.build(text=300, image=64, classes=7, sentinels=16, total=None)


def test_paper_sizes_fill_the_id_space_exactly():
    layout = vocab.build(text=56_320, image=8_192, classes=0, sentinels=512)
    assert layout.size == 65_152  # 65,028 rounded up to a multiple of 128
    layout = vocab.build(
        text=56_320, image=8_192, classes=150, sentinels=512, total=65_536
    )
    assert layout.size == 65_536 and layout.classes.stop == 65_536


def test_parts_tile_the_id_space(layout):
    specials = [layout.pad, layout.eos, layout.brk, layout.eoss]
    ids = specials + [
        i
        for part in (layout.sentinels, layout.text, layout.image, layout.classes)
        for i in part
    ]
    assert ids == list(range(layout.size)) and layout.size % 128 == 0
    assert specials == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("there", "back", "part"),
    [
        ("text_ids", "pieces", "text"),
        ("image_ids", "codes", "image"),
        ("class_ids", "labels", "classes"),
    ],
)
def test_ids_round_trip(layout, there, back, part):
    count = len(getattr(layout, part))
    own = np.arange(count).reshape(1, -1)
    ids = getattr(layout, there)(own)
    assert ids.dtype == np.int32 and ids.shape == own.shape
    np.testing.assert_array_equal(ids[0], getattr(layout, part))
    np.testing.assert_array_equal(getattr(layout, back)(ids), own)
    assert getattr(layout, there)([]).shape == (0,)
    for bad in (-1, count):
        with pytest.raises(ValueError, match=str(bad)):
            getattr(layout, there)([0, bad])
    for bad in (getattr(layout, part).start - 1, getattr(layout, part).stop):
        with pytest.raises(ValueError, match=str(bad)):
            getattr(layout, back)([bad])
    with pytest.raises(ValueError, match="integers"):
        getattr(layout, there)([0.5])


def test_modality_is_the_same_on_numpy_and_jax(layout):
    ids = np.arange(layout.size, dtype=np.int32)
    expected = np.zeros(layout.size, np.int8)
    expected[layout.text] = vocab.TEXT
    expected[layout.image] = vocab.IMAGE
    expected[layout.classes] = vocab.CLASS
    found = layout.modality(ids)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(layout.modality(jnp.asarray(ids)), expected)


def test_a_layout_is_a_hashable_value(layout):
    again = vocab.build(text=300, image=64, classes=7, sentinels=16)
    assert layout == again and hash(layout) == hash(again)


def test_foreign_layouts_are_the_same_type():
    foreign = vocab.Layout(
        size=65_536,
        pad=1,
        eos=2,
        brk=8_197,
        eoss=8_196,
        sentinels=range(0),
        text=range(8_198, 65_536),
        image=range(4, 8_196),
        classes=range(0),
    )
    np.testing.assert_array_equal(foreign.image_ids([0, 8_191]), [4, 8_195])
    np.testing.assert_array_equal(foreign.modality(np.array([2, 4, 8_197, 9_000])), [
        vocab.SPECIAL, vocab.IMAGE, vocab.SPECIAL, vocab.TEXT
    ])  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"total": 384}, {"total": 500}, {"text": -1}],
)
def test_impossible_sizes_are_refused(change):
    sizes = {"text": 300, "image": 64, "classes": 7, "sentinels": 16, "total": 512}
    with pytest.raises(ValueError, match="vocab"):
        vocab.build(**(sizes | change))


def test_overlaps_are_refused(layout):
    fields = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
    with pytest.raises(ValueError, match="overlap"):
        vocab.Layout(**(fields | {"image": range(layout.text.start, 400)}))
    with pytest.raises(ValueError, match="inside"):
        vocab.Layout(**(fields | {"classes": range(390, layout.size + 1)}))
