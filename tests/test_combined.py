"""Combined losses in training: shares in the history, first values that survive a kill, what the checkpoint remembers, the gamma that belongs to the recipe."""
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from autohdr.cli import main
from autohdr.core import AutohdrError
from autohdr.data.reference import mean_histogram, to_json
from autohdr.losses.combined import ABOUT, COMBINATIONS, FEATURES, LOSSES, CombinedLoss, list_losses, loss_weights
from autohdr.models.zoo import load_model, read_metadata
from autohdr.photo import read_photo
from autohdr.inference.evaluate import evaluate
from autohdr.inference.predict import predict
from autohdr.training import loop
from autohdr.training.loop import load_pairs, train, training_terms
from autohdr.training.recipe import Recipe
from autohdr.training.state import load_state, starting_model
from tests.test_training import TINY, make_pairs
from tests.zoo import SMALL, small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"), 8, seed=0)


MIXED = {"l1": 0.4, "ssim": 0.3, "highlight": 0.3}


def test_history_has_the_share_of_each_term(folder, tmp_path, capsys):
    recipe = Recipe(pairs=str(folder), loss=MIXED, epochs=2, **TINY)
    history = train(recipe, load_pairs(recipe)[0], tmp_path)
    shares = history[[f"share_{name}" for name in MIXED]]
    assert shares.notna().all().all() and np.allclose(shares.sum(axis=1), 1, atol=1e-6)
    assert shares.share_l1.between(0.3, 0.99).all() and (shares.to_numpy() > 0).all()
    assert "l1 " in capsys.readouterr().out.split("epoch 1/2")[1].splitlines()[0], "in the log, too"
    assert json.loads(json.dumps(load_model(tmp_path / "model.safetensors").metadata["recipe"]["loss"])) == MIXED
    single = train(Recipe(pairs=str(folder), loss="ssim", epochs=1, **TINY), load_pairs(recipe)[0], tmp_path / "one")
    assert not [c for c in single if c.startswith("share")], "one term has no share to speak of"


def test_a_term_that_drowns_the_rest_is_warned_of_once(folder, tmp_path):
    recipe = Recipe(pairs=str(folder), loss={"l1": 1.0, "ssim": 1e-4}, epochs=2, **TINY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(recipe, load_pairs(recipe)[0], tmp_path)
    told = [str(w.message) for w in caught if "of the sum" in str(w.message)]
    assert len(told) == 1 and "'l1'" in told[0] and "ssim" in told[0]


def test_normalised_terms_go_on_with_the_same_first_values(folder, tmp_path, monkeypatch):
    """Stopped after the first epoch and started again: the same weights to the last bit, and not those of first values found anew."""
    recipe = Recipe(pairs=str(folder), loss=MIXED, loss_normalise=True, epochs=3, **TINY)
    pairs = load_pairs(recipe)[0]
    train(recipe, pairs, tmp_path / "whole")

    class Stop(Exception):
        pass

    real = loop.end_epoch

    def end_and_stop(*args):
        real(*args)
        raise Stop

    monkeypatch.setattr(loop, "end_epoch", end_and_stop)
    with pytest.raises(Stop):
        train(recipe, pairs, tmp_path / "halves")
    monkeypatch.setattr(loop, "end_epoch", real)
    first = torch.load(tmp_path / "halves/resume.pt", weights_only=True)["loss"]
    assert set(first) == {"calls", *(f"first_{name}" for name in MIXED)} and all(v > 0 for v in first.values())
    train(recipe, pairs, tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / run / "resume.pt", weights_only=True) for run in ("whole", "halves"))
    assert all(torch.equal(whole["loss"][k], halves["loss"][k]) for k in first)
    assert all(torch.equal(whole["model"][k], halves["model"][k]) for k in whole["model"])
    turned = replace(recipe, loss=dict(reversed(MIXED.items())))  # the same weights in another order
    state = load_state(tmp_path / "whole/resume.pt", turned, 6, torch.load(tmp_path / "whole/resume.pt", weights_only=True)["fingerprint"])
    assert all(getattr(state.loss, f"first_{name}") == whole["loss"][f"first_{name}"] for name in MIXED)


