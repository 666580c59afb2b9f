"""The studies: equal budgets, what is fitted comes from the training pairs, the same photos judge all arms; a report that says what is missing."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from autohdr.data.analysis import analyse
from autohdr.data.cleaning import fit_limits, judge, reasons
from autohdr.data.pairs import read_pairs
from autohdr.runs.execute import run
from autohdr.runs.spec import make_spec

STUDY, PRE_POST = "cleaning_study", "pre_post_study"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run(make_spec(STUDY, name="smoke", smoke=True), tmp_path_factory.mktemp("runs"), echo=False)


def test_the_budget_is_the_same_and_the_same_photos_judge(study):
    scores = pd.read_csv(study / "photos.csv", dtype={"name": str}, keep_default_na=False)
    assert set(scores.arm) == {"raw", "cleaned", "random", "oracle"} and set(scores.updates) == {2}
    pairs = scores.groupby(["fold", "seed", "arm"]).pairs.first().unstack()
    assert (pairs.cleaned == pairs.random).all() and (pairs.cleaned < pairs.raw).all()
    judges = scores.groupby(["fold", "seed", "arm"])["name"].agg(lambda names: tuple(sorted(names))).unstack()
    assert judges.nunique(axis=1).eq(1).all(), "every arm of a fold is scored on the same photos"
    table = read_pairs(study / "pairs.csv").set_index("name")
    assert all(table.fold[r.name_] == r.fold for r in scores.rename(columns={"name": "name_"}).itertuples(index=False)), "each photo is judged while it is held out"
    assert table.groupby("property").fold.nunique().max() == 1


def test_the_limits_come_from_the_training_pairs(study):
    """Done again by hand, for the first fold."""
    table = read_pairs(study / "pairs.csv")
    dropped = pd.read_csv(study / "dropped.csv", dtype={"name": str}, keep_default_na=False)
    measures = analyse(table)
    training = measures[measures["name"].isin(table["name"][table.fold != 0])].reset_index(drop=True)
    why = reasons(judge(training, fit_limits(training)))
    ours = dropped[(dropped.fold == 0) & (dropped.part == "training")].set_index("name").reasons
    assert ours.to_dict() == {n: r for n, r in why.items() if r}
    scores = pd.read_csv(study / "photos.csv", dtype={"name": str})
    out = set(dropped[(dropped.fold == 0) & (dropped.part == "held out")]["name"])
    assert set(scores[(scores.fold == 0) & ~scores.kept]["name"]) == out


def test_the_differences_are_those_of_the_photos(study):
    metrics = json.loads((study / "metrics.json").read_text())
    scores = pd.read_csv(study / "photos.csv", dtype={"name": str})
    for which, chosen in (("kept", scores[scores.kept]), ("all", scores)):
        means = chosen.groupby(["arm", "fold"]).l1.mean().unstack("arm")
        change = means.cleaned - means.raw
        told = metrics["differences"]["cleaned"][which]["l1"]
        assert told["mean"] == pytest.approx(change.mean(), abs=1e-9) and told["sd"] == pytest.approx(change.std(ddof=1), abs=1e-9) and told["folds"] == 2
        assert metrics["arms"]["raw"][which]["l1"] == pytest.approx(means.raw.mean(), abs=1e-9)
    report = (study / "report.html").read_text()
    assert metrics["headline"][0] in report.replace("&#39;", "'") and metrics["headline"][0].startswith("Cleaning changes L1 by")
    assert not (study / "training").exists(), "forty trainings leave no forty checkpoints"


def test_a_killed_study_goes_on(study, tmp_path):
    shutil.copytree(study, tmp_path / "cleaning_study/smoke")
    kept = sorted((tmp_path / "cleaning_study/smoke/parts").glob("*.csv"))
    kept[0].unlink()
    ages = {p: p.stat().st_mtime_ns for p in kept[1:]}
    run(make_spec(STUDY, name="smoke", smoke=True), tmp_path, resume=True, echo=False)
    assert kept[0].exists() and all(p.stat().st_mtime_ns == t for p, t in ages.items()), "what was done is not done again"
    a, b = (pd.read_csv(folder / "photos.csv") for folder in (study, tmp_path / "cleaning_study/smoke"))
    assert np.allclose(a.select_dtypes("number"), b.select_dtypes("number")), "and the numbers are the same"


@pytest.fixture(scope="module")
def pre_post(tmp_path_factory):
    return run(make_spec(PRE_POST, name="smoke", smoke=True), tmp_path_factory.mktemp("runs"), echo=False)


def test_scores_before_and_after_processing_are_apart(pre_post):
    told, report = json.loads((pre_post / "metrics.json").read_text()), (pre_post / "report.html").read_text()
    ways = ["none", "gamma before", "post only", "both", "trained with gamma", "trained with gamma, post"]
    assert list(told["arms"]) == ways and "L1, before post" in report and "L1, after post" in report
    assert "is refused" in told["refused"] and "0.66" in told["refused"]
    scores = pd.read_csv(pre_post / "photos.csv", dtype={"name": str})
    photos = scores.pivot(index=["name", "seed"], columns="arm", values="l1")
    assert photos.notna().all().all() and set(scores.updates) == {2}
    assert (photos["none"] != photos["post only"]).mean() > 0.9 and (photos["none"] != photos["gamma before"]).all()
    assert scores.groupby("name").fold.nunique().max() == 1


@pytest.mark.parametrize("post", ["saturation", "all", "[{step: saturation, factor: 1.1}]"])
def test_post_processing_is_named_not_looked_for_as_a_file(post):
    assert make_spec(PRE_POST, [f"post={post}"]).parameters["post"] == post
