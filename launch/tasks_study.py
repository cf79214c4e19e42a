r"""Do tasks help or harm each other, and what does a new one cost? Runs of one seed.

    python launch/tasks_study.py --config configs/shapes.py:full --workdir runs/full
    python launch/tasks_study.py --config configs/shapes.py:full --workdir runs/full \
        --runs alone-edit,alone-segment

The work directory's own `sft/` is the run on all tasks together. Beside it, in
WORKDIR/study/NAME, each a work directory like any other:

    alone-TASK      TASK alone, on the samples that it has in the mixture: as many
                    updates as they fill rows by themselves
    without         all tasks but --new
    added-mixed     from there on, for a quarter of the updates, on all tasks
    added-alone     from there on, on the new task alone: as many samples of it
    order-cm3, order-autoregressive
                    all tasks that write text, the answer moved to the end as CM3 does,
                    or the picture first and the text last; as many updates each
    class-before    segmentation, of pictures without the last class only
    class-added     from there on, for a quarter of the updates, with all classes

In another world `--protocol` is one of its own, such as configs/eval/icon_tasks.py. In
the autoregressive order `science` is asked with what `science_cot` begins with, and is
often answered as that.

What is done is skipped, so the same command goes on after an interruption. Writes
WORKDIR/tasks_study.json, which the report shows, from all runs that are there.
"""

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import command
from absl import flags

CONFIG = command.define_config(command.complete_system)
NAMES = flags.DEFINE_list("runs", [], "Some of the runs; all where it is not given.")
NEW = flags.DEFINE_string("new", "variation", "The task that is added later.")
PROTOCOL = flags.DEFINE_string(
    "protocol", "configs/eval/shapes.py:study", "What runs are measured by."
)
ADDING = 0.25  # of the updates of the whole mixture
# The one score of a task that has no evaluator of its own name.
MEASURED = {
    "caption_short": "caption/pairs",
    "caption_detailed": "caption/objects",
    "caption_long": "caption/objects_long",
}
ASKS = {"two_edits": "edit", "untaught_edits": "edit"}  # tasks of other names
Run = tuple[dict, tuple[str, ...]]  # settings of `sft` (and steps); tasks, () for all


# Runs that are shown beside each other, by the name of the column.
ORDERS = {"order-cm3": "CM3", "order-autoregressive": "autoregressive"}
CLASSES = {"class-before": "before", "class-added": "after", "alone-segment": "at once"}
AFTER = {"class-added": "class-before"} | dict.fromkeys(
    ("added-mixed", "added-alone"), "without"
)


def main() -> dict:
    from cm3leon_jax import sft, stages
    from cm3leon_jax.evaluation import report, task_report
    from cm3leon_jax.system import System

    workdir = Path(command.WORKDIR.value)
    config = command.given_config(CONFIG)
    system = System.make(config)
    if system.sft is None or NEW.value not in system.sft.tasks:
        raise ValueError(f"--new {NEW.value}: the config has no such task in sft.tasks")
    stages.run(config, workdir, overwrite=command.OVERWRITE.value)
    runs = runs_of(
        *(config, NEW.value, workdir, functools.partial(sft.share, system, workdir)),
        _protocol(()).tasks,
    )
    unknown = set(NAMES.value) - set(runs)
    if unknown:
        raise ValueError(f"--runs {sorted(unknown)[0]}: choose from {', '.join(runs)}")
    _evaluate(workdir, ())
    wanted = set(NAMES.value or runs)
    wanted |= {AFTER[name] for name in wanted & AFTER.keys()}
    for name, run in runs.items():
        if name in wanted:
            _make(config, workdir, name, run)
    result = _collect(config, workdir, runs)
    (workdir / task_report.STUDY).write_text(json.dumps(result, indent=1))
    lost = {
        f"{task}/{key}": round(
            -task_report.gained(
                key, *(pair[x]["value"] for x in ("together", "alone"))
            ),
            4,
        )
        for task, scores in result["tasks"].items()
        for key, pair in scores.items()
    }
    page = report.write(workdir)
    study = str(workdir / task_report.STUDY)
    return {"study": study, "report": str(page), "lost_together": lost}


