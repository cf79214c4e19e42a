"""Any text round-trips; wrong files and sizes are clear errors."""

import numpy as np
import pytest

from cm3leon_jax.tokenizers import text

CORPUS = [
    f"a {size} {colour} {shape} at ({x}, {y})"
    for size in ("small", "large")
    for colour in ("red", "green", "blue", "violet")
    for shape in ("circle", "square", "star")
    for x, y in ((0, 1), (12, 34))
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "deep" / "text.model"
    text.train(CORPUS, path, 310, seed=0)
    return text.TextTokenizer.load(path)


def test_size_and_compression(tokenizer):
    assert tokenizer.size == 310
    pieces = tokenizer.encode(CORPUS[0])
    assert len(pieces) < len(CORPUS[0]) / 2
    assert all(0 <= piece < 310 for piece in pieces)
    assert all(isinstance(piece, int) for piece in pieces)


@pytest.mark.parametrize(
    "given",
    ["", " ", "  a  b ", "\n\n\t x\r\n", "▁", " ▁▁ a▁b", "\x00", "a\x00b", "\ufeff",
     "🍎é", "<s></s><unk><pad>", "<0x41>", "<eos> <break>", "\u2047", "ｆｕｌｌ",
     "e\u0301", "日本語のテキスト", "\U0010ffff"],
)  # fmt: skip
def test_awkward_text_round_trips(tokenizer, given):
    assert tokenizer.decode(tokenizer.encode(given)) == given


def test_random_text_round_trips(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(300):
        points = rng.integers(0, 0x3000, rng.integers(0, 20))
        given = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer.encode(given)) == given


def test_broken_bytes_still_decode(tokenizer):
    first_byte_of_two = tokenizer.encode("é".encode()[:1].decode("latin-1"))[:1]
    assert "\ufffd" in tokenizer.decode(first_byte_of_two)
    assert tokenizer.decode(list(range(tokenizer.size)))


def test_training_is_a_function_of_texts_and_seed(tmp_path):
    for name in ("a", "b"):
        text.train(iter(CORPUS), tmp_path / name, 300, seed=3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def _made(texts, path, size):
    text.train(iter(texts), path, size, seed=0)
    return text.TextTokenizer.load(path)


def test_few_texts_leave_pieces_spare(tmp_path):
    same = _made(["a photo of a dress"] * 200, tmp_path / "same", 400)
    assert same.size == 400 and len(same.encode("a photo of a dress")) < 8
    for given in ("a photo of a shoe", "日本", "\U000f0000", "x\U000f0003 \U000ffffd"):
        assert same.decode(same.encode(given)) == given
    assert max(same.encode("a photo of a dress")) < 400
    assert same.decode(list(range(400)))


def test_of_too_many_characters_the_rarest_are_bytes(tmp_path):
    many = ["".join(map(chr, range(0x4E00, 0x4E00 + 40)))] + ["often the same"] * 200
    made = _made(many, tmp_path / "many", 280)
    assert made.size == 280 and len(made.encode("often the same")) < 14
    assert made.decode(made.encode(many[0])) == many[0]


def test_a_large_set_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_FEW", 10)
    with pytest.raises(ValueError, match="vocabulary.text.*<= "):
        text.train(["a photo of a dress"] * 200, tmp_path / "same", 400, seed=0)


def test_bad_input(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="outside"):
        tokenizer.decode([310])
    with pytest.raises(ValueError, match="Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(FileNotFoundError, match="stage"):
        text.TextTokenizer.load(tmp_path / "missing")
    (tmp_path / "noise").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="noise"):
        text.TextTokenizer.load(tmp_path / "noise")
    with pytest.raises(ValueError, match="50000"):
        text.train(CORPUS, tmp_path / "big", 50_000, seed=0)
    with pytest.raises(ValueError, match="100 pieces"):
        text.train(CORPUS, tmp_path / "small", 100, seed=0)
