"""Training of the image tokenizer, its codebook, and the saved tokenizer's face."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
import tiny_vqgan

from cm3leon_jax.evaluation.reconstruction import scores
from cm3leon_jax.models import vqgan
from cm3leon_jax.models.discriminator import DiscriminatorConfig
from cm3leon_jax.parallel.rules import Rules
from cm3leon_jax.tokenizers import image
from cm3leon_jax.tokenizers.image import ImageTokenizer
from cm3leon_jax.training import codebook, image_step, metrics
from cm3leon_jax.training.image_tokenizer import (
    ImageTokenizerTrainConfig,
    image_batches,
    train,
)
from cm3leon_jax.training.optimizer import OptimizerConfig

MODEL = tiny_vqgan.LOCAL
TRAINING = ImageTokenizerTrainConfig(
    optimizer=OptimizerConfig(
        peak=5e-3, warmup=5, steps=120, b2=0.99, weight_decay=0.0, schedule="cosine"
    ),
    batch_size=8,
    unquantised_steps=20,
    restart_every=5,
    restart_until=100,
    l1=0.0,
    l2=20.0,
    log_every=20,
    validate_every=120,
    checkpoint_every=60,
)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Flat 8-pixel squares of four colours: 16 kinds of patch at the very most."""
    rng = np.random.default_rng(seed)
    palette = np.array([[220, 40, 40], [40, 160, 60], [40, 80, 220], [250, 250, 250]])
    squares = palette[rng.integers(0, 4, (count, 2, 2))].astype(np.uint8)
    return squares.repeat(8, axis=1).repeat(8, axis=2)


def features(images_BYXC):
    return [images_BYXC[:, ::2, ::2], jnp.sin(5 * images_BYXC)]


def run(directory, config=TRAINING, model=MODEL, mesh=(1, 1, 1), score=scores):
    return train(
        config,
        model,
        images=pictures(64),
        validation=pictures(16, seed=1),
        directory=directory,
        mesh=tiny_training.mesh_of(*mesh),
        rules=Rules(),
        score=score,
    )


# Compiled whole: op by op, every shape of every small operation compiles alone.
create = jax.jit(image_step.create, static_argnums=(1, 2))


def steps(config, count, model=MODEL, **options):
    """States and metrics of the first steps, without the loop."""
    state = create(jax.random.key(0), config, model)
    step = jax.jit(
        lambda state, batch: image_step.train_step(
            state, batch, config=config, seed=0, **options
        )
    )
    side = model.image_size // 16
    images = pictures(config.batch_size).repeat(side, 1).repeat(side, 2)
    for _ in range(count):
        state, values = step(state, {"images": images})
        yield state, {key: float(value) for key, value in values.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("image_tokenizer")
    return directory, run(directory)


def test_training_learns_a_small_world(trained):
    _, summary = trained
    assert summary["steps"] == 120
    assert summary["parameters"] == vqgan.parameter_count(MODEL)
    assert summary["psnr"] > 25
    assert summary["perplexity"] < 32
    assert {"ssim", "usage", "bits"} <= set(summary)


def test_metrics_show_the_three_parts(trained):
    lines = [line for line in metrics.read(trained[0]) if "codebook" in line]
    assert [line["step"] for line in lines] == [20, 40, 60, 80, 100, 120]
    assert all(line["codebook"] == 0 for line in lines[:1])
    assert all(line["codebook"] > 0 for line in lines[1:])


def test_a_saved_tokenizer_is_the_trained_one(trained):
    directory, summary = trained
    tokenizer = ImageTokenizer.load(directory)
    assert (tokenizer.image_size, tokenizer.grid, tokenizer.codebook) == (
        16,
        (4, 4),
        32,
    )
    images = pictures(16, seed=1)
    codes = tokenizer.encode(images)
    assert (codes.dtype, codes.shape) == (np.int32, (16, 4, 4))
    made = tokenizer.decode(codes)
    assert (made.dtype, made.shape) == (np.uint8, images.shape)
    assert scores(images, made, codes, 32)["psnr"] == summary["psnr"]


def test_number_of_pictures_does_not_matter(trained, monkeypatch):
    tokenizer = ImageTokenizer.load(trained[0])
    monkeypatch.setattr(tokenizer, "_batch", 4)
    images = pictures(11, seed=2)
    codes = tokenizer.encode(images)
    before = image._encode._cache_size()
    for count in (0, 1, 4, 5, 11):
        np.testing.assert_array_equal(tokenizer.encode(images[:count]), codes[:count])
        assert tokenizer.decode(codes[:count]).shape == (count, 16, 16, 3)
    assert image._encode._cache_size() == before


def test_what_is_not_finite_is_no_picture(trained):
    config = ImageTokenizer.load(trained[0]).config
    good = ImageTokenizer.load(trained[0]).model
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), good)
    codes = np.zeros((3, 4, 4), np.int32)
    with pytest.raises(ValueError, match="picture 0: .* is not finite"):
        ImageTokenizer(config, bad).decode(codes)
    with pytest.raises(ValueError, match="picture 0: .* is not finite"):
        ImageTokenizer(config, bad).encode(pictures(2))
    # One code whose vector is not finite spoils the pictures that have it, no others.
    good.codebook[...] = good.codebook[...].at[7].set(jnp.inf)
    tokenizer = ImageTokenizer(config, good)
    assert tokenizer.decode(codes).shape == (3, 16, 16, 3)
    codes[2, 1, 1] = 7
    with pytest.raises(ValueError, match="picture 2: .* is not finite"):
        tokenizer.decode(codes)


