"""The text tokenizer: byte-pair pieces with byte fallback, so any text round-trips.

The paper uses a GPT-2-style byte-level BPE of 56,320 pieces (paper section 1.4);
sentencepiece's BPE with byte fallback has the same two properties that matter here:
no text is unencodable and `decode(encode(x)) == x`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

# Sentencepiece stores spaces as this character, so a text that really contains it
# must take the byte pieces, else it would come back as a space.
_SPACE_MARK = "\u2581"
# More sentences than this add time and no better merges.
_MAX_SENTENCES = 5_000_000


def train(
    texts: Iterable[str], path: str | os.PathLike, vocab_size: int, seed: int
) -> None:
    """Train a tokenizer of exactly `vocab_size` pieces on `texts` and write it.

    257 pieces are taken by bytes and the (never produced) unknown piece. Raises
    ValueError with sentencepiece's own bound where the texts cannot fill the size.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)  # which sentences, if too many
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
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
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocabulary.text={vocab_size}: these texts cannot give so many pieces, or "
            f"need more: {error}"
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)


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
