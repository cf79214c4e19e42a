"""Inception of 2015-12-05 against its reference, its reader; making of features."""

import hashlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from PIL import Image as Pillow

from cm3leon_jax.evaluation import features, frechet, inception_score
from cm3leon_jax.interop import efficientnet as weights
from cm3leon_jax.interop import inception as interop
from cm3leon_jax.models import inception


def pictures(side: int, count: int = 2) -> np.ndarray:
    """uint8 [B, side, side, 3] from a photograph."""
    photograph = pytest.importorskip("skimage.data").astronaut()
    return np.stack(
        [photograph[50 * i :, 60 * i :][:side, :side] for i in range(count)]
    )


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Random ones under the names of the file, that keep activations in range."""
    rng = np.random.default_rng(0)
    made = {}
    for name, conv in interop._convolutions(inception.abstract()):
        rows, columns, inputs, outputs = conv.kernel.shape
        deviation = np.sqrt(2 / (rows * columns * inputs))
        shape = (outputs, inputs, rows, columns)
        made[f"{name}.conv.weight"] = rng.normal(0, deviation, shape)
        for part, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -0.2, 0.2),
            ("running_mean", -0.2, 0.2),
            ("running_var", 0.5, 1.5),
        ):
            made[f"{name}.bn.{part}"] = rng.uniform(low, high, outputs)
    made["fc.weight"] = rng.normal(0, 0.02, (inception.CLASSES, inception.WIDTH))
    made["fc.bias"] = rng.normal(size=inception.CLASSES)
    return {name: np.float32(x) for name, x in made.items()}


@pytest.fixture(scope="module")
def file(arrays, tmp_path_factory):
    torch = pytest.importorskip("torch", reason=references.WHY)
    path = tmp_path_factory.mktemp("weights") / "pt-other.pth"
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    torch.save(tensors | {"fc.num_batches_tracked": torch.tensor(0)}, path)
    return path


def test_names_and_parameters_are_those_of_the_file(arrays):
    # 566 tensors in it, 94 of them batch counters.
    assert len(arrays) == 566 - 94
    # Folding leaves one of four arrays of each normalisation; no bias of classes.
    model = jax.tree.leaves(inception.abstract())
    channels = sum(len(x) for name, x in arrays.items() if name.endswith("running_var"))
    wanted = sum(x.size for x in arrays.values()) - 3 * channels - inception.CLASSES
    assert sum(x.size for x in model) == wanted


def test_shapes_and_another_size():
    def run(side: int):
        images = jnp.zeros((2, side, side, 3))
        return jax.eval_shape(lambda m, x: m(x), inception.abstract(), images)

    assert run(299).shape == (2, 2048)
    with pytest.raises(ValueError, match="not .2, 64, 64, 3."):
        run(64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fc.weight": np.zeros((1000, 2048))}, "fc.weight is .1000, 2048., not .1008"),
        ({"AuxLogits.fc.bias": np.zeros(3)}, "AuxLogits.fc.bias has no place"),
        ({"Mixed_7c.branch_pool.conv.weight": None}, "branch_pool.conv.weight is miss"),
    ],
)
def test_weights_of_another_network_are_refused(arrays, change, named):
    changed = {k: v for k, v in (arrays | change).items() if v is not None}
    with pytest.raises(ValueError, match=named):
        interop.from_arrays(changed)


def test_a_file_that_is_missing_or_runs_code_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="put there pt_inception-2015-12-05"):
        interop.load(tmp_path / "x.pth")
    pytest.importorskip("torch", reason=references.WHY)
    path = tmp_path / "evil.pth"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="is damaged or holds more than tensors"):
        interop.load(path)


def test_without_pytorch_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.pth").touch()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(FileNotFoundError, match=r"setup.sh torch"):
        interop.load(tmp_path / "x.pth")


@pytest.mark.slow  # 94 convolutions to compile
def test_features_are_pytorch_fids(arrays, file, monkeypatch):
    torch = pytest.importorskip("torch", reason=references.WHY)
    theirs = references.module("pytorch_fid.inception")
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: tensors)
    small = pictures(100)
    batch = torch.from_numpy(small.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        pooled = theirs.InceptionV3().eval()(batch / 255)[0][..., 0, 0].numpy()
    ours = features.inception(file, batch=1)
    found = ours(small)
    scale = np.abs(pooled).max()
    assert pooled.std() > 0.01 * scale  # no network that says nothing
    np.testing.assert_allclose(found, pooled, rtol=0, atol=1e-4 * scale)
    logits = pooled @ arrays["fc.weight"].T
    np.testing.assert_allclose(ours.logits(pooled), logits, rtol=0, atol=1e-4)


@pytest.mark.slow  # the same again, of 20 pictures
def test_inception_score_of_photographs_is_torch_fidelitys(file):
    theirs = references.module("torch_fidelity.metric_isc")
    import torch

    photograph, ours = pictures(400, 1)[0], features.inception(file, batch=1)
    places = np.random.default_rng(0).integers(0, 300, (20, 2))
    logits = ours.logits(ours([photograph[y : y + 99, x : x + 99] for y, x in places]))
    wanted = theirs.isc_features_to_metric(torch.tensor(logits))
    found = inception_score.score(logits)
    assert found["value"] > 1.001  # they are told apart
    for key, theirs_key in (("value", "mean"), ("spread", "std")):
        value = float(wanted[f"inception_score_{theirs_key}"])
        assert found[key] == pytest.approx(value, abs=1e-5), key


# ------------------------------------------------------------------ features


def test_only_the_published_weights_make_an_fid(file, monkeypatch):
    assert features.inception(file).key == "frechet_inception_with_pt_other"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(interop, "SHA256", found)
    assert features.inception(file).key == "fid"


@pytest.fixture(scope="module")
def lite0():
    try:
        return features.efficientnet_lite0(32)
    except FileNotFoundError:
        pytest.skip("the extra `features` is not installed")


def test_lite0_goes_by_its_own_name_and_has_no_classes(lite0):
    assert lite0.key == "frechet_efficientnet_lite0_32px"
    with pytest.raises(ValueError, match="only Inception"):
        lite0.logits(np.zeros((1, 1280)))
    with pytest.raises(ValueError, match="side=16"):
        features.efficientnet_lite0(16)
    with pytest.raises(ValueError, match="resize='box'"):
        features.inception("x", "box")


def test_features_are_of_each_picture_alone_whatever_its_size(lite0):
    some = [*pictures(40, 7)] * 5 + [*pictures(32, 2)]
    some[3] = Pillow.fromarray(some[3]).convert("RGBA")
    found = lite0(some)  # in batches of 32
    assert found.shape == (37, 1280)
    for i in (3, 36):
        np.testing.assert_allclose(lite0(some[i : i + 1])[0], found[i], atol=1e-6)
    assert lite0([]).shape == (0, 1280)


def test_style_is_mean_and_deviation_of_the_finest_maps(lite0):
    some = list(pictures(32, 2))
    found = features.efficientnet_style(32)(some)
    maps = weights.features()(np.float32(some) / 127.5 - 1)
    wanted = [
        f(np.asarray(x), axis=(1, 2)) for x in maps[:2] for f in (np.mean, np.std)
    ]
    np.testing.assert_allclose(found, np.concatenate(wanted, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (np.full((40, 40, 3), np.nan), "float64 .40, 40, 3. with values that are not"),
        (np.zeros((40, 40, 3)), "is float64"),
        (np.zeros((40, 40), np.uint8), r"uint8 .40, 40.: pictures are uint8 .Y, X, 3."),
    ],
)
def test_what_is_no_picture_is_named(lite0, bad, named):
    some = [*pictures(40, 1), bad]
    with pytest.raises(ValueError, match=f"picture 1 .*{named}"):
        lite0(some)


@pytest.mark.slow  # eigenvalues of matrices of 1280 a side, and a root of one
def test_distance_is_pytorch_fids_on_features_of_photographs(lite0):
    theirs = references.module("pytorch_fid.fid_score")
    sets = []
    for name in ("astronaut", "chelsea"):
        photograph = getattr(pytest.importorskip("skimage.data"), name)()
        rng = np.random.default_rng(0)
        places = rng.integers(np.array(photograph.shape[:2]) - 48, size=(4096, 2))
        one = frechet.Moments.empty(1280)
        for part in np.split(places, 16):
            crops = [photograph[y : y + 48, x : x + 48] for y, x in part]
            one = one.add(lite0(crops))
        sets.append(one)
    a, b = sets
    # scipy: its argument `disp` is to go; overlapping crops leave covariances singular
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = theirs.calculate_frechet_distance(
            a.mean, a.covariance, b.mean, b.covariance
        )
    np.testing.assert_allclose(frechet.distance(a, b), wanted, rtol=1e-6)


@pytest.mark.parametrize("side", [20, 299, 400])
def test_resizing_keeps_what_is_flat_and_the_size(side):
    flat = np.full((side, side + 5, 3), 77, np.uint8)
    for resize in features.RESIZES:
        found = features.resized_to(flat, 299, resize)
        assert found.shape == (299, 299, 3) and found.dtype == np.float32
        np.testing.assert_allclose(found, 77, rtol=1e-5)
    whole = pictures(299, 1)[0]
    for resize in features.RESIZES:
        np.testing.assert_allclose(
            features.resized_to(whole, 299, resize), whole, rtol=0, atol=1e-4
        )


def test_pixels_lie_where_each_package_has_them():
    ramp = np.tile(np.arange(0, 250, 10, dtype=np.uint8)[None, :, None], (9, 1, 3))
    place = np.arange(50)  # 25 pixels become 50
    for resize, wanted in (
        ("pytorch_fid", (place + 0.5) / 2 - 0.5),
        ("torch_fidelity", place / 2),
    ):
        found = features.resized_to(ramp, 50, resize)
        wanted = np.broadcast_to(10 * wanted.clip(0, 24)[:, None], found.shape)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
