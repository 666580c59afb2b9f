"""Metrics against second opinions, and the baselines against what is known of the real pairs."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from autohdr.metrics import METRICS, check_bound, ciede2000, delta_e, fit_baselines, fit_gamma, l1, mse, psnr, score, ssim, summarise
from autohdr.photo import find_photos, read_photo

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"


def pictures(seed=0, h=70, w=90):
    rng = np.random.default_rng(seed)
    target = np.kron(rng.random((h // 10, w // 10, 3)), np.ones((10, 10, 1)))
    return np.clip(target + rng.normal(0, 0.1, target.shape), 0, 1).astype(np.float32), target.astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_psnr_and_ssim_agree_with_torchmetrics(seed):
    pred, target = pictures(seed)
    tensors = [torch.from_numpy(x.transpose(2, 0, 1).copy())[None] for x in (pred, target)]
    assert psnr(pred, target) == pytest.approx(float(PeakSignalNoiseRatio(data_range=1.0)(*tensors)), abs=1e-4)
    full = StructuralSimilarityIndexMeasure(data_range=1.0, return_full_image=True)(*tensors)[1]  # it also averages over reflected borders
    assert ssim(pred, target) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-4)


def ciede2000_formula(lab1, lab2):
    "Sharma, Wu and Dalal 2005, equations 2 to 22, for one pair, in plain Python."
    from math import atan2, cos, degrees, exp, hypot, radians, sin, sqrt
    (L1, a1, b1), (L2, a2, b2) = lab1, lab2
    c = (hypot(a1, b1) + hypot(a2, b2)) / 2
    g = 0.5 * (1 - sqrt(c**7 / (c**7 + 25**7)))
    a1, a2 = a1 * (1 + g), a2 * (1 + g)
    c1, c2 = hypot(a1, b1), hypot(a2, b2)
    h1, h2 = (degrees(atan2(b, a)) % 360 if a or b else 0 for a, b in ((a1, b1), (a2, b2)))
    dh = 0 if c1 * c2 == 0 else (h2 - h1 + 180) % 360 - 180
    dL, dC, dH = L2 - L1, c2 - c1, 2 * sqrt(c1 * c2) * sin(radians(dh / 2))
    L, C = (L1 + L2) / 2, (c1 + c2) / 2
    h = h1 + h2 if c1 * c2 == 0 else (h1 + h2) / 2 if abs(h1 - h2) <= 180 else (h1 + h2 + (360 if h1 + h2 < 360 else -360)) / 2
    t = 1 - 0.17 * cos(radians(h - 30)) + 0.24 * cos(radians(2 * h)) + 0.32 * cos(radians(3 * h + 6)) - 0.20 * cos(radians(4 * h - 63))
    sL, sC, sH = 1 + 0.015 * (L - 50)**2 / sqrt(20 + (L - 50)**2), 1 + 0.045 * C, 1 + 0.015 * C * t
    r = -2 * sqrt(C**7 / (C**7 + 25**7)) * sin(radians(60 * exp(-((h - 275) / 25)**2)))
    return sqrt((dL / sL)**2 + (dC / sC)**2 + (dH / sH)**2 + r * dC / sC * dH / sH)


def test_ciede2000_agrees_with_the_formula():
    from skimage.color import rgb2lab
    pred, target = pictures(4)
    pred, target = pred[:12, :12], target[20:32, 20:32]
    expected = [ciede2000_formula(a, b) for a, b in zip(rgb2lab(target.astype(float)).reshape(-1, 3), rgb2lab(pred.astype(float)).reshape(-1, 3))]
    np.testing.assert_allclose(delta_e(pred.astype(float), target.astype(float)).ravel(), expected, atol=1e-6)
    assert ciede2000(pred, target) == pytest.approx(np.mean(expected), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.1, 4))
def test_psnr_never_contradicts_l1(seed, spread, power):
    rng = np.random.default_rng(seed)
    target = rng.random((16, 16, 3)).astype(np.float32)
    pred = np.clip(target + spread * (rng.random(target.shape)**power).astype(np.float32), 0, 1)
    check_bound(l1(pred, target), psnr(pred, target))


def test_every_metric_names_its_best():
    pred, target = pictures()
    for m in METRICS.values():
        assert m.better in ("lower", "higher") and m.improves(m.function(target, target), m.function(pred, target))
        assert not m.improves(1.0, 1.0)


def test_both_means_of_psnr():
    import pandas as pd
    pred, target = pictures()
    rows = [score(pred, target), score(np.clip(target + 0.01, 0, 1).astype(np.float32), target)]
    summary = summarise(pd.DataFrame(rows))
    assert summary["psnr"] == pytest.approx(np.mean([r["psnr"] for r in rows]))
    assert summary["psnr_of_mean_mse"] == pytest.approx(-10 * np.log10(np.mean([mse(pred, target), rows[1]["mse"]])))


def test_12_megapixels_fit_into_little_memory():
    "The two photos take 288 MB; the scores shall not need as much again."
    code = ("import numpy as np, resource; from autohdr.metrics import l1, psnr, ssim, ciede2000\n"
            "a = np.full((2000, 6000, 3), 0.25, np.float32); b = np.full((2000, 6000, 3), 0.5, np.float32)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "print(l1(a, b), psnr(a, b), ssim(a, b), ciede2000(a[:256], b[:256]))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert int(done.stdout.split()[-1]) < 250_000, done.stdout  # kilobytes


@pytest.mark.skipif(not PAIRS.is_dir(), reason="needs the real pairs of ../shared/data")
def test_baselines_on_the_real_pairs():
    before, after = ([read_photo(p).pixels for p in find_photos(PAIRS / side)] for side in ("before", "after"))
    table = []
    for fold in range(5):
        train = [i for i in range(10) if i % 5 != fold]
        baselines = fit_baselines([before[i] for i in train], [after[i] for i in train])
        table += [{n: (l1(f(before[i]), after[i]), psnr(f(before[i]), after[i])) for n, f in baselines.items()} for i in range(fold, 10, 5)]
    mean = {n: np.mean([row[n] for row in table], 0) for n in table[0]}
    print(mean)
    assert mean["identity"] == pytest.approx([0.2362, 12.17], rel=1e-3)
    assert mean["gamma"] == pytest.approx([0.0983, 19.09], rel=0.02), "known for these pairs, in folds of unknown assignment"
    assert mean["polynomial"][0] < 0.1127 and mean["polynomial"][1] > 18.18, "plain least squares has this; ours shall be the stronger"
    assert 0.4 < fit_gamma(before, after) < 0.55
