"""From the name of an icon to its subject, its split and its captions.

Artists name the same subject in many ways ("alarm-clock", "alarmclock" and
"alarm-clock-2", "bear" and "bear-face"). `EmojiNames.subject` brings them together as
far as emoji names, aliases and short codes tell, so that a split by subject keeps a
picture's twins together.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from cm3leon_jax.data.icon_sets import SETS, SHORTCODES, load_json

VALIDATION_PERCENT = 5
TEST_PERCENT = 5
_PLAIN_QUOTES = str.maketrans("\u201c\u201d\u2019", '""\'')
_SAME_SUBJECT = (
    (re.compile(r",? facing (right|left)$"), ""),
    (re.compile(r"\b(wo)?man\b"), "person"),
    (re.compile(r"\b(wo)?men\b"), "people"),
    (re.compile(r"\b(boy|girl)\b"), "child"),
    (re.compile(r"^(person|people),? (?=\w)"), ""),
)
# These four sets say which code point each of their names draws.
_CODED_SETS = ("noto", "twemoji", "fluent-emoji-flat", "openmoji")
_TAG = re.compile(r"[a-z][a-z' -]{2,}")  # no country codes, no ":-)"
_TONES = "medium-light|medium-dark|light|medium|dark"
_LONG_TONE = re.compile(rf"-({_TONES})-skin-tone(?=-|$)")
_SHORT_TONE = re.compile(rf"-({_TONES})(?=-({_TONES})$|$)")
_NUMBER = re.compile(r"(-\d{1,2})+$")
_EMOJI_NUMBER = re.compile(r"-?\d$")  # "book2"
_NUMBER_WORD = re.compile(r"-(one|two|three|four|five|six|seven|eight)$")


@dataclass(frozen=True, kw_only=True)
class Name:
    """What an icon's name says.

    family: the name less skin tones, sizes and endings that name a style; icons of a
    set with equal (family, ending) differ only by skin tone or size.
    words: the readable name. tones: skin tones, outermost first. ending: style word.
    size: rank of its size ending, 0 best.
    """

    family: str
    words: str
    tones: tuple[str, ...] = ()
    ending: str = ""
    size: int = 0


@dataclass(frozen=True)
class Emoji:
    """An emoji without skin tone: its label and the words that people search it by.

    subgroup: emojibase's number of the subgroup of Unicode that it is in, -1 if none.
    """

    label: str
    tags: tuple[str, ...]
    subgroup: int = -1


def parse(name: str, prefix: str) -> Name:
    """Take an icon's name apart by the habits of its set (see `Name`)."""
    icon_set = SETS[prefix]
    tones: list[str] = []
    ending, size, family = "", 0, name
    for rank, suffix in enumerate(icon_set.sizes):
        if family.endswith(suffix):
            family, size = family.removesuffix(suffix), rank
            break
    for suffix, word in icon_set.endings:
        if family.endswith(suffix):
            family, ending = family.removesuffix(suffix), word
            break
    if icon_set.kind == "emoji":
        pattern = _SHORT_TONE if prefix.startswith("fluent-emoji") else _LONG_TONE
        tones = [match[1] for match in pattern.finditer(family)]
        family = pattern.sub("", family)
        if family in ("medium", "medium-light", "medium-dark", "light", "dark"):
            family, tones = name, []  # the modifier itself, a patch of colour
    return Name(
        family=family,
        words=_words(family, icon_set.kind),
        tones=tuple(tones),
        ending=ending,
        size=size,
    )


def _words(family: str, kind: str) -> str:
    """ "alarm-clock-2" -> "alarm clock"; a bare number stays, and that of a key."""
    short = family
    if not family.startswith("keycap"):
        number = _EMOJI_NUMBER if kind == "emoji" else _NUMBER
        short = _NUMBER_WORD.sub("", number.sub("", family)) or family
    return " ".join(re.split(r"[-_\s]+", short.strip("-_ "))).lower()


def _squash(words: str) -> str:
    return re.sub(r"[^a-z0-9]", "", words.lower().replace("&", "and"))


def _bare(hexcode: str) -> str:
    """A code point sequence less the variation selector, which sets use at will."""
    return hexcode.upper().replace("-FE0F", "")


