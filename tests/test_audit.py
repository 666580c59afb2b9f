"""Does the audit see what is wrong with a set of pairs, and is it silent where nothing is? Sets are made from a few of the sample pairs, small."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from autohdr.core import AutohdrError
from autohdr.data.pairs import assign_folds, save_pairs, scan_pairs
from autohdr.data.samples import decode, encode, sample_pairs
from autohdr.learn import look
from autohdr.learn.audit import AXES, LEVELS, audit, cut, looks, rest, two_looks
from autohdr.learn.look import fold_pairs
from autohdr.photo import fit, read_photo, write_photo

REAL = Path(__file__).parents[2] / "shared" / "data" / "pairs"
EIGHT = range(0, 40, 5)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOHDR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photos():
    rows = sample_pairs().iloc[list(EIGHT)]
    return [tuple(fit(read_photo(r[side]).pixels, 288) for side in ("before", "after")) for r in rows.to_dict("records")]


def lay_out(folder, pairs):
    """The pairs as a folder with `before` and `after`."""
    for i, pair in enumerate(pairs):
        for side, pixels in zip(("before", "after"), pair):
            write_photo(folder / side / f"room{i}.png", np.clip(pixels, 0, 1).astype(np.float32))
    return folder


def darker(v, ev):
    return encode(decode(v) * 2.0**-ev)


def kinds(found, *levels):
    return {f.kind for f in found.findings if f.level in (levels or LEVELS)}


def the(found, kind):
    return next(f for f in found.findings if f.kind == kind)


def test_a_sound_set(tmp_path, photos):
    found = audit(lay_out(tmp_path, photos))
    assert not kinds(found, "stop", "warn") and len(found.pairs) == 8 and not found.stops
    assert "8 pairs found, 8 to learn from" in found.lines()[0] and len(found.lines()) == len(found.table()) + 1
    assert {"few", "alike"} <= kinds(found, "note") and "33%" in the(found, "few").text and "--property-from" in the(found, "alike").advice


def test_too_few(photos, tmp_path):
    found = audit(lay_out(tmp_path / "three", photos[:3]))
    assert the(found, "few").level == "warn" and not found.stops and the(found, "few").names == ["room0", "room1", "room2"]
    one = audit(lay_out(tmp_path / "one", photos[:1]))
    assert [f.kind for f in one.stops] == ["few"] and "'room0'" in one.stops[0].text and "Add pairs" in one.stops[0].advice


def test_exchanged_folders_stop_it_and_nothing_else_is_said(tmp_path, photos):
    found = audit(lay_out(tmp_path, [(after, before) for before, after in photos[:5]]))
    assert kinds(found) == {"exchanged"} and found.stops and "not fit" in found.lines()[0] and "Exchange the two folders" in found.stops[0].advice
    again = audit((tmp_path / "after", tmp_path / "before"))
    assert not again.stops and len(again.pairs) == 5


def test_copies_dont_hide_exchanged_pairs(tmp_path, photos):
    found = audit(lay_out(tmp_path, [*((a, b) for b, a in photos[:4]), *((a, a * 0.99) for _, a in photos[4:6])]))
    assert [f.kind for f in found.stops] == ["exchanged"] and set(found.stops[0].names) == {"room0", "room1", "room2", "room3"}


def test_the_one_pair_that_is_edited_at_all_gets_darker_than_no_others(tmp_path, photos):
    found = audit(lay_out(tmp_path, [photos[0][::-1], *((a, a * 0.99) for _, a in photos[1:4])]))
    assert "exchanged" not in kinds(found)


@pytest.mark.parametrize("n, wrong", [(2, [1]), (3, [0]), (4, [2]), (5, [3]), (5, [0, 4])])
def test_single_exchanged_pairs_are_named(tmp_path, photos, n, wrong):
    found = audit(lay_out(tmp_path, [(a, b) if i in wrong else (b, a) for i, (b, a) in enumerate(photos[:n])]))
    finding = the(found, "exchanged")
    assert finding.level == "warn" and finding.names == [f"room{i}" for i in wrong] and "exchange the two files" in finding.advice and not found.stops


def test_three_of_four_exchanged(tmp_path, photos):
    found = audit(lay_out(tmp_path, [(b, a) if i == 1 else (a, b) for i, (b, a) in enumerate(photos[:4])]))
    assert found.stops[0].names == ["room0", "room2", "room3"] and "of no other pair" in found.stops[0].advice


def test_a_shared_file_is_no_known_property(tmp_path, photos):
    lay_out(tmp_path, [*photos[:4], (photos[0][0], darker(photos[0][1], 0.1))])
    found = audit(tmp_path)
    assert any("No property is known" in f.text for f in found.findings) and found.problems.reason.str.startswith("shared").any()


def test_two_hands(tmp_path, photos):
    mixed = [(b, darker(a, 1.6) if i % 2 else a) for i, (b, a) in enumerate(photos)]
    finding = the(audit(lay_out(tmp_path, mixed)), "contradictory")
    assert finding.level == "warn" and "EV" in finding.text and set(finding.names) in ({f"room{i}" for i in k} for k in ((0, 2, 4, 6), (1, 3, 5, 7)))


def test_half_of_the_pairs_exchanged(tmp_path, photos):
    found = audit(lay_out(tmp_path, [(a, b) if i % 2 else (b, a) for i, (b, a) in enumerate(photos)]))
    told = set(the(found, "contradictory").names) | {n for f in found.findings if f.kind == "left_out" for n in f.names}
    assert not found.stops and told & {"room1", "room3", "room5", "room7"} and "exchanged" in " ".join(found.lines())


def test_one_photo_edited_twice(tmp_path, photos):
    before, after = photos[0]
    found = audit(lay_out(tmp_path, [*photos[:4], (before, darker(after, 1.2))]))
    finding = the(found, "contradictory")
    assert set(finding.names) == {"room0", "room4"} and "1.2 EV darker" in finding.text
    house = found.pairs.set_index("name").property
    assert house["room0"] == house["room4"] and house.nunique() == 4
    assert assign_folds(found.pairs, 4).groupby("property").fold.nunique().max() == 1


def test_one_picture_again_and_again(tmp_path, photos):
    before, after = photos[2]
    found = audit(lay_out(tmp_path, [tuple(darker(v, e) for v in (before, after)) for e in (0, 0.1, 0.2, 0.3)]))
    assert the(found, "alike").level == "warn" and "one picture" in the(found, "alike").text and found.pairs.property.nunique() == 1
    assert "contradictory" not in kinds(found)


def in_one_fold(pairs, *names, folds=5):
    """With each of some seeds."""
    return all(fold_pairs(pairs, folds, seed).set_index("name").fold[list(names)].nunique() == 1 for seed in range(6))


def test_pictures_alike_come_together_whatever_folds_the_table_has(tmp_path, photos):
    pairs, _ = scan_pairs(lay_out(tmp_path, [*photos[:3], tuple(v * 0.98 for v in photos[0])]))
    save_pairs(pairs.assign(split=["train", "train", "test", "test"], fold=[0, 1, 0, 1]), tmp_path / "table.csv")
    found = audit(tmp_path / "table.csv")
    assert found.pairs.scene.tolist() == found.pairs.property.tolist() == ["room0", "room1", "room2", "room0"]
    assert set(found.pairs.fold) == {-1} and set(found.pairs.split) == {""} and in_one_fold(found.pairs, "room0", "room3", folds=3)
    assert the(found, "splits").names == ["room0", "room1", "room2", "room3"] and "4 of 4 pairs a split or fold, which isn't used" in the(found, "splits").text


@pytest.fixture(scope="module")
def house(tmp_path_factory, photos):
    """Pairs of one house: two rooms edited again from a copy of the photo, a burst, and a pair that shares a photo with each of two others."""
    folder, (b0, a0), (b1, a1) = tmp_path_factory.mktemp("house"), *photos[:2]
    lay_out(folder, [*photos[:6], (b0, darker(a0, 0.2)), (b1, darker(a1, 0.1)), tuple(v * 0.97 for v in photos[2])])
    rows = [dict(name=f"h1/room{i}", before=str(folder / f"before/room{i}.png"), after=str(folder / f"after/room{i}.png"), property="h1") for i in range(9)]
    return pd.DataFrame([*rows, dict(name="h1/link", before=rows[1]["before"], after=rows[3]["after"], property="h1")])


def test_in_one_house_the_same_picture_stays_in_one_fold(tmp_path, house):
    found = audit(house, clean=False)
    groups = {frozenset(g) for g in found.pairs.groupby("scene").name.agg(list)}
    joined = [["h1/room0", "h1/room6"], ["h1/room2", "h1/room8"], ["h1/room1", "h1/room3", "h1/room7", "h1/link"]]
    assert set(found.pairs.property) == {"h1"} and groups == {*map(frozenset, joined), frozenset(["h1/room4"]), frozenset(["h1/room5"])}
    assert set(found.pairs.scene) == {min(g) for g in groups}, "the first of them gives the name"
    save_pairs(found.manifest, tmp_path / "pairs.csv")
    for pairs in (found.pairs, scan_pairs(tmp_path / "pairs.csv")[0], audit(tmp_path / "pairs.csv", clean=False).pairs):
        assert list(pairs.scene) == list(found.pairs.scene) and all(in_one_fold(pairs, *names) for names in joined)


def test_twins_of_two_houses_join_them(house):
    other = house.iloc[[4, 5, 6]].assign(name=["h2/a", "h2/b", "h3/again"], property=["h2", "h2", "h3"]) # h3's is room0 again
    pairs = audit(pd.concat([house.iloc[:4], other])).pairs
    assert set(pairs.property) == {"h1", "h2"} and in_one_fold(pairs, "h1/room0", "h1/room1", "h1/room2", "h1/room3", "h3/again", folds=2)


def test_a_faulty_twin_is_judged_by_models_that_never_saw_its_picture(house, monkeypatch):
    seen = audit(house, clean=False).pairs
    faulty, used = seen[seen.name == "h1/room6"], seen[seen.name != "h1/room6"]
    monkeypatch.setattr(look, "assemble", lambda heads, eyes: heads)
    monkeypatch.setattr(look, "evaluate", lambda edit, held, size: held.assign(judge=edit.args[0]))
    for seed in range(6):
        pairs = fold_pairs(used, 4, seed)
        judged = look.score_left_out(SimpleNamespace(pairs=pairs, models={k: k for k in range(4)}), None, faulty)
        assert judged.judge.tolist() == judged.fold.tolist() == pairs.fold[pairs.name == "h1/room0"].tolist()


def test_edited_already(tmp_path, photos):
    noise = np.random.default_rng(0)
    resaved = [(np.clip(a + noise.normal(0, 0.03, a.shape), 0, 1), a) for _, a in photos[:6]]
    found = audit(lay_out(tmp_path / "close", resaved))
    assert the(found, "edited").level == "warn" and len(the(found, "edited").names) == 6
    assert [f.kind for f in audit(lay_out(tmp_path / "same", [(a, a) for _, a in photos[:4]])).stops] == ["few", "edited"]


def test_small_photos(tmp_path, photos):
    found = audit(lay_out(tmp_path, [tuple(fit(v, 160) for v in pair) for pair in photos[:4]]))
    assert the(found, "small").level == "warn" and "160 px" in the(found, "small").text


def test_few_pairs_are_dropped_for_facts_only(tmp_path, photos):
    wrong = [(photos[0][0], np.roll(photos[0][1], 9, 1)), (photos[1][0], photos[1][1] ** 2.5), *photos[2:]]
    found = audit(lay_out(tmp_path, wrong))
    assert the(found, "left_out").names == ["room0"] and "shifted" in the(found, "left_out").text
    assert "room1" in set(found.pairs.name) and any("room1" in f.names for f in found.findings if f.kind in ("unusual", "contradictory"))
    kept = audit(tmp_path, keep=["room0"])
    assert len(kept.pairs) == 8 and len(audit(tmp_path, clean=False).pairs) == 8 and list(kept.manifest.reasons[:1]) == ["alignment"]
    with pytest.raises(AutohdrError, match="room9"):
        audit(tmp_path, keep=["room9"])


def test_two_looks_in_each_number():
    rng = np.random.default_rng(0)
    table = {f"{m}_{s}": rng.normal(0.5, 0.02, 10) for m in ("grey", "saturation", "p5", "p95") for s in ("before", "after")}
    table |= {f"{m}_{s}": rng.normal(0, 0.5, 10) for m in ("a", "b") for s in ("before", "after")}
    seen = looks(pd.DataFrame(dict(name=[f"p{i}" for i in range(10)], **table)))
    assert not two_looks(seen)
    for name, axis in AXES.items():
        (finding,) = two_looks(seen.assign(**{name: seen[name] + 3 * axis.usual * (np.arange(10) > 5)}))
        assert set(finding.names) == {"p6", "p7", "p8", "p9"} and axis.more in finding.text, finding
    assert cut(rest([0] * 5, [1, 1, 1, 1, 9]), AXES["level"])[0].sum() >= 2, "one pair is no look"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real pairs of ../shared/data")
def test_good_real_pairs_are_left_alone():
    found = audit(REAL)
    assert len(found.pairs) == 10 and not kinds(found, "stop", "warn")
