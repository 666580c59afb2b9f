"""Learning curves: who learns and who judges, what a killed run keeps, and sentences that say no more than the numbers do."""
import json

import numpy as np
import pandas as pd
import pytest

from autohdr.core import AutohdrError, file_hash
from autohdr.data.pairs import read_pairs, save_pairs, scan_pairs
from autohdr.learn.curve import Learner, crossing, crossings, curve_figure, curve_of, curve_table, gap, learning_curve, make_learner, of_the_zoo, subsets, warn_of_start
from autohdr.models.zoo import read_metadata
from autohdr.training.recipe import Recipe

TINY = dict(model="darkir", model_config=dict(width=8, encoder=[1], middle=[1, 1], decoder=[1]), size=48, crop=32, epochs=1, warmup_epochs=0, epoch_updates=1, batch_size=2, threads=1)


@pytest.fixture(scope="module")
def rooms():
    return scan_pairs("samples")[0]


@pytest.fixture(scope="module")
def few(rooms):
    return rooms.groupby("property").head(1).head(8).reset_index(drop=True)


@pytest.mark.parametrize("seed", [0, 5])
def test_few_pairs_are_part_of_many_and_all_are_judged_by_the_same(rooms, seed):
    points = subsets(rooms, [16, 2, 8, 4], folds=5, seed=seed)
    assert len(points) == 20
    for k in range(5):
        row = [p for p in points if p.fold == k]
        assert [p.pairs for p in row] == [len(p.learn) for p in row] == [2, 4, 8, 16]
        assert all(more.learn[: few.pairs] == few.learn for few, more in zip(row, row[1:]))
        assert {p.judge for p in row} == {p.judge for p in subsets(rooms, [2], 5, seed=99) if p.fold == k}, "a seed chooses who learns, never who judges"
        properties = rooms.property.iloc[list(row[-1].learn)].tolist()
        assert sum(a != b for a, b in zip(properties, properties[1:])) == len(set(properties)) - 1, "a property after the other"
        assert not set(properties) & set(rooms.property.iloc[list(row[-1].judge)])


def counting(label="half", key="1", stop_at=None):
    """A learner that darkens, and a list of the points that it has seen."""
    seen = []

    def run(points, pairs, folder):
        for p in points:
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append((p.fold, p.pairs, p.seed))
            yield p, lambda pixels, n=p.pairs: pixels * (0.5 + n / 100)

    return Learner(label, key, run), seen


def test_a_killed_curve_goes_on_where_it_was(few, tmp_path):
    points = [p for seed in (0, 1) for p in subsets(few, [2, 4], 2, seed)]
    whole, all_seen = counting()
    undisturbed = curve_of(whole, points, few, 32, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        curve_of(counting(stop_at=3)[0], points, few, 32, tmp_path / "killed")
    rest, seen = counting()
    resumed = curve_of(rest, points, few, 32, tmp_path / "killed")
    assert seen == all_seen[3:]
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), undisturbed.drop(columns="seconds"), check_exact=False, rtol=1e-12)
    assert resumed.groupby(["pairs", "seed", "name"]).size().eq(1).all() and len(resumed) == 4 * len(few)

    again, seen = counting()
    assert len(curve_of(again, points[:2], few, 32, tmp_path / "killed")) == 2 * len(points[0].judge) and seen == [], "only what is asked for, and nothing is trained twice"
    for other, size, pairs in ((counting(key="2"), 32, few), (counting(), 48, few), (counting(), 32, few.head(7))):
        curve_of(other[0], subsets(pairs, [2, 3], 2), pairs, size, tmp_path / "killed")
        assert len(other[1]) == 4, "other settings, size or pairs are another curve"


def test_a_large_model_sees_no_photo_that_judges_it(few, rooms, tmp_path, capsys):
    others = rooms[~rooms.property.isin(few.property)].head(2)
    save_pairs(pd.concat([few, others]).assign(split="train"), tmp_path / "all.csv")
    recipe = Recipe(**TINY, pretrain_pairs=str(tmp_path / "all.csv"), pretrain_epochs=1)
    point = subsets(few, [2], 2)[1]
    learnt = of_the_zoo(recipe, [point], few, tmp_path / "training")
    _, edit = next(learnt)
    assert set(read_pairs(tmp_path / "training" / "pretrain" / "pairs.csv").name) == set(others.name), "pretraining is for photos that are not in the curve"
    model = edit.args[0]
    digests = lambda rows: {file_hash(f)[:16] for f in rows.before}
    assert set(model.metadata["trained_on"]["photos"]) == digests(few.iloc[list(point.learn)]) | digests(others)
    assert next(learnt, None) is None and not (tmp_path / "training" / "fold_1_pairs_2_seed_0").exists()

    capsys.readouterr()
    file = tmp_path / "training" / "pretrain" / "model.safetensors"
    assert read_metadata(file)["trained_on"]["photos"]
    warn_of_start(make_learner("darkir", dict(init=str(file)), Recipe(**TINY)), few)
    assert "careful" not in capsys.readouterr().out
    warn_of_start(make_learner("darkir", dict(init=str(file)), Recipe(**TINY)), others)
    assert "careful: 2 of the 2 pairs" in capsys.readouterr().out