@pytest.mark.parametrize(
    ("method", "value", "named"),
    [
        ("encode", np.zeros((1, 8, 8, 3), np.uint8), "resize"),
        ("encode", np.zeros((1, 16, 16, 3), np.float32), "uint8"),
        ("encode", np.zeros((16, 16, 3), np.uint8), "uint8"),
        ("decode", np.zeros((1, 5, 4), np.int32), "integers"),
        ("decode", np.full((1, 4, 4), 32), "codebook has 32"),
        ("decode", np.full((1, 4, 4), -1), "codebook has 32"),
    ],
)
def test_wrong_input_is_refused(trained, method, value, named):
    with pytest.raises(ValueError, match=named):
        getattr(ImageTokenizer.load(trained[0]), method)(value)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trained image tokenizer"):
        ImageTokenizer.load(tmp_path)


def test_parameters_of_other_settings_are_refused(trained, tmp_path):
    other = dataclasses.asdict(MODEL) | {"codebook": 64}
    (tmp_path / image.PARAMETERS).symlink_to(trained[0] / image.PARAMETERS)
    (tmp_path / image.SETTINGS).write_text(json.dumps(other))
    with pytest.raises(ValueError, match="codebook, its settings say"):
        ImageTokenizer.load(tmp_path)


def test_resumed_training_is_the_same(trained, tmp_path):
    """60 steps, a stop, and 60 more end in the very parameters of 120 steps."""

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    early = dataclasses.replace(TRAINING, validate_every=80)
    with pytest.raises(Stop):
        run(tmp_path, early, score=stop)
    run(tmp_path, early)
    whole, resumed = (ImageTokenizer.load(d).model for d in (trained[0], tmp_path))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_every_mesh_trains_alike(trained, tmp_path):
    spread = run(tmp_path, mesh=(2, 2, 2))
    alone = [line["loss"] for line in metrics.read(trained[0]) if "loss" in line]
    losses = [line["loss"] for line in metrics.read(tmp_path) if "loss" in line]
    # Until k-means, whose random choices turn on the last bit.
    np.testing.assert_allclose(losses[:1], alone[:1], rtol=1e-4)
    assert spread["psnr"] > 25


