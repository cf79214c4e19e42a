"""The image tokenizer as the rest of the system uses it: pixels <-> codes.

DIRECTORY/image_tokenizer.json   the settings of the VQGAN
DIRECTORY/parameters             its arrays, by name, written by Orbax
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cm3leon_jax.config import make, write_whole
from cm3leon_jax.models import vqgan
from cm3leon_jax.models.vqgan import VQGAN, VQGANConfig

SETTINGS, PARAMETERS = "image_tokenizer.json", "parameters"
_PIXELS_PER_CALL = 1 << 18  # bounds the memory of one call
_MAX_BATCH = 256


@jax.jit
def _encode(model: VQGAN, images_BYXC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """And which are made of finite numbers: neither codes nor bytes tell any more."""
    z_BYXE = model.latents(vqgan.to_float(images_BYXC))
    return vqgan.nearest(z_BYXE, model.codes_ZE()), jnp.isfinite(z_BYXE).all((1, 2, 3))


@jax.jit
def _decode(model: VQGAN, codes_BYX: jax.Array) -> tuple[jax.Array, jax.Array]:
    images_BYXC = model.decode(codes_BYX)
    return vqgan.to_uint8(images_BYXC), jnp.isfinite(images_BYXC).all((1, 2, 3))


class ImageTokenizer:
    """A trained tokenizer; numpy in, numpy out.

    Pictures are uint8 [B, Y, X, 3] of `image_size` pixels a side, codes int32
    [B, Yg, Xg] in [0, `codebook`). Calls run in batches of one fixed size, so no
    number of pictures compiles anew. ValueError where numbers are not finite.
    """

    def __init__(self, config: VQGANConfig, model: VQGAN):
        self.config, self.model = config, model
        self.image_size = config.image_size
        self.grid = (config.grid, config.grid)
        self.codebook = config.codebook
        fitting = _PIXELS_PER_CALL // config.image_size**2
        self._batch = min(max(fitting, 1), _MAX_BATCH)

    @classmethod
    def load(cls, directory: str | Path) -> ImageTokenizer:
        """What `save` left; FileNotFoundError or ValueError saying what is wrong."""
        path = Path(directory) / SETTINGS
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: {directory} holds no trained image tokenizer; "
                "run launch/train_image_tokenizer.py first"
            )
        config = make(VQGANConfig, json.loads(path.read_text()), "image_tokenizer")
        return cls(config, _read(Path(directory) / PARAMETERS, config))

    def encode(self, images_BYXC: np.ndarray) -> np.ndarray:
        """Uint8 pictures -> int32 codes. ValueError for another size or type."""
        images_BYXC = np.asarray(images_BYXC)
        side = self.image_size
        wanted = (side, side, 3)
        if images_BYXC.dtype != np.uint8 or images_BYXC.shape[1:] != wanted:
            raise ValueError(
                f"pictures of {images_BYXC.dtype} {list(images_BYXC.shape)}: the image "
                f"tokenizer reads uint8 [B, {side}, {side}, 3]; resize them first"
            )
        empty = np.zeros((0, *self.grid), np.int32)
        return self._in_batches(_encode, images_BYXC, empty)

    def decode(self, codes_BYX: np.ndarray) -> np.ndarray:
        """Int codes -> uint8 pictures. ValueError for another grid or unknown codes."""
        codes_BYX = np.asarray(codes_BYX)
        if codes_BYX.dtype.kind not in "iu" or codes_BYX.shape[1:] != self.grid:
            raise ValueError(
                f"codes of {codes_BYX.dtype} {list(codes_BYX.shape)}: the image "
                f"tokenizer reads integers [B, {self.grid[0]}, {self.grid[1]}]"
            )
        if codes_BYX.size and not 0 <= codes_BYX.min() <= codes_BYX.max() < (
            self.codebook
        ):
            raise ValueError(
                f"codes from {codes_BYX.min()} to {codes_BYX.max()}: the codebook has "
                f"{self.codebook}, so they lie in [0, {self.codebook})"
            )
        empty = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        return self._in_batches(_decode, codes_BYX.astype(np.int32), empty)

    def _in_batches(self, function, inputs: np.ndarray, empty: np.ndarray):
        outputs = [empty]
        for start in range(0, len(inputs), self._batch):
            part = inputs[start : start + self._batch]
            padding = [(0, self._batch - len(part))] + [(0, 0)] * (part.ndim - 1)
            made, finite_B = jax.device_get(function(self.model, np.pad(part, padding)))
            if not finite_B[: len(part)].all():
                raise ValueError(
                    f"picture {start + finite_B.argmin()}: the image tokenizer makes "
                    "what is not finite; it is damaged, or its training has diverged"
                )
            outputs.append(made[: len(part)])
        return np.concatenate(outputs)


def save(directory: str | Path, config: VQGANConfig, model: VQGAN) -> None:
    """Writes a tokenizer for `ImageTokenizer.load`, over one that may be there.

    One process alone calls this, with a model that is whole on its devices.
    """
    directory = Path(directory).absolute()
    arrays = {name: np.asarray(x) for name, x in _named(model)}
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        checkpointer.save(directory / PARAMETERS, arrays, force=True)
        checkpointer.wait_until_finished()
    settings = json.dumps(dataclasses.asdict(config), indent=1)
    write_whole(directory / SETTINGS, settings)


def _read(path: Path, config: VQGANConfig) -> VQGAN:
    shapes = vqgan.abstract(config)
    # Orbax cuts or pads what it restores into a given shape, so take what is there.
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: ocp.ArrayRestoreArgs(sharding=one_device) for name, _ in _named(shapes)
    }
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone()
        ) as checkpointer:
            found = checkpointer.restore(path.absolute(), restore_args=wanted)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, or of another image tokenizer "
            f"({error})"
        ) from error
    for name, x in _named(shapes):
        if name not in found or found[name].shape != x.shape:
            has = f"shape {found[name].shape}" if name in found else "nothing"
            raise ValueError(
                f"{path} has {has} for {name}, its settings say {x.shape}: they were "
                "changed after training"
            )
    leaves = [found[name] for name, _ in _named(shapes)]
    return jax.tree.structure(shapes).unflatten(leaves)


def _alone() -> ocp.options.MultiprocessingOptions:
    """This process only: by default Orbax waits for every process of the job."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _named(model: VQGAN) -> list[tuple[str, jax.Array]]:
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    keystr = jax.tree_util.keystr
    return [
        (keystr(path, simple=True, separator=".").removesuffix(".value"), x)
        for path, x in paths
    ]
