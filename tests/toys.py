"""Toy notebooks with their recipes, and runs of them in a process of their own."""
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat

COMMAND = [sys.executable, "-c", "from autohdr.cli import main; main()"]
STARTED = []
PARAMETERS = 'steps = 3  # how many\ninit = ""  # a file with weights\nflag = ""  # what to wait for\nlr = 1e-3  # learning rate\nrun_dir = ""  # set by the run'


def toy(folder: Path, name: str, *cells: str) -> Path:
    """A notebook with these code cells, and the recipe that runs it."""
    code = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {name}\n\n> A toy."), code(PARAMETERS, metadata=dict(tags=["parameters"])), *map(code, cells)])
    nb.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, folder / f"{name}.ipynb")
    recipe = folder / f"{name}.yaml"
    recipe.write_text(f"notebook: {name}.ipynb\nstudy: toys\nabout: a toy\n")
    return recipe


def start(recipe: Path, *args: str, name: str = "a", env: dict = None) -> subprocess.Popen:
    """`autohdr run` of a toy, into runs/ beside it."""
    command = [*COMMAND, "run", str(recipe), "--name", name, "--root", str(recipe.parent / "runs"), *args]
    STARTED.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, cwd=recipe.parent))
    return STARTED[-1]


def end_all():
    """End what a failing test left running; the kernels notice and follow."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen) -> tuple:
    """(exit code, stdout, stderr) of a run."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_until(condition, what: str, seconds: float = 60):
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"in {seconds} s never: {what}")


def printed(run_dir: Path, text: str) -> bool:
    """Has the notebook printed this yet?"""
    return (run_dir / "log.txt").exists() and text in (run_dir / "log.txt").read_text()
