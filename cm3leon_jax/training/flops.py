"""Model FLOPs, for utilisation and for compute-matched comparisons."""

from cm3leon_jax.models.decoder import DecoderConfig
from cm3leon_jax.models.dual_encoder import DualEncoderConfig
from cm3leon_jax.training.parts import ALL, EVERYTHING, LORA, PARTS, Parts


def train_flops_per_token(
    config: DecoderConfig, length: int, parts: Parts = EVERYTHING
) -> float:
    """FLOPs of one token's forward and backward pass in rows of `length`.

    Two per weight and pass direction (forward 1, backward 2: for what comes before it,
    and for the weight itself where `parts` trains it), plus causal attention, of which
    half the scores are needed. Embedding look-ups cost nothing; recomputation under
    remat is not model work and is not counted.
    """
    N, D, F, V = config.layers, config.width, config.mlp, config.vocab
    matrices = 3 if config.activation == "swiglu" else 2
    shared = config.key_heads / config.heads
    projections = (2 + 2 * shared) * D * D
    weights = N * (projections + matrices * D * F) + D * V
    attention = N * 2 * D * (length / 2)
    trained, rank = 0, parts.config.rank
    for name in parts.config.train:
        kind = PARTS[name][1] if name in PARTS else None
        rows = V if kind is None else len(getattr(parts.layout, kind))
        trained += {
            ALL: weights,
            LORA: 0,
            "attention": N * projections,
            "embed": D * V if config.tie_embeddings else 0,
            "embed_class_rows": 0,
        }.get(name, D * rows)
    # Nothing below a head that is trained alone is differentiated.
    through = any(not name.startswith("head") for name in parts.config.train)
    low_rank = N * rank * ((6 + 2 * shared) * D + matrices * (D + F))
    backward = 2.0 * weights + 4.0 * attention if through else 0.0
    return 2.0 * (weights + attention) + backward + 2.0 * trained + 6.0 * low_rank


def pair_flops(config: DualEncoderConfig, texts: int = 1) -> float:
    """FLOPs of the forward pass of one picture and `texts` texts through the dual
    encoder, two per weight and token; three times as many with the backward pass."""

    def tower(layers: int, width: int, length: int) -> float:
        weights = layers * (4 + 2 * config.mlp_ratio) * width**2
        attention = layers * 2 * width * length
        return 2.0 * length * (weights + attention) + 2.0 * width * config.embed

    patches = 2.0 * config.patches * 3 * config.patch**2 * config.vision_width
    vision = tower(config.vision_layers, config.vision_width, config.patches + 1)
    text = tower(config.text_layers, config.text_width, config.text_length)
    return patches + vision + texts * text
