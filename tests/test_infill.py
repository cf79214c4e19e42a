"""The CM3 rearrangement: exact inverse, no span across <break>, counted lengths."""

import numpy as np
import pytest
from tiny_data import GRID, LAYOUT, make_documents, tokenize

from cm3leon_jax.data import infill
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.hashing import uniform
from cm3leon_jax.data.infill import InfillConfig
from cm3leon_jax.data.pipeline import build_sample
from cm3leon_jax.data.records import index_of
from cm3leon_jax.tokenizers import regions

S0, S1 = LAYOUT.sentinels[:2]
EOS, BRK, EOSS = LAYOUT.eos, LAYOUT.brk, LAYOUT.eoss
TEXT, IMAGE = LAYOUT.text.start, LAYOUT.image.start


def _sample(rng, segments):
    """`<eos> seg <break> seg … <eos>` and the segments' bounds in it."""
    tokens, bounds = [EOS], []
    for number in range(segments):
        tokens += [BRK] * (number > 0)
        count = int(rng.integers(0 if segments > 1 else 1, 9))
        bounds.append((len(tokens), len(tokens) + count))
        tokens += (TEXT + rng.integers(0, 300, count)).tolist()
    return np.array([*tokens, EOS], np.int32), np.array(bounds)


def test_worked_example():
    tokens = [EOS, TEXT, TEXT + 1, TEXT + 2, BRK, IMAGE, IMAGE + 1, IMAGE + 2, EOS]
    found = infill.infill(np.array(tokens), [(2, 4), (6, 7)], LAYOUT)
    expected = [
        *(EOS, TEXT, S0, BRK, IMAGE, S1, IMAGE + 2),
        *(S0, TEXT + 1, TEXT + 2, EOSS, S1, IMAGE + 1, EOSS, EOS),
    ]
    assert found.tolist() == expected and found.dtype == np.int32
    found = infill.infill(np.array(tokens), [(1, 4)], LAYOUT)
    assert found.tolist() == [EOS, S0, *tokens[4:8], S0, *tokens[1:4], EOSS, EOS]
    found = infill.infill(np.array(tokens), [(2, 4), (6, 7)], LAYOUT, order=[1, 0])
    assert found.tolist() == [
        *expected[:7],
        *(S1, IMAGE + 1, EOSS, S0, TEXT + 1, TEXT + 2, EOSS, EOS),
    ]


def test_placed_spans_are_counted_disjoint_within_segments_and_undone():
    rng = np.random.default_rng(0)
    for trial in range(600):
        tokens, bounds = _sample(rng, int(rng.integers(1, 5)))
        maskable = int((bounds[:, 1] - bounds[:, 0]).sum())
        count = int(rng.integers(0, min(maskable, len(LAYOUT.sentinels)) + 1))
        points = uniform(trial, np.arange(2 * count + 1))
        spans = infill.place_spans(count, bounds, points)
        assert len(spans) == count
        seen = 0
        for start, stop in spans:
            assert seen <= start < stop
            assert any(a <= start and stop <= b for a, b in bounds)
            seen = stop
        order = rng.permutation(count)
        moved = infill.infill(tokens, spans, LAYOUT, order)
        assert len(moved) == len(tokens) + infill.OVERHEAD * count
        np.testing.assert_array_equal(infill.uninfill(moved, LAYOUT), tokens)


def test_span_ends_are_uniform():
    bounds = np.array([(1, 101)])
    spans = np.array(
        [
            infill.place_spans(1, bounds, uniform(i, np.arange(2)))[0]
            for i in range(4000)
        ]
    )
    lengths = spans[:, 1] - spans[:, 0]
    assert abs(lengths.mean() - 100 / 3) < 1.5  # E|u - v| = 1/3, rounded outwards
    assert abs((spans.mean(axis=1) - 51).mean()) < 1.5


def test_a_long_span_is_clipped_to_the_segment_of_most_overlap():
    bounds = np.array([(1, 4), (5, 21)])
    assert infill.place_spans(1, bounds, np.array([0.0, 0.99])) == [(5, 21)]
    assert infill.place_spans(1, bounds, np.array([0.05, 0.24])) == [(2, 4)]
    # On the <break> alone: one token elsewhere instead of none.
    ((start, stop),) = infill.place_spans(1, bounds, np.array([0.155, 0.195]))
    assert stop == start + 1 and start != 4


