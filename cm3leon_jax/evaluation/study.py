"""Does retrieval pay for itself? Curves, their ratio and a page (paper section 1.9).

A run's curve is the held-out negative log-likelihood per query image token against the
training FLOPs spent until then, those of retrieved tokens among them. The ratio at a
score is what the baseline has spent on reaching it, divided by what retrieval has.
What draws works on plain results, as they are written to `study.json`.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from cm3leon_jax.evaluation.chart import Series, chart
from cm3leon_jax.evaluation.page import cell, duration, frame, show, table
from cm3leon_jax.system import System
from cm3leon_jax.training.flops import pair_flops, train_flops_per_token

Curve = Sequence[tuple[float, float]]  # (FLOPs, nats per query image token)
UNIT = 1e12  # FLOPs on the page are in TFLOPs
GROUPS = ("head", "tail", "new")
# Retrieved documents; of fewer queries none, what is found, and random ones.
NATS = ("0", "1", "2", "0_same", "2_same", "2_random")


def reached(curve: Curve, score: float) -> float | None:
    """FLOPs at which a curve is first at or below `score`; None if it never is.

    Between two checkpoints the score is taken to fall evenly over the logarithm of the
    FLOPs; no checkpoint before the first is made up: where that is there already, its
    FLOPs are an upper limit.
    """
    curve = sorted(curve)
    if curve and curve[0][1] <= score:
        return curve[0][0]
    for (x, above), (next_x, below) in pairwise(curve):
        if below <= score < above:
            share = (above - score) / (above - below)
            return math.exp(math.log(x) + share * math.log(next_x / x))
    return None


def ratio_at(
    score: float, baseline: Curve, retrieval: Curve, extra: float = 0.0
) -> float | None:
    """FLOPs of the baseline to reach a score, of those of retrieval and `extra`; None
    where one of them never does."""
    theirs, ours = reached(baseline, score), reached(retrieval, score)
    if theirs is None or ours is None:
        return None
    return theirs / (ours + extra)


def at_least(score: float, retrieval: Curve) -> bool:
    """Whether a ratio at a score is a lower limit: retrieval was there before its first
    checkpoint, nobody knows when."""
    return bool(retrieval) and min(retrieval)[1] <= score


def best(curve: Curve) -> float:
    """The lowest score of a curve."""
    return min(nats for _, nats in curve)


def ratios(pairs: Sequence[tuple[Curve, Curve]], extra: float = 0.0) -> dict[str, Any]:
    """The claim, over pairs (baseline, retrieval) of one seed each.

    `value`: geometric mean of the ratios at the baseline's best score; `low`, `high`:
    the least and the greatest seed's. All None where a seed of retrieval never gets
    there. `seeds`: the ratio of every seed; `by_score`: ratios on the way, [score,
    ratio, at least] of the first seed's checkpoints. `at_least`: of which seeds the
    ratio is a lower limit (see `at_least`).
    """
    found = [ratio_at(best(a), a, b, extra) for a, b in pairs]
    known = [r for r in found if r is not None]
    summary: dict[str, Any] = {"value": None, "low": None, "high": None}
    if known and len(known) == len(found):
        mean = math.exp(sum(map(math.log, known)) / len(known))
        summary = {"value": mean, "low": min(known), "high": max(known)}
    baseline, retrieval = pairs[0]
    on_the_way = [
        [nats, ratio_at(nats, baseline, retrieval, extra), at_least(nats, retrieval)]
        for _, nats in baseline
    ]
    limits = [at_least(best(a), b) for a, b in pairs]
    return summary | {"seeds": found, "at_least": limits, "by_score": on_the_way}


def planned(
    runs: Mapping[str, Any], extra: float = 0.0
) -> list[tuple[str, float, float, float, float]]:
    """Whole runs of retrieval, of any length, against a whole run of the baseline:
    (name, final score, FLOPs, FLOPs of the baseline in those of the run, and in those
    of the run and the `extra` ones of the retriever).

    The rate of each has decayed to its end; a checkpoint on the way of a longer run is
    worse than that. Empty without a run of both kinds.
    """
    whole = {name: curve_of(run)[-1] for name, run in runs.items()}
    baseline = [x for name, x in whole.items() if runs[name]["arm"] == "baseline"]
    if not baseline:
        return []
    spent = baseline[0][0]
    return [
        (name, nats, flops, spent / flops, spent / (flops + extra))
        for name, (flops, nats) in whole.items()
        if runs[name]["arm"] in ("retrieval", "short")
    ]


def flops_per_step(system: System) -> float:
    """Of an update in pretraining, retrieved tokens among the others."""
    length = system.pretrain.packing.row_length
    tokens = system.pretrain.batch_size * length
    return tokens * train_flops_per_token(system.decoder_config, length)


def retriever_flops(system: System) -> dict[str, float]:
    """What the retriever has cost: its training, the vectors of all documents and of
    the training queries (their texts again), and an exact search for each of both.

    ValueError for a system without an encoder that was trained here.
    """
    encoder = None if system.retrieval is None else system.retrieval.encoder
    if encoder is None or encoder.training is None or encoder.model is None:
        raise ValueError("the study counts the FLOPs of an encoder trained here")
    training, documents = encoder.training, system.data.train
    if documents is None:
        raise ValueError("the study counts the documents of the bank: set data.train")
    seen = training.batch_size * training.optimizer.steps
    search = 2 * 2.0 * documents * encoder.model.embed  # two queries of a document
    return {
        "retriever": 3 * pair_flops(encoder.model, training.views) * seen,
        "bank": documents * (2 * pair_flops(encoder.model) + search),
    }


def curve_of(run: Mapping[str, Any]) -> Curve:
    """(FLOPs, nats) of a run's result."""
    return [(point["flops"], point["nats"]) for point in run["curve"]]


