import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from cm3leon_jax.parallel.rules import Rules
from cm3leon_jax.training import loop, metrics, preemption, watch
from cm3leon_jax.training.checkpoint import Checkpoints, latest_step
from cm3leon_jax.training.metrics import MetricWriter, Progress, Work
from cm3leon_jax.training.prefetch import Prefetch
from cm3leon_jax.training.recorder import Recorder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """A state that is no TrainState: two parameters with two optimizers' slots."""

    step: jax.Array
    a: jax.Array
    b: dict[str, jax.Array]


def init(key):
    return Pair(jnp.int32(0), jax.random.normal(key, (4,)), {"slot": jnp.zeros((2,))})


def update(state, batch):
    value = jnp.mean(batch["x"])
    new = Pair(state.step + 1, state.a + value, {"slot": state.b["slot"] - value})
    return new, {"loss": value * jnp.sum(new.a), "grad_norm_b": value}


def feed(start, *, bad=None, end=10**9):
    for t in range(start, end):
        x = np.full((8, 3), np.nan if t == bad else t, np.float32)
        yield {"x": x, "row": np.arange(8) + 8 * t, "note": "stays on the host"}


def train(directory, steps=10, **changes):
    config = {"steps": steps, "log_every": 2, "checkpoint_every": 4}
    config |= changes.pop("loop", {})
    arguments = {"batches": feed, "batch_size": 8, "step_fn": update}
    arguments |= {"settings": {"x": 1}} | changes
    return loop.run(
        config=loop.LoopConfig(**config),
        init_fn=init,
        directory=directory,
        mesh=tiny.mesh_of(8, 1, 1),
        rules=Rules(),
        work=Work(unit="images", per_step=8, flops_per_step=1e6, peak_flops=1e9),
        **arguments,
    )


def test_any_state_trains_logs_and_saves(tmp_path):
    scores = []

    def evaluate(state):
        scores.append(int(state.step))
        return {"sum": float(state.b["slot"].sum())}

    state = train(tmp_path, evaluations={"check": (4, evaluate)})
    assert int(state.step) == 10 and float(state.b["slot"][0]) == -45.0
    assert scores == [4, 8, 10]  # every 4 updates, and at the end
    lines = metrics.read(tmp_path)
    logged = [line["step"] for line in lines if "loss" in line]
    assert logged == [2, 4, 6, 8, 10]
    checks = {line["step"]: line["check/sum"] for line in lines if "check/sum" in line}
    assert checks == {4: -12.0, 8: -56.0, 10: -90.0}
    assert all(line["images_per_second"] > 0 for line in lines[1:] if "loss" in line)
    assert lines[-2]["mfu"] == pytest.approx(
        lines[-2]["images_per_second"] / 8 * 1e6 / 1e9
    )
    assert latest_step(tmp_path) == 10
    assert any((tmp_path / "tensorboard").iterdir())
    again = train(tmp_path)  # is done: trains no more, returns what was saved
    np.testing.assert_array_equal(again.a, state.a)
    assert metrics.read(tmp_path) == lines


