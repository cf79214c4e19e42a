"""What the notebooks of this repository begin with, and how they lay out pictures."""

import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from cm3leon_jax.inputs import Picture, pillow

PACKAGE = "cm3leon-jax"
ROOT = Path(__file__).parent.parent  # of the checkout, which has configs/ and launch/
REPORT = "report.html"  # what `launch/run_all.py` writes last
_SHOWN = ("jax", "flax", "numpy", "optax", "grain")


def check() -> None:
    """Prints versions and devices; SystemExit in one line where a version does not fit.

    What fits is what the installed package declares, without its extras.
    """
    for requirement in requires(PACKAGE) or ():
        name, _, condition = requirement.partition(";")
        found = re.fullmatch(r"([\w.-]+)>=([\d.]+)", name.strip())
        if found is None or condition:
            continue
        name, least = found.groups()
        try:
            have = version(name)
        except PackageNotFoundError:
            have = "none"
        if have == "none" or _numbers(have) < _numbers(least):
            sys.exit(
                f"{PACKAGE} needs {name} {least} or newer, here is {have}: run "
                f"`{sys.executable} -m pip install '{requirement}'` and restart"
            )
    import jax

    versions = ", ".join(f"{name} {version(name)}" for name in (PACKAGE, *_SHOWN))
    python = ".".join(map(str, sys.version_info[:3]))
    devices = jax.devices()
    kind = devices[0].device_kind
    print(f"Python {python}, {versions}\n{len(devices)} x {kind}")


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version: "0.12.8rc1" -> (0, 12, 8)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()


def trained(config: str, workdir: str | Path) -> Path:
    """The work directory of a config, after all its stages and its exam: what is done
    is not run again, so this takes minutes once and then nothing.

    The output of `launch/run_all.py` is passed on, line by line. RuntimeError with its
    last line where it fails.
    """
    workdir = Path(workdir)
    if (workdir / REPORT).is_file():
        return workdir
    script = [sys.executable, str(ROOT / "launch" / "run_all.py")]
    command = [*script, "--config", config, "--workdir", str(workdir)]
    line = ""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {line.strip()}")
    return workdir


def sheet(
    pictures: Sequence[Picture | None],
    titles: Sequence[str] = (),
    *,
    columns: int = 6,
    side: int = 128,
) -> Pillow.Image:
    """Pictures side by side, enlarged to `side` pixels without blurring, each with its
    title below; None leaves a place empty. A bool array is shown in black and white."""
    if not pictures or columns < 1:
        raise ValueError("give at least one picture and one column")
    if titles and len(titles) != len(pictures):
        raise ValueError(f"{len(titles)} titles for {len(pictures)} pictures")
    font, gap, line = ImageFont.load_default(12), 8, 15
    texts = [textwrap.wrap(title, side // 6) for title in titles]
    below = line * max(map(len, texts), default=0)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    wide, high = side + gap, side + below + gap
    made = Pillow.new("RGB", (gap + columns * wide, gap + rows * high), "white")
    pen = ImageDraw.Draw(made)
    for number, picture in enumerate(pictures):
        x = gap + number % columns * wide
        y = gap + number // columns * high
        if picture is not None:
            if isinstance(picture, np.ndarray) and picture.dtype == bool:
                picture = picture.astype(np.uint8) * 255
            shown = pillow(picture, number).convert("RGB")
            made.paste(shown.resize((side, side), Pillow.Resampling.NEAREST), (x, y))
            pen.rectangle((x - 1, y - 1, x + side, y + side), outline="#cccccc")
        for k, text in enumerate(texts[number] if texts else ()):
            pen.text((x, y + side + 2 + k * line), text, "#333333", font)
    return made
