"""One update of the VQGAN image tokenizer.

A run has up to three parts, all in one compiled step: at first latents go to the
decoder unquantised; at step `unquantised_steps` k-means on the latest latents makes
the codebook; from `adversarial_start` on a discriminator takes part. The loss is that
of the VQGAN (paper section 2.5): reconstruction (pixels, features) + codebook + beta
commitment + lambda w adversarial.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from cm3leon_jax.models import discriminator as patchgan
from cm3leon_jax.models import vqgan
from cm3leon_jax.models.discriminator import Discriminator, DiscriminatorConfig
from cm3leon_jax.models.layers import Shard, identity
from cm3leon_jax.models.vqgan import VQGAN, VQGANConfig
from cm3leon_jax.training.codebook import USE_DECAY, kmeans, restart
from cm3leon_jax.training.optimizer import OptimizerConfig, make_optimizer, updated

Features = Callable[[jax.Array], Sequence[jax.Array]]
Metrics = dict[str, jax.Array]

# Latents kept for k-means: this many per code, up to the limit (64 MiB at width 256).
RESERVOIR_PER_CODE, RESERVOIR_LIMIT = 32, 1 << 16
MAX_ADVERSARIAL_FACTOR = 1e4  # paper section 2.5, as is the 1e-4 below


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerTrainConfig:
    """Settings of one run; `optimizer.steps` is its length.

    Weights of the terms: `l1` and `l2` on pixels in [-1, 1], `perceptual` on feature
    maps, `commitment` (beta) beside a codebook term of weight 1, `adversarial` times
    the adaptive factor from step `adversarial_start` on (weight 0: no discriminator).
    Dead codes are moved every `restart_every` steps, up to `restart_until`, so that
    the decoder can settle on the final codebook. `BOOKKEEPING` may change when a run
    is resumed.
    """

    BOOKKEEPING: ClassVar[tuple[str, ...]] = (
        *("log_every", "validate_every", "checkpoint_every"),
    )

    optimizer: OptimizerConfig
    batch_size: int
    unquantised_steps: int = 0
    restart_every: int = 20
    restart_until: int
    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 0.0
    commitment: float = 0.25
    adversarial: float = 0.0
    adversarial_start: int = 0
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    log_every: int = 50
    validate_every: int = 1000
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        name = "image_tokenizer.training"
        for key in ("batch_size", "restart_every", *self.BOOKKEEPING):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}.{key}={getattr(self, key)} must be positive")
        for key in ("l1", "l2", "perceptual", "commitment", "adversarial"):
            if getattr(self, key) < 0:
                raise ValueError(f"{name}.{key}={getattr(self, key)} is negative")
        for key in ("restart_until", "adversarial_start"):
            if getattr(self, key) < 0:
                raise ValueError(f"{name}.{key}={getattr(self, key)} is negative")
        if self.l1 + self.l2 == 0:
            raise ValueError(f"{name}.l1 and {name}.l2 are both 0: nothing to learn")
        if not 0 <= self.unquantised_steps < self.optimizer.steps:
            raise ValueError(
                f"{name}.unquantised_steps={self.unquantised_steps} leaves none of the "
                f"{self.optimizer.steps} steps for quantised training"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImageTokenizerState:
    """`use_Z`: running mean of latents per step for each code. `latents_RE`: a ring of
    the latest latents, None without unquantised steps. Discriminator and its optimizer
    are None where it has no weight.
    """

    step: jax.Array
    model: VQGAN
    opt: optax.OptState
    use_Z: jax.Array
    latents_RE: jax.Array | None
    discriminator: Discriminator | None
    discriminator_opt: optax.OptState | None


def create(
    key: jax.Array, config: ImageTokenizerTrainConfig, model_config: VQGANConfig
) -> ImageTokenizerState:
    """The state before the first step."""
    key_model, key_discriminator = jax.random.split(key)
    tx = make_optimizer(config.optimizer)
    model = vqgan.build(model_config, key_model)
    codes, width = model_config.codebook, model_config.code_dim
    kept = min(RESERVOIR_PER_CODE * codes, RESERVOIR_LIMIT)
    judge = latents_RE = None  # nothing, and no array of size 0: none could be saved
    if config.unquantised_steps:
        latents_RE = jnp.zeros((kept, width))
    if config.adversarial:
        judge = patchgan.build(config.discriminator, key_discriminator)
    return ImageTokenizerState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt=_init(tx, model),
        use_Z=jnp.full(codes, config.batch_size * model_config.grid**2 / codes),
        latents_RE=latents_RE,
        discriminator=judge,
        discriminator_opt=None if judge is None else _init(tx, judge),
    )


def train_step(
    state: ImageTokenizerState,
    batch: Mapping[str, jax.Array],
    *,
    config: ImageTokenizerTrainConfig,
    seed: int,
    features: Features | None = None,
    shard: Shard = identity,
) -> tuple[ImageTokenizerState, Metrics]:
    """Updates tokenizer, codebook and discriminator; a pure function.

    `batch["images"]` is uint8 [B, Y, X, 3]; `seed` draws new codes. Metrics are
    float32 scalars; `loss` is the sum of the weighted terms without the adversarial
    one, which has no meaning alone.
    """
    tx = make_optimizer(config.optimizer)
    images_BYXC = vqgan.to_float(batch["images"])
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    state = _begin_codebook(state, config, key)
    quantised = state.step >= config.unquantised_steps
    judging = state.step >= config.adversarial_start

    def objective(model: VQGAN):
        z_BYXE = model.latents(images_BYXC, shard=shard)
        codes_ZE = model.codes_ZE()
        code_BYX = vqgan.nearest(jax.lax.stop_gradient(z_BYXE), codes_ZE)
        chosen_BYXE = codes_ZE[code_BYX]
        # Straight through: the decoder sees the code, the encoder its gradient.
        jump_BYXE = jax.lax.stop_gradient(chosen_BYXE - z_BYXE)
        x_BYXC = model.decoder.trunk(z_BYXE + quantised * jump_BYXE, shard)
        painted_BYXC = model.decoder.paint(x_BYXC)
        terms = reconstruction_terms(painted_BYXC, images_BYXC, config, features)
        terms["codebook"] = quantised * _mse(jax.lax.stop_gradient(z_BYXE), chosen_BYXE)
        terms["commitment"] = (
            quantised
            * config.commitment
            * _mse(z_BYXE, jax.lax.stop_gradient(chosen_BYXE))
        )
        loss = sum(terms.values())
        metrics = {"loss": loss, **terms}
        judge = state.discriminator
        if judge is not None:
            pull_BYXC, metrics["adversarial_factor"] = jax.lax.cond(
                judging,
                lambda x, painted, images: _adversarial_pull(
                    judge, model.decoder, x, painted, images, config, features
                ),
                lambda x, painted, images: (jnp.zeros_like(painted), jnp.zeros(())),
                *jax.lax.stop_gradient((x_BYXC, painted_BYXC)),
                images_BYXC,
            )
            # Linear in the picture, with the adversarial loss's gradient there.
            loss += jnp.sum(jax.lax.stop_gradient(pull_BYXC) * painted_BYXC)
        return loss, (metrics, z_BYXE, code_BYX, painted_BYXC)

    gradient = jax.grad(objective, has_aux=True)
    grads, (metrics, z_BYXE, code_BYX, painted_BYXC) = gradient(state.model)
    model, opt = updated(tx, state.model, state.opt, grads)
    state = dataclasses.replace(state, model=model, opt=opt)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["psnr"] = 10 * jnp.log10(4 / _mse(painted_BYXC, images_BYXC))

    state, use = _follow_codebook(state, config, z_BYXE, code_BYX, key)
    state, judged = _update_discriminator(state, tx, judging, images_BYXC, painted_BYXC)
    return dataclasses.replace(state, step=state.step + 1), metrics | use | judged


def reconstruction_terms(
    painted_BYXC: jax.Array,
    images_BYXC: jax.Array,
    config: ImageTokenizerTrainConfig,
    features: Features | None,
) -> Metrics:
    """The weighted terms that compare pictures; terms of weight 0 are left out.

    The perceptual term compares feature maps [B, Y, X, C] of `features`, scaled to
    unit length over channels at every position, as LPIPS does.
    """
    terms = {}
    if config.l1:
        terms["l1"] = config.l1 * jnp.abs(painted_BYXC - images_BYXC).mean()
    if config.l2:
        terms["l2"] = config.l2 * _mse(painted_BYXC, images_BYXC)
    if config.perceptual and features is not None:
        pairs = zip(features(painted_BYXC), features(images_BYXC), strict=True)
        distance = sum(
            jnp.square(vqgan.unit(a) - vqgan.unit(b)).sum(-1).mean() for a, b in pairs
        )
        terms["perceptual"] = config.perceptual * jnp.asarray(distance)
    return terms


def _adversarial_pull(
    judge: Discriminator,
    decoder: vqgan.Decoder,
    x_BYXC: jax.Array,
    painted_BYXC: jax.Array,
    images_BYXC: jax.Array,
    config: ImageTokenizerTrainConfig,
    features: Features | None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted gradient of the adversarial loss at the picture, and its factor.

    The factor makes both losses pull equally on the decoder's last kernel.
    """

    def reconstruction(painted_BYXC):
        return sum(
            reconstruction_terms(painted_BYXC, images_BYXC, config, features).values()
        )

    def adversarial(painted_BYXC):
        return -judge(painted_BYXC).mean()

    _, to_last = jax.vjp(lambda out: decoder.paint(x_BYXC, out), decoder.out)
    pull_BYXC = jax.grad(adversarial)(painted_BYXC)
    wanted = to_last(jax.grad(reconstruction)(painted_BYXC))[0].kernel[...]
    given = to_last(pull_BYXC)[0].kernel[...]
    factor = jnp.linalg.norm(wanted.ravel()) / (jnp.linalg.norm(given.ravel()) + 1e-4)
    factor = jnp.minimum(factor, MAX_ADVERSARIAL_FACTOR)
    return config.adversarial * factor * pull_BYXC, factor


