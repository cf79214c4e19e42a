"""`launch/plan.py`: its last line has, as JSON, all that the table above it shows."""

import json
import types

import jax
import pytest
import tiny_script
import tiny_topology
from absl import flags
from absl.testing import flagsaver

from cm3leon_jax.parallel import topologies
from configs import shapes

UNITS = {"TFLOP": 1e12, "ms": 1e-3, "MiB": 2**20, "GiB": 2**30}


@pytest.fixture(scope="module")
def script():
    """The script as a module, without running it."""
    cached = jax.config.jax_enable_compilation_cache
    with tiny_script.loaded("plan") as module:
        yield module
    jax.config.update("jax_enable_compilation_cache", cached)


@pytest.mark.parametrize(
    "stage, rows, about",
    [
        ("embed", 2, {"pairs_per_second", "parameters_bytes", "batch_bytes"}),
        ("search", 1024, {"queries_per_second", "bank_bytes", "bank_rows"}),
        ("decode", 8, {"tokens_per_second", "cache_bytes", "streams", "cache"}),
    ],
)
def test_the_json_has_what_the_table_shows(
    script, stage, rows, about, monkeypatch, capsys
):
    config = shapes.get_config("study")
    with config.unlocked():
        config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    monkeypatch.setattr(script, "CONFIG", types.SimpleNamespace(value=config), False)
    monkeypatch.setattr(topologies, "find", {"tiny": tiny_topology.CPU}.__getitem__)
    with flagsaver.flagsaver():
        given = ("--stage", stage, "--topology", "tiny", "--rows_per_device", str(rows))
        flags.FLAGS(["plan.py", "--workdir", ".", *given])
        found = json.loads(json.dumps(script.main(), allow_nan=False))
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "predicted for 8 devices of cpu"
    assert (found["predicted"], found["devices"], found["topology"]) == (True, 8, "cpu")
    unseen = set(found) - {"predicted", "devices", "topology"}
    for line in lines:
        name, value = line[2:30].strip(), line[30:].strip()
        key, known = field(name, value, found)
        unseen.discard(key)
        same(value, known)
    # Nothing is in the JSON alone, but that there are no collectives.
    assert not [key for key in unseen if found[key] != {}]
    assert found["stage"] == stage and found["fits"]
    assert about <= set(found)
    assert {"total_bytes", "temporaries_bytes", "flops", "bound"} <= set(found)
    assert set(found["seconds_at_least"]) == {"compute", "memory", "network", "step"}


def field(name, value, found):
    """Where the JSON has a line of the table."""
    for ending, key in ((" (sent)", "collective_bytes"), (", at least", "seconds")):
        if name.endswith(ending):
            key = "seconds_at_least" if key == "seconds" else key
            return key, found[key][name.removesuffix(ending)]
    key = f"{name}_bytes" if value.endswith("iB") else name  # `cache` is two lines
    return key, found[key]


def same(shown, known):
    number, _, unit = shown.partition(" ")
    if isinstance(known, dict):
        assert shown == " ".join(f"{axis}={size}" for axis, size in known.items())
    elif unit:  # of three or four figures, or with two decimals
        wanted = pytest.approx(known / UNITS[unit], rel=1e-3, abs=5.1e-3)
        assert float(number) == wanted
    elif isinstance(known, float):
        assert float(shown) == pytest.approx(known, rel=1e-2)
    else:
        assert shown == str(known)
