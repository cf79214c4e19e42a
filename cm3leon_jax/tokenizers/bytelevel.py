"""Text tokenizers of other families: `tokenizer.json` as the library `tokenizers` has
it, behind the interface of `tokenizers/text.py`."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

FILE = "tokenizer.json"
# Ids that are no text: specials, image codes and reserved words (paper section 1.4).
_NO_TEXT = re.compile(
    r"</?s>|<(pad|unk|eoss|image|racm3:break|(reserved|sentinel:)\d+)>|IMGIMG[A-J]+Z"
)


class JsonTokenizer:
    """Text <-> pieces `[0, size)`, which are the ids of `text` (a range) of the file.

    Words that name special ids are text like any other where they stand in a text.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: it has the text tokenizer")
        try:
            tokenizers = importlib.import_module("tokenizers")
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                "tokenizers is not installed: bash launch/setup.sh foreign, or pip "
                "install 'cm3leon-jax[foreign]'"
            ) from error
        try:
            self._made = tokenizers.Tokenizer.from_file(str(path))
            file = json.loads(path.read_text("utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{path} is no tokenizer: {error}") from error
        self._made.no_padding()
        self._made.no_truncation()
        self._made.encode_special_tokens = True
        self.path = path
        self.ids: dict[str, int] = self._made.get_vocab(with_added_tokens=True)
        special = {x["id"] for x in file["added_tokens"] if x["special"]}
        text = sorted(
            i
            for word, i in self.ids.items()
            if i not in special and not _NO_TEXT.fullmatch(word)
        )
        if not text or len(text) != text[-1] - text[0] + 1:
            raise ValueError(f"{path}: the ids of its text pieces are no single range")
        self.text = range(text[0], text[-1] + 1)

    @property
    def size(self) -> int:
        """How many pieces there are."""
        return len(self.text)

    def encode(self, text: str) -> list[int]:
        """Text -> pieces; ValueError for what is not text, or not in the vocabulary."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not valid Unicode text: {error}") from error
        ids = self._made.encode(text, add_special_tokens=False).ids
        if any(i not in self.text for i in ids):
            raise ValueError(f"{self.path} has no text pieces for {text[:40]!r}")
        return [i - self.text.start for i in ids]

    def decode(self, pieces: list[int]) -> str:
        """Pieces -> text; bytes that are not UTF-8 become U+FFFD."""
        pieces = [int(piece) for piece in pieces]
        if pieces and not 0 <= min(pieces) <= max(pieces) < self.size:
            raise ValueError(
                f"pieces {min(pieces)}..{max(pieces)} are outside [0, {self.size})"
            )
        ids = [self.text.start + piece for piece in pieces]
        return self._made.decode(ids, skip_special_tokens=False)
