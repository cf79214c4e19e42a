"""What of one's own data is taken: the section `data.ingest` of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cm3leon_jax.data.duplicates import MAX_BITS


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Filters and facts for a source of one's own files.

    `smallest`: pixels of the shorter side. `aspect`: longer side by the shorter one at
    most. `shortest_caption`, `longest_caption`: characters. `duplicates`: bits of 64 in
    which near-duplicates differ at most (None: they are kept; 4 is usual). `against`:
    folders `documents/` of other systems, whose validation and test pictures are kept
    out of every split. `licence` and `origin`: kept with each record that does not tell
    its own. `faults`: what cannot be used is left out and named, or ends the run.
    `workers`: processes (None: one for each core).
    """

    BOOKKEEPING: ClassVar = ("workers",)

    smallest: int = 0
    aspect: float | None = None
    shortest_caption: int = 1
    longest_caption: int | None = None
    duplicates: int | None = None
    against: tuple[str, ...] = ()
    licence: str | None = None
    origin: str | None = None
    faults: Literal["skip", "refuse"] = "skip"
    workers: int | None = None

    def __post_init__(self):
        if self.faults not in ("skip", "refuse"):
            raise ValueError(f"faults={self.faults!r}: choose skip or refuse")
        if self.aspect is not None and self.aspect < 1:
            raise ValueError(f"aspect={self.aspect} must be at least 1, or None")
        if self.duplicates is not None and not 0 <= self.duplicates <= MAX_BITS:
            raise ValueError(
                f"duplicates={self.duplicates} must be 0 … {MAX_BITS} bits, or None"
            )
        longest = self.longest_caption
        if longest is not None and longest < self.shortest_caption:
            raise ValueError(
                f"longest_caption={longest} is below shortest_caption="
                f"{self.shortest_caption}"
            )
        for name in ("smallest", "workers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.against and self.duplicates is None:
            raise ValueError("against needs duplicates, the bits that may differ")

    def refusal(self, width: int, height: int) -> str | None:
        """Why a picture of that size is not taken, or None."""
        short, long = sorted((width, height))
        if short < self.smallest:
            return f"{width}x{height} pixels: a side below {self.smallest}"
        if self.aspect is not None and long > self.aspect * short:
            return f"{width}x{height} pixels: longer than {self.aspect:g} to 1"
        return None

    def caption_refusal(self, caption: str) -> str | None:
        """Why a caption is not taken, or None."""
        count = len(caption.strip())
        if count < self.shortest_caption:
            return f"a caption of {count} characters: below {self.shortest_caption}"
        if self.longest_caption is not None and count > self.longest_caption:
            return f"a caption of {count} characters: above {self.longest_caption}"
        return None
