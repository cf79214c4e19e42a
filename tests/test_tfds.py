"""Sets built with TensorFlow Datasets itself, in another process; no TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_sets

from cm3leon_jax.data import ingest, sources
from cm3leon_jax.data.documents import Document, Skipped
from cm3leon_jax.data.tfds_sets import TfdsConfig
from cm3leon_jax.evaluation import kept, public_sets
from cm3leon_jax.evaluation.public_job import Job

_, DOCUMENTS = sources.SOURCES["tfds"]
WHOLE = {"image_size": 16, "validation_percent": 0, "test_percent": 0}
# Classes register themselves by their names, so not in this process. Pictures are given
# as open files: TFDS stores those as they are, arrays it would encode by TensorFlow.
PROGRAM = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

F = tfds.features
CAPTIONS = F.Sequence({"id": F.Scalar(np.int64), "text": F.Text()})

class Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.1.0")
    def _info(self):
        features = F.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )
    def _split_generators(self, _):
        part = self._generate_examples
        return {"train": part(0, 6), "val": part(6, 9), "test": part(9, 11)}
    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            file = io.BytesIO()
            Image.fromarray(np.full((20, 30, 3), 20 * i, np.uint8)).save(file, "PNG")
            file.seek(0)
            texts = [{"id": i, "text": f"{word} {i}"} for word in ("first", "second")]
            text = "" if i == 2 else f"caption {i}"
            yield str(i), self.example(i, file, text, texts)

class CocoCaptions(Base):
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014", version="1.1.0")]
    FEATURES = {"image": F.Image(encoding_format="png"), "captions": CAPTIONS,
                "image/filename": F.Text(), "image/id": F.Scalar(np.int64)}
    def example(self, i, file, text, texts):
        return {"image": file, "captions": texts, "image/filename": f"{i}.jpg",
                "image/id": 1000 + i}

class PlainPairs(Base):
    FEATURES = {"picture": F.Text(), "label": F.Text(), "license": F.Text()}
    def example(self, i, file, text, texts):
        data = b"no picture" if i == 4 else file.getvalue()
        return {"picture": data, "label": text, "license": "CC0"}

root, kind = sys.argv[1:]
CocoCaptions(data_dir=root, file_format=kind).download_and_prepare()
PlainPairs(data_dir=root, file_format=kind).download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    (root / "build.py").write_text(PROGRAM)
    command = [sys.executable, "build.py", "data", "array_record"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "data"


def _read(config, split="train"):
    found = list(DOCUMENTS(config, split))
    good = [item for item in found if isinstance(item, Document)]
    return good, {item.id: item.reason for item in found if isinstance(item, Skipped)}


def test_a_preset_needs_no_names_of_features(sets):
    config = TfdsConfig(path=str(sets), name="coco_captions/2014", **WHOLE)
    good, bad = _read(config)
    assert [d.id for d in good] == [str(1000 + i) for i in range(6)] and not bad
    assert [d.texts for d in good] == [[f"first {i}"] for i in range(6)]
    assert all((d.pictures[0] == 20 * i).all() for i, d in enumerate(good))
    assert good[0].pictures[0].shape == (16, 16, 3)
    ids = {split: [d.id for d in _read(config, split)[0]] for split in sources.SPLITS}
    assert ids["validation"] == ["1006", "1007", "1008"]
    assert ids["test"] == ["1009", "1010"]
    each = TfdsConfig(path=str(sets), name="coco_captions/2014", take="each", **WHOLE)
    assert [d.texts[0] for d in _read(each)[0]][:3] == [
        "first 0",
        "second 0",
        "first 1",
    ]
    assert "tensorflow" not in sys.modules


def test_what_is_given_goes_before_the_preset(sets):
    given = TfdsConfig(
        path=str(sets / "coco_captions" / "2014" / "1.1.0"),  # a set's own folder too
        **{"name": "coco_captions", "train": "train[:4]+val", "validation": "test"},
        **{"id": "image/filename", "image_size": 8, "test_percent": 0},
    )
    assert [d.id for d in _read(given)[0]] == [
        f"{i}.jpg" for i in (0, 1, 2, 3, 6, 7, 8)
    ]
    assert [d.id for d in _read(given, "validation")[0]] == ["9.jpg", "10.jpg"]


def test_any_set_by_its_features_with_its_faults_named(sets, tmp_path):
    config = TfdsConfig(
        **{"path": str(sets), "name": "plain_pairs", "image": "picture"},
        **{"captions": ("label",), "licence": "license"},
        **WHOLE,
    )
    kind = sources.OWN["tfds"]
    made = ingest.prepare(kind, config, tmp_path, {"train": None})
    assert made["train"]["documents"] == 4 and made["train"]["skipped"] == 2
    documents = sources.read_documents(tmp_path, "train")
    assert [d.id for d in documents] == [f"train/{i}" for i in (0, 1, 3, 5)]
    assert np.unique(documents[2].pictures[0]).tolist() == [60]
    assert documents[0].metadata == {
        "licence": "CC0",
        "source": "tfds plain_pairs/1.1.0",
    }
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    why = {json.loads(line)["id"]: json.loads(line)["reason"] for line in lines}
    assert why["train/2"] == "empty caption"
    assert why["train/4"].startswith("unusable picture")


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"captions": ("text",)}, "no feature 'text', it has label, license, picture"),
        ({"train": "dev"}, "no split 'dev', it has .*data.settings.train"),
        ({"validation": "dev"}, "no split 'dev'.*data.settings.validation"),
        ({"name": "plain_pear"}, "no such set.*plain_pairs.*tfds build plain_pear "),
        ({"name": "plain_pairs:9.0.0"}, "no such set.*tfds build"),
        ({"name": "coco_captions/2099"}, "no such set.*coco_captions/2014"),
        ({"path": "nowhere"}, "no such set in nowhere .there: none;"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(sets, wrong, words):
    right = {"path": str(sets), "name": "plain_pairs", "image": "picture"}
    config = TfdsConfig(**right | {"captions": ("label",)} | wrong, **WHOLE)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        list(DOCUMENTS(config, "train"))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_by_number_say_how_to_prepare_them(sets, tmp_path):
    copy = tmp_path / "plain_pairs" / "1.1.0"
    copy.mkdir(parents=True)
    for file in (sets / "plain_pairs" / "1.1.0").iterdir():
        text = file.read_bytes()
        if file.suffix == ".json":
            text = text.replace(b"array_record", b"tfrecord")
        (copy / file.name.replace("array_record", "tfrecord")).write_bytes(text)
    config = TfdsConfig(path=str(tmp_path), name="plain_pairs", **WHOLE)
    with pytest.raises(ValueError, match="tfrecord.*--file_format=array_record"):
        list(DOCUMENTS(config, "train"))


# ------------------------------------------------- public sets of evaluation

COCO = """
import json, sys
from pathlib import Path
import numpy as np
import tensorflow_datasets as tfds
sys.path[:0] = [sys.argv[1]]
from tiny_sets import COUNT, coco_files

