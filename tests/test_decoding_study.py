"""Ways of decoding compared: curves, diversity, the table, of made-up candidates."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from cm3leon_jax.data import shapes
from cm3leon_jax.data.shapes import Object, ShapesConfig
from cm3leon_jax.evaluation import decoding, decoding_report
from cm3leon_jax.sampling.rerank import Ranked, Rerank
from cm3leon_jax.sampling.sampler import ContrastiveTopK, Sampler

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))  # it is no package
import decoding_ways

del sys.path[0]
ROOT = Path(__file__).parent.parent
A, B, C = (Object(n, "small", "red", "circle") for n in range(3))


def ranked(numbers):
    """Candidates with these numbers, best first."""
    scores = tuple(-float(i) for i in range(len(numbers)))
    return Ranked(
        outputs=("",) * len(numbers), numbers=numbers, scores=scores, parts={}
    )


def test_a_curve_is_of_the_first_candidates():
    wanted = [frozenset({A, B}), frozenset({C})]
    found = [ranked((3, 1, 0, 2)), ranked((0, 1, 2, 3))]
    parsed = [  # in the order of `found`
        [frozenset({A, B}), frozenset({A}), frozenset(), frozenset({A, C})],
        [frozenset({B}), frozenset({C}), frozenset(), frozenset({C})],
    ]
    made = decoding.curve(wanted, found, parsed, (1, 2, 4))
    chosen = {n: point["chosen"]["value"] for n, point in made.items()}
    possible = {n: point["possible"]["value"] for n, point in made.items()}
    # One: nothing, B. Two: A, B. Four: A and B, B. Of three objects wanted.
    wanted = {"1": 0.0, "2": 2 * 1 / (2 + 3), "4": 2 * 2 / (3 + 3)}
    assert chosen == pytest.approx(wanted, abs=1e-5)
    # One: nothing, B. Two: A, C. Four: everything.
    assert possible == pytest.approx({"1": 0.0, "2": 0.8, "4": 1.0}, abs=1e-5)
    assert all(point["chosen"]["n"] == 3 for point in made.values())
    assert made["1"]["diversity"] == 0


class Perfect:
    """Pictures and captions of scenes as they are; it notes what it is asked for."""

    def __init__(self, documents, tasks=()):
        self.system = types.SimpleNamespace(name="x", source=ShapesConfig())
        self.engine = types.SimpleNamespace(batch=4)
        self.writer = types.SimpleNamespace(tasks=tasks)
        self.documents, self.asked = documents, []

    def text_to_image(self, prompts, *, rerank, **how):
        truth = {d.texts[0]: d.pictures[0] for d in self.documents}
        return self._answer([Pillow.fromarray(truth[p]) for p in prompts], **how)

    def caption(self, images, *, style, **how):
        truth = {d.pictures[0].tobytes(): d.texts[0] for d in self.documents}
        found = [truth[np.asarray(image).tobytes()] for image in images]
        return self._answer(found, style=style, **how)

    def _answer(self, found, *, sampler, candidates, seed, return_scores=False, **how):
        self.asked.append((len(found), candidates, len(sampler), return_scores))
        self.style = how.get("style")
        if not return_scores:
            return found
        return [
            Ranked(
                outputs=(x,) * candidates,
                numbers=(*range(candidates),),
                scores=(0.0,) * candidates,
                parts={},
            )
            for x in found
        ]


@pytest.mark.parametrize("task", ["text_to_image", "caption"])
def test_every_number_of_candidates_is_timed_after_a_batch_that_is_not(task):
    documents = [shapes.document(ShapesConfig(), "test", i) for i in range(6)]
    model, both = Perfect(documents, {"caption_detailed"}), (Sampler(), Sampler())
    how = dict(weights=Rerank(gain=1.0), candidates=(1, 2, 4), seed=0)
    made = decoding.measure(model, documents, both, task=task, **how)
    timed = [(4, 1, 1), (4, 1, 1), (2, 2, 2), (2, 2, 2), (1, 4, 2), (1, 4, 2)]
    assert model.asked == [*((*call, False) for call in timed), (6, 4, 2, True)]
    assert model.style == (None if task == "text_to_image" else "detailed")
    for point in made["curve"].values():
        assert point["chosen"]["value"] == 1 and point["seconds"] >= 0
    untimed = decoding.measure(model, documents, both, task=task, timed=0, **how)
    assert len(model.asked) == 8 and "seconds" not in untimed["curve"]["1"]


def test_the_best_setting_of_each_way_is_chosen():
    def way(*values, **setting):
        curve = {str(n): {"chosen": {"value": x}} for n, x in enumerate(values)}
        return {"curve": curve, "samplers": [setting]}

    hot = decoding_ways.told((Sampler(temperature=1.5, top_p=0.9),))
    assert hot == "temperature 1.5, top_p 0.9"
    contrast = ContrastiveTopK(alpha=0.2, k=3)
    told = decoding_ways.told((Sampler(contrastive=contrast),))
    assert told.startswith("temperature 1.0, alpha 0.2, k 3")
    chosen = decoding_ways.choice(
        {
            "a: one": way(0.5, 0.8, temperature=1.0),
            f"a: {hot}": way(0.6, 0.9, temperature=1.5),
            "b: one": way(0.1, 0.2, temperature=2.0),
        }
    )
    assert chosen["a"] == {
        "settings": hot,
        "mean": 0.75,
        "sampler": {"temperature": 1.5},
    }
    assert list(chosen) == ["a", "b"]


def test_a_study_takes_the_choice_on_validation_scenes(tmp_path):
    """The flags of the script, read by it."""
    sampler = dataclasses.asdict(Sampler(temperature=0.5, guidance=3.0))
    other = Sampler(contrastive=ContrastiveTopK(alpha=0.3, k=2))
    choice = {"guided top-p": {"sampler": sampler}}
    choice["CD-K"] = {"sampler": dataclasses.asdict(other)}
    (tmp_path / "decoding").mkdir()
    file = tmp_path / "decoding" / "sft.validation.json"
    file.write_text(json.dumps({"choice": choice}))
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'launch')!r}]\n"
        "import decoding_study as study\n"
        "from absl import flags\n"
        "def ways(*given):\n"
        "    flags.FLAGS.unparse_flags()\n"
        f"    flags.FLAGS(['x', '--workdir', {str(tmp_path)!r}, '--checkpoint', 'sft',"
        " *given])\n"
        "    return study._ways(study._file('validation'))\n"
        "made, by = ways()\n"
        "print(by, made['temperature'][0].temperature, made['half and half'])\n"
        "made, by = ways('--guidance', '4')\n"
        "print(by, made['guided top-p'][0].guidance)\n"
        "made, by = ways('--scenes', 'validation', '--temperature', '1', "
        "'--temperature', '2', '--k', '2', '--k', '3', '--guidance', '4')\n"
        "print(by, len(made), [x for x in made if x.startswith('temp')])\n"
    )
    run = [sys.executable, "-c", program]
    found = subprocess.run(run, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    taken, given, tried = found.stdout.splitlines()
    both = (Sampler(temperature=0.5, guidance=3.0), other)
    assert taken == f"sft.validation.json 1.0 {both}"
    assert given == "flags 4.0"
    # Of two temperatures: four ways without k, once CD, twice CD-K; no halves.
    names = ["temperature: temperature 1.0", "temperature: temperature 2.0"]
    assert tried == f"flags {2 * (4 + 1 + 2)} {names}"


def test_diversity_is_the_mean_distance_of_pairs():
    def plain(level):
        return Pillow.fromarray(np.full((4, 4, 3), level, np.uint8))

    assert decoding.diversity([plain(9)]) == 0
    assert decoding.diversity([plain(9), plain(9)]) == 0
    assert decoding.diversity([plain(0), plain(255)]) == pytest.approx(1)
    three = [plain(0), plain(51), plain(153)]
    assert decoding.diversity(three) == pytest.approx((0.2 + 0.6 + 0.4) / 3)
    texts = ["a red a blue", "a red", "a red"]  # of 4 words two are shared
    assert decoding.diversity(texts) == pytest.approx((0.5 + 0.5 + 0.0) / 3)


def test_ways_share_their_settings():
    contrast = ContrastiveTopK(alpha=0.2, k=5, amateur_temperature=0.5)
    ways = decoding_ways.ways(
        temperature=0.9, top_p=0.8, guidance=3.0, contrast=contrast
    )
    guided = Sampler(temperature=0.9, top_p=0.8, guidance=3.0)
    contrastive = Sampler(temperature=0.9, contrastive=contrast)
    assert ways["guided top-p"] == (guided,) and ways["CD-K"] == (contrastive,)
    assert ways["half and half"] == (guided, contrastive)
    assert ways["CD"][0].contrastive == ContrastiveTopK(
        alpha=0.2, k=1, amateur_temperature=0.5
    )
    assert len(ways) == len(set(ways.values())) == 7


def test_the_table_has_a_line_for_each_way():
    point = {"chosen": {"value": 0.5}, "possible": {"value": 0.75}, "diversity": 0.1}
    old = {"curve": {"1": {k: point[k] for k in ("chosen", "possible")}}}
    old |= {"diversity": 0.2, "seconds_per_candidate": 0.02}
    new = {"curve": {"1": point, "16": point | {"seconds": 0.3}}}
    lines = decoding_ways.table({"one": old, "other": new}).splitlines()
    assert lines[0] == "| chosen (possible) · diversity · seconds | 1 | 16 |"
    assert lines[2] == "| one | 0.500 (0.750) · 0.200 · 0.020 |  |"
    last = "| other | 0.500 (0.750) · 0.100 | 0.500 (0.750) · 0.100 · 0.300 |"
    assert lines[3] == last


@pytest.mark.parametrize("old", [False, True])
def test_the_report_tells_the_best_way_for_each_number(tmp_path, old):
    def cost(n, seconds):
        return {} if old else {"diversity": 0.1, "seconds": n * seconds}

    def way(seconds, *values, contrast=None):
        older = {"diversity": 0.1, "seconds_per_candidate": seconds} if old else {}
        curve = {
            str(n): {"chosen": {"value": x, "high": x + 0.02}, **cost(n, seconds)}
            for n, x in zip((1, 4), values, strict=True)
        }
        return {
            "curve": curve,
            "samplers": [{"contrastive": contrast}],
            "streams": 1,
            **older,
        }

    ways = {
        "slow & good": way(2.0, 0.9, 0.95),
        "cheap": way(1.0, 0.89, 0.9, contrast={"k": 1}),
        "as good": way(1.5, 0.8, 0.94),
    }
    assert decoding_report.best(ways) == {
        1: ["slow & good", "cheap"],
        4: ["slow & good", "as good"],
    }
    assert decoding_report.section(tmp_path) == ""
    (tmp_path / "sft.test.json").write_text(json.dumps({"prompts": 500, "ways": ways}))
    page = decoding_report.section(tmp_path)
    assert "slow &amp; good" in page and "dashed" in page and "<svg" in page
