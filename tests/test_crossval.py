"""Cross-validation and ensembles: every photo predicted by a model that never saw it, the same numbers whether the folds ran together or apart, an ensemble that is one file and is judged by new photos alone."""
import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autohdr.core import AutohdrError, file_hash, write_csv, write_json
from autohdr.data.pairs import read_pair, read_pairs, save_pairs
from autohdr.data.reference import from_json
from autohdr.enhance import enhance
from autohdr.inference.ensemble import check_unseen, gain, join_folds, make_ensemble
from autohdr.inference.evaluate import compare_baselines, evaluate, prediction_file
from autohdr.inference.predict import METHODS, choose_method, predict, run_model, to_tensor
from autohdr.metrics import l1
from autohdr.models.weights import load_foreign
from autohdr.models.zoo import ARCHITECTURES, load_model, read_metadata, save_model
from autohdr.photo import read_photo, write_photo
from autohdr.postprocess.pipeline import load_reference
from autohdr.runs.execute import run
from autohdr.runs.spec import make_spec
from autohdr.training.loop import load_pairs, select, train
from autohdr.training.recipe import Recipe
from tests.test_training import make_pairs
from tests.zoo import small

TINY = dict(size=64, crop=48, model_config={"width": 8}, epochs=2, warmup_epochs=1, lr=3e-3, repeats=2, threads=1, ema_decay=0.9, folds=3, holdout=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"), 12, seed=0)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A cross-validation as the notebook runs it."""
    values = [f"{k}={json.dumps(v)}" for k, v in TINY.items()]
    return run(make_spec("hdrnet_crossval", [f"pairs={folder}", *values, "tta=true", "final=false", "gamma_jitter=0", "gain_jitter=0", "weight_decay=0.02"], smoke=True), tmp_path_factory.mktemp("runs"), echo=False)


@pytest.fixture(scope="module")
def apart(whole, tmp_path_factory):
    """The same folds as runs of their own, in the order in which a cluster may end them."""
    told, place = read_metadata(whole / "fold_0/model.safetensors")["recipe"], tmp_path_factory.mktemp("apart")
    for k in (2, 0, 1):
        recipe, here = Recipe(**told | dict(fold=k)), place / f"run-fold_{k}"
        pairs, _ = load_pairs(recipe)
        parts = select(pairs, recipe)
        train(recipe, pairs, here)
        edit = partial(predict, load_model(here / "model.safetensors"))
        write_csv(here / "photos.csv", evaluate(edit, parts["test"], 64, keep=here / "predictions"))
        write_csv(here / "baselines.csv", compare_baselines(parts["train"], parts["test"], 64))
        write_json(here / "metrics.json", dict(size=64, squash=False))
        save_pairs(pairs, here / "pairs.csv")
    return [place / f"run-fold_{k}" for k in (1, 2, 0)]


def read(file):
    return pd.read_csv(file, dtype={"name": str, "property": str})


def test_every_photo_is_predicted_by_a_model_that_never_saw_it(whole, folder):
    pairs, photos, metrics = read_pairs(whole / "pairs.csv"), read(whole / "photos.csv"), json.loads((whole / "metrics.json").read_text())
    inside, held = pairs[pairs.fold >= 0], pairs[pairs.fold < 0]
    assert len(held) == 3 and set(held.split) == {"test"} and sorted(photos["name"]) == sorted(inside["name"]) and len(pairs) == 12
    for k in range(3):
        seen = read_metadata(whole / f"fold_{k}/model.safetensors")["trained_on"]["photos"]
        assert set(seen) == {file_hash(f)[:16] for f in inside[inside.fold != k].before}, "neither its own fold nor what is held out of all"
    for row in photos.to_dict("records"):  # the pictures are what the scores are of
        pair = pairs.set_index("name", drop=False).loc[row["name"]]
        _, after, _ = read_pair(pair, 64)
        assert row["fold"] == pair.fold and l1(read_photo(prediction_file(whole / "predictions", row["name"])).pixels, after) == pytest.approx(row["l1"], abs=2e-3)
    assert metrics["ours"]["l1"] == pytest.approx(photos.l1.mean()) and set(metrics["folds"]) == {"0", "1", "2"} and sum(f["n"] for f in metrics["folds"].values()) == 9
    assert set(metrics["baselines"]) == {"identity", "gamma", "polynomial"} and set(read(whole / "history.csv").fold) == {0, 1, 2}
    baselines = read(whole / "baselines.csv")
    assert (baselines.groupby("model")["name"].agg(sorted).map(tuple) == tuple(sorted(inside["name"]))).all()
    assert "gain" in (whole / "report.html").read_text() and "sd of folds" in (whole / "report.html").read_text()


def test_the_gain_is_that_of_photos_that_no_member_saw(whole):
    told = json.loads((whole / "metrics.json").read_text())["ensemble"]
    pairs = read_pairs(whole / "pairs.csv")
    held, members = pairs[pairs.split == "test"], [load_model(whole / f"fold_{k}/model.safetensors") for k in range(3)]
    single, mean = [], []
    for row in held.to_dict("records"):  # by hand
        before, after, _ = read_pair(row, 64)
        edits = [predict(m, before, tta=True) for m in members]
        single += [[l1(e, after) for e in edits]]
        mean.append(l1(sum(edits) / 3, after))
    assert told["photos"] == 3 and told["tta"] is True and told["other_tta"]["tta"] is False and len(told["members"]) == 3
    assert told["l1"] == pytest.approx(np.mean(mean), abs=1e-6) and told["single"]["l1"] == pytest.approx(np.mean(single), abs=1e-6)
    assert told["gain"]["l1"] == pytest.approx(np.mean(single) - np.mean(mean), abs=1e-6) and told["gain"]["l1"] >= 0
    ensemble = load_model(whole / "ensemble.safetensors")
    for k in range(3):
        with pytest.raises(AutohdrError, match="out of all folds"):
            gain(ensemble, pairs[pairs.fold == k])


def test_a_copy_of_a_photo_under_another_name_is_known(whole, tmp_path):
    pairs = read_pairs(whole / "pairs.csv")
    row, new = pairs[pairs.fold == 1].iloc[0], pairs[pairs.split == "test"].iloc[:1]
    for side in ("before", "after"):
        shutil.copy(row[side], tmp_path / f"{side}.png")
    copy = new.assign(name="new", property="new", before=str(tmp_path / "before.png"), after=str(tmp_path / "after.png"))
    check_unseen(load_model(whole / "ensemble.safetensors"), new)
    with pytest.raises(AutohdrError, match="trained fold_0"):
        check_unseen(load_model(whole / "ensemble.safetensors"), copy)
    check_unseen(load_model(whole / "fold_1/model.safetensors"), copy)


def test_folds_that_ran_apart_give_the_same_numbers(whole, apart, tmp_path):
    metrics, theirs = join_folds(apart, tmp_path / "joined"), json.loads((whole / "metrics.json").read_text())
    for k in range(3):
        a, b = (load_model(d / "model.safetensors").state_dict() for d in (whole / f"fold_{k}", next(d for d in apart if d.name.endswith(str(k)))))
        assert all(torch.equal(a[n], b[n]) for n in a)
    for part in ("ours", "baselines", "fold_sd"):
        assert json.loads(json.dumps(metrics[part])) == pytest.approx(theirs[part]) if part != "baselines" else all(metrics[part][b] == pytest.approx(theirs[part][b]) for b in theirs[part])
    assert metrics["ensemble"]["gain"] == pytest.approx(theirs["ensemble"]["gain"], abs=1e-9)
    columns = ["name", "fold", "l1", "psnr"]
    a, b = (read(d / "photos.csv").sort_values("name", ignore_index=True)[columns] for d in (whole, tmp_path / "joined"))
    pd.testing.assert_frame_equal(a, b)
    assert sorted(p.name for p in (tmp_path / "joined/predictions").iterdir()) == sorted(p.name for p in (whole / "predictions").iterdir())


def test_folds_that_do_not_belong_together_are_refused(apart, tmp_path):
    for runs, words in ((apart[:2], "fold 0 of 3 is missing"), ([*apart, shutil.copytree(apart[0], tmp_path / "again")], "fold 1, and so does")):
        with pytest.raises(AutohdrError, match=words):
            join_folds(runs, tmp_path / "out")
    (tmp_path / "again/status.json").write_text('{"state": "paused"}')
    with pytest.raises(AutohdrError, match="paused, not complete"):
        join_folds([tmp_path / "again", *apart[1:]], tmp_path / "out")
    (tmp_path / "again/photos.csv").unlink()
    (tmp_path / "again/status.json").unlink()
    with pytest.raises(AutohdrError, match="photos.csv"):
        join_folds([tmp_path / "again", *apart[1:]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ensemble_edits_photographs_like_any_model(whole, tmp_path):
    """From the file alone, at a size that it never saw, with its look as reference; the edit is the mean of the members' edits."""
    file = shutil.copy(whole / "ensemble.safetensors", tmp_path / "alone.safetensors")
    photo = np.random.default_rng(0).random((230, 310, 3), dtype=np.float32) * 0.5
    write_photo(tmp_path / "in/photo.png", photo, bit_depth=16)
    table = enhance(tmp_path / "in", tmp_path / "out", file, steps="histogram", postprocess_strength=0.0, guard="off")
    assert list(table.status) == ["edited"]
    before, edited = (read_photo(tmp_path / d / "photo.png").pixels for d in ("in", "out"))
    members = [load_model(whole / f"fold_{k}/model.safetensors") for k in range(3)]
    assert np.abs(edited - sum(predict(m, before, tta=True) for m in members) / 3).max() < 1e-4
    model = load_model(file)
    assert choose_method(model, 4000, 6000) == "whole" and model.metadata["recipe"]["tta"] is True
    look = sum(from_json(m.metadata["reference"]) for m in members) / 3
    assert np.abs(load_reference(file).cumsum(1) - look.cumsum(1)).max() < 5e-3


def mixed(folder, **recipe):
    """Members of two architectures, of no training."""
    files = []
    for i, name in enumerate(("hdrnet", "nafnet", "restormer")):
        torch.manual_seed(i)
        files.append(save_model(small(name), folder / f"{name}.safetensors", recipe=dict(size=64, input_gamma=0.8) | recipe))
    return files


@pytest.mark.parametrize("tta", [False, True])
def test_members_of_several_architectures_in_every_method(tmp_path, tta):
    files = mixed(tmp_path)
    weights = [0.5, 0.3, 0.2]
    model = load_model(make_ensemble(files, tmp_path / "e.safetensors", weights=weights, tta=tta))
    photo = np.random.default_rng(1).random((61, 93, 3), dtype=np.float32)
    members = [load_model(f) for f in files]
    x = to_tensor(photo)
    by_hand = sum(w * run_model(m, x, tta).clamp(0, 1) for w, m in zip(weights, members))
    torch.testing.assert_close(run_model(model, x, tta), by_hand, atol=1e-6, rtol=0)
    for method in METHODS:
        edit = predict(model, photo, method, tile=40, overlap=8)
        assert edit.shape == photo.shape and np.isfinite(edit).all()
        if method == "whole":
            assert np.abs(edit - sum(w * predict(m, photo, method, tta=tta) for w, m in zip(weights, members))).max() < 1e-5
    assert choose_method(model, 4000, 6000) == "small", "not all of its members decide on a small copy"
    with pytest.raises(AutohdrError, match="input gamma of 1 is refused"):
        predict(model, photo, gamma=1.0)


def test_members_that_want_other_photos_are_refused(tmp_path):
    files = mixed(tmp_path)
    for change, words in ((dict(input_gamma=1.0), "input_gamma: it is 0.8 in .*hdrnet.safetensors and 1.0 in .*nafnet"), (dict(size=96), "size: it is 64 in .* and 96"), (dict(squash=True), "squash")):
        (tmp_path / "other").mkdir(exist_ok=True)
        other = mixed(tmp_path / "other", **change)[1]
        with pytest.raises(AutohdrError, match=words):
            make_ensemble([files[0], other], tmp_path / "e.safetensors")
    assert not (tmp_path / "e.safetensors").exists()


def test_an_older_checkpoint_cannot_be_judged_and_says_so(whole, tmp_path):
    file = make_ensemble(mixed(tmp_path), tmp_path / "e.safetensors")
    with pytest.raises(AutohdrError, match="does not say which photos"):
        check_unseen(load_model(file), read_pairs(whole / "pairs.csv"))


def changed(file, out, change):
    """The same weights, with another story."""
    with safe_open(file, "pt") as f:
        weights, about = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["autohdr"])
    change(weights, about)
    save_file(weights, out, metadata={"autohdr": json.dumps(about)})
    return out


def set_config(**config):
    return lambda weights, about: about.update(config=about["config"] | config)


@pytest.mark.parametrize("change, words", [
    (set_config(members=[]), "1 to 64 members"), (set_config(members=[{"architecture": "hdrnet", "config": {}}] * 10_000), "1 to 64 members"), (set_config(members="hdrnet"), "1 to 64 members"),
    (set_config(members=[{"architecture": "ensemble", "config": {"members": []}}] * 2), "architecture 'ensemble'"), (set_config(members=[{"architecture": "os.system", "config": {}}] * 2), "os.system"),
    (set_config(members=[{"architecture": "hdrnet", "config": {"__class__": 1}}] * 2), "__class__"), (set_config(weights=[1, float("inf"), 1]), "weights"), (set_config(weights=[1]), "weights"),
    (set_config(members=[{"architecture": "hdrnet", "config": {"width": 10**9}}] * 2), "can't be made"), (set_config(members=[{"architecture": "hdrnet", "config": {"width": 8}}] * 2), "don't fit"),
    (set_config(code="import os"), "code"), (lambda weights, about: weights.pop("members.1.log_gamma"), "don't fit"),
], ids=range(12))
def test_a_file_that_lies_is_refused(whole, tmp_path, change, words):
    with pytest.raises(AutohdrError, match=words):
        load_model(changed(whole / "ensemble.safetensors", tmp_path / "bad.safetensors", change))


def test_nobody_trains_an_ensemble(whole):
    with pytest.raises(AutohdrError, match="Unknown model 'ensemble'"):
        Recipe(model="ensemble")
    assert "ensemble" not in ARCHITECTURES, "what list_models lists"
    model, table = load_foreign(whole / "ensemble.safetensors")
    assert set(table.status) == {"matched"} and model.name == "ensemble"
    with pytest.raises(AutohdrError, match="Too little of it"):
        load_foreign(whole / "ensemble.safetensors", "hdrnet")


def test_the_command(whole, apart, tmp_path, capsys):
    from autohdr.cli import main

    for sources, n in (([whole], 3), (apart[:2], 2)):
        with pytest.raises(SystemExit) as end:
            main(["ensemble", *map(str, sources), "--out", str(tmp_path / "e.safetensors"), "--no-tta"])
        out = capsys.readouterr().out
        assert not end.value.code and f"the mean of its {n} members" in out and "on 3 photos that no member has seen" in out
        about = read_metadata(tmp_path / "e.safetensors")
        assert len(about["members"]) == n and about["recipe"]["tta"] is False and about["metrics"]["photos"] == 3
    with pytest.raises(SystemExit) as end:
        main(["ensemble", str(whole), "--out", str(tmp_path / "f.safetensors"), "--judge", str(apart[0] / "../none.csv")])
    assert end.value.code == 1 and not (tmp_path / "f.safetensors").exists()