def test_bad_spans_are_refused():
    tokens = np.array([EOS, TEXT, BRK, IMAGE, EOS])
    for spans, message in [
        ([(1, 4)], "crosses"),
        ([(0, 2)], "span"),
        ([(3, 5)], "span"),
        ([(1, 2), (1, 2)], "overlaps"),
        ([(2, 2)], "empty"),
        ([(1, 2)] * 13, "sentinels"),
    ]:
        with pytest.raises(ValueError, match=message):
            infill.infill(tokens, spans, LAYOUT)
    with pytest.raises(ValueError, match="order"):
        infill.infill(tokens, [(1, 2)], LAYOUT, order=[1])
    with pytest.raises(ValueError, match="eos"):
        infill.infill(tokens[1:], [], LAYOUT)


def test_damaged_samples_are_refused():
    tokens = np.array([EOS, TEXT, TEXT, BRK, IMAGE, IMAGE, EOS])
    moved = infill.infill(tokens, [(1, 2), (4, 6)], LAYOUT)
    for damaged in (moved[:-1], moved[1:-3], np.delete(moved, 1), np.delete(moved, -2)):
        with pytest.raises(ValueError, match="damaged|begins"):
            infill.uninfill(damaged, LAYOUT)


def test_regions_have_the_promised_size_and_runs():
    rng = np.random.default_rng(0)
    shapes = set()
    for grid, most in ((GRID, 11), ((8, 8), 8), ((32, 32), 40), ((2, 3), 2)):
        for _ in range(100):
            cells = infill.draw_region(rng, grid, most)
            assert cells.shape == grid and cells.dtype == bool
            assert 0.1 <= cells.mean() <= 0.75
            assert 1 <= len(regions.runs(cells)) <= most
            rows, columns = cells.any(axis=1).sum(), cells.any(axis=0).sum()
            shapes.add("box" if rows * columns == cells.sum() else "free")
    assert shapes == {"box", "free"}
    with pytest.raises(ValueError, match="sentinels"):
        infill.draw_region(rng, (32, 32), 2)


MODES = {
    "causal": InfillConfig(spans=0, segment=0, region=0, region_without_text=0),
    "spans": InfillConfig(spans=3, segment=0, region=0, region_without_text=0),
    "segment": InfillConfig(spans=0, segment=1, region=0, region_without_text=0),
    "region": InfillConfig(spans=0, segment=0, region=1, region_without_text=0),
    "alone": InfillConfig(spans=0, segment=0, region=1, region_without_text=1),
    "mixed": InfillConfig(spans=1, segment=0.3, region=0.3, region_without_text=0.5),
}


def _draw(config, records, epoch=0, capacity=None):
    numbers = np.arange(len(records))
    index = index_of(records, LAYOUT)
    sentinels = len(LAYOUT.sentinels)
    draws = infill.draw(
        config,
        index,
        numbers,
        epoch=epoch,
        seed=7,
        sentinels=sentinels,
        capacity=capacity,
    )
    return draws, infill.place_points(draws, numbers, epoch=epoch, seed=7)


@pytest.fixture(scope="module")
def records():
    return tokenize(make_documents(150))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_undone_and_has_the_planned_length(records, mode):
    draws, points = _draw(MODES[mode], records)
    for k, record in enumerate(records):
        tokens, moved, *_ = build_sample(record, draws, k, points[k], LAYOUT)
        assert len(tokens) == len(moved) == draws.length[k]
        assert len(tokens) == len(record.tokens) + 2 + 3 * draws.spans[k]
        expected = record.tokens.copy()
        if draws.mode[k] == infill.REGION:  # visible codes are the blanked picture's
            region = record.regions[draws.region[k]]
            start, stop = record.bounds[region.segment]
            codes = LAYOUT.image_ids(region.codes).ravel()
            cells = region.cells.ravel()
            expected[start:stop] = np.where(cells, expected[start:stop], codes)
        plain = infill.uninfill(tokens, LAYOUT)
        np.testing.assert_array_equal(plain, [EOS, *expected, EOS])
        # `moved` is the tail from the first repeated sentinel to the last <eoss>.
        inside = tokens[moved]
        spans = int(draws.spans[k])
        assert (inside == EOSS).sum() == spans == (tokens == EOSS).sum()
        assert not moved[-1] and (np.diff(moved[:-1].astype(int)) >= 0).all()
        if spans:
            assert inside[0] in LAYOUT.sentinels and inside[-1] == EOSS
            assert EOSS not in tokens[~moved]


