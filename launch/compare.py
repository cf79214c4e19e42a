"""Results of one protocol side by side: which differences are more than chance?

    python launch/evaluate.py --config configs/eval/shapes.py:pretrained \
        --workdir runs/full --checkpoint pretrain,sft
    python launch/compare.py runs/full/eval/shapes-pretrained-*.json --out both.html

Prints the table as Markdown; `--out` writes it as .md, .html or .json too. Every result
is compared with the first. Results of other protocols or other data are refused, also
of other samplers or memory banks, unless that is what is compared: `--allow sampling`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_MAY = ("encoder", "bank", "sampling")  # differ


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", help="files eval/NAME.CHECKPOINT.json")
    parser.add_argument("--out", type=Path, action="append", default=[])
    parser.add_argument("--allow", choices=_MAY, action="append", default=[])
    given = parser.parse_intermixed_args()
    from cm3leon_jax.evaluation import compare

    try:
        results = compare.read_all(given.results)
        compare.check(results, given.allow)
        for path in given.out:
            compare.write(results, path)
    except (ValueError, OSError) as error:
        sys.exit(_fail(str(error)))
    print(compare.markdown(results))
    print(json.dumps(compare.summary(results)))


def _fail(message: str) -> int:
    print(f"compare.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