def test_batches_are_a_function_of_the_step():
    images = np.arange(10)[:, None] * np.ones((1, 3), np.uint8)
    options = {"batch": 4, "steps": 7, "seed": 3}
    whole = [batch["row"] for batch in image_batches(images, 0, **options)]
    assert len(whole) == 7
    later = [batch["row"] for batch in image_batches(images, 3, **options)]
    np.testing.assert_array_equal(whole[3:], later)
    rows = np.concatenate(whole)
    for epoch in (rows[:10], rows[10:20]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert (rows[:10] != rows[10:20]).any()
    shares = [image_batches(images, 0, **options, share=(k, 2)) for k in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        np.testing.assert_array_equal(batch, np.concatenate([x["row"] for x in parts]))
    batch = next(image_batches(images, 5, **options))
    np.testing.assert_array_equal(batch["images"][:, 0], batch["row"])


def test_unquantised_steps_leave_the_codebook_alone():
    codes = [state.model.codebook[...] for state, _ in steps(TRAINING, 22)]
    start = create(jax.random.key(0), TRAINING, MODEL).model.codebook[...]
    np.testing.assert_array_equal(codes[19], start)
    assert jnp.abs(codes[20]).max() > 10 * jnp.abs(start).max()  # k-means


def test_a_run_without_unquantised_steps_can_be_saved(tmp_path):
    config = dataclasses.replace(
        TRAINING,
        optimizer=dataclasses.replace(TRAINING.optimizer, steps=1, warmup=0),
        unquantised_steps=0,
    )
    assert run(tmp_path, config)["steps"] == 1


def test_quantised_steps_with_all_terms():
    """The discriminator starts late and then pulls; features count; the encoder learns
    by the decoder's gradient, straight through the codes (no commitment here)."""
    config = dataclasses.replace(
        TRAINING,
        unquantised_steps=0,
        commitment=0.0,
        perceptual=0.1,
        adversarial=0.5,
        adversarial_start=3,
        discriminator=DiscriminatorConfig(channels=8, layers=1),
    )
    judged = list(steps(config, 5, features=features))
    alone = list(
        steps(dataclasses.replace(config, adversarial=0.0), 5, features=features)
    )
    factors = [values["adversarial_factor"] for _, values in judged]
    assert factors[:3] == [0, 0, 0] and min(factors[3:]) > 0
    losses = [values["discriminator"] for _, values in judged]
    assert losses[:3] == [0, 0, 0] and losses[3] == pytest.approx(1, abs=0.8)
    judges = [state.discriminator.out.kernel[...] for state, _ in judged]
    np.testing.assert_array_equal(judges[0], judges[2])
    assert jnp.abs(judges[2] - judges[3]).max() > 0

    def kernel(run, step, part):
        return getattr(run[step][0].model, part).stem.kernel[...]

    before, after = (kernel(judged, step, "decoder") for step in (2, 3))
    np.testing.assert_allclose(
        before, kernel(alone, 2, "decoder"), rtol=1e-4, atol=1e-5
    )
    assert jnp.abs(after - kernel(alone, 3, "decoder")).max() > 1e-5
    assert jnp.abs(kernel(alone, 1, "encoder") - kernel(alone, 0, "encoder")).max() > 0
    assert alone[0][1]["perceptual"] > 0


def test_the_adaptive_factor_balances_the_last_kernel():
    """With weight 1 both losses pull equally hard on the decoder's last kernel."""
    config = dataclasses.replace(
        TRAINING,
        adversarial=1.0,
        discriminator=DiscriminatorConfig(channels=8, layers=1),
    )
    state = create(jax.random.key(0), config, MODEL)
    images = vqgan.to_float(jnp.asarray(pictures(4)))

    def loss(painted):
        return config.l2 * jnp.square(painted - images).mean()

    @jax.jit
    def norms(model, judge):
        decoder = model.decoder
        x = decoder.trunk(model.latents(images), lambda x, names: x)
        painted, back = jax.vjp(lambda out: decoder.paint(x, out), decoder.out)
        pull, _ = image_step._adversarial_pull(
            judge, decoder, x, painted, images, config, None
        )
        both = pull, jax.grad(loss)(painted)
        return [jnp.linalg.norm(back(g)[0].kernel[...].ravel()) for g in both]

    adversarial, reconstruction = norms(state.model, state.discriminator)
    assert adversarial == pytest.approx(float(reconstruction), rel=0.02)


def test_the_perceptual_term_compares_feature_maps():
    config = dataclasses.replace(TRAINING, perceptual=1.0)
    a, b = (vqgan.to_float(jnp.asarray(pictures(4, seed))) for seed in (0, 1))
    terms = image_step.reconstruction_terms
    assert terms(a, a, config, features)["perceptual"] == 0
    assert terms(a, b, config, features)["perceptual"] > 0.1


def test_perceptual_weight_without_features_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs features"):
        run(tmp_path, dataclasses.replace(TRAINING, perceptual=1.0))


def test_pictures_of_another_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"takes uint8 \[32, 32, 3\]"):
        run(tmp_path, model=dataclasses.replace(MODEL, image_size=32))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"l2": 0.0}, "l1 and"),
        ({"unquantised_steps": 120}, "unquantised_steps=120"),
        ({"commitment": -1.0}, "commitment=-1.0"),
    ],
)
def test_impossible_settings_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(TRAINING, **change)


def test_kmeans_finds_separated_clusters():
    centres = 10 * jax.random.normal(jax.random.key(0), (12, 4))
    noise = 0.05 * jax.random.normal(jax.random.key(1), (600, 4))
    # The last cluster is rare: uniform seeding would most likely miss it.
    label = jnp.concatenate([jnp.arange(597) % 11, jnp.full(3, 11)])
    kmeans = jax.jit(codebook.kmeans, static_argnums=1)
    found = kmeans(centres[label] + noise, 12, jax.random.key(2))
    distance = jnp.linalg.norm(centres[:, None] - found, axis=-1)
    assert distance.min(1).max() < 0.2
    assert len(set(distance.argmin(1).tolist())) == 12


def test_dead_codes_move_to_badly_served_latents():
    codes = jnp.array([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [60.0, 60.0]])
    latents = jnp.array([[0.0, 0.01]] * 10 + [[1.0, 0.01]] * 10 + [[5.0, 5.0]])
    use = jnp.array([6.0, 6.0, 0.0, 0.0])
    restart = jax.jit(codebook.restart)
    moved, use = restart(codes, use, latents, jax.random.key(0))
    np.testing.assert_array_equal(moved[:2], codes[:2])
    assert (jnp.abs(moved[2:]).max(-1) <= 5).all()
    assert [5.0, 5.0] in moved[2:].tolist()
    np.testing.assert_allclose(use, [6, 6, 21 / 4, 21 / 4])
    same, _ = restart(moved, use, latents, jax.random.key(1))
    np.testing.assert_array_equal(same, moved)
