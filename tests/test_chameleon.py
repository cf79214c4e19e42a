"""Chameleon: read from files, compared with `transformers` in float32."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import tiny_chameleon as tiny
from flax import nnx

from cm3leon_jax import vocab
from cm3leon_jax.interop import chameleon
from cm3leon_jax.interop.shards import Shards
from cm3leon_jax.models import cache, vqgan
from cm3leon_jax.models.decoder import DecoderConfig
from cm3leon_jax.models.unrolled import unroll
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.rules import Rules

for library in ("tokenizers", "safetensors"):
    pytest.importorskip(library, reason="the extra `foreign` is not installed")
PREFIX, STEPS = 7, 20
# 7B's norm order and 34B's, with and without QK-norm and shared keys.
KINDS = {
    "7b": {},
    "34b": {"swin_norm": True, "num_key_value_heads": 2},
    "7b without QK-norm": {"qk_norm": False, "num_hidden_layers": 3},
    "34b without QK-norm": {"qk_norm": False, "swin_norm": True, "hidden_size": 48},
    "one head of keys": {"num_key_value_heads": 1, "intermediate_size": 40},
}


def one_device():
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])


def read(folder, mesh=None):
    shards, file = Shards(folder), chameleon.read_settings(folder)
    settings = chameleon.decoder_settings(file, shards)
    config = DecoderConfig(**settings, vocab=file["vocab_size"])
    return chameleon.read_decoder(shards, config, mesh or one_device(), Rules())


def reference(folder):
    """The same folder in transformers."""
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    transformers = references.module("transformers")
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if not any(".q_norm." in name for name in Shards(folder).places):
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    return model


@functools.cache
def tokens_BL() -> np.ndarray:
    return np.random.default_rng(2).integers(0, tiny.TOTAL, (2, PREFIX + STEPS))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(tmp_path, kind):
    folder = tiny.write(tmp_path, **KINDS[kind])
    wanted_BLV = tiny.logits(reference(folder), tokens_BL())
    model = read(folder)
    assert wanted_BLV.std() > 0.3
    np.testing.assert_allclose(model(tokens_BL()), wanted_BLV, atol=1e-4)
    # The same by a prefix and 20 cached steps.
    unrolled = unroll(model)
    for param in vars(unrolled.blocks[0]).values():
        if isinstance(param, nnx.Param):
            assert len(param.get_metadata("out_sharding")) == param[...].ndim
    prefix = cache.prefill(
        unrolled, jnp.asarray(tokens_BL()[:, :PREFIX]), jnp.full(2, PREFIX)
    )
    state = cache.begin(unrolled, [prefix], 2, STEPS)
    step = jax.jit(lambda token, state: cache.step(unrolled, token, [prefix], state))
    for t in range(PREFIX, PREFIX + STEPS):
        logits_BGV, state = step(jnp.asarray(tokens_BL()[:, t, None]), state)
        np.testing.assert_allclose(logits_BGV[:, 0], wanted_BLV[:, t], atol=1e-4)


def test_a_mesh_reads_the_same_shards(tmp_path):
    folder = tiny.write(tmp_path, **KINDS["34b"])
    whole = read(folder)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    split = read(folder, mesh)
    assert split.blocks.w_up.get_value().sharding.num_devices == 8
    assert not split.blocks.w_up.get_value().is_fully_replicated
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(a, b)


def layout():
    sizes = {"text": tiny.TEXT, "image": tiny.CODES, "total": tiny.TOTAL}
    return vocab.chameleon(sentinels=tiny.SENTINELS, **sizes)


def test_published_ids():
    ids = vocab.chameleon(text=49_152, image=8192, sentinels=512, total=65_536)
    assert (ids.image[0], ids.image[-1], ids.eoss, ids.brk) == (4, 8195, 8196, 8197)
    assert (ids.bos, ids.pad, ids.eos, ids.turn) == (0, 1, 2, 8710)
    assert ids.sentinels == range(8198, 8710) and ids.classes.start == 8712
    assert ids.plain()["turn"] == 8710 and ids.text[-1] == 65_535
    with pytest.raises(ValueError, match="vocabulary.total=100 does not hold text=90"):
        vocab.chameleon(text=90, image=4, sentinels=2, total=100)


def read_images(folder, checkpoint=None):
    shards, file = Shards(folder), chameleon.read_settings(folder)
    codes = chameleon.check_vocabulary(chameleon.load_tokenizer(folder), layout())
    config = chameleon.image_settings(file, folder)
    return chameleon.read_images(shards, config, codes, checkpoint)


@pytest.mark.parametrize("shuffled", [False, True])
def test_image_ids_are_those_of_transformers(tmp_path, shuffled):
    folder = tiny.write(tmp_path, shuffled=shuffled)
    theirs = reference(folder)
    import torch

    rng = np.random.default_rng(4)
    images = rng.uniform(-1, 1, (3, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs.get_image_tokens(torch.tensor(images.transpose(0, 3, 1, 2)))
    model = read_images(folder)
    codes = np.asarray(model.encode(jnp.asarray(images)))
    assert len(np.unique(codes)) > 4
    ids = layout().image_ids(codes).reshape(3, -1)
    np.testing.assert_array_equal(ids, wanted.numpy())


def test_settings_left_out_are_those_of_the_7b(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
    file = chameleon.read_settings(tmp_path)
    assert (file["hidden_size"], file["intermediate_size"]) == (4096, 11_008)
    config = chameleon.image_settings(file, tmp_path)
    assert (config.image_size, config.codebook, config.grid) == (512, 8192, 32)
    assert vqgan.parameter_count(config) > 60e6


# ------------------------------------------------------------------ bad input


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_not_whole(tmp_path):
    folder = tiny.write(tmp_path)
    shard = folder / "b.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors .* holds model\.\S+"):
        read(folder)
    shard.write_bytes(data[:-50])
    with pytest.raises(
        ValueError, match=r"b\.safetensors is damaged .*model\.\S+ lies"
    ):
        read(folder)
    shard.write_bytes(b"\x80\x04not safetensors at all")
    with pytest.raises(ValueError, match=r"b\.safetensors is damaged"):
        read(folder)
    shard.write_bytes((folder / "a.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"b\.safetensors has no tensor model\.\S+"):
        read(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        read(folder)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00002\.bin is a pickle.*safe_serialization"):
        read(folder)


def test_tensors_and_settings_that_do_not_fit(tmp_path):
    folder = tiny.write(tmp_path)
    change(folder, intermediate_size=50)
    with pytest.raises(
        ValueError, match=r"down_proj.weight is \[32, 48\], .* \[32, 50\]"
    ):
        read(folder)
    change(folder, intermediate_size=48, num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"a\.safetensors has the tensor model\.layers\.1"
    ):
        read(folder)
    change(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.2"):
        read(folder)
    for key, value in (("rope_theta", 5.0), ("rms_norm_eps", 1e-6), ("mlp_bias", True)):
        change(folder, **{key: value})
        with pytest.raises(ValueError, match=f"config.json: {key}={value}"):
            read(folder)
        change(folder, **tiny.settings())
    change(folder, model_type="llama")
    with pytest.raises(ValueError, match="describes a 'llama', not a 'chameleon'"):
        read(folder)


def test_tokenizers_of_others(tmp_path):
    folder = tiny.write(tmp_path, decoder=False)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight\).*vqgan\.ckpt"):
        read_images(folder)
    words = tiny.words()
    for wrong, message in (
        ({w: i for w, i in words.items() if i < tiny.TOTAL - 2}, "of another size"),
        (words | {"<eoss>": words["</s>"], "</s>": words["<eoss>"]}, "</s> is 20"),
        ({w: i for w, i in words.items() if w != "<racm3:break>"}, "break> is 287"),
    ):
        tiny.tokenizer(wrong).save(str(folder / "tokenizer.json"))
        with pytest.raises(ValueError, match=message):
            chameleon.check_vocabulary(chameleon.load_tokenizer(folder), layout())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        chameleon.load_tokenizer(folder)
