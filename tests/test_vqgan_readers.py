"""Published VQGANs: read from torch files, compared with their layers in PyTorch."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chameleon as tiny

from cm3leon_jax import conversion
from cm3leon_jax.interop import llamagen, taming
from cm3leon_jax.tokenizers.image import ImageTokenizer

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
yaml = pytest.importorskip("yaml", reason="the extra `foreign` is not installed")
F = torch.nn.functional

# Chameleon's has no attention but in the middle, taming's has it at one resolution.
SIZES = tiny.IMAGES | {"num_embeddings": 48}
KINDS = {
    "chameleon": SIZES,
    "taming": SIZES | {"attn_resolutions": [4], "num_res_blocks": 2},
}


class Reference:
    """The layers by their names in taming-transformers, written out."""

    def __init__(self, sizes, seed=0):
        self.sizes, self.levels = sizes, len(sizes["channel_multiplier"])
        arrays = tiny.fill(tiny.image_shapes(sizes), seed)
        self.state = {name: torch.tensor(x) for name, x in arrays.items()}

    def conv(self, x, name, stride=1):
        weight = self.state[f"{name}.weight"]
        pad = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, pad)

    def norm(self, x, name):
        s = self.state
        return F.group_norm(x, 32, s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def block(self, x, name):
        y = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        y = self.conv(F.silu(self.norm(y, f"{name}.norm2")), f"{name}.conv2")
        wider = f"{name}.nin_shortcut"
        return (self.conv(x, wider) if f"{wider}.weight" in self.state else x) + y

    def attention(self, x, name):
        if f"{name}.q.weight" not in self.state:
            return x
        y = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(y, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.conv((v @ weights.mT).reshape(x.shape), f"{name}.proj_out")

    def middle(self, x, part):
        x = self.attention(self.block(x, f"{part}.mid.block_1"), f"{part}.mid.attn_1")
        return self.block(x, f"{part}.mid.block_2")

    def end(self, x, part):
        return self.conv(F.silu(self.norm(x, f"{part}.norm_out")), f"{part}.conv_out")

    def latents(self, x):
        x = self.conv(x, "encoder.conv_in")
        for i in range(self.levels):
            for j in range(self.sizes["num_res_blocks"]):
                x = self.block(x, f"encoder.down.{i}.block.{j}")
                x = self.attention(x, f"encoder.down.{i}.attn.{j}")
            if i + 1 < self.levels:
                x = self.conv(
                    F.pad(x, (0, 1, 0, 1)), f"encoder.down.{i}.downsample.conv", 2
                )
        x = self.conv(self.end(self.middle(x, "encoder"), "encoder"), "quant_conv")
        return x.permute(0, 2, 3, 1)

    def paint(self, z):
        x = self.conv(z.permute(0, 3, 1, 2), "post_quant_conv")
        x = self.middle(self.conv(x, "decoder.conv_in"), "decoder")
        for i in reversed(range(self.levels)):
            for j in range(self.sizes["num_res_blocks"] + 1):
                x = self.block(x, f"decoder.up.{i}.block.{j}")
                x = self.attention(x, f"decoder.up.{i}.attn.{j}")
            if i:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(x, f"decoder.up.{i}.upsample.conv")
        return self.end(x, "decoder").permute(0, 2, 3, 1)

    def check(self, model, unit):
        """The same codes and pixels as `model`; codes of length 1 if `unit`."""
        images = np.random.default_rng(3).uniform(-1, 1, (2, tiny.SIDE, tiny.SIDE, 3))
        codes_ZE = self.state["quantize.embedding.weight"]
        with torch.no_grad():
            z = self.latents(torch.tensor(images.transpose(0, 3, 1, 2)).float())
            if unit:
                z, codes_ZE = F.normalize(z, dim=-1), F.normalize(codes_ZE, dim=-1)
            codes = (
                torch.cdist(z.flatten(0, 2), codes_ZE).argmin(-1).reshape(z.shape[:3])
            )
            pixels = self.paint(codes_ZE[codes]).numpy()
        assert len(codes.unique()) > 4
        found = model.encode(jnp.asarray(images, jnp.float32))
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_allclose(model.decode(jnp.asarray(codes)), pixels, atol=1e-4)


def settings(sizes) -> dict:
    details = {
        "double_z": False,
        "z_channels": sizes["latent_channels"],
        "resolution": sizes["resolution"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": sizes["base_channels"],
        "ch_mult": sizes["channel_multiplier"],
        "num_res_blocks": sizes["num_res_blocks"],
        "attn_resolutions": sizes["attn_resolutions"] or [],
        "dropout": 0.0,
    }
    codes = {"embed_dim": sizes["embed_dim"], "n_embed": sizes["num_embeddings"]}
    return {"model": {"params": codes | {"ddconfig": details}}}


def published(folder, sizes):
    """vqgan.ckpt and vqgan.yaml, with the discriminator that training leaves there."""
    reference = Reference(sizes)
    state = reference.state | {"loss.discriminator.main.0.weight": torch.ones(2)}
    torch.save({"state_dict": state, "global_step": 7}, folder / "vqgan.ckpt")
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(settings(sizes)))
    return reference


@pytest.mark.parametrize("kind", KINDS)
def test_vqgan_of_taming_and_meta(tmp_path, kind):
    reference = published(tmp_path, KINDS[kind])
    _, model = taming.load(tmp_path / "vqgan.ckpt", tmp_path / "vqgan.yaml")
    reference.check(model, unit=False)


@pytest.mark.parametrize("multipliers", [[1, 1, 2], [1, 2]], ids=["f=4", "f=2"])
def test_llamagen(tmp_path, multipliers):
    """Published: f = 16 and 8, by five levels and four."""
    side = tiny.SIDE >> (len(multipliers) - 1)
    changes = {"channel_multiplier": multipliers, "attn_resolutions": [side]}
    reference = Reference(SIZES | changes)
    state = {renamed(n, len(multipliers)): x for n, x in reference.state.items()}
    state["quantize.codebook_used"] = torch.zeros(8)
    torch.save({"model": state, "steps": 1}, tmp_path / "vq.pt")
    made = conversion.import_images(tmp_path / "vq.pt", tmp_path / "out", tiny.SIDE)
    assert made["codebook"] == 48
    tokenizer = ImageTokenizer.load(tmp_path / "out")
    assert tokenizer.grid == (side, side) and tokenizer.config.normalize_codes
    reference.check(tokenizer.model, unit=True)


def renamed(name: str, levels: int) -> str:
    """A name of taming's as LlamaGen has it, whose decoder counts from the codes on."""
    name = re.sub(r"mid\.(block_1|attn_1|block_2)", _middle, name)
    name = re.sub(r"up\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"\.(down|up)\.(\d)\.", r".conv_blocks.\2.", name)
    return name.replace(".block.", ".res.")


def _middle(match) -> str:
    return f"mid.{('block_1', 'attn_1', 'block_2').index(match[1])}"


class Stranger:
    pass


def test_bad_files(tmp_path):
    published(tmp_path, SIZES)
    checkpoint, file = tmp_path / "vqgan.ckpt", tmp_path / "vqgan.yaml"
    with pytest.raises(FileNotFoundError, match="none.yaml does not exist"):
        taming.load(checkpoint, tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"ckpt has no tensor .* no LlamaGen"):
        llamagen.load(checkpoint)
    file.write_text(yaml.safe_dump(settings(SIZES | {"latent_channels": 13})))
    with pytest.raises(ValueError, match=r"ckpt: \S+ is \[.*12.*say \[.*13"):
        taming.load(checkpoint, file)
    file.write_text(yaml.safe_dump(settings(SIZES | {"num_res_blocks": 2})))
    with pytest.raises(ValueError, match=r"ckpt: \S+\.block\.1\S+ is missing"):
        taming.load(checkpoint, file)
    file.write_text(yaml.safe_dump(settings(SIZES | {"channel_multiplier": [1, 1]})))
    with pytest.raises(ValueError, match=r"ckpt: \S+ is of another architecture"):
        taming.load(checkpoint, file)
    file.write_text(yaml.safe_dump(settings(SIZES | {"channel_multiplier": [2, 2]})))
    with pytest.raises(ValueError, match=r"yaml: channel multipliers \(2, 2\)"):
        taming.load(checkpoint, file)
    file.write_text("model: {}")
    with pytest.raises(ValueError, match="yaml is not the settings of a VQGAN"):
        taming.load(checkpoint, file)
    torch.save({"state_dict": {}, "callbacks": Stranger()}, checkpoint)
    with pytest.raises(ValueError, match="ckpt is damaged or holds more than tensors"):
        taming.torch_file(checkpoint)
    torch.save([torch.ones(2)], checkpoint)
    with pytest.raises(ValueError, match="ckpt holds a list, no tensors by name"):
        taming.torch_file(checkpoint)
    torch.save({"model": {}}, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match="vq.pt has no tensor .*no LlamaGen tokenizer"):
        llamagen.load(tmp_path / "vq.pt")
