"""The recipes of the study's rows: complete at full size, without anything being made, and run in smoke through papermill."""
import json
import re
from dataclasses import fields

import pytest
import torch
import yaml

from autohdr.models.zoo import create_model
from autohdr.runs.execute import run
from autohdr.runs.spec import make_spec, shipped
from autohdr.runs.status import read_status
from autohdr.training.memory import HELD, MARGIN, fixed_parts, followed
from autohdr.training.recipe import Recipe

# model, parameters, side, learning rate, warm-up, photos per update: as in the study's tables where they say it
STUDY = {
    "restormer_384": ("restormer_study", 25_437_220, 384, 1e-4, 5, 4),
    "restormer_512": ("restormer_study", 25_437_220, 512, 1e-4, 5, 8),
    "restormer_896": ("restormer_study", 25_437_220, 896, 5e-5, 10, 8),
    "restormer_1024": ("restormer_study", 25_437_220, 1024, 5e-5, 10, 8),
    "restormer_pretrained_384": ("restormer_study", 25_437_220, 384, 1e-4, 5, 4),
    "darkir_384_cv": ("darkir", 3_321_638, 384, 1e-4, 10, 8),
    "controlnet_restormer_512": ("controlnet_restormer", 52_223_348, 512, 1e-4, 5, 16),
    "nafnet_512": ("nafnet_study", 178_128_963, 512, 1e-4, 10, 8),
    "retinexformer_384": ("retinexformer", 1_605_701, 384, 1e-4, 10, 8),
    "mamba_diffusion_384": ("mamba_diffusion", 435_743_523, 384, 2e-5, 10, 4),
    "color_refiner_384": ("color_refiner", 26_636_704, 384, 2e-4, 5, 4),
    "color_refiner_512": ("color_refiner", 26_636_704, 512, 2e-4, 5, 4),
    "hdrnet_512": ("hdrnet", 295_530, 512, 3e-3, 5, 4),
}
every_row = pytest.mark.parametrize("name", STUDY)


def full_size(name):
    """The recipe of a row, checked as a run checks it; a base stays unread, since nothing here may download."""
    spec = make_spec(name)
    return spec, Recipe(**{f.name: spec.parameters[f.name] for f in fields(Recipe) if f.name in spec.parameters})


@every_row
def test_a_row_is_what_the_study_did(name):
    spec, recipe = full_size(name)
    model, parameters, side, lr, warmup, photos = STUDY[name]
    assert (recipe.model, recipe.size, recipe.lr, recipe.warmup_epochs, recipe.batch_size * recipe.accumulate) == (model, side, lr, warmup, photos)
    assert recipe.fit_memory == "auto"
    if name != "hdrnet_512":  # ours, not the study's
        assert (recipe.squash, recipe.crop, recipe.flip, recipe.clip, recipe.weight_decay, recipe.ema_decay) == (True, 0, True, 1.0, 0.02, 0.9999)
    if "patience" in spec.parameters:
        assert recipe.patience == 15
    with torch.device("meta"):
        made = create_model(recipe.model, **recipe.model_config)
    assert sum(p.numel() for p in made.parameters()) == parameters


@every_row
def test_a_row_asks_for_what_a_cluster_wants_to_know(name):
    resources = yaml.safe_load(shipped("recipes")[name].read_text())["resources"]
    assert set(resources) == {"gpus", "memory", "time"} and re.fullmatch(r"\d+G", resources["memory"]) and re.fullmatch(r"\d+:\d\d:\d\d", resources["time"])
    assert isinstance(resources["gpus"], int) and resources["gpus"] in (0, 1)


@every_row
def test_what_departs_from_the_study_is_said(name):
    """Values that the study did not use, or did not name, carry a comment; and what the recipe is for is one sentence."""
    text = shipped("recipes")[name].read_text()
    assert len(make_spec(name).about.rstrip(".").split(". ")) <= (2 if name == "hdrnet_512" else 1)
    if name != "hdrnet_512":
        assert all(re.search(rf"^  {key}: \S+  # \S", text, re.M) for key in ("precision", "ema_decay", "squash"))


@pytest.mark.parametrize("name", ["restormer_1024", "nafnet_512", "darkir_384_cv", "hdrnet_512"])  # the largest step, the most weights, the widest batch, no recomputation
def test_a_row_fits_the_memory_that_it_asks_for(name):
    """On a CPU too, with all that fit_memory may do, a photo at a time; measured at a quarter of the side: a step grows with the pixels."""
    spec, recipe = full_size(name)
    recipe.base, side = "", (recipe.crop or recipe.size) // 4
    config = recipe.model_config | ({} if recipe.model == "hdrnet" else {"checkpointing": True})
    step = 16 * followed(recipe, config, (1, side, side))["peak"]
    need = (sum(fixed_parts(recipe, config).values()) + step * (1 + HELD[True])) * MARGIN
    asked = int(yaml.safe_load(shipped("recipes")[name].read_text())["resources"]["memory"].rstrip("G")) * 2**30
    assert need < asked, (need / 2**30, asked / 2**30)


@every_row
def test_a_row_runs_in_smoke(name, tmp_path):
    spec = make_spec(name, smoke=True)
    assert not spec.parameters.get("base") and not spec.parameters.get("init")
    folder = run(spec, root=tmp_path, echo=False)
    metrics, status = json.loads((folder / "metrics.json").read_text()), read_status(folder)
    assert status["state"] == "complete" and 0 < metrics["ours"]["l1"] < 1 and metrics["ours"]["n"] >= 10
    assert (folder / "model.safetensors").exists() and (folder / "report.html").exists()
    plan = json.loads((folder / "memory.json").read_text())
    assert plan["fits"] and plan["measured"] is not None


def test_a_learning_curve_runs_in_smoke(tmp_path):
    folder = run(make_spec("learning_curve", smoke=True), root=tmp_path, echo=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["model"] for row in metrics["curve"]] == ["gamma", "look", "darkir"] and all(0 < row["l1"] < 1 and row["photos"] == metrics["n"] for row in metrics["curve"])
    assert len(metrics["sentences"]) == 3 and "no verdict" in metrics["budget"]
    page = (folder / "report.html").read_text()
    assert metrics["sentences"][0] in page and (folder / "curve.csv").exists()
