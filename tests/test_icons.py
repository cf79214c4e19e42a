"""The icons world on a tiny made-up cache: no network, no real artwork."""

import base64
import hashlib
import io
import json
import sys
import tarfile

import numpy as np
import pytest

from cm3leon_jax.data import icon_names, icon_sets, icons
from cm3leon_jax.data.documents import Document, Skipped, from_bytes, to_bytes

pytest.importorskip("resvg_py", reason="the extra `icons` is not installed")

RED = '<path fill="#f00" d="M2 2h12v12H2z"/>'


def square(colour, x=2, y=2, side=12):
    return {"body": f'<path fill="{colour}" d="M{x} {y}h{side}v{side}H{x}z"/>'}


def icon_set(icons_, aliases=(), spdx="MIT", **more):
    return {
        "info": {
            "name": "A set",
            "author": {"name": "An artist", "url": "https://example.org"},
            "license": {"spdx": spdx, "url": "https://example.org/licence"},
        },
        "icons": icons_,
        "aliases": dict(aliases),
        "width": 16,
        "height": 16,
        **more,
    }


EMOJI = [
    {"label": "bear", "hexcode": "1F43B", "tags": ["animal", "forest", "BR", ":-)"]},
    {"label": "flag: Peru", "hexcode": "1F1F5-1F1EA", "tags": ["PE"]},
    {"label": "keycap: 4", "hexcode": "0034-FE0F-20E3"},
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "tags": ["hello"],
        "skins": [{"hexcode": "1F44B-1F3FB"}, {"hexcode": "1F44B-1F3FF"}],
    },
    {"label": "alarm clock", "hexcode": "23F0", "tags": ["wake up"]},
]

WORLD = {
    "noto": icon_set(
        {
            "bear": square("#840"),
            "waving-hand": square("#fc0"),
            "waving-hand-light-skin-tone": square("#fdb"),
            "waving-hand-dark-skin-tone": square("#531"),
            "alarm-clock": square("#f00"),
            "broken": {"body": "<path fill="},
            "empty-thing": {"body": "<g/>"},
            "snow-field": square("#fff", 0, 0, 16),
            "labelled-thing": {"body": RED + "<text>hi</text>"},
            "old-thing": {**square("#0f0"), "hidden": True},
            "corner-left": square("#00f", 0, 0, 4),
        },
        {
            "bear-face": {"parent": "bear"},
            "corner-right": {"parent": "corner-left", "hFlip": True},
        },
        chars={"1f43b": "bear", "1f44b": "waving-hand", "23f0": "alarm-clock"},
        spdx="Apache-2.0",
    ),
    "twemoji": icon_set({"bear-face": square("#a52")}, spdx="CC-BY-4.0"),
    "fxemoji": icon_set({"alarmclock": square("#c00"), "forkknife": square("#ccc")}),
    "icon-park": icon_set({"bear-two": square("#07f"), "acme-logo": square("#111")}),
    "fluent-color": icon_set(
        {
            "beach-16": square("#fa0"),
            "beach-48": square("#fb0"),
            "sea-20": square("#0af"),
        }
    ),
    "streamline-color": icon_set(
        {
            "boat-1": square("#05f"),
            "boat-1-flat": square("#5af"),
            "twin": square("#05f"),
        }
    ),
    "flag": icon_set({"pe-4x3": square("#d00"), "pe-1x1": square("#d10")}),
    "cif": icon_set({"pe": square("#c00")}, spdx="CC-BY-NC-4.0"),
}


def write_world(directory):
    """A filled cache: every file that `fetch` would leave, most of them empty sets."""
    directory.mkdir()
    for prefix in icon_sets.SETS:
        data = WORLD.get(prefix, icon_set({}))
        (directory / f"{prefix}.json").write_text(json.dumps(data))
    (directory / "emoji.json").write_text(json.dumps(EMOJI))
    for name in icon_sets.SHORTCODES:
        codes = {"1F43B": ["bear_face"]} if name == "iamcal" else {}
        (directory / f"shortcodes-{name}.json").write_text(json.dumps(codes))
    contents = {
        icon_sets.ICONIFY[0]: sorted(icon_sets.SETS),
        icon_sets.EMOJIBASE[0]: ["data", *icon_sets.SHORTCODES],
    }
    (directory / "FETCHED.json").write_text(json.dumps(contents))


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path / "cache")
    return icons.IconsConfig(image_size=16, cache=str(tmp_path / "cache"))


def everything(config):
    return {split: list(icons.documents(config, split)) for split in icons.SPLITS}


def by_id(config):
    return {item.id: item for items in everything(config).values() for item in items}


