"""Embedder: vectors of documents over any two functions; the loader of all kinds."""

from types import SimpleNamespace

import numpy as np
import pytest

from cm3leon_jax import encoders
from cm3leon_jax.data.documents import Document, Image, Mask, Text
from cm3leon_jax.retrieval.embed import Embedder

SIZE = 6


def embed_texts(texts: list[str]) -> np.ndarray:
    return np.stack([np.random.default_rng(len(t)).normal(size=SIZE) for t in texts])


def embed_images(images_BYXC: np.ndarray) -> np.ndarray:
    seeds = images_BYXC[:, 0, 0, 0].tolist()
    return np.stack([np.random.default_rng(999 + s).normal(size=SIZE) for s in seeds])


def embedder(**changes) -> Embedder:
    functions = {"texts": embed_texts, "images": embed_images}
    return Embedder(name="toy", size=SIZE, image_size=4, **(functions | changes))


def picture(value: int, side: int = 4) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def document(*parts: str | int) -> Document:
    segments = [Text(p) if isinstance(p, str) else Image(picture(p)) for p in parts]
    return Document(tuple(segments), id=f"{parts}")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def test_a_document_is_the_normalised_mean_of_its_kinds():
    text = unit(embed_texts(["abc"])[0])
    image = unit(embed_images(picture(7)[None])[0])
    found, signatures = embedder().documents(
        [document("abc", 7), document("abc"), document(7)]
    )
    assert found.dtype == signatures.dtype == np.float32
    np.testing.assert_allclose(signatures, [image, text, image], atol=1e-6)
    wanted = [unit(text + image), text, image]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_many_pictures_count_as_one_kind():
    images = [unit(embed_images(picture(i)[None])[0]) for i in (1, 2, 3)]
    text = unit(embed_texts(["abc"])[0])
    [found], _ = embedder().documents([document(1, "abc", 2, 3)])
    np.testing.assert_allclose(found, unit(text + unit(sum(images))), atol=1e-6)


def test_order_of_documents_and_of_segments_is_irrelevant():
    documents = [document("a", 3), document(9), document("bcd"), document(5, "xy", 6)]
    found, _ = embedder().documents(documents)
    reversed_, _ = embedder().documents(documents[::-1])
    np.testing.assert_array_equal(reversed_, found[::-1])
    [turned], _ = embedder().documents([document("xy", 6, 5)])
    np.testing.assert_allclose(turned, found[3], atol=1e-6)


def test_vectors_have_length_one_and_nothing_gives_nothing():
    made = embedder()
    for vectors in (made.texts(["a", "bc"]), made.images([picture(1), picture(2)])):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for nothing in (made.texts([]), made.images([]), made.documents([])[0]):
        assert nothing.shape == (0, SIZE) and nothing.dtype == np.float32


def test_pictures_of_other_sizes_are_resized():
    seen = []

    def images(images_BYXC):
        seen.append(images_BYXC.shape)
        return embed_images(images_BYXC)

    found = embedder(images=images).images([picture(8, 16), picture(8)])
    assert seen == [(2, 4, 4, 3)]
    np.testing.assert_allclose(found[0], found[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.texts(["a", 3]), "text 1 is int, not a string"),
        (lambda e: e.images([np.zeros((4, 4, 3))]), "picture 0 is float64"),
        (lambda e: e.images([np.zeros((4, 8, 3), np.uint8)]), "8x4 .* to a square"),
        (
            lambda e: e.documents([document("a"), Document((), id="bare")]),
            "document 'bare' has neither text nor a picture",
        ),
        (
            lambda e: e.documents(
                [Document((Mask(np.zeros((2, 2), np.int32)),), id="mask")]
            ),
            "document 'mask' has neither",
        ),
    ],
)
def test_what_cannot_be_embedded_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(embedder())


def test_wrong_results_are_never_passed_on():
    broken = embedder(texts=lambda texts: np.full((len(texts), SIZE), np.nan))
    with pytest.raises(ValueError, match="encoder toy .* not numbers of 2 texts"):
        broken.texts(["a", "b"])
    other = embedder(texts=lambda texts: np.ones((len(texts), 5)))
    with pytest.raises(ValueError, match=r"made \[2, 5\] of 2 texts, not \[2, 6\]"):
        other.texts(["a", "b"])


def test_kinds_of_encoders(tmp_path):
    with pytest.raises(ValueError, match="kind='bert': choose from trained, clip"):
        encoders.load(SimpleNamespace(kind="bert", path=""), tmp_path)
    with pytest.raises(FileNotFoundError, match="stage 'dual_encoder' has not"):
        encoders.load(SimpleNamespace(kind="trained", path=""), tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        encoders.load(SimpleNamespace(kind="clip", path=str(tmp_path)), tmp_path)
