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
        ({"inner": {"rate": 0.0}}, "inner.rate=0.0: must be positive"),
    ],
)
def test_mistakes_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        config.make(Outer, section, "outer")


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
