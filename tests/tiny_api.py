"""`CM3Leon` around tokenizers that learn nothing and a decoder that is never run."""

import types

import numpy as np
from tiny_data import GRID, LAYOUT, BlockTokenizer, ByteTokenizer

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.codec import Codec
from cm3leon_jax.sampling import prompts
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer

SIDE, IMAGE_TOKENS = 8, 16
MASKS = SegmentationTokenizer(GRID[0] * 2, ("background", "star", "circle"))


class Words(ByteTokenizer):
    def decode(self, pieces):
        return bytes(pieces).decode(errors="replace")


class Pictures(BlockTokenizer):
    def decode(self, codes):
        return np.zeros((len(codes), SIDE, SIDE, 3), np.uint8)


CODEC = Codec(LAYOUT, Words(), Pictures(), MASKS)


def model(limit, memory=None, tasks=(), autoregressive=False, decoder=None):
    """With a context of so many tokens; without a decoder it cannot write."""
    names = types.SimpleNamespace
    guided = Sampler(guidance=2.0)
    sampling = names(
        text_to_image=guided,
        caption=Sampler(),
        infill=Sampler(),
        answer=Sampler(),
        edit=Sampler(guidance=(7.5, 1.5)),
        control=guided,
        segment=Sampler(),
        text_candidates=1,
    )
    system = names(
        name="tiny",
        layout=LAYOUT,
        rules=None,
        sampling=sampling,
        decoder_config=names(length=limit),
        image_tokenizer=names(model=names(image_size=SIDE, grid=GRID[0])),
        sft=names(autoregressive=autoregressive),
    )
    decoder = decoder or names(config=names(length=limit))
    return CM3Leon(system, decoder, CODEC, memory=memory, tasks=tasks)


def spy(monkeypatch, text="hi"):
    """Instead of decoding: code 0 in every picture, class 1 in every map, `text` in
    every hole. The prompts are noted, call by call."""
    calls = []

    def write(self, wanted, _, seed, image_tokens, *, candidates=1, **__):
        prompts.stack(wanted, self.layout, self.decoder.config.length)
        calls.append([prompt for prompt in wanted for _ in range(candidates)])
        for prompt in calls[-1]:
            script = prompt.scripts[0]
            if (script == prompts.TEXT).any():
                yield np.array([*LAYOUT.text_ids(list(text.encode())), LAYOUT.eoss])
            elif (script == prompts.FREE).any():
                yield np.array([*LAYOUT.text_ids(list(text.encode())), LAYOUT.eos])
            else:
                tokens = np.where(script == prompts.IMAGE, LAYOUT.image_ids(0), script)
                yield np.where(script == prompts.CLASS, LAYOUT.class_ids(1), tokens)

    def chances(self, rows, starts, among):
        places = np.arange(len(among))
        for row, start in zip(rows, starts, strict=True):
            yield (row[start:, None] - among.start == places).astype(np.float32)

    monkeypatch.setattr(Engine, "write", write)
    monkeypatch.setattr(Engine, "chances", chances)
    return calls
