r"""What do more codes, and finer grids of them, buy? A system for each.

    python launch/tokenizer_study.py --config configs/shapes.py:quick \
        --workdir runs/tokenizers --config.data.train=8000
    python launch/tokenizer_study.py --config configs/shapes.py:quick \
        --workdir runs/tokenizers --codebooks 512 --factors 4,8

For every size of the codebook and down-sampling factor: an image tokenizer, a decoder
trained for the same updates, of as many tokens each, on its codes, and one protocol. A
head of more codes costs more FLOPs (a column says which), and of finer grids as many
tokens are fewer pictures. What does not depend on the codes is made once, in
WORKDIR/shared. What is done is skipped, so the same command goes on after an
interruption. Writes WORKDIR/study.json and study.html: reconstruction, how many codes
are in use, and what is drawn (one seed).
"""

import copy
import json
import os
import shlex
import sys
import time
from pathlib import Path

import command
from absl import flags

CONFIG = command.define_config(command.complete_system)
CODEBOOKS = flags.DEFINE_list("codebooks", ["128", "1024"], "Numbers of codes.")
FACTORS = flags.DEFINE_list(
    "factors", ["4", "8", "16"], "Pixels that a code stands for, along one side."
)
TOKENIZER_STEPS = flags.DEFINE_integer("tokenizer_steps", 300, "Updates of each.")
STEPS = flags.DEFINE_integer("steps", 1000, "Updates of each decoder.")
PROTOCOL = {
    "name": "tokenizer_study",
    "world": "shapes",
    "split": "test",
    "documents": 320,
    "tasks": ("reconstruction", "text_to_image"),
    "shown": 8,
    "seed": 0,
}
SHARED = ("prepare_data", "train_text_tokenizer")
# The columns: a name, where it comes from, and its key there.
COLUMNS = (
    ("PSNR, dB", "tokenizer", "psnr"),
    ("SSIM", "tokenizer", "ssim"),
    ("codes in use", "tokenizer", "usage"),
    ("bits a code", "tokenizer", "bits"),
    ("reconstruction, F1", "scores", "reconstruction/objects"),
    ("text to image, F1", "scores", "text_to_image/objects"),
)


def main() -> dict:
    from cm3leon_jax import stages
    from cm3leon_jax.config import config_hash, write_whole
    from cm3leon_jax.evaluation.protocol import hardware

    workdir = Path(command.WORKDIR.value)
    config = command.given_config(CONFIG)
    runs = _runs(config)  # all of them are possible, or none is begun
    stages.run(config, workdir / "shared", SHARED, command.OVERWRITE.value)
    made = {name: _make(mine, workdir, name) for name, mine in runs.items()}
    result = {
        "config": config["name"],
        "config_hash": config_hash(config),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "runs": made,
    }
    write_whole(workdir / "study.json", json.dumps(result, indent=1))
    write_whole(workdir / "study.html", _page(result))
    return {"study": str(workdir / "study.json"), "page": str(workdir / "study.html")}


def _runs(config: dict) -> dict[str, dict]:
    """The config of every run by its name; ValueError for what is impossible."""
    from cm3leon_jax.system import System

    found = {}
    for factor in map(int, FACTORS.value):
        for codes in map(int, CODEBOOKS.value):
            mine = copy.deepcopy(config)
            model = mine["image_tokenizer"]["model"]
            within = 2 ** (len(model["multipliers"]) - 1)
            if factor % within:
                raise ValueError(
                    f"--factors {factor}: the {within} of the tokenizer's levels does "
                    "not divide it"
                )
            model |= {"codebook": codes, "patch": factor // within}
            training = mine["image_tokenizer"]["training"]
            steps = TOKENIZER_STEPS.value
            whole = training["optimizer"]["steps"]
            for key in ("unquantised_steps", "restart_until"):
                training[key] = training[key] * steps // whole
            training["optimizer"]["steps"] = steps
            mine["pretrain"]["optimizer"]["steps"] = STEPS.value
            mine |= {"retrieval": None, "sft": None}
            System.make(mine)
            found[f"f{factor}-{codes}"] = mine
    return found


def _make(config: dict, workdir: Path, name: str) -> dict:
    """Links, trains and scores one run, as far as that is not done."""
    from cm3leon_jax import config as configs
    from cm3leon_jax import stages
    from cm3leon_jax import workdir as workdirs
    from cm3leon_jax.evaluation import report
    from cm3leon_jax.evaluation.page import read_object, stage_hash
    from cm3leon_jax.evaluation.protocol import Protocol, result_file
    from cm3leon_jax.evaluation.study import flops_per_step
    from cm3leon_jax.system import System

    directory = workdir / "runs" / name
    directory.mkdir(parents=True, exist_ok=True)
    for stage in SHARED:
        folder = stages.FOLDERS[stage]
        if not (directory / folder).exists():
            target = os.path.relpath(workdir / "shared" / folder, directory)
            (directory / folder).symlink_to(target, target_is_directory=True)
    print(f"study: {name}", file=sys.stderr, flush=True)
    stages.run(config, directory, overwrite=command.OVERWRITE.value)
    protocol = configs.make(Protocol, PROTOCOL, "protocol")
    result = read_object(result_file(directory, protocol, "pretrain"))
    if result.get("inputs_hash") != stage_hash(directory / "pretrain"):
        result = stages.evaluate(directory, protocol, "pretrain")
        report.write(directory)
    tokenizer = workdirs.results(directory / "image_tokenizer")
    decoder = workdirs.results(directory / "pretrain")
    grid = config["data"]["settings"]["image_size"] // int(name[1 : name.index("-")])
    return {
        "codebook": config["image_tokenizer"]["model"]["codebook"],
        "factor": int(name[1 : name.index("-")]),
        "tokens": grid**2,
        "flops": flops_per_step(System.make(config)) * STEPS.value,
        "seconds": tokenizer["seconds"] + decoder["seconds"],
        "tokenizer": tokenizer,
        "loss": decoder["loss"],
        "scores": result["scores"],
    }


def _page(result: dict) -> str:
    from html import escape

    from cm3leon_jax.evaluation.page import duration, frame, show, table
    from cm3leon_jax.evaluation.study import UNIT

    rows = []
    for name, run in result["runs"].items():
        cells = [show(run["tokens"])]
        for _, part, key in COLUMNS:
            value = run[part][key]
            if isinstance(value, dict):
                low, high = show(value["low"]), show(value["high"])
                cells.append(f"{show(value['value'])} <em>{low} … {high}</em>")
            else:
                cells.append(show(float(value)))
        cells += [show(run["flops"] / UNIT), duration(run["seconds"])]
        rows.append((escape(name), *cells))
    head = ("run", "codes a picture", *(name for name, _, _ in COLUMNS))
    head += ("decoder, TFLOPs", "training")
    about = ", ".join(
        f"{key} {escape(str(result[key]))}"
        for key in ("config", "config_hash", "hardware", "measured")
    )
    return frame(
        f"{result['config']} · image tokenizers",
        f"<section>{table(rows, head)}<p class=note>"
        f"<code>{escape(result['command'])}</code><br>{about}</p></section>",
        kicker="cm3leon_jax study",
        head="More codes, finer grids",
        lead="<p class=lead>fFACTOR-CODES: decoders trained for the same updates, of "
        "as many tokens each, on the codes of different image tokenizers. More codes "
        "make an update dearer; held-out pictures, one seed.</p>",
    )


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
