"""Our own decoders, written for transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import nnx

from cm3leon_jax.interop import hub
from cm3leon_jax.models.decoder import Decoder, DecoderConfig
from cm3leon_jax.vocab import build

pytest.importorskip("safetensors", reason="the extra `foreign` is not installed")


def random_decoder(**settings):
    sizes = {"vocab": 64, "layers": 2, "width": 32, "heads": 4, "mlp": 48, "length": 24}
    config = DecoderConfig(**sizes | settings)
    shapes, structure = jax.tree.flatten(Decoder(config, nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    arrays = [rng.normal(0, 0.3, x.shape).astype(np.float32) for x in shapes]
    return structure.unflatten([jnp.asarray(x) for x in arrays])


LLAMA = {"norm": "rms", "activation": "swiglu", "positions": "rope"}
LAYOUT = build(text=20, image=16, classes=0, sentinels=8, total=128)


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_embeddings": True}, LLAMA, LLAMA | {"kv_heads": 2}],
    ids=["paper", "tied", "llama", "shared keys"],
)
def test_our_decoders_in_transformers(tmp_path, settings):
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    transformers = references.module("transformers")
    decoder = random_decoder(**settings)
    hub.write(tmp_path / "out", decoder, LAYOUT, None, words=None, card="")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(2).integers(0, 64, (2, 20))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(tokens)).logits.numpy()
    assert wanted.std() > 0.3
    np.testing.assert_allclose(decoder(tokens), wanted, atol=1e-4)


def test_decoders_that_transformers_has_not():
    for changes, message in (
        ({"positions": "both"}, "decoder.positions='both'"),
        ({"qk_norm": True}, "decoder.qk_norm=True"),
        (LLAMA | {"post_norm": True}, "decoder.post_norm=True without QK-norm"),
        (LLAMA | {"qk_norm": True, "norm_eps": 1e-6}, "decoder.norm_eps=1e-06"),
    ):
        with pytest.raises(ValueError, match=f"no model with {message}"):
            hub.settings(random_decoder(**changes).config, LAYOUT)
