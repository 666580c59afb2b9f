"""Training: a killed run goes on to bitwise the same weights; every precision trains; stopping early; several batches per update."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from autohdr.core import AutohdrError
from autohdr.models.zoo import load_model
from autohdr.photo import read_photo, resize, write_photo
from autohdr.training.loop import load_pairs, pretrain, select, train
from autohdr.training.recipe import Recipe

TINY = dict(size=64, crop=48, model_config={"width": 8}, warmup_epochs=1, lr=3e-3, threads=1)


def make_pairs(folder, n, seed):
    """Small pairs: smooth noise, brightened."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        coarse = torch.from_numpy(rng.random((1, 3, 5, 7), dtype=np.float32))
        before = torch.nn.functional.interpolate(coarse, (48, 64), mode="bilinear")[0].permute(1, 2, 0).numpy()
        write_photo(folder / "before" / f"{i}.png", before)
        write_photo(folder / "after" / f"{i}.png", before**0.6)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"), 8, seed=0)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("others"), 10, seed=1)


SCRIPT = """
import json, sys
from autohdr.training.loop import load_pairs, pretrain, select, train
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


def test_the_same_number_of_updates_whatever_the_number_of_photos(folder, tmp_path):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=3, epoch_updates=5, batch_size=3)
    pairs, _ = load_pairs(recipe)
    few = pairs[pairs.index.isin(pairs[pairs.split == "train"].index[:2]) | (pairs.split == "val")]
    steps = [list(train(recipe, table, tmp_path / name).step) for name, table in (("all", pairs), ("few", few))]
    assert steps == [[5, 10, 15]] * 2


PRETRAINED = dict(epochs=4, repeats=2, gamma_jitter=0.2, pretrain_epochs=3, pretrain_lr=1e-3)


def same_weights(a, b):
    a, b = (load_model(run / "model.safetensors").state_dict() for run in (a, b))
    return all(torch.equal(a[k], b[k]) for k in a)


def test_pretraining_is_a_run_and_a_start_from_it(folder, other_folder, tmp_path, capsys):
    both = Recipe(**TINY, **PRETRAINED, pairs=str(folder), pretrain_pairs=str(other_folder))
    pairs, _ = load_pairs(both)
    train(both, pairs, tmp_path / "both")
    first = Recipe(**TINY | dict(lr=1e-3), pairs=str(other_folder), epochs=3, gamma_jitter=0.2)
    train(first, load_pairs(first)[0], tmp_path / "first")
    second = Recipe(**TINY, pairs=str(folder), epochs=4, repeats=2, gamma_jitter=0.2, init=str(tmp_path / "first/model.safetensors"))
    train(second, pairs, tmp_path / "second")
    assert same_weights(tmp_path / "both/pretrain", tmp_path / "first") and same_weights(tmp_path / "both", tmp_path / "second")
    about = load_model(tmp_path / "both/model.safetensors").metadata
    assert about["pretraining"]["recipe"]["pairs"] == str(other_folder) and about["recipe"]["pairs"] == str(folder) and about["pretraining"]["epoch"] <= 3
    assert len(pd.read_csv(tmp_path / "both/pretrain/history.csv")) == 3 and len(pd.read_csv(tmp_path / "both/history.csv")) == 4
    assert "careful" not in capsys.readouterr().out
    later = Recipe(**TINY, pairs=str(other_folder), epochs=1, folds=2, fold=0, init=str(tmp_path / "both/model.safetensors"))
    train(later, load_pairs(later)[0], tmp_path / "later")
    assert "careful" in capsys.readouterr().out, "the pretraining has seen the photos of this fold"


def test_a_run_killed_in_either_phase_ends_with_the_same_weights(folder, other_folder, tmp_path):
    recipe = TINY | PRETRAINED | dict(pairs=str(folder), pretrain_pairs=str(other_folder))
    assert start(recipe, tmp_path / "whole").wait(timeout=300) == 0
    for line_of_death in ("epoch 2/3", "epoch 2/4"):  # while pretraining, and after it
        run = start(recipe, tmp_path / "killed")
        for line in run.stdout:
            if line.startswith(line_of_death):
                break
        time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert start(recipe, tmp_path / "killed").wait(timeout=300) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "killed") and same_weights(tmp_path / "whole/pretrain", tmp_path / "killed/pretrain")
    a, b = (torch.load(tmp_path / name / "resume.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])
    assert a["metadata"]["pretraining"] == b["metadata"]["pretraining"]


def test_what_judges_a_run_does_not_pretrain_it(folder, other_folder, tmp_path):
    """A table for pretraining that holds the judges in another size and format, and under other names."""
    pairs, _ = load_pairs(Recipe(pairs=str(folder)))
    parts = select(pairs, Recipe())
    judges = pd.concat([parts["val"], parts["test"]])
    make_pairs(tmp_path / "mixed", 3, seed=2)
    for i, row in enumerate(judges.to_dict("records")):
        for side in ("before", "after"):
            pixels = read_photo(row[side]).pixels
            write_photo(tmp_path / "mixed" / side / f"leak_{i}.jpg", resize(pixels, 36, 48), quality=90)
    recipe = Recipe(**TINY, pairs=str(folder), epochs=1, pretrain_pairs=str(tmp_path / "mixed"), pretrain_epochs=1)
    train(recipe, pairs, tmp_path / "run")
    used = pd.read_csv(tmp_path / "run/pretrain/pairs.csv", dtype=str)
    problems = pd.read_csv(tmp_path / "run/pretrain/problems.csv")
    assert set(used["name"]) == {"0", "1", "2"} and set(problems["name"]) == {f"leak_{i}" for i in range(len(judges))}
    with pytest.raises(AutohdrError, match="are among the photos that this run is judged by"):
        pretrain(Recipe(**TINY, pairs=str(folder), pretrain_pairs=str(folder), pretrain_epochs=1), pairs, tmp_path / "nothing")


def test_a_bad_table_for_pretraining_is_refused(folder, tmp_path):
    for side in ("before", "after"):
        (tmp_path / "bad" / side).mkdir(parents=True)
        (tmp_path / "bad" / side / "a.jpg").write_bytes(b"no photo")
    pairs, _ = load_pairs(Recipe(pairs=str(folder)))
    for source, message in ((tmp_path / "bad", "no usable pair"), (tmp_path / "none", "neither a folder")):
        with pytest.raises(AutohdrError, match=message):
            train(Recipe(**TINY, pairs=str(folder), epochs=1, pretrain_pairs=str(source), pretrain_epochs=1), pairs, tmp_path / "run")
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_shared_pretraining_is_not_done_again(folder, other_folder, tmp_path):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=1, folds=2, pretrain_pairs=str(other_folder), pretrain_epochs=1)
    pairs, _ = load_pairs(recipe)
    shared = pretrain(recipe, pairs, tmp_path / "pretrain")
    for k in range(2):
        train(replace(recipe, fold=k), pairs, tmp_path / f"fold_{k}", shared)
        assert not (tmp_path / f"fold_{k}/pretrain").exists()
        assert load_model(tmp_path / f"fold_{k}/model.safetensors").metadata["pretraining"]["recipe"]["pairs"] == str(other_folder)
