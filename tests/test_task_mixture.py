"""The mixture of tasks: shares, bounds, every record equally often, a pure function."""

import numpy as np
import pytest
from tiny_data import GRID, LAYOUT, build_cache

from cm3leon_jax.data import infill, tasks
from cm3leon_jax.data.documents import Image
from cm3leon_jax.data.infill import AnswerConfig, InfillConfig
from cm3leon_jax.data.packing import PackingConfig
from cm3leon_jax.data.pipeline import Rows, batches
from cm3leon_jax.data.task_mixture import TaskMixture, ratios
from cm3leon_jax.data.task_sources import reordered
from cm3leon_jax.tokenizers import regions

NAMES = ("answer", "edit", "infill")
COUNTS = (20, 10, 15)
PACKING = PackingConfig(kind="first_fit", row_length=100)
SPANS = InfillConfig(spans=2, segment=0.3, region=0.2, region_without_text=0.5)


def examples():
    """Task after task; the texts name the record, pictures are random."""
    rng = np.random.default_rng(0)

    def picture():
        return Image(rng.integers(0, 256, (8, 8, 3), np.uint8))

    made = []
    for name, count in zip(NAMES, COUNTS, strict=True):
        for i in range(count):
            fields = {
                "answer": {"question": f"q{i}?", "answer": f"a {i}"},
                "edit": {"source": picture(), "instruction": f"do {i}"},
                "infill": {"caption": f"c{i}"},
            }[name] | {"image": picture()}
            made.append(tasks.fill(name, fields, 0, id=f"{name} {i}"))
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return build_cache(tmp_path_factory.mktemp("tasks"), examples(), tasks=NAMES)


def rows_of(cache, probability=0.8, config=SPANS, packing=PACKING, seed=0):
    return Rows(
        *(cache, LAYOUT, config, packing, seed),
        answers=AnswerConfig(probability=probability, regions=(3,)),
        mixture=TaskMixture(COUNTS, (1, 1, 1), seed),
    )


def test_ratios_follow_the_weights_within_their_bounds():
    np.testing.assert_allclose(ratios((20, 10, 15), (1, 1, 1)), 1)
    found = ratios((100, 100), (1, 2))
    np.testing.assert_allclose(found, (2 / 3, 4 / 3))
    assert ratios((1000, 10), (1, 100)).tolist() == [1010 / 2000, 3.0]
    assert ratios((1000, 1000), (1, 1000)).tolist()[0] == 0.3
    for weights in ((0, 1), (-1, 1), (float("nan"), 1)):
        with pytest.raises(ValueError, match="must be positive"):
            ratios((5, 5), weights)
    with pytest.raises(ValueError, match="no records"):
        ratios((5, 0), (1, 1))


def test_every_record_comes_equally_often_and_once_a_pass():
    mixture = TaskMixture((7, 40, 3), (3, 0.7, 50), seed=5)
    assert mixture.samples[2] == 9 and mixture.total == 50
    seen = []
    for epoch in range(20):
        found, passes = mixture.locate(epoch, np.arange(mixture.size))
        first = np.searchsorted([7, 47], found, side="right")
        assert np.bincount(first).tolist() == mixture.samples
        seen += zip(passes.tolist(), found.tolist(), strict=True)
    assert len(set(seen)) == len(seen)
    uses = np.bincount([record for _, record in seen], minlength=50)
    for part in (uses[:7], uses[7:47], uses[47:]):
        assert part.max() - part.min() <= 1


def test_the_mixture_is_a_pure_function_of_its_settings():
    positions = np.arange(40)
    one, two = (TaskMixture((30, 10), (1, 2), seed=3) for _ in range(2))
    whole = one.locate(6, positions)
    for part in np.split(positions[::-1], 8):  # in any order, in any pieces
        for got, expected in zip(two.locate(6, part), whole, strict=True):
            np.testing.assert_array_equal(got, expected[part])
    other = TaskMixture((30, 10), (1, 2), seed=4).locate(6, positions)
    assert (other[0] != whole[0]).any() and (
        one.locate(7, positions)[0] != whole[0]
    ).any()


def test_rows_hold_each_tasks_samples_whole(cache):
    rows = rows_of(cache)
    assert rows.count(0) == len(
        {rows.row(i)["tokens"].tobytes() for i in range(rows.count(0))}
    )
    ids = []
    for number in range(rows.count(0)):
        row = rows.row(number)
        assert set(row) == {"tokens", "segments", "positions", "moved", "task"}
        assert (row["task"] > 0).tolist() == (row["segments"] > 0).tolist()
        names = rows.record_ids(number)
        for segment, name in enumerate(names, start=1):
            (task,) = set(row["task"][row["segments"] == segment].tolist())
            assert NAMES[task - 1] == name.split()[0]
        ids += names
    assert sorted(ids) == sorted(document.id for document in examples())


