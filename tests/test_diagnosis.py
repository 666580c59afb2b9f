"""Diagnosis of edits and the ranking of photos: properties beyond the notebooks' examples, and real photographs where they are."""
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from autohdr.data.samples import encode, sample_pairs
from autohdr.learn.diagnosis import QUANTITIES, diagnose, diagnosis_table, in_words, linear, summary
from autohdr.learn.next import FEATURES, SPREADS, describe, describe_files, rank, rank_photos
from autohdr.metrics import apply_gamma, fit_gamma
from autohdr.photo import read_photo, write_photo

SAMPLES = sample_pairs()
REAL = Path(__file__).parents[2] / "shared" / "data" / "pairs"


@pytest.fixture(scope="module")
def target():
    return read_photo(SAMPLES.after[1]).pixels


@pytest.fixture(scope="module")
def window(target):
    return cv2.resize(read_photo(SAMPLES.window[1]).pixels[..., 0], target.shape[1::-1]) > 0.5


def exposed(pixels, ev):
    return encode(np.clip(linear(pixels) * 2.0**ev, 0, 1)).astype(np.float32)


def tinted(pixels, a, b):
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB) + np.float32([0, a, b])
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).clip(0, 1)


@pytest.mark.parametrize("ev", [-1.5, -0.2, 0.2, 1])
def test_exposure_of_any_size_is_read_exactly(target, window, ev):
    found = diagnose(exposed(target, ev), target, window=window)
    assert found["exposure"] == pytest.approx(ev, abs=0.02)
    assert f"{abs(ev):.1f} EV too {'bright' if ev > 0 else 'dark'}" in in_words(found)
    assert "more of the room clipped" in in_words(found) or ev < 1


def test_two_faults_at_once_are_both_read(target, window):
    found = diagnose(tinted(exposed(target, -0.6), 0, -5), target, window=window)
    assert found["exposure"] == pytest.approx(-0.6, abs=0.03)
    assert found["cast_b"] == pytest.approx(-5 * 2 ** (0.6 / 3), rel=0.12), "at equal exposure chroma grows with the cube root of light"
    assert {"EV too dark", "too blue (b*)"} <= {phrase.split(" ", 1)[1] for phrase in in_words(found).split(", ")}


def test_swapping_edit_and_target_turns_the_signs(target, window):
    edit = tinted(exposed(target, -0.5), 4, 0)
    there, back = diagnose(edit, target, window=window), diagnose(target, edit, window=window)
    assert there["exposure"] == pytest.approx(-back["exposure"], abs=1e-6)
    assert np.sign(there["cast_a"]) == -np.sign(back["cast_a"]) and there["l1"] == pytest.approx(back["l1"])


def test_size_and_mirroring_do_not_matter(target, window):
    edit = tinted(exposed(target, 0.4), 3, -4)
    large, flat = (cv2.resize(v, None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC).clip(0, 1) for v in (edit, target))
    mask = cv2.resize(np.uint8(window), large.shape[1::-1]) > 0
    here, there, mirrored = diagnose(edit, target, window=window), diagnose(large, flat, window=mask), diagnose(edit[:, ::-1], target[:, ::-1], window=window[:, ::-1])
    for name, q in QUANTITIES.items():
        assert there[name] == pytest.approx(here[name], abs=q.visible / 2, nan_ok=True), name
        assert mirrored[name] == pytest.approx(here[name], abs=q.visible / 10, nan_ok=True), name


def test_inputs_are_left_alone(target):
    edit, before = exposed(target, 0.3), target**2
    kept = [v.copy() for v in (edit, target, before)]
    diagnose(edit, target, before)
    assert all(np.array_equal(a, b) for a, b in zip(kept, (edit, target, before)))


def test_summary_tells_bias_from_scatter():
    rng = np.random.default_rng(0)
    rows = [dict(name=str(i), l1=i / 100, exposure=-0.35 + 0.1 * (i % 2), cast_b=rng.normal(0, 6), shadows=np.nan) for i in range(12)]
    found = summary(diagnosis_table(rows)).set_index("quantity")
    assert (found.systematic["exposure"], found.scattered["exposure"]) == (True, False)
    assert (found.systematic["cast_b"], found.scattered["cast_b"]) == (False, True)
    assert found.loc["exposure", "se"] == pytest.approx(np.std([r["exposure"] for r in rows], ddof=1) / 12**0.5)
    assert found.index[0] == "exposure" and "0.30 ± 0.02" in found.words["exposure"] and "too dark" in found.words["exposure"]
    assert found.photos["shadows"] == 0 and found.words["shadows"] == "too few photos to tell"


