"""A public set asked about in parts: what all tasks on it share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon_jax.data.pictures import read_picture
from cm3leon_jax.evaluation import features, public_tfds
from cm3leon_jax.evaluation.kept import Kept
from cm3leon_jax.evaluation.pairs import SHOWN
from cm3leon_jax.evaluation.public_sets import Example, PublicConfig

PART = 64  # examples
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # in the set's folder


@dataclass(frozen=True)
class Job:
    """What is asked (`config`) about the files in `folder`, of a `kept` model."""

    config: PublicConfig
    folder: Path
    kept: Kept
    examples: Sequence[Example]
    seed: int

    @property
    def model(self) -> Any:
        return self.kept.model

    def parts(
        self, name: str, work: Callable[[slice], Any], *about: Any
    ) -> Iterator[Any]:
        """`work` for every part of the examples, in order; made once. `about`: what
        its values follow from beside examples, model and settings."""
        owns = [slice(i, i + PART) for i in range(0, len(self.examples), PART)]
        keys = [
            [name, self.kept.identity, self.config, self.seed, *about]
            + [own.start, self.examples[own]]
            for own in owns
        ]
        return self.kept.parts.run(keys, lambda i: work(owns[i]), name)

    def options(self, own: slice, k: int) -> dict[str, Any]:
        """How the model is asked for a part."""
        numbers = range(*own.indices(len(self.examples)))
        asked = {"retrieve": k, "seed": self.seed, "numbers": numbers}
        return asked | {"sampler": self.config.sampler}

    def pictures(self, own: slice) -> list[np.ndarray]:
        """uint8 [Y, X, 3] each; ValueError names a file that cannot be used."""
        return [self.picture(example.picture) for example in self.examples[own]]

    def picture(self, name: str) -> np.ndarray:
        path = self.folder / name
        try:
            return read_picture(self._file(name), self.config.image_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _file(self, name: str) -> bytes:
        path, name_of = self.folder / name, self.config.set
        if not path.is_file() and public_tfds.there(name_of, self.folder):
            return public_tfds.picture(name_of, self.folder, name)
        return path.read_bytes()

    @functools.cached_property
    def network(self) -> features.Features:
        """What features of pictures are by."""
        if self.config.features == "inception":
            return features.inception(self.folder / INCEPTION, self.config.resize)
        return features.efficientnet_lite0()

    @property
    def place(self) -> Path:
        """Of the files that stay beside the samples."""
        folder = self.kept.parts.folder
        return folder.with_name(folder.name.removesuffix(".parts"))

    def shown(self, own: slice) -> range:
        """Numbers in the part of what a report may show."""
        return range(min(len(self.examples[own]), max(SHOWN - own.start, 0)))

    def check_side(self) -> None:
        """ValueError where the system's pictures are not those to be compared."""
        system, wanted = self.model.system, self.config.image_size
        side = system.image_tokenizer.model.image_size
        if side != wanted:
            raise ValueError(
                f"public.image_size={wanted}, but pictures of {system.name} are {side} "
                f"wide: give --config.public.image_size={side}, another protocol"
            )
