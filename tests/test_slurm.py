"""Studies on a real SLURM cluster of one node that each test starts for itself, with accounting and without: every way in which SLURM ends a job."""
import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from autohdr import cli
from autohdr.core import AutohdrError
from autohdr.runs import pool, slurm
from autohdr.runs.status import read_status
from autohdr.runs.study import load_study, plan, write_study
from tests.slurm_cluster import cluster, needs_slurm
from tests.toys import toy, wait_until

STEPS = """
import time
from pathlib import Path
from autohdr.core import StopRequested, stop_requested, write_text
saved = Path(run_dir, "saved")
at = int(saved.read_text()) if saved.exists() else 0
with open(Path(run_dir, "times"), "a") as f: f.write(f"{time.time()} ")
print("begun at", at, flush=True)
for step in range(at, steps):
    time.sleep(0.1)
    write_text(saved, str(step + 1))  # whole at any moment, since it is killed at any
    if stop_requested(): raise StopRequested(f"saved at step {step + 1}")
with open(Path(run_dir, "times"), "a") as f: f.write(f"{time.time()} ")
"""
CHECK = "from pathlib import Path\nif flag and not Path(flag).exists(): raise ValueError('there is no flag')\nPath(run_dir, 'model.safetensors').write_text('weights')"
TRAINING = """
import time
from pathlib import Path
import autohdr.training.loop as loop
from autohdr.core import stop_requested
from autohdr.training.recipe import Recipe
recipe = Recipe(size=48, crop=32, epochs=steps, warmup_epochs=1, model_config={"width": 8}, lr=3e-3, folds=2, fold=0, patience=0, threads=1, device="cpu")
pairs = loop.load_pairs(recipe)[0].groupby("fold").head(8)
update, updates = loop.update, []
def held(*args):
    updates.append(1)
    while len(updates) == 5 and flag and not Path(flag).exists() and not stop_requested(): time.sleep(0.1)  # in the middle of an epoch
    return update(*args)
loop.update = held
try: loop.train(recipe, pairs, run_dir)
finally: loop.update = update
"""
PROFILE = dict(partition="low", cpus=1, memory="100M", time="00:30:00", warning=10)


@pytest.fixture(autouse=True)
def one_job_at_a_time(monkeypatch):
    """Jobs inherit this environment."""
    needs_slurm()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Sweep:
    """A study of toys in a folder, and what a user does with it."""

    def __init__(self, folder: Path, runs: dict, **profile):
        self.file, self.root, self.profile, self.flag, self.begins = (folder / name for name in ("sweep.yaml", "runs", "profile.yaml", "flag", "begins"))
        toy(folder, "steps", STEPS, CHECK)
        toy(folder, "training", TRAINING)
        short = folder / "short.yaml"
        short.write_text((folder / "steps.yaml").read_text() + "resources: {time: '00:01:00'}\n")
        self.file.write_text(yaml.safe_dump(dict(recipe="steps", runs=runs)))
        self.profile.write_text(yaml.safe_dump(PROFILE | profile))
        self.study = plan(self.file, self.root)
        write_study(self.study)
        self.folder = self.study.folder

    def submit(self, *runs, jobs=None):
        study = load_study(self.folder)
        return slurm.submit(study, [t for t in study.tasks if t.name in runs], str(self.profile), jobs)

    def status(self, run):
        return read_status(self.folder / run) if (self.folder / run / "status.json").exists() else {}

    def printed(self, run, text):
        log = self.folder / run / "log.txt"
        return log.exists() and text in log.read_text()

    def states(self):
        return slurm.job_states(self.folder).set_index("run").slurm_state

    def begun(self, run):
        self.until(lambda: self.printed(run, "begun at"), f"{run} runs")
        return self.job(run)

    def over(self, *runs):
        def done():
            states = self.states()
            return all(states[r] in slurm.OVER for r in runs)
        self.until(done, f"{runs} are over")

    def job(self, run):
        return slurm.read_jobs(self.folder)["runs"][run]["job"]

    def until(self, condition, what, seconds=150):
        """wait_until, with what the cluster says where it fails."""
        try:
            return wait_until(condition, what, seconds)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.words()}") from None

    def words(self):
        logs = [sh("squeue", "-r", "-t", "all", "-o", "%i %T %r")] + [f"{f.name}: {f.read_text()[-500:]}" for f in self.folder.glob("_slurm/*/*.out")]
        return "\n".join(logs) if self.folder.exists() else ""


