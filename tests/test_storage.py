"""A work directory in a bucket, which here is fsspec's memory or a folder."""

import json
import subprocess
import sys
import time

import fsspec
import pytest
import tiny_job

from cm3leon_jax import storage
from cm3leon_jax.storage import Mirror


@pytest.fixture
def url():
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield "memory://bucket/runs/one"
    memory.store.clear()


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / storage.MANIFEST
    }


def put(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_folder_goes_to_the_bucket_and_comes_back_elsewhere(url, tmp_path):
    first = Mirror(url, tmp_path / "a")
    with first.kept() as folder:
        assert not contents(folder)
        put(folder, config="1", pretrain__checkpoints__4__data="four")
        put(folder, **{"x.orbax-checkpoint-tmp-1/data": "half"})
    with Mirror(url, tmp_path / "b").kept() as folder:
        assert contents(folder) == {
            "config": "1",
            "pretrain/checkpoints/4/data": "four",
        }
        put(folder, config="2", pretrain__checkpoints__8__data="eight")
        (folder / "pretrain/checkpoints/4/data").unlink()
    first.pull()  # what is newer there comes, what is gone there goes
    assert contents(first.local) == {
        "config": "2",
        "pretrain/checkpoints/8/data": "eight",
        "x.orbax-checkpoint-tmp-1/data": "half",
    }
    left = {path.rsplit("/", 1)[-1] for path in first._fs.find(first._root)}
    assert left == {"config", "data", storage.MANIFEST}


def killed(mirror, **files):
    """What a machine has that was lost before it could push these files."""
    put(mirror.local, **files)
    return mirror


def test_what_was_never_pushed_is_kept(url, tmp_path):
    mirror = killed(Mirror(url, tmp_path), pretrain__checkpoints__900__state="900")
    mirror.pull()  # the bucket is new
    assert contents(mirror.local) == {"pretrain/checkpoints/900/state": "900"}
    mirror.push()
    kept = {"pretrain/checkpoints/960/state": "960", "metrics": "960"}
    put(mirror.local, metrics="900")
    mirror.push()
    killed(mirror, pretrain__checkpoints__960__state="960", metrics="960").pull()
    assert contents(mirror.local) == kept | {"pretrain/checkpoints/900/state": "900"}
    mirror._fs.rm_file(mirror._at(storage.MANIFEST))  # somebody has cleared it
    mirror.pull()
    assert contents(mirror.local).items() >= kept.items()


def test_what_another_machine_has_gone_on_without_is_put_aside(url, tmp_path):
    """Never mixed: checkpoints of two runs would be taken for one's."""
    first, second = Mirror(url, tmp_path / "a"), Mirror(url, tmp_path / "b")
    put(first.local, config="1", done="1", same="1")
    first.push()
    with second.kept() as folder:
        put(folder, config="2 of b")
        (folder / "done").unlink()
    killed(first, checkpoint__900="900", config="1 of a").pull()
    assert contents(first.local) == {"config": "2 of b", "same": "1"}
    [aside] = set((tmp_path / "a").iterdir()) - {first.local}
    assert contents(aside) == {"checkpoint/900": "900", "config": "1 of a"}


def test_a_bucket_that_cannot_be_written_is_named_before_the_work(
    url, tmp_path, monkeypatch
):
    mirror = killed(Mirror(url, tmp_path), checkpoint__900="900")

    def missing(*_, **__):
        raise FileNotFoundError("no such bucket")

    monkeypatch.setattr(mirror._fs, "pipe_file", missing)
    with pytest.raises(OSError, match=f"{url} cannot be written.*no such bucket"):
        with mirror.kept():
            raise AssertionError("begun")
    assert contents(mirror.local) == {"checkpoint/900": "900"}


def test_only_what_has_changed_is_copied(url, tmp_path, monkeypatch):
    mirror = Mirror(url, tmp_path)
    put(mirror.local, a="1", b="2")
    mirror.push()
    copied, really = [], mirror._fs.put_file
    monkeypatch.setattr(
        mirror._fs, "put_file", lambda *a, **k: copied.append(a[1]) or really(*a, **k)
    )
    put(mirror.local, b="3")
    mirror.push()
    assert [name.rsplit("/", 1)[-1] for name in copied] == ["b"]


def test_it_is_pushed_while_the_command_goes_on_and_when_it_fails(url, tmp_path):
    mirror = Mirror(url, tmp_path / "a")
    other = Mirror(url, tmp_path / "b")
    with pytest.raises(KeyError):
        with mirror.kept(every=0.05) as folder:
            put(folder, early="1")
            deadline = time.monotonic() + 60
            while contents(other.local) != {"early": "1"}:
                assert time.monotonic() < deadline
                time.sleep(0.02)
                other.pull()
            put(folder, late="2")
            raise KeyError
    other.pull()
    assert contents(other.local) == {"early": "1", "late": "2"}


def test_a_push_that_is_cut_off_is_never_seen(url, tmp_path, monkeypatch):
    mirror = Mirror(url, tmp_path / "a")
    put(mirror.local, a="1", b="1")
    mirror.push()
    put(mirror.local, a="22", b="22", c="22")
    really = mirror._fs.put_file

    def killed(path, *rest, **more):
        if path.endswith("b"):
            raise KeyboardInterrupt
        return really(path, *rest, **more)

    monkeypatch.setattr(mirror._fs, "put_file", killed)
    with pytest.raises(KeyboardInterrupt):
        mirror.push()
    monkeypatch.setattr(mirror._fs, "put_file", really)
    other = Mirror(url, tmp_path / "b")
    other.pull()
    assert contents(other.local) == {"a": "22", "b": "1"}  # each whole, nothing new
    mirror.push()
    other.pull()
    assert contents(other.local) == {"a": "22", "b": "22", "c": "22"}


def test_a_bucket_that_stutters_is_asked_again(url, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    mirror = Mirror(url, tmp_path)
    put(mirror.local, a="1")
    really, failures = mirror._fs.put_file, [TimeoutError("503"), OSError("reset")]

    def flaky(*arguments, **more):
        if failures:
            raise failures.pop()
        return really(*arguments, **more)

    monkeypatch.setattr(mirror._fs, "put_file", flaky)
    mirror.push()
    assert waits == [1.0, 2.0] and not failures
    monkeypatch.setattr(mirror._fs, "put_file", lambda *a, **k: 1 / 0)
    put(mirror.local, a="2")
    with pytest.raises(OSError, match=rf"{url} cannot be written.*bucket exists"):
        mirror.push()
    assert len(waits) == 2 + storage.TRIES - 1


def test_unknown_and_forbidden_buckets_are_named(url, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ftpx://there.*launch/setup.sh cloud"):
        Mirror("ftpx://there/run", tmp_path)
    mirror = Mirror(url, tmp_path)

    def refuse(*_, **__):
        raise PermissionError("403")

    monkeypatch.setattr(mirror._fs, "cat_file", refuse)
    with pytest.raises(OSError, match="cannot be read .*403"):
        mirror.pull()


def test_commands_take_a_bucket_as_their_work_directory(tmp_path):
    (tmp_path / "bucket").mkdir()
    command = [sys.executable, "launch/prepare_data.py"]
    command += ["--config=configs/shapes.py:quick", f"--workdir=file://{tmp_path}/run"]
    command += ["--config.data.train=40", "--config.data.validation=8"]
    command += ["--config.data.test=8"]
    for cache in ("a", "b"):  # the second machine finds it done
        done = subprocess.run(
            command,
            cwd=tiny_job.ROOT,
            env=tiny_job.environment() | {"CM3LEON_CACHE": str(tmp_path / cache)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout.splitlines()[-1])
        assert made["prepare_data"]["train"]
    assert (tmp_path / "run" / "documents" / "DONE.json").is_file()
    folders = [path.name for path in (tmp_path / "b").iterdir()]
    assert len(folders) == 1 and folders[0].startswith("run-")
