"""Ways of decoding compared: curves, diversity, the table, of made-up candidates."""

import json

import numpy as np
import pytest
from PIL import Image as Pillow

from cm3leon_jax.data.shapes import Object
from cm3leon_jax.evaluation import decoding, decoding_report
from cm3leon_jax.sampling.rerank import Ranked
from cm3leon_jax.sampling.sampler import ContrastiveTopK, Sampler

A, B, C = (Object(n, "small", "red", "circle") for n in range(3))


def ranked(numbers):
    """Candidates with these numbers, best first."""
    scores = tuple(-float(i) for i in range(len(numbers)))
    return Ranked(
        outputs=("",) * len(numbers), numbers=numbers, scores=scores, parts={}
    )


def test_a_curve_is_of_the_first_candidates():
    wanted = [frozenset({A, B}), frozenset({C})]
    found = [ranked((3, 1, 0, 2)), ranked((0, 1, 2, 3))]
    parsed = [  # in the order of `found`
        [frozenset({A, B}), frozenset({A}), frozenset(), frozenset({A, C})],
        [frozenset({B}), frozenset({C}), frozenset(), frozenset({C})],
    ]
    made = decoding.curve(wanted, found, parsed, (1, 2, 4))
    chosen = {n: point["chosen"]["value"] for n, point in made.items()}
    possible = {n: point["possible"]["value"] for n, point in made.items()}
    # One: nothing, B. Two: A, B. Four: A and B, B. Of three objects wanted.
    wanted = {"1": 0.0, "2": 2 * 1 / (2 + 3), "4": 2 * 2 / (3 + 3)}
    assert chosen == pytest.approx(wanted, abs=1e-5)
    # One: nothing, B. Two: A, C. Four: everything.
    assert possible == pytest.approx({"1": 0.0, "2": 0.8, "4": 1.0}, abs=1e-5)
    assert all(point["chosen"]["n"] == 3 for point in made.values())


def test_diversity_is_the_mean_distance_of_pairs():
    def plain(level):
        return Pillow.fromarray(np.full((4, 4, 3), level, np.uint8))

    assert decoding.diversity([plain(9)]) == 0
    assert decoding.diversity([plain(9), plain(9)]) == 0
    assert decoding.diversity([plain(0), plain(255)]) == pytest.approx(1)
    three = [plain(0), plain(51), plain(153)]
    assert decoding.diversity(three) == pytest.approx((0.2 + 0.6 + 0.4) / 3)


def test_ways_share_their_settings():
    contrast = ContrastiveTopK(alpha=0.2, k=5, amateur_temperature=0.5)
    ways = decoding.ways(temperature=0.9, top_p=0.8, guidance=3.0, contrast=contrast)
    guided = Sampler(temperature=0.9, top_p=0.8, guidance=3.0)
    contrastive = Sampler(temperature=0.9, contrastive=contrast)
    assert ways["guided top-p"] == (guided,) and ways["CD-K"] == (contrastive,)
    assert ways["half and half"] == (guided, contrastive)
    assert ways["CD"][0].contrastive == ContrastiveTopK(
        alpha=0.2, k=1, amateur_temperature=0.5
    )
    assert len(ways) == len(set(ways.values())) == 7


def test_the_table_has_a_line_for_each_way():
    point = {"chosen": {"value": 0.5}, "possible": {"value": 0.75}}
    way = {"curve": {"1": point}, "diversity": 0.1, "seconds_per_candidate": 0.02}
    other = way | {"curve": {"1": point, "16": point}}
    lines = decoding.table({"one": way, "other": other}).splitlines()
    assert lines[0] == "|  | 1 | 16 | diversity | s / candidate |"
    assert lines[2] == "| one | 0.500 (0.750) |  | 0.100 | 0.020 |"
    assert lines[3].startswith("| other | 0.500 (0.750) | 0.500 (0.750) | 0.100")


def test_the_report_tells_the_best_way_for_each_number(tmp_path):
    def way(seconds, *values, contrast=None):
        curve = {
            str(n): {"chosen": {"value": x, "high": x + 0.02}}
            for n, x in zip((1, 4), values, strict=True)
        }
        return {
            "curve": curve,
            "samplers": [{"contrastive": contrast}],
            "diversity": 0.1,
            "seconds_per_candidate": seconds,
            "streams": 1,
        }

    ways = {
        "slow & good": way(2.0, 0.9, 0.95),
        "cheap": way(1.0, 0.89, 0.9, contrast={"k": 1}),
        "as good": way(1.5, 0.8, 0.94),
    }
    assert decoding_report.best(ways) == {
        1: ["slow & good", "cheap"],
        4: ["slow & good", "as good"],
    }
    assert decoding_report.section(tmp_path) == ""
    (tmp_path / "sft.test.json").write_text(json.dumps({"prompts": 500, "ways": ways}))
    page = decoding_report.section(tmp_path)
    assert "slow &amp; good" in page and "dashed" in page and "<svg" in page
