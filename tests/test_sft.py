"""A tiny system, pretrained, then tuned on all tasks at once, from files to losses."""

import dataclasses
import json
import math
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
import tiny_tasks
from flax import nnx

from cm3leon_jax import stages, vocab
from cm3leon_jax.data import infill, records, sources, task_sources
from cm3leon_jax.data.documents import highest_label
from cm3leon_jax.models.decoder import Decoder, abstract
from cm3leon_jax.preparation import Pictures
from cm3leon_jax.sft import (
    TaskDocuments,
    _parts_of,
    _trained_before,
    check_tokenizers,
    open_task_rows,
    share,
)
from cm3leon_jax.system import System
from cm3leon_jax.training import loss
from cm3leon_jax.training.checkpoint import leaf_names, load_model
from cm3leon_jax.training.parts import EVERYTHING, Parts
from cm3leon_jax.workdir import BEGUN, DONE

NAMES = tiny_tasks.NAMES


@pytest.fixture(scope="module", autouse=True)
def world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(task_sources.SOURCES, "shapes", tiny_tasks.WORLD)
        yield


@pytest.fixture(scope="module")
def workdir(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned")
    stages.run(tiny_tasks.tiny_config(), path)
    return path


@pytest.fixture(scope="module")
def system(world):
    return System.make(tiny_tasks.tiny_config())


def weights(folder, system):
    return load_model(folder, abstract(system.decoder_config))


def results(folder):
    return json.loads((folder / "DONE.json").read_text())


def test_every_stage_leaves_what_the_next_one_needs(workdir, system):
    assert stages.stages_of(system)[-2:] == ["tokenize_tasks", "sft"]
    for name in NAMES:
        documents = sources.read_documents(workdir / "tasks/documents" / name, "test")
        assert len(documents) == 8
        assert all(d.metadata["task"] == name for d in documents[:])
    cache = records.TokenRecords(workdir / "task_tokens", "train")
    assert cache.tasks == NAMES and len(cache) == 24 * len(NAMES)
    of_task = [NAMES[task - 1] for task in cache.index["task"].tolist()]
    assert [record.id.split()[0] for record in cache] == of_task
    masked = cache[of_task.index("segment")]
    start, stop = masked.bounds[-1]
    labels = system.layout.labels(masked.tokens[start:stop])
    assert labels.shape == (64,) and set(labels.tolist()) <= {0, 1, 2}


def test_losses_and_tokens_are_told_by_task(workdir):
    done = results(workdir / "sft")
    assert done["steps"] == 4 and set(done["ratios"]) == set(NAMES)
    assert done["ratios"]["edit"] == pytest.approx(2 * done["ratios"]["answer"], 1e-2)
    for name in NAMES:
        assert 0 < done[f"loss/task/{name}"] < 20
    lines = (workdir / "sft" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    steps = [line for line in logged if "tokens" in line]
    assert len(steps) == 4
    for line in steps:
        told = sum(line[f"tokens/task/{name}"] for name in NAMES)
        assert told == line["tokens"] > 0
        parts = [
            line[f"loss/task/{name}"] * line[f"tokens/task/{name}"]
            for name in NAMES
            if line[f"tokens/task/{name}"]
        ]
        assert sum(parts) / told == pytest.approx(line["loss"], rel=1e-4)


def test_pretraining_has_no_tasks(workdir, system):
    row = stages.open_rows(system, workdir, "train").row(0)
    assert set(row) == {"tokens", "segments", "positions", "moved"}
    assert not any("task" in key for key in results(workdir / "pretrain"))
    names = records.TokenRecords(workdir / "tokens", "train").index.dtype.names
    assert names == ("length", "maskable", "segments", "runs", "text")


def test_rows_undo_to_the_records_and_answers_come_last(workdir, system):
    rows = open_task_rows(system, workdir, "train")
    cache = records.TokenRecords(workdir / "task_tokens", "train")
    by_id = {record.id: record for record in cache}
    answered = 0
    for number in range(rows.count(0)):
        row, names = rows.row(number), rows.record_ids(number)
        for segment, name in enumerate(names, start=1):
            mine, record = row["segments"] == segment, by_id[name]
            tokens, moved = row["tokens"][mine], row["moved"][mine]
            plain = infill.uninfill(tokens, system.layout)
            if not name.startswith("infill"):
                blanked = (plain[1:-1] != record.tokens).any()
                assert not blanked or moved.sum() > 3  # a region, now and then
            if name.startswith("answer"):
                ((start, stop),) = record.answers
                answer = record.tokens[start:stop]
                answered += np.array_equal(tokens[moved][1:-1], answer)
    assert answered >= 12  # of 24 to 48, at 0.8


def test_a_share_of_updates_shows_as_many_samples_as_the_mixture_has(workdir, system):
    whole, batch = open_task_rows(system, workdir, "train"), system.sft.batch_size

    def shown(rows, updates):
        numbers = range(round(updates * batch))
        names = (x for number in numbers for x in rows.record_ids(number))
        return Counter(name.partition(" ")[0] for name in names)

    updates = 8 * whole.count(0) / batch
    together = shown(whole, updates)
    for only in (*((name,) for name in NAMES), ("answer", "segment")):
        some = dataclasses.replace(
            system, sft=dataclasses.replace(system.sft, only=only)
        )
        rows = open_task_rows(some, workdir, "train")
        alone = shown(rows, share(system, workdir, only) * updates)
        wanted = sum(together[name] for name in only)
        assert abs(sum(alone.values()) / wanted - 1) < 0.06, only


def test_tokenizers_learn_from_the_tasks_that_are_named(workdir, system):
    plain, taught = (Pictures(workdir, "train", n) for n in ((), ("edit", "answer")))
    assert len(taught) == len(plain) + 24 * (2 + 1)
    edit = sources.read_documents(workdir / "tasks/documents/edit", "train")[3]
    np.testing.assert_array_equal(taught[len(plain) + 7], edit.pictures[1])
    np.testing.assert_array_equal(taught[5], plain[5])
    answer = sources.read_documents(workdir / "tasks/documents/answer", "train")[23]
    np.testing.assert_array_equal(taught[len(taught) - 1], answer.pictures[0])


def test_a_finished_run_is_not_run_again_and_an_unfinished_one_goes_on(workdir):
    before = results(workdir / "sft")
    (workdir / "sft" / "DONE.json").unlink()
    stages.run(tiny_tasks.tiny_config(), workdir, ["sft"])
    after = results(workdir / "sft")
    assert after["loss"] == before["loss"] and after["steps"] == 4
    lines = (workdir / "sft" / "metrics.jsonl").read_text().splitlines()
    assert sum("tokens/task/edit" in line for line in lines) == 4


def test_a_start_that_reads_other_ids_is_refused(tmp_path):
    for name, hash in (("theirs", "a"), ("ours", "b")):
        (tmp_path / name / "image_tokenizer").mkdir(parents=True)
        begun = tmp_path / name / "image_tokenizer" / "inputs.json"
        begun.write_text(json.dumps({"hash": hash, "inputs": {}}))
    start = tmp_path / "theirs" / "sft"
    with pytest.raises(ValueError, match="sft.start=.*image_tokenizer/ is not that"):
        check_tokenizers(start, tmp_path / "ours")
    check_tokenizers(start, tmp_path / "theirs")


def test_tuning_goes_on_from_another_tuned_system(workdir, system, tmp_path):
    for name in ("documents", "tasks", "text_tokenizer", "image_tokenizer", "tokens"):
        shutil.copytree(workdir / name, tmp_path / name)
    shutil.copytree(workdir / "task_tokens", tmp_path / "task_tokens")
    config = tiny_tasks.tiny_config()
    config["sft"]["start"] = str(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="'elsewhere' has not finished"):
        stages.run(config, tmp_path, ["sft"])
    shutil.rmtree(tmp_path / "sft")
    config["sft"]["start"] = str(workdir / "sft")
    config["sft"]["parts"] = {"train": ("lora",), "rank": 2, "alpha": 4.0}
    config["sft"]["ema"] = 0.5
    config["sft"]["only"] = ("edit",)
    config["sft"]["optimizer"] |= {"steps": 1}
    stages.run(config, tmp_path, ["sft"])
    done = results(tmp_path / "sft")
    assert done["trained"] == sorted(tiny_tasks.NAMES)  # there, if not here
    parts, averaged = _parts_of(tmp_path / "sft", system)
    assert averaged and parts == Parts(System.make(config).sft.parts, system.layout)
    # Low-rank tuning keeps the weights that it starts from: those that were tuned.
    tuned = weights(workdir / "sft", system)
    shapes = jax.eval_shape(
        lambda: parts.prepared(
            Decoder(system.decoder_config, nnx.Rngs(0)), jax.random.key(0)
        )
    )
    kept = load_model(tmp_path / "sft", shapes)
    found = dict(zip(leaf_names(kept), jax.tree.leaves(kept), strict=True))
    for name, leaf in zip(leaf_names(tuned), jax.tree.leaves(tuned), strict=True):
        np.testing.assert_array_equal(leaf, found[name])
    pretrained = weights(workdir / "pretrain", system)
    assert not np.array_equal(tuned.unembed[...], pretrained.unembed[...])
    assert _parts_of(workdir / "pretrain", system) == (EVERYTHING, False)


def test_what_was_not_trained_before_is_not_claimed(tmp_path):
    tuned = {"sft": {"only": ["segment"], "tasks": {"segment": 1.0, "edit": 1.0}}}
    for inputs, noted, wanted in (
        ({}, {}, []),
        (tuned, {}, ["segment"]),
        (tuned, {"trained": ["edit", "segment"]}, ["edit", "segment"]),
    ):
        (tmp_path / BEGUN).write_text(json.dumps({"hash": "a", "inputs": inputs}))
        (tmp_path / DONE).write_text(json.dumps(noted))
        assert _trained_before(tmp_path) == wanted


def test_masks_of_classes_to_come_are_left_out(workdir, system):
    config = tiny_tasks.tiny_config()
    config["sft"]["classes"] = tiny_tasks.CLASSES[:-1]
    fewer = System.make(config)
    every = TaskDocuments(system, workdir, "train")
    some = TaskDocuments(fewer, workdir, "train")
    shown = [d for d in every[:] if highest_label(d) < len(tiny_tasks.CLASSES) - 1]
    assert 0 < len(some) < len(every)
    assert [d.id for d in some[:]] == [d.id for d in shown]
    before, after = system.stage_inputs, fewer.stage_inputs
    assert {k for k in after if after[k] != before[k]} == {"task_tokens", "sft"}


def test_the_order_of_segments_leaves_tokenizers_alone(system):
    config = tiny_tasks.tiny_config()
    config["sft"]["autoregressive"] = True
    before, after = system.stage_inputs, System.make(config).stage_inputs
    changed = {k for k in after if after[k] != before[k]}
    assert changed == {"tasks", "task_tokens", "sft"}


def test_systems_without_sft_depend_on_what_they_did():
    """A setting that is new in these sections would make all work folders stale."""
    inputs = System.make(tiny_system.tiny_config()).stage_inputs
    assert list(inputs) == [
        *("documents", "text_tokenizer", "image_tokenizer", "tokens", "pretrain")
    ]
    assert set(inputs["text_tokenizer"]) == {"text", "seed", "documents"}
    assert set(inputs["image_tokenizer"]) == {"model", "training", "seed", "documents"}
    assert set(inputs["tokens"]) == {
        *("vocabulary", "regions_per_image", "seed"),
        *("documents", "text_tokenizer", "image_tokenizer"),
    }
    pretrain = inputs["pretrain"]
    assert set(pretrain) == {"decoder", "layout", "pretrain", "seed", "tokens"}
    run = pretrain["pretrain"]
    assert set(run) == {"infill", "packing", "batch_size", "optimizer", "z_loss"}
    assert set(run["infill"]) == {"spans", "segment", "region", "region_without_text"}
    assert set(run["packing"]) == {"kind", "row_length"}


def test_a_section_sft_leaves_the_stages_before_it_alone(system):
    config = tiny_tasks.tiny_config()
    config["sft"]["tokenizers"] = ()
    with_sft = System.make(config).stage_inputs
    del config["sft"]
    without = System.make(config).stage_inputs
    assert {key: with_sft[key] for key in without} == without
    assert set(with_sft) - set(without) == {"tasks", "task_tokens", "sft"}
    # With tokenizers taught by tasks, another task changes neither these nor pretrain.
    config = tiny_tasks.tiny_config()
    del config["sft"]["tasks"]["segment"]
    fewer, all_of_them = System.make(config).stage_inputs, system.stage_inputs
    changed = {key for key in fewer if fewer[key] != all_of_them[key]}
    assert changed == {"tasks", "task_tokens", "sft"}
    assert all_of_them["image_tokenizer"] != without["image_tokenizer"]


def test_weights_and_bookkeeping_change_the_run_only(system):
    for key, value, expected in (
        ("tasks", {**system.sft.tasks, "edit": 3.0}, {"sft"}),
        ("answer", 0.5, {"sft"}),
        ("log_every", 5, set()),
        ("class_grid", 1, {"task_tokens", "sft"}),
        ("autoregressive", True, None),
    ):
        config = tiny_tasks.tiny_config()
        config["sft"][key] = value
        inputs = System.make(config).stage_inputs
        changed = {k for k in inputs if inputs[k] != system.stage_inputs[k]}
        assert changed == expected or (expected is None and "tasks" in changed)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": {}}, "sft.tasks is empty"),
        ({"tasks": {"paint": 1.0}}, "sft.tasks: no task 'paint': choose from"),
        ({"tasks": {"edit": 0}}, "sft.tasks.edit=0 must be a positive number"),
        ({"tasks": {"edit": -1.0}}, "sft.tasks.edit=-1.0"),
        ({"tasks": {"edit": "1"}}, "sft.tasks.edit='1'"),
        (
            {"tasks": {"control_hed": 1}, "tokenizers": ()},
            "'shapes' makes no examples of 'control_hed'",
        ),
        ({"tokenizers": ("write",)}, "sft.tokenizers: 'write' is not one of sft.tasks"),
        ({"answer": 1.5}, "sft.answer=1.5 must be within"),
        ({"ema": 1.0}, "sft.ema=1.0"),
        ({"batch_size": 0}, "^sft.batch_size=0"),
        ({"examples": {"train": 0, "validation": 1, "test": 1}}, "examples.train=0"),
        ({"packing": {"kind": "concatenate", "row_length": 128}}, "choose first_fit"),
        ({"packing": {"kind": "first_fit", "row_length": 256}}, "sft.packing.*exceeds"),
        ({"packing": {"kind": "first_fit", "row_length": 35}}, "cannot hold the task"),
        ({"classes": tuple("abcde")}, "vocabulary.classes=4 has no room for 5"),
        ({"classes": ("a",)}, "name the background"),
        ({"classes": tiny_tasks.CLASSES[::-1]}, "the first ones of them"),
        ({"class_grid": 5}, "sft.class_grid=5"),
        ({"class_grid": 0}, "sft.class_grid=0 must be positive"),
        ({"seed": -1}, "sft.seed=-1"),
        ({"path": 3}, "sft.path=3 must be a string"),
        ({"parts": {"train": ("tail",)}}, "no part 'tail'"),
        ({"teacher": 1}, "unknown setting sft.teacher"),
    ],
)
def test_impossible_settings_are_errors_that_name_them(changes, message):
    config = tiny_tasks.tiny_config()
    config["sft"] |= changes
    with pytest.raises(ValueError, match=message):
        System.make(config)


