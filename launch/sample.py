r"""Any task from the shell, with the newest checkpoint of a work directory.

    python launch/sample.py --workdir runs/quick --task text_to_image \
        --prompt "a small red circle at the top left on a white background" --out a.png
    python launch/sample.py --workdir runs/quick --task text_to_image \
        --prompts prompts.txt --out pictures/
    python launch/sample.py --workdir runs/quick --task caption --image a.png
    python launch/sample.py --workdir runs/quick --task infill --image a.png \
        --box 0,0,16,16 --prompt "a large blue square at the top left" --out b.png
    python launch/sample.py --workdir runs/quick --task infill \
        --document "a small <mask> circle at the top left"
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
DOCUMENT = flags.DEFINE_multi_string("document", [], "A text with <mask> in it.")
OUT = flags.DEFINE_string("out", None, "A .png file, or a folder for several.")
RETRIEVE = flags.DEFINE_integer(
    "retrieve", 0, "Documents of the memory before each prompt or caption."
)
SEED = flags.DEFINE_integer("seed", 0, "Another seed, another sample.")
OVERRIDES = {
    "temperature": flags.DEFINE_float("temperature", None, ">= 0; 0 is greedy."),
    "top_p": flags.DEFINE_float("top_p", None, "In (0, 1]."),
    "top_k": flags.DEFINE_integer("top_k", None, ">= 0; 0 is all."),
    "guidance": flags.DEFINE_float("guidance", None, ">= 0; 1 is none."),
}


def main() -> dict:
    from cm3leon_jax import CM3Leon
    from cm3leon_jax.data.documents import Document, Text
    from cm3leon_jax.parallel import distributed

    _check_flags()
    distributed.initialize()
    model = CM3Leon.load(command.WORKDIR.value, CHECKPOINT.value)
    prompts = _prompts()
    if TASK.value == "text_to_image":
        _need(prompts, "--prompt or --prompts")
        sampler = _sampler(model.system.sampling.text_to_image)
        options = {"retrieve": RETRIEVE.value, "seed": SEED.value}
        return _save(model.text_to_image(prompts, sampler=sampler, **options))
    if TASK.value == "infill" and DOCUMENT.value:
        sampler = _sampler(model.system.sampling.infill, guided=False)
        documents = [Document((Text(text),)) for text in DOCUMENT.value]
        filled = model.infill(documents, sampler=sampler, seed=SEED.value)
        return {"texts": [document.segments[0].text for document in filled]}
    images = [_open(path) for path in _need(IMAGE.value, "--image")]
    if TASK.value == "caption":
        sampler = _sampler(model.system.sampling.caption)
        options = {"retrieve": RETRIEVE.value, "seed": SEED.value}
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
    if not values:
        raise ValueError(f"--task {TASK.value} needs {flag}")
    return values


def _check_flags() -> None:
    """What can be said before a model is loaded."""
    writes_pictures = TASK.value in ("text_to_image", "reconstruct") or (
        TASK.value == "infill" and not DOCUMENT.value
    )
    if writes_pictures and not OUT.value:
        raise ValueError("say where the pictures go: --out FILE.png or --out FOLDER")
    if RETRIEVE.value and TASK.value not in ("text_to_image", "caption"):
        raise ValueError(f"--retrieve is not for --task {TASK.value}")
    if TASK.value == "text_to_image":
        _need(PROMPT.value or PROMPTS.value, "--prompt or --prompts")
    elif not DOCUMENT.value:
        _need(IMAGE.value, "--image")


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
