"""The smallest VQGAN: 16x16 pixels, 4x4 codes, each of its own 4x4 pixels alone."""

from cm3leon_jax.models.vqgan import VQGANConfig

LOCAL = VQGANConfig(
    image_size=16,
    patch=4,
    channels=16,
    multipliers=(1,),
    res_blocks=1,
    attention=(),
    middle="none",
    kernel=1,
    norm="layer",
    latent=8,
    codebook=32,
    code_dim=8,
)