def test_a_state_without_a_loss_is_still_read(folder, tmp_path):
    """Written by a version that had no combined losses."""
    recipe = Recipe(pairs=str(folder), epochs=1, **TINY)
    train(recipe, load_pairs(recipe)[0], tmp_path)
    data = torch.load(tmp_path / "resume.pt", weights_only=True)
    del data["loss"]
    torch.save(data, tmp_path / "resume.pt")
    n = len(load_pairs(recipe)[0].query("split == 'train'"))
    assert load_state(tmp_path / "resume.pt", recipe, n, data["fingerprint"]).epoch == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_combined_loss_trains_in_half_precision(folder, tmp_path, precision):
    recipe = Recipe(pairs=str(folder), loss={"l1": 1.0, "ssim": 0.1, "lab": 0.1, "hue": 0.1, "window": 0.5, "laplacian": 0.1}, epochs=2, precision=precision, **TINY)
    history = train(recipe, load_pairs(recipe)[0], tmp_path)
    assert history.val_l1.iloc[1] < history.val_l1.iloc[0]


@pytest.mark.parametrize("loss", [name for name in LOSSES])
def test_the_gradient_of_a_batch_is_that_of_its_parts(loss):
    """So that accumulation is exact, whatever the loss."""
    torch.manual_seed(0)
    before, after = torch.rand(2, 3, 3, 32, 32)
    grads = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        model, combined = small("hdrnet").train(), CombinedLoss(loss)
        for part in parts:
            share = len(before[part]) / 3
            (sum(training_terms(model, before[part], after[part], lambda p, t: combined(p, t)[0]).values()) * share).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[0].abs().max() + 1e-7


@pytest.mark.parametrize("name", SMALL)
def test_every_model_trains_by_a_combined_loss(name):
    torch.manual_seed(0)
    model, combined = small(name).train(), CombinedLoss({n: 1.0 for n in LOSSES}, normalise=True)
    terms = training_terms(model, torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48), lambda p, t: combined(p, t)[0])
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert sum(combined.shares().values()) == pytest.approx(1)


def test_a_first_batch_that_shows_nothing_does_not_blow_a_term_up():
    """Hardly a highlight, no colour: what comes later is not divided by next to nothing."""
    combined = CombinedLoss({"l1": 1.0, "highlight": 1.0, "hue": 1.0, "saturation": 1.0}, normalise=True)
    dark = torch.full((1, 3, 32, 32), 0.3)
    dark[..., :4, :4] = 0.5005
    combined(0.8 * dark, dark)
    torch.manual_seed(0)
    for _ in range(30):
        target = 0.6 + 0.4 * torch.rand(1, 3, 32, 32)
        total, terms = combined(0.8 * target.flip(1), target)
    assert total < 20 and all(0 < t < 10 for t in terms.values()), terms


def test_weights_may_be_written_as_yaml_reads_them():
    assert loss_weights({"l1": "1e-1", "ssim": np.float32(0.5)}) == {"l1": 0.1, "ssim": 0.5}


def test_a_base_of_another_gamma_is_refused(folder, tmp_path, capsys):
    recipe = Recipe(pairs=str(folder), epochs=1, input_gamma=0.5, **TINY)
    train(recipe, load_pairs(recipe)[0], tmp_path)
    file = str(tmp_path / "model.safetensors")
    with pytest.raises(AutohdrError, match="input_gamma 0.5"):
        starting_model(Recipe(model="color_refiner", base=file))
    starting_model(Recipe(pairs="other", init=file, model_config=TINY["model_config"]))
    assert "careful" in capsys.readouterr().out
    starting_model(Recipe(model="color_refiner", base=file, input_gamma=0.5))