def _begin_codebook(
    state: ImageTokenizerState, config: ImageTokenizerTrainConfig, key: jax.Array
) -> ImageTokenizerState:
    """k-means at the first quantised step, where there were unquantised ones."""
    latents_RE = state.latents_RE
    if latents_RE is None:
        return state
    codes_ZE = jax.lax.cond(
        state.step == config.unquantised_steps,
        lambda codes_ZE: kmeans(latents_RE, len(codes_ZE), key),
        lambda codes_ZE: codes_ZE,
        state.model.codebook[...],
    )
    return dataclasses.replace(state, model=_with_codebook(state.model, codes_ZE))


def _follow_codebook(
    state: ImageTokenizerState,
    config: ImageTokenizerTrainConfig,
    z_BYXE: jax.Array,
    code_BYX: jax.Array,
    key: jax.Array,
) -> tuple[ImageTokenizerState, Metrics]:
    """Keeps count of the codes' use, restarts dead ones, remembers latents."""
    z_NE = z_BYXE.reshape(-1, z_BYXE.shape[-1])
    latents_RE = state.latents_RE
    if latents_RE is not None:
        kept = min(len(z_NE), len(latents_RE))
        place = (state.step * kept + jnp.arange(kept)) % len(latents_RE)
        latents_RE = latents_RE.at[place].set(z_NE[:kept])

    quantised = state.step >= config.unquantised_steps
    count_Z = jnp.zeros_like(state.use_Z).at[code_BYX.ravel()].add(1.0)
    use_Z = USE_DECAY * state.use_Z + (1 - USE_DECAY) * count_Z
    use_Z = jnp.where(quantised, use_Z, state.use_Z)
    due = (
        quantised
        & (state.step < config.restart_until)
        & (state.step % config.restart_every == 0)
    )
    codes_ZE, use_Z = jax.lax.cond(
        due,
        lambda codes_ZE, use_Z: restart(codes_ZE, use_Z, z_NE, key),
        lambda codes_ZE, use_Z: (codes_ZE, use_Z),
        state.model.codebook[...],
        use_Z,
    )
    share_Z = count_Z / count_Z.sum()
    entropy = -jnp.sum(share_Z * jnp.log(jnp.maximum(share_Z, 1e-20)))
    state = dataclasses.replace(
        state,
        model=_with_codebook(state.model, codes_ZE),
        use_Z=use_Z,
        latents_RE=latents_RE,
    )
    return state, {"perplexity": jnp.exp(entropy)}


