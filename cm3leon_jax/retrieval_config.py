"""The section `retrieval` of a config: encoder, bank, what samples take of it."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from cm3leon_jax.models.dual_encoder import DualEncoderConfig
from cm3leon_jax.retrieval.search import STORAGES, Storage
from cm3leon_jax.training.dual_encoder_step import DualEncoderTrainConfig

Kind = Literal["trained", "clip", "frozen"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What makes vectors of documents.

    "trained": `model` by `training` on the system's own pairs. "clip": the folder
    `path` in Hugging Face's layout. "frozen": EfficientNet-Lite0 and the sentence
    encoder in the folder `path` ("" is the installed package).
    """

    kind: Kind
    model: DualEncoderConfig | None = None
    training: DualEncoderTrainConfig | None = None
    path: str = ""

    def __post_init__(self):
        name = "retrieval.encoder"
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"{name}.kind={self.kind!r}: choose one of {', '.join(get_args(Kind))}"
            )
        own = (self.model is not None, self.training is not None)
        if any(own) != all(own) or all(own) != (self.kind == "trained"):
            raise ValueError(
                f"{name}.kind={self.kind!r}: kind 'trained' needs the sections model "
                "and training, the others have neither"
            )
        if bool(self.path) and self.kind == "trained":
            raise ValueError(f"{name}.path={self.path!r} is of no use to a trained one")
        if not self.path and self.kind == "clip":
            raise ValueError(f"{name}.path is empty: give the folder of the CLIP")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """The memory bank, which holds the training documents, and how it is used.

    storage: type of the vectors. per_query: how many neighbours are found by a
    document's text, and how many by its picture. skip_above: two documents with a
    larger score are near-duplicates (paper: 0.9 with CLIP); None is calibrated on
    validation pairs. query_dropout: share of a training query's words that are left
    out. These decide the bank and its neighbour files; the others the pretraining
    samples: at most `documents` retrieved documents (`fewest`: a number from this on is
    drawn; None: always `documents`), the loss `weight` of their tokens, and the share
    `noise` of them that random documents replace.
    """

    BANK: ClassVar[tuple[str, ...]] = (
        *("storage", "per_query", "skip_above", "query_dropout"),
    )

    encoder: EncoderConfig
    storage: Storage = "float32"
    per_query: tuple[int, int] = (2, 2)
    skip_above: float | None = None
    query_dropout: float = 0.2
    documents: int = 3
    fewest: int | None = None
    weight: float = 1.0
    noise: float = 0.0

    def __post_init__(self):
        name, most = "retrieval", sum(self.per_query)
        if self.storage not in STORAGES:
            raise ValueError(
                f"{name}.storage={self.storage!r}: choose one of {', '.join(STORAGES)}"
            )
        if len(self.per_query) != 2 or min(self.per_query) < 0 or not most:
            raise ValueError(
                f"{name}.per_query={self.per_query} must be two numbers of at least 0, "
                "of documents found by text and by picture, and not both 0"
            )
        if self.skip_above is not None and not -1 <= self.skip_above <= 1:
            raise ValueError(
                f"{name}.skip_above={self.skip_above} must be within [-1, 1]: it is a "
                "cosine"
            )
        if not 0 <= self.query_dropout < 1:
            raise ValueError(
                f"{name}.query_dropout={self.query_dropout} must be within [0, 1)"
            )
        if not 1 <= self.documents <= most:
            raise ValueError(
                f"{name}.documents={self.documents} must be 1 … {most}: {name}."
                f"per_query={self.per_query} finds {most}"
            )
        if self.fewest is not None and not 0 <= self.fewest <= self.documents:
            raise ValueError(
                f"{name}.fewest={self.fewest} must be 0 … documents={self.documents}"
            )
        if self.weight < 0 or not 0 <= self.noise <= 1:
            raise ValueError(
                f"{name}.weight={self.weight} must not be negative, {name}.noise="
                f"{self.noise} within [0, 1]"
            )
