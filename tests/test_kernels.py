"""Attention kernels against the plain one, in interpret mode."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from cm3leon_jax.models.attention import xla_attention
from cm3leon_jax.parallel import kernels

B, L, H, K = 4, 256, 2, 64
splash = functools.partial(kernels.splash_attention, interpret=True)


def results(attention, segments, heads=H, length=L):
    """The output, and the gradient of a sum of it in which every entry counts."""
    rng = np.random.default_rng(0)
    q, weight, k, v = (
        jnp.asarray(rng.normal(size=(B, length, n, K)), jnp.float32)
        for n in (heads, heads, H, H)
    )

    @jax.jit
    def run(q, k, v):
        def total(q, k, v):
            out = attention(q, k, v, segments)
            return jnp.sum(out * weight), out

        return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)

    return jax.device_get(run(q, k, v))


@pytest.mark.parametrize(
    ("segmented", "heads", "length"),
    [(False, H, L), (True, H, L), (True, 2 * H, L), (True, H, 1024)],
)
def test_splash_attention_is_the_plain_one_on_every_device(segmented, heads, length):
    """With twice the heads of queries, two share keys; 1,024 are several blocks."""
    cut = np.random.default_rng(1).integers(1, length, (B, 1))
    segments = jnp.asarray(np.where(np.arange(length) < cut, 1, 2), jnp.int32)
    segments = segments if segmented else None
    oracle = results(xla_attention, segments, heads, length)
    mesh = tiny.mesh_of(2, 2, 2)  # a row and a head on each
    found = results(kernels.on_mesh(splash, mesh, tiny.RULES), segments, heads, length)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(oracle), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_cpu_and_rows_that_blocks_do_not_cover_get_plain_attention(monkeypatch):
    mesh = tiny.mesh_of(1, 1, 1)
    assert kernels.attention_fn(mesh, tiny.RULES) is xla_attention
    called = []
    noted = (lambda q, *_: called.append(q.shape) or q, kernels._whole_blocks)
    monkeypatch.setitem(kernels._KERNELS, "cpu", noted)
    attention = kernels.attention_fn(mesh, tiny.RULES)
    for length in (100, 128):
        x = jnp.zeros((1, length, 1, 4))
        assert attention(x, x, x).shape == x.shape
    assert called == [(1, 128, 1, 4)]


@pytest.mark.skipif(
    not (shutil.which("nvidia-smi") and importlib.util.find_spec("jax_cuda13_plugin")),
    reason="needs an NVIDIA GPU and the extra `cuda`",
)
def test_a_gpu_s_attention_is_the_plain_one():
    made = subprocess.run(
        [sys.executable, Path(__file__).parent / "gpu_attention.py"],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    for name, errors in json.loads(made.stdout.splitlines()[-1])["errors"].items():
        assert max(errors) < 0.03, name  # bfloat16 has steps of 1/128