def runs_of(
    config: dict,
    new: str,
    workdir: str | Path,
    share: Callable[[Sequence[str]], float],
    measured: Sequence[str] = (),
) -> dict[str, Run]:
    """All runs in order, by name. `share(tasks)` is that of some tasks' rows in the
    mixture: a run on them has that part of the updates. `measured` are the protocol's
    tasks: without the new one, it cannot be asked for."""
    from cm3leon_jax.data import task_sources, tasks

    steps = config["sft"]["optimizer"]["steps"]
    names = sorted(config["sft"]["tasks"])
    texts = [name for name in names if tasks.known(name).writes_text]
    world = config["data"]["source"]
    classes = config["sft"]["classes"] or task_sources.classes(world)

    def part(of: float, *some: str) -> int:
        return max(round(of * steps * (share(some) if some else 1)), 1)

    others = [name for name in names if name != new]
    runs: dict[str, Run] = {
        f"alone-{name}": (
            {"only": [name], "steps": part(1, name)},
            (_protocol_task(name),),
        )
        for name in names
    }
    written = sorted({_protocol_task(name) for name in texts})
    if texts:
        some = {"only": texts, "steps": part(1, *texts)}
        turned = some | {"autoregressive": True}
        runs |= {"order-cm3": (some, (*written,))}
        runs |= {"order-autoregressive": (turned, (*written,))}
    if "segment" in names:
        some = {"only": ["segment"], "steps": part(1, "segment")}
        runs["class-before"] = (some | {"classes": classes[:-1]}, ("segment",))
        start = str(Path(workdir) / "study" / "class-before" / "sft")
        some = some | {"start": start, "steps": part(ADDING, "segment")}
        runs["class-added"] = (some, ("segment",))
    start = str(Path(workdir) / "study" / "without" / "sft")
    adding = {"start": start, "steps": part(ADDING)}
    alone = {"start": start, "only": [new], "steps": part(ADDING, new)}
    without = {"only": others, "steps": part(1, *others)}
    asked = tuple(x for x in measured if ASKS.get(x, x) != _protocol_task(new))
    runs |= {"without": (without, asked)}
    return runs | {"added-mixed": (adding, ()), "added-alone": (alone, ())}


def _protocol_task(name: str) -> str:
    return MEASURED.get(name, name).partition("/")[0]


def _make(config: dict, workdir: Path, name: str, run: Run) -> None:
    """Links, trains and scores one run, as far as that is not done."""
    from cm3leon_jax import stages
    from cm3leon_jax.system import System

    changes, tasks = dict(run[0]), run[1]
    mine = json.loads(json.dumps(config))
    steps = changes.pop("steps")
    mine["sft"] |= changes
    optimizer = mine["sft"]["optimizer"]
    optimizer |= {"steps": steps, "warmup": min(optimizer["warmup"], steps // 4)}
    directory = workdir / "study" / name
    directory.mkdir(parents=True, exist_ok=True)
    whole, made = (System.make(each).stage_inputs for each in (config, mine))
    own = [
        s
        for s, folder in stages.FOLDERS.items()
        if made.get(folder) != whole.get(folder)
    ]
    for folder in made:
        if (
            folder not in map(stages.FOLDERS.get, own)
            and not (directory / folder).exists()
        ):
            target = os.path.relpath(workdir / folder, directory)
            (directory / folder).symlink_to(target, target_is_directory=True)
    print(f"tasks study: {name}, {steps} updates", file=sys.stderr, flush=True)
    stages.run(mine, directory, own, command.OVERWRITE.value)
    _evaluate(directory, tasks)


def _protocol(tasks: tuple[str, ...]):
    """The protocol, of some tasks: () for all that it has."""
    import dataclasses

    from cm3leon_jax import config as configs
    from cm3leon_jax.evaluation.protocol import Protocol

    settings = command.read_config_file(PROTOCOL.value, "protocol")
    protocol = configs.make(Protocol, settings, "protocol")
    return dataclasses.replace(protocol, tasks=tasks or protocol.tasks)


def _scores(directory: Path, tasks: tuple[str, ...]) -> dict:
    """Of a run as it is now; {} where it has not been measured."""
    from cm3leon_jax.evaluation.page import read_object, stage_hash
    from cm3leon_jax.evaluation.protocol import result_file

    found = read_object(result_file(directory, _protocol(tasks), "sft"))
    made = stage_hash(directory / "sft")
    fresh = made is not None and found.get("inputs_hash") == made
    return found.get("scores", {}) if fresh else {}


def _evaluate(directory: Path, tasks: tuple[str, ...]) -> None:
    from cm3leon_jax import stages

    if not _scores(directory, tasks):
        stages.evaluate(directory, _protocol(tasks), "sft")


def _collect(config: dict, workdir: Path, runs: dict[str, Run]) -> dict:
    """All runs that are there, as `evaluation/task_report.py` reads them."""
    from cm3leon_jax.config import config_hash
    from cm3leon_jax.evaluation.protocol import hardware
    from cm3leon_jax.evaluation.task_report import MAIN

    found = {n: _scores(workdir / "study" / n, tasks) for n, (_, tasks) in runs.items()}
    together = _scores(workdir, ())
    tasks: dict[str, dict] = {}
    for name, scores in found.items():
        if not name.startswith("alone-"):
            continue
        task = name.removeprefix("alone-")
        wanted = [MEASURED[task]] if task in MEASURED else MAIN
        for key, alone in scores.items():
            if key in wanted and key in together:
                pair = {"together": together[key], "alone": alone}
                tasks.setdefault(task, {})[key.partition("/")[2]] = pair
    shown = {"without": "before", "added-mixed": "mixed", "added-alone": "alone"}
    added = {title: found[n] for n, title in shown.items() if found[n]}
    orders, classes = (
        {title: found[n] for n, title in names.items() if found.get(n)}
        for names in (ORDERS, CLASSES)
    )
    return {
        "config": config["name"],
        "config_hash": config_hash(config),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "tasks": tasks,
        "added": {"task": NEW.value, "runs": added} if added else {},
        "orders": orders if len(orders) > 1 else {},
        "classes": classes if len(classes) > 1 else {},
    }


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
