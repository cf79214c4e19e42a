"""The project around the package: dependencies, set-up, wheel."""

import ast
import os
import re
import shutil
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from fresh_tree import call, copy_of_the_tree, succeed

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = ("3.11", "3.12")
# What is run on other Pythons than ours: one file of every part, not all minutes.
SMOKE = [
    f"tests/test_{part}.py"
    for part in ("decoder", "sampling", "step", "checkpoint", "sources", "api")
]
LOWEST_SMOKE = [f"tests/test_{part}.py" for part in ("step", "checkpoint", "sources")]


def normal(requirement: str) -> str:
    """`tensorflow_datasets>=4; …` as `tensorflow-datasets`."""
    name = re.match(r"[\w.-]+", requirement)
    assert name
    return re.sub(r"[-_.]+", "-", name.group()).lower()


# ------------------------------------------------------------------ pyproject.toml


def imported_by_the_package() -> dict[str, str]:
    found = {}
    for path in sorted((ROOT / "cm3leon_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            found |= {name.split(".")[0]: path.name for name in names}
    return found


def test_what_the_package_imports_is_declared():
    extras = PROJECT["optional-dependencies"]
    # All but `dev`: what the tests alone import is none of the package's business.
    optional = [r for name in extras if name != "dev" for r in extras[name]]
    declared = {normal(r) for r in [*PROJECT["dependencies"], *optional]}
    declared |= {"jaxlib"}  # comes with jax, in the same version, as do its compilers
    declared |= {"libtpu", "jax-plugins", "jax-cuda13-plugin", "jax-cuda13-pjrt"}
    owners = packages_distributions()
    for name, where in imported_by_the_package().items():
        if name == "cm3leon_jax" or name in sys.stdlib_module_names:
            continue
        distributions = {normal(owner) for owner in owners.get(name, [name])}
        assert distributions & declared, f"{where} imports {name}: not declared"


def test_licence_is_apache():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text


def test_shell_scripts_parse():
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/*.sh"), ROOT / ".ci/run"]
    for script in scripts:
        succeed("bash", "-n", str(script), cwd=ROOT)


# ------------------------------------------------------------------ launch/setup.sh

# Stands in for Python: answers every question with yes and notes what pip is asked.
FAKE_PYTHON = """#!/bin/bash
case "$*" in *"pip install"*) echo "$*" >>calls ;; esac
"""
# What a bare machine has besides bash; nothing that could make an environment.
BASICS = "sed grep sort head tr cksum cat dirname flock env rm uname".split()


@pytest.fixture
def checkout(tmp_path):
    """A checkout of the set-up alone, with an empty PATH but for the basics."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    for name in BASICS:
        if found := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def set_up(checkout: Path, *extras: str):
    bash = shutil.which("bash")
    assert bash
    path = {"PATH": str(checkout / "bin")}
    return call(bash, "launch/setup.sh", *extras, cwd=checkout, env=path)


def installs(checkout: Path) -> list[str]:
    calls = checkout / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line.rpartition(" ")[2] for line in lines]


def put_python(checkout: Path, place: str, program: str) -> None:
    path = checkout / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(program)
    path.chmod(0o755)


def test_setup_installs_once_and_extras_add_up(checkout):
    put_python(checkout, ".venv/bin/python", FAKE_PYTHON)
    for extras in ((), (), ("dev",), ("dev",), (), ("icons", "dev"), ("icons",)):
        assert set_up(checkout, *extras).returncode == 0
    assert installs(checkout) == [".", ".[dev]", ".[dev,icons]"]


def test_setup_installs_again_when_the_project_changed(checkout):
    put_python(checkout, ".venv/bin/python", FAKE_PYTHON)
    set_up(checkout, "dev")
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# another dependency\n")
    set_up(checkout)
    assert installs(checkout) == [".[dev]", ".[dev]"]


def test_setup_tries_again_after_a_failure(checkout):
    put_python(checkout, ".venv/bin/python", FAKE_PYTHON + '[[ "$*" != *install* ]]\n')
    assert set_up(checkout).returncode != 0
    assert set_up(checkout).returncode != 0
    assert installs(checkout) == [".", "."]


def test_setup_says_what_to_install_where_python_is_missing_or_old(checkout):
    for _ in range(2):
        done = set_up(checkout)
        assert done.returncode == 1
        assert "no Python >= 3.11 found. Install one" in done.stderr
        put_python(checkout, "bin/python3", "#!/bin/bash\nexit 1\n")  # second: too old
    assert not (checkout / ".venv").exists()


def test_setup_refuses_an_unknown_extra(checkout):
    put_python(checkout, ".venv/bin/python", FAKE_PYTHON)
    done = set_up(checkout, "gpu")
    assert done.returncode == 1
    assert "no extra 'gpu'" in done.stderr
    assert installs(checkout) == []


def test_setup_says_that_an_environment_is_broken(checkout):
    put_python(checkout, ".venv/bin/python", "#!/bin/bash\nexit 1\n")
    done = set_up(checkout)
    assert done.returncode == 1
    assert "remove it" in done.stderr


# ------------------------------------------------------------------ fresh machines


def interpreter(minor: str) -> str:
    """A working interpreter of that version, wherever it was put."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    uv = Path.home() / ".local" / "share" / "uv" / "python"
    places = [
        shutil.which(f"python{minor}"),
        *sorted(home.glob(f"versions/{minor}.*/bin/python{minor}")),
        *sorted(uv.glob(f"cpython-{minor}.*/bin/python{minor}")),
    ]
    for place in filter(None, places):
        # A shim may be on PATH without a version behind it.
        if call(str(place), "-c", "import ensurepip, venv", cwd=ROOT).returncode == 0:
            return str(place)
    pytest.skip(f"no Python {minor} on this machine")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    tree = copy_of_the_tree(target / "tree")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
    succeed(*pip, "--wheel-dir", str(target), str(tree), cwd=target, seconds=300)
    (path,) = target.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_data_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"cm3leon_jax", f"cm3leon_jax-{PROJECT['version']}.dist-info"}
    tracked = copy_of_the_tree(wheel.parent / "again") / "cm3leon_jax"
    expected = {
        str(path.relative_to(tracked.parent))
        for path in tracked.rglob("*")
        if path.is_file()
    }
    assert expected <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


