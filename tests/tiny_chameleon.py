"""A tiny Chameleon of random weights, laid out as Hugging Face publishes it."""

import json
from pathlib import Path

import numpy as np

from configs import chameleon_7b

CODES, SENTINELS, GRID, SIDE = 16, 8, 4, 16
TEXT = 256  # every byte
FIRST_TEXT = 4 + CODES + 2 + SENTINELS + 2
TOTAL = FIRST_TEXT + TEXT
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "swin_norm": False,
}
IMAGES = {
    "embed_dim": 8,
    "num_embeddings": CODES,
    "latent_channels": 12,
    "resolution": SIDE,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": None,
}


def words(shuffled: bool = False) -> dict[str, int]:
    """The vocabulary of the tokenizer."""
    codes = np.random.default_rng(5).permutation(CODES) if shuffled else range(CODES)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += [
        f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"
        for code in codes
    ]
    names += ["<eoss>", "<racm3:break>"]
    names += [f"<reserved{8194 + i:05}>" for i in range(SENTINELS)]
    names += ["<reserved08706>", "<image>", *sorted(_alphabet())]
    return {name: i for i, name in enumerate(names)}


def _alphabet() -> list[str]:
    import tokenizers

    return tokenizers.pre_tokenizers.ByteLevel.alphabet()


def settings(**changes) -> dict:
    return {
        "model_type": "chameleon",
        "architectures": ["ChameleonForConditionalGeneration"],
        "vocab_size": TOTAL,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "vq_config": IMAGES,
        **SMALL,
        **changes,
    }


def decoder_shapes(file: dict, qk_norm: bool) -> dict[str, tuple[int, ...]]:
    """The published names."""
    D, F, H = (
        file[f"{x}"]
        for x in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    J, K = file["num_key_value_heads"], D // H
    shapes = {"model.embed_tokens.weight": (file["vocab_size"], D)}
    for n in range(file["num_hidden_layers"]):
        at = f"model.layers.{n}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (D, D),
            f"{at}.self_attn.k_proj.weight": (J * K, D),
            f"{at}.self_attn.v_proj.weight": (J * K, D),
            f"{at}.self_attn.o_proj.weight": (D, D),
            f"{at}.mlp.gate_proj.weight": (F, D),
            f"{at}.mlp.up_proj.weight": (F, D),
            f"{at}.mlp.down_proj.weight": (D, F),
            f"{at}.input_layernorm.weight": (D,),
            f"{at}.post_attention_layernorm.weight": (D,),
        }
        for x, heads in (("q", H), ("k", J)) if qk_norm else ():
            shapes[f"{at}.self_attn.{x}_norm.weight"] = (heads, K)
            shapes[f"{at}.self_attn.{x}_norm.bias"] = (heads, K)
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (file["vocab_size"], D)}
    return shapes


def image_shapes(sizes: dict, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Those of a VQGAN as taming-transformers names them."""
    shapes: dict[str, tuple[int, ...]] = {}
    z, e, ch = sizes["latent_channels"], sizes["embed_dim"], sizes["base_channels"]
    multipliers, blocks = sizes["channel_multiplier"], sizes["num_res_blocks"]

    def conv(name: str, a: int, b: int, side: int = 3) -> None:
        shapes[f"{prefix}{name}.weight"] = (b, a, side, side)
        shapes[f"{prefix}{name}.bias"] = (b,)

    def norm(name: str, width: int) -> None:
        shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (width,)

    def block(name: str, a: int, b: int) -> None:
        norm(f"{name}.norm1", a)
        conv(f"{name}.conv1", a, b)
        norm(f"{name}.norm2", b)
        conv(f"{name}.conv2", b, b)
        if a != b:
            conv(f"{name}.nin_shortcut", a, b, 1)

    def attention(name: str, a: int) -> None:
        norm(f"{name}.norm", a)
        for x in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{x}", a, a, 1)

    widths = [ch * m for m in multipliers]
    sides = [sizes["resolution"] >> i for i in range(len(widths))]
    attended = sizes["attn_resolutions"] or ()
    last = widths[-1]
    for part, ends in (("encoder", (3, z)), ("decoder", (z, 3))):
        conv(f"{part}.conv_in", ends[0], ch if part == "encoder" else last)
        for i in (1, 2):
            block(f"{part}.mid.block_{i}", last, last)
        attention(f"{part}.mid.attn_1", last)
        norm(f"{part}.norm_out", last if part == "encoder" else ch)
        conv(f"{part}.conv_out", last if part == "encoder" else ch, ends[1])
    before = ch
    for i, width in enumerate(widths):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", before, width)
            before = width
            if sides[i] in attended:
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i + 1 < len(widths):
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    for i in reversed(range(len(widths))):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", before, widths[i])
            before = widths[i]
            if sides[i] in attended:
                attention(f"decoder.up.{i}.attn.{j}", before)
        if i:
            conv(f"decoder.up.{i}.upsample.conv", before, before)
    conv("quant_conv", z, e, 1)
    conv("post_quant_conv", e, z, 1)
    shapes[f"{prefix}quantize.embedding.weight"] = (sizes["num_embeddings"], e)
    return shapes


def fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of a deviation that lets every part matter; scales are about 1."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        fan = np.prod(shape[1:]) if len(shape) > 1 else 30
        x = rng.normal(0, 1 / np.sqrt(fan), shape)
        if "norm" in name and name.endswith("weight"):
            x = 1 + 0.3 * rng.normal(0, 1, shape)
        arrays[name] = np.asarray(x, np.float32)
    return arrays


def write(
    folder: Path, *, qk_norm=True, decoder=True, shuffled=False, **changes
) -> Path:
    """A folder; `decoder`: with the decoder of pictures, as Anole has it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = words(shuffled)
    file = settings(vocabulary_map=vocabulary, **changes)
    (folder / "config.json").write_text(json.dumps(file))
    arrays = fill(decoder_shapes(file, qk_norm))
    arrays |= fill(image_shapes(file["vq_config"], "model.vqmodel."), seed=1)
    if not decoder:
        lost = "model.vqmodel.decoder."
        arrays = {name: x for name, x in arrays.items() if not name.startswith(lost)}
    names = sorted(arrays)
    half = len(names) // 2
    files = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for path, part in files.items():
        save_file({name: arrays[name] for name in part}, folder / path)
    index = {name: path for path, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    return folder


def tokenizer(vocabulary: dict[str, int]):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = byte_level
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<image>"]
    made.add_special_tokens(special)
    return made


def logits(theirs, tokens: np.ndarray) -> np.ndarray:
    """Those of a model of transformers, whose own `forward` hides those of images."""
    import torch

    with torch.no_grad():
        hidden = theirs.model(input_ids=torch.tensor(tokens)).last_hidden_state
        return theirs.lm_head(hidden).numpy()


def config(variant: str = "") -> dict:
    """`configs/chameleon_7b.py`, for a CPU."""
    c = chameleon_7b.get_config(variant).unlock()
    c.decoder.update({"dtype": "float32", "remat": "none"})
    c.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    return c.to_dict()