def test_one_subject_is_in_one_split_whoever_draws_it(world):
    splits = everything(world)
    where = {item.id: split for split, items in splits.items() for item in items}
    bears = ("noto:bear", "twemoji:bear-face", "icon-park:bear-two")
    clocks = ("noto:alarm-clock", "fxemoji:alarmclock")
    tones = [name for name in where if name.startswith("noto:waving-hand")]
    assert len(tones) == 3
    for twins in (bears, clocks, tones):
        assert len({where[name] for name in twins}) == 1
    assert len(where) == sum(len(items) for items in splits.values())


def test_splits_do_not_depend_on_the_chosen_sets(world):
    alone = icons.IconsConfig(image_size=16, cache=world.cache, sets=("icon-park",))
    for split in icons.SPLITS:
        ids = {item.id for item in icons.documents(alone, split)}
        assert ids <= {item.id for item in icons.documents(world, split)}


def test_split_shares():
    splits = [icon_names.split_of(f"subject{i}") for i in range(4000)]
    assert 150 < splits.count("validation") < 250
    assert 150 < splits.count("test") < 250


def test_skips_say_why(world):
    found = by_id(world)
    for name, reason in {
        "noto:broken": "does not render",
        "noto:empty-thing": "hardly visible",
        "noto:labelled-thing": "has text",
        "noto:old-thing": "withdrawn",
        "fxemoji:forkknife": "no readable name",
        "icon-park:acme-logo": "brand",
        "fluent-color:beach-16": "another size",
        "flag:pe-1x1": "another size",
        "streamline-color:twin": "another name",
        "cif:pe": "licence CC-BY-NC-4.0",
    }.items():
        assert isinstance(found[name], Skipped), name
        assert reason in found[name].reason
    kept = {name for name, item in found.items() if isinstance(item, Document)}
    assert {"noto:bear", "fluent-color:beach-48", "flag:pe-4x3"} <= kept
    assert sum(name.endswith("-skin-tone") for name in kept) == 1


def test_metadata_and_showable(world):
    found = by_id(world)
    bear = found["noto:bear"]
    assert bear.metadata["licence"] == "Apache-2.0"
    assert bear.metadata["author"] == "An artist"
    assert bear.metadata["url"] == "https://example.org"
    assert bear.metadata["name"] == "bear"
    assert icon_sets.showable(bear.metadata)
    assert not icon_sets.showable(found["twemoji:bear-face"].metadata)
    assert not icon_sets.showable({})
    again = from_bytes(to_bytes(bear))
    assert again.metadata == bear.metadata
    assert (again.segments[1].array == bear.segments[1].array).all()


def test_same_documents_every_time(world):
    first, second = everything(world), everything(world)
    for split in icons.SPLITS:
        assert [item.id for item in first[split]] == [item.id for item in second[split]]
        for one, other in zip(first[split], second[split], strict=True):
            if isinstance(one, Document):
                assert one.segments[0] == other.segments[0]
                assert (one.segments[1].array == other.segments[1].array).all()


def test_flipped_alias_is_a_mirrored_drawing(world):
    found = by_id(world)

    def drawn(item):
        ground = icons.BACKGROUNDS[item.metadata["background"]]
        return (item.segments[1].array != np.array(ground, np.uint8)).any(-1)

    left = drawn(found["noto:corner-left"])
    assert left[:4, :4].all() and left.sum() == 16
    assert (drawn(found["noto:corner-right"]) == left[:, ::-1]).all()


def test_white_drawing_is_not_laid_on_white(world):
    field = by_id(world)["noto:snow-field"]
    assert field.metadata["background"] != "white"
    assert f"on a {field.metadata['background']} background" in field.segments[0].text


@pytest.mark.parametrize(
    ("prefix", "name", "words"),
    [
        ("noto", "waving-hand-dark-skin-tone", "waving hand"),
        ("fluent-emoji", "cook-medium-light", "cook"),
        ("streamline-color", "add-layer-2-flat", "add layer"),
        ("fluent-color", "arrow-sync-20", "arrow sync"),
        ("icon-park", "setting-three", "setting"),
        ("icon-park", "moon-dark", "moon dark"),
        ("openmoji", "book2", "book"),
        ("noto", "keycap-4", "keycap 4"),
        ("noto", "dark-skin-tone", "dark skin tone"),
    ],
)
def test_words_of_a_name(prefix, name, words):
    assert icon_names.parse(name, prefix).words == words


def test_captions_name_style_tone_and_tags(world):
    emoji_names = icon_names.EmojiNames(icon_sets.fetch(world.cache))
    hand = emoji_names.find("waving-hand-dark-skin-tone", "noto")
    assert icon_names.readable_names(
        "waving-hand-dark-skin-tone", "noto", (), hand
    ) == ("waving hand, dark skin tone",)
    bear = emoji_names.find("bear-face", "twemoji")
    assert bear.label == "bear" and bear.tags == ("animal", "forest")
    assert icon_names.readable_names("bear-face", "twemoji", (), bear) == (
        "bear",
        "bear face",
    )
    assert emoji_names.find("pe-4x3", "flag").label == "flag of Peru"
    captions = {
        icon_names.caption(f"noto:{i}", ("bear",), bear.tags, "noto emoji", "white")
        for i in range(200)
    }
    assert {"bear", "bear, noto emoji", "noto emoji: bear"} <= captions
    assert any("(animal, forest)" in text for text in captions)


