r"""Any task from the shell, with the newest checkpoint of a work directory.

    python launch/sample.py --workdir runs/quick --task text_to_image \
        --prompt "a small red circle at the top left on a white background" --out a.png
    python launch/sample.py --workdir runs/quick --task text_to_image \
        --prompts prompts.txt --out pictures/
    python launch/sample.py --workdir runs/quick --task caption --image a.png
    python launch/sample.py --workdir runs/quick --task infill --image a.png \
        --box 0,0,16,16 --prompt "a large blue square at the top left" --out b.png
    python launch/sample.py --workdir runs/quick --task infill --image a.png \
        --document "a small <mask> circle at the top left on a white background" \
        --candidates 32
    python launch/sample.py --workdir runs/quick --task reconstruct --image a.png \
        --out c.png

`--out` is a file for one picture and a folder for several. The last line on standard
output is one JSON object: {"pictures": […]} or {"texts": […]}.
"""

import dataclasses
from pathlib import Path

import command
from absl import flags

TASKS = ("text_to_image", "caption", "infill", "reconstruct")
TASK = flags.DEFINE_enum("task", "text_to_image", TASKS, "What to do.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "pretrain", "A folder of the work directory, or FOLDER@STEP."
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given repeatedly.")
PROMPTS = flags.DEFINE_string("prompts", None, "A file with one prompt a line.")
IMAGE = flags.DEFINE_multi_string("image", [], "A picture; may be given repeatedly.")
MASK = flags.DEFINE_multi_string("mask", [], "A picture, not black = regenerate.")
BOX = flags.DEFINE_multi_string("box", [], "x0,y0,x1,y1 in pixels: regenerate inside.")
DOCUMENT = flags.DEFINE_multi_string(
    "document", [], "A text with <mask> in it; --image is the picture after it."
)
CANDIDATES = flags.DEFINE_integer(
    "candidates", None, "Texts to write, of which the likeliest is taken."
)
OUT = flags.DEFINE_string("out", None, "A .png file, or a folder for several.")
RETRIEVE = flags.DEFINE_integer(
    "retrieve", 0, "Documents of the memory before each prompt or caption."
)
SEED = flags.DEFINE_integer("seed", 0, "Another seed, another sample.")
# What each task reads; infilling a document is a task of its own here.
READS = {
    "text_to_image": ("prompt", "prompts", "out", "retrieve"),
    "caption": ("image", "retrieve", "candidates"),
    "infill": ("image", "mask", "box", "prompt", "prompts", "out"),
    "infill a document": ("document", "image", "candidates"),
    "reconstruct": ("image", "out"),
}
OVERRIDES = {
    "temperature": flags.DEFINE_float("temperature", None, ">= 0; 0 is greedy."),
    "top_p": flags.DEFINE_float("top_p", None, "In (0, 1]."),
    "top_k": flags.DEFINE_integer("top_k", None, ">= 0; 0 is all."),
    "guidance": flags.DEFINE_float("guidance", None, ">= 0; 1 is none."),
}


def main() -> dict:
    from cm3leon_jax import CM3Leon
    from cm3leon_jax.parallel import distributed

    prompts = _prompts()
    _check_flags(prompts)
    distributed.initialize()
    model = CM3Leon.load(command.WORKDIR.value, CHECKPOINT.value)
    if TASK.value == "text_to_image":
        sampler = _sampler(model.system.sampling.text_to_image)
        options = {"retrieve": RETRIEVE.value, "seed": SEED.value}
        return _save(model.text_to_image(prompts, sampler=sampler, **options))
    images = [_open(path) for path in IMAGE.value]
    if DOCUMENT.value:
        sampler = _sampler(model.system.sampling.caption)
        filled = model.infill(
            _documents(model, images),
            candidates=CANDIDATES.value,
            sampler=sampler,
            seed=SEED.value,
        )
        return {"texts": [document.segments[0].text for document in filled]}
    if TASK.value == "caption":
        sampler = _sampler(model.system.sampling.caption)
        options = {"retrieve": RETRIEVE.value, "seed": SEED.value}
        options["candidates"] = CANDIDATES.value
        return {"texts": model.caption(images, sampler=sampler, **options)}
    if TASK.value == "reconstruct":
        return _save(model.reconstruct(images))
    sampler = _sampler(model.system.sampling.infill, guided=bool(prompts))
    return _save(
        model.infill(
            images, _masks(images), prompts or None, sampler=sampler, seed=SEED.value
        )
    )


def _prompts() -> list[str]:
    lines = []
    if PROMPTS.value:
        lines = Path(PROMPTS.value).read_text().splitlines()
    return PROMPT.value + [line for line in lines if line.strip()]


def _need(values: list, flag: str) -> list:
    if not values or values == [None]:
        raise ValueError(f"--task {TASK.value} needs {flag}")
    return values


def _check_flags(prompts: list[str]) -> None:
    """What can be said before a model is loaded."""
    task = "infill a document" if DOCUMENT.value else TASK.value
    for name in {name for names in READS.values() for name in names}:
        if flags.FLAGS[name].value and name not in READS.get(task, ()):
            raise ValueError(f"--{name} is not for --task {task}")
    if task == "text_to_image":
        _need(prompts, "--prompt or --prompts")
    elif not DOCUMENT.value:
        _need(IMAGE.value, "--image")
    if "out" in READS[task]:
        out = Path(_need([OUT.value], "--out FILE.png or --out FOLDER")[0])
        many = len(prompts if task == "text_to_image" else IMAGE.value) > 1
        if out.suffix not in (("",) if many else ("", ".png")):
            wanted = "a folder for several pictures" if many else "a .png or a folder"
            raise ValueError(f"--out {out}: give {wanted}")


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


def _sampler(default, *, guided: bool = True):
    """The task's own sampler (None) unless a flag changes it."""
    given = {k: f.value for k, f in OVERRIDES.items() if f.value is not None}
    if not given:
        return None
    if not guided:
        given = {"guidance": 1.0, **given}
    return dataclasses.replace(default, **given)


def _open(path: str):
    from PIL import Image, ImageOps

    try:
        return ImageOps.exif_transpose(Image.open(path))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from None


def _masks(images: list) -> list:
    """One mask per picture, from --mask or --box."""
    import numpy as np

    if MASK.value:
        return [np.asarray(_open(path).convert("L")) > 0 for path in MASK.value]
    masks = []
    boxes = _need(BOX.value, "--mask or --box")
    if len(boxes) != len(images):
        raise ValueError(f"{len(images)} pictures need as many boxes, not {len(boxes)}")
    for box, image in zip(boxes, images, strict=True):
        try:
            x0, y0, x1, y1 = (int(corner) for corner in box.split(","))
        except ValueError:
            raise ValueError(f"--box {box}: give four pixels, x0,y0,x1,y1") from None
        if not (0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height):
            raise ValueError(
                f"--box {box}: x0 < x1 and y0 < y1 inside {image.width}x{image.height}"
            )
        mask = np.zeros((image.height, image.width), bool)
        mask[y0:y1, x0:x1] = True
        masks.append(mask)
    return masks


def _save(pictures: list) -> dict:
    out = Path(OUT.value)
    if len(pictures) == 1 and out.suffix:
        paths = [out]
    else:
        paths = [out / f"{i:04d}.png" for i in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return {"pictures": [str(path) for path in paths]}


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
