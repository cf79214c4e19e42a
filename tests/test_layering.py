"""The rules of the house, read from the source: layers, sizes, forbidden things."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cm3leon_jax"

# A part may import from its own layer and from those before it, never from a later
# one; within a layer there are no cycles between parts.
LAYERS = (
    ("vocab", "config", "workdir", "storage"),
    ("models", "tokenizers", "data"),
    ("retrieval", "parallel"),
    ("training", "sampling", "interop"),
    ("run_config", "sft_config", "retrieval_config", "system", "inputs", "codec")
    + ("gallery", "encoders", "context", "judge", "writer", "conversation")
    + ("pretrained", "instructed", "api"),
    ("evaluation",),
    ("preparation", "memory", "decoder_run", "planning", "sft", "stages")
    + ("notebook", "conversion"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

MAX_FILE_LINES = 400
MAX_PACKAGE_LINES = 36_200
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "uv.lock"),
    *("cm3leon_jax", "configs", "launch", "tests", "notebooks"),
}
# Files that say nothing of what is in them collect everything.
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc", "tools"}
FORBIDDEN_IMPORTS = {
    "chex": "np.testing does it",
    "clu": "training/metrics.py does it",
    "jaxtyping": "shapes stand in the suffixes",
    "jax.experimental.pjit": "jax.jit shards today",
    "flax.linen": "one module system: NNX",
    "pickle": "foreign files are never unpickled",
}
# NNX modules are immutable pytrees here: transforms are jax's own.
NNX_TRANSFORMS = {"jit", "grad", "value_and_grad", "scan", "remat", "pmap"}
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax"}


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py")) if folder.exists() else []


ALL_FILES = [
    path
    for name in ("cm3leon_jax", "configs", "launch", "tests")
    for path in python_files(ROOT / name)
]


def name_of(path: Path) -> str:
    """`data/records.py` of the package as `data.records`; its `__init__` as ``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in python_files(PACKAGE)}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> set[str]:
    """Absolute dotted names a file imports, at its top and inside its functions."""
    package = list(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def internal(path: Path) -> set[str]:
    """Modules of the package that a file imports, as `name_of` writes them."""
    found = set()
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == PACKAGE.name:
            # `from cm3leon_jax.vocab import Layout` names an object in a module.
            found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return found


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def test_every_part_has_a_layer():
    parts = {name.split(".")[0] for name in MODULES if name}
    assert parts <= set(LEVEL), f"no layer for {sorted(parts - set(LEVEL))}"


def test_every_folder_is_a_package():
    folders = {path.parent for path in MODULES.values()}
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_to_earlier_layers(name):
    level = LEVEL[name.split(".")[0]]
    for other in internal(MODULES[name]):
        assert other, f"{name} imports from the package root"
        assert LEVEL[other.split(".")[0]] <= level, f"{name} imports {other}"


def test_parts_of_one_layer_have_no_cycle():
    edges = {
        (name.split(".")[0], other.split(".")[0])
        for name, path in MODULES.items()
        for other in internal(path)
        if name and other
    }
    reached = {edge for edge in edges if edge[0] != edge[1]}
    while True:
        further = {(a, d) for a, b in reached for c, d in reached if b == c} - reached
        if not further:
            break
        reached |= further
    assert not sorted(a for a, b in reached if a == b)


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "models"])
def test_models_know_only_models_and_vocabulary(name):
    others = {other.split(".")[0] for other in internal(MODULES[name])}
    assert others <= {"models", "vocab"}


def test_package_does_not_import_what_stands_around_it():
    for name, path in MODULES.items():
        around = {other.split(".")[0] for other in imports(path)}
        assert not around & {"launch", "configs", "tests", "notebooks"}, name


def test_config_dicts_stop_at_the_entry_points():
    for name, path in MODULES.items():
        if name != "config":
            assert not any(i.startswith("ml_collections") for i in imports(path)), name


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "data"])
def test_data_never_imports_jax(name):
    seen, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        heads = {other.split(".")[0] for other in imports(MODULES[module])}
        assert not heads & ACCELERATED, f"{name} reaches jax through {module}"
        waiting |= {other for other in internal(MODULES[module]) if other} - seen


def in_a_fresh_interpreter(program: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_instant():
    packages = [n for n, p in MODULES.items() if p.name == "__init__.py" and n]
    names = ["cm3leon_jax", *(f"cm3leon_jax.{name}" for name in packages)]
    heavy = sorted(ACCELERATED | {"numpy", "PIL", "grain", "sentencepiece"})
    program = (
        f"import sys, importlib\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print(*(name for name in {heavy} if name in sys.modules))"
    )
    assert in_a_fresh_interpreter(program) == ""


def test_data_starts_no_backend():
    names = [f"cm3leon_jax.{n}" for n in MODULES if n.split(".")[0] == "data"]
    program = (
        f"import importlib\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"from jax._src import xla_bridge\n"
        f"print(xla_bridge.backends_are_initialized())"
    )
    assert in_a_fresh_interpreter(program) == "False"


def test_files_are_short_and_named_for_what_they_hold():
    for path in ALL_FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_FILE_LINES, f"{path.relative_to(ROOT)}: {lines} lines"
        assert path.stem not in VAGUE_NAMES, path


def test_package_stays_within_its_budget():
    total = sum(len(p.read_text("utf-8").splitlines()) for p in MODULES.values())
    assert total <= MAX_PACKAGE_LINES


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_forbidden_construct(path):
    part = path.relative_to(ROOT).parts[0]
    if part != "tests":  # which may use as oracles what the package may not
        for name in imports(path):
            for banned, instead in FORBIDDEN_IMPORTS.items():
                assert not f"{name}.".startswith(f"{banned}."), f"{path}: {instead}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            transform = node.value.id == "nnx" and node.attr in NNX_TRANSFORMS
            assert not transform, f"{place(path, node)}: jax.{node.attr} instead"
        if isinstance(node, ast.ImportFrom) and node.module == "flax.nnx":
            assert not {a.name for a in node.names} & NNX_TRANSFORMS, place(path, node)
        if isinstance(node, ast.ClassDef):
            assert node.name != "Trainer", place(path, node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).lower()
            ghost = node.func.attr == "get" and re.search(r"(config|cfg)\w*$", owner)
            assert not ghost or part == "configs", (
                f"{place(path, node)}: a setting without its line in configs/"
            )


def test_no_open_ends():
    # Spelt so that this line is not its own finding.
    open_end = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!\(#\d+\))")
    for path in ALL_FILES:
        found = open_end.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found.group() if found else ''}"


def test_top_level_is_fixed():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in done.stdout.splitlines()}
    strange = {n for n in names if not n.startswith(".")} - TOP_LEVEL
    assert not strange
