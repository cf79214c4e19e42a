"""Rows and batches are functions of their number, whoever builds them."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_data import LAYOUT, build_cache, make_documents

from cm3leon_jax import vocab
from cm3leon_jax.data import infill
from cm3leon_jax.data.infill import InfillConfig
from cm3leon_jax.data.packing import PackingConfig
from cm3leon_jax.data.pipeline import Rows, batches

INFILL = InfillConfig(spans=1, segment=0.2, region=0.3, region_without_text=0.5)
LENGTHS = {"concatenate": 24, "first_fit": 70}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return build_cache(tmp_path_factory.mktemp("tokens"), make_documents(60))


def _rows(cache, kind, seed=0, row_length=None):
    packing = PackingConfig(kind=kind, row_length=row_length or LENGTHS[kind])
    return Rows(cache, LAYOUT, INFILL, packing, seed)


def _plain(cache, sample):
    """The name of the record that an unmoved sample was made of (texts and visible
    codes need not be unique, so by the picture's full or blanked codes)."""
    for record in cache:
        if len(record.tokens) + 2 == len(sample):
            versions = [record.tokens]
            for region in record.regions:
                start, stop = record.bounds[region.segment]
                tokens = record.tokens.copy()
                codes = LAYOUT.image_ids(region.codes).ravel()
                hidden = region.cells.ravel()
                tokens[start:stop] = np.where(hidden, tokens[start:stop], codes)
                versions.append(tokens)
            if any((sample[1:-1] == tokens).all() for tokens in versions):
                return record.id
    raise AssertionError("a sample of no record")


def _check_samples(cache, stream):
    """Ids of the samples that a stream of tokens is made of, each put back whole."""
    ends = np.flatnonzero(stream == LAYOUT.eos).reshape(-1, 2)
    assert ends[0, 0] == 0 and (ends[1:, 0] == ends[:-1, 1] + 1).all()
    return [
        _plain(cache, infill.uninfill(stream[start : stop + 1], LAYOUT))
        for start, stop in ends
    ]


@pytest.mark.parametrize("epoch", [0, 1])
def test_concatenated_rows_hold_every_record_once_per_epoch(cache, epoch):
    rows = _rows(cache, "concatenate")
    first = sum(rows.count(e) for e in range(epoch))
    batch = rows.rows(range(first, first + rows.count(epoch)))
    stream = batch["tokens"].ravel()
    used = np.flatnonzero(stream != LAYOUT.pad)
    assert used[-1] == len(used) - 1  # padding only at the end of the epoch
    np.testing.assert_array_equal(batch["segments"].ravel(), stream != LAYOUT.pad)
    assert (batch["positions"] == np.arange(25))[batch["segments"] > 0].all()
    ids = _check_samples(cache, stream[: len(used)])
    assert sorted(ids) == sorted(record.id for record in cache)
    assert (
        (batch["tokens"] == LAYOUT.eoss).sum()
        == (batch["moved"] & (batch["tokens"] == LAYOUT.eoss)).sum()
        > 0
    )


@pytest.mark.parametrize("epoch", [0, 1])
def test_first_fit_rows_hold_whole_samples_once_per_epoch(cache, epoch):
    rows = _rows(cache, "first_fit")
    first = sum(rows.count(e) for e in range(epoch))
    ids = []
    for number in range(first, first + rows.count(epoch)):
        row = rows.row(number)
        assert {key: (v.dtype.name, v.shape) for key, v in row.items()} == {
            "tokens": ("int32", (71,)),
            "segments": ("int32", (71,)),
            "positions": ("int32", (71,)),
            "moved": ("bool", (71,)),
        }
        used = row["segments"] > 0
        assert (row["tokens"][~used] == LAYOUT.pad).all()
        assert not row["moved"][~used].any() and not row["positions"][~used].any()
        own = []
        for segment in range(1, row["segments"].max() + 1):
            where = np.flatnonzero(row["segments"] == segment)
            assert (np.diff(where) == 1).all()
            np.testing.assert_array_equal(
                row["positions"][where], np.arange(len(where))
            )
            own += _check_samples(cache, row["tokens"][where])
        assert own == rows.record_ids(number)
        ids += own
    assert sorted(ids) == sorted(record.id for record in cache)
    assert rows.skipped == 0


@pytest.mark.parametrize("kind", LENGTHS)
def test_epochs_and_seeds_differ_and_rows_come_in_any_order(cache, kind):
    rows = _rows(cache, kind)
    ids = [rows.record_ids(number) for number in range(rows.count(0))]
    second = [rows.record_ids(rows.count(0) + k) for k in range(rows.count(1))]
    assert ids != second and ids != [_rows(cache, kind, 1).record_ids(0)]
    far = rows.count(0) + rows.count(1) + 5
    fresh, again = _rows(cache, kind).row(far), pickle.loads(pickle.dumps(rows))
    for key, value in rows.row(far).items():
        np.testing.assert_array_equal(value, fresh[key])
        np.testing.assert_array_equal(value, again.row(far)[key])
        np.testing.assert_array_equal(value, rows.rows([3, far, 0])[key][1])


def test_overlong_records_are_skipped_and_counted(cache):
    longest = max(len(record.tokens) for record in cache)
    rows = _rows(cache, "first_fit", row_length=longest - 2)
    too_long = {r.id for r in cache if len(r.tokens) + 2 > longest - 1}
    assert rows.skipped == len(too_long) > 0
    found = [i for number in range(rows.count(0)) for i in rows.record_ids(number)]
    assert sorted(found) == sorted(r.id for r in cache if r.id not in too_long)
    for number in range(rows.count(0)):
        tokens, segments = (rows.row(number)[key] for key in ("tokens", "segments"))
        for segment in range(1, segments.max() + 1):
            _check_samples(cache, tokens[segments == segment])
    with pytest.raises(ValueError, match="row_length"):
        _rows(cache, "first_fit", row_length=9).row(0)


def test_records_of_another_vocabulary_are_refused(cache):
    other = vocab.build(text=300, image=64, classes=4, sentinels=12)
    with pytest.raises(ValueError, match="tokenize_data"):
        Rows(cache, other, INFILL, PackingConfig(kind="first_fit", row_length=9), 0)


def _take(rows, steps, processes, workers, start, indices=None):
    """Batches of all processes, put together again in order of the processes."""
    parts = []
    for index in range(processes) if indices is None else indices:
        stream = batches(
            rows,
            batch_size=8,
            process_index=index,
            process_count=processes,
            workers=workers,
            start_step=start,
        )
        parts.append(list(itertools.islice(stream, steps)))
        stream.close()
    return [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]


def _assert_same(a, b):
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert one[key].dtype == two[key].dtype
            assert one[key].tobytes() == two[key].tobytes(), key


@pytest.mark.parametrize("kind", LENGTHS)
def test_batches_are_rows_in_order_for_any_processes(cache, kind):
    rows = _rows(cache, kind)
    steps = rows.count(0) // 8 + 3  # into the second epoch
    whole = _take(rows, steps, 1, 0, 0)
    for step, batch in enumerate(whole):
        assert batch["row"].dtype == np.int64
        assert batch["row"].tolist() == list(range(step * 8, step * 8 + 8))
        for slot, number in enumerate(batch["row"]):
            for key, value in rows.row(int(number)).items():
                np.testing.assert_array_equal(batch[key][slot], value)
    for processes in (2, 4):
        _assert_same(whole, _take(rows, steps, processes, 0, 0))
    _assert_same(whole[2:], _take(rows, steps - 2, 2, 0, 2))


def test_workers_change_no_byte(cache):
    rows = _rows(cache, "first_fit")
    whole = _take(rows, 5, 1, 0, 1)
    _assert_same(whole, _take(rows, 5, 1, 2, 1))
    _assert_same(whole, _take(rows, 5, 2, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_workers_and_processes_change_no_byte(cache, workers, processes):
    rows = _rows(cache, "concatenate")
    _assert_same(_take(rows, 5, 1, 0, 1), _take(rows, 5, processes, workers, 1))


def test_a_stream_of_so_many_steps_ends_by_itself(cache):
    rows = _rows(cache, "first_fit")
    stream = batches(
        rows,
        **{"batch_size": 2, "process_index": 0, "process_count": 1},
        **{"workers": 0, "start_step": 3, "steps": 2},
    )
    numbers = [batch["row"].tolist() for batch in stream]
    assert numbers == [[6, 7], [8, 9]]


def test_batches_must_divide_among_processes(cache):
    with pytest.raises(ValueError, match="batch_size=6"):
        batches(
            _rows(cache, "first_fit"),
            batch_size=6,
            process_index=0,
            process_count=4,
            workers=0,
            start_step=0,
        )


_NO_BACKEND = """
import sys, tempfile
from tiny_data import LAYOUT, build_cache, make_documents
from cm3leon_jax.data import documents, hashing, icons, infill, packing, pictures
from cm3leon_jax.data import pipeline, records, shapes, sources, tokenization
cache = build_cache(tempfile.mkdtemp(), make_documents(9))
config = infill.InfillConfig(spans=1, segment=0, region=0, region_without_text=0)
pack = packing.PackingConfig(kind="concatenate", row_length=20)
rows = pipeline.Rows(cache, LAYOUT, config, pack, 0)
stream = pipeline.batches(
    rows, batch_size=2, process_index=0, process_count=1, workers=0, start_step=0
)
next(stream)
stream.close()
if "jax" in sys.modules:
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized(), "a backend was started"
print("quiet")
"""


def test_the_data_path_starts_no_backend():
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    result = subprocess.run(
        [sys.executable, "-c", _NO_BACKEND],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "quiet", result.stderr