def test_batches_resume_and_do_not_depend_on_workers(cache):
    options = {"batch_size": 4, "process_index": 0, "process_count": 1}
    whole = list(batches(rows_of(cache), **options, workers=0, start_step=0, steps=12))
    rest = list(batches(rows_of(cache), **options, workers=2, start_step=5, steps=7))
    for one, two in zip(whole[5:], rest, strict=True):
        assert set(one) == set(two)
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])


def samples(rows):
    """(task name, record number in its task, tokens, moved) of some rows."""
    for number in range(3 * rows.count(0)):
        row, names = rows.row(number), rows.record_ids(number)
        for segment, name in enumerate(names, start=1):
            mine = row["segments"] == segment
            task, record = name.split()
            yield task, int(record), row["tokens"][mine], row["moved"][mine]


def test_exactly_the_answer_is_moved_and_the_inverse_holds(cache):
    originals = {record.id: record for record in cache}
    for task, number, tokens, moved in samples(rows_of(cache, probability=1)):
        record = originals[f"{task} {number}"]
        plain = infill.uninfill(tokens, LAYOUT)
        if task == "infill":
            ends = int((tokens[moved] == LAYOUT.eoss).sum())
            runs = [len(regions.runs(region.cells)) for region in record.regions]
            assert ends in {n + text for n in runs for text in (0, 1)}
            continue
        np.testing.assert_array_equal(plain[1:-1], record.tokens)
        if task == "edit":  # its output comes last
            assert not moved.any()
            continue
        text = f" a {number}".encode()
        pieces = LAYOUT.text_ids(np.frombuffer(text, np.uint8)).tolist()
        first = LAYOUT.sentinels[0]
        assert tokens[moved].tolist() == [first, *pieces, LAYOUT.eoss]
        assert tokens[-1] == LAYOUT.eos and (tokens == first).sum() == 2


@pytest.mark.parametrize("probability", [0.0, 0.8])
def test_answers_are_moved_as_often_as_configured(cache, probability):
    config = InfillConfig(spans=0, segment=0, region=0, region_without_text=0.5)
    found = [
        (task, bool(moved.any()))
        for task, _, _, moved in samples(rows_of(cache, probability, config))
    ]
    share = np.mean([moved for task, moved in found if task == "answer"])
    assert abs(share - probability) < 0.15 and (probability or share == 0)
    assert not any(moved for task, moved in found if task == "edit")
    # Region mode, whatever the settings say.
    assert all(moved for task, moved in found if task == "infill")


def test_a_whole_segment_is_never_the_output(cache):
    config = InfillConfig(spans=0, segment=1, region=0, region_without_text=0)
    lengths = set()
    for task, _, tokens, moved in samples(rows_of(cache, 0.0, config)):
        if task == "edit":
            lengths.add(int(moved.sum()))
            # <eos> … <break> image, then what was moved.
            kept = tokens[~moved]
            assert (LAYOUT.modality(kept[-17:-1]) == 2).all() and moved.any()
    assert len(lengths) >= 3  # the instruction, the source, the name of the task


def test_autoregressive_examples_move_nothing(tmp_path):
    made = [reordered(document) for document in examples()]
    first = made[0]
    assert [type(s).__name__ for s in first.segments] == ["Image", "Text"]
    assert first.metadata["answer"][0] == 1 and first.id == "answer 0"
    cache = build_cache(tmp_path, made, tasks=NAMES)
    for task, _, tokens, moved in samples(rows_of(cache, probability=1)):
        if task != "infill":
            assert not moved.any() and tokens[-1] == LAYOUT.eos


def test_the_wrong_cache_is_refused(cache, tmp_path):
    plain = build_cache(tmp_path, examples())
    assert "task" not in plain.index.dtype.names and plain[0].task == 0
    with pytest.raises(ValueError, match="records of tasks, and no others"):
        rows_of(plain)
    with pytest.raises(ValueError, match="records of tasks, and no others"):
        Rows(cache, LAYOUT, SPANS, PACKING, 0)
    with pytest.raises(
        ValueError, match="has 45 records, the mixture of tasks is of 9"
    ):
        Rows(
            *(cache, LAYOUT, SPANS, PACKING, 0),
            answers=AnswerConfig(probability=1),
            mixture=TaskMixture((4, 5), (1, 1), 0),
        )
    assert cache.tasks == NAMES and cache.grid == GRID


def test_a_record_repeated_within_an_epoch_is_masked_anew(cache):
    rows = Rows(
        *(cache, LAYOUT),
        InfillConfig(spans=0, segment=1, region=0, region_without_text=0),
        *(PACKING, 0),
        answers=AnswerConfig(probability=0),
        mixture=TaskMixture(COUNTS, (0.1, 50, 0.1), 0),
    )
    seen = {}
    for number in range(rows.count(0)):
        row, names = rows.row(number), rows.record_ids(number)
        for segment, name in enumerate(names, start=1):
            if name.startswith("edit"):
                tokens = row["tokens"][row["segments"] == segment].tobytes()
                seen.setdefault(name, []).append(tokens)
    assert {len(found) for found in seen.values()} == {3}
    assert sum(len(set(found)) > 1 for found in seen.values()) >= 5  # of 10
