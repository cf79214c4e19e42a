"""Token records decoded to a contact sheet, every invariant checked, and numbers.

    python launch/inspect_data.py --workdir runs/quick
    python launch/inspect_data.py --workdir runs/quick --split validation --out some.png

Run after `tokenize_data.py`, before hours of training. Checked are ids in range, as
many codes in every picture as its grid has, <break> between segments and nowhere else,
regions, answers, names and the index of the records; that every training sample comes
apart again into what it was made of; and neighbours, where there is a bank. If anything
is broken the command ends with status 2, after the sheet was written. Numbers (lengths,
masks, packing efficiency) are on the page and in the last line, one JSON object.
"""

import dataclasses
from pathlib import Path

import command
from absl import flags

SPLIT = flags.DEFINE_string("split", "train", "train, validation or test.")
TOKENS = flags.DEFINE_enum(
    "tokens", "tokens", ("tokens", "task_tokens"), "The token cache: its folder."
)
CARDS = flags.DEFINE_integer("cards", 24, "Records on the sheet.", lower_bound=1)
MOST = flags.DEFINE_integer(
    "most", 20_000, "Records, and rows, that are checked at most.", lower_bound=1
)
OUT = flags.DEFINE_string(
    "out", None, ".html or .png (default: WORKDIR/inspect-SPLIT.html)."
)


def main() -> dict:
    from cm3leon_jax import codec
    from cm3leon_jax.config import write_whole
    from cm3leon_jax.data import inspection
    from cm3leon_jax.evaluation import contact_sheet
    from cm3leon_jax.system import System

    workdir, tokens = Path(command.WORKDIR.value), TOKENS.value
    out = Path(OUT.value or workdir / f"inspect-{SPLIT.value}.html")
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"--out {out}: give a .html or a .png file")
    system = System.load(workdir)
    rows = _rows(system, workdir, tokens)
    records, near = rows.records, rows.neighbours
    of_records, faults = inspection.check_records(records, MOST.value)
    of_rows = {}
    if not faults:  # else rows cannot be made
        of_rows, faults = inspection.check_rows(rows, MOST.value)
    numbers = {"Records": of_records, "Training rows": of_rows}
    chosen = inspection.spread(len(records), CARDS.value)
    shown = records.read(chosen)
    found = [
        [] if near is None else near.bank.read([n for n in near.table[i] if n >= 0])
        for i in chosen
    ]
    whole = codec.Codec(
        system.layout,
        codec.load_text_tokenizer(workdir),
        codec.load_image_tokenizer(workdir),
    )
    # A damaged record has nothing to be decoded.
    sound = [not inspection.faults_of(r, records.layout, records.grid) for r in shown]
    kept = [k for k, good in enumerate(sound) if good]
    sheet = contact_sheet.cards(
        whole, [shown[k] for k in kept], [found[k] for k in kept]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        contact_sheet.picture(sheet).save(out)
    else:
        title = f"{system.name}: {tokens} of {SPLIT.value}"
        write_whole(out, contact_sheet.page(title, sheet, numbers, faults))
    if faults:
        raise ValueError(
            f"{len(faults)} broken invariants (see {out}), first {faults[0]}: remove "
            f"{workdir / tokens} and run the stage that makes it again"
        )
    return {"sheet": str(out), **of_records, **of_rows}


def _rows(system, workdir: Path, tokens: str):
    """The training rows of a token cache; without neighbours where there is no bank."""
    from cm3leon_jax import stages
    from cm3leon_jax.retrieval.neighbours import file_of
    from cm3leon_jax.sft import open_task_rows

    if tokens == "task_tokens":
        return open_task_rows(system, workdir, SPLIT.value)
    if system.retrieval and not file_of(workdir / "bank", SPLIT.value).is_file():
        system = dataclasses.replace(system, retrieval=None)
    return stages.open_rows(system, workdir, SPLIT.value)


if __name__ == "__main__":  # data workers import this file again
    command.run(main)
