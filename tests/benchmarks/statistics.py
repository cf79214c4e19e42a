"""Memory and time of the statistics of 30,000 pictures, as protocols keep them.

    python tests/benchmarks/statistics.py [PICTURES]

Pictures are made up, features those of EfficientNet-Lite0 (`bash launch/setup.sh
features`). As for a public set, parts are kept on disk behind a progress bar and added
up one by one. A child process has ten times as many pictures as another: what it needs
more is what grows with their number. Prints one JSON object.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SIDE, PART = 32, 64


def measure(count: int) -> dict[str, float]:
    import numpy as np

    from cm3leon_jax.evaluation import features, frechet
    from cm3leon_jax.evaluation.kept import Parts

    start, network = time.monotonic(), features.efficientnet_lite0(SIDE)
    starts = range(0, count, PART)

    def work(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        shape = (min(PART, count - starts[i]), SIDE, SIDE, 3)
        return network(rng.integers(0, 256, shape, np.uint8))

    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder)).run([*starts], work, "pictures")
        moments = frechet.subsets(parts, network.width)
    whole = frechet.Moments.empty(network.width)
    for part in moments:
        whole = whole.merge(part)
    score = frechet.score(moments, whole)
    assert whole.count == score["n"] == count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mib": peak, "seconds": time.monotonic() - start}


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
