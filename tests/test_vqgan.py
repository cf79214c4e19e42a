"""The VQGAN module: sizes, locality, quantisation, sharding, and its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
import tiny_vqgan
from flax import linen, nnx

from cm3leon_jax.models import convolution, vqgan
from cm3leon_jax.models.discriminator import DiscriminatorConfig, hinge
from cm3leon_jax.models.discriminator import build as build_discriminator
from cm3leon_jax.models.vqgan import VQGANConfig
from cm3leon_jax.parallel.rules import Rules, shard_fn, shardings

CONVOLUTIONAL = VQGANConfig(
    image_size=16,
    channels=8,
    multipliers=(1, 2),
    res_blocks=1,
    attention=(8,),
    latent=16,
    codebook=32,
    code_dim=4,
)
LOCAL = dataclasses.replace(
    tiny_vqgan.LOCAL, patch=2, multipliers=(1, 2), normalize_codes=True
)


@pytest.fixture(scope="module", params=[CONVOLUTIONAL, LOCAL], ids=["conv", "local"])
def model(request):
    built = build(request.param, jax.random.key(0))
    codes = jax.random.normal(jax.random.key(1), built.codebook.shape)
    built.codebook[...] = codes
    return built


# Compiled whole: op by op, every shape of every small operation compiles alone.
build = jax.jit(vqgan.build, static_argnums=0)
latents = jax.jit(vqgan.VQGAN.latents)
encode = jax.jit(vqgan.VQGAN.encode)
decode = jax.jit(vqgan.VQGAN.decode)


def pictures(count, seed=0, size=16):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_the_paper_s_shape():
    """256x256 pixels -> 32x32 codes of 8,192, f = 8 (paper 1.4)."""
    config = VQGANConfig()
    assert (config.factor, config.grid, config.codebook) == (8, 32, 8192)
    model = vqgan.abstract(config)
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    codes = jax.eval_shape(vqgan.VQGAN.encode, model, images)
    assert (codes.shape, codes.dtype) == ((2, 32, 32), jnp.int32)
    made = jax.eval_shape(vqgan.VQGAN.decode, model, codes)
    assert (made.shape, made.dtype) == ((2, 256, 256, 3), jnp.float32)
    # Chameleon's: 512x512 -> 32x32, attention in the middle only (paper 2.7).
    chameleon = VQGANConfig(
        image_size=512, multipliers=(1, 1, 2, 2, 4), attention=(), code_dim=256
    )
    assert (chameleon.factor, chameleon.grid) == (16, 32)


def test_parameters_are_float_and_counted(model):
    leaves = jax.tree.leaves(model)
    assert {x.dtype for x in leaves} == {jnp.dtype("float32")}
    assert sum(x.size for x in leaves) == vqgan.parameter_count(model.config)


def test_codes_and_pictures_have_their_shapes(model):
    config = model.config
    codes = encode(model, vqgan.to_float(jnp.asarray(pictures(3))))
    assert codes.shape == (3, config.grid, config.grid)
    assert 0 <= codes.min() and codes.max() < config.codebook
    assert decode(model, codes).shape == (3, 16, 16, 3)


def test_kernel_1_makes_strictly_local_codes(model):
    """Noise in one cell's pixels moves that cell's latent, and no other's if local."""
    config, images = model.config, pictures(1)
    changed = images.copy()
    f = config.factor
    changed[:, f : 2 * f, 2 * f : 3 * f] = pictures(1, seed=1)[:, :f, :f]
    made = [latents(model, vqgan.to_float(jnp.asarray(x))) for x in (images, changed)]
    moved = np.asarray(jnp.abs(made[0] - made[1]).max(-1)[0] > 0)
    wanted = np.zeros((config.grid, config.grid), bool)
    wanted[1, 2] = True
    if config.kernel == 1:
        np.testing.assert_array_equal(moved, wanted)
    else:
        assert moved.all()  # attention and GroupNorm spread it


def test_equal_patches_have_equal_codes_when_local():
    model = build(LOCAL, jax.random.key(0))
    patch = pictures(1)[:, :4, :4]
    codes = encode(model, vqgan.to_float(jnp.asarray(np.tile(patch, (1, 4, 4, 1)))))
    assert len(np.unique(codes)) == 1


def test_nearest_is_the_brute_force_minimum():
    key_z, key_c = jax.random.split(jax.random.key(2))
    z, codes = (
        jax.random.normal(key_z, (5, 7, 6)),
        jax.random.normal(key_c, (19, 6)),
    )
    wanted = jnp.square(z[:, :, None] - codes).sum(-1).argmin(-1)
    np.testing.assert_array_equal(vqgan.nearest(z, codes), wanted)
    np.testing.assert_array_equal(vqgan.nearest(codes, codes), np.arange(19))


