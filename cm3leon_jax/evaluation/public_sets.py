"""Public sets in the layout in which they are given out, and any other in one of ours.

A folder has the files that `SETS` names, unpacked as they come, or (of COCO's captions)
what TFDS has prepared, see `public_tfds.py`, or one `examples.jsonl` with a line for
every example, its pictures as files beside it:

    {"id": "7", "picture": "images/7.jpg", "references": ["a cat", …], "question": "…",
     "options": ["yes", …], "relevance": [0.5, …], "mask": "masks/7.png"}

What a task does not need may be left out. A mask is a picture of class numbers, 255
where nothing is counted; `labels.txt` has the classes, `NUMBER: NAME` a line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cm3leon_jax import config as configs
from cm3leon_jax.evaluation import public_tfds
from cm3leon_jax.evaluation.features import RESIZES
from cm3leon_jax.evaluation.public_tfds import Captioned
from cm3leon_jax.sampling.rerank import Rerank
from cm3leon_jax.sampling.sampler import Sampler

EXAMPLES = "examples.jsonl"
LATER = {"resize": RESIZES[0]}  # of a config, as in `protocol.py`
UNCOUNTED = 255  # in masks
# What each task can be asked for beside what it always measures.
METRICS: dict[str, tuple[str, ...]] = {
    "text_to_image": ("fid", "inception_score", "precision_recall", "clip_score"),
    "reconstruction": ("fid",),
    "caption": ("hallucination",),
    "answer": ("vqa_accuracy",),
    "rank": ("ndcg",),
    "segment": ("miou",),
}


@dataclass(frozen=True, kw_only=True)
class PublicConfig:
    """A set, what it is scored by, and how a model is asked.

    `retrieve`: documents before each prompt, `candidates`: pictures of which the best
    is taken; one score each. `sampler` and `rerank` None are those of the system's
    config. `image_size` is that of the pictures compared (their centred square, resized
    by Lanczos). `features`: of the pictures, for Fréchet distances; `resize`: how they
    are for Inception (`evaluation/features.py`). `version` is that of this code: it is
    raised when a score of the same samples changes.
    """

    set: str
    metrics: tuple[str, ...] = ()
    retrieve: tuple[int, ...] = (0,)
    candidates: tuple[int, ...] = (1,)
    sampler: Sampler | None = None
    rerank: Rerank | None = None
    style: str = "short"
    wording: int = 0
    image_size: int = 256
    features: Literal["inception", "efficientnet_lite0"] = "inception"
    version: int = 1
    resize: str = RESIZES[0]

    def __post_init__(self):
        if self.set not in SETS:
            raise ValueError(f"public.set={self.set!r}: choose from {', '.join(SETS)}")
        check_metrics(self.metrics, METRICS)
        for name, least in (("retrieve", 0), ("candidates", 1)):
            values = getattr(self, name)
            if not values or min(values) < least or len(set(values)) < len(values):
                raise ValueError(
                    f"public.{name}={values}: different numbers from {least} on"
                )
        known = {"features": ("inception", "efficientnet_lite0"), "resize": RESIZES}
        for name, values in known.items():
            if (given := getattr(self, name)) not in values:
                choices = ", ".join(values)
                raise ValueError(f"public.{name}={given!r}: choose from {choices}")
        if "inception_score" in self.metrics and self.features != "inception":
            raise ValueError(
                f"public.metrics: no inception_score by {self.features}, which has no "
                "classes: leave it out, or give public.features=inception"
            )


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a model is asked, and what people said.

    `picture` and `mask` are files in the set's folder, `size` the bytes of the first:
    by the names and sizes of files a set's hash knows them.
    """

    id: str
    picture: str
    size: int = 0
    references: tuple[str, ...] = ()
    question: str = ""
    options: tuple[str, ...] = ()
    relevance: tuple[float, ...] = ()
    mask: str = ""


def check_metrics(metrics: Sequence[str], tasks: Iterable[str]) -> None:
    """ValueError for a metric that none of the tasks has: it would be passed over."""
    known = [name for task in tasks for name in METRICS[task]]
    if wrong := set(metrics) - set(known):
        raise ValueError(
            f"public.metrics has {sorted(wrong)[0]!r}: choose from {', '.join(known)}"
        )


Reader = Callable[[Path], Iterator[Example]]


