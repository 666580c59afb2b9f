"""The claims that matter, on real photographs: with ten pairs the default model already beats any one curve, and every model beats leaving the photo alone, on photos they never saw."""
import json
from functools import partial
from pathlib import Path

import pytest

from autohdr.inference.evaluate import compare_baselines, evaluate
from autohdr.inference.predict import predict
from autohdr.models.zoo import ARCHITECTURES, load_model, settings
from autohdr.runs.execute import run
from autohdr.runs.spec import make_spec
from autohdr.training.loop import load_pairs, select, train
from autohdr.training.recipe import Recipe
from tests.zoo import SMALL

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"


needs_pairs = pytest.mark.skipif(not PAIRS.is_dir(), reason="needs the real pairs of ../shared/data")


@needs_pairs
def test_cross_validated_hdrnet_beats_the_fitted_curves(tmp_path):
    run_dir = run(make_spec("hdrnet_crossval", [f"pairs={PAIRS}", "final=false", "ensemble=false"]), tmp_path, echo=False)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["photos"] == "out of fold" and metrics["ours"]["n"] == 10
    assert metrics["ours"]["l1"] < min(b["l1"] for b in metrics["baselines"].values()), metrics


def learn(name, run_dir, **settings):
    """A reduced model, trained for a moment on eight real pairs at 128 px; its checkpoint."""
    recipe = Recipe(pairs=str(PAIRS), model=name, size=128, crop=64, folds=5, fold=0, epochs=2, repeats=10, warmup_epochs=1, lr=2e-3, ema_decay=0.9, threads=1, **settings)
    pairs, _ = load_pairs(recipe)
    train(recipe, pairs, run_dir)
    return run_dir / "model.safetensors", select(pairs, recipe)


@needs_pairs
@pytest.mark.parametrize("name", [*ARCHITECTURES, "diffusion"])
def test_every_model_beats_the_identity(name, tmp_path):
    if name == "diffusion":
        file, parts = learn("mamba_diffusion", tmp_path / "run", model_config={**SMALL["mamba_diffusion"], "mode": "diffusion"})
    elif "base" in settings(name):
        base, _ = learn("restormer", tmp_path / "base", model_config=SMALL["restormer"])
        own = {k: v for k, v in SMALL[name].items() if not k.startswith("base")}
        file, parts = learn(name, tmp_path / "run", model_config=own, base=str(base))
    else:
        file, parts = learn(name, tmp_path / "run", model_config=SMALL[name])
    ours = evaluate(partial(predict, load_model(file)), parts["test"], size=128).l1.mean()
    baselines = compare_baselines(parts["train"], parts["test"], size=128).groupby("model").l1.mean()
    assert ours < baselines["identity"], (ours, dict(baselines))
