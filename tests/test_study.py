"""The retrieval study: FLOPs to a score, their ratio, and the page."""

import math
import re

import pytest

from cm3leon_jax.evaluation import study
from cm3leon_jax.models.dual_encoder import VIT_B_32
from cm3leon_jax.training.flops import pair_flops

SLOW = [(1e12, 3.0), (2e12, 2.0), (4e12, 1.0), (8e12, 0.5)]
FAST = [(x / 4, nats) for x, nats in SLOW]


def test_reached_interpolates_between_checkpoints():
    assert study.reached(SLOW, 2.0) == pytest.approx(2e12)
    assert study.reached(SLOW, 1.5) == pytest.approx(math.sqrt(2e12 * 4e12))
    assert study.reached(SLOW, 3.5) == 1e12
    assert study.reached(SLOW, 0.4) is None
    bumpy = [(1.0, 3.0), (2.0, 1.0), (3.0, 2.0), (4.0, 0.5)]
    assert study.reached(bumpy, 1.0) == 2.0
    assert study.reached([], 1.0) is None


def test_ratio_is_how_much_less_compute():
    assert study.ratio_at(0.75, SLOW, FAST) == pytest.approx(4.0)
    assert study.ratio_at(0.5, SLOW, FAST, extra=2e12) == pytest.approx(2.0)
    assert study.ratio_at(0.1, SLOW, FAST) is None


def test_ratios_need_every_seed():
    found = study.ratios([(SLOW, FAST), (SLOW, SLOW)])
    assert found["seeds"] == pytest.approx([4.0, 1.0])
    assert (found["low"], found["high"]) == pytest.approx((1.0, 4.0))
    assert found["value"] == pytest.approx(2.0)
    assert [x[1] for x in found["by_score"]] == pytest.approx([4.0] * 4)
    # At 3 nats the first checkpoint of retrieval was past it already.
    assert [x[2] for x in found["by_score"]] == [True, False, False, False]
    assert found["at_least"] == [False, False]
    quick = study.ratios([(SLOW, [(1e12, 0.4), (2e12, 0.3)])])
    assert quick["value"] == pytest.approx(8.0) and quick["at_least"] == [True]
    worse = [(x, nats + 1) for x, nats in SLOW]
    assert study.ratios([(SLOW, FAST), (SLOW, worse)])["value"] is None


def test_shorter_runs_stand_beside_whole_baselines():
    runs = {
        "retrieval-0": run("retrieval", FAST),
        "baseline-0": run("baseline", SLOW),
        "fifth": run("short", [(0.8e12, 2.5), (1.6e12, 0.75)]),
        "noisy": run("ablation", FAST),
    }
    assert study.planned(runs, extra=2e12) == [
        ("retrieval-0", 0.5, 2e12, pytest.approx(4.0), pytest.approx(2.0)),
        ("fifth", 0.75, 1.6e12, pytest.approx(5.0), pytest.approx(8 / 3.6)),
    ]
    assert study.planned({"fifth": runs["fifth"]}) == []


def test_flops_of_clip():
    # 2 x (85.6M weights x 50 tokens + 37.8M x 77) and the attention: 14.4 GFLOPs.
    assert pair_flops(VIT_B_32) == pytest.approx(14.8e9, rel=0.03)


def run(arm, curve, scores=()):
    points = [{"step": i, "flops": x, "nats": y} for i, (x, y) in enumerate(curve)]
    found = {key: {"value": 0.9, "low": 0.8, "high": 1.0} for key in scores}
    nats = {"0": curve[-1][1]} | ({"1": 0.4, "2": 0.3} if arm == "retrieval" else {})
    made = {"arm": arm, "curve": points, "nats": nats, "scores": found}
    return made | {"seconds": 61.0}


def test_page_tells_everything_without_network():
    result = {
        "config": "shapes:<study>",
        "config_hash": "abc",
        "command": "python launch/study.py",
        "hardware": "1 x CPU",
        "measured": "today",
        "runs": {
            "retrieval-0": run("retrieval", FAST, ["entity/tail@2"]),
            "baseline-0": run("baseline", SLOW, ["entity/tail@0"]),
            "fifth": run("short", [(1.6e12, 0.75)]),
            "noisy": run("ablation", FAST),
        },
        "extra_flops": {"retriever": 1e12, "bank": 1e11},
        "ratio": {"training": study.ratios([(SLOW, FAST)])},
    }
    page = study.page(result)
    assert (
        "4.00×" in page
        and "5.00×" in page
        and "2.96×" in page  # 8 TFLOPs against 1.6, and 1.1 of the retriever's
        and "≥ 4.00×" in page
        and "training TFLOPs" in page
        and "entity/tail@2" in page
    )
    assert "shapes:&lt;study&gt;" in page and "1 min 01 s" in page
    assert page.count("<svg") == 1
    assert not re.search(r"https?://(?!www\.w3\.org)|<script|<link", page)
    for part in ("main", "section", "table", "header"):
        assert page.count(f"<{part}") == page.count(f"</{part}>")
    bare = study.page(result | {"runs": {}, "ratio": {}, "extra_flops": {}})
    assert "<svg" not in bare and "python launch/study.py" in bare
