"""A tiny system with a memory, from documents to answers."""

import json

import numpy as np
import pytest
from PIL import Image as Pillow
from test_commands import launch
from test_memory import retrieval_config

from cm3leon_jax import CM3Leon, stages
from cm3leon_jax.data.sources import read_documents
from cm3leon_jax.evaluation import report
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.system import System
from cm3leon_jax.training import metrics
from cm3leon_jax.training.loss import RETRIEVAL_GROUPS


def _config():
    return retrieval_config(weight=0.1, documents=2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("system")
    stages.run(_config(), path)
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return CM3Leon.load(workdir)


def test_training_has_retrieved_documents_and_tells_of_them(workdir):
    lines = metrics.read(workdir / "pretrain")
    for group in RETRIEVAL_GROUPS:
        assert np.isfinite(lines[0][f"loss/{group}"])
    assert any(f"validation/loss/{RETRIEVAL_GROUPS[0]}" in line for line in lines)
    done = json.loads((workdir / "pretrain" / "DONE.json").read_text())
    counts, documents = done["retrieved"], 120
    assert sum(counts.values()) == 2 * documents and counts["documents"] > documents
    rows = stages.open_rows(CM3Leon.load(workdir).system, workdir, "train")
    assert rows.retrieved(0) == counts


def test_noise_and_weight_reach_training(workdir, tmp_path):
    other = tmp_path / "other"
    folders = ("documents", "text_tokenizer", "image_tokenizer", "tokens")
    for folder in (*folders, "dual_encoder", "bank"):
        (other / folder).parent.mkdir(exist_ok=True)
        (other / folder).symlink_to(workdir / folder, target_is_directory=True)
    stages.run(retrieval_config(weight=1.0, documents=2), other, ["pretrain"])
    light, heavy = (
        [x["loss/query"] for x in metrics.read(path / "pretrain") if "loss/query" in x]
        for path in (workdir, other)
    )
    # The same samples and first weights; what is learnt from them is not the same.
    assert len(light) == len(heavy) > 1
    assert light[0] == pytest.approx(heavy[0])
    assert light[-1] != pytest.approx(heavy[-1], rel=1e-4)
    made = []
    for noise in (0.0, 1.0):
        config = retrieval_config(weight=0.1, documents=2, noise=noise)
        rows = stages.open_rows(System.make(config), workdir, "train")
        made.append([rows.row(g)["tokens"] for g in range(4)])
    assert not np.array_equal(*made)


def test_a_neighbour_file_of_other_records_stops_training(workdir, tmp_path):
    system = CM3Leon.load(workdir).system
    path = workdir / "bank" / "neighbours-train.npy"
    whole = np.load(path)
    try:
        np.save(path, whole[:-1])
        with pytest.raises(ValueError, match="is of 119 records"):
            stages.open_rows(system, workdir, "train")
    finally:
        np.save(path, whole)


def test_documents_are_retrieved_and_used(model, workdir, monkeypatch):
    calls, write = [], Engine.write

    def spy(self, wanted, *rest, **options):
        calls.append([[ids.tolist() for ids in p.streams] for p in wanted])
        return write(self, wanted, *rest, **options)

    monkeypatch.setattr(Engine, "write", spy)
    test = read_documents(workdir / "documents", "test")[:2]
    texts = [document.segments[0].text for document in test]
    images = [Pillow.fromarray(document.segments[1].array) for document in test]
    train = {d.id for d in read_documents(workdir / "documents", "train")}
    for found in (
        model.retrieve(text=texts[0]),
        model.retrieve(image=images[0]),
        model.retrieve(text=texts[0], image=images[0], k=2),
    ):
        assert len(found) == 2 and {d.id for d in found} <= train
    sampler = Sampler(temperature=1.0, guidance=2.0)
    model.text_to_image(texts, sampler=sampler)
    used = model.text_to_image(texts, retrieve=1, sampler=sampler)
    given = [model.retrieve(text=text, k=1) for text in texts]
    same = model.text_to_image(texts, retrieve=given, sampler=sampler)
    assert np.array_equal(used, same) and not model.context.fallbacks
    plain, one, other = calls
    assert one == other
    for before, streams, (document,) in zip(plain, one, given, strict=True):
        (ids,) = model.codec.ids([document])
        for short, long in zip(before, streams, strict=True):
            eos, *rest = short
            assert long == [eos, *ids.tolist(), model.layout.brk, *rest]
    assert len(model.caption(images, retrieve=1, max_text=8)) == 2


def test_the_shell_retrieves_and_the_report_shows_it(workdir, tmp_path):
    out = tmp_path / "made.png"
    done = launch(
        *("sample.py", "--workdir", workdir, "--out", out, "--retrieve", "1"),
        *("--prompt", "a thing at the top left on a white background"),
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["pictures"] == [str(out)] and out.is_file()
    text = report.write(workdir).read_text("utf-8")
    assert '<section id="retrieval">' in text and "itself" in text