def test_whole_segments_hide_a_text_or_a_picture(records):
    draws, points = _draw(MODES["segment"], records)
    hidden = set()
    for k, record in enumerate(records):
        tokens, *_ = build_sample(record, draws, k, points[k], LAYOUT)
        text, image = (record.tokens[a:b].tolist() for a, b in record.bounds)
        if tokens[1] == S0:
            assert tokens.tolist() == [EOS, S0, BRK, *image, S0, *text, EOSS, EOS]
            hidden.add("text")
        else:
            assert tokens.tolist() == [EOS, *text, BRK, S0, S0, *image, EOSS, EOS]
            hidden.add("image")
    assert hidden == {"text", "image"}


@pytest.mark.parametrize("mode", ["region", "alone"])
def test_regions_show_nothing_of_what_they_hide(records, mode):
    draws, points = _draw(MODES[mode], records)
    for k, record in enumerate(records[:50]):
        tokens, moved, *_ = build_sample(record, draws, k, points[k], LAYOUT)
        region = record.regions[draws.region[k]]
        visible = tokens[~moved]
        codes = visible[LAYOUT.modality(visible) == 2] - IMAGE
        np.testing.assert_array_equal(codes, region.codes[~region.cells])
        full = record.tokens[slice(*record.bounds[1])] - IMAGE
        hidden = tokens[moved]
        codes = hidden[LAYOUT.modality(hidden) == 2] - IMAGE
        np.testing.assert_array_equal(codes, full[region.cells.ravel()])
        numbers = hidden[np.isin(hidden, LAYOUT.sentinels)] - S0
        spans = len(regions.runs(region.cells))
        if mode == "alone":  # the text is sentinel 0, moved after the picture's runs
            assert tokens[1] == S0 and tokens[2] == BRK
            assert numbers.tolist() == [*range(1, spans + 1), 0]
        else:
            assert numbers.tolist() == list(range(spans))


def test_a_picture_without_a_text_hides_none():
    documents = [
        Document(document.segments[1:], id=document.id)
        for document in make_documents(20)
    ]
    pictures = tokenize(documents)
    draws, points = _draw(MODES["alone"], pictures)
    assert (draws.mode == infill.REGION).all() and not draws.with_text.any()
    for k, record in enumerate(pictures):
        tokens, *_ = build_sample(record, draws, k, points[k], LAYOUT)
        spans = len(regions.runs(record.regions[draws.region[k]].cells))
        assert len(tokens) == draws.length[k] == len(record.tokens) + 2 + 3 * spans
    draws, _ = _draw(MODES["segment"], pictures)  # nothing would be left to see
    assert (draws.mode == infill.SPANS).all() and not draws.spans.any()


def test_shares_of_the_modes():
    index = np.repeat(index_of(tokenize(make_documents(1)), LAYOUT), 20_000)
    options = {"seed": 0, "sentinels": 12, "capacity": None}
    config = InfillConfig(spans=1, segment=0.2, region=0.3, region_without_text=0.25)
    draws = infill.draw(config, index, np.arange(20_000), epoch=0, **options)
    shares = np.bincount(draws.mode) / 20_000
    np.testing.assert_allclose(shares, [0.5, 0.2, 0.3], atol=0.012)
    causal = (draws.spans[draws.mode == infill.SPANS] == 0).mean()
    assert abs(causal - np.exp(-1)) < 0.015
    assert abs(draws.with_text[draws.mode == infill.REGION].mean() - 0.25) < 0.02
    assert not draws.with_text[draws.mode != infill.REGION].any()
    again = infill.draw(config, index, np.arange(20_000), epoch=1, **options)
    assert (again.mode != draws.mode).mean() > 0.3
    half = infill.draw(config, index[:9], np.arange(100, 109), epoch=0, **options)
    np.testing.assert_array_equal(half.spans, draws.spans[100:109])


@pytest.mark.parametrize("mode", MODES)
def test_overlength_takes_spans_away_and_never_cuts(records, mode):
    longest = max(len(record.tokens) for record in records)
    for capacity in (longest - 4, longest + 2, longest + 6):
        draws, points = _draw(MODES[mode], records, capacity=capacity)
        for k, record in enumerate(records):
            if draws.length[k] == 0:
                assert len(record.tokens) + 2 > capacity
                continue
            tokens, *_ = build_sample(record, draws, k, points[k], LAYOUT)
            assert len(tokens) == draws.length[k] <= capacity
            assert len(infill.uninfill(tokens, LAYOUT)) == len(record.tokens) + 2


def test_impossible_settings_are_refused():
    for change in ({"segment": 0.8, "region": 0.3}, {"spans": -1}, {"region": 1.5}):
        settings = {"spans": 1, "segment": 0, "region": 0, "region_without_text": 0}
        with pytest.raises(ValueError, match="infill"):
            InfillConfig(**(settings | change))
