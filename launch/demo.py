"""A page in the browser for one system: draw, fill in, describe, edit, segment.

    bash launch/setup.sh demo
    python launch/demo.py --workdir runs/quick
    python launch/demo.py --workdir runs/full --checkpoint sft --port 7861

The last line says where it is, {"url": …}; Ctrl-C ends it. Only this machine can reach
it: for a machine elsewhere, `ssh -L 7860:localhost:7860 HOST`. What a checkpoint was
not tuned on says so. Nothing is sent anywhere, and the page needs no network.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import command
import numpy as np
from absl import flags
from PIL import Image as Pillow
from PIL import ImageOps

if TYPE_CHECKING:
    from cm3leon_jax import CM3Leon

SIDE = 384  # pixels that small pictures are shown with, at least
MOST = 8  # pictures of a prompt
_BRUSH = "#e11d48"
_UNPAINTED = "give a picture, and paint over what is to be drawn anew"


def large(picture: Pillow.Image) -> Pillow.Image:
    """A small picture enlarged by a whole factor, without blur."""
    factor = max(1, round(SIDE / max(picture.size)))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Pillow.Resampling.NEAREST
    )


def painted(editor: dict[str, Any] | None) -> tuple[Pillow.Image, np.ndarray]:
    """What an image editor holds: its picture, and bool [Y, X] of what was painted."""
    if not editor or editor["background"] is None:
        raise ValueError(_UNPAINTED)
    picture = editor["background"].convert("RGB")
    mask = np.zeros((picture.height, picture.width), bool)
    for layer in editor["layers"]:
        if layer is not None:
            mask |= np.asarray(layer.convert("RGBA").resize(picture.size))[..., 3] > 0
    if not mask.any():
        raise ValueError(_UNPAINTED)
    return picture, mask


class Tasks:
    """What the page does, as functions of what its fields hold; ValueError for what
    cannot be done."""

    def __init__(self, model: "CM3Leon"):
        self.model = model

    def can(self, task: str) -> bool:
        """Whether the checkpoint was tuned on a task."""
        return task in self.model.writer.tasks

    def draw(
        self, prompt: str, count: int, near: int, seed: int
    ) -> tuple[list[Pillow.Image], list[tuple[Pillow.Image, str]]]:
        """Pictures of a prompt, and the documents that stood before it."""
        _needed(prompt, "say what to draw")
        count, near = int(count), int(near)
        found = self.model.retrieve(text=prompt, k=near) if near else []
        options: dict[str, Any] = {"retrieve": [found] * count} if found else {}
        made = self.model.text_to_image([prompt] * count, seed=int(seed), **options)
        shown = [
            (large(Pillow.fromarray(picture)), " ".join(document.texts))
            for document in found
            for picture in document.pictures[:1]
        ]
        return [large(picture) for picture in made], shown

    def fill(
        self, editor: dict[str, Any] | None, prompt: str, seed: int
    ) -> Pillow.Image:
        """A picture with what was painted over drawn anew."""
        picture, mask = painted(editor)
        prompts = [prompt] if prompt and prompt.strip() else None
        found = self.model.infill([picture], [mask], prompts, seed=int(seed))
        return large(found[0])

    def describe(self, picture: Pillow.Image | None, question: str, seed: int) -> str:
        """A caption, or the answer to a question."""
        given = _needed(picture, "give a picture")
        if not (question and question.strip()):
            return self.model.caption([given], seed=int(seed))[0]
        return self.model.answer([given], [question], seed=int(seed))[0]

    def edit(
        self, picture: Pillow.Image | None, instruction: str, seed: int
    ) -> Pillow.Image:
        """A picture changed as it is said."""
        given = _needed(picture, "give a picture")
        _needed(instruction, "say what to change")
        return large(self.model.edit([given], [instruction], seed=int(seed))[0])

    def segment(
        self, picture: Pillow.Image | None, seed: int
    ) -> tuple[Pillow.Image, list[tuple[np.ndarray, str]]]:
        """The square of the picture that is used, and where each class is in it."""
        given = _needed(picture, "give a picture")
        [labels] = self.model.segment([given], seed=int(seed))
        square = ImageOps.fit(given.convert("RGB"), labels.shape[::-1])
        shown = large(square)
        factor = shown.width // square.width
        areas = []
        for label, name in enumerate(self.model.classes):
            area = labels == label
            if label and area.any():  # label 0 is the background
                whole = area.repeat(factor, 0).repeat(factor, 1)
                areas.append((whole.astype(float), name))
        return shown, areas


def _needed(value: Any, otherwise: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(otherwise)
    return value


def build(model: "CM3Leon") -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    tasks = Tasks(model)

    def on(button: Any, function: Callable, inputs: list, outputs: list) -> None:
        @functools.wraps(function)
        def told(*values: Any) -> Any:
            try:
                return function(*values)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from None

        # One model: one thing at a time, whoever asks.
        button.click(told, inputs, outputs, concurrency_id="model", concurrency_limit=1)

    def picture(label: str, name: str) -> Any:
        kind = {"type": "pil", "format": "png", "image_mode": "RGB"}
        return gr.Image(label=label, elem_id=name, **kind)

    def untuned(task: str, name: str) -> None:
        if not tasks.can(task):
            gr.Markdown(
                f"This checkpoint was not tuned on {name}: `launch/sft.py` does that."
            )

    with gr.Blocks(title="cm3leon_jax", analytics_enabled=False) as page:
        gr.Markdown(f"# {model.system.name}")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Tab("Draw"):
            prompt = gr.Textbox(label="Prompt")
            count = gr.Slider(1, MOST, 4, step=1, label="Pictures")
            with_memory = model.memory is not None
            near = gr.Slider(
                0, 4, 0, step=1, label="Retrieved documents", visible=with_memory
            )
            go = gr.Button("Draw", variant="primary")
            drawn = gr.Gallery(
                label="Pictures",
                **{"columns": 4, "format": "png", "type": "pil", "elem_id": "drawn"},
            )
            found = gr.Gallery(
                label="Documents before the prompt",
                **{"columns": 4, "format": "png", "visible": with_memory},
                elem_id="found",
            )
            on(go, tasks.draw, [prompt, count, near, seed], [drawn, found])
            send = gr.Button("Fill in the first of them")
        with gr.Tab("Fill in"):
            gr.Markdown("Upload a picture, or send one here; then paint.")
            editor = gr.ImageEditor(
                label="Picture to paint on",
                elem_id="editor",
                **{"type": "pil", "format": "png", "layers": False, "transforms": ()},
                sources=("upload", "clipboard"),
                brush=gr.Brush(default_size=48, colors=[_BRUSH], color_mode="fixed"),
                canvas_size=(SIDE, SIDE),
            )
            whole = gr.Textbox(label="Prompt for the whole picture (may be empty)")
            go, filled = (
                gr.Button("Fill in", variant="primary"),
                picture("Filled in", "filled"),
            )
            on(go, tasks.fill, [editor, whole, seed], [filled])
        on(
            send,
            lambda pictures, text: (
                _needed(pictures or None, "draw a picture first")[0][0],
                text,
            ),
            [drawn, prompt],
            [editor, whole],
        )
        with gr.Tab("Describe"):
            untuned("answer", "questions")
            given = picture("Picture to describe", "to_describe")
            question = gr.Textbox(label="Question (empty: a caption)")
            go = gr.Button("Describe", variant="primary")
            said = gr.Textbox(label="Description")
            on(go, tasks.describe, [given, question, seed], [said])
        with gr.Tab("Edit"):
            untuned("edit", "editing")
            given = picture("Picture to edit", "to_edit")
            what = gr.Textbox(label="Instruction")
            go, edited = (
                gr.Button("Edit", variant="primary"),
                picture("Edited", "edited"),
            )
            on(go, tasks.edit, [given, what, seed], [edited])
        with gr.Tab("Segment"):
            untuned("segment", "segmentation")
            given = picture("Picture to segment", "to_segment")
            go = gr.Button("Segment", variant="primary")
            classes = gr.AnnotatedImage(
                label="Classes", format="png", elem_id="classes"
            )
            on(go, tasks.segment, [given, seed], [classes])
    return page


def serve(model: "CM3Leon", port: int) -> dict:
    """Serves the page on localhost until it is interrupted; prints where it is."""
    import gradio as gr

    # Fonts of the system: the default theme asks the web for its own.
    fonts = {"font": "system-ui", "font_mono": "monospace"}
    page = build(model)
    _, url, _ = page.launch(
        **{"server_name": "127.0.0.1", "server_port": port or None},
        **{"theme": gr.themes.Default(**fonts), "prevent_thread_lock": True},
        **{"quiet": True, "inbrowser": False, "share": False},
    )
    print(json.dumps({"url": url}), flush=True)
    page.block_thread()
    return {"url": url}


def define_flags() -> None:
    """Not on import: the page is built by others too."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A folder of the work directory (default: sft, else pretrain).",
    )
    flags.DEFINE_string("bank", "bank", "Folder of the memory, seen from --workdir.")
    flags.DEFINE_integer("port", 7860, "Of localhost; 0 takes a free one.")


def main() -> dict:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio: bash launch/setup.sh demo")
    from cm3leon_jax import CM3Leon

    given = flags.FLAGS
    model = CM3Leon.load(given.workdir, given.checkpoint, bank=given.bank)
    return serve(model, given.port)


if __name__ == "__main__":
    define_flags()
    command.run(main)
