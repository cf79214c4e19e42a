"""EfficientNet-Lite0: the reference's outputs, the reader, the way in from a config."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax import preparation, stages
from cm3leon_jax.interop import efficientnet as interop
from cm3leon_jax.models import efficientnet
from cm3leon_jax.system import System
from cm3leon_jax.training import metrics
from tests.tiny_system import tiny_config

CHANNELS = (16, 24, 40, 112, 320)


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.float32(np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)))


@functools.cache
def random_network() -> efficientnet.EfficientNetLite0:
    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        deviation = np.sqrt(2 / np.prod(x.shape[:-1]))  # biases: ignored below
        return jnp.float32(rng.normal(0, deviation, x.shape)) * (len(x.shape) == 4)

    rng = np.random.default_rng(0)
    return jax.tree.map(fill, efficientnet.abstract())


@jax.jit
def outputs(model, images):
    return [*model(images), model.pooled(images)]


def published_file():
    try:
        return interop.weights_file()
    except FileNotFoundError:
        pytest.skip("the extra `features` is not installed")


# ------------------------------------------------------------------ the network


@pytest.mark.parametrize("side", [(32, 32), (33, 70)])
def test_maps_have_the_named_strides(side):
    maps = jax.eval_shape(random_network(), pictures(2, *side))
    found = [(x.shape[1:3], x.shape[3]) for x in maps]
    rounded_up = [tuple(-(-s // stride) for s in side) for stride in (2, 4, 8, 16, 32)]
    assert found == list(zip(rounded_up, CHANNELS, strict=True))
    assert jax.eval_shape(random_network().pooled, pictures(2, *side)).shape == (
        2,
        1280,
    )


def test_parameters_are_the_published_ones_folded():
    leaves = jax.tree.leaves(random_network())
    # 4,652,008 published, less 1,281,000 of the classifier, less one of two
    # normalisation parameters per channel that folding leaves.
    assert sum(x.size for x in leaves) == 4_652_008 - 1_281_000 - 21_008
    assert {x.dtype for x in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("shape", [(1, 31, 32, 3), (1, 32, 16, 3), (32, 32, 3)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ValueError, match="EfficientNet-Lite0"):
        random_network()(jnp.zeros(shape))


def test_every_pixel_feels_the_distance():
    @jax.jit
    @jax.grad
    def gradient(a, b):
        return sum(
            jnp.square(x - y).mean()
            for x, y in zip(random_network()(a), random_network()(b), strict=True)
        )

    pull = gradient(pictures(1, 32, 32), pictures(1, 32, 32, seed=1))
    assert np.isfinite(pull).all()
    assert (np.abs(pull).max(-1) > 0).all()


# ------------------------------------------------------------------ the reader


def test_published_weights_give_the_references_numbers():
    """Recorded from PyTorch 2.13 and efficientnet-lite-pytorch 0.1.0."""
    ramp = np.linspace(-1, 1, 32, dtype=np.float32)
    x = np.stack(np.broadcast_arrays(ramp[:, None], ramp, ramp[:, None] * ramp), -1)
    found = outputs(interop.from_arrays(interop.read(published_file())), x[None])
    recorded = [5.334014, 8.268463, 8.613038, 7.382510, 1.316132, 0.027660603]
    means = [float(jnp.abs(y).mean()) for y in found]
    np.testing.assert_allclose(means, recorded, rtol=1e-5)


def test_another_file_is_refused_unread(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="not the file of efficientnet-lite0"):
        interop.read(path)


def test_missing_weights_name_the_extra(monkeypatch):
    monkeypatch.setattr(interop, "PACKAGE", "a-package-that-is-not-installed")
    with pytest.raises(FileNotFoundError, match=r"setup.sh features"):
        interop.features()


def test_arrays_of_another_network_are_refused():
    class Arrays(dict):
        def __missing__(self, name):
            return np.ones((8, 3, 3, 3) if name == "_conv_stem.weight" else 8)

    with pytest.raises(ValueError, match="_conv_stem.weight is .8, 3, 3, 3."):
        interop.from_arrays(Arrays())


# ------------------------------------------------------------------ the reference


@pytest.fixture(scope="module")
def reference():
    """The PyTorch network at any size (`image_size=None`: padded as it runs)."""
    pytest.importorskip("torch", reason="the extra `parity` is not installed")
    name = "efficientnet_lite_pytorch"
    module = pytest.importorskip(name, reason="the extra `parity` is not installed")
    return module.EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()


def reference_outputs(network, images):
    import torch

    last_of_stage = [network._blocks[i] for i in (0, 2, 4, 10, 15)]
    found = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out))
        for block in last_of_stage
    ]
    bytes_BCYX = torch.tensor(images.transpose(0, 3, 1, 2)) * 127.5 + 127.5
    with torch.no_grad():
        head = network.extract_features((bytes_BCYX - 127) / 128)
    for hook in hooks:
        hook.remove()
    return [
        *(x.numpy().transpose(0, 2, 3, 1) for x in found),
        head.mean((2, 3)).numpy(),
    ]


def randomise(network):
    import torch

    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.1, 2.0)


@pytest.mark.parametrize("weights", ["random", "published"])
def test_outputs_are_the_references(reference, weights):
    import torch

    if weights == "random":
        randomise(reference)
    else:
        state = torch.load(published_file(), weights_only=True)
        reference.load_state_dict(state)
    arrays = {name: x.numpy() for name, x in reference.state_dict().items()}
    for side in ((32, 32), (45, 63)):
        images = pictures(2, *side)
        found = outputs(interop.from_arrays(arrays), images)
        for x, y in zip(found, reference_outputs(reference, images), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_the_reader_reads_what_torch_reads(reference):
    import torch

    expected = torch.load(published_file(), weights_only=True)
    found = interop.read(published_file())
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert x.numpy().dtype == found[name].dtype
        np.testing.assert_array_equal(found[name], x.numpy(), err_msg=name)


# ------------------------------------------------------------------ from a config


def config(features="efficientnet_lite0", perceptual=0.1):
    c = tiny_config()
    c["image_tokenizer"]["features"] = features
    c["image_tokenizer"]["training"]["perceptual"] = perceptual
    return c


def test_a_config_switches_the_perceptual_term_on(tmp_path, monkeypatch):
    def load():  # two maps, so that the rest need not be compiled
        return lambda images: random_network()(images)[:2]

    monkeypatch.setitem(preparation.FEATURES, "efficientnet_lite0", load)
    stages.run(config(), tmp_path, ["prepare_data", "train_image_tokenizer"])
    folder = tmp_path / "image_tokenizer"
    terms = [line["perceptual"] for line in metrics.read(folder) if "l1" in line]
    assert terms and min(terms) > 0
    inputs = json.loads((folder / "inputs.json").read_text())["inputs"]
    assert inputs["features"] == "efficientnet_lite0"
    with pytest.raises(FileExistsError, match="features: efficientnet_lite0 -> None"):
        stages.train_image_tokenizer(System.make(config("none", 0.0)), tmp_path)


@pytest.mark.parametrize(
    ("features", "perceptual", "named"),
    [
        ("none", 0.1, "do not go together"),
        ("efficientnet_lite0", 0.0, "do not go together"),
        ("vgg", 0.1, "features='vgg': choose"),
    ],
)
def test_settings_that_clash_are_named(features, perceptual, named):
    with pytest.raises(ValueError, match=named):
        System.make(config(features, perceptual))


def test_small_pictures_cannot_have_features():
    c = config()
    c["image_tokenizer"]["model"]["image_size"] = 16
    c["data"]["settings"]["image_size"] = 16
    with pytest.raises(ValueError, match="image_size=16: efficientnet_lite0 needs"):
        System.make(c)
