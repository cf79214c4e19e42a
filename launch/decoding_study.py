r"""Which way of decoding is best for how many candidates? (figure 4 of the paper)

    python launch/decoding_study.py --workdir runs/full --checkpoint pretrain
    python launch/decoding_study.py --workdir runs/full --checkpoint sft \
        --scenes unseen --prompts 200

Draws the captions of test scenes in seven ways: temperature, top-p, both with guidance,
contrastive decoding (CD), CD-K, and half of the candidates by guided top-p, half by
CD-K; `--task caption` writes captions of their pictures in these ways. Writes
WORKDIR/decoding/CHECKPOINT.SCENES.json (CHECKPOINT.SCENES.caption.json): for each way
F1 over objects of the best of 1, 2, 4, 8 and 16 candidates (and of the best possible
choice), how far the candidates of a prompt are apart, and what a prompt costs. Ways
that are done are skipped, so the same command goes on after an interruption; `--ways`
makes some only. The last line on standard output is one JSON object with the table.

Settings are chosen on scenes that no score is from:

    python launch/decoding_study.py --workdir runs/full --checkpoint sft \
        --scenes validation --prompts 64 --candidates 4 --timed 0 \
        --temperature 0.7 --temperature 1 --guidance 1.5 --guidance 3

measures each way in every combination of the values given, and writes the best one of
each (by its mean over the numbers of candidates) beside: `choice`. Later studies of
that checkpoint and task take it where no setting is given. One way with the defaults
takes about half a minute on 2 cores.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import command
from absl import flags

SCENES = ("test", "unseen", "validation")
TASKS = ("text_to_image", "caption")
CHECKPOINT = flags.DEFINE_string("checkpoint", "pretrain", "A folder, or FOLDER@STEP.")
TASK = flags.DEFINE_enum("task", "text_to_image", TASKS, "What is drawn or written.")
SCENES_OF = flags.DEFINE_enum(
    "scenes", "test", SCENES, "unseen: with a colour and shape never seen together."
)
PROMPTS = flags.DEFINE_integer("prompts", 64, "How many scenes.", lower_bound=1)
MOST = flags.DEFINE_integer("candidates", 16, "At most so many.", lower_bound=2)
TIMED = flags.DEFINE_integer(
    "timed", 1, "Batches that tell what a number of candidates costs.", lower_bound=0
)
WAYS = flags.DEFINE_list("ways", [], "Some of the ways only.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed, other samples.")
MANY = "May be given repeatedly with --scenes validation."
SETTINGS = {
    "temperature": flags.DEFINE_multi_float("temperature", 1.0, f"Of all. {MANY}"),
    "top_p": flags.DEFINE_multi_float("top_p", 0.9, f"Where it is used. {MANY}"),
    "guidance": flags.DEFINE_multi_float("guidance", 2.0, f"Where it is used. {MANY}"),
}
CONTRAST = {
    "alpha": flags.DEFINE_multi_float("alpha", 0.1, f"Of CD and CD-K. {MANY}"),
    "k": flags.DEFINE_multi_integer("k", 4, f"Of CD-K. {MANY}"),
    "amateur_temperature": flags.DEFINE_multi_float(
        "amateur_temperature", 1.0, f"Of both. {MANY}"
    ),
}
RERANK = {
    name: flags.DEFINE_float(name, default, f"Weight of the {name} among candidates.")
    for name, default in (("similarity", 0.0), ("gain", 1.0), ("likelihood", 0.0))
}


def main() -> dict:
    import decoding_ways

    from cm3leon_jax import CM3Leon
    from cm3leon_jax.config import config_hash, write_whole
    from cm3leon_jax.evaluation import decoding
    from cm3leon_jax.evaluation.page import read_object, stage_hash
    from cm3leon_jax.evaluation.protocol import hardware
    from cm3leon_jax.sampling.rerank import Rerank

    workdir, captions = Path(command.WORKDIR.value), TASK.value == "caption"
    weights = Rerank(**{name: flag.value for name, flag in RERANK.items()})
    ways, chosen_by = _ways(_file("validation"))
    candidates = [n for n in decoding_ways.CANDIDATES if n <= MOST.value]
    folder = CHECKPOINT.value.partition("@")[0]
    inputs = {
        "checkpoint": CHECKPOINT.value,
        "inputs_hash": stage_hash(workdir / folder),
        "task": TASK.value,
        "scenes": SCENES_OF.value,
        "prompts": PROMPTS.value,
        "candidates": candidates,
        "timed": TIMED.value,
        "seed": SEED.value,
        "rerank": "log-likelihood" if captions else weights.parts,
    }
    model = CM3Leon.load(workdir, CHECKPOINT.value)
    documents = _documents(model.system.source)
    out = _file(SCENES_OF.value)
    made = read_object(out).get("ways", {}) if out.is_file() else {}
    for name, samplers in ways.items():
        key = config_hash({**inputs, "samplers": repr(samplers)})
        if made.get(name, {}).get("key") == key and not command.OVERWRITE.value:
            continue
        print(f"decoding: {name}", file=sys.stderr, flush=True)
        result = decoding.measure(
            *(model, documents, samplers),
            task=TASK.value,
            weights=weights,
            candidates=candidates,
            seed=SEED.value,
            timed=TIMED.value,
        )
        made[name] = result | {"key": key}
        whole = {**inputs, "settings": chosen_by, "hardware": hardware(), "ways": made}
        if SCENES_OF.value == "validation":
            whole["choice"] = decoding_ways.choice(made)
        write_whole(out, json.dumps(whole, indent=1))
    ordered = {name: made[name] for name in ways if name in made}
    print(decoding_ways.table(ordered), file=sys.stderr, flush=True)
    return {
        "study": str(out),
        "objects": {
            name: {n: point["chosen"]["value"] for n, point in way["curve"].items()}
            for name, way in ordered.items()
        },
    }


def _file(scenes: str) -> Path:
    parts = [CHECKPOINT.value, scenes, *["caption"] * (TASK.value == "caption")]
    return Path(command.WORKDIR.value) / "decoding" / f"{'.'.join(parts)}.json"


def _ways(validation: Path) -> tuple[dict, str]:
    """The samplers of each way that is asked for, and what says their settings: flags,
    or the file with the choice on validation scenes."""
    import decoding_ways

    from cm3leon_jax.config import make
    from cm3leon_jax.evaluation.page import read_object
    from cm3leon_jax.sampling.sampler import ContrastiveTopK, Sampler

    given, many = SETTINGS | CONTRAST, SCENES_OF.value == "validation"
    every = []
    for values in itertools.product(*(flag.value for flag in given.values())):
        how: dict[str, Any] = dict(zip(given, values, strict=True))
        contrast = ContrastiveTopK(**{name: how.pop(name) for name in CONTRAST})
        every.append(decoding_ways.ways(**how, contrast=contrast))
    if len(every) > 1 and not many:
        raise ValueError("several values of a setting need --scenes validation")
    unknown = sorted(set(WAYS.value) - set(every[0]))
    if unknown:
        raise ValueError(f"--ways {unknown[0]}: choose from {'; '.join(every[0])}")
    names = [name for name in every[0] if not WAYS.value or name in WAYS.value]
    ways = {name: every[0][name] for name in names}
    if many:  # the two halves are chosen each by itself
        ways = {
            f"{name}: {decoding_ways.told(each[name])}": each[name]
            for name in names
            for each in every
            if len(each[name]) == 1
        }
    if many or any(flags.FLAGS[name].present for name in given):
        return ways, "flags"
    choice = read_object(validation).get("choice", {}) if validation.is_file() else {}
    chosen: dict[str, tuple[Sampler, ...]] = {
        name: (make(Sampler, found["sampler"], name),) for name, found in choice.items()
    }
    if len(parts := [chosen.get(x, ()) for x in decoding_ways.HALVES]) == 2 and all(
        parts
    ):
        chosen["half and half"] = (*parts[0], *parts[1])
    if not chosen:
        return ways, "defaults"
    return {name: chosen.get(name, ways[name]) for name in ways}, validation.name


def _documents(world) -> list:
    from cm3leon_jax.data import shapes
    from cm3leon_jax.data.sources import read_documents

    if SCENES_OF.value == "unseen":
        return [
            shapes.document(world, "test", i, held_out=True)
            for i in range(PROMPTS.value)
        ]
    folder = Path(command.WORKDIR.value) / "documents"
    return read_documents(folder, SCENES_OF.value)[: PROMPTS.value]


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
