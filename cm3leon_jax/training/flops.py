"""Model FLOPs of the decoder, for utilisation and for compute-matched comparisons."""

from cm3leon_jax.models.decoder import DecoderConfig


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
