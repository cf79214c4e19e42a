r"""Decoding with guidance against `transformers`, the machine's limits, and ourselves.

    python tests/benchmarks/decoding.py [--layers 8] [--width 512] [--rounds 3]

One decoder (OPT's shape, random weights, float32), prompts of `--prompt` tokens, of
which `--tokens` image tokens are written with top-p and two guidance streams. Measured,
every side in processes of its own, in turn:

ratio_vs_transformers       tokens/s over those of `generate(guidance_scale=…)` of an
                            OPTForCausalLM of the same size, at batch 1 and at batch 8
share_of_limit              the time that the machine's own memory or matrix products
                            would need at least for a step, over the measured one; both
                            parts are printed
ratio_vs_one_after_another  tokens/s of candidates whose streams are batched and whose
                            prefix is read once, over the same with each stream a pass
                            of its own and a prefix for each candidate
cost_of_16_candidates       their time over that of one

`transformers` is in the extra `parity`; `--without_peer` leaves it out. Ratios are
medians over rounds; compiling is not counted. Ratios of processor time (`cpu_…`) still
tell something where other jobs disturb. The last line is one JSON object.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np

BATCHES = (1, 8)
CANDIDATES = 16
TEXT = 256  # pieces in the vocabulary; the rest are image codes


def median_seconds(run, repeats, clock=time.perf_counter):
    run()  # compiles, and touches every page
    seconds = []
    for _ in range(repeats):
        began = clock()
        run()
        seconds.append(clock() - began)
    return float(np.median(seconds))


def both_clocks(run, repeats):
    """Medians of wall seconds and of seconds of processor time."""
    return {
        "wall": median_seconds(run, repeats),
        "cpu": median_seconds(run, repeats, time.process_time),
    }


def ours(given):
    import jax
    import jax.numpy as jnp

    from cm3leon_jax import vocab
    from cm3leon_jax.models.decoder import DecoderConfig, abstract
    from cm3leon_jax.models.unrolled import unroll
    from cm3leon_jax.sampling import prompts
    from cm3leon_jax.sampling.generate import generate
    from cm3leon_jax.sampling.sampler import Sampler

    layout = vocab.build(
        text=TEXT, image=given.vocab, classes=0, sentinels=4, total=None
    )
    config = DecoderConfig(
        vocab=layout.size,
        layers=given.layers,
        width=given.width,
        heads=given.heads,
        mlp=4 * given.width,
        length=given.prompt + given.tokens + 8,
    )
    rng = np.random.default_rng(0)
    model = jax.tree.map(
        lambda w: jnp.asarray(rng.standard_normal(w.shape, np.float32) * 0.02),
        abstract(config),
    )
    model = unroll(model)

    def writing(count, candidates=1, batched=True):
        """Seconds for `candidates` pictures of each of `count` prompts."""
        wanted = [
            prompts.text_to_image(
                layout,
                rng.integers(0, TEXT, given.prompt - 2),
                given.tokens,
                guided=True,
            )
            for _ in range(count)
        ]
        options = dict(image_tokens=given.tokens)
        sampler = Sampler(top_p=0.8, guidance=3.0)
        if batched:
            options["candidate_C"] = np.arange(candidates)
        else:
            # Each stream by itself, and nothing shared: a candidate is a prompt like
            # any other. (Guidance is between streams of one model, so it is left out:
            # it costs next to nothing.)
            options["amateur"], sampler = model, Sampler(top_p=0.8)
            wanted = [prompt for prompt in wanted for _ in range(candidates)]
        batch = prompts.stack(wanted, layout, config.length)
        if not batched:
            each = np.zeros(len(wanted), int)
            batch = prompts.Batch(
                *(
                    (full, shared[each])
                    for full, shared in (batch.prefix_UL, batch.length_U, batch.last_U)
                ),
                batch.script_GBT,
            )

        def run():
            tokens = generate(
                model, batch, jax.random.key(0), sampler, layout, **options
            )
            return jax.block_until_ready(tokens)

        return both_clocks(run, given.repeats)

    seconds = {f"batch_{count}": writing(count) for count in BATCHES}
    seconds[f"candidates_{CANDIDATES}"] = writing(1, CANDIDATES)
    seconds["together"] = writing(2, 4)
    seconds["one_after_another"] = writing(2, 4, batched=False)

    # What a step cannot avoid: every weight is read once, and takes part in a product
    # for each row and stream; half of the slots of the cache are read on average.
    weights = given.layers * 12 * given.width**2 + given.width * given.vocab
    square = given.width if given.width > 1024 else 1024
    x = jnp.asarray(rng.standard_normal((square, square), np.float32))
    product = jax.jit(lambda x: x @ x)
    rate = 2 * square**3 / median_seconds(lambda: product(x).block_until_ready(), 5)
    many = jnp.ones(weights, jnp.float32)
    # A product with a vector reads a matrix once and does little else.
    matrix, vector = many.reshape(given.width, -1), jnp.ones(given.width, jnp.float32)
    reading = jax.jit(lambda vector, matrix: vector @ matrix)
    bandwidth = many.nbytes / median_seconds(
        lambda: reading(vector, matrix).block_until_ready(), 5
    )
    limits = {}
    for count in BATCHES:
        cached = 2 * count * given.layers * 2 * given.width * given.tokens / 2
        memory = (weights + cached) * 4 / bandwidth
        products = 2 * 2 * count * weights / rate
        step = seconds[f"batch_{count}"]["wall"] / given.tokens
        limits[f"batch_{count}"] = {
            "memory": round(memory / step, 3),
            "products": round(products / step, 3),
            "limit": round(max(memory, products) / step, 3),
        }
    return {
        "seconds": seconds,
        "share_of_limit": limits,
        "gigabytes_per_second": round(bandwidth / 1e9, 2),
        "gigaflops": round(rate / 1e9, 1),
    }


def transformers(given):
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    size = TEXT + given.vocab + 8
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=size,
            hidden_size=given.width,
            word_embed_proj_dim=given.width,
            num_hidden_layers=given.layers,
            num_attention_heads=given.heads,
            ffn_dim=4 * given.width,
            max_position_embeddings=given.prompt + given.tokens + 8,
            pad_token_id=0,
            eos_token_id=None,
        )
    ).eval()

    def writing(count):
        ids = torch.randint(4, TEXT, (count, given.prompt))

        def run():
            with torch.inference_mode():
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    negative_prompt_ids=ids[:, :3],
                    negative_prompt_attention_mask=torch.ones_like(ids[:, :3]),
                    guidance_scale=3.0,
                    do_sample=True,
                    top_p=0.8,
                    top_k=0,
                    max_new_tokens=given.tokens,
                    min_new_tokens=given.tokens,
                )
            assert made.shape[1] == given.prompt + given.tokens

        return both_clocks(run, given.repeats)

    return {"seconds": {f"batch_{count}": writing(count) for count in BATCHES}}


SIDES = {"ours": ours, "transformers": transformers}


def main(given):
    sides = ["ours"] if given.without_peer else list(SIDES)
    found = {side: [] for side in sides}
    for turn in range(given.rounds):
        for side in sides:
            command = [sys.executable, __file__, "--side", side]
            for key in SIZES:
                command += [f"--{key}", str(getattr(given, key))]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True
            )
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn}: {side} {found[side][-1]}", flush=True)

    def ratio(top, bottom):
        return round(float(np.median(np.divide(top, bottom))), 3)

    def seconds(side, name, clock):
        return [one["seconds"][name][clock] for one in found[side]]

    result = {}
    for clock, prefix in (("wall", ""), ("cpu", "cpu_")):
        of = functools.partial(seconds, clock=clock)
        result |= {
            f"{prefix}cost_of_16_candidates": ratio(
                of("ours", f"candidates_{CANDIDATES}"), of("ours", "batch_1")
            ),
            f"{prefix}ratio_vs_one_after_another": ratio(
                of("ours", "one_after_another"), of("ours", "together")
            ),
            f"{prefix}tokens_per_second": {
                side: {
                    f"batch_{n}": ratio(n * given.tokens, of(side, f"batch_{n}"))
                    for n in BATCHES
                }
                for side in sides
            },
        }
        if not given.without_peer:
            result[f"{prefix}ratio_vs_transformers"] = {
                f"batch_{n}": ratio(
                    of("transformers", f"batch_{n}"), of("ours", f"batch_{n}")
                )
                for n in BATCHES
            }
    for key in ("share_of_limit", "gigabytes_per_second", "gigaflops"):
        result[key] = [one[key] for one in found["ours"]]
    result["sizes"] = {key: getattr(given, key) for key in SIZES}
    result |= {"cores": os.cpu_count(), "machine": platform.machine()}
    print(json.dumps(result))


SIZES = {
    "layers": 8,
    "width": 512,
    "heads": 8,
    "vocab": 4096,
    "prompt": 32,
    "tokens": 256,
    "repeats": 3,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key, default in SIZES.items():
        parser.add_argument(f"--{key}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without_peer", action="store_true")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
    else:
        main(options)
