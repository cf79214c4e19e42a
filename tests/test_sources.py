"""Readers of strangers' files: good ones come through, bad ones are named, no crash."""

import dataclasses
import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow

from cm3leon_jax.data import ingest, sources
from cm3leon_jax.data.documents import Document, Skipped, Text
from cm3leon_jax.data.files import FolderConfig, WebdatasetConfig
from cm3leon_jax.data.filters import IngestConfig
from cm3leon_jax.data.parts import split_of
from cm3leon_jax.data.pictures import read_picture
from cm3leon_jax.data.shards import ShardWriter, shard_path

SIZE = 16
FOLDER, WEBDATASET = (sources.SOURCES[kind][1] for kind in ("folder", "webdataset"))


def _encode(picture, kind, **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def _rgb(width=40, height=30):
    rng = np.random.default_rng(width * height)
    return Pillow.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def _png_header(width, height):
    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def _files():
    """{file name: bytes}, and the names that can be used."""
    jpeg = _encode(_rgb(200, 150), "JPEG")
    exif = Pillow.Exif()
    exif[0x0112] = 6
    sixteen = Pillow.fromarray(np.linspace(0, 65535, 400).reshape(20, 20).astype("u2"))
    good = {
        "jpeg.jpg": jpeg,
        "turned.jpg": _encode(_rgb(), "JPEG", exif=exif),
        "cmyk.jpeg": _encode(_rgb().convert("CMYK"), "JPEG"),
        "grey.jpg": _encode(_rgb().convert("L"), "JPEG"),
        "rgba.png": _encode(_rgb().convert("RGBA"), "PNG"),
        "palette.png": _encode(_rgb().convert("P"), "PNG", transparency=3),
        "sixteen.png": _encode(sixteen, "PNG"),
        "bits.png": _encode(_rgb().convert("1"), "PNG"),
        "one_pixel.png": _encode(_rgb(1, 1), "PNG"),
        "strip.png": _encode(_rgb(1, 3000), "PNG"),
        "modern.webp": _encode(_rgb(), "WEBP", lossless=True),
        # Their first frame.
        "moving.webp": _encode(_rgb(), "WEBP", save_all=True, append_images=[_rgb()]),
        "frames.png": _encode(_rgb(), "PNG", save_all=True, append_images=[_rgb()]),
    }
    bad = {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "noise.jpg": b"\xff\xd8 not a picture",
        "nothing.png": b"",
        "huge.png": _png_header(10_000, 5_000),
        "enormous.png": _png_header(60_000, 60_000),
        "broken.webp": _encode(_rgb(), "WEBP")[:60],
    }
    files = good | bad
    for name in list(files):
        files[name.split(".")[0] + ".txt"] = f" caption of {name}\n".encode()
    files |= {
        "latin.jpg": jpeg, "latin.txt": "é".encode("latin-1"),
        "empty.jpg": jpeg, "empty.txt": b"",
        "blank.jpg": jpeg, "blank.txt": b" \n\t ",
        "uncaptioned.jpg": jpeg,
        "unpictured.txt": b"only words",
        "twice.jpg": jpeg, "twice.png": good["rgba.png"], "twice.txt": b"which?",
        "bom.jpg": jpeg, "bom.txt": b"\xef\xbb\xbfwith a mark",
    }  # fmt: skip
    return files, {name.split(".")[0] for name in good} | {"bom"}


def _as_folder(path, files):
    for name, data in files.items():
        (path / "deep").mkdir(parents=True, exist_ok=True)
        (path / "deep" / name).write_bytes(data)
    (path / "README.md").write_text("not data")
    return FolderConfig(
        path=str(path), image_size=SIZE, validation_percent=0, test_percent=0
    )


def _as_tar(path, files):
    path.mkdir()
    with tarfile.open(path / "part-0.tar", "w") as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    return WebdatasetConfig(
        path=str(path), image_size=SIZE, validation_percent=0, test_percent=0
    )


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_bad_files_are_named_and_good_ones_come_through(tmp_path, kind):
    files, usable = _files()
    config = {"folder": _as_folder, "webdataset": _as_tar}[kind](tmp_path / "x", files)
    documents = sources.SOURCES[kind][1]
    found = list(documents(config, "train"))
    good = [item for item in found if isinstance(item, Document)]
    bad = {item.id.split("/")[-1]: item.reason for item in found if item not in good}
    assert {item.id.split("/")[-1] for item in good} == usable
    names = {name.split(".")[0] for name in files}
    assert set(bad) == names - usable and all(bad.values())
    assert "50000000" in bad["huge"] or "10000x5000" in bad["huge"]
    assert "empty" in bad["empty"] and "UTF-8" in bad["latin"]
    for item in good:
        text, image = item.segments
        assert text.text == text.text.strip()
        assert image.array.shape == (SIZE, SIZE, 3) and image.array.dtype == np.uint8
    again = [item.id for item in documents(config, "train")]
    assert again == [item.id for item in found]


def test_links_to_nowhere_folders_and_odd_names_end_nothing(tmp_path):
    png, root = _encode(_rgb(), "PNG"), tmp_path / "x"
    root.mkdir()
    odd = os.fsdecode(b"\xffodd")  # a name that is not UTF-8
    for name in ("fine", "folder", "nowhere", odd):
        (root / f"{name}.txt").write_text("words")
        if name in ("fine", odd):
            (root / f"{name}.png").write_bytes(png)
    (root / "folder.png").mkdir()
    (root / "nowhere.png").symlink_to("there is none")
    config = FolderConfig(
        path=str(root), image_size=SIZE, validation_percent=0, test_percent=0
    )
    kind, out = sources.OWN["folder"], tmp_path / "out"
    made = ingest.prepare(kind, config, out, {"train": None}, IngestConfig(workers=0))
    found = [document.id for document in sources.read_documents(out, "train")]
    assert "fine" in found and made["train"]["documents"] == len(found)
    lines = (out / "skipped.jsonl").read_text().splitlines()
    names = {json.loads(line)["id"]: json.loads(line)["reason"] for line in lines}
    assert {"folder", "nowhere"} <= names.keys() and all(names.values())
    assert sorted([*found, *names]) == sorted(["fine", "folder", "nowhere", odd])


def test_a_truncated_tar_keeps_what_came_before(tmp_path):
    files, _ = _files()
    config = _as_tar(tmp_path / "x", files)
    path = tmp_path / "x" / "part-0.tar"
    whole = list(WEBDATASET(config, "train"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "x" / "part-1.tar").write_bytes(b"no tar at all" * 100)
    found = list(WEBDATASET(config, "train"))
    assert 2 < len(found) < len(whole)
    assert [item.id for item in found[-1:]] == ["part-1"]
    assert any("damaged" in item.reason for item in found if isinstance(item, Skipped))


def test_a_tar_sorted_by_suffix_gives_the_same_pairs(tmp_path):
    jpeg = _encode(_rgb(), "JPEG")
    files = {f"{i}.{kind}": jpeg for i in range(4) for kind in ("jpg",)}
    files |= {f"{i}.txt": f"caption {i}".encode() for i in range(4)}
    whole = _as_tar(tmp_path / "x", files)
    with tarfile.open(tmp_path / "x" / "part-0.tar", "w") as tar:
        for name in sorted(files, key=lambda name: name.split(".")[1]):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    found = list(WEBDATASET(whole, "train"))
    assert [item.segments[0].text for item in found] == [
        f"caption {i}" for i in range(4)
    ]


def test_pictures_are_converted_faithfully():
    white_half = np.zeros((8, 8, 4), np.uint8)
    white_half[:, :4] = (10, 20, 30, 255)
    found = read_picture(_encode(Pillow.fromarray(white_half), "PNG"), 8)
    assert (found[:, :4] == (10, 20, 30)).all() and (found[:, 4:] == 255).all()
    grey = np.full((8, 8), 32_768, np.uint16)
    assert (read_picture(_encode(Pillow.fromarray(grey), "PNG"), 8) == 128).all()
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    found = read_picture(_encode(Pillow.fromarray(wide), "PNG"), 8)
    assert (found[:, 1:-1] == 200).all()
    exif = Pillow.Exif()
    exif[0x0112] = 6  # stored on its side: the left column is shown on top
    side = np.zeros((8, 8, 3), np.uint8)
    side[:, 0] = 255
    found = read_picture(_encode(Pillow.fromarray(side), "PNG", exif=exif), 8)
    assert (found[0] == 255).all() and (found[1:] == 0).all()


def test_splits_depend_on_names_alone():
    config = FolderConfig(
        path="x", image_size=8, validation_percent=10, test_percent=20
    )
    splits = [split_of(f"name {i}", config) for i in range(4000)]
    counts = {split: splits.count(split) / 4000 for split in sources.SPLITS}
    assert abs(counts["test"] - 0.2) < 0.03 and abs(counts["validation"] - 0.1) < 0.03
    with pytest.raises(ValueError, match="test_percent"):
        FolderConfig(path="x", image_size=8, validation_percent=60, test_percent=50)


def test_missing_folders_are_named():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        config = FolderConfig(path="nowhere", image_size=8)
        list(FOLDER(config, "train"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        config = WebdatasetConfig(path="nowhere", image_size=8)
        list(WEBDATASET(config, "train"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Counting:
    count: int = 11


def _counting(config, split):
    for i in range(config.count):
        yield Skipped(f"{split}{i}", "odd") if i % 4 == 3 else _text(f"{split}{i}")


def _text(name):
    return Document((Text(name),), id=name, metadata={"n": 1})


def test_prepared_documents_come_back_in_order_with_counts(tmp_path):
    summary = sources.prepare(
        _Counting(), _counting, tmp_path, {"train": None, "test": 3, "validation": 0}
    )
    assert summary["train"]["documents"] == 9 and summary["train"]["skipped"] == 2
    assert summary["test"]["documents"] == 3
    assert len(sources.read_documents(tmp_path, "validation")) == 0
    train = sources.read_documents(tmp_path, "train")
    ids = [f"train{i}" for i in range(11) if i % 4 != 3]
    assert [document.id for document in train] == ids
    assert train[-1].id == ids[-1] and [d.id for d in train[2:4]] == ids[2:4]
    log = (tmp_path / "skipped.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["id"] for line in lines] == ["train3", "train7"]
    assert (tmp_path / "train-00003-of-00004.array_record").is_file()


def _jpegs(path, names, captions=True):
    path.mkdir()
    for name in names:
        (path / f"{name}.jpg").write_bytes(_encode(_rgb(), "JPEG"))
        if captions:
            (path / f"{name}.txt").write_text(f"caption {name}")


def test_an_empty_split_is_refused_with_its_mend(tmp_path):
    splits = {"train": None, "validation": None, "test": None}
    _jpegs(tmp_path / "few", range(3))
    config = FolderConfig(path=str(tmp_path / "few"), image_size=8, test_percent=0)
    with pytest.raises(ValueError, match="raise data.settings.validation_percent"):
        sources.prepare(config, FOLDER, tmp_path / "a", splits)
    assert not (tmp_path / "a" / "validation.json").exists()
    _jpegs(tmp_path / "bare", range(3), captions=False)
    config = dataclasses.replace(config, path=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="'train' has no documents; 3 of 3 skipped"):
        sources.prepare(config, FOLDER, tmp_path / "b", splits)
    log = (tmp_path / "b" / "skipped.jsonl").read_text().splitlines()
    assert len(log) == 3


def test_a_large_loss_for_one_reason_is_said(tmp_path, capsys):
    _jpegs(tmp_path / "x", range(5))
    for name in range(3):
        (tmp_path / "x" / f"{name}.txt").unlink()
    config = FolderConfig(
        **{"path": str(tmp_path / "x"), "image_size": 8},
        **{"validation_percent": 0, "test_percent": 0},
    )
    for directory in ("a", "b"):
        sources.prepare(config, FOLDER, tmp_path / directory, {"train": None})
        line = "more than half left out; 3 of 3 skipped because: no caption"
        assert (line in capsys.readouterr().err) == (directory == "a")
        (tmp_path / "x" / "0.txt").write_text("found again")


def test_texts_are_read_without_pictures(tmp_path, monkeypatch):
    _jpegs(tmp_path / "x", range(5))
    config = FolderConfig(
        **{"path": str(tmp_path / "x"), "image_size": 8},
        **{"validation_percent": 0, "test_percent": 0},
    )
    sources.prepare(config, FOLDER, tmp_path / "d", {"train": None})
    wanted = [
        d.segments[0].text for d in sources.read_documents(tmp_path / "d", "train")
    ]
    monkeypatch.setattr(Pillow, "open", None)
    assert list(sources.read_texts(tmp_path / "d", "train")) == wanted
    with ShardWriter(shard_path(tmp_path / "d", "train", 1, 4)) as writer:
        writer.write(b"?")
    with pytest.raises(ValueError, match="train-00001-of-00004.array_record record 0"):
        list(sources.read_texts(tmp_path / "d", "train"))


def test_prepare_goes_on_where_it_was_interrupted(tmp_path):
    def full_disk(config, split):
        yield _text("first")
        if split == "test":
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        sources.prepare(_Counting(), full_disk, tmp_path, {"train": None, "test": None})
    assert not list(tmp_path.glob("test*")) and not list(tmp_path.glob("*.partial"))
    before = (tmp_path / "train-00000-of-00004.array_record").stat().st_mtime_ns
    splits = {"train": None, "test": None}
    summary = sources.prepare(_Counting(), _counting, tmp_path, splits)
    assert summary["train"]["documents"] == 1 and summary["test"]["documents"] == 9
    after = (tmp_path / "train-00000-of-00004.array_record").stat().st_mtime_ns
    assert before == after
    with pytest.raises(ValueError, match="other settings"):
        sources.prepare(_Counting(count=5), _counting, tmp_path, splits)


def test_foreign_and_damaged_shards_are_named(tmp_path):
    sources.prepare(_Counting(), _counting, tmp_path, {"train": None})
    with ShardWriter(shard_path(tmp_path, "train", 1, 4)) as writer:
        writer.write(b"\x81\xa1a\x01")
        writer.write(b"?")
    train = sources.read_documents(tmp_path, "train")
    assert train[0].id == "train0"
    with pytest.raises(ValueError, match="train-00001-of-00004.array_record record 1"):
        train[5]
    path = shard_path(tmp_path, "train", 2, 4)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="train-00002-of-00004.*damaged"):
        sources.read_documents(tmp_path, "train")
    path.unlink()
    with pytest.raises(ValueError, match="train-00002-of-00004"):
        sources.read_documents(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="prepare_data"):
        sources.read_documents(tmp_path, "test")


def test_a_full_disk_is_an_os_error_and_keeps_finished_shards(tmp_path):
    resource = pytest.importorskip("resource")
    import signal

    kept = shard_path(tmp_path, "train", 0, 4)
    with ShardWriter(kept) as writer:
        writer.write(b"x")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    noise = np.random.default_rng(0).bytes(3_000_000)
    try:
        with pytest.raises(OSError, match="free space"):
            with ShardWriter(shard_path(tmp_path, "train", 1, 4)) as writer:
                for i in range(100):
                    writer.write(noise[i * 30_000 : (i + 1) * 30_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