def sh(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def side_by_side(*scenarios):
    """Run them in threads; raise the first error after all have ended."""
    errors = []

    def guarded(scenario):
        try:
            scenario()
        except BaseException as e:
            errors.append((scenario.__name__, e))

    threads = [threading.Thread(target=guarded, args=[s]) for s in scenarios]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise AssertionError(f"{len(errors)} scenarios failed: {', '.join(name for name, _ in errors)}") from errors[0][1]


def times(run_dir):
    """Beginnings and ends of a run's cell, as it wrote them."""
    return [float(t) for t in (run_dir / "times").read_text().split()]


def test_study_without_accounting(tmp_path):
    """One study in which everything happens that SLURM can do to a job."""
    lost = tmp_path / "lost.safetensors"
    lost.write_text("there when the study is checked")
    runs = {f"quick{i}": dict(parameters=dict(steps=10)) for i in range(3)}
    runs |= dict(next=dict(parameters=dict(steps=1, init="run:quick1")), lost=dict(parameters=dict(steps=1, init=str(lost))), again=dict(parameters=dict(steps=60)), killed=dict(parameters=dict(steps=100)))
    runs |= {name: dict(parameters=dict(steps=900)) for name in ("gone", "dropped")}
    runs |= dict(bad=dict(parameters=dict(steps=1, flag=str(tmp_path / "begins"))), after=dict(parameters=dict(steps=1, init="run:bad")))
    runs |= dict(rough=dict(recipe="training", parameters=dict(steps=5, flag=str(tmp_path / "flag"))))
    with cluster(CPUS=16):
        sweep = Sweep(tmp_path, runs)
        lost.unlink()
        ids = sweep.submit("quick0", "quick1", "quick2", "next", jobs=2)
        assert ids["quick2"] == ids["quick0"].replace("_0", "_2") and "_" not in ids["next"], "an array, and a job that waits for one of it"
        assert sweep.submit("quick0", "next") == {k: ids[k] for k in ("quick0", "next")}, "what is in the queue is not submitted again"
        first_report = slurm.read_jobs(sweep.folder)["report"]["job"]
        with pytest.raises(AutohdrError, match="after needs bad, which is new"):
            sweep.submit("after")
        sweep.submit(*(set(runs) - {"quick0", "quick1", "quick2", "next"}))
        assert first_report in sh("squeue", "-h", "-t", "CANCELLED", "-o", "%i").split(), "one report is enough"

        def limit_and_order():
            sweep.over("quick0", "quick1", "quick2", "next")
            spans = [times(sweep.folder / f"quick{i}") for i in range(3)]
            assert max(sum(a <= t <= b for a, b in spans) for t, _ in spans) <= 2, f"two at a time: {spans}"
            assert times(sweep.folder / "next")[0] > spans[1][1], "after the run whose weights it reads"
            assert all(sweep.status(run)["state"] == "complete" for run in ("quick0", "quick2", "next"))

        def undisturbed():
            exec(TRAINING, dict(steps=5, flag="", run_dir=sweep.folder / "_calm"))

        def requeued_by_hand():
            job = sweep.begun("again")
            wait_until(lambda: (sweep.folder / "again/saved").exists(), "a step was done")
            sh("scontrol", "requeue", job)
            sweep.over("again")
            status = sweep.status("again")
            first = status["attempts"][0]
            assert status["state"] == "complete" and status["attempt"] == 2 and first["state"] == "terminated" and "SLURM: put back into the queue" in first["reason"], status
            assert status["job"]["restarts"] == 1 and len(times(sweep.folder / "again")) == 3 and sweep.printed("again", "begun at")

        def cancelled_by_hand():
            sh("scancel", sweep.begun("gone"))
            sweep.over("gone")
            status = sweep.status("gone")
            assert status["state"] == "terminated" and "SIGTERM" in status["reason"] and "SLURM: cancelled (scancel)" in status["reason"], status

        def killed_outright():
            sweep.begun("killed")
            os.kill(sweep.status("killed")["pid"], signal.SIGKILL)
            sweep.until(lambda: sweep.status("killed").get("attempt") == 2 and sweep.status("killed").get("cell") == 4, "it begins again by itself")
            os.kill(sweep.status("killed")["kernel_pid"], signal.SIGKILL)
            sweep.over("killed")
            status = sweep.status("killed")
            first, second = status["attempts"]
            assert status["state"] == "complete" and status["job"]["restarts"] == 2 and first["state"] == second["state"] == "died", status
            assert "Killed at cell 4 of 5. SLURM: the job's process ended by a signal (Killed)" in first["reason"] and "SIGKILL" in second["reason"] and "SLURM: the run died 2 times in this job; it goes on" in second["reason"], status

        def cancelled_by_us():
            sweep.begun("dropped")
            assert slurm.cancel(sweep.folder, ["dropped"]) == ["dropped"]
            sweep.over("dropped")
            status = sweep.status("dropped")
            assert status["state"] == "terminated" and "SLURM: cancelled (autohdr cancel)" in status["reason"], status

        def data_missing():
            sweep.over("lost")
            status = sweep.status("lost")
            assert status["state"] == "failed" and "lacks" in status["reason"] and str(lost) in status["reason"] and status["kernel_pid"] is None and status["cell"] is None, status

        def failed_and_what_needs_it():
            sweep.over("bad", "after")
            states = slurm.job_states(sweep.folder).set_index("run")
            assert sweep.status("bad")["state"] == "failed" and "there is no flag" in sweep.status("bad")["reason"]
            assert sweep.status("after") == {} and states.slurm_state["after"] == "CANCELLED" and "never started" in states.reason["after"], "and it does not wait for ever"
            sweep.begins.touch()
            again = sweep.submit("bad", "after")
            sweep.over("bad", "after")
            assert again["bad"] != states.job["bad"] and {sweep.status(r)["state"] for r in again} == {"complete"} and sweep.status("bad")["attempt"] == 2
            assert "there is no flag" in sweep.status("bad")["attempts"][0]["reason"]

        side_by_side(undisturbed, limit_and_order, requeued_by_hand, cancelled_by_hand, killed_outright, cancelled_by_us, data_missing, failed_and_what_needs_it)
        preempted(sweep)
        lines = []
        table = slurm.wait(sweep.folder, seconds=120, every=0.5, show=lines.append)
        assert set(table.slurm_state[table.run != "compare"]) == {"COMPLETED", "FAILED", "CANCELLED"} and any("compare: COMPLETED" in line for line in lines), lines
        page = (sweep.folder / "report.html").read_text()
        assert "cancelled (autohdr cancel)" in page and "put back into the queue" in page and "lacks" in page, "the report says what happened"
        assert all(Path(log).exists() for log in table.log[~table.run.isin(["after"])])


def preempted(sweep):
    """A job of higher priority takes the node while a training goes on; it ends with the same weights as an undisturbed one."""
    history = sweep.folder / "rough/history.csv"
    sweep.until(lambda: history.exists() and len(history.read_text().splitlines()) == 3, "two epochs")
    sh("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--chdir=/tmp", "--wrap=sleep 1")
    sweep.until(lambda: sweep.status("rough")["state"] != "running", "it pauses")
    sweep.flag.touch()
    sweep.over("rough")
    status = sweep.status("rough")
    first = status["attempts"][0]
    assert status["state"] == "complete" and first["state"] == "paused" and "the state is saved" in first["reason"] and "SLURM: preempted by a job of higher priority" in first["reason"], status
    weights = [load_file(sweep.folder / run / "model.safetensors") for run in ("_calm", "rough")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0]), "bit for bit"
    histories = [pd.read_csv(sweep.folder / run / "history.csv").drop(columns="seconds") for run in ("_calm", "rough")]
    assert len(histories[0]) == 5 and histories[0].equals(histories[1])


