"""Memory and time of all that a FID-30K protocol computes of pictures' features.

    python tests/benchmarks/statistics.py [PICTURES]

Fréchet distance and its spread over ten subsets, Inception score, precision and recall
of one set of pictures, with what is made of the real ones once for all sets. Features
are made up, as wide as Inception's: the network is not timed. As for a public set they
lie on disk in parts and are read one by one. A child process has ten times as many as
another: what it needs more is what grows with their number. Takes a few minutes; 2,000
pictures well under one. Prints one JSON object.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH, CLASSES, PART = 2048, 1008, 64


def measure(count: int) -> dict[str, Any]:
    import numpy as np

    from cm3leon_jax.evaluation.kept import Parts
    from cm3leon_jax.evaluation.public_pictures import Real

    starts = range(0, count, PART)
    scale_E = np.random.default_rng(0).gamma(1.0, 0.5, WIDTH).astype(np.float32)
    head_EK = np.random.default_rng(1).normal(0, 0.05, (WIDTH, CLASSES))
    network: Any = SimpleNamespace(
        width=WIDTH,
        standard=True,
        key="fid",
        logits=lambda features_BE: np.float32(features_BE @ head_EK),
    )
    job: Any = SimpleNamespace(network=network)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder))

        def features(made: bool):
            def work(i: int) -> np.ndarray:
                rng = np.random.default_rng([i, made])
                shape = min(PART, count - starts[i]), WIDTH
                drawn_BE = rng.standard_normal(shape, np.float32) + 0.05 * made
                return np.abs(drawn_BE) * scale_E

            return parts.run([[made, i] for i in starts], work, "pictures")

        for made in (False, True):
            for _ in features(made):  # to the disk
                pass
        for metric in ("fid", "inception_score", "precision_recall"):
            start = time.monotonic()
            real = Real(job, {metric}, lambda: features(False))
            seconds[f"{metric}, real"] = round(time.monotonic() - start, 1)
            start = time.monotonic()
            found = real.compared(lambda: features(True))
            seconds[metric] = round(time.monotonic() - start, 1)
            assert all(score["n"] == count for score in found.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mib": peak, "seconds": seconds}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30_000
    if len(sys.argv) > 2:
        print(json.dumps(measure(count)))
        return
    found = {}
    for pictures in (count // 10, count):
        command = [sys.executable, __file__, str(pictures), "alone"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found[pictures] = json.loads(done.stdout.splitlines()[-1])
    grown = found[count]["peak_mib"] - found[count // 10]["peak_mib"]
    print(json.dumps({"pictures": count, **found[count], "grown_mib": grown}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
