"""The page of launch/demo.py around a model that draws at once what it was asked.

Run as a program it serves the page: what the test's browser opens.
"""

import sys
import types
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))  # it is no package

import demo

del sys.path[0]

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


class Model:
    """Draws the colour of a text, with the seed in the corner; grey elsewhere."""

    system = types.SimpleNamespace(name="a model of the test")
    classes = ("background", "left half")

    def __init__(self, tasks=("edit", "segment"), memory="a bank"):
        self.writer = types.SimpleNamespace(tasks=tasks)
        self.memory = memory

    def retrieve(self, text, k):
        pictures = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(k)]
        return [
            types.SimpleNamespace(texts=[f"near {text} {i}"], pictures=[picture])
            for i, picture in enumerate(pictures)
        ]

    def text_to_image(self, prompts, *, seed, retrieve=None):
        if "nothing" in prompts[0]:
            raise ValueError("the prompt is too long for this model")
        if retrieve is not None:
            assert len(retrieve) == len(prompts)
        return [self._picture(prompt, seed + i) for i, prompt in enumerate(prompts)]

    def infill(self, images, masks, prompts, *, seed):
        made = np.array(images[0])
        assert masks[0].shape == made.shape[:2] and masks[0].dtype == bool
        made[masks[0]] = COLOURS["blue"] if prompts else (255, 255, 255)
        return [Pillow.fromarray(made)]

    def caption(self, images, *, seed):
        return ["a caption of {}x{}".format(*images[0].size)]

    def answer(self, images, questions, *, seed):
        raise ValueError("it was not tuned on answer")

    def edit(self, images, instructions, *, seed):
        return [self._picture(instructions[0], seed)]

    def segment(self, images, *, seed):
        labels = np.zeros((8, 8), np.int32)
        labels[:, :4] = 1
        return [labels]

    def _picture(self, text, seed):
        picture = np.full((8, 8, 3), 128, np.uint8)
        for name, colour in COLOURS.items():
            if name in text:
                picture[:] = colour
        picture[0, 0] = seed % 256
        return Pillow.fromarray(picture)


if __name__ == "__main__":
    demo.serve(Model(), 0)