def test_a_finished_run_is_not_shortened(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(ValueError, match="already at step 4, loop.steps=2"):
        train(tmp_path, steps=2)


def bad_lines(directory):
    lines = (directory / watch.FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_bad_batch_stops_the_run_and_names_its_records(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 7: .* nan.*bad_batches"):
        train(
            tmp_path,
            batches=lambda start: feed(start, bad=6),
            batch_ids=lambda host: [f"record {row}" for row in host["row"]],
        )
    [report] = bad_lines(tmp_path)
    assert (report["step"], report["batch"], report["skipped"]) == (7, 6, False)
    assert report["rows"] == list(range(48, 56))
    assert report["records"][0] == "record 48"
    assert latest_step(tmp_path) == 4
    state = train(tmp_path)  # mended
    assert np.isfinite(state.a).all() and int(state.step) == 10


def without(*left_out):
    """The batches as they would be without some of them."""

    def batches(start):
        kept = (batch for t, batch in enumerate(feed(0)) if t not in left_out)
        return itertools.islice(kept, start, None)

    return batches


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_a_bad_batch_is_skipped_and_the_run_goes_on_without_it(tmp_path, kind):
    size = {"nan": float("nan"), "spike": 50.0}[kind]

    def calm(state, batch):
        new, values = update(state, batch)
        bad = (jnp.mean(batch["x"]) == 26) | (jnp.mean(batch["x"]) == 3)
        return new, values | {"loss": jnp.where(bad, size, 1.0 + 0.0 * values["loss"])}

    settings = {"recoveries": 1, "spike": 5.0, "log_every": 1, "keep": 99}
    state = train(tmp_path / "bad", 40, step_fn=calm, loop=settings)
    skipped = {"nan": [3, 26], "spike": [26]}[kind]  # the first come too soon to judge
    reports = bad_lines(tmp_path / "bad")
    assert [(x["batch"], x["skipped"]) for x in reports] == [(t, True) for t in skipped]
    whole = train(
        tmp_path / "whole", 40, batches=without(*skipped), step_fn=calm, loop=settings
    )
    np.testing.assert_array_equal(state.a, whole.a)
    steps = [x["step"] for x in metrics.read(tmp_path / "bad") if "loss" in x]
    assert steps == list(range(1, 41))  # as if nothing had happened

    # A run stopped after that goes on without them too, and spikes are seen at once.
    for step in (28, 32, 36, 40):
        shutil.rmtree(tmp_path / "bad" / "checkpoints" / str(step))
    again = train(tmp_path / "bad", 40, step_fn=calm, loop=settings)
    np.testing.assert_array_equal(again.a, whole.a)
    assert len(bad_lines(tmp_path / "bad")) == len(skipped)


def test_it_gives_up_where_batch_after_batch_is_bad(tmp_path):
    def worse(start):
        for t, batch in enumerate(feed(start), start):
            yield batch if t < 5 else batch | {"x": batch["x"] * np.nan}

    with pytest.raises(FloatingPointError, match="step 6: .* nan"):
        train(tmp_path, batches=worse, loop={"recoveries": 3})
    found = [(x["batch"], x["skipped"]) for x in bad_lines(tmp_path)]
    assert found == [(5, True), (6, True), (7, True), (8, False)]
    assert latest_step(tmp_path) == 4


def test_sigterm_saves_and_ends_with_the_code_for_again(tmp_path, capsys):
    def told(start):
        for t, batch in enumerate(feed(start), start):
            if t == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, steps=50, batches=told, loop={"checkpoint_every": 50})
    assert ended.value.code == preemption.EXIT_CODE == 75
    stopped = latest_step(tmp_path)
    assert 1 <= stopped < 50
    assert f"step {stopped} is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    state = train(tmp_path, steps=50)
    np.testing.assert_array_equal(state.a, train(tmp_path / "whole", steps=50).a)


def test_where_the_time_and_the_memory_went_is_logged(tmp_path):
    work = Work(unit="rows", per_step=8)
    with Recorder(tmp_path, 0, 8, work, watch.Watch(0.0), "train") as recorder:
        for n in range(1, 9):
            with recorder.spend("data"):
                time.sleep(0.02)
            recorder.settle()
            recorder.defer(n, n - 1, {"loss": jnp.ones(())}, {}, n % 2 == 0)
            if n == 4:
                recorder.settle()
                with recorder.spend("checkpoint"):
                    time.sleep(0.1)
        recorder.settle()
    lines = metrics.read(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines[1:]:  # the first interval is that of compiling
        assert line["seconds/data"] + line["seconds/device"] <= line["seconds/step"]
        assert line["memory/host_gib"] > 0.01
    # Batches 4 to 8: one counts to the line that is written after it is there.
    assert sum(2 * line["seconds/data"] for line in lines[1:]) >= 5 * 0.02
    [paused] = [line for line in lines if "seconds/checkpoint" in line]
    assert paused["step"] == 6 and paused["seconds/checkpoint"] >= 0.1
    assert paused["rows_per_second"] == pytest.approx(8 / paused["seconds/step"])
    health = json.loads((tmp_path / "health" / "0.json").read_text())
    assert health["step"] == 8 and health["host"] == socket.gethostname()
    assert health["seconds/data"] == lines[-1]["seconds/data"]


def test_pauses_of_a_run_are_logged(tmp_path):
    train(tmp_path, steps=12, evaluations={"check": (4, lambda state: {"x": 1.0})})
    for kind in ("checkpoint", "evaluation"):
        logged = [x["step"] for x in metrics.read(tmp_path) if f"seconds/{kind}" in x]
        assert logged == [6, 10]  # the first line after each of them


def test_some_steps_are_traced_where_it_is_asked_for(tmp_path):
    (tmp_path / "trace.request").touch()
    train(tmp_path, steps=10)
    assert not (tmp_path / "trace.request").exists()
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_metrics_go_to_weights_and_biases_where_a_project_is_named(
    tmp_path, monkeypatch
):
    logged, wandb = [], types.ModuleType("wandb")

    class Run:
        def log(self, values, step):
            logged.append((step, values["loss"]))

        def finish(self):
            logged.append("finished")

    def init(**options):
        logged.append(options)
        return Run()

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(tmp_path / "silent", steps=2)
    assert not logged
    monkeypatch.setenv("WANDB_PROJECT", "leon")
    train(tmp_path / "run", steps=4)
    assert [x if isinstance(x, str) else x[0] for x in logged[1:]] == [2, 4, "finished"]
    assert logged[0]["project"] == "leon" and logged[0]["resume"] == "allow"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="WANDB_PROJECT.*pip install wandb"):
        train(tmp_path / "absent", steps=2)


def test_a_state_gone_bad_is_never_saved(tmp_path):
    def explode(state, batch):
        new, values = update(state, batch)
        bad = new.step == 4  # where a checkpoint is due; the loss is still finite
        values["grad_norm_b"] = jnp.where(bad, jnp.inf, values["grad_norm_b"])
        return new, values

    with pytest.raises(FloatingPointError, match="step 4"):
        train(tmp_path, step_fn=explode, loop={"checkpoint_every": 2})
    assert latest_step(tmp_path) == 2


def test_what_goes_wrong_with_the_data_is_said(tmp_path):
    with pytest.raises(ValueError, match="batches end after 5 steps, loop.steps=10"):
        train(tmp_path, batches=lambda start: feed(start, end=5))
    assert latest_step(tmp_path) == 4  # written in the background, and waited for

    def broken(start):
        yield from feed(start, end=6)
        raise KeyError("a corrupt record")

    with pytest.raises(KeyError, match="a corrupt record"):
        train(tmp_path, batches=broken)

    def uneven(start):
        for batch in feed(start):
            yield batch | {"x": batch["x"][:7]}

    with pytest.raises(ValueError, match=r"global_shape=\(8, 3\) .*shape=\(7, 3\)"):
        train(tmp_path / "uneven", batches=uneven)
    with pytest.raises(ValueError, match="7 rows does not divide .* 8 devices .* data"):
        train(tmp_path / "uneven", batch_size=7)


def test_a_failed_write_stops_the_run_with_its_mend(tmp_path, monkeypatch):
    train(tmp_path, steps=4)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    from orbax.checkpoint import CheckpointManager

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointManager, "save", full)
        with pytest.raises(OSError, match="No space left.*step 4 is whole.*make room"):
            train(tmp_path)
    assert int(train(tmp_path).step) == 10


def test_another_config_is_refused(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(ValueError, match="x was 1, is 2"):
        train(tmp_path, settings={"x": 2})


def test_metrics_of_a_killed_run_are_cut_back(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step, "loss/moved": float("nan")})
    writer.close()
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # cut off in the middle
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2, 3]
    MetricWriter(tmp_path, 2).close()
    assert metrics.read(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
    ]


