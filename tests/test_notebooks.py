"""Every notebook runs top to bottom on a CPU; its cells are the library's first tests."""
import multiprocessing
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PROCESSES = multiprocessing.get_context("forkserver")  # each notebook in a process of its own, of which the imports are done once: a sixth of all the time that CI took
PROCESSES.set_forkserver_preload(["torch", "pandas", "plotly.express", "skimage.metrics", "nbdev.test", "autohdr.cli", "autohdr.learn.look"])


def run(notebook, log):
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    from nbdev.test import nbdev_test
    nbdev_test(path=notebook, n_workers=0)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs(notebook, tmp_path):
    process = PROCESSES.Process(target=run, args=(notebook, tmp_path / "log.txt"))
    process.start()
    process.join(600)
    if process.exitcode is None:
        process.kill()
    output = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 0 and "Success." in output, output[-4000:]
