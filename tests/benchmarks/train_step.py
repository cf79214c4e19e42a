r"""A training step against `transformers`' OPT in PyTorch, and against its products.

    python tests/benchmarks/train_step.py [--rounds 5] [--sizes small,medium]

One decoder of OPT's shape (tied, learned positions, float32, no dropout), AdamW with a
clipped gradient, rows without padding. Every side runs in processes of
its own, in turn:

ratio_vs_transformers   tokens/s of `training/step.py`, compiled, over those of
                        OPTForCausalLM's forward, backward, clipping and AdamW
share_of_products       the time of the step's matrix products alone, each by itself on
                        arrays of its shapes, over the time of the step
loss                    after the same number of updates on the same rows: both learn

`transformers` is in the extra `parity`; `--without_peer` leaves it out. Ratios are
medians over rounds; compiling is not counted. `cpu_…` are of processor time and still
tell something where other jobs disturb. The last line is one JSON object.
"""

import argparse
import collections
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
HEAD = 32  # width of a head
PEAK, CLIP, DECAY, BETAS = 1e-3, 1.0, 0.1, (0.9, 0.95)
WARM = 3


class Size:
    """layers, width, ids, rows, tokens of a row."""

    def __init__(self, layers, width, vocab, rows, length):
        self.layers, self.width, self.vocab = layers, width, vocab
        self.rows, self.length = rows, length

    def batch(self, turn):
        """Rows that can be learnt: an arithmetic progression each."""
        rng = np.random.default_rng(turn)
        start = rng.integers(0, self.vocab, (self.rows, 1))
        stride = rng.integers(1, 4, (self.rows, 1))
        rows = start + stride * np.arange(self.length + 1)
        return (16 + rows % (self.vocab - 16)).astype(np.int32)


SIZES = {
    "small": Size(4, 128, 1024, 32, 128),
    "medium": Size(6, 256, 2048, 32, 256),
}


def timed(update, size, repeats):
    """Medians of wall and processor seconds of an update, and the last loss."""
    loss, wall, cpu = 0.0, [], []
    for turn in range(WARM + repeats):
        batch = size.batch(turn)
        began, worked = time.perf_counter(), time.process_time()
        loss = update(batch)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    return {
        "wall": float(np.median(wall[WARM:])),
        "cpu": float(np.median(cpu[WARM:])),
        "loss": round(loss, 4),
    }


def ours(size, repeats):
    sys.path.insert(0, str(ROOT))
    import functools

    import jax
    from flax import nnx

    from cm3leon_jax import vocab
    from cm3leon_jax.models.attention import xla_attention
    from cm3leon_jax.models.decoder import Decoder, DecoderConfig
    from cm3leon_jax.models.layers import identity
    from cm3leon_jax.training import state, step
    from cm3leon_jax.training.optimizer import OptimizerConfig, make_optimizer

    layout = vocab.build(
        text=size.vocab - 512, image=256, classes=4, sentinels=4, total=size.vocab
    )
    config = DecoderConfig(
        vocab=layout.size,
        layers=size.layers,
        width=size.width,
        heads=size.width // HEAD,
        mlp=4 * size.width,
        length=size.length,
        init_std=0.02,
        tie_embeddings=True,
    )
    tx = make_optimizer(
        OptimizerConfig(peak=PEAK, warmup=1, steps=10**6, clip=CLIP, weight_decay=DECAY)
    )
    begin = jax.jit(lambda key: state.create(Decoder(config, nnx.Rngs(key)), tx))
    current = begin(jax.random.key(0))
    leaves, structure = jax.tree.flatten(current)
    update = functools.partial(
        step.train_step,
        tx=tx,
        layout=layout,
        config=step.StepConfig(segmented=False),
        shard=identity,
        attention=xla_attention,
    )

    def on_leaves(leaves, batch):  # as in training/loop.py
        made, metrics = update(structure.unflatten(leaves), batch)
        return jax.tree.leaves(made), metrics["loss"]

    compiled = jax.jit(on_leaves, donate_argnums=0)
    shape = size.rows, size.length + 1
    fixed = {
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "moved": np.zeros(shape, bool),
    }

    def one(tokens):
        nonlocal leaves
        leaves, loss = compiled(leaves, jax.device_put(fixed | {"tokens": tokens}))
        return float(loss)

    made = timed(one, size, repeats)
    made["parameters"] = sum(x.size for x in jax.tree.leaves(current.model))
    made["products"] = products(size, repeats)
    return made