class EmojiNames:
    """Finds the emoji that an icon's name or code point means.

    Built from emojibase and from the names and aliases of the sets that state code
    points, all of the cache, whichever sets are in use: subjects (and with them the
    splits) don't depend on the chosen sets.
    """

    def __init__(self, directory: Path):
        self._emoji: dict[str, Emoji] = {}  # by bare code points, skin tones included
        self._by_name: dict[str, str] = {}
        toneless = []
        for record in load_json(directory, "emoji"):
            hexcode, label = _bare(record["hexcode"]), record["label"]
            tags = tuple(tag for tag in record.get("tags", ()) if _TAG.fullmatch(tag))
            emoji = Emoji(_readable(label), tags, record.get("subgroup", -1))
            toneless.append(hexcode)
            for variant in (record, *record.get("skins", ())):
                self._emoji[_bare(variant["hexcode"])] = emoji
            self._by_name.setdefault(_squash(label), hexcode)
            if label.startswith("flag: "):
                self._by_name.setdefault(_squash("flag for" + label[5:]), hexcode)
        self._codes = {
            prefix: self._read_codes(directory, prefix) for prefix in _CODED_SETS
        }
        known = set(toneless)
        for source in SHORTCODES:
            for hexcode, names in load_json(directory, f"shortcodes-{source}").items():
                if _bare(hexcode) in known:
                    for name in [names] if isinstance(names, str) else names:
                        self._by_name.setdefault(_squash(name), _bare(hexcode))

    def _read_codes(self, directory: Path, prefix: str) -> dict[str, str]:
        data = load_json(directory, prefix)
        codes = {}
        for hexcode, name in data.get("chars", {}).items():
            if _bare(hexcode) in self._emoji:
                codes[name] = _bare(hexcode)
                parsed = parse(name, prefix)
                if not parsed.tones:
                    self._by_name.setdefault(_squash(parsed.family), _bare(hexcode))
        for alias, entry in data.get("aliases", {}).items():
            hexcode = codes.get(entry["parent"])
            if hexcode and len(entry) == 1 and not parse(alias, prefix).tones:
                self._by_name.setdefault(_squash(alias), hexcode)
        return codes

    def find(self, name: str, prefix: str) -> Emoji | None:
        """The emoji that icon `name` of set `prefix` draws, None if it draws none."""
        parsed = parse(name, prefix)
        hexcode = self._codes.get(prefix, {}).get(name)
        if SETS[prefix].kind == "flag" and re.fullmatch(r"[a-z]{2}", parsed.family):
            hexcode = "-".join(
                f"{0x1F1E6 + ord(c) - ord('a'):X}" for c in parsed.family
            )
        for candidate in (parsed.family, parsed.words):
            hexcode = hexcode or self._by_name.get(_squash(candidate))
        return self._emoji.get(hexcode or "")

    def subject(self, name: str, prefix: str) -> str:
        """The key of what is drawn, equal for the same subject by several artists.

        Man, woman or person, boy or girl, facing left or right are one subject too:
        artists draw them with the same strokes.
        """
        emoji = self.find(name, prefix)
        words = emoji.label if emoji else parse(name, prefix).words
        for pattern, instead in _SAME_SUBJECT:
            words = pattern.sub(instead, words)
        return _squash(words) or words


def _readable(label: str) -> str:
    """ "flag: Peru" -> "flag of Peru", "kiss: man, man" -> "kiss, man, man"."""
    label = label.translate(_PLAIN_QUOTES)
    if label.startswith("flag: "):
        return "flag of " + label[6:]
    return re.sub(r":\s*", " " if label.startswith("keycap") else ", ", label)


def readable_names(
    name: str, prefix: str, aliases: tuple[str, ...], emoji: Emoji | None
) -> tuple[str, ...]:
    """The names that a caption may use, the best first; () if none can be read.

    Country codes and the run-together names of fxemoji ("alarmclock") are readable
    only by way of the emoji that they draw. A longer name than eight words is a list
    of search words.
    """
    names = [emoji.label] if emoji else []
    if SETS[prefix].kind != "flag" and prefix != "fxemoji":
        own = [parse(other, prefix).words for other in (name, *aliases)]
        names += [
            words
            for words in own
            if not words.startswith("flag ") and len(words.split()) <= 8
        ]
    tones = " and ".join(dict.fromkeys(parse(name, prefix).tones))
    distinct = {_squash(words): words for words in reversed(names)}
    return tuple(
        f"{words}, {tones.replace('-', ' ')} skin tone" if tones else words
        for words in reversed(distinct.values())
        if re.search("[a-zA-Z]{2}", words)
    )


def digest(*parts: str) -> int:
    """A number in [0, 2^64) that depends on the strings alone, on any machine."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def split_of(subject: str) -> str:
    """ "train", "validation" (5 %) or "test" (5 %), by the subject's own name."""
    percent = digest("split", subject) % 100
    if percent < VALIDATION_PERCENT:
        return "validation"
    return "test" if percent < VALIDATION_PERCENT + TEST_PERCENT else "train"


def caption(
    identity: str,
    names: tuple[str, ...],
    tags: tuple[str, ...],
    style: str,
    background: str,
) -> str:
    """One of several caption forms, chosen by the record's identity.

    names: readable names, the best first (it is taken in two of three captions).
    tags: search words, used in one caption of four where there are some.
    style: the set's phrase, in two of three captions; the others leave it open.
    background: its name, always told unless it is "white".
    """

    def draw(what: str, n: int) -> int:
        return digest("caption", what, identity) % n

    name = names[0]
    if len(names) > 1 and draw("other name", 3) == 0:
        name = names[1 + draw("which name", len(names) - 1)]
    fresh = [tag for tag in tags if _squash(tag) not in _squash(name)]
    if fresh and draw("tags", 4) == 0:
        first = draw("which tags", len(fresh))
        chosen = [fresh[first], fresh[(first + 1) % len(fresh)]][: len(fresh)]
        name = f"{name} ({', '.join(chosen)})"
    form = draw("form", 6)
    text = name
    if form in (0, 1):
        text = f"{name}, {style}"
    elif form in (2, 3):
        text = f"{style}: {name}"
    return text if background == "white" else f"{text}, on a {background} background"