def test_normalised_codes_compare_directions_only():
    model = build(LOCAL, jax.random.key(0))
    images = vqgan.to_float(jnp.asarray(pictures(2)))
    before = encode(model, images)
    model.codebook[...] = model.codebook[...] * jnp.arange(1.0, 33.0)[:, None]
    np.testing.assert_array_equal(before, encode(model, images))
    np.testing.assert_allclose(
        jnp.linalg.norm(latents(model, images), axis=-1), 1, 1e-5
    )


def test_space_to_depth_and_back():
    x = jnp.arange(2 * 8 * 12 * 3.0).reshape(2, 8, 12, 3)
    deep = convolution.space_to_depth(x, 4)
    assert deep.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(deep[0, 1, 2].reshape(4, 4, 3), x[0, 4:, 8:])
    np.testing.assert_array_equal(convolution.depth_to_space(deep, 4), x)


def test_pictures_survive_the_change_of_type():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    floats = vqgan.to_float(jnp.asarray(images))
    assert (floats.min(), floats.max()) == (-1, 1)
    np.testing.assert_array_equal(vqgan.to_uint8(floats), images)
    np.testing.assert_array_equal(vqgan.to_uint8(jnp.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize("width", [6, 64])
def test_group_norm_is_linen_s(width):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, width)) * 3 + 1
    groups = {6: 2, 64: 32}[width]
    oracle = linen.GroupNorm(num_groups=groups, epsilon=convolution.NORM_EPS)
    wanted = jax.jit(oracle.init_with_output)(jax.random.key(0), x)[0]
    with nnx.use_eager_sharding(False):
        norm = convolution.Norm(width, "group")
    np.testing.assert_allclose(jax.jit(norm)(x), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_convolution_is_linen_s(kernel, stride):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    with nnx.use_eager_sharding(False):
        conv = convolution.Conv(3, 5, kernel, nnx.Rngs(0), stride=stride)
    oracle = linen.Conv(5, (kernel, kernel), stride, padding="SAME")
    params = {"kernel": conv.kernel[...], "bias": conv.bias[...]}
    wanted = oracle.apply({"params": params}, x)
    np.testing.assert_allclose(conv(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_mesh_has_the_same_gradients():
    images = vqgan.to_float(jnp.asarray(pictures(8)))

    def gradients(mesh):
        rules = Rules()
        place = shardings(vqgan.abstract(CONVOLUTIONAL), mesh, rules)
        make = jax.jit(vqgan.build, static_argnums=0, out_shardings=place)
        model = make(CONVOLUTIONAL, jax.random.key(0))
        shard = shard_fn(mesh, rules)

        def loss(model):
            z = model.latents(images, shard=shard)
            painted = model.decoder.paint(model.decoder.trunk(z, shard))
            return jnp.square(painted - images).mean()

        return model, jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(model))

    _, alone = gradients(tiny_training.mesh_of(1, 1, 1))
    model, spread = gradients(tiny_training.mesh_of(2, 2, 2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        spread,
        alone,
    )
    kernel = model.encoder.levels[1].blocks[0].conv1.kernel[...]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2


def test_bfloat16_compute_leaves_parameters_and_latents_in_float32():
    config = dataclasses.replace(LOCAL, dtype="bfloat16")
    model = build(config, jax.random.key(0))
    images = vqgan.to_float(jnp.asarray(pictures(2)))
    assert latents(model, images).dtype == jnp.float32
    assert decode(model, encode(model, images)).dtype == jnp.float32
    close = latents(build(LOCAL, jax.random.key(0)), images)
    np.testing.assert_allclose(latents(model, images), close, atol=0.1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_size": 20, "multipliers": (1, 2, 2, 4)}, "image_size=20"),
        ({"kernel": 5}, "kernel=5"),
        ({"kernel": 1}, "kernel=1"),
        ({"attention": (7,)}, "attention"),
        ({"middle": "convolution"}, "middle"),
        ({"codebook": 1}, "codebook=1"),
        ({"multipliers": ()}, "multipliers"),
        ({"code_dim": 0}, "code_dim=0"),
    ],
)
def test_impossible_settings_are_named(change, named):
    with pytest.raises(ValueError, match=f"image_tokenizer.{named}"):
        dataclasses.replace(CONVOLUTIONAL, **change)


def test_discriminator_judges_patches():
    judge = jax.jit(build_discriminator, static_argnums=0)(
        DiscriminatorConfig(channels=8, layers=2), jax.random.key(0)
    )
    images = vqgan.to_float(jnp.asarray(pictures(2, size=32)))
    logits = jax.jit(lambda judge, x: judge(x))(judge, images)
    assert logits.shape == (2, 8, 8) and logits.dtype == jnp.float32


def test_hinge_loss_of_counted_cases():
    one = jnp.ones((1, 2, 2))
    assert hinge(0 * one, 0 * one) == 1
    assert hinge(one, -one) == 0
    assert hinge(2 * one, -3 * one) == 0
    assert hinge(-one, one) == 2