def _update_discriminator(
    state: ImageTokenizerState,
    tx: optax.GradientTransformation,
    judging: jax.Array,
    images_BYXC: jax.Array,
    painted_BYXC: jax.Array,
) -> tuple[ImageTokenizerState, Metrics]:
    """One step of the hinge loss on real and painted pictures, once it takes part."""
    if state.discriminator is None:
        return state, {}

    def update(judge, opt):
        def objective(judge):
            return patchgan.hinge(judge(images_BYXC), judge(painted_BYXC))

        loss, grads = jax.value_and_grad(objective)(judge)
        return *updated(tx, judge, opt, grads), loss

    judge, opt, loss = jax.lax.cond(
        judging,
        update,
        lambda judge, opt: (judge, opt, jnp.zeros(())),
        state.discriminator,
        state.discriminator_opt,
    )
    state = dataclasses.replace(state, discriminator=judge, discriminator_opt=opt)
    return state, {"discriminator": loss}


# `Any` is an NNX module: a pytree of its parameters, which optax's types do not know.
def _init(tx: optax.GradientTransformation, module: Any) -> optax.OptState:
    return tx.init(module)


def _with_codebook(model: VQGAN, codes_ZE: jax.Array) -> VQGAN:
    copy = jax.tree.map(lambda x: x, model)
    copy.codebook[...] = codes_ZE
    return copy


def _mse(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.square(a - b).mean()