def test_settings_are_checked_before_anything_is_trained(few, tmp_path):
    for models, settings, word in ((["gamma", "gamma"], {}, "twice"), (["gamma", "lok"], {}, "look"), (["gamma", "darkir"], {"darkir": {"lr": -1.0}}, "lr is -1.0"), (["gamma"], {"dark": {}}, "darkir"), (["gamma", "look"], {"look": {"heads": 0}}, "heads")):
        with pytest.raises(AutohdrError, match=word):
            learning_curve(few, models, tmp_path, sizes=[2], folds=2, settings=settings)
    with pytest.raises(AutohdrError, match="leaves 4 of the 8"):
        learning_curve(few, ["gamma"], tmp_path, sizes=[2, 5], folds=2)
    assert not any(tmp_path.iterdir())


def made_up(errors, folds=5, scatter=0.003, seeds=(0, 1)):
    """Curves with known answers: model to L1 with 2, 4 and 8 pairs."""
    rng = np.random.default_rng(0)
    return pd.DataFrame([dict(model=m, pairs=n, fold=k, seed=s, name=f"{k}{i}", l1=e + 0.02 * i + 0.002 * s + scatter * rng.standard_normal(), psnr=20.0 + i, seconds=2.0)
                         for m, es in errors.items() for n, e in zip((2, 4, 8), es) for k in range(folds) for s in seeds for i in range(2)])


def test_the_table_tells_spread_and_standard_error_apart():
    row = curve_table(made_up(dict(gamma=[0.1] * 3), scatter=0)).iloc[0]
    assert row.l1 == pytest.approx(0.111) and row.psnr == pytest.approx(20.5) and (row.photos, row.seeds, row.seconds) == (10, 2, 2.0)
    assert row.l1_sd == pytest.approx(0.002 / 2**0.5) and row.l1_se == pytest.approx(np.std([0.101, 0.121] * 5, ddof=1) / 10**0.5)


def test_who_wins_is_said_only_beyond_chance():
    answer = lambda ours, scatter=0.003, folds=5: crossing(made_up(dict(gamma=[0.1] * 3, ours=ours), folds, scatter), "ours", "gamma")
    won = answer([0.12, 0.08, 0.07])
    assert won["pairs"] == 4 and won["sentence"].startswith("ours beats gamma from 4 pairs on; with 8, 0.0") and "less (95% interval -0.0" in won["sentence"]
    assert answer([0.08, 0.08, 0.07])["pairs"] == 2
    lost = answer([0.2, 0.18, 0.15])
    assert lost["pairs"] is None and "not beat gamma within the 8 pairs tried; with 8, 0.0" in lost["sentence"] and "more (95% interval +0.0" in lost["sentence"]
    noise = answer([0.1, 0.1, 0.095], scatter=0.05)
    assert noise["pairs"] is None and "no difference that chance could not explain" in noise["sentence"]
    lucky = answer([0.1, 0.06, 0.1])
    assert lucky["pairs"] is None and "(it does with 4, not with more)" in lucky["sentence"]
    alone = answer([0.05] * 3, folds=1)
    assert alone["pairs"] is None and "says nothing of chance" in alone["sentence"]
    d = gap(made_up(dict(gamma=[0.1] * 3, ours=[0.08] * 3), scatter=0), "ours", "gamma", 8)
    assert d["mean"] == pytest.approx(-0.02) and d["folds"] == 5


def test_the_baselines_are_not_asked_whether_they_beat_the_look():
    told = crossings(made_up(dict(gamma=[0.1] * 3, polynomial=[0.1] * 3, look=[0.08] * 3, nafnet=[0.1] * 3)))
    assert [(c["model"], c["against"]) for c in told] == [("polynomial", "gamma"), ("look", "gamma"), ("nafnet", "gamma"), ("nafnet", "look")]
    json.dumps(told)


def test_no_line_leaves_the_numbers_tried():
    for score in ("l1", "psnr"):
        figure = curve_figure(made_up(dict(gamma=[0.1] * 3, look=[0.08] * 3)), score)
        assert {x for t in figure.data for x in t.x} == {2, 4, 8} and figure.layout.xaxis.type == "log"
    assert len(curve_figure(made_up(dict(gamma=[0.1] * 3), seeds=(0,))).data) == 1, "one seed has no band"
