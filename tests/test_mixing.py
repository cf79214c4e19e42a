"""Retrieved documents in rows: what stands in them, how long they are, what is lost."""

import hashlib
import itertools
import pickle
import re

import numpy as np
import pytest
from tiny_data import LAYOUT
from tiny_mixing import (
    INFILL,
    LENGTHS,
    MODES,
    RECORDS,
    cache,
    neighbours,
    rows_of,
    write,
)

from cm3leon_jax.data import infill
from cm3leon_jax.data.mixing import Neighbours
from cm3leon_jax.data.packing import PackingConfig
from cm3leon_jax.data.pipeline import Rows, batches, build_sample

EOS, BRK, EOSS, S0 = LAYOUT.eos, LAYOUT.brk, LAYOUT.eoss, LAYOUT.sentinels[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens")
    write(path)
    return path


def _whole(rows, epoch):
    """The epoch's samples as (tokens, moved, retrieved), from its rows."""
    first = sum(rows.count(e) for e in range(epoch))
    batch = rows.rows(range(first, first + rows.count(epoch)))
    flat = [batch[key].ravel() for key in ("tokens", "moved", "retrieved")]
    used = batch["segments"].ravel() > 0
    tokens, moved, retrieved = (x[used] for x in flat)
    ends = np.flatnonzero(tokens == EOS).reshape(-1, 2)
    assert (ends[1:, 0] == ends[:-1, 1] + 1).all()
    return [
        (tokens[a : b + 1], moved[a : b + 1], retrieved[a : b + 1]) for a, b in ends
    ]


def _versions(record):
    """All that may stand for a record: with its own codes, or one region blanked."""
    found = [record.tokens]
    for region in record.regions:
        start, stop = record.bounds[region.segment]
        tokens = record.tokens.copy()
        codes = LAYOUT.image_ids(region.codes).ravel()
        tokens[start:stop] = np.where(region.cells.ravel(), tokens[start:stop], codes)
        found.append(tokens)
    return found


def _documents(plain, bank, queries):
    """An un-moved sample as (rows of the bank, record): the query comes last."""
    inner = plain[1:-1]
    cuts = np.flatnonzero(inner == BRK)
    parts = np.split(inner, cuts[1::2])  # text <break> image, then a <break> each
    parts = [parts[0], *(part[1:] for part in parts[1:])]
    by_bytes = {r.tokens.tobytes(): i for i, r in enumerate(bank)}
    rows = [by_bytes[np.ascontiguousarray(part).tobytes()] for part in parts[:-1]]
    (record,) = [
        i
        for i, r in enumerate(queries)
        if any(np.array_equal(parts[-1], tokens) for tokens in _versions(r))
    ]
    return rows, record


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("mode", MODES)
def test_samples_are_their_documents_and_uninfill_gives_them_back(folder, kind, mode):
    rows, bank = rows_of(folder, kind, mode), list(cache(folder))
    for epoch in (0, 1):
        seen, found = [], 0
        for tokens, moved, retrieved in _whole(rows, epoch):
            plain = infill.uninfill(tokens, LAYOUT)
            documents, record = _documents(plain, bank, bank)
            allowed = set(rows.neighbours.table[record].tolist()) - {-1}
            assert set(documents) <= allowed and record not in documents
            assert len(documents) == len(set(documents)) == min(3, len(allowed))
            seen.append(record)
            found += len(documents)
            _check_marks(tokens, moved, retrieved, [bank[d].tokens for d in documents])
        assert sorted(seen) == list(range(RECORDS))
        counts = rows.retrieved(epoch)
        assert counts["documents"] == found and counts["dropped"] == 0
        assert counts["missing"] == 3 * RECORDS - found > 0


def _check_marks(tokens, moved, retrieved, documents):
    """`retrieved` is exactly on what came out of the retrieved documents."""
    marked = np.array([*range(1, 1 + sum(len(d) + 1 for d in documents))], int)
    # The same moves on positions instead of tokens: where did each token come from?
    sentinels = np.isin(tokens, LAYOUT.sentinels)
    origin, holes, at = np.full(len(tokens), -1), {}, 0
    first_moved = np.flatnonzero(moved)[0] if moved.any() else len(tokens)
    content = {
        tokens[start]: list(
            itertools.takewhile(lambda i: tokens[i] != EOSS, range(start + 1, 9999))
        )
        for start in np.flatnonzero(sentinels & moved)
    }
    for i in range(len(tokens)):
        if moved[i]:
            continue
        if sentinels[i]:
            assert i < first_moved
            holes[tokens[i]] = at
            inside = content[tokens[i]]
            origin[inside] = np.arange(at, at + len(inside))
            at += len(inside)
        else:
            origin[i] = at
            at += 1
    expected = np.isin(origin, marked)
    for sentinel, start in holes.items():
        for i in np.flatnonzero(tokens == sentinel):
            expected[i] = start in marked
        last = content[sentinel][-1] + 1
        assert tokens[last] == EOSS
        expected[last] = start in marked
    np.testing.assert_array_equal(retrieved, expected)
    assert not retrieved[[0, -1]].any()


@pytest.mark.parametrize("kind", LENGTHS)
def test_the_plan_knows_every_length(folder, kind):
    rows = rows_of(folder, kind)
    numbers = np.arange(RECORDS)
    for epoch in range(3):
        draws = rows._draw(epoch, numbers)
        mixture = rows._mix(epoch, numbers, draws)
        points = infill.place_points(draws, numbers, epoch=epoch, seed=0)
        bank = rows.neighbours.read(mixture.rows)
        for k, record in enumerate(rows.records.read(numbers)):
            documents = [bank[row] for row in mixture.rows[k].tolist() if row >= 0]
            sample = build_sample(record, draws, k, points[k], LAYOUT, documents)
            assert len(sample.tokens) == draws.length[k] + mixture.length[k]


@pytest.mark.parametrize("mode", ["segment", "region"])
def test_segments_and_regions_are_the_querys_as_at_inference(folder, mode):
    rows, bank = rows_of(folder, "first_fit", mode), list(cache(folder))
    alone = 0
    for tokens, moved, retrieved in _whole(rows, 0):
        assert not (moved & retrieved).any()
        plain = infill.uninfill(tokens, LAYOUT)
        documents, _ = _documents(plain, bank, bank)
        before = sum(len(bank[row].tokens) + 1 for row in documents)
        np.testing.assert_array_equal(tokens[: 1 + before], plain[: 1 + before])
        if tokens[1 + before] == S0:  # the form of guidance's unconditional stream
            assert tokens[2 + before] == BRK
            alone += 1
    assert alone


def test_which_and_how_many_are_drawn_by_epoch_and_record(folder):
    numbers = np.tile(np.arange(1, 17), 400)  # none of which is without neighbours
    lengths = np.full(len(numbers), 9)
    options = {"epoch": 0, "seed": 0, "capacity": None}
    near, tokens = neighbours(folder), cache(folder)
    first = near.draw(tokens, numbers, lengths, **options)
    for change in ({"epoch": 1}, {"seed": 1}):
        other = near.draw(tokens, numbers, lengths, **(options | change))
        assert (other.rows != first.rows).any(axis=1).mean() > 0.5
    few = near.draw(tokens, numbers[5:9], lengths[5:9], **options)
    np.testing.assert_array_equal(few.rows, first.rows[5:9])
    # Every one of four neighbours is left out a quarter of the time, at every place.
    full = np.flatnonzero((near.table >= 0).all(axis=1))
    shares = np.zeros((3, 4))
    for epoch in range(300):
        drawn = near.draw(
            tokens, full, np.full(len(full), 9), **(options | {"epoch": epoch})
        )
        shares += (drawn.rows[:, :, None] == near.table[full][:, None]).sum(axis=0)
    np.testing.assert_allclose(shares / (300 * len(full)), 0.25, atol=0.02)
    # From `fewest` on all numbers are alike.
    rng_rows = neighbours(folder, fewest=0)
    many = [
        rng_rows.draw(tokens, full, np.full(len(full), 9), **(options | {"epoch": e}))
        for e in range(300)
    ]
    counts = np.bincount(np.concatenate([(m.rows >= 0).sum(axis=1) for m in many]))
    np.testing.assert_allclose(counts / counts.sum(), 0.25, atol=0.02)
    assert not any(m.missing.any() for m in many)


@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_noise_replaces_neighbours_and_never_by_the_record_itself(folder, noise):
    near, tokens = neighbours(folder, noise=noise), cache(folder)
    exact = neighbours(folder)
    numbers, lengths = np.arange(RECORDS), np.full(RECORDS, 9)
    kept, seen = [], set()
    for epoch in range(100):
        options = {"epoch": epoch, "seed": 0, "capacity": None}
        drawn = near.draw(tokens, numbers, lengths, **options)
        plain = exact.draw(tokens, numbers, lengths, **options)
        np.testing.assert_array_equal(drawn.rows < 0, plain.rows < 0)
        assert (drawn.rows != numbers[:, None]).all() and drawn.rows.max() < RECORDS
        kept.append((drawn.rows == plain.rows)[plain.rows >= 0].mean())
        seen |= set(drawn.rows.ravel().tolist())
    assert abs(np.mean(kept) - (1 - noise)) < 0.03
    assert seen == set(range(-1, RECORDS))


@pytest.mark.parametrize("mode", ["mixed", "spans"])
def test_overlong_samples_lose_whole_documents_first_and_it_is_counted(folder, mode):
    bank = list(cache(folder))
    wide, narrow = (rows_of(folder, "first_fit", mode, row_length=n) for n in (500, 80))
    numbers = np.arange(RECORDS)
    draws = [rows._draw(0, numbers) for rows in (wide, narrow)]
    # No span is given up for a document, nor anything of the query.
    np.testing.assert_array_equal(draws[0].spans, draws[1].spans)
    counts, dropped, samples = narrow.retrieved(0), 0, _whole(narrow, 0)
    assert len(samples) == RECORDS and narrow.skipped == 0
    for tokens, _, _ in samples:
        assert len(tokens) <= 81
        plain = infill.uninfill(tokens, LAYOUT)
        rows, record = _documents(plain, bank, bank)
        full = wide._mix(0, numbers, draws[0]).rows[record]
        full = full[full >= 0].tolist()
        assert [row for row in full if row in rows] == rows  # in order
        lost = [row for row in full if row not in rows]
        assert all(len(tokens) + len(bank[row].tokens) + 1 > 81 for row in lost)
        dropped += len(lost)
    assert counts["dropped"] == dropped > 0
    missing = wide.retrieved(0)["missing"]
    assert counts == {
        "documents": 3 * RECORDS - missing - dropped,
        "missing": missing,
        "dropped": dropped,
    }


def test_records_left_out_retrieve_nothing(folder):
    longest = max(len(record.tokens) for record in cache(folder))
    rows = rows_of(folder, "first_fit", row_length=longest - 2)
    assert rows.skipped > 0
    mixture = rows._mix(0, np.arange(RECORDS), rows._draw(0, np.arange(RECORDS)))
    out = rows._draw(0, np.arange(RECORDS)).length == 0
    assert out.sum() == rows.skipped
    assert (mixture.rows[out] < 0).all() and not mixture.length[out].any()
    assert not mixture.missing[out].any() and not mixture.dropped[out].any()


def test_held_out_records_retrieve_from_the_training_bank(folder):
    rows = rows_of(folder, "first_fit", split="validation")
    bank, queries = list(cache(folder)), list(cache(folder, "validation"))
    for tokens, _, _ in _whole(rows, 0):
        documents, record = _documents(infill.uninfill(tokens, LAYOUT), bank, queries)
        assert set(documents) <= set(rows.neighbours.table[record].tolist())


def test_ids_of_a_row_name_its_documents_too(folder):
    rows = rows_of(folder, "first_fit")
    ids = rows.record_ids(0)
    bank = {record.id: record for record in cache(folder)}
    row = rows.row(0)
    for segment in range(1, row["segments"].max() + 1):
        plain = infill.uninfill(row["tokens"][row["segments"] == segment], LAYOUT)
        documents, record = _documents(plain, list(bank.values()), list(bank.values()))
        names = list(bank)
        assert ids[: 1 + len(documents)] == [names[i] for i in (record, *documents)]
        ids = ids[1 + len(documents) :]
    assert not ids


def _digest(rows):
    batch = rows.rows(range(rows.count(0) + rows.count(1)))
    digest = hashlib.sha256()
    for key, value in sorted(batch.items()):
        digest.update(key.encode() + value.tobytes())
    return digest.hexdigest()[:16]


# Taken before there was any retrieval.
WITHOUT = {"concatenate": "98e54e09bab860bc", "first_fit": "0d9216d3e1343b73"}


@pytest.mark.parametrize("kind, length", [("concatenate", 24), ("first_fit", 70)])
def test_without_neighbours_every_byte_is_as_before(folder, kind, length):
    packing = PackingConfig(kind=kind, row_length=length)
    rows = Rows(cache(folder), LAYOUT, INFILL, packing, 0)
    assert _digest(rows) == WITHOUT[kind]
    assert rows.retrieved(0) == {"documents": 0, "missing": 0, "dropped": 0}


@pytest.mark.parametrize("kind", LENGTHS)
def test_workers_and_processes_change_no_byte(folder, kind):
    rows = rows_of(folder, kind, fewest=1, noise=0.2)
    steps = 4

    def take(processes, workers):
        parts = []
        for index in range(processes):
            stream = batches(
                rows,
                batch_size=4,
                process_index=index,
                process_count=processes,
                workers=workers,
                start_step=rows.count(0) // 4 - 1,  # into the second epoch
                steps=steps,
            )
            parts.append(list(stream))
        return [
            {key: np.concatenate([part[key] for part in step]) for key in step[0]}
            for step in zip(*parts, strict=True)
        ]

    whole = take(1, 0)
    assert whole[0]["retrieved"].dtype == bool and whole[0]["retrieved"].any()
    shares = [(2, 0), (4, 0), *([(1, 2), (2, 1)] if kind == "first_fit" else ())]
    for processes, workers in shares:
        for one, two in zip(whole, take(processes, workers), strict=True):
            assert one.keys() == two.keys()
            for key in one:
                assert one[key].tobytes() == two[key].tobytes(), key
    again = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(again.row(7)["tokens"], rows.row(7)["tokens"])
    assert len(pickle.dumps(rows)) < 20_000


def _saved(folder, tmp_path, change):
    table = np.load(folder / "neighbours-train.npy")
    np.save(tmp_path / "n.npy", change(table))
    near = Neighbours(tmp_path / "n.npy", cache(folder), documents=3)
    near.check(cache(folder))


def _put(table, row, slot, value):
    table[row, slot] = value
    return table


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[:-1], "is of 59 records, split 'train' of .* has 60"),
        (lambda t: _put(t, 4, 1, 60), r"gives record 4 .*60.* but the bank has 60 rec"),
        (lambda t: _put(t, 9, 0, -2), "gives record 9 the neighbours"),
        (lambda t: _put(t, 7, 2, 7), "gives record 7 itself"),
        (lambda t: t.astype(np.int64), "is int64"),
        (lambda t: t[:, 0], r"\[60\], not int32"),
        (lambda t: t[:, :2], "documents=3 .* of the 2 neighbours"),
    ],
)
def test_neighbours_of_other_records_are_refused(folder, tmp_path, change, message):
    _saved(folder, tmp_path, lambda table: table)
    with pytest.raises(ValueError, match=message):
        _saved(folder, tmp_path, change)


def test_bad_settings_and_files_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="build_bank"):
        Neighbours(tmp_path / "none.npy", cache(folder), documents=3)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="damaged"):
        Neighbours(tmp_path / "cut.npy", cache(folder), documents=3)
    for change, message in (
        ({"documents": 5}, "documents=5"),
        ({"documents": 0}, "documents=0"),
        ({"fewest": 4}, "fewest=4"),
        ({"noise": 1.5}, "noise=1.5"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            neighbours(folder, **change)
    other = cache(folder, "validation")
    with pytest.raises(ValueError, match="is of 60 records"):
        neighbours(folder).check(other)
    rows = rows_of(folder, "first_fit")
    rows.neighbours.bank.index = rows.neighbours.bank.index.copy()
    rows.neighbours.bank.index["length"] += 1
    with pytest.raises(ValueError, match="not the one that its index"):
        rows.row(0)
