"""What the documents say is so: links lead somewhere, commands and programs run.

Every line of every ```bash block of every document is executed (slow, in a copy of the
tree with small systems), unless a comment `# needs …` in it or above it names the
hardware or the thing that it needs, or `ELSEWHERE` the test that does. Every ```python
block is executed too, around a stand-in for the decoder.
"""

import ast
import contextlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import own_data
import pytest
import tiny_api
import tiny_data
import tiny_system
from fresh_tree import copy_of_the_tree
from ml_collections import ConfigDict

from cm3leon_jax import stages
from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.task_templates import TASKS, Task
from cm3leon_jax.evaluation.protocol import Protocol
from cm3leon_jax.retrieval.recall import Found, Memory
from cm3leon_jax.system import System
from configs import folder

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "bash launch/quickstart.sh": "test_notebooks, on a fresh checkout",
    "bash launch/setup.sh dev": "tests/run.sh, before anything",
    "bash launch/setup.sh demo": "test_project: every extra of launch/setup.sh",
    "bash tests/run.sh": "whoever runs this",
    "bash tests/run.sh -k vocab": "whoever runs this",
    "bash tests/run.sh all": "whoever runs this",
    ".venv/bin/pre-commit install": "it would change the checkout's own hooks",
    "python launch/demo.py --workdir runs/quick": "test_demo, in a browser",
}


def documents():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return [ROOT / name for name in found.splitlines() if name.endswith(".md")] or [
        *ROOT.glob("*.md"),
        *(ROOT / "cm3leon_jax").rglob("*.md"),
    ]


