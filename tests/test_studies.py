"""Studies: what a file means, what is done already, and every way in which a run or the pool itself can end."""
import json
import os
import signal
import subprocess
import time

import psutil
import pytest

from autohdr.core import AutohdrError
from autohdr.runs.board import board
from autohdr.runs.pool import cancel, run_local
from autohdr.runs.spec import shipped
from autohdr.runs.status import read_status
from autohdr.runs.study import find_study, load_study, plan, pool_of
from tests.toys import COMMAND, STARTED, end_all, finish, printed, toy, wait_until

GOOD = "from pathlib import Path\nPath(run_dir, 'model.safetensors').write_text(f'{steps} {lr}')\nprint('done')"
# Counts to `steps`, a line in history.csv each; goes on where it was, as training does; waits for a file before the last.
TRAINS = """import time
from pathlib import Path
history = Path(run_dir, 'history.csv')
if not history.exists(): history.write_text('epoch,val_l1,seconds\\n')
for epoch in range(len(history.read_text().splitlines()), steps + 1):
    while epoch == steps and flag and not Path(flag).exists(): time.sleep(0.05)
    with open(history, 'a') as f: f.write(f'{epoch},{0.1/epoch:.3f},1\\n')
    print('epoch', epoch, flush=True)
Path(run_dir, 'metrics.json').write_text('{"ours": {"l1": 0.0125, "psnr": 30.5}}');"""
HISTORY = "epoch,val_l1,seconds\n1,0.100,1\n2,0.050,1\n3,0.033,1\n"  # of a run that nothing disturbed
DEAF = "import time\nprint('begun', flush=True)\nwhile True:\n    try: time.sleep(0.1)\n    except KeyboardInterrupt: print('no', flush=True)"
# `autohdr study`, its report made by a stand-in: that notebook has tests of its own.
STUDY = "import sys, autohdr.runs.study as s; real, recipe = s.finish, sys.argv.pop(1); s.finish = lambda study: real(study, recipe) if recipe else study.folder; from autohdr.cli import main; main()"


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


@pytest.fixture
def place(tmp_path):
    """A folder with toy recipes."""
    toy(tmp_path, "good", GOOD)
    toy(tmp_path, "trains", TRAINS)
    return tmp_path


def write(folder, text):
    (folder / "sweep.yaml").write_text(text)
    return folder / "sweep.yaml"


def start(folder, *args, report=""):
    """`autohdr study`, in a process of its own."""
    command = [COMMAND[0], "-c", STUDY, str(report), "study", str(folder / "sweep.yaml"), "--root", str(folder / "runs"), *args]
    STARTED.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder))
    return STARTED[-1]


def report_recipe(folder, *cells):
    """A notebook in the place of the report's."""
    recipe = toy(folder, "report", *cells)
    (folder / "report.ipynb").write_text((folder / "report.ipynb").read_text().replace("steps = 3", "study = ''  # folder of the study\\nsteps = 3"))
    return recipe


def work(folder, **options):
    """Run the study in this process; states by run."""
    study = plan(folder / "sweep.yaml", folder / "runs")
    run_local(study, **options)
    return {t.name: t.state for t in study.tasks}


def states(folder):
    return {t.name: t.state for t in load_study(folder / "runs/sweep").tasks}


def status(folder, run):
    return json.loads((folder / "runs/sweep" / run / "status.json").read_text())


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def training(folder, *names):
    for name in names:
        wait_until(lambda: printed(folder / "runs/sweep" / name, "epoch 2"), f"{name} trains")


def test_expansion(place):
    runs = "{small: {label: Small}, tuned: {parameters: {init: 'run:small', steps: 5}}, alone: {grid: {}}}"
    study = plan(write(place, f"recipe: good\nparameters: {{steps: 4}}\nruns: {runs}\ngrid: {{lr: [1e-4, 2.0e-3]}}\n"), place / "runs")
    assert [t.name for t in study.tasks] == ["small-lr_1e-4", "small-lr_0.002", "tuned-lr_1e-4", "tuned-lr_0.002", "alone"]
    tuned = study.tasks[3]
    assert tuned.needs == ["small-lr_0.002"] and tuned.spec.parameters["init"] == str(place / "runs/sweep/small-lr_0.002/model.safetensors")
    assert tuned.spec.parameters["steps"] == 5 and study.tasks[4].spec.parameters["steps"] == 4 and tuned.spec.axes == {"lr": 0.002}
    assert [t.label for t in study.tasks[:2]] == ["Small, lr 1e-4", "Small, lr 0.002"]


