"""Documents with holes, pictures and masks of the outside world, as ids and back."""

import jax
import numpy as np
import pytest
from PIL import Image as Pillow

from cm3leon_jax import vocab
from cm3leon_jax.codec import HOLE, Codec, holed, joined
from cm3leon_jax.data import infill
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.inputs import touched
from cm3leon_jax.models import vqgan
from cm3leon_jax.sampling import prompts
from cm3leon_jax.tokenizers import regions, text
from cm3leon_jax.tokenizers.image import ImageTokenizer

CAPTIONS = [
    "a large red circle at the top left, a small blue square at the bottom",
    "a black picture with a large yellow triangle and a small red square",
    "a small blue cross at the top right",
]
PIECES = 310


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A trained text tokenizer, an image tokenizer that has learned nothing."""
    path = tmp_path_factory.mktemp("text") / "model"
    text.train(CAPTIONS * 4, path, PIECES, seed=0)
    config = vqgan.VQGANConfig(
        image_size=32, patch=8, channels=16, multipliers=(1,), res_blocks=1,
        attention=(), middle="none", kernel=1, norm="layer", latent=16, codebook=32,
        code_dim=8,
    )  # fmt: skip
    return Codec(
        vocab.build(text=PIECES, image=32, classes=0, sentinels=8),
        text.TextTokenizer.load(path),
        ImageTokenizer(config, vqgan.build(config, jax.random.key(0))),
    )


def test_masks_and_pictures_are_turned_alike(codec):
    upright = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
    turned = Pillow.fromarray(np.rot90(upright))
    turned.getexif()[0x0112] = 6  # show it turned by 90 degrees clockwise
    mask = np.zeros((40, 24), bool)
    mask[10:13, 2:9] = True
    for found, expected in zip(
        codec.hidden(turned, mask, 0),
        codec.hidden(upright, mask, 0),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"give bool or uint8 \[40, 24\]"):
        codec.hidden(turned, mask.T, 0)


def test_a_mask_touches_cells_of_the_centre_square():
    mask = np.zeros((32, 32), bool)
    mask[3:14, 5:9] = mask[31, 31] = True
    np.testing.assert_array_equal(touched(mask, (8, 8)), regions.cells(mask, (8, 8)))
    mask = np.zeros((3000, 5001), bool)
    mask[0, 999] = True  # left of the square, which begins at 1000.5
    assert not touched(mask, (4, 4)).any()
    mask[750, 1000] = True  # half of this pixel is in it
    assert touched(mask, (4, 4)).nonzero() == (1, 0)
    assert touched(np.ones((1, 1), bool), (4, 4)).all()


def test_a_document_with_a_hole_is_a_training_sample(codec):
    eos, layout, text = codec.layout.eos, codec.layout, codec.text
    codes = np.zeros(codec.image.grid, np.int32)
    for caption in CAPTIONS:
        words = caption.split(" ")
        for n, word in enumerate(words):
            before = " ".join(words[:n])
            start, stop = (
                1 + len(text.encode(" ".join(words[: n + more]))) for more in (0, 1)
            )
            (whole,) = codec.ids([Document((Text(caption), Image(codes=codes)))])
            sample = np.concatenate([[eos], whole, [eos]])
            moved = infill.infill(sample, [(start, stop)], layout)
            hole = " ".join([*words[:n], HOLE, *words[n + 1 :]])
            given = Document((Text(hole), Image(codes=codes)), "name", {"licence": "x"})
            form = prompts.text_infill(layout, codec.parts([holed(given)])[0], 8)
            (stream,) = form.streams
            np.testing.assert_array_equal(stream, moved[: len(stream)])
            assert stream[-1] == layout.sentinels[0] == moved[len(stream) - 1]
            # What training has in the hole gives the caption again.
            span = layout.pieces(sample[start:stop])
            filled = codec.filled(given, [span])
            assert filled.segments[0].text == caption
            assert (filled.id, filled.metadata) == ("name", {"licence": "x"})
            assert before == "" or text.decode(span.tolist()) == f" {word}"


@pytest.mark.parametrize(
    "before, written, after, expected",
    [
        ("a large ", " red", " square", "a large red square"),
        ("a large ", "red", " square", "a large red square"),
        ("a large ", " red ", " square", "a large red square"),
        ("a large ", "", " square", "a large square"),
        ("", " red", " square", "red square"),
        ("", "", " square", "square"),
        ("a ", " star", "", "a star"),
        ("a ", "", ".", "a."),
        ("un", "done", "", "undone"),
        ("a  ", " b", "", "a  b"),
    ],
)
def test_spaces_around_a_hole(before, written, after, expected):
    assert joined(before, written, after) == expected


def test_what_is_written_goes_on_in_the_last_text(codec):
    layout, words = codec.layout, codec.text
    codes = np.arange(codec.image_tokens) % 32
    word = layout.text_ids(words.encode(" circle"))
    picture = [layout.brk, *layout.image_ids(codes), layout.brk]
    end = [layout.eos, layout.pad]
    first, second, third = codec.continued(
        [Document((Text("a red "),)), Document((Text(""),)), Document((Text("x "),))],
        [
            np.array([*word, *picture, *word, *end]),
            np.array([*picture[1:-1], *end]),
            np.array([layout.brk, *picture[1:-1], *end]),
        ],
    )
    assert [s.text for s in first.segments[::2]] == ["a red circle", " circle"]
    pixels = codec.image.decode(first.segments[1].codes[None])[0]
    np.testing.assert_array_equal(first.segments[1].array, pixels)
    assert [type(s) for s in second.segments] == [Image]
    assert third.segments[0].text == "x " and len(third.segments) == 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16", "1"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (640, 480)])
def test_pictures_of_any_mode_and_size_are_taken(codec, mode, size):
    array = codec.arrays([Pillow.new("RGB", size).convert("L").convert("RGB")])
    assert array.shape == (1, 32, 32, 3)
    picture = Pillow.new(mode, size)
    assert codec.arrays([picture]).shape == (1, 32, 32, 3)
