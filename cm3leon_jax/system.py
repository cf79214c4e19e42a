"""One config file describes one whole system; this is that description, validated.

Every stage takes its part from one `System`, so sizes that must agree (pictures and
grid, vocabulary and decoder, rows and positions) are stated once or checked here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cm3leon_jax import config as configs
from cm3leon_jax import vocab
from cm3leon_jax.data.filters import IngestConfig
from cm3leon_jax.data.sources import OWN, SOURCES
from cm3leon_jax.data.task_sources import ExampleConfig
from cm3leon_jax.models import efficientnet
from cm3leon_jax.models.decoder import DecoderConfig
from cm3leon_jax.models.vqgan import VQGANConfig
from cm3leon_jax.parallel.mesh import MeshConfig
from cm3leon_jax.parallel.rules import Rules
from cm3leon_jax.retrieval_config import RetrievalConfig
from cm3leon_jax.run_config import PretrainConfig, RunConfig
from cm3leon_jax.sampling.rerank import Rerank
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.sft_config import SFTConfig
from cm3leon_jax.training.image_step import ImageTokenizerTrainConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from: a source, its settings, documents per split.

    A count of None takes all that the source has. `ingest`: what is taken of one's own
    data (None: all that can be used).
    """

    source: str
    settings: dict[str, Any]
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    ingest: IngestConfig | None = None

    def __post_init__(self):
        if self.source not in SOURCES:
            known = ", ".join(SOURCES)
            raise ValueError(f"data.source={self.source!r}: choose from {known}")
        if self.ingest is not None and self.source not in OWN:
            raise ValueError(
                f"data.ingest is for {', '.join(OWN)}, not for {self.source}: leave it "
                "out"
            )

    @property
    def limits(self) -> dict[str, int | None]:
        """Documents to take of every split."""
        return {name: getattr(self, name) for name in ("train", "validation", "test")}


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Sizes that no tokenizer decides; `total` None is the next multiple of 128."""

    text: int
    sentinels: int
    classes: int = 0
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
    """The VQGAN, how it is trained, held-out pictures that score it while it trains,
    and blanked encodings kept per picture in the token cache.

    `features` is the network whose feature maps `training.perceptual` weighs: "none",
    or "efficientnet_lite0" (the extra `features`; pictures of 32x32 or more).
    """

    model: VQGANConfig
    training: ImageTokenizerTrainConfig
    validation_pictures: int = 500
    regions_per_image: int = 1
    features: Literal["none", "efficientnet_lite0"] = "none"

    def __post_init__(self):
        name = "image_tokenizer"
        for key in ("validation_pictures", "regions_per_image"):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}.{key}={getattr(self, key)} must be positive")
        if self.features not in ("none", "efficientnet_lite0"):
            raise ValueError(
                f"{name}.features={self.features!r}: choose none or efficientnet_lite0"
            )
        if (self.features == "none") != (self.training.perceptual == 0):
            raise ValueError(
                f"{name}.features={self.features!r} and {name}.training.perceptual="
                f"{self.training.perceptual} do not go together: give the network and "
                "its weight, or 'none' and 0"
            )
        if self.features != "none" and self.model.image_size < efficientnet.MIN_SIDE:
            raise ValueError(
                f"{name}.model.image_size={self.model.image_size}: {self.features} "
                f"needs pictures of at least {efficientnet.MIN_SIDE} pixels a side"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The sampler that each task uses unless a caller gives another.

    `caption` is for holes in documents too; it and `answer` may be guided or contrasted
    (with a grey picture). `text_to_image` is for other pictures without a given one,
    `control` for those with one that are not edits. `text_candidates`: so many texts
    are written, of which the likeliest is taken. `rerank`: by what the best of several
    pictures is known. Guidance of edits and of control is the paper's (section 1.12).
    """

    text_to_image: Sampler
    caption: Sampler
    infill: Sampler
    answer: Sampler = Sampler(temperature=0.0)
    edit: Sampler = Sampler(guidance=(7.5, 1.5))
    control: Sampler = Sampler(guidance=3.0)
    segment: Sampler = Sampler(temperature=0.0)
    text_candidates: int = 1
    rerank: Rerank = Rerank(gain=1.0)

    def __post_init__(self):
        if self.text_candidates < 1:
            raise ValueError(
                f"sampling.text_candidates={self.text_candidates} must be positive"
            )
        for name, streams in (("caption", 2), ("answer", 2), ("segment", 1)):
            sampler: Sampler = getattr(self, name)
            if sampler.streams > streams:
                raise ValueError(
                    f"sampling.{name}.guidance={sampler.guidance} and its contrastive "
                    f"need {sampler.streams} streams of a prompt that has {streams}"
                )