EVERY_MODULE = (
    "import importlib, pkgutil, cm3leon_jax\n"
    "path, prefix = cm3leon_jax.__path__, 'cm3leon_jax.'\n"
    "names = [module.name for module in pkgutil.walk_packages(path, prefix)]\n"
    "for name in names: importlib.import_module(name)\n"
    "print(len(names))"
)


def empty_environment(minor: str, place: Path) -> str:
    """Its Python."""
    succeed(interpreter(minor), "-m", "venv", str(place / "venv"), cwd=place)
    return str(place / "venv" / "bin" / "python")


def smoke(python: str, place: Path, tests: list[str], *options: str) -> None:
    """Tests of what is installed there, not of the tree."""
    tree = copy_of_the_tree(place / "tree")
    shutil.rmtree(tree / "cm3leon_jax")
    tools = [r for r in PROJECT["optional-dependencies"]["dev"] if "pyright" not in r]
    tools = [r for r in tools if not r.startswith(("cm3leon", "pre-commit", "ruff"))]
    # What the tests need changes nothing that is there.
    there = succeed(python, "-m", "pip", "freeze", cwd=place).splitlines()
    kept = place / "kept.txt"
    kept.write_text("\n".join(line for line in there if "==" in line))
    pip = (python, "-m", "pip", "install", "--quiet", "--constraint", str(kept))
    succeed(*pip, *tools, cwd=place, seconds=600)
    pytest_ = (python, "-m", "pytest", "-q", "-m", "not slow", *options)
    succeed(*pytest_, *tests, cwd=tree, seconds=2400)


@pytest.mark.slow
@pytest.mark.parametrize("minor", PYTHONS)
def test_wheel_works_in_an_empty_environment(wheel, minor, tmp_path):
    """Every module imports; on the other Pythons than ours the main tests pass too."""
    python = empty_environment(minor, tmp_path)
    pip = (python, "-m", "pip", "install", "--quiet")
    succeed(*pip, f"{wheel}[icons]", cwd=tmp_path, seconds=600)
    made = succeed(python, "-c", EVERY_MODULE, cwd=tmp_path, seconds=300)
    assert int(made) > 10
    if sys.version_info[:2] != tuple(map(int, minor.split("."))):
        smoke(python, tmp_path, SMOKE)


@pytest.mark.slow
def test_wheel_works_with_the_lowest_versions_that_it_admits(wheel, tmp_path):
    """Of what it names itself; what those need in turn is the newest that fits."""
    python = empty_environment("3.11", tmp_path)
    succeed(python, "-m", "pip", "install", "-q", "uv", cwd=tmp_path, seconds=300)
    uv = (python, "-m", "uv", "pip", "install", "--quiet", "--python", python)
    lowest = ("--resolution", "lowest-direct", str(wheel))
    succeed(*uv, *lowest, cwd=tmp_path, seconds=600)
    made = succeed(python, "-c", EVERY_MODULE, cwd=tmp_path, seconds=300)
    assert int(made) > 10
    told = "from importlib.metadata import version; print(version('jax'))"
    found = succeed(python, "-c", told, cwd=tmp_path).strip()
    assert f"jax>={found.removesuffix('.0')}" in PROJECT["dependencies"]
    # Old releases warn of what is new elsewhere.
    smoke(python, tmp_path, LOWEST_SMOKE, "-o", "filterwarnings=default")
