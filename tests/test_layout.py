"""The shape of the project: notebooks are the source, clean and in sync; imports run one way; the README is the index notebook."""
import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
# Rooms in the order in which imports may run: a module imports from its own room and from those before it.
ROOMS = [["core"], ["photo", "metrics"], ["data"], ["models", "losses"], ["training"], ["inference", "postprocess"], ["enhance"], ["learn"], ["runs"], ["explore", "cli"]]
LEVEL = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A copy of the notebooks, cleaned and exported afresh."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "autohdr").mkdir()
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([Path(sys.executable).parent / command], cwd=folder, check=True, capture_output=True)
    return folder


def test_notebooks_are_clean(exported):
    dirty = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if not filecmp.cmp(p, exported / p.relative_to(ROOT), shallow=False)]
    assert not dirty, f"run nbdev_clean: {dirty}"


def test_library_is_what_the_notebooks_export(exported):
    fresh = {p.relative_to(exported): p.read_text() for p in (exported / "autohdr").rglob("*.py")}
    stands = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "autohdr").rglob("*.py")}
    stale = [str(p) for p in fresh.keys() | stands.keys() if fresh.get(p) != stands.get(p)]
    assert not stale, f"run nbdev_export (and delete what no notebook exports): {sorted(stale)}"


def test_library_has_nothing_untracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    command = ["git", "-c", f"safe.directory={ROOT}", "status", "--porcelain", "--untracked-files=all", "autohdr", "nbs"]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    untracked = [line for line in out.splitlines() if line.startswith("??")]
    assert not untracked, untracked


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_style(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"].get("kernelspec", {}).get("name") == "python3", "papermill needs a kernelspec"
    first = "".join(notebook["cells"][0]["source"])
    assert notebook["cells"][0]["cell_type"] == "markdown" and first.startswith("# ") and "\n> " in first or path.stem == "index", "opens with an H1 and a quote"
    long = [i for i, c in enumerate(notebook["cells"]) if c["cell_type"] == "code" and "".join(c["source"]).startswith("#| export") and len(c["source"]) > 60]
    assert not long, f"export cells over 60 lines: {long}"


def imports(path):
    """(room, line) of each autohdr import in a module, relative ones resolved."""
    package = ["autohdr", *path.relative_to(ROOT / "autohdr").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [module + [a.name] for a in node.names] if len(module) == 1 else [module]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        yield from ((n[1], node.lineno) for n in names if n[0] == "autohdr" and len(n) > 1)


def test_imports_run_one_way():
    wrong = []
    for path in sorted((ROOT / "autohdr").rglob("*.py")):
        if path.name.startswith("_"):
            continue
        room = path.relative_to(ROOT / "autohdr").parts[0].removesuffix(".py")
        assert room in LEVEL, f"{path}: a room that ROOMS does not know"
        wrong += [f"{path.relative_to(ROOT)}:{line} imports {used}" for used, line in imports(path) if used in LEVEL and LEVEL[used] > LEVEL[room]]
    assert not wrong, wrong


def test_numpy_rooms_need_no_torch():
    code = "import sys, autohdr.photo, autohdr.metrics, autohdr.data.samples, autohdr.data.analysis, autohdr.postprocess.controls; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_exported_modules_are_complete_without_their_notebooks():
    """A name imported in a hidden cell works in the notebook and is missing from the module."""
    done = subprocess.run([sys.executable, "-m", "pyflakes", "autohdr"], cwd=ROOT, capture_output=True, text=True)
    faults = [line for line in done.stdout.splitlines() if "_modidx" not in line and "__all__" not in line]
    assert not faults and not done.stderr, faults or done.stderr


def test_readme_is_the_index_notebook():
    from tests.readme import readme

    assert (ROOT / "README.md").read_text() == readme(), "run make readme"


def test_readme_shows_pictures_that_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures and all((ROOT / p).is_file() for p in pictures), pictures


def test_train_parameters_are_the_recipe():
    from dataclasses import fields

    from autohdr.runs.spec import read_parameters
    from autohdr.training.recipe import Recipe

    for name, missing in (("train", set()), ("crossval", {"fold", "patience", "val_every"})):
        given = {n: p.default for n, p in read_parameters(ROOT / "nbs/experiments" / f"{name}.ipynb").items()}
        assert {f.name for f in fields(Recipe)} - given.keys() == missing, name
        assert all(isinstance(given[f.name], f.type) for f in fields(Recipe) if f.name in given), name