def test_every_weight_of_the_study_has_a_name():
    assert COMBINATIONS["study_visual"] == {"l1": 1.0, "vgg": 0.1, "ssim": 0.1, "gradient": 0.05}, "its table 4.1"
    assert COMBINATIONS["study_balanced"] == {"l1": 0.9, "vgg": 0.1}, "its table 4.3"
    assert len(COMBINATIONS["study_unified"]) == 8
    assert all(loss_weights(name) for name in COMBINATIONS) and set(ABOUT) == set(COMBINATIONS)
    assert set(list_losses().index) == {*LOSSES, *FEATURES, *COMBINATIONS}
    assert Recipe(loss="study_visual").loss == "study_visual"


def test_a_combined_loss_lives_on_any_device():
    combined = CombinedLoss(MIXED, normalise=True).to("meta")
    x = torch.rand(1, 3, 16, 16, device="meta")
    total, terms = combined(x, x)
    assert total.device.type == "meta" and list(terms) == list(MIXED)


@pytest.mark.parametrize("bad, word", [(torch.rand(1, 3, 8, 9), "shape"), (torch.rand(3, 8, 8), "shape"), (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating")])
def test_what_cannot_be_compared_is_refused(bad, word):
    with pytest.raises(AutohdrError, match=word):
        CombinedLoss(MIXED)(bad, torch.rand(1, 3, 8, 8))


def test_a_photo_that_is_not_a_number_gives_a_loss_that_is_not():
    total, _ = CombinedLoss(MIXED)(torch.full((1, 3, 8, 8), torch.nan), torch.rand(1, 3, 8, 8))
    assert total.isnan(), "which stops the training with the photo's name"


def test_the_checkpoint_remembers_the_training_edits_and_no_other(folder, tmp_path):
    recipe = Recipe(pairs=str(folder), epochs=1, **TINY)
    pairs = load_pairs(recipe)[0]
    train(recipe, pairs, tmp_path)
    kept = read_metadata(tmp_path / "model.safetensors")["reference"]
    ours, all_of_them = (to_json(mean_histogram(list(t.after))) for t in (pairs[pairs.split == "train"], pairs))
    assert kept == ours != all_of_them and len(json.dumps(kept)) < 20_000


def test_the_gamma_of_a_recipe_is_part_of_its_model(folder, tmp_path, capsys):
    """Validation while training and evaluation afterwards see the same input."""
    recipe = Recipe(pairs=str(folder), epochs=2, input_gamma=0.5, **TINY)
    pairs = load_pairs(recipe)[0]
    history = train(recipe, pairs, tmp_path)
    model = load_model(tmp_path / "model.safetensors")
    scores = evaluate(lambda x: predict(model, x), pairs[pairs.split == "val"], size=64)
    assert scores.l1.mean() == pytest.approx(history.val_l1.min(), abs=1e-5)
    pixels = read_photo(pairs.before[0]).pixels
    assert np.array_equal(predict(model, pixels), predict(model, pixels, gamma=0.5))
    with pytest.raises(AutohdrError, match="input gamma of 0.66 is refused"):
        predict(model, pixels, gamma=0.66)
    with pytest.raises(AutohdrError, match="input gamma of 1 is refused"):
        predict(model, pixels, gamma=1.0)
    command = ["enhance", str(folder / "before"), "--model", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "edited"), "--gamma"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "0.66"])
    assert stopped.value.code == 1 and not (tmp_path / "edited").exists(), "before the first photo"
    assert "input gamma of 0.66 is refused" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*command, "0.5"])
    assert not stopped.value.code and len(list((tmp_path / "edited").iterdir())) == 8


def test_recipes_with_a_wrong_loss_are_refused():
    for loss, word in (("l3", "l1"), ({"vgg": 0}, "above 0"), ({}, "expected the name"), (["l1"], "expected the name"), ({"lab": True}, "above 0")):
        with pytest.raises(AutohdrError, match=word):
            Recipe(loss=loss)