def read(name: str, folder: Path) -> list[Example]:
    """The examples of a set, in an order that never changes.

    Raises FileNotFoundError that says what to put where, ValueError that names a file
    which is damaged or an example which is empty.
    """
    needs, where, reader = SETS[name]
    own = folder / EXAMPLES
    missing = [need for need in needs if not (folder / need).exists()]
    prepared = bool(missing) and public_tfds.there(name, folder)
    if missing and not prepared and not own.is_file():
        by_tfds = ""
        if name in public_tfds.SPLITS:
            by_tfds = (
                f", or tfds build {public_tfds.NAME} --file_format=array_record "
                f"--data_dir={folder}"
            )
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: put the set {name!r} there, "
            f"unpacked ({where}){by_tfds}, or {EXAMPLES} (cm3leon_jax/evaluation/"
            "public_sets.py says how it reads), or give its folder as --data"
        )
    try:
        if own.is_file():
            found = [*_own(own)]
        elif prepared:
            found = [*_BY_TFDS[name](public_tfds.captioned(name, folder))]
        else:
            found = [*reader(folder)]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"the files of the set {name!r} in {folder} have another form than is "
            f"known ({error!r}): see cm3leon_jax/evaluation/public_sets.py"
        ) from error
    return [_checked(folder, example) for example in found]


def labels(folder: Path) -> dict[str, int]:
    """Classes of masks by name: `labels.txt`, as COCO-Stuff has it, where the number
    of a line is one more than that of the pixels; or `classes.txt`, where it is that.
    """
    own = (folder / "classes.txt").is_file()
    path = folder / ("classes.txt" if own else "labels.txt")
    found = {}
    for line in path.read_text("utf-8").splitlines():
        number, _, name = line.partition(":")
        if name.strip() and int(number) >= 1 - own:
            found[name.strip()] = int(number) - 1 + own
    return found


def _checked(folder: Path, example: Example) -> Example:
    for name in (example.picture, example.mask) if not example.size else ():
        if name and not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} does not exist, and example {example.id!r} shows it"
            )
    for kind in ("reference", "option"):
        texts = getattr(example, f"{kind}s")
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"example {example.id!r} of {folder}: an empty {kind}")
    if example.size:  # it has been read from within TFDS's files
        return example
    size = (folder / example.picture).stat().st_size
    return dataclasses.replace(example, size=size)


def _json(path: Path) -> Any:
    return configs.read_json(path, "fetch it again")


