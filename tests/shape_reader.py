"""Reads instructions and questions about shapes, knowing nothing of what wrote them.

Only seen wordings. Objects are those that the oracle found in a picture.
"""

import dataclasses
import re

from cm3leon_jax.data.shapes import (
    BACKGROUNDS,
    CELL_NAMES,
    COLOURS,
    SHAPES,
    SIZE_WORDS,
    Object,
)

SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
LINES = {2: {"top": 0, "left": 0, "bottom": 1, "right": 1}}
LINES[3] = {"top": 0, "left": 0, "middle": 1, "bottom": 2, "right": 2}
# Which coordinate, and whether its least or its greatest is meant.
ENDS = {
    **dict.fromkeys(("left", "leftmost", "left of"), (1, min)),
    **dict.fromkeys(("right", "rightmost", "right of"), (1, max)),
    **dict.fromkeys(("upper", "top", "topmost", "above"), (0, min)),
    **dict.fromkeys(("lower", "bottom", "bottommost", "below"), (0, max)),
}


def singular(noun):
    for shape in (*SHAPES, "object"):
        if noun in (shape, shape + "s", shape + "es"):
            return shape
    return noun


def looks(words):
    """The facts in `little red circles`, as a dict; None for any other text."""
    facts = {}
    for word in words.split():
        noun = singular(word)
        if word in SIZES:
            facts["size"] = SIZES[word]
        elif word in COLOURS:
            facts["colour"] = word
        elif noun in SHAPES:
            facts["shape"] = noun
        elif noun not in ("object", "one"):
            return None
    return facts


def having(objects, facts):
    return {o for o in objects if all(getattr(o, k) == v for k, v in facts.items())}


def meant(layout, objects, phrase):
    """The objects that a phrase means, of all `objects`."""

    def at(o):
        return divmod(o.cell, layout)

    phrase = re.sub(r"^(the only|the|all|every) ", "", phrase)
    names = CELL_NAMES[layout]
    if match := re.fullmatch(r"(.+) at the (.+)", phrase):
        if match[2] in names:
            mine = having(objects, looks(match[1]))
            return {o for o in mine if o.cell == names.index(match[2])}
        return _end(objects, match[1], match[2], at)
    if match := re.fullmatch(r"(.+) on the (left|right)", phrase):
        return _end(objects, match[1], match[2], at)
    if match := re.fullmatch(r"(.+) in the (\w+) (row|column)", phrase):
        mine, axis = having(objects, looks(match[1])), match[3] == "column"
        return {o for o in mine if at(o)[axis] == LINES[layout][match[2]]}
    if match := re.fullmatch(r"(.+?) (left of|right of|above|below) (.+)", phrase):
        (other,) = meant(layout, objects, match[3])
        axis, end = ENDS[match[2]]
        mine = having(objects, looks(match[1]))
        return {o for o in mine if beyond(at(o)[axis], at(other)[axis], end)}
    first, _, rest = phrase.partition(" ")
    if first in ENDS:
        return _end(objects, rest, first, at)
    return having(objects, looks(phrase))


def beyond(one, other, end):
    return one != other and end(one, other) == one


def _end(objects, words, way, at):
    axis, end = ENDS[way]
    mine = having(objects, looks(words))
    best = end(at(o)[axis] for o in mine)
    return {o for o in mine if at(o)[axis] == best}


def follow(layout, objects, background, instruction, inside=()):
    """(objects, background) after an instruction. `inside`: the cells of a region,
    which `it` and `here` mean."""
    colours, sizes = "|".join(COLOURS), "|".join(SIZES)

    def some(phrase):
        if phrase in ("it", "here"):
            return {o for o in objects if o.cell in inside}
        found = meant(layout, objects, phrase)
        assert found, phrase
        return found

    def place(words, moving=()):
        if words == "here":
            (cell,) = inside
            return cell
        if match := re.fullmatch(r"(?:at|to) the (.+)", words):
            return CELL_NAMES[layout].index(match[1])
        match = re.fullmatch(r"directly (left of|right of|above|below) (.+)", words)
        (other,) = meant(layout, objects, match[2])
        axis, end = ENDS[match[1]]
        step = (1 if end is max else -1) * (1 if axis else layout)
        return other.cell + step

    def changed(phrase, **facts):
        old = some(phrase)
        return objects - old | {dataclasses.replace(o, **facts) for o in old}

    def said(pattern):
        return re.fullmatch(pattern, instruction)

    objects, grounds = set(objects), "|".join(BACKGROUNDS)
    if m := said(rf"(?:(?:make|paint)|change) the background (?:to )?({grounds})"):
        return objects, m[1]
    if m := said(r"(?:add|put|draw) an? (.+?) (at the .+|directly .+|here)"):
        made = Object(place(m[2]), **looks(m[1]))
        return objects | {made}, background
    if m := said(r"(?:remove|delete|take away) (.+)"):
        return objects - some(m[1]), background
    if m := said(rf"(?:make|paint|change the colour of) (.+?)(?: to)? ({colours})"):
        return changed(m[1], colour=m[2]), background
    if m := said(rf"(?:make|draw|change the size of) (.+?)(?: to)? ({sizes})"):
        return changed(m[1], size=SIZES[m[2]]), background
    if m := said(rf"(?:move|shift) (.+?) (to the (?:{'|'.join(CELL_NAMES[layout])}))"):
        return changed(m[1], cell=place(m[2])), background
    if m := said(r"(?:move|shift) (.+?) (directly .+)"):
        return changed(m[1], cell=place(m[2])), background
    m = said(r"(?:replace|turn|change) (.+) (?:with|into|to) (?:an? )?(.+?)")
    return changed(m[1], **looks(m[2])), background


def reply(layout, objects, background, question):
    """The answer to a question."""

    def one(phrase):
        (found,) = meant(layout, objects, phrase)
        return found

    def said(pattern):
        return re.fullmatch(pattern, question)

    def yes(fact):
        return "yes" if fact else "no"

    if said(r"What colour is the background\?"):
        return background
    if m := said(r"How many (.+?) (?:are there|do you see)\?"):
        return str(len(having(objects, looks(m[1]))))
    if m := said(r"(?:Is there|Do you see) an? (.+?)(?: at the (.+))?\?"):
        mine = having(objects, looks(m[1]))
        if m[2]:
            mine = {o for o in mine if o.cell == CELL_NAMES[layout].index(m[2])}
        return yes(mine)
    if m := said(r"Which is larger, (.+) or (.+)\?"):
        large = [p for p in m.groups() if one(p).size == "large"]
        assert len(large) == 1
        return large[0]
    if m := said(r"Is (.+) larger than (.+)\?"):
        return yes([one(p).size for p in m.groups()] == ["large", "small"])
    if m := said(r"Is (.+) small or large\?"):
        return one(m[1]).size
    if m := said(r"Is (the .+?) (left of|right of|above|below) (the .+)\?"):
        axis, end = ENDS[m[2]]
        here, there = (divmod(one(p).cell, layout)[axis] for p in (m[1], m[3]))
        return yes(beyond(here, there, end))
    if m := said(r"(?:Where is|At which place is) (.+)\?"):
        return CELL_NAMES[layout][one(m[1]).cell]
    m = said(r"(?:What|Which) (colour|shape|size) (?:is|does) (.+?)(?: have)?\?")
    return getattr(one(m[2]), m[1])
