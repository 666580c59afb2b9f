"""A run that is asked to stop saves itself after the update it is at, and goes on bit for bit as if nobody had asked."""
import subprocess
import sys

import pandas as pd
import pytest
import torch

import autohdr.training.loop as loop
from autohdr.core import STOP_FILE, AutohdrError, StopRequested
from autohdr.models.zoo import load_model
from autohdr.training.loop import load_pairs, train
from autohdr.training.recipe import Recipe
from tests.test_training import make_pairs
from tests.zoo import SMALL

TINY = dict(size=64, crop=32, model_config={"width": 8}, warmup_epochs=1, lr=3e-3, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"), 9, seed=0)


def until_done(recipe, pairs, run_dir, monkeypatch, every):
    """Train, stopped at every so manieth update, until it ends by itself; returns the history and the messages."""
    file, updates, messages = run_dir.parent / "stop", 0, []
    monkeypatch.setenv(STOP_FILE, str(file))
    real = loop.update

    def update(*args):  # somebody asks while an update is going on
        nonlocal updates
        updates += 1
        if updates % every == 0:
            file.touch()
        return real(*args)

    monkeypatch.setattr(loop, "update", update)
    for _ in range(50):
        file.unlink(missing_ok=True)
        try:
            history = train(recipe, pairs, run_dir)
        except StopRequested as e:
            messages.append(str(e))
        else:
            monkeypatch.undo()
            return history, messages
    raise AssertionError("it never ends")


def assert_same_run(a, b):
    """Weights, averaged weights, optimiser, history and checkpoint of two run folders, to the last bit."""
    one, two = (torch.load(run / "resume.pt", weights_only=True) for run in (a, b))
    for part in ("model", "ema", "loss"):
        assert one[part].keys() == two[part].keys() and all(torch.equal(one[part][k], two[part][k]) for k in one[part]), part
    moments = ([s[k] for s in data["optimiser"]["state"].values() for k in ("exp_avg", "exp_avg_sq", "step")] for data in (one, two))
    assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
    assert one["scaler"] == two["scaler"] and one["schedule"] == two["schedule"] and one["best"] == two["best"]
    assert all(torch.equal(x["cpu"], y["cpu"]) for x, y in zip(one["randoms"], two["randoms"], strict=True))
    one, two = (pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (a, b))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    one, two = (load_model(run / "model.safetensors") for run in (a, b))
    assert one.metadata["epoch"] == two.metadata["epoch"] and all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values()))


