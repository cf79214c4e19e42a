"""The README's first command, and the notebooks, which use what it leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fresh_tree import ROOT, copy_of_the_tree, succeed
from PIL import Image as Pillow

from cm3leon_jax import notebook

NAMES = (
    *("01_quickstart", "02_a_tokens_life", "03_image_tokenizer", "04_retrieval"),
    *("05_decoding", "06_finetune_your_task", "07_scale_out", "08_your_data"),
)
# The quick system must reach these on unseen scenes.
REQUIRED = {
    "reconstruction/objects": 0.97,
    "text_to_image/objects": 0.80,
    "caption/objects": 0.85,
    "infill/objects": 0.75,
}


def cells(name: str, kind: str = "code") -> list[str]:
    found = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    return ["".join(c["source"]) for c in found["cells"] if c["cell_type"] == kind]


def test_these_are_the_notebooks():
    assert {path.stem for path in (ROOT / "notebooks").iterdir()} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_stripped_and_begin_alike(name):
    whole = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    assert set(whole["metadata"]) == {"kernelspec", "language_info"}
    for cell in whole["cells"]:
        assert not cell["metadata"] and cell.get("execution_count") is None
        assert not cell.get("outputs")
    first, *others = cells(name)
    setup = cells(NAMES[0])[0].split("from cm3leon_jax")[0]
    assert first.startswith(setup) and first.endswith("notebook.check()")
    assert "not yet run on Colab" in "".join(cells(name, "markdown"))
    # Only what is public.
    for text in others:
        assert not re.search(r"(\bimport |\.)_[a-z]", text), text
    for target in re.findall(r"\]\((\w+\.ipynb)\)", "".join(cells(name, "markdown"))):
        assert (ROOT / "notebooks" / target).is_file()


def test_without_a_checkout_the_first_cell_says_what_to_fill_in(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", cells(NAMES[0])[0]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "No checkout here: set REPOSITORY above to the git address of yours."
    ]


def test_versions_that_do_not_fit_are_one_line(monkeypatch, capsys):
    notebook.check()
    shown = capsys.readouterr().out
    assert shown.startswith("Python 3.") and "jax " in shown
    for wanted, have in (("jax>=99.1", r"\d"), ("not-there>=1", "none")):
        given = ["numpy>=1.0; python_version < '3'", wanted]
        monkeypatch.setattr(notebook, "requires", lambda _, given=given: given)
        with pytest.raises(SystemExit) as error:
            notebook.check()
        name, least = wanted.split(">=")
        message = f"needs {name} {re.escape(least)} or newer, here is {have}"
        assert re.search(message, str(error.value))
        assert "\n" not in str(error.value)


def test_a_trained_system_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "run_all.py"
    script.write_text("import sys; print(*sys.argv[1:]); sys.exit('no luck')")
    with pytest.raises(RuntimeError, match="failed: no luck"):
        notebook.trained("c.py:a", tmp_path / "w")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "report.html").write_text("<html>")
    assert notebook.trained("c.py:a", tmp_path / "w") == tmp_path / "w"


def test_sheet_lays_out_pictures_and_titles():
    red = Pillow.new("RGB", (4, 4), "red")
    black = np.zeros((2, 2), bool)
    made = notebook.sheet([red, None, black], ["", "a", "b"], columns=2, side=20)
    plain = notebook.sheet([red] * 3, columns=2, side=20)
    assert made.width == plain.width == 8 + 2 * 28
    assert made.height > plain.height == 8 + 2 * 28
    assert made.getpixel((10, 10)) == (255, 0, 0)
    assert made.getpixel((40, 10)) == (255, 255, 255)  # the empty place
    with pytest.raises(ValueError, match="2 titles for 1 pictures"):
        notebook.sheet([red], ["a", "b"])
    with pytest.raises(ValueError, match="at least one picture"):
        notebook.sheet([])


# ---------------------------------------------------------------- a whole checkout


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, dict]:
    """A fresh checkout after the README's first command, and its last line: the one
    training of the quick system in all tests."""
    tree = copy_of_the_tree(tmp_path_factory.mktemp("fresh") / "tree")
    out = succeed("bash", "launch/quickstart.sh", cwd=tree, seconds=2400)
    return tree, json.loads(out.strip().splitlines()[-1])


@pytest.mark.slow
def test_quickstart_on_a_fresh_checkout(quick):
    """The README's first command: no environment, no work directory, one report."""
    tree, last = quick
    assert set(last) == {"report", "scores_file", "scores"}
    report = (tree / last["report"]).read_text("utf-8")
    assert "<section" in report
    scores = json.loads((tree / last["scores_file"]).read_text("utf-8"))["scores"]
    assert last["scores"] == {key: score["value"] for key, score in scores.items()}
    for key, least in REQUIRED.items():
        assert scores[key]["value"] >= least and scores[key]["n"] >= 300, scores[key]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(quick, name):
    """Top to bottom, every cell, beside the system that is trained already."""
    import nbclient  # here, as everything else passes without it
    import nbformat

    tree, _ = quick
    found = nbformat.read(tree / "notebooks" / f"{name}.ipynb", as_version=4)
    context = {"metadata": {"path": str(tree / "notebooks")}}
    nbclient.NotebookClient(found, timeout=900, resources=context).execute()
    outputs = [out for cell in found.cells for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", ()) for out in outputs)
