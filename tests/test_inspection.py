"""Token caches are inspected: nothing that is broken passes, nothing sound is named."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_data
import tiny_system
from PIL import Image as Pillow
from test_commands import launch
from tiny_data import GRID, LAYOUT

from cm3leon_jax import stages
from cm3leon_jax.data import inspection
from cm3leon_jax.data.documents import Document, Image, Mask, Text
from cm3leon_jax.data.infill import InfillConfig
from cm3leon_jax.data.mixing import Neighbours
from cm3leon_jax.data.packing import PackingConfig
from cm3leon_jax.data.pipeline import Rows
from cm3leon_jax.data.tokenization import Region

MASKED = InfillConfig(spans=1.0, segment=0.3, region=0.3, region_without_text=0.5)


def _interleaved():
    rng = np.random.default_rng(5)
    return Document(
        (
            Image(rng.integers(0, 256, (8, 8, 3), np.uint8)),
            Text("first this"),
            Image(rng.integers(0, 256, (8, 8, 3), np.uint8)),
            Mask(None, codes=rng.integers(0, 4, (8, 8)).astype(np.int32)),
            Text(""),
        ),
        id="interleaved",
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    documents = [*tiny_data.make_documents(40), _interleaved()]
    return tiny_data.build_cache(tmp_path_factory.mktemp("tokens"), documents)


def _rows(cache, kind="first_fit", neighbours=None):
    packing = PackingConfig(kind=kind, row_length=160)
    return Rows(cache, LAYOUT, MASKED, packing, 0, neighbours)


def _changed(record, **fields):
    return dataclasses.replace(record, **fields)


def _with_token(record, place, value):
    tokens = record.tokens.copy()
    tokens[place] = value
    return _changed(record, tokens=tokens)


def test_sound_records_have_no_faults_and_their_numbers_are_right(cache):
    numbers, faults = inspection.check_records(cache, 1000)
    assert faults == [] and numbers["faulty"] == 0
    assert numbers["records"] == numbers["records looked at"] == 41
    assert numbers["pictures"] == 42 and numbers["regions"] == 84
    lengths = sorted(len(record.tokens) for record in cache.read(range(41)))
    told = numbers["tokens of a record"]
    assert (told["least"], told["most"]) == (lengths[0], lengths[-1])
    assert told["median"] == lengths[20]
    assert 0.1 <= numbers["hidden of a picture"] <= 0.75
    few, _ = inspection.check_records(cache, 7)
    assert few["records"] == 41 and few["records looked at"] == 7


def test_every_broken_invariant_of_a_record_is_named(cache):
    record = cache[1]
    start, stop = record.bounds[1]
    region = record.regions[0]
    outside = np.array([[2, len(record.tokens)]], np.int32)
    for broken, words in (
        (_with_token(record, 0, LAYOUT.size), "ids outside"),
        (_with_token(record, 0, -1), "ids outside"),
        (_changed(record, tokens=record.tokens[:0]), "ids outside"),
        (_changed(record, tokens=record.tokens[:-1]), "segments do not follow"),
        (_changed(record, bounds=record.bounds + [[0, 0], [1, 0]]), "do not follow"),
        (_with_token(record, start - 1, LAYOUT.text[0]), "<break> elsewhere"),
        (_with_token(record, start + 3, LAYOUT.brk), "<break> elsewhere"),
        (_with_token(record, start, LAYOUT.text[0]), "segment 1 is not of one kind"),
        (_with_token(record, 0, LAYOUT.eos), "segment 0 is not of one kind"),
        (_changed(record, regions=(_of(region, segment=0),)), "a region of segment 0"),
        (_changed(record, regions=(_of(region, segment=9),)), "a region of segment 9"),
        (
            _changed(record, regions=(_of(region, cells=np.zeros(GRID, bool)),)),
            "a region",
        ),
        (_changed(record, regions=(_of(region, codes=region.codes + 99),)), "a region"),
        (_changed(record, answers=outside), "an answer"),
    ):
        found = inspection.faults_of(broken, LAYOUT, GRID)
        assert found and words in found[0], (words, found)
    assert inspection.faults_of(record, LAYOUT, (2, 4)) == [
        "a picture of 16 codes, not 8",
        *["a region of segment 1 does not fit it"] * 2,
    ]


def _of(region, **fields):
    return Region(
        **{k: getattr(region, k) for k in ("segment", "cells", "codes")} | fields
    )


def test_names_that_come_twice_and_a_foreign_index_are_named(tmp_path):
    documents = tiny_data.make_documents(6)
    documents[4] = dataclasses.replace(documents[4], id="document 1")
    cache = tiny_data.build_cache(tmp_path, documents)
    path = tmp_path / "train-index.npy"
    index = np.load(path)
    index["maskable"][2] += 1
    np.save(path, index)
    numbers, faults = inspection.check_records(
        type(cache)(tmp_path, "train", layout=LAYOUT, grid=GRID), 100
    )
    assert numbers["faulty"] == 2
    assert faults == [
        "record 2 ('document 2'): the index tells of another record",
        "record 4 ('document 1'): another record has this name",
    ]


@pytest.mark.parametrize("kind", ["first_fit", "concatenate"])
def test_samples_come_apart_again_and_masks_are_counted(cache, kind):
    rows = _rows(cache, kind)
    numbers, faults = inspection.check_rows(rows, 1000)
    assert faults == [] and numbers["rows looked at"] == rows.count(0)
    shares = numbers["moved spans of a sample"]
    assert abs(sum(shares.values()) - 1) < 0.01 and shares["0"] < 1
    if kind == "first_fit":
        assert numbers["samples"] == len(cache)
        tokens = rows.rows(range(rows.count(0)))["tokens"]
        filled = float((tokens != LAYOUT.pad).mean())
        assert numbers["packing efficiency"] == round(filled, 4)
    else:  # whole samples alone
        assert 10 < numbers["samples"] < len(cache)
    broken, real = _rows(cache, kind), rows.rows

    def damaged(chosen):
        batch = real(chosen)
        batch["tokens"][batch["tokens"] == LAYOUT.eoss] = LAYOUT.brk
        return batch

    broken.rows = damaged
    _, faults = inspection.check_rows(broken, 1000)
    assert faults and "holes and moved spans do not match" in faults[0]


def test_neighbours_are_counted(cache, tmp_path):
    table = np.full((len(cache), 2), -1, np.int32)
    table[:, 0] = (np.arange(len(cache)) + 1) % len(cache)
    np.save(tmp_path / "n.npy", table)
    near = Neighbours(tmp_path / "n.npy", cache, documents=1)
    numbers, faults = inspection.check_rows(_rows(cache, neighbours=near), 50)
    assert faults == [] and numbers["neighbours of a record"] == 1
    assert numbers["retrieved tokens"] > 0.2
    counts = numbers["retrieved documents of an epoch"]
    assert counts["documents"] + counts["dropped"] == len(cache)


@pytest.mark.slow
def test_the_command_writes_a_sheet_and_stops_at_damage(tmp_path):
    names = ("prepare_data", "train_text_tokenizer", "train_image_tokenizer")
    stages.run(tiny_system.tiny_config(), tmp_path, (*names, "tokenize_data"))
    inspect = ("inspect_data.py", "--workdir", tmp_path)
    done = launch(*inspect, "--cards", 5)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["records"] == 64 and last["faulty"] == 0, done
    assert 0.3 < last["packing efficiency"] <= 1
    page = (tmp_path / "inspect-train.html").read_text()
    assert page.count("<div class=card>") == 5 and "None." in page
    assert page.count("data:image/png") == 10  # each with a region
    sheet = tmp_path / "new" / "sheet.png"
    done = launch(*inspect, "--split", "validation", "--out", sheet)
    assert done.returncode == 0, done.stderr
    with Pillow.open(sheet) as made:
        assert made.width > 300 and made.height > 300
    index = np.load(tmp_path / "tokens" / "train-index.npy")
    index["length"][3] += 1
    np.save(tmp_path / "tokens" / "train-index.npy", index)
    done = launch(*inspect)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "record 3 " in done.stderr and "tokens" in done.stderr.splitlines()[-1]
    assert "record 3 " in (tmp_path / "inspect-train.html").read_text()
    for wrong, words in (
        (("--out", "sheet.pdf"), "a .html or a .png"),
        (("--split", "tset"), "not tokenized"),
    ):
        done = launch(*inspect, *wrong)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done
