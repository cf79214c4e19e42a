"""The section `sft` of a config: tasks, their examples, the run that tunes on them."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cm3leon_jax import workdir
from cm3leon_jax.data import task_sources
from cm3leon_jax.data.tasks import known
from cm3leon_jax.run_config import RunConfig
from cm3leon_jax.training.parts import PartsConfig


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """Examples of every task and split; a source that has fewer gives all it has."""

    train: int
    validation: int
    test: int

    def __post_init__(self):
        for split, count in asdict(self).items():
            if count < 1:
                raise ValueError(f"sft.examples.{split}={count} must be positive")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Multi-task fine-tuning (paper section 1.12).

    tasks: names (`data/task_templates.py`) and weights: a task's share of an epoch is
    its weight times its size, within bounds (`data/task_mixture.py`).
    only: some of the tasks, () for all: of the mixture, only their samples are trained
    on, which are the same ones in the same order as with all others between them.
    answer: probability that of a sample exactly the answer is moved, and of one whose
    output comes last nothing; `infill` masks the others, and all of the task infill.
    autoregressive: tasks that write text have the picture first and the text last.
    tokenizers: tasks whose training examples both tokenizers learn from as well, beside
    the documents: their words, and pictures unlike the documents' (edge maps).
    path: folder with `TASK.jsonl` for tasks that the world itself cannot make.
    classes: names of the classes of masks; () is the world's own. The first ones alone:
    examples whose masks show another are left out, so that a class can be added later.
    class_grid: cells of a mask a side, for each of the image grid's (section 2.12).
    start: the checkpoint that is tuned: "pretrain", or the folder `sft` of another
    work directory with the same tokenizers, to go on from there.
    parts: which parameters are trained. ema: decay of their running average, 0: none.
    """

    SECTION: ClassVar[str] = "sft"
    # What decides the examples and their tokens, not how they are trained on.
    DATA: ClassVar[tuple[str, ...]] = (
        *("examples", "autoregressive", "tokenizers", "path", "classes", "class_grid"),
    )

    tasks: dict[str, float]
    examples: ExamplesConfig
    only: tuple[str, ...] = ()
    answer: float = 0.8
    autoregressive: bool = False
    tokenizers: tuple[str, ...] = ()
    path: str = ""
    classes: tuple[str, ...] = ()
    class_grid: int = 2
    start: str = "pretrain"
    parts: PartsConfig = field(default_factory=PartsConfig)
    ema: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not self.tasks:
            raise ValueError("sft.tasks is empty: name at least one task")
        for name, weight in self.tasks.items():
            try:
                known(name)
            except ValueError as error:
                raise ValueError(f"sft.tasks: {error}") from error
            real = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not real or not math.isfinite(weight) or weight <= 0:
                raise ValueError(
                    f"sft.tasks.{name}={weight!r} must be a positive number: leave a "
                    "task out that is not to be trained"
                )
        for key, names in (("tokenizers", self.tokenizers), ("only", self.only)):
            for name in names:
                if name not in self.tasks:
                    raise ValueError(
                        f"sft.{key}: {name!r} is not one of sft.tasks "
                        f"({', '.join(self.tasks)})"
                    )
        if not 0 <= self.answer <= 1:
            raise ValueError(f"sft.answer={self.answer} must be within [0, 1]")
        if not 0 <= self.ema < 1:
            raise ValueError(f"sft.ema={self.ema} must be within [0, 1)")
        if self.class_grid < 1:
            raise ValueError(f"sft.class_grid={self.class_grid} must be positive")
        if self.packing.kind != "first_fit":
            raise ValueError(
                f"sft.packing.kind={self.packing.kind!r}: examples must not be cut, "
                "choose first_fit"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks in the order of their numbers in token records, 1, 2, …."""
        return tuple(sorted(self.tasks))

    def trained(self, folder: Path) -> tuple[str, ...]:
        """The tasks that a run in `folder` can do. A finished one has noted them; of
        another the config tells what it can, with a `start` elsewhere all of them."""
        own = self.names if self.start != "pretrain" else self.only or self.names
        finished = (folder / workdir.DONE).is_file()
        noted = workdir.results(folder) if finished else {}
        return tuple(noted.get("trained", own))

    def check(self, world: str, source: Any, vocabulary: Any, grid: int) -> None:
        """ValueError where the tasks cannot be made in this world, or do not fit.

        `grid` is the image grid's side; what a row holds is known but for the texts.
        """
        length = self.packing.row_length
        for name in self.tasks:
            task_sources.check(world, name, self.path)
            task = known(name)
            if task.masks:
                self._check_classes(world, source, vocabulary.classes, grid)
            masks = len(task.masks) * (self.class_grid * grid) ** 2
            if len(task.images) * grid**2 + masks + 4 > length:
                raise ValueError(
                    f"sft.packing.row_length={length} cannot hold the task {name!r}: "
                    f"{len(task.images)} pictures of {grid**2} codes, {masks} class "
                    "tokens, and their texts"
                )

    def _check_classes(self, world: str, source: Any, room: int, grid: int) -> None:
        names, side = self.class_names(world), self.class_grid * grid
        if len(names) < 2:
            raise ValueError(
                f"sft.classes={names}: name the background and at least one class"
            )
        if len(names) > room:
            raise ValueError(
                f"vocabulary.classes={room} has no room for {len(names)} classes: "
                f"{', '.join(names)}"
            )
        made = task_sources.classes(world)
        if made and names != made[: len(names)]:
            raise ValueError(
                f"sft.classes={names}: masks of the world {world!r} have the classes "
                f"{', '.join(made)}; name these, or the first ones of them"
            )
        if source.image_size % side:
            raise ValueError(
                f"sft.class_grid={self.class_grid}: a class grid of {side} cells does "
                f"not divide pictures of {source.image_size} pixels"
            )

    def class_names(self, world: str) -> tuple[str, ...]:
        """Of the classes of masks by label; label 0 is the background."""
        return self.classes or task_sources.classes(world)
