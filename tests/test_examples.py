"""Queries with what was found for them: written by the bank's stage, shown by the
report."""

import json

import numpy as np
from test_recall import Letters, picture
from test_report import ATTACK, Balanced, put

from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.evaluation import neighbours, report
from cm3leon_jax.retrieval import bank_build, examples
from cm3leon_jax.retrieval.strategy import REASONS


def test_examples_tell_every_hit_with_its_reason(tmp_path):
    documents = [
        Document((Text(f"{letter} thing"), Image(picture(level))), id=f"{letter}{i}")
        for i, (letter, level) in enumerate(
            zip("aaabbc", (0, 1, 200, 100, 30, 250), strict=True)
        )
    ]
    bank = bank_build.build(tmp_path / "bank", Letters(), documents)
    path = examples.write(
        *(bank, Letters(), documents),
        **{"per_query": (1, 1), "skip_above": 0.999, "query_dropout": 0.0, "seed": 0},
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["query"]["text"] for line in lines] == [
        document.segments[0].text for document in documents
    ]
    first = lines[0]["found"]
    assert {hit["by"] for hit in first} == set(examples.WAYS)
    by_id = {(hit["by"], hit["id"]): hit for hit in first}
    assert by_id["picture", "a0"]["reason"] == "itself"
    assert by_id["picture", "a1"]["reason"] == "duplicate of the query"
    for line in lines:
        for way in examples.WAYS:
            hits = [hit for hit in line["found"] if hit["by"] == way]
            scores = [hit["score"] for hit in hits]
            assert scores == sorted(scores, reverse=True)
            assert sum(hit["reason"] == "chosen" for hit in hits) <= 1
            assert {hit["reason"] for hit in hits} <= set(REASONS) - {"not needed"}
        for shown in (line["query"], *line["found"]):
            assert (path.parent / shown["picture"]).is_file()
    vectors, _ = Letters().documents(documents)
    asked = Letters().texts(["a thing"])
    np.testing.assert_allclose(
        [hit["score"] for hit in first if hit["by"] == "text"],
        [asked[0] @ vectors[int(h["id"][1:])] for h in first if h["by"] == "text"],
        atol=1e-4,
    )
    text = report.write(tmp_path).read_text("utf-8")
    page = Balanced(text)
    assert '<section id="retrieval">' in text and "itself" in text
    shown = sum(1 + len(line["found"]) for line in lines)
    assert len([link for link in page.links if link.startswith("data:")]) == shown


def test_the_section_shows_counts_threshold_and_survives_bad_pieces(tmp_path):
    bank = tmp_path / "bank"
    assert neighbours.section(bank) == ""
    put(bank / "skipped.json", {"train": {"chosen": 12345, "itself": 7}, "x": 1})
    put(
        bank / "calibration.json",
        {
            **{"skip_above": 0.873, "duplicates": 0.995, "duplicate_pairs": 2000},
            **{"same_entity": 0.004, "same_entity_pairs": 1500, "met": True},
        },
    )
    hit = {"by": "text", "score": 0.5, "reason": ATTACK, "id": "", "text": ATTACK}
    lines = [
        {"query": {"text": ATTACK, "picture": "gone.png"}, "found": [hit, 3]},
        {"query": 3, "found": []},
        {"found": None},
    ]
    put(bank / "examples" / "index.jsonl", lines)
    text = report.write(tmp_path).read_text("utf-8")
    Balanced(text)
    assert ATTACK not in text and "&lt;script&gt;" in text
    for shown in ("12,345", "0.873", "99.5 % of 2000 pairs of duplicates", ">missing<"):
        assert shown in text
    assert text.count("<article") == 1
