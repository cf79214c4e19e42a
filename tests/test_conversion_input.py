"""Folders that cannot be converted: one message, and nothing is written.

And image tokenizers from files of their own.
"""

import json
import shutil

import numpy as np
import pytest
import tiny_chameleon as tiny

from cm3leon_jax import conversion
from cm3leon_jax.interop.shards import Shards

WHY = "the extra `foreign` is not installed"
pytest.importorskip("tokenizers", reason=WHY)
safetensors = pytest.importorskip("safetensors.numpy", reason=WHY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("published") / "anole")


INDEX = "model.safetensors.index.json"


def changed(file, **changes):
    def change(folder):
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(found | changes))

    return change


def rewritten(change):
    """`change` takes the tensors of b.safetensors."""

    def rewrite(folder):
        path = folder / "b.safetensors"
        found = safetensors.load_file(path)
        change(found)
        safetensors.save_file(found, path)
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        files = {n: f for n, f in files.items() if f != path.name}
        files |= dict.fromkeys(found, path.name)
        (folder / INDEX).write_text(json.dumps({"weight_map": files}))

    return rewrite


def replaced(name, value):
    return rewritten(lambda found: found.update({name: value}))


def nameless(folder):
    words = {"IMGIMGZ" if i == 5 else w: i for w, i in tiny.words().items()}
    made = tiny.tokenizer(words)
    made.add_special_tokens(["IMGIMGZ"])
    made.save(str(folder / "tokenizer.json"))


FIRST = "model.vqmodel.encoder.conv_in.weight"
BAD = {
    "missing shard": (
        lambda folder: (folder / "b.safetensors").unlink(),
        r"b\.safetensors does not exist, which holds model\.\S+ according to",
    ),
    "pickle": (
        lambda folder: (folder / "a.safetensors").write_bytes(b"\x80\x04\x95pickled"),
        r"a\.safetensors is damaged or no safetensors file",
    ),
    "shape": (
        replaced("model.norm.weight", np.ones(31, np.float32)),
        r"b\.safetensors: tensor model\.norm\.weight is \[31\], .* say \[32\]",
    ),
    "type": (
        replaced("model.norm.weight", np.ones(32, np.int32)),
        r"b\.safetensors: tensor model\.norm\.weight is I32, only F64",
    ),
    "name": (
        replaced("model.other.weight", np.ones(32, np.float32)),
        r"b\.safetensors has the tensor model\.other\.weight, which a Chameleon",
    ),
    "pictures, shape": (
        replaced(FIRST, np.ones((32, 2, 3, 3), np.float32)),
        rf"b\.safetensors: {FIRST} is \[32, 2, 3, 3\], .* say \[32, 3, 3, 3\]",
    ),
    "pictures, name": (
        replaced("model.vqmodel.other", np.ones(3, np.float32)),
        r"b\.safetensors: model\.vqmodel\.other is of another architecture",
    ),
    "pictures, absent": (
        rewritten(lambda found: found.pop(FIRST)),
        rf"broken: {FIRST} is missing",
    ),
    "index": (
        lambda folder: (folder / INDEX).write_text("[]"),
        r'index\.json has no "weight_map" of names and files',
    ),
    "index, empty": (
        changed(INDEX, weight_map={}),
        r'index\.json has no "weight_map" of names and files',
    ),
    "no number": (
        changed("config.json", vocab_size=None),
        r"config\.json: vocab_size=None must be a positive number",
    ),
    "no list": (
        changed("config.json", vq_config=tiny.IMAGES | {"attn_resolutions": 3}),
        r"config\.json: vq_config: attn_resolutions=3 must be a list",
    ),
    "no list of levels": (
        changed("config.json", vq_config=tiny.IMAGES | {"channel_multiplier": None}),
        r"config\.json: vq_config: channel multipliers \(\) must begin with 1",
    ),
    "no image word": (
        nameless,
        r"tokenizer\.json: IMGIMGZ is no image word",
    ),
    "family": (
        changed("config.json", model_type="llama"),
        "config.json describes a 'llama', not a 'chameleon'",
    ),
    "pictures, settings": (
        changed("config.json", vq_config=tiny.IMAGES | {"channel_multiplier": []}),
        r"config.json: vq_config: channel multipliers \(\) must begin with 1",
    ),
    "end of a turn": (
        lambda folder: tiny.tokenizer(
            tiny.words() | {"<reserved08706>": 31, "<image>": 30}
        ).save(str(folder / "tokenizer.json")),
        r"tokenizer\.json: <reserved08706> is 31, in Chameleon's order it is 30",
    ),
    "tokenizer": (
        lambda folder: tiny.tokenizer(
            {w: i for w, i in tiny.words().items() if i < tiny.TOTAL - 2}
        ).save(str(folder / "tokenizer.json")),
        "tokenizer.json has text pieces .* of another size",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(folder, tmp_path, kind):
    """The message names the file, and the tensor."""
    broken, (change, message) = tmp_path / "broken", BAD[kind]
    shutil.copytree(folder, broken)
    change(broken)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        conversion.import_chameleon(broken, tmp_path / "work", tiny.config())
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_folder_that_exists_is_refused_before_anything_is_read(tmp_path):
    for convert in (
        lambda: conversion.import_chameleon(tmp_path / "a", tmp_path, tiny.config()),
        lambda: conversion.import_images(tmp_path / "a.pt", tmp_path),
        lambda: conversion.export(tmp_path / "a", tmp_path),
    ):
        with pytest.raises(FileExistsError, match="exists: give a new folder"):
            convert()


def test_image_tokenizer_of_its_own_file(folder, tmp_path):
    """Meta's vqgan.ckpt, for folders without the decoder of pictures."""
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    bare = tiny.write(tmp_path / "chameleon", decoder=False)
    arrays = tiny.fill(tiny.image_shapes(tiny.IMAGES), seed=1)
    file = tmp_path / "vqgan.ckpt"

    def convert(name, arrays):
        torch.save(
            {"state_dict": {n: torch.tensor(x) for n, x in arrays.items()}}, file
        )
        conversion.import_chameleon(bare, tmp_path / name, tiny.config(), file)
        return tmp_path / name

    conversion.export(convert("work", arrays), tmp_path / "back")
    before, after = Shards(folder), Shards(tmp_path / "back")
    for name in before.places:  # the decoder of pictures among them
        np.testing.assert_array_equal(before.view(name), after.view(name), name)
    for name in ("quantize.embedding.weight", "encoder.conv_in.weight"):
        with pytest.raises(ValueError, match=f"ckpt: {name} is not .*another model"):
            convert("other", arrays | {name: 1.5 * arrays[name]})
    assert not (tmp_path / "other").exists()


def test_nothing_is_written_half(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_save_decoder", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conversion.import_chameleon(folder, tmp_path / "work", tiny.config())
    assert not list(tmp_path.iterdir())