def _own(path: Path) -> Iterator[Example]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            lists = ("references", "options", "relevance")
            values |= {key: tuple(values[key]) for key in lists if key in values}
            yield Example(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def _coco_prompts(folder: Path) -> Iterator[Example]:
    made = _json(folder / "annotations/captions_val2014.json")
    said: dict[int, list[tuple[int, str]]] = {}
    for caption in made["annotations"]:
        pair = caption["id"], caption["caption"]
        said.setdefault(caption["image_id"], []).append(pair)
    files = {x["id"]: f"val2014/{x['file_name']}" for x in made["images"]}
    return _prompts(Captioned(k, files[k], 0, tuple(x)) for k, x in said.items())


def _prompts(found: Iterable[Captioned]) -> Iterator[Example]:
    """One caption, its first, of each picture, the pictures in the order of a hash."""
    by_hash = {hashlib.sha256(str(x.key).encode()).digest(): x for x in found}
    for _, x in sorted(by_hash.items()):
        _, caption = min(x.captions)
        yield _of_coco(x, [caption])


def _karpathy(folder: Path) -> Iterator[Example]:
    return _all_said(
        Captioned(
            picture["cocoid"],
            f"{picture['filepath']}/{picture['filename']}",
            0,
            tuple((0, said["raw"]) for said in picture["sentences"]),
        )
        for picture in _json(folder / "dataset_coco.json")["images"]
        if picture["split"] == "test"
    )


def _all_said(found: Iterable[Captioned]) -> Iterator[Example]:
    """All captions of each picture, the pictures by their numbers."""
    for x in sorted(found, key=lambda x: x.key):
        yield _of_coco(x, [text for _, text in x.captions])


def _of_coco(x: Captioned, texts: Sequence[str]) -> Example:
    said = tuple(text.strip() for text in texts)
    return Example(id=str(x.key), picture=x.file, size=x.size, references=said)


_BY_TFDS = {"coco_prompts": _prompts, "coco_karpathy": _all_said}


def _vqa(questions: str, answers: str | None, picture: str) -> Reader:
    """Questions of the VQA format; without answers they are only written down."""

    def read(folder: Path) -> Iterator[Example]:
        said = _json(folder / answers)["annotations"] if answers else []
        given = {
            x["question_id"]: tuple(answer["answer"] for answer in x["answers"])
            for x in said
        }
        for asked in _json(folder / questions)["questions"]:
            yield Example(
                id=str(asked["question_id"]),
                picture=picture.format(asked["image_id"]),
                question=asked["question"],
                references=given[asked["question_id"]] if answers else (),
            )

    return read


def _vizwiz(folder: Path) -> Iterator[Example]:
    for asked in _json(folder / "Annotations/val.json"):
        yield Example(
            id=asked["image"],
            picture=f"val/{asked['image']}",
            question=asked["question"],
            references=tuple(answer["answer"] for answer in asked["answers"]),
        )


def _paragraphs(folder: Path) -> Iterator[Example]:
    test = set(_json(folder / "test_split.json"))
    for picture in _json(folder / "paragraphs_v1.json"):
        key = picture["image_id"]
        if key in test:
            places = (f"{part}/{key}.jpg" for part in ("VG_100K", "VG_100K_2"))
            found = [place for place in places if (folder / place).is_file()]
            yield Example(
                id=str(key),
                picture=[*found, f"VG_100K/{key}.jpg"][0],
                references=(picture["paragraph"].strip(),),
            )


def _visdial(folder: Path) -> Iterator[Example]:
    """Of every dialogue the round that people have judged the answers of; what was
    said before is part of the question."""
    made = _json(folder / "visdial_1.0_val.json")["data"]
    questions, answers = made["questions"], made["answers"]
    dense = _json(folder / "visdial_1.0_val_dense_annotations.json")
    judged = {x["image_id"]: x for x in dense}
    for dialogue in made["dialogs"]:
        key = dialogue["image_id"]
        if key not in judged:
            continue
        last = judged[key]["round_id"] - 1
        before = [
            f"{questions[turn['question']]}? {answers[turn['answer']]}."
            for turn in dialogue["dialog"][:last]
        ]
        now = dialogue["dialog"][last]
        asked = f"{questions[now['question']]}?"
        yield Example(
            id=str(key),
            picture=f"VisualDialog_val2018/VisualDialog_val2018_{key:012d}.jpg",
            question=" ".join([f"{dialogue['caption'].strip()}.", *before, asked]),
            options=tuple(answers[i] for i in now["answer_options"]),
            relevance=tuple(judged[key]["gt_relevance"]),
        )


def _stuff(folder: Path) -> Iterator[Example]:
    for picture in sorted((folder / "val2017").glob("*.jpg")):
        mask = f"stuffthingmaps/val2017/{picture.stem}.png"
        yield Example(id=picture.stem, picture=f"val2017/{picture.name}", mask=mask)


def _pictures(folder: Path) -> Iterator[Example]:
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    for path in sorted((folder / "images").rglob("*")):
        if path.suffix.lower() in kinds:
            name = path.relative_to(folder).as_posix()
            yield Example(id=name, picture=name)


_COCO = "cocodataset.org: "


def _vqa_val(prefix: str, source: str) -> tuple[tuple[str, ...], str, Reader]:
    """Questions about pictures of COCO's, and answers."""
    files = (f"{prefix}OpenEnded_mscoco_val2014_questions.json",)
    files += (f"{prefix}mscoco_val2014_annotations.json",)
    reader = _vqa(*files, "val2014/COCO_val2014_{:012d}.jpg")
    return (*files, "val2014"), f"{source}; {_COCO}2014 Val images", reader


# What must be there, where it comes from, and how it is read.
SETS: dict[str, tuple[tuple[str, ...], str, Reader]] = {
    "coco_prompts": (
        ("annotations/captions_val2014.json", "val2014"),
        f"{_COCO}2014 Val images, 2014 Train/Val annotations",
        _coco_prompts,
    ),
    "coco_karpathy": (
        ("dataset_coco.json", "val2014"),
        f"{_COCO}2014 Val images; dataset_coco.json of Karpathy's caption_datasets.zip",
        _karpathy,
    ),
    "vqa2": _vqa_val("v2_", "visualqa.org: VQA v2.0"),
    "vqa2_test_dev": (
        ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test2015"),
        f"visualqa.org: VQA v2.0; {_COCO}2015 Test images",
        _vqa(
            "v2_OpenEnded_mscoco_test-dev2015_questions.json",
            None,
            "test2015/COCO_test2015_{:012d}.jpg",
        ),
    ),
    "okvqa": _vqa_val("", "okvqa.allenai.org: testing"),
    "vizwiz": (
        ("Annotations/val.json", "val"),
        "vizwiz.org: visual question answering, val.zip and Annotations.zip",
        _vizwiz,
    ),
    "image_paragraph": (
        ("paragraphs_v1.json", "test_split.json", "VG_100K"),
        "the Stanford image paragraph set; visualgenome.org: images parts 1 and 2",
        _paragraphs,
    ),
    "visdial": (
        (
            "visdial_1.0_val.json",
            "visdial_1.0_val_dense_annotations.json",
            "VisualDialog_val2018",
        ),
        "visualdialog.org: v1.0 validation, its dense annotations and images",
        _visdial,
    ),
    "coco_segmentation": (
        ("val2017", "stuffthingmaps/val2017", "labels.txt"),
        f"{_COCO}2017 Val images; COCO-Stuff: stuffthingmaps_trainval2017, labels.txt",
        _stuff,
    ),
    "pictures": (("images",), "pictures of any kind, in any folders", _pictures),
}
