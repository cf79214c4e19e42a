r"""Which way of decoding is best for how many candidates? (figure 4 of the paper)

    python launch/decoding_study.py --workdir runs/full --checkpoint pretrain
    python launch/decoding_study.py --workdir runs/full --checkpoint sft \
        --scenes unseen --prompts 200

Draws the captions of test scenes in seven ways: temperature, top-p, both with guidance,
contrastive decoding (CD), CD-K, and half of the candidates by guided top-p, half by
CD-K. Writes WORKDIR/decoding/CHECKPOINT.SCENES.json: for each way F1 over objects of
the best of 1, 2, 4, 8 and 16 candidates (and of the best possible choice), how far the
candidates of a prompt are apart, and what they cost. Ways that are done are skipped, so
the same command goes on after an interruption; `--ways` makes some only. The last line
on standard output is one JSON object with the table.
"""

import json
import sys
from pathlib import Path

import command
from absl import flags

SCENES = ("test", "unseen")
CHECKPOINT = flags.DEFINE_string("checkpoint", "pretrain", "A folder, or FOLDER@STEP.")
SCENES_OF = flags.DEFINE_enum(
    "scenes", "test", SCENES, "unseen: with a colour and shape never seen together."
)
PROMPTS = flags.DEFINE_integer("prompts", 500, "How many scenes.", lower_bound=1)
MOST = flags.DEFINE_integer("candidates", 16, "At most so many.", lower_bound=2)
WAYS = flags.DEFINE_list("ways", [], "Some of the ways only.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed, other samples.")
SETTINGS = {
    "temperature": flags.DEFINE_float("temperature", 1.0, "Of all ways."),
    "top_p": flags.DEFINE_float("top_p", 0.9, "Where it is used."),
    "guidance": flags.DEFINE_float("guidance", 2.0, "Where it is used."),
}
CONTRAST = {
    "alpha": flags.DEFINE_float("alpha", 0.1, "Of CD and CD-K."),
    "k": flags.DEFINE_integer("k", 4, "Of CD-K."),
    "amateur_temperature": flags.DEFINE_float("amateur_temperature", 1.0, "Of both."),
}
RERANK = {
    name: flags.DEFINE_float(name, default, f"Weight of the {name} among candidates.")
    for name, default in (("similarity", 0.0), ("gain", 1.0), ("likelihood", 0.0))
}


def main() -> dict:
    from cm3leon_jax import CM3Leon
    from cm3leon_jax.config import config_hash, write_whole
    from cm3leon_jax.data import shapes
    from cm3leon_jax.data.sources import read_documents
    from cm3leon_jax.evaluation import decoding
    from cm3leon_jax.evaluation.page import read_object, stage_hash
    from cm3leon_jax.evaluation.protocol import hardware
    from cm3leon_jax.sampling.rerank import Rerank
    from cm3leon_jax.sampling.sampler import ContrastiveTopK

    workdir = Path(command.WORKDIR.value)
    weights = Rerank(**{name: flag.value for name, flag in RERANK.items()})
    ways = decoding.ways(
        **{name: flag.value for name, flag in SETTINGS.items()},
        contrast=ContrastiveTopK(**{k: flag.value for k, flag in CONTRAST.items()}),
    )
    unknown = sorted(set(WAYS.value) - set(ways))
    if unknown:
        raise ValueError(f"--ways {unknown[0]}: choose from {'; '.join(ways)}")
    candidates = [n for n in decoding.CANDIDATES if n <= MOST.value]
    folder = CHECKPOINT.value.partition("@")[0]
    inputs = {
        "checkpoint": CHECKPOINT.value,
        "inputs_hash": stage_hash(workdir / folder),
        "scenes": SCENES_OF.value,
        "prompts": PROMPTS.value,
        "candidates": candidates,
        "seed": SEED.value,
        "rerank": weights.parts,
    }
    model = CM3Leon.load(workdir, CHECKPOINT.value)
    if SCENES_OF.value == "test":
        documents = read_documents(workdir / "documents", "test")[: PROMPTS.value]
    else:
        world = model.system.source
        documents = [
            shapes.document(world, "test", i, held_out=True)
            for i in range(PROMPTS.value)
        ]
    out = workdir / "decoding" / f"{CHECKPOINT.value}.{SCENES_OF.value}.json"
    made = read_object(out).get("ways", {}) if out.is_file() else {}
    for name, samplers in ways.items():
        if WAYS.value and name not in WAYS.value:
            continue
        key = config_hash({**inputs, "samplers": repr(samplers)})
        if made.get(name, {}).get("key") == key and not command.OVERWRITE.value:
            continue
        print(f"decoding: {name}", file=sys.stderr, flush=True)
        options = dict(weights=weights, candidates=candidates, seed=SEED.value)
        result = decoding.measure(model, documents, samplers, **options)
        made[name] = result | {"key": key}
        whole = {**inputs, "hardware": hardware(), "ways": made}
        write_whole(out, json.dumps(whole, indent=1))
    ordered = {name: made[name] for name in ways if name in made}
    print(decoding.table(ordered), file=sys.stderr, flush=True)
    return {
        "study": str(out),
        "objects": {
            name: {n: point["chosen"]["value"] for n, point in way["curve"].items()}
            for name, way in ordered.items()
        },
    }


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
