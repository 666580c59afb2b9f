"""Runs, and every way in which they can end: each must leave a true account and no process."""
import json
import os
import signal
import sys

import nbformat
import psutil
import pytest

from autohdr.core import AutohdrError
from autohdr.runs.page import render
from autohdr.runs.spec import is_path, make_spec, read_parameters, shipped
from autohdr.runs.status import read_status
from tests.toys import end_all, finish, printed, start, toy, wait_until

FOREVER = "import time\nprint('begun', flush=True)\nwhile True: time.sleep(0.1)"


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


def cells(run_dir):
    """State and printed text of each code cell after the parameters."""
    nb = nbformat.read(run_dir / "run.ipynb", as_version=4)
    rest = [c for c in nb.cells if c.cell_type == "code" and not {"parameters", "injected-parameters"} & set(c.metadata.get("tags", []))]
    return [(c.metadata.papermill["status"], "".join(o.get("text", "") for o in c.outputs)) for c in rest]


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_complete(tmp_path):
    recipe = toy(tmp_path, "good", "from pathlib import Path\nfor i in range(steps): print('step', i, flush=True)", "Path(run_dir, 'metrics.json').write_text('{}');")
    code, out, err = finish(start(recipe, "-p", "steps=2"))
    assert code == 0, err
    run_dir = tmp_path / "runs/toys/a"
    status = read_status(run_dir)
    assert status["state"] == "complete" and status["exit_code"] == 0 and status["ended"] and status["environment"]["packages"]["numpy"]
    assert {f.name for f in run_dir.iterdir()} - {"changes.diff"} == {"params.yaml", "run.ipynb", "report.html", "status.json", "log.txt", "metrics.json", "packages.txt"}, "and no temporary file"
    assert cells(run_dir) == [("completed", "step 0\nstep 1\n"), ("completed", "")]
    assert "step 1" in out and "step 1" in (run_dir / "log.txt").read_text() and str(run_dir / "report.html") in out
    assert "-p steps=2" in status["command"] and status["command"] in (run_dir / "report.html").read_text()
    code, _, err = finish(start(recipe))
    assert code == 1 and "exists (complete)" in err and "Traceback" not in err, "the name is taken"


def test_params_file_repeats_a_run(tmp_path):
    recipe = toy(tmp_path, "good", "print(steps, lr)")
    assert finish(start(recipe, "-p", "steps=7", "-p", "lr=1e-5"))[0] == 0
    (tmp_path / "again.yaml").write_text((tmp_path / "runs/toys/a/params.yaml").read_text())
    code, out, _ = finish(start(tmp_path / "again.yaml", name="b"))
    assert code == 0 and "7 1e-05" in out


def test_failing_cell(tmp_path):
    recipe = toy(tmp_path, "bad", "print('so far')", "raise ValueError('the <loss> is not finite')", "print('never')")
    code, _, err = finish(start(recipe))
    run_dir = tmp_path / "runs/toys/a"
    status, page = read_status(run_dir), (run_dir / "report.html").read_text()
    assert code == 1 and "ValueError: the <loss> is not finite" in err and "Traceback" not in err
    assert status["state"] == "failed" and status["error"]["name"] == "ValueError" and any("raise ValueError" in line for line in status["error"]["traceback"])
    assert cells(run_dir) == [("completed", "so far\n"), ("failed", ""), ("pending", "")]
    assert "the &lt;loss&gt; is not finite" in page and "Code that did not run" in page and "raise ValueError" in page


def test_kernel_killed(tmp_path):
    recipe = toy(tmp_path, "bad", FOREVER, "print('never')")
    process, run_dir = start(recipe), tmp_path / "runs/toys/a"
    wait_until(lambda: printed(run_dir, "begun"), "the cell ran")
    kernel = read_status(run_dir)["kernel_pid"]
    assert psutil.Process(kernel).exe() == os.path.realpath(sys.executable), "the kernel is the same Python"
    os.kill(kernel, signal.SIGKILL)
    code, _, err = finish(process)
    status = read_status(run_dir)
    assert code == 1 and status["state"] == "died" and "SIGKILL" in status["reason"] and "SIGKILL" in err
    assert [state for state, _ in cells(run_dir)] == ["failed", "pending"]
    assert "begun" in (run_dir / "report.html").read_text() and gone(kernel)


def test_kernel_exits(tmp_path):
    recipe = toy(tmp_path, "bad", "import os; os._exit(7)")
    assert finish(start(recipe))[0] == 1
    assert "exited with code 7" in read_status(tmp_path / "runs/toys/a")["reason"]


def test_kernel_crash_leaves_its_last_words(tmp_path):
    recipe = toy(tmp_path, "bad", "import ctypes; ctypes.string_at(0)")
    assert finish(start(recipe))[0] == 1
    assert "SIGSEGV" in read_status(tmp_path / "runs/toys/a")["reason"] and printed(tmp_path / "runs/toys/a", "Segmentation fault")


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal(tmp_path, number, exit_code):
    child = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\nprint('child', child.pid, flush=True)\n"
    tidy = child + "try:\n    while True: time.sleep(0.1)\nfinally: print('put away', flush=True)"
    recipe = toy(tmp_path, "long", "import time", tidy, "print('never')")
    process, run_dir = start(recipe), tmp_path / "runs/toys/a"
    wait_until(lambda: printed(run_dir, "child"), "the cell ran")
    kernel = read_status(run_dir)["kernel_pid"]
    process.send_signal(number)
    code, _, err = finish(process)
    status = read_status(run_dir)
    assert code == exit_code == status["exit_code"] and status["state"] == "terminated" and number.name in status["reason"] and "Traceback" not in err
    assert printed(run_dir, "put away"), "the notebook had time for its `finally`"
    assert [state for state, _ in cells(run_dir)] == ["completed", "failed", "pending"] and number.name in (run_dir / "report.html").read_text()
    grandchild = int((run_dir / "log.txt").read_text().split("child ")[1].split()[0])
    wait_until(lambda: gone(kernel) and gone(grandchild), "the kernel and what it started are gone", 5)


