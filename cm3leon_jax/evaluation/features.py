"""Networks that turn pictures into the features whose distributions are compared.

How a picture is resized is a part of them: the same network gives another distance
after another filter. `pytorch_fid` and `torch_fidelity` resize bilinearly without
smoothing as those packages do (the first with pixel centres at halves, the second as
TensorFlow 1 did); `clean` is the smoothing bicubic filter of Parmar et al. 2022.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.encoders import Batched
from cm3leon_jax.interop import efficientnet as lite0
from cm3leon_jax.interop import inception as reader
from cm3leon_jax.models import efficientnet
from cm3leon_jax.models import inception as network

Picture = np.ndarray | Pillow.Image
RESIZES = ("pytorch_fid", "torch_fidelity", "clean")
_BATCH = 32
_STYLE = 80  # mean and deviation of maps of 16 and 24 channels


class Features:
    """A network of pictures: its `name`, `width` E, and the `side` they are resized to.

    `standard` is True only of Inception with the published weights of 2015-12-05: no
    other features make what is called FID, see `key`.
    """

    def __init__(
        self,
        *,
        name: str,
        width: int,
        side: int,
        resize: str,
        standard: bool,
        call: Callable[[Any, jax.Array], jax.Array],
        model: Any,
        batch: int = _BATCH,
    ):
        self.name, self.width, self.side = name, width, side
        self.resize, self.standard = resize, standard
        self._model, self._call = model, Batched(call, model, batch)

    @property
    def key(self) -> str:
        """The measure that a Fréchet distance of these features is."""
        return "fid" if self.standard else f"frechet_{self.name}"

    def __call__(self, pictures: Iterable[Picture]) -> np.ndarray:
        """Pictures, each uint8 [Y, X, 3] of any size or of Pillow -> float32 [B, E].

        ValueError names the picture that is none, or whose features are not finite.
        """
        fitted = [self._fitted(i, picture) for i, picture in enumerate(pictures)]
        if not fitted:
            return np.zeros((0, self.width), np.float32)
        made_BE = self._call(np.stack(fitted))
        wrong = np.flatnonzero(~np.isfinite(made_BE).all(1))
        if len(wrong):
            raise ValueError(f"picture {wrong[0]} has features that are not finite")
        return made_BE

    def logits(self, features_BE: np.ndarray) -> np.ndarray:
        """Features -> classes float32 [B, 1008], for the Inception score."""
        if not isinstance(self._model, network.Inception):
            raise ValueError(
                f"{self.name} has no classes: only Inception has them here"
            )
        return np.asarray(self._model.logits(jnp.asarray(features_BE)))

    def _fitted(self, i: int, picture: Picture) -> np.ndarray:
        """float32 [side, side, 3] in the network's range."""
        if isinstance(picture, Pillow.Image):
            picture = np.asarray(picture.convert("RGB"))
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            bad = picture.dtype.kind == "f" and not np.isfinite(picture).all()
            raise ValueError(
                f"picture {i} is {picture.dtype} {list(picture.shape)}"
                f"{' with values that are not finite' * bad}: pictures are uint8 "
                "[Y, X, 3]"
            )
        resized = resized_to(picture, self.side, self.resize)
        if self.resize == "pytorch_fid":
            return resized / np.float32(127.5) - np.float32(1)
        return (resized - np.float32(128)) / np.float32(128)


def resized_to(picture_YXC: np.ndarray, side: int, resize: str) -> np.ndarray:
    """uint8 [Y, X, 3] -> float32 [side, side, 3], still from 0 to 255."""
    if resize == "clean":
        size, filter = (side, side), Pillow.Resampling.BICUBIC
        channels = [
            Pillow.fromarray(channel.astype(np.float32)).resize(size, filter)
            for channel in np.moveaxis(picture_YXC, -1, 0)
        ]
        return np.stack([np.asarray(x) for x in channels], -1).clip(0, 255)
    rows_yY, columns_xX = (
        _bilinear(length, side, resize == "pytorch_fid")
        for length in picture_YXC.shape[:2]
    )
    wide_YxC = columns_xX @ np.float32(picture_YXC)
    return np.einsum("yY,YxC->yxC", rows_yY, wide_YxC, optimize=True)


def _bilinear(length: int, side: int, halves: bool) -> np.ndarray:
    """Weights float32 [side, length] of the pixels that each new one lies between."""
    place = np.arange(side) + 0.5 * halves
    place = (place * length / side - 0.5 * halves).clip(0, length - 1)
    below = np.floor(place).astype(int)
    weights = np.zeros((side, length))
    weights[np.arange(side), below] = 1 - (place - below)
    # Beyond the last pixel there is nothing, and no weight either.
    weights[np.arange(side), np.minimum(below + 1, length - 1)] += place - below
    return weights.astype(np.float32)


def inception(
    path: str | Path, resize: str = "pytorch_fid", batch: int = _BATCH
) -> Features:
    """Inception-v3 with the weights of a file, see `interop/inception.py`."""
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r}: choose from {', '.join(RESIZES)}")
    model, standard = reader.load(path)
    stem = re.sub(r"\W+", "_", Path(path).stem)
    return Features(
        name="inception" if standard else f"inception_with_{stem}",
        width=network.WIDTH,
        side=network.SIDE,
        resize=resize,
        standard=standard,
        call=lambda model, images_BYXC: model(images_BYXC),
        model=model,
        batch=batch,
    )


def efficientnet_lite0(side: int = 128) -> Features:
    """ImageNet features of a package (extra `features`), for work without a download.

    `side` pixels decide the cost and, a little, the features: it is in the name.
    FileNotFoundError where the package is not installed.
    """
    return _lite0("", side, efficientnet.HEAD, lambda m, x: m.pooled(x))


def efficientnet_style(side: int = 128) -> Features:
    """How a picture is drawn, of the same network: mean and deviation over the picture
    of its two finest feature maps."""

    def style(model: Callable[[jax.Array], list[jax.Array]], x: jax.Array) -> jax.Array:
        finest = model(x)[:2]
        parts = [f(m, axis=(1, 2)) for m in finest for f in (jnp.mean, jnp.std)]
        return jnp.concatenate(parts, axis=1)

    return _lite0("_style", side, _STYLE, style)


def _lite0(what: str, side: int, width: int, call: Callable) -> Features:
    if side < efficientnet.MIN_SIDE:
        raise ValueError(f"side={side}: at least {efficientnet.MIN_SIDE}")

    def run(model: Any, images_BYXC: jax.Array) -> jax.Array:
        # From TensorFlow's range of bytes to that of our networks, [-1, 1].
        return call(model, (128 * images_BYXC + 0.5) / 127.5)

    return Features(
        name=f"efficientnet_lite0{what}_{side}px",
        width=width,
        side=side,
        resize="clean",
        standard=False,
        call=run,
        model=lite0.features(),
    )