def page(result: Mapping[str, Any]) -> str:
    """The study as one HTML file without network, from what `study.json` holds."""
    runs = result["runs"]
    parts = [
        ("Held-out loss against compute", _curves(result)),
        ("How much less compute", _ratios(result)),
        ("Retrieved documents at inference", _counts(runs)),
        ("Names and their looks", _entities(runs)),
        ("How it was made", _made(result)),
    ]
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>"
        for title, content in parts
        if content
    )
    return frame(
        f"{result['config']} · retrieval study",
        body,
        kicker="cm3leon_jax study",
        head="Does retrieval pay for itself?",
        lead="<p class=lead>The same decoder trained with and without documents "
        "retrieved from a memory bank, in a world where half of the pictures show "
        "things whose names do not tell what they look like.</p>",
    )


def _curves(result: Mapping[str, Any]) -> str:
    runs, extra = result["runs"], sum(result["extra_flops"].values())
    arms = {"retrieval": 0, "baseline": 1}
    lines = [
        Series(name, [(x / UNIT, y) for x, y in curve_of(run)], colour=arms[run["arm"]])
        for name, run in runs.items()
        if run["arm"] in arms
    ]
    lines += [
        Series(
            f"{name} and retriever",
            [((x + extra) / UNIT, y) for x, y in curve_of(run)],
            dashed=True,
        )
        for name, run in runs.items()
        if run["arm"] == "retrieval" and extra
    ]
    if not lines:
        return ""
    return (
        "<p>Nats per image token of held-out queries, half of them entities as often "
        "as in training, half plain scenes; two retrieved documents, or none for the "
        "baseline. Dashed: with what training the retriever and building the bank "
        f"has cost.</p>{chart(lines, 860, 380, 'training TFLOPs')}"
    )


def _ratios(result: Mapping[str, Any]) -> str:
    if not result["ratio"]:
        return ""
    rows = []
    for name, found in result["ratio"].items():
        limits = found["at_least"]
        seeds = ", ".join(map(_times, found["seeds"], limits))
        value = _times(found["value"], any(limits))
        rows.append((escape(name.replace("_", " ")), value, seeds))
    head = ("compute of", "baseline / retrieval", "each seed")
    way = next(iter(result["ratio"].values()))["by_score"]
    steps = [(show(float(nats)), _times(ratio, limit)) for nats, ratio, limit in way]
    arms = [run for run in result["runs"].values() if run["arm"] == "baseline"]
    scores = ", ".join(show(curve_of(run)[-1][1]) for run in arms)
    whole = [
        (escape(name), show(nats), show(flops / UNIT), _times(alone), _times(whole))
        for name, nats, flops, alone, whole in planned(
            result["runs"], sum(result["extra_flops"].values())
        )
    ]
    columns = ("run", "nats at its end", "TFLOPs", "baseline's TFLOPs / its own")
    columns += ("… and the retriever's",)
    return (
        "<p>FLOPs of the baseline to reach its best score, divided by those of the "
        "retrieval run to reach the same; ≥ where that was reached before the first "
        f"checkpoint.</p>{table(rows, head)}"
        "<p>The same at every score of the first baseline on its way.</p>"
        f"{table(steps, ('nats', 'ratio'))}"
        "<p>Whole runs of retrieval, their learning rate decayed to the end; those of "
        f"the baseline end at {scores} nats.</p>{table(whole, columns)}"
    )


def _counts(runs: Mapping[str, Any]) -> str:
    rows = [
        (
            escape(name),
            *(show(run["nats"].get(k, "")) for k in NATS),
            show(run["curve"][-1]["flops"] / UNIT),
        )
        for name, run in runs.items()
    ]
    names = [key.replace("_", " ") for key in NATS]
    head = ("nats per query image token", *names, "TFLOPs")
    return table(rows, head) if rows else ""


def _entities(runs: Mapping[str, Any]) -> str:
    kinds = ("0", "1", "2", "2_oracle", "2_removed", "2_swapped")
    keys = [f"entity/{group}@{kind}" for group in GROUPS for kind in kinds]
    keys += [f"entity/chance_{group}" for group in GROUPS]
    keys += [f"retrieve/recall@2_{group}" for group in GROUPS]
    head = [name for name, run in runs.items() if run["scores"]]
    rows = []
    for key in keys:
        values = [runs[name]["scores"].get(key) for name in head]
        if any(values):
            rows.append((escape(key), *map(cell, values)))
    return table(rows, ("share right", *map(escape, head))) if rows else ""


def _made(result: Mapping[str, Any]) -> str:
    facts = [
        ("command", f"<code>{escape(result['command'])}</code>"),
        ("config", f"{escape(result['config'])}, {escape(result['config_hash'])}"),
        ("hardware", escape(result["hardware"])),
        ("measured", escape(result["measured"])),
    ]
    facts += [
        (f"FLOPs of {escape(name)}", show(flops / UNIT) + " TFLOPs")
        for name, flops in result["extra_flops"].items()
    ]
    facts += [
        (f"training of {escape(name)}", duration(run["seconds"]))
        for name, run in result["runs"].items()
    ]
    return table(facts)


def _times(ratio: float | None, at_least: bool = False) -> str:
    if ratio is None:
        return "never reached"
    return f"{'≥ ' * at_least}{ratio:.2f}×"