def test_a_system_without_sft_has_no_such_stages(tmp_path):
    for name in ("prepare_tasks", "tokenize_tasks", "sft"):
        with pytest.raises(ValueError, match=f"no stage {name}: .* no section sft"):
            stages.run(tiny_system.tiny_config(), tmp_path, [name])


def test_sums_of_tasks_against_numpy():
    layout = vocab.build(text=300, image=10, classes=0, sentinels=2)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, layout.size)).astype(np.float32)
    targets = rng.integers(0, 300, (2, 6))
    counted = (rng.random((2, 6)) < 0.7).astype(np.float32)
    task = rng.integers(0, 3, (2, 6))
    sums = loss.next_token_loss(
        jnp.eye(layout.size),
        *(jnp.asarray(x) for x in (logits, targets, counted)),
        jnp.zeros((2, 6), bool),
        layout=layout,
        task_BL=jnp.asarray(task),
        tasks=("one", "two", "none"),
    )
    nll, _ = loss.token_nll(jnp.asarray(logits), jnp.asarray(targets))
    for number, name in enumerate(("one", "two", "none"), start=1):
        mine = counted * (task == number)
        assert sums[f"count/task/{name}"] == mine.sum()
        expected = float((np.asarray(nll) * mine).sum())
        assert sums[f"nll/task/{name}"] == pytest.approx(expected, rel=1e-5)
    told = loss.means(sums)
    assert math.isnan(told["loss/task/none"]) and "perplexity/task/one" not in told
