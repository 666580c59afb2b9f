"""The bundled sample pairs are complete, small, varied and labelled; the renderer, where it is installed, gives the same picture for the same number."""
import os
import cv2
import numpy as np
import pytest

from autohdr.data import samples, scenes
from autohdr.data.analysis import REAL, analyse
from autohdr.data.samples import FAULTS, SAMPLES, apply_fault, camera, editor, sample_pairs
from autohdr.metrics import fit_baselines, l1

EVERY = sample_pairs(faults=True)
GOOD = sample_pairs()

def read(path):
    pixels = cv2.imread(path)
    assert pixels is not None, path
    return pixels[..., ::-1].astype(np.float32) / 255

@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the edits of all pairs do, faulty ones included, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOHDR_CACHE", str(tmp_path_factory.mktemp("cache")))
        return analyse(EVERY).set_index("name")

@pytest.fixture(scope="module")
def photos():
    return {r.name: (read(r.before), read(r.after)) for r in GOOD.itertuples()}

def test_manifest_and_files_agree():
    assert EVERY.name.is_unique and len(EVERY) >= 58
    listed = {p for column in ("before", "after", "window") for p in EVERY[column] if p}
    assert listed == {str(p) for p in SAMPLES.glob("*/*")}, "a file that no pair uses, or a pair without its file"

def test_manifest_is_the_plan():
    plan = samples.sample_plan().set_index("name")
    for r in EVERY.itertuples():
        row = plan.loc[r.name]
        assert (row.seed, row.view, row.fault, row.severity, row.split, row.property) == (r.seed, r.view, r.fault, r.severity, r.split, r.property)
        assert r.kind == scenes.view_plan(r.seed, r.view)[0], r.name

def test_files_are_small():
    assert sum(p.stat().st_size for p in SAMPLES.rglob("*") if p.is_file()) < 4_000_000

def test_sizes_and_masks():
    for r in EVERY.itertuples():
        before, after = read(r.before), read(r.after)
        assert before.shape == after.shape and max(before.shape) == 512, r.name
        if not r.window: continue
        mask = cv2.imread(r.window, cv2.IMREAD_UNCHANGED)
        assert mask.shape == before.shape[:2] and set(np.unique(mask)) == {0, 255}, r.name

def test_windows_are_brighter_in_the_frame_and_keep_detail_in_the_edit(photos):
    for r in GOOD[GOOD.window != ""].itertuples():
        mask, (before, after) = cv2.imread(r.window, 0) > 0, photos[r.name]
        if mask.mean() < .005: continue
        assert before[mask].mean() > before[~mask].mean() + .1, r.name
        assert (after[mask].min(-1) > .98).mean() < .5, f"{r.name}: the view is lost"

def test_most_pictures_show_a_window():
    shown = [(cv2.imread(w, 0) > 0).mean() if w else 0 for w in GOOD.window]
    assert np.mean(np.array(shown) > .01) > .9

def test_every_fault_is_there_and_graded():
    faulty = EVERY[EVERY.fault != ""]
    assert set(faulty.fault) == set(FAULTS) and 12 <= len(faulty) <= 18
    assert ((faulty.severity > 0) & (faulty.severity <= 1)).all() and (GOOD.severity == 0).all()
    for kind in ("dark_shadows", "shift", "parallax", "blur"): assert faulty[faulty.fault == kind].severity.nunique() > 1, kind

def test_faults_are_what_they_say(measured):
    for r in EVERY[EVERY.fault != ""].itertuples():
        before, after = read(r.before), read(r.after)
        t = measured.loc[r.name]
        if r.fault == "identical": assert np.abs(before - after).mean() < .02
        if r.fault in ("swapped", "inverse_gamma"): assert t["brightness"] < 0
        if r.fault == "wrong_gamma": assert t["gamma"] < .5
        if r.fault == "dark_edit": assert t["brightness"] < REAL["brightness"] - .15
        if r.fault == "bright_edit": assert after.mean() > .75
        if r.fault == "blur": assert sharpness(before) < np.median([sharpness(read(b)) for b in GOOD.before[:12]]) / 2

def sharpness(v): return cv2.Laplacian((v @ samples.GREY) * 255, cv2.CV_32F).var()

def test_splits_keep_properties_together():
    assert EVERY.groupby("property").split.nunique().max() == 1
    count = GOOD.split.value_counts()
    assert count["val"] >= 5 and count["test"] >= 8 and .6 < count["train"] / len(GOOD) < .8

def test_edits_are_near_real_ones(measured):
    good = measured.loc[GOOD.name, list(REAL)]
    bound = dict(brightness=.05, exposure=.2, exposure_median=.25, contrast=.15, gamma=.1, p5=.05, p50=.06, p95=.06, saturation=.05)
    for k, real in REAL.items(): assert abs(good[k].mean() - real) < bound[k], (k, good[k].mean())
    assert good.brightness.std() > .04 and good.gamma.std() > .03, "pairs differ, as people's do"

def test_no_single_curve_copies_the_edit(photos):
    pick = lambda split, side: [photos[n][side] for n in GOOD[GOOD.split == split].name]
    fitted = fit_baselines(pick("train", 0), pick("train", 1))
    error = {k: np.mean([l1(f(b), a) for b, a in zip(pick("test", 0), pick("test", 1))]) for k, f in fitted.items()}
    assert error["identity"] > .15 and error["identity"] > 1.5 * error["gamma"] and error["polynomial"] > .04

@pytest.mark.parametrize("kind", FAULTS)
def test_a_graver_fault_changes_more(kind, photos):
    before, after = next(iter(photos.values()))
    size = [np.mean([np.abs(x - y).mean() for x, y in zip((before, after), apply_fault(before, after, kind, s, other=after[:, ::-1]))]) for s in (.1, .5, 1)]
    assert size[0] > 0 and size == sorted(size)
    if kind not in ("swapped", "identical", "wrong_partner", "parallax"): assert size[0] < size[1] < size[2]

def test_camera_and_editor_depend_only_on_their_seed():
    rng = np.random.default_rng(0)
    hdr = rng.uniform(.1, 1, (40, 60, 3)).astype(np.float32)
    hdr[5:15, 5:25] *= 20
    window = np.zeros((40, 60), np.float32)
    window[5:15, 5:25] = 1
    albedo = np.full_like(hdr, .6)
    make = [lambda s: camera(hdr, np.random.default_rng(s)), lambda s: editor(hdr, window, albedo, np.random.default_rng(s))]
    for f in make: assert np.array_equal(f(1), f(1)) and not np.array_equal(f(1), f(2))

def test_tiny_render():
    if not scenes.has_mitsuba():
        assert not os.environ.get("CI"), "CI renders: install the extra 'scenes'"
        pytest.skip("the extra 'scenes' (Mitsuba) is not installed")
    one, again = (scenes.render_room(3, 0, 96, spp=4) for _ in range(2))
    other = scenes.render_room(5, 2, 96, spp=4)
    assert one.hdr.shape == (64, 96, 3) and np.isfinite(one.hdr).all() and one.hdr.min() >= 0
    assert np.allclose(one.hdr, again.hdr, rtol=1e-3, atol=1e-4) and np.abs(one.hdr - other.hdr).mean() > .01
    assert .005 < one.window.mean() < .5, "the window is seen"
    bright, shown = one.hdr.mean(-1), one.window > .9
    assert np.median(bright[shown]) > 2 * np.median(bright[~shown]), "it is brighter outside"