def test_prefetch_works_ahead_and_ends_its_thread():
    made = []

    def make():
        for i in range(100):
            made.append(i)
            yield i

    before = set(threading.enumerate())
    with Prefetch(make, lambda i: i * i, 2) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 4]
        deadline = time.monotonic() + 10
        while len(made) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(made) == 6  # three taken, two waiting, one in hand
    assert set(threading.enumerate()) <= before  # others may have ended too
    with Prefetch(lambda: iter([1]), lambda i: i, 2) as items:
        assert list(items) == [1] and list(items) == []


def test_workers_outlive_the_signal_to_stop():
    def make():
        # Slurm tells all processes at once; a worker must feed the last steps.
        yield subprocess.check_output(["sh", "-c", "kill -TERM $$; echo alive"])

    with Prefetch(make, lambda out: out.strip(), 1) as items:
        assert list(items) == [b"alive"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    terminal, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    progress = Progress(5, 10, "pretrain")
    for _ in range(4):
        progress.advance()
        progress.show("loss 2.0")
    progress.show("scored", always=True)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""  # the last line of stdout belongs to the caller
    assert "loss 2.0" in err
    if terminal:
        assert "\r" in err and "9/10" in err
    else:
        lines = err.splitlines()
        assert [line.split("  ")[1] for line in lines] == ["loss 2.0", "scored"]
        assert lines[1].startswith("pretrain 9/10") and lines[1].endswith("s left")


@pytest.mark.parametrize("name", ["steps", "log_every", "checkpoint_every", "keep"])
def test_impossible_settings_are_named(name):
    settings = {"steps": 1, "log_every": 1, "checkpoint_every": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"loop.{name}=0"):
        loop.LoopConfig(**settings)


def test_checkpoints_wait_for_the_last_write(tmp_path):
    with Checkpoints(tmp_path, settings={}, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, position=1)
    assert latest_step(tmp_path) == 1