def blocks(path, language):
    """Texts of the fenced blocks of a document, their indentation taken away."""
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^ *```", re.M | re.S)
    return [
        re.sub(rf"^{indent}", "", text, flags=re.M)
        for indent, text in pattern.findall(path.read_text("utf-8"))
    ]


def commands(text):
    """(command, whether a comment says what it needs), continued lines joined."""
    needs = False
    for line in text.replace("\\\n", " ").splitlines():
        code, _, comment = line.partition("#")
        if code.strip():
            yield " ".join(code.split()), needs or comment.startswith(" needs")
            needs = False
        else:
            needs = comment.startswith(" needs")


ALL_COMMANDS = {
    command: needs
    for path in documents()
    for text in blocks(path, "bash")
    for command, needs in commands(text)
}


def of_docstrings():
    """The commands that scripts and configs tell of themselves."""
    for path in (*ROOT.glob("launch/*.py"), *ROOT.glob("configs/**/*.py")):
        told = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        told = told.replace("\\\n", " ")
        for line in re.findall(r"^ *python launch/.*", told, re.M):
            yield " ".join(line.split())


def plain(program):
    """`… --x=1 [--y 2]` without its optional parts' brackets."""
    return shlex.split(program.replace("[", "").replace("]", ""), comments=True)


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path}: {target}"
        if anchor and found.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.M)
            slugs = {
                re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads
            }
            assert anchor in slugs, f"{path}: {target}, of {sorted(slugs)}"


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_extras_and_variants_that_are_named_exist(path):
    text = path.read_text("utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = extras["project"]["optional-dependencies"]
    for names in re.findall(r"launch/setup\.sh((?: [a-z]\w*)+)", text):
        for name in names.split():
            assert name in extras, f"{path}: no extra {name}"
    inside = (
        r"\b(?:launch|tests|configs|cm3leon_jax|notebooks)/[\w/.-]*\.(?:py|sh|md|ipynb)"
    )
    for name in re.findall(inside, text):
        beside = [ROOT / name, path.parent / name]
        assert "NAME" in name or any(file.exists() for file in beside), (
            f"{path}: {name}"
        )
    for file, variant in re.findall(r"(configs/[\w/]+\.py):(\w+)", text):
        assert config(f"{file}:{variant}"), f"{path}: {file}:{variant}"


def config(name):
    file, _, variant = name.partition(":")
    made = runpy.run_path(str(ROOT / file))["get_config"]
    return made(*([variant] if variant else [])).to_dict()


def flags_of(script):
    """Names of the flags that a script defines, or a module that it imports."""
    files = (
        [script, *(ROOT / "launch").glob("*.py")]
        if script.parent.name == "launch"
        else [script]
    )
    used = script.read_text("utf-8")
    names = {"config", "help"}
    for file in files:
        if file == script or re.search(rf"^import {file.stem}$", used, re.M):
            text = file.read_text("utf-8")
            names |= set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text))
            names |= set(re.findall(r'add_argument\(\s*"--(\w+)"', text))
    return names


@pytest.mark.parametrize("command", sorted({*ALL_COMMANDS, *of_docstrings()}))
def test_commands_name_scripts_flags_and_settings_that_exist(command):
    words = plain(command)
    if words[0] in ("bash", "source") or not words[0].endswith("python"):
        assert (
            words[0] in ("bash", "source")
            or "/" in words[0]
            or words[0]
            in (*("ssh", "pip", "npm", "srun", "sbatch", "kubectl", "gcloud"),)
        ), f"unknown program {words[0]}"
        return
    script = ROOT / words[1]
    assert script.is_file(), command
    known = flags_of(script)
    settings = None
    for word, after in zip(words[2:], [*words[3:], ""], strict=True):
        if not word.startswith("--"):
            continue
        name, _, value = word.removeprefix("--").partition("=")
        if name == "config":
            settings = config(value or after)
        elif name.startswith("config."):
            whole = ConfigDict(System.complete(settings))
            *sections, last = name.removeprefix("config.").split(".")
            for section in sections:
                whole = whole[section]
            assert last in whole, f"{command}: no setting {name}"
        else:
            assert name in known or name.removeprefix("no") in known, (
                f"{command}: {words[1]} has no --{name}, it has {sorted(known)}"
            )
    if settings is not None and "world" not in settings:
        # Examples of one's own are not here; that they are looked for last is enough.
        with contextlib.suppress(FileNotFoundError):
            System.make(System.complete(settings))
    elif settings is not None:
        Protocol(**settings)


# ------------------------------------------------------------------ programs


class Pictures(tiny_api.Pictures):
    """Of 32x32 pixels, as the examples of the documents are."""

    image_size = 32

    def encode(self, images):
        return super().encode(np.asarray(images)[:, ::4, ::4])

    def decode(self, codes):
        return np.zeros((len(codes), 32, 32, 3), np.uint8)


class Remembering(Memory):
    """Finds what it was given first."""

    def __init__(self, found):
        self.found = list(found)

    def look(self, texts, images, k):
        return [Found(self.found[:k], 0) for _ in texts]

    def add(self, documents, *, keep=True):
        self.found += documents

    def remove(self, ids, *, keep=True):
        assert not isinstance(ids, str)


@pytest.fixture
def stand_in(monkeypatch):
    codec = tiny_api.Codec(
        tiny_data.LAYOUT, tiny_api.Words(), Pictures(), tiny_api.MASKS
    )
    monkeypatch.setattr(tiny_api, "CODEC", codec)
    monkeypatch.setattr(tiny_api, "SIDE", 32)
    tiny_api.spy(monkeypatch)
    near = tiny_data.make_documents(3)

    def load(workdir, checkpoint=None, *, mesh=None, batch=64, bank="bank"):
        return tiny_api.model(900, Remembering(near), TASKS)

    monkeypatch.setattr(CM3Leon, "load", load)
    return {"documents": near, "Task": Task}


def test_programs_of_the_readme_run(stand_in):
    for path in (ROOT / "README.md", ROOT / "cm3leon_jax" / "README.md"):
        for text in blocks(path, "python"):
            exec(compile(text, str(path), "exec"), stand_in)
    assert stand_in["picture"].size == (32, 32) and isinstance(stand_in["caption"], str)


def test_settings_of_the_data_page_make_systems():
    page = ROOT / "cm3leon_jax" / "data" / "README.md"
    seen = set()
    for text in blocks(page, "python"):
        given = {}
        exec(compile(text, str(page), "exec"), {}, given)
        whole = folder.get_config("my_pictures").to_dict()
        if "data" in given:
            whole["data"] = given["data"]
        else:
            whole["data"]["ingest"] = given["ingest"]
        system = System.make(System.complete(whole))
        seen.add((system.data.source, system.data.ingest is not None))
    kinds = {("folder", False), ("webdataset", False), ("table", False)}
    assert seen == kinds | {("tfds", False), ("folder", True)}


# ------------------------------------------------------------------ commands


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def smaller():
    """Flags that make each config small, by its name."""
    quick, tiny = config("configs/shapes.py:quick"), tiny_system.tiny_quick()
    own, small = (folder.get_config("my_pictures").to_dict() for _ in range(2))
    small["image_tokenizer"] |= {"model": dict(tiny["image_tokenizer"]["model"])}
    small["image_tokenizer"]["model"]["image_size"] = 64
    small["image_tokenizer"]["training"] = tiny["image_tokenizer"]["training"]
    small["decoder"] |= {
        k: tiny["decoder"][k] for k in ("layers", "width", "mlp", "heads")
    }
    small["pretrain"] = tiny["pretrain"] | {"packing": own["pretrain"]["packing"]}
    made = {}
    for name, whole, less in (
        ("configs/shapes.py:quick", quick, tiny),
        ("configs/folder.py:my_pictures", own, small),
    ):
        before = dict(flat(System.complete(whole)))
        after = dict(flat(System.complete(less)))
        made[name] = [
            f"--config.{key}={value}"
            for key, value in after.items()
            if before[key] != value and key != "name"
        ]
    return made


@pytest.mark.slow
def test_commands_of_the_documents_run(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    stages.run(tiny_system.tiny_quick(), tree / "runs" / "quick")
    own_data.folder(tree / "my_pictures", 120)
    less, failed = smaller(), []
    for command, needs in ALL_COMMANDS.items():
        if needs or command in ELSEWHERE:
            continue
        words = plain(command)
        assert words[0] == "python", f"say what `{command}` needs, or who runs it"
        words[0] = sys.executable
        for name, flags in less.items():
            words += flags if name in words else []
        done = subprocess.run(
            words, cwd=tree, capture_output=True, text=True, timeout=900
        )
        if done.returncode:
            failed.append(f"{command}\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    assert not failed, "\n\n".join(failed)
    assert (tree / "runs" / "own" / "report.html").is_file()
    assert (tree / "runs" / "own" / "inspect-train.html").is_file()