@dataclass(frozen=True, kw_only=True)
class System:
    """The sections of a config file in `configs/`. Raises ValueError where they clash.

    `seed` is that of every random choice: tokenizers, data order, initial state.
    `protocol` is the file in `configs/eval/` that this system is measured by.
    `decoder` holds the settings of `DecoderConfig` but for the vocabulary, which
    follows from `vocabulary` and the image tokenizer's codebook. Without `retrieval`
    there is no memory bank, without `sft` no tuning on tasks.

    `origin` "chameleon": decoder and tokenizers were converted from that family
    (`interop/chameleon.py`), whose vocabulary it has, and are not trained here before
    `sft`. `pretrain` tells then how they were trained.
    """

    name: str
    seed: int
    data: DataConfig
    vocabulary: VocabularyConfig
    image_tokenizer: ImageTokenizerConfig
    decoder: dict[str, Any]
    pretrain: PretrainConfig
    sampling: SamplingConfig
    protocol: str
    retrieval: RetrievalConfig | None = None
    sft: SFTConfig | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rules: Rules = field(default_factory=Rules)
    origin: Literal["chameleon"] | None = None

    def __post_init__(self):
        if self.origin not in (None, "chameleon"):
            raise ValueError(
                f"origin={self.origin!r}: choose chameleon, or leave it out"
            )
        seeds = {f"{run.SECTION}.seed": self.seed_of(run) for run in self.runs}
        for name, value in ({"seed": self.seed} | seeds).items():
            if not 0 <= value < 2**31:
                raise ValueError(f"{name}={value} must be in [0, 2^31)")
        picture = getattr(self.source, "image_size", None)
        model = self.image_tokenizer.model
        if picture != model.image_size:
            raise ValueError(
                f"data.settings.image_size={picture} and image_tokenizer.model."
                f"image_size={model.image_size} must be the same"
            )
        for run in self.runs:
            if run.packing.row_length > self.decoder_config.length:
                raise ValueError(
                    f"{run.SECTION}.packing.row_length={run.packing.row_length} "
                    f"exceeds decoder.length={self.decoder_config.length}"
                )
            if self.layout.size % run.loss_blocks:
                raise ValueError(
                    f"{run.SECTION}.loss_blocks={run.loss_blocks} does not divide the "
                    f"vocabulary of {self.layout.size} ids: choose a power of two"
                )
        length = self.pretrain.packing.row_length
        if model.grid**2 + 4 > length:
            raise ValueError(
                f"pretrain.packing.row_length={length} cannot hold a picture of "
                f"{model.grid**2} codes and its text"
            )
        if self.vocabulary.sentinels <= model.grid:
            raise ValueError(
                f"vocabulary.sentinels={self.vocabulary.sentinels}: a region of "
                f"{model.grid} rows and a text need at least {model.grid + 1}"
            )
        self._check_encoder(model.image_size)
        if self.sft is not None:
            sizes = self.vocabulary, model.grid
            self.sft.check(self.data.source, self.source, *sizes)

    def _check_encoder(self, side: int) -> None:
        wanted = self.retrieval.encoder.model if self.retrieval else None
        if wanted is None:
            return
        name = "retrieval.encoder.model"
        if wanted.image_size != side:
            raise ValueError(
                f"{name}.image_size={wanted.image_size} and image_tokenizer.model."
                f"image_size={side} must be the same"
            )
        if wanted.text_vocab != self.vocabulary.text + 1:
            raise ValueError(
                f"{name}.text_vocab={wanted.text_vocab} must be vocabulary.text + 1 = "
                f"{self.vocabulary.text + 1}: all pieces and the end of a text"
            )

    @classmethod
    def make(cls, config: Mapping[str, Any]) -> "System":
        """From a config (plain nested dict), as read from a file or a workdir."""
        return configs.make(cls, config, "")

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with every setting that it leaves at its default written out."""
        whole = configs.complete(cls, config)
        sections = {"decoder": {}, "data": None} | dict(config)
        decoder = configs.complete(DecoderConfig, sections["decoder"])
        data = sections["data"]
        if isinstance(data, Mapping) and data.get("source") in SOURCES:
            kind, _ = SOURCES[data["source"]]
            settings = configs.complete(kind, data.get("settings") or {})
            whole["data"] = whole["data"] | {"settings": settings}
        return whole | {"decoder": decoder}

    @classmethod
    def load(cls, workdir: str | Path) -> "System":
        """The system that a work directory holds."""
        return cls.make(configs.read(workdir))

    @cached_property
    def source(self) -> Any:
        """The source's own settings, validated."""
        kind, _ = SOURCES[self.data.source]
        return configs.make(kind, self.data.settings, "data.settings")

    @cached_property
    def layout(self) -> vocab.Layout:
        """The one id space."""
        sizes = dataclasses.asdict(self.vocabulary)
        if self.origin is not None:
            sizes["total"] = sizes["total"] or 0
            return vocab.chameleon(image=self.image_tokenizer.model.codebook, **sizes)
        return vocab.build(image=self.image_tokenizer.model.codebook, **sizes)

    @cached_property
    def decoder_config(self) -> DecoderConfig:
        settings = {**self.decoder, "vocab": self.layout.size}
        return configs.make(DecoderConfig, settings, "decoder")

    @property
    def runs(self) -> tuple[RunConfig, ...]:
        """The sections that train the decoder, in order."""
        return self.pretrain, *([self.sft] if self.sft else [])

    def seed_of(self, run: RunConfig) -> int:
        """That of a run's initial state, its data order and its masks."""
        return self.seed if run.seed is None else run.seed

    @property
    def pretrain_seed(self) -> int:
        return self.seed_of(self.pretrain)

    def examples(self, task: str) -> ExampleConfig:
        """Where the examples of a task come from; the system has a section `sft`."""
        assert self.sft is not None
        return ExampleConfig(
            world=self.data.source,
            source=self.source,
            task=task,
            path=self.sft.path,
            autoregressive=self.sft.autoregressive,
        )

    @cached_property
    def checkpoint_settings(self) -> dict[str, Any]:
        """What a checkpoint of the decoder must agree with to be used with this system:
        the settings of its mathematics and the one id space, as plain JSON."""
        decoder = dataclasses.asdict(self.decoder_config)
        del decoder["remat"]  # how, not what, is computed
        if not decoder["kv_heads"]:  # checkpoints are older than this setting
            del decoder["kv_heads"]
        return {"decoder": decoder, "layout": self.layout.plain()}

    @cached_property
    def stage_inputs(self) -> dict[str, dict[str, Any]]:
        """What every stage's output depends on, by the stage's folder.

        Settings that only say how a stage is computed or watched are not among them.
        An optimizer's `steps` is: every update's learning rate follows from it.
        """
        made: dict[str, dict[str, Any]] = {}

        def after(*folders: str) -> dict[str, str]:
            return {name: configs.config_hash(made[name]) for name in folders}

        tokenizer, seed = self.image_tokenizer, {"seed": self.seed}
        data = {"data": dataclasses.asdict(self.data)}
        data["data"]["settings"] = dataclasses.asdict(self.source)
        if self.data.ingest is None:  # systems are older than this section
            del data["data"]["ingest"]
        else:
            data["data"]["ingest"] = configs.essential(self.data.ingest)
        made["documents"] = data
        taught: dict[str, Any] = {}  # what both tokenizers learn from besides
        if self.sft is not None:
            world = {"source": self.data.source, "settings": data["data"]["settings"]}
            kind = {"path": self.sft.path, "autoregressive": self.sft.autoregressive}
            counts = dataclasses.asdict(self.sft.examples)
            made["tasks"] = kind | {"data": world, "tasks": self.sft.names}
            made["tasks"]["examples"] = counts
            if self.sft.tokenizers:
                names = sorted(self.sft.tokenizers)
                # The order of segments says nothing to tokenizers: both share them.
                kind |= {"autoregressive": False}
                taught = {"tasks": {"names": names, "train": counts["train"], **kind}}
        text = {"text": self.vocabulary.text} | taught
        came: dict[str, Any] = {"origin": self.origin} if self.origin else {}
        made["text_tokenizer"] = came or text | seed | after("documents")
        pictures: dict[str, Any] = {
            "model": tokenizer.model.essential,
            "training": configs.essential(tokenizer.training),
        }
        if tokenizer.features != "none":
            pictures["features"] = tokenizer.features
        if came:
            made["image_tokenizer"] = came | {"model": pictures["model"]}
        else:
            made["image_tokenizer"] = pictures | taught | seed | after("documents")
        made["tokens"] = {
            "vocabulary": dataclasses.asdict(self.vocabulary),
            "regions_per_image": tokenizer.regions_per_image,
            **seed,
            **after("documents", "text_tokenizer", "image_tokenizer"),
        }
        pretrain = configs.essential(self.pretrain)
        del pretrain["seed"]  # below
        context: dict[str, Any] = after("tokens")
        if self.retrieval is not None:
            settings = dataclasses.asdict(self.retrieval)
            encoder = settings.pop("encoder")
            if (training := self.retrieval.encoder.training) is not None:
                encoder["training"] = configs.essential(training)
            made["dual_encoder"] = encoder | seed
            if encoder["kind"] == "trained":
                made["dual_encoder"] |= after("documents", "text_tokenizer")
            bank = {key: settings.pop(key) for key in self.retrieval.BANK}
            made["bank"] = bank | seed | after("documents", "dual_encoder")
            context |= {"retrieval": settings} | after("bank")
        made["pretrain"] = {**self.checkpoint_settings, **came}
        if not came:
            made["pretrain"] |= {
                "pretrain": pretrain,
                "seed": self.pretrain_seed,
                **context,
            }
        if self.sft is not None:
            made["task_tokens"] = {
                **made["tokens"],
                "classes": self.sft.classes,
                "class_grid": self.sft.class_grid,
                **after("tasks"),
            }
            tuning = configs.essential(self.sft)
            for key in ("seed", *self.sft.DATA):
                del tuning[key]
            before = ["pretrain"] if self.sft.start == "pretrain" else []
            made["sft"] = {
                **self.checkpoint_settings,
                "sft": tuning,
                "seed": self.seed_of(self.sft),
                **after("task_tokens", *before),
            }
        return made