def test_second_signal_kills(tmp_path):
    deaf = "import time\nprint('begun', flush=True)\nwhile True:\n    try: time.sleep(0.1)\n    except KeyboardInterrupt: print('no', flush=True)"
    process, run_dir = start(toy(tmp_path, "deaf", deaf)), tmp_path / "runs/toys/a"
    wait_until(lambda: printed(run_dir, "begun"), "the cell ran")
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: printed(run_dir, "no"), "the notebook was asked to stop")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143 and read_status(run_dir)["state"] == "terminated"


def test_signal_while_the_kernel_starts(tmp_path):
    process, run_dir = start(toy(tmp_path, "long", FOREVER)), tmp_path / "runs/toys/a"
    wait_until(lambda: printed(run_dir, "long.ipynb"), "the run began")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    status = json.loads((run_dir / "status.json").read_text()) if (run_dir / "status.json").exists() else {}
    assert code in (143, -signal.SIGTERM), err
    assert status["state"] == "terminated" or (code < 0 and read_status(run_dir)["state"] == "died")


def test_autohdr_killed(tmp_path):
    process, run_dir = start(toy(tmp_path, "long", FOREVER)), tmp_path / "runs/toys/a"
    wait_until(lambda: printed(run_dir, "begun"), "the cell ran")
    status = read_status(run_dir)
    assert status["state"] == "running" and status["cell"] == 4
    process.kill()
    finish(process)
    assert json.loads((run_dir / "status.json").read_text())["state"] == "running", "nobody was left to write it"
    assert read_status(run_dir)["state"] == "died"
    wait_until(lambda: gone(status["kernel_pid"]), "the kernel notices and ends", 15)
    assert "gone without a word" in render(run_dir).read_text() and [state for state, _ in cells(run_dir)] == ["running"]


def test_running_name_is_refused(tmp_path):
    recipe = toy(tmp_path, "long", FOREVER)
    process, run_dir = start(recipe), tmp_path / "runs/toys/a"
    wait_until(lambda: printed(run_dir, "begun"), "the cell ran")
    code, _, err = finish(start(recipe, "--overwrite"))
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130 and code == 1 and "is running" in err


def test_several_at_once(tmp_path):
    meet = "from pathlib import Path\nimport time\nPath(run_dir, 'here').touch()\nwhile len(list(Path(run_dir).parent.glob('*/here'))) < 4: time.sleep(0.05)\nprint('run', steps)"
    recipe = toy(tmp_path, "many", meet)
    processes = [start(recipe, "-p", f"steps={i}", name=f"run{i}") for i in range(4)]
    for i, process in enumerate(processes):
        code, out, err = finish(process)
        assert code == 0, err
        assert f"run {i}\n" in out and cells(tmp_path / f"runs/toys/run{i}") == [("completed", f"run {i}\n")]


def test_log_grows_as_it_comes(tmp_path):
    recipe = toy(tmp_path, "slow", "import os, time\nprint('first', flush=True)\nwhile not os.path.exists(flag): time.sleep(0.05)\nprint('second')")
    process = start(recipe, "-p", f"flag={tmp_path}/flag")
    wait_until(lambda: printed(tmp_path / "runs/toys/a", "first"), "log.txt shows what was printed")
    (tmp_path / "flag").touch()
    code, out, _ = finish(process)
    assert code == 0 and "second" in out


def test_paths_are_relative_to_the_command(tmp_path, monkeypatch):
    recipe = toy(tmp_path, "good", "print(1)")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/weights").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert make_spec(str(recipe), ["init=weights"]).parameters["init"] == str(tmp_path / "here/weights")


def test_only_what_a_comment_says_first_is_a_path(tmp_path):
    """Of all notebooks that ship, and a folder that is only one word of several."""
    paths = {f"{name}.{p.name}" for name, file in shipped("experiments").items() for p in read_parameters(file).values() if is_path(p) and p.name not in ("run_dir", "pairs", "init", "base", "pretrain_pairs", "vgg_weights")}
    assert paths == {"compare.study", "ensemble.members", "enhance.photos", "enhance.model", "enhance.reference", "learn.photos", "merge.folder", "merge.edits"}
    assert make_spec("enhance", ["listing=folder", "photos=."]).parameters["listing"] == "folder"


def test_other_kernelspec_is_not_used(tmp_path):
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["false"], "display_name": "python3", "language": "python"}')
    code, out, err = finish(start(toy(tmp_path, "who", "import sys; print(sys.executable)"), env=dict(JUPYTER_PATH=str(tmp_path / "jupyter"), TMPDIR=str(tmp_path))))
    assert code == 0 and sys.executable in out, err


@pytest.mark.parametrize("wrong, words", [("stpes=3", "Did you mean 'steps'"), ("steps=2.5", "type int"), ("lr=-1", "lr is -1"), ("init=no/such", "no file or folder"), ("steps", "key=value")])
def test_wrong_parameter(tmp_path, wrong, words):
    with pytest.raises(AutohdrError, match=words):
        make_spec(str(toy(tmp_path, "good", "from autohdr.training.recipe import Recipe")), [wrong])
