"""What every run that trains the decoder is told; the section `pretrain`."""

from dataclasses import dataclass
from typing import ClassVar

from cm3leon_jax.data.infill import InfillConfig
from cm3leon_jax.data.packing import PackingConfig
from cm3leon_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A CM3 run: objective, packing, batch (rows), optimizer, and what is logged.

    `seed` None is the system's; another one repeats the run on the same tokens.
    `BOOKKEEPING` says how a run is computed and watched, not what it computes: these
    may change when it is resumed. `SECTION` is its name in a config. What `spike` and
    `recoveries` do is said in `training/loop.py`.
    """

    SECTION: ClassVar[str]
    BOOKKEEPING: ClassVar[tuple[str, ...]] = (
        *("microbatches", "loss_blocks", "log_every", "checkpoint_every"),
        *("validate_every", "validation_batches", "keep", "workers"),
        *("spike", "recoveries"),
    )

    infill: InfillConfig
    packing: PackingConfig
    batch_size: int
    optimizer: OptimizerConfig
    seed: int | None = None
    microbatches: int = 1
    loss_blocks: int = 1
    z_loss: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 1000
    validate_every: int = 1000
    validation_batches: int = 4
    keep: int = 2
    workers: int = 0
    spike: float = 0.0
    recoveries: int = 3

    def __post_init__(self):
        name = self.SECTION
        for key in ("batch_size", *self.BOOKKEEPING):
            none = key in ("workers", "spike", "recoveries")
            value, least = getattr(self, key), 0 if none else 1
            if value < least:
                raise ValueError(f"{name}.{key}={value} must be at least {least}")
        if self.z_loss < 0:
            raise ValueError(f"{name}.z_loss={self.z_loss} must not be negative")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"{name}.microbatches={self.microbatches} does not divide "
                f"{name}.batch_size={self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """The CM3 run on documents."""

    SECTION: ClassVar[str] = "pretrain"