def products(size, repeats):
    """Seconds of the step's matrix products, each timed alone: forward, and the two of
    the backward pass."""
    import jax
    import jax.numpy as jnp

    tokens, D, heads = size.rows * size.length, size.width, size.width // HEAD
    counts = collections.Counter()
    for inner, outer, times in (
        (D, D, 4 * size.layers),
        (D, 4 * D, size.layers),
        (4 * D, D, size.layers),
        (D, size.vocab, 1),
    ):
        # y = x w, dx = dy wᵀ, dw = xᵀ dy
        counts[1, tokens, inner, outer] += times
        counts[1, tokens, outer, inner] += times
        counts[1, inner, tokens, outer] += times
    many, length = size.rows * heads, size.length
    for rows, inner, columns in ((length, HEAD, length), (length, length, HEAD)):
        # scores and their sums of values; each has two products backward
        counts[many, rows, inner, columns] += size.layers
        counts[many, rows, columns, inner] += size.layers
        counts[many, inner, rows, columns] += size.layers
    total, product = 0.0, jax.jit(jnp.matmul)
    for (batch, rows, inner, columns), times in counts.items():
        a = jnp.ones((batch, rows, inner) if batch > 1 else (rows, inner))
        b = jnp.ones((batch, inner, columns) if batch > 1 else (inner, columns))
        seconds = []
        for _ in range(WARM + repeats):
            began = time.perf_counter()
            product(a, b).block_until_ready()
            seconds.append(time.perf_counter() - began)
        total += times * float(np.median(seconds[WARM:]))
    return total


def transformers(size, repeats):
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=size.vocab,
            hidden_size=size.width,
            word_embed_proj_dim=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // HEAD,
            ffn_dim=4 * size.width,
            max_position_embeddings=size.length,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=0,
            use_cache=False,
        )
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK, betas=BETAS, weight_decay=DECAY
    )

    def one(tokens):
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, size.vocab), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    made = timed(one, size, repeats)
    made["parameters"] = sum(x.numel() for x in model.parameters())
    return made


SIDES = {"ours": ours, "transformers": transformers}


def main(given):
    sides = ["ours"] if given.without_peer else list(SIDES)
    result = {}
    for name in given.sizes.split(","):
        found = {side: [] for side in sides}
        for turn in range(given.rounds):
            for side in sides:
                command = [sys.executable, __file__, "--side", side]
                command += ["--sizes", name, "--repeats", str(given.repeats)]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True
                )
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name} {turn}: {side} {found[side][-1]}", flush=True)
        result[name] = summary(found, SIZES[name])
    result |= {"cores": os.cpu_count(), "machine": platform.machine()}
    print(json.dumps(result))


def summary(found, size):
    def column(side, key):
        return np.array([one[key] for one in found[side]])

    tokens = size.rows * size.length
    wall = column("ours", "wall")
    made = {
        "share_of_products": round(
            float(np.median(column("ours", "products") / wall)), 3
        ),
        "tokens_per_second": {
            side: round(float(np.median(tokens / column(side, "wall"))))
            for side in found
        },
        "loss": {side: found[side][-1]["loss"] for side in found},
        "parameters": {side: found[side][-1]["parameters"] for side in found},
        "sizes": vars(size),
    }
    if "transformers" in found:
        for clock, prefix in (("wall", ""), ("cpu", "cpu_")):
            ratio = column("transformers", clock) / column("ours", clock)
            made[f"{prefix}ratio_vs_transformers"] = round(float(np.median(ratio)), 3)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--without_peer", action="store_true")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side = SIDES[options.side]
        print(json.dumps(side(SIZES[options.sizes], options.repeats)))
    else:
        main(options)