def test_subject_is_blind_to_gender_direction_and_tone(world):
    emoji_names = icon_names.EmojiNames(icon_sets.fetch(world.cache))
    subjects = {
        emoji_names.subject(name, "noto")
        for name in (
            "man-running",
            "woman-running-facing-right",
            "person-running-dark-skin-tone",
        )
    }
    assert subjects == {"running"}
    assert emoji_names.subject("woman", "noto") == "person"


def test_render_centres_and_keeps_alpha():
    rgba = icons.render('<rect width="32" height="16" fill="#00f8"/>', 32, 16, 8)
    assert rgba.shape == (8, 8, 4) and rgba.dtype == np.uint8
    assert (rgba[2:6, :, 3] == 0x88).all() and (rgba[2:6, :, 2] == 255).all()
    assert (rgba[:2] == 0).all() and (rgba[6:] == 0).all()
    with pytest.raises(ValueError):
        icons.render("<path", 16, 16, 8)


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match=r"icons\.image_size=4"):
        icons.IconsConfig(image_size=4, cache=str(tmp_path))
    with pytest.raises(ValueError, match=r"icons\.sets=\('nosuch',\)"):
        icons.IconsConfig(image_size=16, cache=str(tmp_path), sets=("nosuch",))
    config = icons.IconsConfig(image_size=16, cache=str(tmp_path))
    with pytest.raises(ValueError, match="split 'dev'"):
        next(icons.documents(config, "dev"))


def test_missing_renderer(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'pip install "cm3leon-jax\[icons\]"'
    ):
        next(icons.documents(world, "train"))


def test_missing_and_damaged_cache(world, tmp_path, monkeypatch):
    monkeypatch.setattr(icon_sets.shutil, "which", lambda *_, **__: None)
    empty = icons.IconsConfig(image_size=16, cache=str(tmp_path / "empty"))
    with pytest.raises(
        FileNotFoundError, match=r"no npm.*npm pack @iconify/json@"
    ) as error:
        next(icons.documents(empty, "train"))
    assert "\n" not in str(error.value)
    (tmp_path / "cache" / "noto.json").write_text('{"icons": 3}')
    with pytest.raises(ValueError, match="is no iconify set"):
        list(icons.documents(world, "train"))
    (tmp_path / "cache" / "noto.json").write_text('{"icons"')
    with pytest.raises(ValueError, match="is not JSON"):
        list(icons.documents(world, "train"))
    (tmp_path / "cache" / "noto.json").unlink()
    with pytest.raises(FileNotFoundError, match="fetch it again"):
        list(icons.documents(world, "train"))


def test_npm_that_fails_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(icon_sets.shutil, "which", lambda *_, **__: "false")
    with pytest.raises(
        FileNotFoundError, match="npm could not fetch @iconify/json@"
    ) as error:
        icon_sets.fetch(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def make_tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = hashlib.sha512(path.read_bytes()).digest()
    return base64.b64encode(digest).decode()


def test_fetch_unpacks_tarballs_put_there_by_hand(tmp_path, monkeypatch):
    empty = json.dumps(icon_set({})).encode()
    sets = {f"json/{prefix}.json": empty for prefix in icon_sets.SETS}
    codes = {f"en/shortcodes/{name}.json": b"{}" for name in icon_sets.SHORTCODES}
    iconify = make_tarball(
        tmp_path / "iconify-json-2.2.535.tgz", {**sets, "json/mdi.json": empty}
    )
    emojibase = make_tarball(
        tmp_path / "emojibase-data-17.0.0.tgz", {"en/data.json": b"[]", **codes}
    )
    with pytest.raises(ValueError, match="sha512 differs"):
        icon_sets.fetch(tmp_path)
    monkeypatch.setattr(icon_sets, "ICONIFY", (icon_sets.ICONIFY[0], iconify))
    monkeypatch.setattr(icon_sets, "EMOJIBASE", (icon_sets.EMOJIBASE[0], emojibase))
    assert icon_sets.fetch(tmp_path) == tmp_path
    left = {path.name for path in tmp_path.iterdir()}
    assert "noto.json" in left and "shortcodes-cldr.json" in left
    assert "mdi.json" not in left and not any(name.endswith(".tgz") for name in left)
    monkeypatch.setattr(icon_sets.shutil, "which", lambda *_, **__: None)
    assert icon_sets.fetch(tmp_path) == tmp_path  # filled: no npm is needed