SETTINGS = {
    "plain": dict(batch_size=2, repeats=2),
    "accumulate": dict(batch_size=2, accumulate=2, repeats=3, gamma_jitter=0.2, gain_jitter=0.1, precision="bf16"),
    "updates": dict(batch_size=3, epoch_updates=5, accumulate=2, model_config={"width": 8, "smoothness": 0.1}),
    "workers": dict(batch_size=2, repeats=2, workers=2, model_config={"width": 8, "dropout": 0.2}),
    "scaler": dict(batch_size=2, precision="fp16"),
    "terms": dict(batch_size=2, repeats=2, loss={"l1": 1.0, "ssim": 0.1, "gradient": 0.05}, loss_normalise=True, val_every=2),
    "noise": dict(batch_size=2, model="mamba_diffusion", lr=1e-3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_again_and_again_it_ends_the_same(folder, tmp_path, monkeypatch, name):
    settings = dict(SETTINGS[name])
    if settings.get("model") == "mamba_diffusion":
        settings["model_config"] = SMALL["mamba_diffusion"] | {"mode": "diffusion", "steps": 1}
    recipe = Recipe(**TINY | dict(pairs=str(folder), epochs=2) | settings)
    pairs, _ = load_pairs(recipe)
    whole = train(recipe, pairs, tmp_path / "whole")
    _, messages = until_done(recipe, pairs, tmp_path / "stopped", monkeypatch, every=3)
    assert len(messages) >= 2 and "after update" in messages[0] and str(tmp_path / "stopped/resume.pt") in messages[0]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert whole.step.iloc[-1] == torch.load(tmp_path / "stopped/resume.pt", weights_only=True)["step"]


def test_a_stop_in_either_phase_of_a_pretrained_run(folder, tmp_path, monkeypatch):
    others = make_pairs(tmp_path / "others", 7, seed=1)
    recipe = Recipe(**TINY, pairs=str(folder), epochs=2, repeats=2, batch_size=2, pretrain_pairs=str(others), pretrain_epochs=2)
    pairs, _ = load_pairs(recipe)
    train(recipe, pairs, tmp_path / "whole")
    _, messages = until_done(recipe, pairs, tmp_path / "stopped", monkeypatch, every=3)
    assert any("pretrain" in m for m in messages) and any("pretrain" not in m for m in messages)
    assert_same_run(tmp_path / "whole/pretrain", tmp_path / "stopped/pretrain")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_stop_during_validation_comes_after_it(folder, tmp_path, monkeypatch):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=2, batch_size=4)
    pairs, _ = load_pairs(recipe)
    train(recipe, pairs, tmp_path / "whole")
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    real = loop.validate

    def validate(*args):
        (tmp_path / "stop").touch()
        return real(*args)

    monkeypatch.setattr(loop, "validate", validate)
    with pytest.raises(StopRequested, match="the end of epoch 1"):
        train(recipe, pairs, tmp_path / "stopped")
    (tmp_path / "stop").unlink()
    train(recipe, pairs, tmp_path / "stopped")  # asked during the last validation: there is nothing left to stop
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_batches_that_are_done_are_not_decoded_again(folder, tmp_path, monkeypatch):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=1, batch_size=2, repeats=2, val_every=2)
    pairs, _ = load_pairs(recipe)
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    real, updates, decoded = loop.update, [], []

    def update(*args):
        updates.append(1)
        if len(updates) == 6:
            (tmp_path / "stop").touch()
        return real(*args)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(StopRequested):
        train(recipe, pairs, tmp_path / "run")
    (tmp_path / "stop").unlink()
    item = loop.PairDataset.__getitem__
    monkeypatch.setattr(loop.PairDataset, "__getitem__", lambda self, i: decoded.append(i) or item(self, i))
    history = train(recipe, pairs, tmp_path / "run")
    photos = len(pairs[pairs.split == "train"])
    assert len(updates) == history.step.iloc[-1] and len(decoded) == 2 * photos - photos - 2 * (6 - -(-photos // 2))
    assert {epoch for epoch, _ in decoded} == {1}, "the second pass over the photos alone"


KILLED = """
import os, signal, sys
import autohdr.training.loop as loop
from autohdr.training.recipe import Recipe
loop.SAVE_EVERY = 0.
recipe, left, real = Recipe(**eval(sys.argv[1])), [5], loop.update
def update(*args):
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(*args)
loop.update = update
loop.train(recipe, loop.load_pairs(recipe)[0], sys.argv[2])
"""


def test_a_kill_in_a_long_epoch_costs_little(folder, tmp_path, capsys):
    settings = TINY | dict(pairs=str(folder), epochs=1, batch_size=2, repeats=3)
    recipe = Recipe(**settings)
    pairs, _ = load_pairs(recipe)
    train(recipe, pairs, tmp_path / "whole")
    assert subprocess.run([sys.executable, "-c", KILLED, repr(settings), str(tmp_path / "killed")]).returncode == -9
    capsys.readouterr()
    train(recipe, pairs, tmp_path / "killed")
    assert "going on after epoch 1, after update 5" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_the_seconds_of_an_epoch_in_two_parts_are_those_of_both(folder, tmp_path, monkeypatch):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=1, batch_size=2)
    pairs, _ = load_pairs(recipe)
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock.__setitem__(0, clock[0] + 100) or clock[0])
    monkeypatch.setattr(loop, "SAVE_EVERY", 1e9)
    history, messages = until_done(recipe, pairs, tmp_path / "stopped", monkeypatch, every=2)
    updates = history.step.iloc[-1]
    assert len(messages) == updates // 2 and history.seconds.iloc[0] >= 100 * updates


def test_a_state_of_an_older_version_still_loads(folder, tmp_path):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=2)
    pairs, _ = load_pairs(recipe)
    file = tmp_path / "run/resume.pt"
    train(recipe, pairs, tmp_path / "whole")
    real = loop.end_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "end_epoch", lambda *args: real(*args) and (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, pairs, tmp_path / "run")
    data = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in data.items() if k not in ("partial", "shares", "randoms")} | dict(rng=data["randoms"][0]["cpu"], cuda_rng=[]), file)
    train(recipe, pairs, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    file.write_bytes(b"half a file")
    with pytest.raises(AutohdrError, match="not a training state"):
        train(recipe, pairs, tmp_path / "run")
