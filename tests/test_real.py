"""The claims that matter, on real photographs: every model beats leaving the photo alone, on photos it never saw; that a look learnt from ten pairs beats any one curve is asserted in test_learn."""
from functools import partial
from pathlib import Path

import pytest

from autohdr.inference.evaluate import compare_baselines, evaluate
from autohdr.inference.predict import predict
from autohdr.models.zoo import ARCHITECTURES, load_model, settings
from autohdr.training.loop import load_pairs, select, train
from autohdr.training.recipe import Recipe
from tests.zoo import SMALL

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"


needs_pairs = pytest.mark.skipif(not PAIRS.is_dir(), reason="needs the real pairs of ../shared/data")


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
