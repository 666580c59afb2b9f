"""The measures against other implementations of the same definitions, alignment against known motions, and the analysis of a folder as people have them."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import skimage.color
import skimage.exposure
import skimage.metrics
from PIL import Image

from autohdr.data.alignment import Motion, align, undo
from autohdr.data.analysis import INPUTS, MEASURES, REAL, analyse, measure_files, measure_pair, overall_curve
from autohdr.data.pairs import read_pairs
from autohdr.data.samples import sample_pairs
from autohdr.photo import read_photo, write_photo
from tests.toys import COMMAND

REAL_PAIRS = Path(__file__).parent.parent.parent / "shared/data/pairs"
GOOD = sample_pairs()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOHDR_CACHE", str(tmp_path / "cache"))


def same(a, b):
    return a.to_json(double_precision=15) == b.to_json(double_precision=15)


def independent(before, after):
    """The study's table once more, from the words of the definitions: float64, polyfit, skimage."""
    g, h = (v.astype(np.float64) @ [0.299, 0.587, 0.114] for v in (before, after))
    mid = (g > 0.05) & (g < 0.95) & (h > 0.05) & (h < 0.95)
    slope, intercept = np.polyfit(np.log(g[mid]), np.log(h[mid]), 1)
    left = np.log(h[mid]) - slope * np.log(g[mid]) - intercept
    out = dict(brightness=h.mean() - g.mean(), exposure=np.log2(h.mean() / g.mean()), exposure_median=np.log2(np.median(h) / np.median(g)), contrast=h.std() / g.std() - 1,
               gamma=slope, gamma_r2=1 - left.var() / np.log(h[mid]).var(), saturation=skimage.color.rgb2hsv(after)[..., 1].mean() - skimage.color.rgb2hsv(before)[..., 1].mean())
    out |= {f"p{q}": np.percentile(h, q) - np.percentile(g, q) for q in (5, 50, 95)}
    matched = skimage.exposure.match_histograms(g, h)
    out["agreement"] = skimage.metrics.structural_similarity(matched, h, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for side, v, grey in (("before", before, g), ("after", after, h)):
        lab = skimage.color.rgb2lab(v)[(grey > 0.1) & (grey < 0.9)][:, 1:]
        half = lab[np.argsort(np.hypot(*lab.T))[: len(lab) // 2]].mean(0)
        out |= {f"a_{side}": half[0], f"b_{side}": half[1], f"cast_{side}": np.hypot(*half)}
        out[f"sharpness_{side}"] = scipy.ndimage.laplace(grey * 255, mode="mirror").var()
    return out


TOLERANCE = dict(agreement=0.01, a_before=0.2, b_before=0.2, cast_before=0.2, a_after=0.2, b_after=0.2, cast_after=0.2, sharpness_before=0.5, sharpness_after=0.5)


def check_definitions(pairs):
    found = []
    for row in pairs.to_dict("records"):
        before, after = (read_photo(row[side], long_side=512).pixels for side in ("before", "after"))
        measured, expected = measure_pair(before, after), independent(before, after)
        for name, value in expected.items():
            assert abs(measured[name] - value) < TOLERANCE.get(name, 1e-3), (row["name"], name, measured[name], value)
        found.append(measured)
    return pd.DataFrame(found)


def test_measures_are_what_they_say():
    check_definitions(GOOD.iloc[::12])


def test_real_pairs_agree_with_the_definitions_and_with_what_was_measured():
    if not REAL_PAIRS.is_dir():
        pytest.skip("the development photographs (../shared/data/pairs) are not here")
    pairs = pd.DataFrame([dict(name=p.stem, before=str(p), after=str(REAL_PAIRS / "after" / p.name)) for p in sorted((REAL_PAIRS / "before").iterdir())])
    table = check_definitions(pairs)
    for name, mean in REAL.items():
        spread = table[name].std(ddof=1) / len(table) ** 0.5  # 10 of the 15 pairs that the mean was measured on
        assert abs(table[name].mean() - mean) < 1.5 * spread, (name, table[name].mean(), mean)
    assert (table["shift"] < 0.3).all() and (table["trust"] > 0.7).all() and (table["agreement"] > 0.8).all(), "these pairs lie on each other"


def test_curve_is_that_of_the_edit():
    before = read_photo(GOOD.before[3]).pixels
    curve = np.array(measure_pair(before, before**0.7)["curve"])
    known = np.isfinite(curve) & (INPUTS > 0) & (INPUTS < 1)  # at the ends only one side has pixels
    assert known.sum() > 20 and np.abs(curve - INPUTS**0.7)[known].max() < 0.02 and (np.diff(curve[known]) >= 0).all()


@pytest.mark.parametrize("index", range(0, len(GOOD), 9))
def test_alignment_is_exact(index):
    """Motions up to 6% of the side, 3 degrees, 3% in scale; the worst corner lies within 0.3 px of where it should."""
    row, rng = GOOD.iloc[index], np.random.default_rng(index)
    before, after = (read_photo(row[side]).pixels for side in ("before", "after"))
    h, w = after.shape[:2]
    for k in range(3):
        angle, scale = np.deg2rad(rng.uniform(-3, 3)), rng.uniform(0.97, 1.03)
        rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre, shift = np.array([w - 1, h - 1]) / 2, rng.uniform(-0.06, 0.06, 2) * [w, h]
        there = np.column_stack([rotation, centre + shift - rotation @ centre])  # where a place of the edit goes
        moved = np.clip(cv2.warpAffine(after, there, (w, h), flags=cv2.INTER_CUBIC, borderMode=(cv2.BORDER_REPLICATE, cv2.BORDER_CONSTANT)[k % 2]), 0, 1)
        found = align(before, moved)
        corners = np.array([[0, 0, 1], [w - 1, 0, 1], [0, h - 1, 1], [w - 1, h - 1, 1]])
        assert np.hypot(*(corners @ (found.matrix - there).T).T).max() < 0.3 and found.trust > 0.6
        assert np.hypot(found.shift_x - shift[0], found.shift_y - shift[1]) < 0.2 and abs(found.rotation - np.rad2deg(angle)) < 0.05 and abs(found.scale - scale) < 0.001


def test_alignment_knows_a_wrong_partner():
    photos = [[read_photo(r[side]).pixels for side in ("before", "after")] for r in GOOD.iloc[::6].to_dict("records")]
    wide = [p for p in photos if p[0].shape == (341, 512, 3)]
    right, wrong = [align(b, a).trust for b, a in wide], [align(wide[i][0], wide[i - 1][1]).trust for i in range(len(wide))]
    assert min(right) > 0.75 and max(wrong) < 0.5


def test_shift_is_told_in_pixels_of_the_full_photo(tmp_path):
    before, after = (cv2.resize(read_photo(GOOD[side][3]).pixels, (1536, 1023), interpolation=cv2.INTER_CUBIC).clip(0, 1) for side in ("before", "after"))
    h, w = after.shape[:2]
    write_photo(tmp_path / "b.png", before), write_photo(tmp_path / "a.png", np.clip(undo(after, Motion(-12, 6, height=h, width=w)), 0, 1))
    m = measure_files(dict(before=tmp_path / "b.png", after=tmp_path / "a.png"))
    assert abs(m["shift_x"] - 12) < 0.5 and abs(m["shift_y"] + 6) < 0.5 and abs(m["shift_512"] - 13.4 / 3) < 0.2 and m["agreement_aligned"] > m["agreement"] + 0.1


def test_same_for_any_workers_order_and_cache(tmp_path, monkeypatch):
    few = GOOD.iloc[::9].reset_index(drop=True)
    one = analyse(few, workers=1)
    kept = list((tmp_path / "cache/analysis").rglob("*.json"))
    assert len(kept) == len(few) and same(one, analyse(few, workers=3))
    next(iter(kept)).write_text("{ half a fi")
    assert same(one, analyse(few, workers=2)), "a damaged file in the cache is measured anew"
    monkeypatch.setenv("AUTOHDR_CACHE", str(tmp_path / "other"))
    assert same(one, analyse(few[::-1], workers=4)[::-1].reset_index(drop=True))


def test_cache_goes_by_content(tmp_path):
    for side in ("before", "after"):
        (tmp_path / f"{side}.jpg").write_bytes(Path(GOOD[side][0]).read_bytes())
    pairs = pd.DataFrame([dict(name="x", before=str(tmp_path / "before.jpg"), after=str(tmp_path / "after.jpg"))])
    first = analyse(pairs)
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1 and analyse(GOOD[:1]).brightness[0] == first.brightness[0]
    assert len(list((tmp_path / "cache").rglob("*.json"))) <= 2, "the same files under another name (and with a mask: once more)"
    (tmp_path / "after.jpg").write_bytes(Path(GOOD.after[1]).read_bytes())
    assert analyse(pairs).brightness[0] != first.brightness[0]


def test_a_killed_analysis_goes_on(tmp_path):
    code = "from autohdr.data.analysis import analyse; from autohdr.data.samples import sample_pairs; analyse(sample_pairs()[:12], 1)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    folder, deadline = tmp_path / "cache/analysis", time.monotonic() + 60
    whole = lambda: [p for p in folder.rglob("*.json") if not p.name.startswith(".")]  # not those that are being written
    while len(whole()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {p: p.stat().st_mtime_ns for p in whole()}
    assert 3 <= len(there) < 12
    table = analyse(GOOD[:12])
    assert (table.error == "").all() and all(p.stat().st_mtime_ns == t for p, t in there.items()), "what was measured is not measured again"


def test_pairs_without_numbers():
    """Black, white, flat, tiny: measured as far as there is something to measure, and written as JSON."""
    black, white = np.zeros((40, 60, 3), np.float32), np.ones((40, 60, 3), np.float32)
    for before, after in ((black, white), (white, black), (black, black)):
        m = measure_pair(before, after)
        assert set(MEASURES) <= set(m) and np.isnan(m["gamma"]) and m["trust"] == 0 and np.isfinite(m["brightness"])
    table = pd.DataFrame([m | dict(name="x", property="x", error="")])
    assert overall_curve(table).after.notna().sum() >= 1


@pytest.fixture
def untidy(tmp_path):
    """A folder as people have them: before/ and after/ with every trouble there is."""
    folder = tmp_path / "untidy"
    rows = GOOD[GOOD.name.str.match("house(02|03|05|09)")].reset_index(drop=True)
    def put(i, name, suffix="jpg", change=lambda v, side: v, **options):
        for side in ("before", "after"):
            write_photo(folder / side / f"{name}.{suffix}", change(read_photo(rows[side][i], long_side=240).pixels, side), **options)
    put(0, "fine"), put(1, "deep", "tif", bit_depth=16), put(2, "grey", "png", lambda v, side: np.repeat(v.mean(-1, keepdims=True), 3, 2))
    put(3, "cmyk"), put(4, "turned"), put(5, "broken"), put(6, "sizes", "png", lambda v, side: v[: -20] if side == "after" else v), put(7, "alone")
    for side in ("before", "after"):
        Image.open(folder / side / "cmyk.jpg").convert("CMYK").save(folder / side / "cmyk.jpg", quality=95)
    turned = folder / "before/turned.jpg"
    image, exif = Image.open(turned), Image.Exif()
    exif[274] = 6
    image.transpose(Image.ROTATE_90).save(turned, exif=exif, quality=95)
    (folder / "before/broken.jpg").write_bytes((folder / "before/broken.jpg").read_bytes()[:3000])
    (folder / "after/alone.jpg").unlink()
    (folder / "before/text.jpg").write_text("not a photo"), (folder / "after/text.jpg").write_text("not a photo")
    return folder


def autohdr(*args, cwd):
    done = subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ)
    return done.returncode, done.stdout, done.stderr


def test_an_untidy_folder_gives_a_full_report(untidy, tmp_path):
    code, out, err = autohdr("analyse", untidy, "--out", "first", cwd=tmp_path)
    assert code == 0, out + err
    run = tmp_path / "first"
    table, problems = read_pairs(run / "analysis.csv"), pd.read_csv(run / "problems.csv")  # it is a table of pairs, too
    assert set(table.name) == {"fine", "deep", "grey", "cmyk", "turned"} and table.brightness.notna().all() and (table.trust > 0.5).all() and all(Path(p).exists() for p in table.before), "turned upright, they fit"
    assert {"broken", "sizes", "alone", "text"} <= set(problems.name) and all(n in out for n in ("broken", "sizes", "alone", "text"))
    summary, page = json.loads((run / "dataset_analysis.json").read_text()), (run / "report.html").read_text()
    assert summary["pairs"] == 5 and set(summary["measures"]) == set(MEASURES) and summary["measures"]["gamma"]["study"] == 0.66 and summary["measures"]["gamma"]["definition"]
    assert np.isclose(summary["measures"]["brightness"]["mean"], table.brightness.mean(), atol=1e-6) and len(summary["tone_curve"]["after"]) == len(INPUTS)
    assert all(w in page for w in ("Beside the study", "broken", "The pairs at the extremes")) and "http" not in page.split("<body")[0].lower().replace("http-equiv", "")
    code, out, err = autohdr("analyse", untidy, "--out", "first", "--strict", "--overwrite", cwd=tmp_path)
    assert code == 1 and "broken" in out and (run / "report.html").exists() and "Traceback" not in err, "the report is made, and the exit code says that there are problems"
    code, out, err = autohdr("analyse", untidy, "--out", "first", cwd=tmp_path)
    assert code == 1 and "--overwrite" in err and "Traceback" not in err
