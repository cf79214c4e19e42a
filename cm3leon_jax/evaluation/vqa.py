"""Accuracy of answers by the rules of the VQA challenge (Antol et al. 2015).

An answer is right as far as people gave it: min(1, n / 3) where n of the others said
the same, averaged over leaving out each of the (usually ten) people. OK-VQA and VizWiz
count alike. The rules are those of version 2 of the official code, its oddities among
them, since published numbers were made with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten".split()
    )
}
_ARTICLES = ("a", "an", "the")
# Written with one apostrophe less they become these.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've
'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CORRECTED = {
    whole[:i] + whole[i + 1 :]: whole
    for whole in _CONTRACTIONS
    for i, letter in enumerate(whole)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # so in the official table
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # the official code passes a flag of this value as a count


def accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each answer, float64 [N] in [0, 1].

    Where all references are the same, letter by letter, the official code compares
    without normalising; a single reference has to be met after normalising. ValueError
    where an answer has no references.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} questions")
    found = []
    for i, (answer, truth) in enumerate(zip(answers, references, strict=True)):
        truth = [_line(text) for text in truth]
        if not any(truth):
            raise ValueError(f"question {i} has no answer to compare with")
        answer = _line(answer)
        if len(set(truth)) > 1 or len(truth) == 1:
            answer, truth = normalise(answer), [normalise(text) for text in truth]
        same = np.array([text == answer for text in truth])
        others = same.sum() - same
        found.append(np.minimum(others / 3, 1).mean() if len(truth) > 1 else same[0])
    return np.array(found, np.float64)


def normalise(answer: str) -> str:
    """Without punctuation and articles, small letters, numbers as digits."""
    answer = _line(answer)
    thousands = _THOUSANDS.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside or thousands else " ")
    text = _PERIOD.sub("", text, count=_PERIODS)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CORRECTED.get(w, w) for w in words if w not in _ARTICLES)


def _line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