F = tfds.features

class CocoCaptions(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014", version="1.1.0")]
    def _info(self):
        captions = F.Sequence({"id": np.int64, "text": F.Text()})
        features = {"image": F.Image(encoding_format="jpeg"), "captions": captions,
                    "image/filename": F.Text(), "image/id": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))
    def _split_generators(self, _):
        ends = {"val": (0, 5), "test": (5, 20), "restval": (20, COUNT)}
        return {split: self._generate_examples(*x) for split, x in ends.items()}
    def _generate_examples(self, start, stop):
        for i, (file, said) in enumerate(coco_files(Path(sys.argv[2]))):
            if start <= i < stop:
                texts = [{"id": n, "text": text} for n, text in said]
                yield file.name, {"image": str(file), "captions": texts,
                                  "image/filename": file.name, "image/id": i}

CocoCaptions(data_dir=sys.argv[3], file_format="array_record").download_and_prepare()
"""


def test_protocols_read_what_tfds_prepared_as_the_unpacked_files(tmp_path):
    folder, root = tmp_path / "unpacked", tmp_path / "tfds"
    tiny_sets.coco_prompts(folder)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", COCO, here, folder, root], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = public_sets.read("coco_prompts", folder)
    for place in (root, root / "coco_captions/2014/1.1.0"):
        found = public_sets.read("coco_prompts", place)
        assert found == wanted and kept.digest(found) == kept.digest(wanted)
    config = public_sets.PublicConfig(set="coco_prompts", image_size=8)
    for i in (0, 17):
        one, other = (
            Job(config, x, SimpleNamespace(), wanted, 0).picture(wanted[i].picture)
            for x in (folder, root)
        )
        assert (one == other).all() and one.shape == (8, 8, 3)
    karpathy = public_sets.read("coco_karpathy", root)
    assert [x.id for x in karpathy] == [str(i) for i in range(5, 20)]
    assert len(karpathy[0].references) == 2
    with pytest.raises(FileNotFoundError, match="coco_karpathy.* tfds build coco_cap"):
        public_sets.read("coco_karpathy", tmp_path)
    with pytest.raises(FileNotFoundError, match="lacks v2_Open") as caught:
        public_sets.read("vqa2", root)  # of which TFDS has nothing
    assert "tfds" not in str(caught.value).replace(str(root), "")
