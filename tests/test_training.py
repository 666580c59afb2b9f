"""Training: a killed run goes on to bitwise the same weights; every precision trains; stopping early; several batches per update."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from autohdr.core import AutohdrError
from autohdr.models.zoo import load_model
from autohdr.photo import write_photo
from autohdr.training.loop import load_pairs, train
from autohdr.training.recipe import Recipe

TINY = dict(size=64, crop=48, model_config={"width": 8}, warmup_epochs=1, lr=3e-3, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight small pairs: smooth noise, brightened."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for i in range(8):
        coarse = torch.from_numpy(rng.random((1, 3, 5, 7), dtype=np.float32))
        before = torch.nn.functional.interpolate(coarse, (48, 64), mode="bilinear")[0].permute(1, 2, 0).numpy()
        write_photo(folder / "before" / f"{i}.png", before)
        write_photo(folder / "after" / f"{i}.png", before**0.6)
    return folder


SCRIPT = """
import json, sys
from autohdr.training.loop import load_pairs, train
from autohdr.training.recipe import Recipe
recipe = Recipe(**json.loads(sys.argv[1]))
train(recipe, load_pairs(recipe)[0], sys.argv[2])
"""


def start(recipe: dict, run_dir):
    import json

    return subprocess.Popen([sys.executable, "-u", "-c", SCRIPT, json.dumps(recipe), str(run_dir)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("settings", [dict(), dict(precision="bf16", accumulate=2, batch_size=2), dict(model_config={"width": 8, "dropout": 0.2}, workers=2)], ids=str)
def test_a_killed_run_ends_with_the_same_weights(folder, tmp_path, settings):
    recipe = TINY | dict(pairs=str(folder), epochs=6, repeats=3, gamma_jitter=0.2, gain_jitter=0.1) | settings
    whole = start(recipe, tmp_path / "whole")
    assert whole.wait(timeout=300) == 0
    for kill_after in (2, 4):  # killed twice, for real
        run = start(recipe, tmp_path / "killed")
        for line in run.stdout:
            if line.startswith(f"epoch {kill_after}/"):
                break
        time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert start(recipe, tmp_path / "killed").wait(timeout=300) == 0
    a, b = (torch.load(tmp_path / name / "resume.pt", weights_only=True) for name in ("whole", "killed"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    a, b = (pd.read_csv(tmp_path / name / "history.csv").drop(columns="seconds") for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    a, b = (load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(folder, tmp_path, precision):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=5, repeats=6, precision=precision)
    history = train(recipe, load_pairs(recipe)[0], tmp_path)
    assert history.val_l1.iloc[-1] < 0.7 * history.val_l1.iloc[0] or history.val_l1.min() < 0.01
    assert np.isfinite(history[["loss", "val_l1"]]).all(axis=None)


def test_it_stops_when_validation_gets_no_better(folder, tmp_path, capsys):
    recipe = Recipe(**TINY | dict(lr=1e-8), pairs=str(folder), epochs=50, patience=3, gamma_jitter=0.5)
    history = train(recipe, load_pairs(recipe)[0], tmp_path)
    assert len(history) < 50 and "stopped: no better validation L1 for" in capsys.readouterr().out
    assert load_model(tmp_path / "model.safetensors").metadata["epoch"] == history.epoch[history.val_l1.idxmin()]


def test_one_progress_line_per_epoch(folder, tmp_path, capsys):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=3)
    train(recipe, load_pairs(recipe)[0], tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"] and all("val L1" in line and "PSNR" in line for line in lines)


def test_a_fold_held_out_is_never_trained_on(folder, tmp_path):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=1, folds=4, fold=1)
    pairs, _ = load_pairs(recipe)
    from autohdr.training.loop import select

    parts = select(pairs, recipe)
    assert set(parts["test"]["name"]) == set(pairs[pairs.fold == 1]["name"]) and not set(parts["train"]["name"]) & set(parts["test"]["name"])
    assert not len(parts["val"])


def test_starting_from_a_checkpoint(folder, tmp_path):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=4, repeats=4)
    pairs, _ = load_pairs(recipe)
    first = train(recipe, pairs, tmp_path / "first")
    second = train(Recipe(**TINY | dict(lr=1e-5), pairs=str(folder), epochs=1, init=str(tmp_path / "first" / "model.safetensors")), pairs, tmp_path / "second")
    assert second.val_l1.iloc[0] < 1.2 * first.val_l1.min()


def test_a_changed_recipe_does_not_go_on(folder, tmp_path):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=1)
    pairs, _ = load_pairs(recipe)
    train(recipe, pairs, tmp_path)
    with pytest.raises(AutohdrError, match="lr: 0.003 then, 0.001 now"):
        train(Recipe(**TINY | dict(lr=1e-3), pairs=str(folder), epochs=1), pairs, tmp_path)