def test_study_with_accounting(tmp_path):
    """The controller forgets jobs after seconds; accounting does not. A time limit, a node that fails, a whole study that is cancelled."""
    runs = dict(long=dict(recipe="short", parameters=dict(steps=300)), gone=dict(parameters=dict(steps=900)), node=dict(parameters=dict(steps=150)))
    with cluster(accounting=True, CPUS=8, MIN_JOB_AGE=5):
        sweep = Sweep(tmp_path, runs)
        (tmp_path / "other").mkdir()
        other = Sweep(tmp_path / "other", dict(stays=dict(parameters=dict(steps=900)), waits=dict(parameters=dict(init="run:stays"))))
        sweep.submit("long", "gone")
        other.submit("stays", "waits")

        def forgotten_by_the_controller():
            job = sweep.begun("gone")
            sh("scancel", job)
            sweep.until(lambda: job not in sh("squeue", "-h", "-t", "all", "-o", "%i").split(), "the controller has forgotten the job")
            row = slurm.job_states(sweep.folder).set_index("run").loc["gone"]
            assert row.slurm_state == "CANCELLED" and row.node == "localhost" and "SLURM: cancelled (scancel)" in sweep.status("gone")["reason"], "known from sacct"

        def time_limit():
            sweep.over("long")
            status = sweep.status("long")
            assert status["state"] == "complete" and status["attempt"] > 1 and status["job"]["restarts"] == status["attempt"] - 1, status
            assert all(a["state"] == "paused" and "saved at step" in a["reason"] and "SLURM: near its time limit" in a["reason"] for a in status["attempts"]), status

        def all_cancelled():
            other.begun("stays")
            assert sorted(slurm.cancel(other.folder)) == ["compare", "stays", "waits"]
            table = slurm.wait(other.folder, seconds=120, every=0.5, show=str).set_index("run")
            assert set(table.slurm_state) == {"CANCELLED"} and not (other.folder / "report.html").exists() and "autohdr cancel" in table.reason["waits"]

        side_by_side(forgotten_by_the_controller, time_limit, all_cancelled)
        sweep.submit("node")
        sweep.begun("node")
        sh("scontrol", "update", "nodename=localhost", "state=down", "reason=test")
        for pid in (sweep.status("node")["pid"], sweep.status("node")["kernel_pid"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # as a power cut would
        def back():
            subprocess.run(["scontrol", "update", "nodename=localhost", "state=resume"], capture_output=True, timeout=60)  # refused if it is back by itself
            return sh("sinfo", "-h", "-o", "%T").split()[0] in ("idle", "mixed", "allocated")

        wait_until(lambda: "RUNNING" not in sweep.states()["node"], "the node's end was noticed")
        wait_until(back, "the node is back")
        sweep.until(lambda: sweep.status("node").get("attempt") == 2 or sweep.states()["node"] in slurm.OVER, "it begins again")
        sweep.over("node")
        first = sweep.status("node")["attempts"][-1]
        assert sweep.status("node")["state"] == "complete" and "SLURM: the node failed" in first["reason"], first


def test_no_cluster(tmp_path, monkeypatch):
    """The controller is down: everything says so, and nothing waits."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=9\nMessageTimeout=2\nAuthType=auth/munge\nNodeName=localhost\nPartitionName=low Nodes=localhost\n")
    sweep = Sweep(tmp_path, dict(a=dict(parameters=dict(steps=1))))
    begin = time.monotonic()
    with pytest.raises(slurm.SlurmError):
        sweep.submit("a")
    assert time.monotonic() - begin < 60 and not (sweep.folder / "jobs.json").exists()


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """SLURM's commands, as scripts that log their arguments and answer from a file."""
    (tmp_path / "bin").mkdir()
    bodies = dict(squeue=f"cat {tmp_path}/queue", scancel=f"echo $* >> {tmp_path}/cancelled", scontrol="echo 'ClusterName = here'", sacct="exit 1", srun="exit 1", sbatch="exit 1")
    (tmp_path / "queue").touch()

    def answer(name, body):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    for name, body in bodies.items():
        answer(name, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return answer


def queued(sweep, **states):
    """Write down jobs of these runs, as a submission does, and let squeue show them."""
    lines = []
    with slurm._changing(sweep.folder) as jobs:
        jobs["cluster"] = "here"
        for i, (run, state) in enumerate(states.items()):
            entry = dict(job=f"12_{i}", token="t", log="", user=os.getuid(), submitted=slurm.now())
            jobs.update(report=entry) if run == "compare" else jobs["runs"].update({run: entry})
            lines.append(f"12_{i}|{state}|None||t\n")
    (sweep.file.parent / "queue").write_text("".join(lines))


def test_pending_jobs_are_cancelled(tmp_path, answers):
    """Runs that have no folder yet, too."""
    sweep = Sweep(tmp_path, dict(a={}, b={}))
    queued(sweep, a="PENDING", b="PENDING", compare="PENDING")
    assert [t.name for t in pool.cancel(sweep.folder, wait=1)] == ["a", "b"]
    assert (tmp_path / "cancelled").read_text() == "12_2\n12_0 12_1\n"


def test_active_jobs_keep_their_parameters(tmp_path, answers):
    """Another plan is refused here and on the cluster, and study.json stays what it was."""
    sweep = Sweep(tmp_path, dict(a={}, b={}))
    queued(sweep, a="PENDING", b="COMPLETED")
    before = (sweep.folder / "study.json").read_text()
    changed = plan(sweep.file, sweep.root, values=dict(steps=7))
    for start in (lambda: pool.run_local(changed), lambda: cli._submit(changed, changed.tasks, sweep.profile, None, 2, True)):
        with pytest.raises(AutohdrError, match=r"(?s)a, job 12_0 \(PENDING\): steps is 3 there, and would be 7 now.*autohdr cancel") as e:
            start()
        assert "b, job" not in str(e.value) and (sweep.folder / "study.json").read_text() == before


def test_submission_that_was_heard_all_the_same(tmp_path, answers):
    """sbatch gives up, but the controller has taken the array: it is ended, since nobody would know of it."""
    sweep = Sweep(tmp_path, dict(a={}, b={}))
    answers("sbatch", f"""token=$(sed -n 's/#SBATCH --comment=//p' "$1"); echo "77_[0-1]|PENDING|None||$token" > {tmp_path}/queue; echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1""")
    with pytest.raises(slurm.SlurmError, match="Socket timed out.*as job 77, which was cancelled"):
        sweep.submit("a", "b")
    assert (tmp_path / "cancelled").read_text() == "77\n" and not slurm.read_jobs(sweep.folder)["runs"]


def test_report_of_an_earlier_time(tmp_path, answers, monkeypatch, capsys):
    """It is not shown as this study's when the job that makes the report fails."""
    sweep = Sweep(tmp_path, dict(a={}))
    queued(sweep, a="COMPLETED", compare="FAILED")
    page = sweep.folder / "report.html"
    page.write_text("of an earlier time")
    monkeypatch.setattr(slurm, "submit", lambda *args: None)
    with pytest.raises(cli.typer.Exit) as e:
        cli._submit(sweep.study, sweep.study.tasks, sweep.profile, None, 2, False)
    out = capsys.readouterr().out
    assert e.value.exit_code == 1 and "There is no report" in out and f"{page} is of an earlier time" in out