def test_farthest_first_covers_within_twice_the_best():
    """Gonzalez 1985: the largest distance that is left is at most twice that of the best choice."""
    from itertools import combinations

    from autohdr.learn.next import farthest_first

    rng = np.random.default_rng(1)
    for _ in range(20):
        known, candidates = rng.normal(size=(2, 3)), rng.normal(size=(9, 3))
        order, distances = farthest_first(known, candidates)
        assert sorted(order) == list(range(9)) and (np.diff(distances) <= 1e-12).all()
        left = lambda picks: cdist(candidates, np.vstack([known, candidates[list(picks)]])).min(1).max()
        assert left(order[:3]) <= 2 * min(map(left, combinations(range(9), 3))) + 1e-12
        assert distances[3] == pytest.approx(left(order[:3]))


def test_ranking_does_not_depend_on_the_order_of_files():
    described = np.array([describe(read_photo(p, 256).pixels) for p in SAMPLES.before[:14]])
    order, distances = rank(described[:4], described[4:])
    shuffled = np.random.default_rng(0).permutation(10)
    again, same = rank(described[:4], described[4:][shuffled])
    assert list(shuffled[again]) == list(order) and np.allclose(same, distances)


def test_description_is_of_the_room_not_of_the_file(tmp_path):
    pixels = read_photo(SAMPLES.before[0]).pixels
    write_photo(tmp_path / "large.png", cv2.resize(pixels, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC).clip(0, 1))
    write_photo(tmp_path / "small.jpg", pixels, quality=80)
    found = describe_files([tmp_path / "large.png", tmp_path / "small.jpg", SAMPLES.before[0], SAMPLES.before[5]])
    apart = cdist(found[FEATURES], found[FEATURES])
    assert apart[:3, :3].max() < 0.4 * apart[:3, 3].min()
    assert len(SPREADS) == len(FEATURES) == len(set(FEATURES))


def test_known_photos_come_last_and_broken_ones_are_listed(tmp_path):
    for name, i in (("new", 20), ("renamed", 1), ("other", 30)):
        (tmp_path / f"{name}.jpg").write_bytes(Path(SAMPLES.before[i]).read_bytes())
    (tmp_path / "empty.png").write_bytes(b"")
    table = rank_photos(tmp_path, SAMPLES.iloc[:4])
    names = [Path(p).stem for p in table.path]
    assert names[2:] == ["renamed", "empty"] and table["rank"].iloc[:3].tolist() == [1, 2, 3] and pd.isna(table["rank"].iloc[3])
    assert table.distance.iloc[2] == 0 and table.nearest.iloc[2] == SAMPLES.name[1] and table.error.iloc[3]
    only_broken = rank_photos([tmp_path / "empty.png"], SAMPLES.iloc[:4])
    assert only_broken.error[0] and len(only_broken) == 1


@pytest.mark.skipif(not REAL.exists(), reason="the real photographs are not in the repository")
def test_real_pairs_read_as_they_look():
    """A gamma fitted to the other pairs: a bedroom stays yellow that the studio made white, a dark hall stays dark."""
    read = lambda name: tuple(read_photo(REAL / side / f"{name}.jpg", 256).pixels for side in ("before", "after"))
    names = sorted(p.stem for p in (REAL / "before").iterdir())
    photos = {n: read(n) for n in names}
    found = {}
    for name in ("258", "155"):
        before, after = photos[name]
        others = [photos[n] for n in names if n != name]
        found[name] = diagnose(apply_gamma(before, fit_gamma(*zip(*others))), after, before)
    assert found["258"]["cast_b"] > 8 and "too yellow" in in_words(found["258"])
    assert found["155"]["exposure"] < -0.6 and in_words(found["155"]).startswith("0.")
    assert found["155"]["lift"] > found["155"]["lifted"] > 0
