"""Several processes compute what one with the whole batch does; they stop, fail and end together."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from autohdr.core import AutohdrError, StopRequested
from autohdr.models.zoo import create_model
from autohdr.training.loop import TrainingDiverged, load_pairs, train
from autohdr.training.processes import launch
from autohdr.training.recipe import Recipe, updates_per_epoch
from tests import team
from tests.test_stop import TINY, assert_same_run
from tests.test_training import make_pairs

TWO = TINY | dict(epochs=2, device="cpu", val_every=1)
TERMS = {"l1": 1.0, "ssim": 0.5, "gradient": 0.2}
# five photos train, so that of two batches of two the last has one photo, and the second process none; three judge
CASES = {
    "plain": dict(batch_size=2),
    "accumulate": dict(batch_size=2, accumulate=2, repeats=3, clip=0.1),
    "normalised": dict(batch_size=1, loss=TERMS, loss_normalise=True),
    "terms": dict(batch_size=2, epoch_updates=3, model_config={"width": 8, "smoothness": 1.0}),
    "frozen": dict(batch_size=2, freeze=["grid.down.*"], lr_factors={"grid.*": 0.5}),
    "cut": dict(batch_size=2, repeats=2),
    "photos": dict(batch_size=2, crop=0, crop_scale=[], loss=TERMS),
}
ADAM = {"half": dict(batch_size=2, precision="bf16"), "scaler": dict(batch_size=2, precision="fp16"), "more": dict(batch_size=2, epochs=5)}
NOISY = dict(batch_size=2, repeats=3, workers=1, model_config={"width": 8, "dropout": 0.3})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    table, _ = load_pairs(Recipe(pairs=str(make_pairs(tmp_path_factory.mktemp("pairs"), 8, seed=3))))
    return table.assign(split=["train"] * 5 + ["val"] * 3)


PRETRAINED = dict(batch_size=2, pretrain_epochs=1, pretrain_lr=1e-3)


@pytest.fixture(scope="module")
def runs(pairs, tmp_path_factory):
    """Folder with all the runs of two processes, and those of one that they are compared with; the last of them was stopped twice."""
    root, ADAM["pretrained"] = tmp_path_factory.mktemp("runs"), PRETRAINED | dict(pretrain_pairs=str(make_pairs(tmp_path_factory.mktemp("others"), 8, seed=4)))
    recipe = lambda more, **processes: Recipe(**TWO | more | processes)
    noisy = recipe(NOISY, processes=2)
    cases = [(recipe(c, processes=2), root / "two" / name) for name, c in CASES.items()]
    adam = [(recipe(c, processes=2), root / "two" / name) for name, c in ADAM.items()] + [(noisy, root / "two/undisturbed")]
    with pytest.raises(StopRequested, match="after update"):
        launch(team.everything, cases, adam, (noisy, pairs, root / "two/stopped"), pairs, processes=2, device="cpu")
    team.descend([(recipe(c, batch_size=2 * c["batch_size"]), root / "one" / name) for name, c in CASES.items()], pairs)
    for name, c in ADAM.items():
        train(recipe(c, accumulate=2), pairs, root / "one" / name)
    return root


def load(root, name):
    return [torch.load(root / n / name / "resume.pt", weights_only=True) for n in ("one", "two")], [pd.read_csv(root / n / name / "history.csv").drop(columns="seconds") for n in ("one", "two")]


@pytest.mark.parametrize("name", [*CASES, *ADAM, "pretrained", "pretrained/pretrain"])
def test_two_processes_compute_what_one_does(runs, name):
    """Against one with batches twice as large; Adam and half precision against one that adds up two batches."""
    (one, two), histories = load(runs, name)
    pd.testing.assert_frame_equal(*histories, rtol=2e-6 if name in CASES else 1e-5, atol=1e-6)
    for part in ("model", "ema", "loss"):
        for k in one[part]:
            torch.testing.assert_close(one[part][k], two[part][k], rtol=1e-6, atol=1e-6, msg=lambda m: f"{part}.{k}: {m}")
    assert one["step"] == two["step"] and one["best"] == pytest.approx(two["best"], rel=1e-6)


def test_what_is_frozen_stays_and_the_rest_learns(runs):
    (_, two), (_, history) = load(runs, "frozen")
    (_, other), _ = load(runs, "plain")
    torch.manual_seed(0)
    start = create_model("hdrnet", width=8).state_dict()
    frozen = [k for k in start if k.startswith("grid.down.")]
    assert all(torch.equal(two["model"][k], start[k]) for k in frozen) and not all(torch.equal(other["model"][k], start[k]) for k in frozen)
    assert history.loss.iloc[-1] < history.loss.iloc[0]


def test_processes_draw_noise_of_their_own(runs):
    data = torch.load(runs / "two/undisturbed/resume.pt", weights_only=True)
    assert len(data["randoms"]) == 2 and not torch.equal(data["randoms"][0]["cpu"], data["randoms"][1]["cpu"])


def test_updates_are_those_of_the_whole_batch():
    recipe = Recipe(batch_size=2, processes=2, accumulate=2, repeats=3)
    assert updates_per_epoch(recipe, 5) == updates_per_epoch(replace(recipe, batch_size=4, processes=1), 5) == 3


def test_a_stop_that_one_hears_of_stops_all_and_new_ones_go_on(runs, pairs, capfd):
    recipe, run_dir = Recipe(**TWO | NOISY, processes=2), runs / "two/stopped"
    with pytest.raises(AutohdrError, match="processes: 2 then, 1 now"):
        train(Recipe(**TWO | NOISY), pairs, run_dir)
    data = torch.load(run_dir / "resume.pt", weights_only=True)
    assert 2 < data["step"] < 12 and data["partial"]["updates"] == data["step"] - 6 * data["epoch"] > 0
    history = train(recipe, pairs, run_dir)
    out = capfd.readouterr().out
    assert len(history) == 2 and out.count("epoch 2/2") == 1 and out.count("going on after epoch") == 1
    assert_same_run(runs / "two/undisturbed", run_dir)


def test_an_error_in_one_is_the_error_of_all(pairs, tmp_path):
    with pytest.raises(TrainingDiverged, match="the loss is nan at step 3 .*Try a lower lr"):
        launch(team.explode, Recipe(**TWO | dict(batch_size=2, processes=2)), pairs, tmp_path / "run", processes=2, device="cpu")


# whoever runs the tests in the background of a shell hands down that interrupts are ignored
SCRIPT = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from autohdr.training.processes import launch; from tests import team; launch(team.linger, sys.argv[1], processes=2, device='cpu')"


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at /proc")
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_nobody_outlives_the_one_who_started_them(tmp_path, how):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(p for p in sys.path if p), PMI_SIZE="1", PMI_RANK="0")  # as SLURM leaves it
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    assert parent.stdout.readline() == "here\n"
    while len(files := list(tmp_path.glob("pid-*"))) < 2:
        time.sleep(0.05)
    pids = [int(f.read_text() or 0) for f in files]
    assert all(map(alive, pids))
    if how == "killed":
        parent.kill()
    else:
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal and a notebook do: to all of them
    parent.wait(timeout=30)
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))