@pytest.mark.parametrize("name", shipped("studies"))
def test_shipped_studies_can_be_planned(tmp_path, name):
    for smoke in (False, True):
        study = plan(name, tmp_path, smoke)
        assert study.tasks and study.file == find_study(name) and study.about and {t.state for t in study.tasks} == {"new"}


def test_what_is_done_is_not_done_again(place, capsys):
    (place / "weights").write_text("one")
    file = write(place, "recipe: good\nruns: {a: {parameters: {flag: x}}, b: {parameters: {init: 'run:a'}}}\n")
    assert work(place, jobs=2) == dict(a="complete", b="complete")
    out = capsys.readouterr().out
    assert out.index("complete    a") < out.index("start       b"), "b waits for the model that it starts from"
    assert work(place) == dict(a="complete", b="complete") and "0 of 2 runs to do" in capsys.readouterr().out
    began = status(place, "b")["started"]
    (place / "runs/sweep/a/status.json").unlink()  # as a machine that went down may leave it
    assert work(place) == dict(a="complete", b="complete") and status(place, "b")["started"] == began
    assert "unchanged   b" in capsys.readouterr().out, "what it starts from was made anew, and is what it was"
    (place / "runs/sweep/a/model.safetensors").write_text("another")
    assert [(t.state, t.why) for t in plan(file, place / "runs").tasks] == [("complete", ""), ("changed", "init: the file changed")]


def test_what_has_changed_is_made_anew(place, capsys):
    file = write(place, "recipe: good\nruns: {a: , b: {parameters: {init: 'run:a'}}}\n")
    work(place)
    file.write_text(file.read_text().replace("a: ,", "a: {parameters: {steps: 8}},"))
    code, out, err = finish(start(place, "--dry-run"))
    assert code == 0 and "steps: 3 -> 8" in out and "starts from a" in out and "2 changed; 2 to run" in out, err
    assert (place / "runs/sweep/a/model.safetensors").read_text().startswith("3"), "a dry run does nothing"
    assert work(place) == dict(a="complete", b="complete")
    kept = sorted((place / "runs/sweep/_replaced").iterdir())
    assert [f.name[0] for f in kept] == ["a", "b"] and (kept[0] / "model.safetensors").read_text().startswith("3"), "moved, not deleted"
    assert status(place, "a")["attempt"] == 1 and (place / "runs/sweep/a/model.safetensors").read_text().startswith("8")


def test_failing_run_and_failing_report(place):
    toy(place, "bad", "print('so far')\nraise ValueError('the loss is not finite')")
    write(place, "recipe: good\nruns: {bad: {recipe: bad}, after: {parameters: {init: 'run:bad'}}, good: }\n")
    report = report_recipe(place, "import json\nfrom pathlib import Path\nprint([r['run'] for r in json.loads(Path(study, 'study.json').read_text())['runs']])")
    code, out, err = finish(start(place, "--jobs", "2", report=report))
    assert code == 1 and states(place) == dict(bad="failed", after="new", good="complete"), err
    assert "needs bad, which failed" in out and "the loss is not finite" in out and "Go on with: autohdr study" in out
    assert status(place, "bad")["attempt"] == 1, "what fails would fail again"
    assert "after" in (place / "runs/sweep/report.html").read_text(), "the report is there all the same"
    assert "2 to run" in finish(start(place, "--failed", "--dry-run"))[1], "what failed, and what waited for it"
    toy(place, "bad", GOOD)
    code, out, err = finish(start(place, report=report_recipe(place, "1/0")))
    assert code == 1 and "3 complete" in out and "the report could not be made" in err and "ZeroDivisionError" in err


