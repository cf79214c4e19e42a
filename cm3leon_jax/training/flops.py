"""Model FLOPs, for utilisation and for compute-matched comparisons."""

from cm3leon_jax.models.decoder import DecoderConfig
from cm3leon_jax.models.dual_encoder import DualEncoderConfig


def train_flops_per_token(config: DecoderConfig, length: int) -> float:
    """FLOPs of one token's forward and backward pass in rows of `length`.

    Two per weight and pass direction (forward 1, backward 2), plus causal attention,
    of which half the scores are needed. Embedding look-ups cost nothing; recomputation
    under remat is not model work and is not counted.
    """
    D, F = config.width, config.mlp
    matrices = 3 if config.activation == "swiglu" else 2
    weights = config.layers * (4 * D * D + matrices * D * F) + D * config.vocab
    attention = config.layers * 2 * D * (length / 2)
    return 6.0 * (weights + attention)


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
