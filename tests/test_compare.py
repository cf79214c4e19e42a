"""Comparisons: differences are found, chance is not, the rest is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cm3leon_jax.evaluation import compare
from cm3leon_jax.evaluation.kept import digest
from cm3leon_jax.evaluation.protocol import interval

ROOT = Path(__file__).parent.parent


def result(folder, checkpoint, values, kept=True, **changes):
    """A result file of the mean of some values, as `run_protocol` leaves it."""
    scores = {
        key: interval(np.asarray(x), np.mean, len(x)) for key, x in values.items()
    }
    made = {
        **{"protocol": "p", "protocol_hash": "abc", "data_hash": "def", "config": "c"},
        **{"config_hash": "x", "checkpoint": checkpoint, "documents": 9, "seed": 0},
        "sampling": {"top_p": 1.0},
        "scores": scores,
    }
    path = folder / "w" / "eval" / f"p.{checkpoint}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made | changes))
    if kept:
        np.savez(path.with_suffix(".npz"), **{k: s.draws for k, s in scores.items()})
    return path


@pytest.fixture
def samples():
    """400 values, and the same a little better: less than they vary themselves."""
    rng = np.random.default_rng(0)
    one = rng.normal(0.5, 1.0, 400)
    return one, one + rng.normal(0.02, 0.05, 400)


def test_pairs_see_what_intervals_do_not(tmp_path, samples):
    a, b = samples
    for kept in (True, False):
        files = [
            result(tmp_path, name, {"t/objects": x, "t/nats": x}, kept)
            for name, x in (("one", a), ("two", b))
        ]
        for file in () if kept else files:
            file.with_suffix(".npz").unlink()
        read = [compare.read(file) for file in files]
        compare.check(read)
        found = {key: compare.difference(key, *read) for key in ("t/objects", "t/nats")}
        for difference in found.values():
            assert difference.paired == kept
            assert difference.value == pytest.approx((b - a).mean(), abs=1e-4)
            assert difference.low < difference.value < difference.high
            assert (difference.p < 0.05) == kept
        better = [found[key].better for key in found]
        assert better == ([True, False] if kept else [None, None])  # less is better
    same = compare.difference("t/objects", read[0], read[0])
    assert same.value == 0 and same.p == 1 and same.better is None
    assert compare.difference("t/none", *read) is None


def test_chance_is_rarely_called_a_difference():
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(40):
        scores = [interval(rng.normal(size=60), np.mean, 60) for _ in range(2)]
        read = [{"scores": {"a": s}, "draws": {"a": s.draws}} for s in scores]
        wrong += compare.difference("a", *read).p < compare.SURE
    assert wrong <= 6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"protocol_hash": "other"}, "different protocols"),
        ({"data_hash": "other"}, "different data"),
        ({"encoder": "clip-0"}, "different encoders"),
        ({"bank": "other"}, "different memory banks"),
        ({"examples": {"t": "y"}}, "different examples"),
        ({"sampling": {"top_p": 0.9, "later": 1}}, "different samplers"),
    ],
)
def test_other_protocols_and_other_data_are_refused(tmp_path, samples, change, message):
    a, b = samples
    files = [
        result(tmp_path, "a", {"t/a": a}, bank="b", examples={"t": "x"}),
        result(tmp_path, "b", {"t/a": b}, bank="b", examples={"t": "x"}),
    ]
    # Does not say its bank, and has a setting that others lack.
    files.append(result(tmp_path, "c", {"t/a": b}, sampling={"top_p": 1.0, "later": 0}))
    other = result(
        tmp_path, "three", {"t/a": b}, **{"bank": "b", "examples": {"t": "x"}} | change
    )
    compare.check([compare.read(file) for file in files])
    with pytest.raises(ValueError, match=message):
        compare.check([compare.read(file) for file in (*files, other)])
    compare.check([compare.read(file) for file in (*files, other)], list(change))
    with pytest.raises(ValueError, match="give two or more"):
        compare.check([compare.read(other)])
    broken = tmp_path / "x.json"
    for text in ("[]", '{"scores": {}}'):
        broken.write_text(text)
        with pytest.raises(ValueError, match="no result .*: no config"):
            compare.read(broken)


def test_draws_are_of_their_own_result_or_of_none(tmp_path, samples):
    path = result(tmp_path, "one", {"t/a": samples[0]})
    assert set(compare.read(path)["draws"]) == {"t/a"}  # older ones do not say
    draws = path.with_suffix(".npz")
    arrays = compare.read(path)["draws"]
    for of, kept in ((digest(json.loads(path.read_text())), {"t/a"}), ("x", set())):
        np.savez(draws, of=of, **arrays)
        assert set(compare.read(path)["draws"]) == kept
    whole = draws.read_bytes()
    for broken in (whole[:100], whole[:-30], b""):
        draws.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{draws} is damaged .* delete it"):
            compare.read(path)


def test_results_have_names_of_their_own(tmp_path, samples):
    scores = {"t/a": samples[0]}
    files = [result(tmp_path / x, "pretrain", scores) for x in "abc"]
    read = compare.read_all(files)
    assert [x["name"] for x in read] == [f"{x}/w pretrain" for x in "abc"]
    assert set(compare.summary(read)["t/a"]) == {"b/w pretrain", "c/w pretrain"}
    copy = files[0].with_name("old.json")
    copy.write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match="given twice"):
        compare.check(compare.read_all([files[0], copy]))


@pytest.mark.parametrize("key", ["caption/empty@0", "t/fid@2", "likelihood/nats@0"])
def test_of_some_scores_less_is_better(key):
    assert compare.lower_is_better(key)
    assert not compare.lower_is_better("caption/cider@0")


def plain(draws=None, **scores):
    return {"name": "x", "draws": draws or {}, "scores": scores}


def test_scores_without_an_interval_have_no_verdict():
    sure = {"value": 0.5, "low": 0.5, "high": 0.5, "n": 20}
    found = compare.difference("a", plain(a=sure), plain(a=sure | {"value": 0.6}))
    assert found.value == pytest.approx(0.1) and found.p is found.better is None
    assert compare._verdict(found) == "+0.1, no interval"


def test_one_example_proves_nothing():
    one, zero, six = (
        interval(np.full(n, x), np.mean, n) for n, x in ((1, 1), (1, 0), (6, 1))
    )
    none = interval(np.zeros(6), np.mean, 6)
    for a, b, sure in ((zero, one, False), (none, six, True)):
        draws = [{"a": x.draws} for x in (a, b)]
        found = compare.difference("a", plain(draws[0], a=a), plain(draws[1], a=b))
        assert found.paired and (found.p < compare.SURE) == sure


def test_an_interval_that_is_cut_off_at_0_is_as_wide_as_its_spread():
    a = {"value": 0.2, "low": 0.0, "high": 2.2, "n": 20, "spread": 3.2}
    b = {"value": 3.0, "low": 1.0, "high": 5.0, "n": 20, "spread": 3.2}
    found = compare.difference("t/fid", plain(**{"t/fid": a}), plain(**{"t/fid": b}))
    deviation = 3.2 * (2 / 10) ** 0.5
    assert found.high - found.low == pytest.approx(2 * 1.959964 * deviation)


def test_scores_of_other_rows_are_no_pairs(samples):
    (a, b), rows = samples, (range(300), range(300), range(100, 400))
    given = zip((a, b, b), rows, strict=True)
    scores = [interval(x[own], np.mean, 300, own) for x, own in given]
    read = [plain({"a": s.draws}, a=s) | {"rows": {"a": s.names}} for s in scores]
    assert compare.difference("a", *read[:2]).paired
    assert not compare.difference("a", read[0], read[2]).paired
    older, fewer = (
        plain({"a": s.draws}, a=s)
        for s in (scores[0], interval(a[:9], np.mean, 9, range(9)))
    )
    assert compare.difference("a", older, older).paired  # as many, so far as is known
    assert not compare.difference("a", older, fewer).paired


def test_the_command_writes_the_table_in_every_form(tmp_path, samples):
    a, b = samples
    files = [
        result(tmp_path, name, {"t/objects": x, f"t/{name}": x}, config="<b>")
        for name, x in (("pretrain", a), ("sft", b))
    ]
    outs = [tmp_path / f"out.{kind}" for kind in ("md", "html", "json")]
    command = [sys.executable, ROOT / "launch/compare.py", *files]
    for out in outs:
        command += ["--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(outs[2].read_text())
    assert last["t/objects"]["w sft"]["paired"]
    table = outs[0].read_text()
    assert "| t/objects |" in table and "better, +0.0" in table
    assert table in done.stdout
    assert "| w pretrain | w sft | n |" in table
    page = outs[1].read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page and page.count("<tr>") == 4
    bad = subprocess.run(
        [*command, tmp_path / "none.json"], capture_output=True, text=True
    )
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    assert "none.json" in bad.stderr


def test_a_system_before_and_after_tuning_may_sample_in_its_own_ways(tmp_path, samples):
    def read(checkpoint, top_p, **changes):
        changes |= {"sampling": {"caption": {"top_p": top_p, "k": 1}}}
        values = {"t/a": samples[0]}
        return compare.read(result(tmp_path, checkpoint, values, **changes))

    first = read("pretrain", 1.0)
    compare.check([first, tuned := read("sft@9", 0.9)])
    assert f"{tuned['name']} has sampling.caption.top_p 0.9, not 1.0." in (
        compare.markdown([first, tuned])
    )
    assert "sampling" not in compare.markdown([first, first])
    for other in (read("pretrain@9", 0.9), read("sft", 0.9, config="other")):
        with pytest.raises(ValueError, match=r"has sampling.caption.top_p 1.0 \(p\)"):
            compare.check([first, other])
