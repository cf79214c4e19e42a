"""The text tokenizer: byte-pair pieces with byte fallback, so any text round-trips.

The paper uses a GPT-2-style byte-level BPE of 56,320 pieces (paper section 1.4);
sentencepiece's BPE with byte fallback has the same two properties that matter here:
no text is unencodable and `decode(encode(x)) == x`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from cm3leon_jax.config import write_whole

# Sentencepiece stores spaces as this character, so a text that really contains it
# must take the byte pieces, else it would come back as a space.
_SPACE_MARK = "\u2581"
# More sentences than this add time and no better merges.
_MAX_SENTENCES = 5_000_000
_FEW = 100_000  # texts of a set that may be too small for its vocabulary
_PRIVATE = 0xF0000  # the first of Unicode's characters that mean nothing
_SHARES = (0.9995, 0.999, 0.998, 0.995, 0.99, 0.98)  # sentencepiece takes no less


def train(
    texts: Iterable[str], path: str | os.PathLike, vocab_size: int, seed: int
) -> None:
    """Train a tokenizer of exactly `vocab_size` pieces on `texts` and write it.

    257 pieces are taken by bytes and the (never produced) unknown piece. Where the
    texts of a small set give too few pieces the others are private-use characters, at
    most half of all; where they have too many characters the rarest become bytes.
    Raises ValueError with sentencepiece's own bound where that does not help.
    """
    few: list[str] = []
    model, error = _trained(_noted(texts, few), vocab_size, seed)
    if model is None and len(few) <= _FEW:
        if bound := re.search(r"value <= (\d+)", error):
            spare = vocab_size - int(bound[1])
            if 2 * spare <= vocab_size:
                model, error = _trained(few, vocab_size, seed, spare=spare)
        elif "required_chars" in error:
            for share in _SHARES:
                model, error = _trained(few, vocab_size, seed, share=share)
                if model is not None:
                    break
    if model is None:
        raise ValueError(
            f"text_tokenizer: cannot train {vocab_size} pieces on these texts, change "
            f"vocabulary.text: {error}"
        )
    write_whole(Path(path), model)


def _noted(texts: Iterable[str], few: list[str]) -> Iterator[str]:
    """The texts, the first of them kept to be read again."""
    for text in texts:
        if len(few) <= _FEW:
            few.append(text)
        yield text


def _trained(
    texts: Iterable[str],
    vocab_size: int,
    seed: int,
    *,
    share: float = 1.0,
    spare: int = 0,
) -> tuple[bytes | None, str]:
    """The model's bytes, or None and why not. `share`: of the texts' characters that
    have pieces. `spare`: how many pieces nothing is learnt for."""
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)  # which sentences, if too many
    more: dict[str, Any] = {}
    if spare:
        more["user_defined_symbols"] = [chr(_PRIVATE + i) for i in range(spare)]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=share,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,  # coordinates and counts share their digits
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            input_sentence_size=_MAX_SENTENCES,
            shuffle_input_sentence=True,
            max_sentence_length=1 << 16,
            num_threads=1,
            minloglevel=2,
            **more,
        )
    except RuntimeError as error:
        return None, str(error)
    return model.getvalue(), ""


class TextTokenizer:
    """Text <-> pieces `[0, size)`; ids of the whole vocabulary are `vocab.Layout`'s."""

    def __init__(self, model: bytes):
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._space_mark = [
            self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()
        ]
        if self._model.unk_id() in self._space_mark:
            raise ValueError("the text tokenizer has no byte pieces: train it here")

    @classmethod
    def load(cls, path: str | os.PathLike) -> TextTokenizer:
        """Read a tokenizer that `train` wrote.

        Raises FileNotFoundError, or ValueError where the file is something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no text tokenizer at {path}: run the text tokenizer stage first"
            )
        try:
            return cls(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a text tokenizer: {error}") from error

    @property
    def size(self) -> int:
        """How many pieces there are."""
        return self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Text -> pieces; ValueError for lone surrogates, which are not text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not valid Unicode text: {error}") from error
        first, *rest = text.split(_SPACE_MARK)
        pieces = self._model.encode(first)
        for part in rest:
            pieces += self._space_mark + self._model.encode(part)
        return pieces

    def decode(self, pieces: list[int]) -> str:
        """Pieces -> text; bytes that are not UTF-8 become U+FFFD."""
        pieces = [int(piece) for piece in pieces]
        if pieces and not 0 <= min(pieces) <= max(pieces) < self.size:
            raise ValueError(
                f"pieces {min(pieces)}..{max(pieces)} are outside [0, {self.size})"
            )
        return self._model.decode(pieces)
