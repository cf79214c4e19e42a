r"""Any task from the shell, with the newest checkpoint of a work directory.

    sample="python launch/sample.py --workdir runs/quick"
    $sample --prompt "a small red circle at the top left" --out a.png
    $sample --prompts prompts.txt --out pictures/
    $sample --prompt "a star" --candidates 8 --alpha 0.1 --k 4 --mix --scores --out b/
    $sample --task caption --image a.png --style detailed
    $sample --task answer --image a.png --prompt "what colour is the circle?"
    $sample --task science --image a.png --prompt "what is it?" \
        --choice "a circle" --choice "a star"
    $sample --task infill --image a.png --box 0,0,16,16 \
        --prompt "a large blue square at the top left" --out b.png
    $sample --task infill --image a.png --candidates 32 \
        --document "a small <mask> circle at the top left on a white background"
    $sample --task edit --image a.png --prompt "make the circle green" --out c.png
    $sample --task edit --image a.png --prompt "make it blue" --box 0,0,12,12 \
        --out c.png
    $sample --task control --kind edge --image edges.png --prompt "a star" --out d.png
    $sample --task control --kind style --strength 0.67 --image a.png \
        --prompt "a star" --out d.png
    $sample --task ground --prompt "two shapes" --object "red circle@2,2,10,10" \
        --object "blue star@18,18,30,30" --out e.png
    $sample --task write --prompt EXIT --out f.png
    $sample --task variation --image a.png --out g.png
    $sample --task segment --image a.png --out labels.png
    $sample --task instruct --name edit --field source=a.png \
        --field instruction="make it blue" --out c.png
    $sample --task generate --document "a small red" --out written/
    $sample --task log_likelihood --document "a small red circle" --image a.png
    $sample --task reconstruct --image a.png --out h.png

`--out` is a file for one picture and a folder for several, which fills as they are
finished: a run that was interrupted goes on there. With `--scores` there are all
candidates, best first. Class maps are palette pictures of labels. The last line on
standard output is one JSON object: {"pictures": […]}, {"texts": […]},
{"documents": […]} or {"log_likelihoods": […]}.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import command
import instruct_flags
import outputs
import precision_flags
import sampler_flags
from absl import flags

# What each task reads; infilling a document is a task of its own here.
WRITES = ("retrieve", "seed", "amateur", *sampler_flags.NAMES)
TELLS = (*WRITES, "candidates", "max_text")
DRAWS = (*WRITES, "candidates", "rerank", "scores")
TEXTS, REGION = ("prompt", "prompts"), ("mask", "box")
READS = {
    "text_to_image": (*TEXTS, "out", *DRAWS),
    "caption": ("image", "style", "wording", *TELLS),
    "answer": ("image", *TEXTS, "wording", *TELLS),
    "science": ("image", *TEXTS, "choice", "context", *TELLS),
    "explain": ("image", *TEXTS, "choice", "context", *TELLS),
    "infill": ("image", *REGION, *TEXTS, "out", *DRAWS),
    "infill a document": ("document", "image", *TELLS),
    "edit": ("image", *TEXTS, *REGION, "wording", "out", *DRAWS),
    "control": ("image", "kind", *TEXTS, "strength", "wording", "out", *DRAWS),
    "ground": ("prompt", "object", "wording", "out", *DRAWS),
    "write": (*TEXTS, "wording", "out", *DRAWS),
    "variation": ("image", "wording", "out", *DRAWS),
    "segment": ("image", "wording", "out", *WRITES),
    "instruct": ("name", "field", "wording", "out", "max_text", *DRAWS),
    "generate": ("document", "image", "pictures", "max_text", "out", *WRITES),
    "log_likelihood": ("document", "image", "retrieve"),
    "reconstruct": ("image", "out"),
}
# What it cannot do without; --prompts is as good as --prompt.
NEEDS = {
    "caption": ("image",),
    "infill a document": ("document",),
    "control": ("image", "kind", "out"),
    "ground": ("prompt", "object", "out"),
    "infill": ("image", "out"),
    "science": ("image", "prompt", "choice"),
    "explain": ("image", "prompt", "choice"),
    "generate": ("document", "out"),
    "log_likelihood": ("document",),
    "instruct": ("name", "field"),
} | {
    task: tuple(x for x in READS[task] if x in ("image", "prompt", "out"))
    for task in (
        *("text_to_image", "answer", "edit", "write", "variation", "segment"),
        "reconstruct",
    )
}
TASKS = tuple(name for name in READS if " " not in name)
STYLES = ("short", "detailed", "long")

TASK = flags.DEFINE_enum("task", "text_to_image", TASKS, "What to do.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A folder of the work directory, or FOLDER@STEP (default: sft, else pretrain).",
)
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "A prompt, question or instruction; may be given repeatedly."
)
PROMPTS = flags.DEFINE_string("prompts", None, "A file with one prompt a line.")
IMAGE = flags.DEFINE_multi_string("image", [], "A picture; may be given repeatedly.")
MASK = flags.DEFINE_multi_string("mask", [], "A picture, not black = write anew.")
BOX = flags.DEFINE_multi_string("box", [], "x0,y0,x1,y1 in pixels: anew inside.")
DOCUMENT = flags.DEFINE_multi_string(
    "document", [], "A text, with <mask> for infill; --image is the picture after it."
)
STYLE = flags.DEFINE_enum("style", "short", STYLES, "Of captions.")
KIND = flags.DEFINE_string("kind", None, "edge, depth, style, …: of control pictures.")
STRENGTH = flags.DEFINE_float("strength", 1.0, "Of a reference, in (0, 1].")
OBJECT = flags.DEFINE_multi_string("object", [], "PHRASE@x0,y0,x1,y1 to be placed.")
CHOICE = flags.DEFINE_multi_string("choice", [], "An answer to choose from.")
CONTEXT = flags.DEFINE_string("context", None, "What else is known.")
flags.DEFINE_integer(
    "wording", None, "Number of the instruction's template, in data/task_templates.py."
)
PICTURES = flags.DEFINE_integer("pictures", 1, "Pictures' worth of tokens to generate.")
flags.DEFINE_integer("max_text", None, "Pieces of a text at most.")
flags.DEFINE_integer(
    "candidates", None, "Texts or pictures to write, of which the best is taken."
)
SCORES = flags.DEFINE_bool("scores", False, "All candidates of pictures, with scores.")
AMATEUR = flags.DEFINE_string(
    "amateur", None, "The work directory of a smaller system to contrast with."
)
OUT = flags.DEFINE_string("out", None, "A .png file, or a folder for several.")
BANK = flags.DEFINE_string("bank", "bank", "Folder of the memory, seen from --workdir.")
RETRIEVE = flags.DEFINE_integer(
    "retrieve", 0, "Documents of the memory before each prompt."
)
SEED = flags.DEFINE_integer("seed", 0, "Another seed, another sample.")


def main() -> dict:
    from cm3leon_jax import CM3Leon
    from cm3leon_jax.parallel import distributed

    prompts = _prompts()
    task = _check_flags(prompts)
    distributed.initialize()
    model = CM3Leon.load(
        *(command.WORKDIR.value, CHECKPOINT.value),
        bank=BANK.value,
        precision=precision_flags.precision(),
    )
    if AMATEUR.value:
        model.contrast(CM3Leon.load(AMATEUR.value))
    images = [_open(path) for path in IMAGE.value]
    how: dict[str, Any] = {}
    if set(WRITES) <= set(READS[task]):
        bare = task == "infill" and not prompts
        sampler = sampler_flags.sampler(_default(model, task), guided=not bare)
        how = {"sampler": sampler, "seed": SEED.value, "retrieve": RETRIEVE.value}
    for name in ("candidates", "max_text", "wording"):
        if name in READS[task] and flags.FLAGS[name].value is not None:
            how[name] = flags.FLAGS[name].value
    if sampler_flags.RERANK.value:
        how["rerank"] = sampler_flags.rerank()
    if SCORES.value:
        how["return_scores"] = True
    return _CALLS[task](model, images, prompts, how)


def _default(model, task: str):
    """The sampler that the config has for a task."""
    from cm3leon_jax.sampling.sampler import Sampler

    sampling = model.system.sampling
    if task == "instruct":
        return instruct_flags.sampler(sampling)
    own = {
        "infill a document": sampling.caption,
        "science": sampling.answer,
        "explain": sampling.answer,
        "variation": sampling.control,
        "ground": sampling.text_to_image,
        "write": sampling.text_to_image,
        "generate": Sampler(top_p=0.9),
    }
    return own[task] if task in own else getattr(sampling, task)


def _prompts() -> list[str]:
    lines = []
    if PROMPTS.value:
        lines = Path(PROMPTS.value).read_text().splitlines()
    return PROMPT.value + [line for line in lines if line.strip()]


def _check_flags(prompts: list[str]) -> str:
    """The task; what can be said before a model is loaded."""
    asked = TASK.value == "infill" and DOCUMENT.value
    task = "infill a document" if asked else TASK.value
    for name in sorted({name for names in READS.values() for name in names}):
        if flags.FLAGS[name].present and name not in READS[task]:
            raise ValueError(f"--{name} is not for --task {task}")
    for name in NEEDS[task]:
        if not (prompts if name == "prompt" else flags.FLAGS[name].value):
            wanted = {
                "prompt": "--prompt or --prompts",
                "out": "--out FILE.png or --out FOLDER",
            }
            raise ValueError(f"--task {task} needs {wanted.get(name, f'--{name}')}")
    if task == "infill" and not (MASK.value or BOX.value):
        raise ValueError("--task infill needs --mask or --box, or --document")
    if MASK.value and BOX.value:
        raise ValueError("give --mask or --box, not both")
    if task == "instruct":
        instruct_flags.check()
    if OUT.value and task != "generate":
        out, many = Path(OUT.value), len(IMAGE.value or prompts) > 1 or SCORES.value
        if out.suffix not in (("",) if many else ("", ".png")):
            wanted = "a folder for several pictures" if many else "a .png file"
            raise ValueError(f"--out {out}: give {wanted}")
    return task


def _open(path: str):
    from PIL import Image, ImageOps

    try:
        return ImageOps.exif_transpose(Image.open(path))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from None


def _corners(text: str, flag: str) -> tuple[int, ...]:
    try:
        x0, y0, x1, y1 = (int(corner) for corner in text.split(","))
    except ValueError:
        raise ValueError(f"--{flag} {text}: give four pixels, x0,y0,x1,y1") from None
    return x0, y0, x1, y1


def _regions() -> list:
    """One mask or box a picture."""
    return [_open(path) for path in MASK.value] or [
        _corners(text, "box") for text in BOX.value
    ]


def _objects() -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for text in OBJECT.value:
        phrase, at, corners = text.rpartition("@")
        if not at:
            raise ValueError(f"--object {text}: give PHRASE@x0,y0,x1,y1")
        found.append((phrase, _corners(corners, "object")))
    return found


def _documents(model, images: list) -> list:
    """--document, each with its picture if there are any."""
    from cm3leon_jax.data.documents import Document, Image, Text

    texts = [Text(text) for text in DOCUMENT.value]
    if not images:
        return [Document((text,)) for text in texts]
    if len(images) != len(texts):
        raise ValueError(f"{len(texts)} documents need as many pictures, or none")
    arrays = model.codec.arrays(images)
    return [
        Document((text, Image(array=array)))
        for text, array in zip(texts, arrays, strict=True)
    ]


def _pictures(paint: Callable[..., list], model, images, prompts, how) -> dict:
    """A file, or a folder that fills up batch by batch; what is finished there is not
    drawn again."""
    from cm3leon_jax import gallery
    from cm3leon_jax.evaluation.kept import digest

    out, about = Path(OUT.value), [images, prompts, _regions()]
    count = max(len(images or prompts), 1)

    def draw(numbers: list[int]) -> list:
        numbered = how if TASK.value == "reconstruct" else how | {"numbers": numbers}
        return paint(
            model, *([x[i] for i in numbers if x] for x in about[:3]), numbered
        )

    if any(len(x) not in (0, count) for x in about):
        paint(model, *about, how)  # says which are too few
    if out.suffix:
        (picture,) = draw([0])
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
        return {"pictures": [str(out)]}
    flagged = [flag.value for flag in (TASK, KIND, STRENGTH, OBJECT)]
    fields = instruct_flags.fields(_open) if TASK.value == "instruct" else {}
    same = outputs.key(model, how | {"flags": flagged, "fields": fields})
    # The text tokenizer is known by what it makes of the prompts.
    about.append([model.codec.text.encode(text) for text in prompts])
    # Else a list would end at such a prompt, hours after it began.
    limit, codes = model.writer.limit, model.codec.image_tokens
    for i, pieces in enumerate(about[-1]):
        if len(pieces) > limit - codes - 2:
            raise ValueError(
                f"prompt {i} has {len(pieces)} pieces: beside {codes} of a picture, a "
                f"context of {limit} has room for at most {limit - codes - 2}"
            )
    keys = [digest([same, [x[i] for x in about if x]]) for i in range(count)]
    batch = max(model.writer.engine.batch // how.get("candidates", 1), 1)
    made = gallery.fill(out, prompts or [""] * count, draw, keys=keys, batch=batch)
    return {"pictures": made if SCORES.value else [x["picture"] for x in made]}


def _infill_documents(model, images, prompts, how) -> dict:
    filled = model.infill(_documents(model, images), **how)
    return {"texts": [document.segments[0].text for document in filled]}


def _science(model, images, prompts, how) -> dict:
    choices = [CHOICE.value] * len(images)
    contexts = [CONTEXT.value] * len(images) if CONTEXT.value else None
    ask = model.explain if TASK.value == "explain" else model.science
    found = ask(images, prompts, choices, contexts=contexts, **how)
    return {"texts": [x if isinstance(x, str) else list(x) for x in found]}


def _instruct(model, images, prompts, how) -> dict:
    task, fields = instruct_flags.task(), [instruct_flags.fields(_open)]
    if task.writes_text:
        return {"texts": model.instruct(task.name, fields, **how)}

    def paint(m, images, prompts, regions, how):
        return m.instruct(task.name, fields, **how)

    return (_maps if task.output in task.masks else _pictures)(
        paint, model, images, prompts, how
    )


def _maps(paint: Callable[..., list], model, images, prompts, how) -> dict:
    def coloured(*given) -> list:
        return outputs.palettes(paint(*given), len(model.classes))

    made = _pictures(coloured, model, images, prompts, how)
    return made | {"classes": list(model.classes)}


def _log_likelihood(model, images, prompts, how) -> dict:
    documents = _documents(model, images)
    found = model.log_likelihood(documents, retrieve=RETRIEVE.value)
    return {"log_likelihoods": found}


def _control(m, i, p, _, how) -> list:
    return m.control(i, KIND.value, p or None, strength=STRENGTH.value, **how)


# Of a model, pictures, prompts and regions, as many as are given together.
_PAINTS: dict[str, Callable[..., list]] = {
    "text_to_image": lambda m, i, p, r, how: m.text_to_image(p, **how),
    "infill": lambda m, i, p, r, how: m.infill(i, r, p or None, **how),
    "edit": lambda m, i, p, r, how: m.edit(i, p, regions=r or None, **how),
    "control": _control,
    "ground": lambda m, i, p, r, how: m.ground(p, [_objects()] * len(p), **how),
    "write": lambda m, i, p, r, how: m.write(p, **how),
    "variation": lambda m, i, p, r, how: m.variation(i, **how),
    "reconstruct": lambda m, i, p, r, how: m.reconstruct(i),
}
_CALLS: dict[str, Callable[[Any, list, list[str], dict[str, Any]], dict]] = {
    **{task: partial(_pictures, paint) for task, paint in _PAINTS.items()},
    "caption": lambda m, i, p, how: {"texts": m.caption(i, style=STYLE.value, **how)},
    "answer": lambda m, i, p, how: {"texts": m.answer(i, p, **how)},
    "science": _science,
    "explain": _science,
    "infill a document": _infill_documents,
    "segment": partial(_maps, lambda m, i, p, r, how: m.segment(i, **how)),
    "instruct": _instruct,
    "generate": lambda m, i, p, how: outputs.save_documents(
        m.generate(_documents(m, i), images=PICTURES.value, **how), Path(OUT.value)
    ),
    "log_likelihood": _log_likelihood,
}


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