def test_killed_runs_go_on(place, capsys):
    """A kernel and a runner, killed as the system does when memory runs out; a third run that dies for ever."""
    toy(place, "dies", "import os; os._exit(9)")
    write(place, f"recipe: trains\nparameters: {{flag: {place / 'flag'}}}\nruns: {{kernel: , runner: , hopeless: {{recipe: dies}}}}\n")
    process, runs = start(place, "--jobs", "2", "--retries", "1"), place / "runs/sweep"
    training(place, "kernel", "runner")
    os.kill(read_status(runs / "kernel")["kernel_pid"], signal.SIGKILL)
    killed = read_status(runs / "runner")
    os.kill(killed["pid"], signal.SIGKILL)
    for name in ("kernel", "runner"):
        wait_until(lambda: read_status(runs / name).get("attempt") == 2, f"{name} is tried again")
    assert gone(killed["kernel_pid"]), "two kernels never work in one folder"
    (place / "flag").touch()
    code, out, err = finish(process)
    assert code == 1 and states(place) == dict(kernel="complete", runner="complete", hopeless="died"), out + err
    assert status(place, "hopeless")["attempt"] == 2 and "exited with code 9" in out
    for name in ("kernel", "runner"):
        (first,) = status(place, name)["attempts"]
        assert first["state"] == "died" and "SIGKILL" in first["reason"] and f"died        {name}" in out
        assert (runs / name / "history.csv").read_text() == HISTORY


def test_interrupted_pool(place):
    write(place, f"recipe: trains\nparameters: {{flag: {place / 'flag'}}}\nruns: {{a: , b: , c: }}\n")
    process, runs = start(place, "--jobs", "2"), place / "runs/sweep"
    training(place, "a", "b")
    code, _, err = finish(start(place))
    assert code == 1 and "being worked on already" in err and str(process.pid) in err, "one pool at a time"
    rows = board(runs).set_index("run")
    assert list(rows.state) == ["running", "running", "new"] and rows.L1["a"].startswith("val 0.05") and rows["where"]["a"]
    kernels = [read_status(runs / name)["kernel_pid"] for name in "ab"]
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130 and "Go on with" in err and "Traceback" not in err, err
    assert states(place) == dict(a="terminated", b="terminated", c="new") and "SIGINT" in status(place, "a")["reason"]
    assert all(map(gone, kernels)) and pool_of(runs) == {}
    (place / "flag").touch()
    assert set(work(place, jobs=2).values()) == {"complete"} and status(place, "a")["attempt"] == 2


def test_second_signal_kills(place):
    toy(place, "deaf", DEAF)
    write(place, "recipe: deaf\n")
    process, run_dir = start(place), place / "runs/sweep/deaf"
    wait_until(lambda: printed(run_dir, "begun"), "it runs")
    kernel = read_status(run_dir)["kernel_pid"]
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: printed(run_dir, "no"), "it was asked to stop")
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert finish(process)[0] == 143 and time.monotonic() - begin < 8 and gone(kernel)
    assert status(place, "deaf")["state"] == "terminated" and "SIGTERM" in status(place, "deaf")["reason"]


def test_killed_pool(place):
    """Its run notices and ends itself; the next pool waits for that, and goes on with it."""
    write(place, f"recipe: trains\nparameters: {{flag: {place / 'flag'}}}\n")
    process, run_dir = start(place), place / "runs/sweep/trains"
    training(place, "trains")
    orphan = read_status(run_dir)
    process.kill()
    finish(process)
    process = start(place)
    wait_until(lambda: read_status(run_dir).get("attempt") == 2, "the next pool goes on with it")
    assert gone(orphan["pid"]) and gone(orphan["kernel_pid"])
    (place / "flag").touch()
    code, out, err = finish(process)
    assert code == 0 and status(place, "trains")["attempts"][0]["state"] == "terminated" and (run_dir / "history.csv").read_text() == HISTORY, out + err


def test_cancel(place):
    write(place, f"recipe: trains\nparameters: {{flag: {place / 'flag'}}}\nruns: {{a: , b: , c: }}\n")
    process, runs = start(place, "--jobs", "2"), place / "runs/sweep"
    training(place, "a", "b")
    with pytest.raises(AutohdrError, match="Unknown run"):
        cancel(runs, ["e"])
    assert [(t.name, t.state) for t in cancel(runs, ["a", "c"])] == [("a", "terminated"), ("c", "new")]
    assert "Cancelled" in status(place, "a")["reason"]
    (place / "flag").touch()
    code, out, _ = finish(process)
    assert code == 1 and states(place) == dict(a="terminated", b="complete", c="new") and "cancelled before it started" in out
    rows = board(runs).set_index("run")
    assert rows.L1["b"] == "0.0125" and "Cancelled" in rows.why["a"] and rows.attempts["b"] == 1
    assert cancel(runs) == [], "nothing is left to end"
