"""Settings: every mistake in a config is an error that names it."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from cm3leon_jax import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"inner.rate={self.rate}: must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    sizes: tuple[tuple[str, int], ...] = ()
    names: tuple[str, ...] = ("a",)
    limit: int | None = None


def test_nested_sections_become_dataclasses():
    section = ConfigDict({"inner": {"rate": 0.25}, "sizes": [["a", 1], ["b", 2]]})
    made = config.make(Outer, section.to_dict(), "outer")
    assert made == Outer(inner=Inner(rate=0.25), sizes=(("a", 1), ("b", 2)))
    assert hash(made) == hash(Outer(inner=Inner(rate=0.25), sizes=made.sizes))


@pytest.mark.parametrize(
    "section, message",
    [
        ({}, "missing setting outer.inner"),
        ({"inner": {}, "sized": ()}, "unknown setting outer.sized"),
        ({"inner": {"rat": 1.0}}, "unknown setting outer.inner.rat; .* has rate"),
        ({"inner": {"rate": 0.0}}, "in outer.inner: inner.rate=0.0: must be positive"),
        ({"inner": {"rate": "0.1"}}, "outer.inner.rate='0.1' must be a number"),
        ({"inner": {"rate": True}}, "outer.inner.rate=True must be a number"),
        ({"inner": 3}, "outer.inner=3 must be a section"),
        ({"inner": {}, "limit": 1.5}, "outer.limit=1.5 must be a whole number or None"),
        ({"inner": {}, "sizes": 3}, "outer.sizes=3 must be"),
        ({"inner": {}, "names": (1,)}, r"outer.names=\(1,\) must be"),
    ],
)
def test_mistakes_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        config.make(Outer, section, "outer")


def test_whole_numbers_become_floats_where_a_float_is_wanted():
    made = config.make(Inner, {"rate": 1}, "inner")
    assert type(made.rate) is float


def test_defaults_are_written_out():
    assert config.complete(Outer, {"inner": {}, "sizes": (("a", 1),)}) == {
        "inner": {"rate": 0.5},
        "sizes": (("a", 1),),
        "names": ("a",),
        "limit": None,
    }


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    config.write_whole(tmp_path / "f", "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        config.write_whole(tmp_path / "f", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"
    (tmp_path / config.FILE).write_text('{"a"')
    with pytest.raises(ValueError, match="config.json is damaged.*give --config"):
        config.read(tmp_path)


def test_config_survives_the_work_directory(tmp_path):
    value = {"a": {"b": [1, 2]}, "c": "d"}
    config.write(tmp_path / "new", value)
    assert config.read(tmp_path / "new") == value
    assert config.config_hash(value) == config.config_hash(
        {"c": "d", "a": {"b": (1, 2)}}
    )
    assert config.config_hash(value) != config.config_hash({"c": "e"})


def test_missing_work_directory_says_the_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a work directory; make one with"):
        config.read(tmp_path)
