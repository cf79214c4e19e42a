"""Attention kernels of accelerators, for whole sequences: which one a mesh gets.

All have the signature and the meaning of `models/attention.py`'s `xla_attention`, their
oracle, without its [B, H, L, L] scores: splash attention (Pallas) on TPU, cuDNN on
NVIDIA GPUs. They work on what a device holds of batch and heads, in a `shard_map`.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from cm3leon_jax.models.attention import Attention, xla_attention
from cm3leon_jax.parallel.rules import Rules

_LANES = 128  # of a TPU's vector unit; kernels work on multiples of it
_BLOCK = 512  # queries and keys at a time
_SPAN = 2048  # keys whose gradients are made together, with a copy of those of queries


def attention_fn(mesh: Mesh, rules: Rules) -> Attention:
    """The attention of the mesh's hardware: plain XLA's on a CPU, and for what the
    kernels cannot do (rows that 128 does not divide; float32 on GPUs)."""
    platform = mesh.devices.flat[0].platform
    if platform not in _KERNELS:
        return xla_attention
    kernel, suits = _KERNELS[platform]
    spread = on_mesh(kernel, mesh, rules)

    def attention(
        q_BLHK: jax.Array,
        k_BLHK: jax.Array,
        v_BLHK: jax.Array,
        segments_BL: jax.Array | None = None,
    ) -> jax.Array:
        best = spread if suits(q_BLHK) else xla_attention
        return best(q_BLHK, k_BLHK, v_BLHK, segments_BL)

    return attention


def on_mesh(inner: Attention, mesh: Mesh, rules: Rules) -> Attention:
    """`inner` on every device's own rows and heads."""
    heads = rules.compute.spec(("batch", "length", "heads", "head"))
    rows = rules.compute.spec(("batch", "length"))

    def attention(
        q_BLHK: jax.Array,
        k_BLHK: jax.Array,
        v_BLHK: jax.Array,
        segments_BL: jax.Array | None = None,
    ) -> jax.Array:
        given = (q_BLHK, k_BLHK, v_BLHK)
        specs = (heads,) * 3
        if segments_BL is not None:
            given, specs = (*given, segments_BL), (*specs, rows)
        # The kernels do not say over which axes their results vary: no check.
        mapped = jax.shard_map(
            inner, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False
        )
        return mapped(*given)

    return attention


def splash_attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segments_BL: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention: blocks of scores that the causal mask hides are never made.

    128 must divide the length. `interpret` runs the kernel on a CPU, slowly.
    """
    length, heads, head = q_BLHK.shape[1:]
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    kernel = _splash(splash, length, heads, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BLHK * head**-0.5, k_BLHK, v_BLHK))
    ids: Any = None
    if segments_BL is not None:
        ids = splash.SegmentIds(q=segments_BL, kv=segments_BL)
    out_BHLK = jax.vmap(kernel)(q, k, v, ids)
    return out_BHLK.swapaxes(1, 2).astype(q_BLHK.dtype)


def _splash(splash: Any, length: int, heads: int, interpret: bool) -> Any:
    block = next(b for b in (_BLOCK, 256, _LANES) if length % b == 0)
    span = next(s for s in (_SPAN, _SPAN // 2, block) if length % s == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=span,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha_single_device(
        mask, block_sizes=sizes, interpret=interpret
    )


def cudnn_attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """cuDNN's flash attention; half precision only."""
    mask = None
    if segments_BL is not None:
        mask = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BLHK, k_BLHK, v_BLHK, mask=mask, is_causal=True, implementation="cudnn"
    )


def _whole_blocks(q_BLHK: jax.Array) -> bool:
    return q_BLHK.shape[1] % _LANES == 0


def _half_precision(q_BLHK: jax.Array) -> bool:
    return q_BLHK.dtype.itemsize == 2


_KERNELS = {
    "tpu": (splash_attention, _whole_blocks),
    "gpu": (cudnn_attention, _half_precision),
    "cuda": (cudnn_attention, _half_precision),
}
