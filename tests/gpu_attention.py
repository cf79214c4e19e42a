"""Attention as a GPU's mesh gets it against the plain one in float32, on a GPU.

    JAX_PLATFORMS=cuda python tests/gpu_attention.py

The tests run on simulated CPU devices; this starts in a process of its own. The last
line is one JSON object: for rows with and without segments, the largest difference of
output and gradients over the largest entry.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from cm3leon_jax.models.attention import xla_attention
from cm3leon_jax.parallel import kernels
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.rules import Rules

B, L, H, K = 2, 512, 8, 64


def results(attention, q, k, v, weight, segments):
    def total(q, k, v):
        out = attention(q, k, v, segments).astype(jnp.float32)
        return jnp.sum(out * weight), out

    return jax.device_get(jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v))


def errors(segmented: bool, shared: int) -> list[float]:
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(B, L, n, K)), jnp.bfloat16)
        for n in (H * shared, H, H, H * shared)
    )
    cut = rng.integers(1, L, (B, 1))
    segments = jnp.asarray(np.where(np.arange(L) < cut, 1, 2), jnp.int32)
    segments = segments if segmented else None
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    found = results(kernels.attention_fn(mesh, Rules()), q, k, v, weight, segments)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):  # not TF32
        oracle = results(xla_attention, *exact, weight, segments)
    return [
        float(np.abs(a.astype(np.float32) - b).max() / np.abs(b).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(oracle), strict=True)
    ]


if __name__ == "__main__":
    table = {
        f"segments={segmented}, {shared} heads a key": errors(segmented, shared)
        for segmented in (False, True)
        for shared in (1, 2)
    }
    print(json.dumps({"device": jax.devices()[0].device_kind, "errors": table}))
