"""Near-duplicate pictures: the same one in another size, format or quality.

Two pictures are duplicates where their 64-bit perceptual hashes (signs of the lowest
frequencies of the grey picture, as `imagehash.phash`) differ in few bits, and no part
of the one has another colour than that of the other: the hash alone sees no colours,
and little of pictures that are flat.
"""

from __future__ import annotations

from array import array

import numpy as np
from PIL import Image as Pillow
from scipy import fft

SIDE = 8  # of the hash and of the small picture
COLOUR = 32  # levels of 256 by which no cell of the small picture may differ
MAX_BITS = 10
_FINE = 32  # pixels a side that the hash looks at


def fingerprint(picture_YXC: np.ndarray) -> tuple[int, np.ndarray]:
    """Uint8 [Y, X, 3] -> 64-bit hash, and the small picture uint8 [8, 8, 3]."""
    picture = Pillow.fromarray(picture_YXC)
    grey = picture.convert("L").resize((_FINE, _FINE), Pillow.Resampling.LANCZOS)
    waves = np.asarray(fft.dctn(np.asarray(grey, np.float64)))[:SIDE, :SIDE]
    waves = waves.round(3)  # a flat picture has none, not noise
    bits = (waves > np.median(waves)).ravel()
    small = picture.resize((SIDE, SIDE), Pillow.Resampling.BOX)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), np.asarray(small)


class Seen:
    """Pictures by their fingerprints; finds one of at most `bits` other bits.

    Hashes that differ in at most `bits` bits agree in at least one of `bits` + 1 bands
    of theirs, so only those that share a band are compared.
    """

    def __init__(self, bits: int):
        if not 0 <= bits <= MAX_BITS:
            raise ValueError(f"duplicates={bits} must be 0 … {MAX_BITS} bits, or None")
        self._bits = bits
        edges = [64 * band // (bits + 1) for band in range(bits + 2)]
        self._bands = [
            (low, (1 << (high - low)) - 1)
            for low, high in zip(edges, edges[1:], strict=False)
        ]
        self._rows: list[dict[int, array]] = [{} for _ in self._bands]
        self._hashes = np.zeros(1024, np.uint64)
        self._small = np.zeros((1024, SIDE, SIDE, 3), np.uint8)
        self._labels: list[str] = []

    def find(self, key: int, small: np.ndarray) -> str | None:
        """The label of the first picture that this one is a duplicate of."""
        near = [
            np.frombuffer(rows[band], np.uint32)
            for rows, band in zip(self._rows, self._keys(key), strict=True)
            if band in rows
        ]
        if not near:
            return None
        found = np.unique(np.concatenate(near))
        apart = np.bitwise_count(self._hashes[found] ^ np.uint64(key))
        found = found[apart <= self._bits]
        levels = self._small[found].astype(np.int16) - small
        found = found[np.abs(levels).max(axis=(1, 2, 3), initial=0) <= COLOUR]
        return self._labels[found[0]] if len(found) else None

    def add(self, key: int, small: np.ndarray, label: str) -> None:
        """Remembers a picture."""
        row = len(self._labels)
        if row == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._small = np.concatenate([self._small, np.zeros_like(self._small)])
        self._hashes[row], self._small[row] = key, small
        self._labels.append(label)
        for rows, band in zip(self._rows, self._keys(key), strict=True):
            rows.setdefault(band, array("I")).append(row)

    def _keys(self, key: int) -> list[int]:
        return [key >> low & mask for low, mask in self._bands]
