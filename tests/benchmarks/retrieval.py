r"""Exact search of a memory bank against faiss's flat index: queries a second.

    python tests/benchmarks/retrieval.py [--rows 1000000] [--rounds 3] [--batches 10]

Unit vectors, float32, `--queries` of them a call, the 10 best of all rows. Each side
runs in processes of its own, in turn, so that two runtimes do not share threads; the
ratios are medians over rounds. faiss (`pip install faiss-cpu`, in the extra `parity`)
scores fewer than 20 queries one by one and more by a matrix product: both are measured,
`ratio_vs_faiss` is against its own choice, `ratio_vs_faiss_blas` against the product.
Where other jobs disturb, `OMP_NUM_THREADS=1 taskset -c 0 python …` and the ratios of
processor time (`cpu_…`) still tell something. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

K = 10
SIDES = ("ours", "faiss", "faiss_blas")
_AT_ONCE = 50_000


def searcher(side, vectors):
    """A function of queries [B, E] that gives the rows [B, K] of the best."""
    if side == "ours":
        from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
        from cm3leon_jax.retrieval import bank, search

        mesh = make_mesh(MeshConfig())
        rows = search.block_rows(
            len(vectors), vectors[0].nbytes, mesh, bank.BLOCK_BYTES
        )
        scale, alive = np.ones(len(vectors), np.float32), np.ones(len(vectors), bool)
        blocks = [
            search.place(lambda a, b: vectors[a:b], scale, alive, first, rows, mesh)
            for first in range(0, len(vectors), rows)
        ]
        return lambda queries: search.search(queries, blocks, K, mesh)[1]
    import faiss

    if side == "faiss_blas":
        faiss.cvar.distance_compute_blas_threshold = 1
    index = faiss.IndexFlatIP(vectors.shape[1])
    for start in range(0, len(vectors), _AT_ONCE):
        index.add(np.ascontiguousarray(vectors[start : start + _AT_ONCE]))
    return lambda queries: index.search(queries, K)[1]


def child(side, folder, batches, queries):
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    asked = np.load(folder / "queries.npy")[: batches * queries]
    find = searcher(side, vectors)
    find(asked[:queries])  # compiles, and touches every page
    seconds, cpu, rows = [], [], []
    for start in range(0, len(asked), queries):
        began, worked = time.perf_counter(), time.process_time()
        rows.append(find(asked[start : start + queries]))
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    np.save(folder / f"rows-{side}.npy", np.concatenate(rows))
    made = {"queries_per_second": seconds, "cpu_queries_per_second": cpu}
    print(json.dumps({key: queries / float(np.median(x)) for key, x in made.items()}))


def unit(rng, rows, width):
    x = rng.standard_normal((rows, width), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def main(options):
    rng = np.random.default_rng(0)
    measured = {side: [] for side in SIDES}
    worked = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = (options.rows, options.width)
        vectors = np.lib.format.open_memmap(
            folder / "vectors.npy", "w+", np.float32, shape
        )
        for start in range(0, options.rows, _AT_ONCE):
            rows = len(vectors[start : start + _AT_ONCE])
            vectors[start : start + rows] = unit(rng, rows, options.width)
        vectors.flush()
        asked = unit(rng, options.batches * options.queries, options.width)
        np.save(folder / "queries.npy", asked)
        for turn in range(options.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--folder", name]
                for key in ("batches", "queries"):
                    command += [f"--{key}", str(getattr(options, key))]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                measured[side].append(found["queries_per_second"])
                worked[side].append(found["cpu_queries_per_second"])
                print(f"round {turn}: {side} {measured[side][-1]:.1f}/s", flush=True)
        rows = {side: np.load(folder / f"rows-{side}.npy") for side in SIDES}
    ratios = {
        f"{name}ratio_vs_{side}": round(
            float(np.median(np.divide(of["ours"], of[side]))), 3
        )
        for name, of in (("", measured), ("cpu_", worked))
        for side in SIDES[1:]
    }
    agree = float(np.mean(np.sort(rows["ours"]) == np.sort(rows["faiss"])))
    print(
        json.dumps(
            {
                **ratios,
                "queries_per_second": {
                    side: [round(x, 1) for x in measured[side]] for side in SIDES
                },
                "same_rows": agree,
                "rows": options.rows,
                "width": options.width,
                "queries": options.queries,
                "cores": os.cpu_count(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        child(given.side, given.folder, given.batches, given.queries)
    else:
        main(given)
