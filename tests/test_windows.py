"""Windows of finished edits: found well enough on rendered rooms, never in what shows nothing; and the step that enhances them keeps its promises on any picture."""
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autohdr.core import AutohdrError
from autohdr.data.samples import sample_pairs
from autohdr.photo import find_photos, read_photo
from autohdr.postprocess.windows import enhance_windows, find_windows, plain_rule, soft_mask, steeper

REAL = Path(__file__).parents[2] / "shared" / "data"
PHOTOS = arrays(np.float32, st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3)), elements=st.floats(0, 1, width=32))
QUICK = settings(max_examples=40, deadline=None)


def overlap(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def sample(row):
    """An edit and the true mask of its windows."""
    return read_photo(row.after).pixels, read_photo(row.window).pixels[..., 0] > 0.5


def samples():
    return [row for row in sample_pairs().itertuples() if row.window]


def after(name):
    return next(sample(row)[0] for row in samples() if row.name == name)


def test_windows_of_the_sample_edits_are_found():
    ours, plain, beside, held_out = {}, [], [], []
    for row in samples():
        photo, mask = sample(row)
        found = find_windows(photo)
        ours[row.name] = overlap(found, mask)
        plain.append(overlap(plain_rule(photo), mask))
        beside.append((found & ~mask).mean())
        held_out += [row.name] * (row.split != "train")
    assert len(ours) >= 40 and len(held_out) >= 10
    assert np.mean(list(ours.values())) >= 0.7, sorted(ours.items(), key=lambda x: x[1])[:5]
    assert np.mean([ours[name] for name in held_out]) >= 0.7, "houses that the network was not fitted on"
    assert np.mean(beside) <= 0.02 and np.mean(plain) < 0.2, "the study's rule is far from that"


def windowless(after, mask):
    """The largest part of an edit on one side of all its windows."""
    down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    parts = [after[: down[0] - 4], after[down[-1] + 5 :], after[:, : max(across[0] - 4, 0)], after[:, across[-1] + 5 :]]
    return max(parts, key=lambda p: p.shape[0] * p.shape[1])


def test_little_is_marked_where_there_is_no_window():
    free = [p for p in (windowless(*sample(row)) for row in samples()) if min(p.shape[:2]) >= 130]
    marked = [find_windows(p).mean() for p in free]
    assert len(free) >= 30 and np.mean(marked) <= 0.03, (np.mean(marked), max(marked))


@pytest.mark.parametrize("name", ["house01_3", "house04_1", "house09_0", "house12_1", "house21_4"])
def test_a_photo_of_any_size_has_the_same_windows(name):
    photo = after(name)
    found, (h, w) = find_windows(photo), (4 * n for n in photo.shape[:2])
    large = find_windows(cv2.resize(photo, (w, h), interpolation=cv2.INTER_CUBIC).clip(0, 1))
    assert large.shape == (h, w) and overlap(cv2.resize(np.float32(large), found.shape[::-1], interpolation=cv2.INTER_AREA) > 0.5, found) > 0.85


def test_a_mirrored_photo_has_mirrored_windows():
    photo = after("house07_3")
    assert overlap(find_windows(photo[:, ::-1])[:, ::-1], find_windows(photo)) > 0.8


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2), (40, 60), (600, 400)])
@pytest.mark.parametrize("value", [0.0, 0.3, 0.7, 1.0])
def test_what_shows_nothing_has_no_windows(shape, value):
    photo = np.full((*shape, 3), value, np.float32)
    assert not find_windows(photo).any() and (enhance_windows(photo) == photo).all()


@pytest.mark.parametrize("wrong", ["nan", "bytes", "grey", "bright", "empty"])
def test_what_is_no_photo_is_refused(wrong):
    grey = np.full((20, 30, 3), 0.5, np.float32)
    photo = dict(nan=grey * np.nan, bytes=np.uint8(grey * 255), grey=grey[..., 0], bright=grey * 255, empty=grey[:0])[wrong]
    for step in (find_windows, enhance_windows):
        with pytest.raises(AutohdrError):
            step(photo)


@pytest.mark.parametrize("settings", [dict(strength=1.5), dict(strength=-0.1), dict(saturation=-1), dict(contrast=99), dict(contrast=float("nan")), dict(mask=np.ones((3, 4)))])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(AutohdrError):
        enhance_windows(np.full((20, 30, 3), 0.5, np.float32), **settings)


@pytest.mark.parametrize("mask", [np.ones(5), np.ones((0, 4)), np.ones((2, 3, 4))])
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(AutohdrError, match="mask"):
        soft_mask(mask)


@QUICK
@given(PHOTOS, st.floats(0, 3), st.floats(0, 3), st.floats(0, 1), st.data())
def test_enhanced_windows_stay_photos(photo, saturation, contrast, strength, data):
    mask = data.draw(arrays(bool, photo.shape[:2]))
    before = photo.copy()
    out = enhance_windows(photo, saturation, contrast, mask, strength)
    assert out.shape == photo.shape and out.dtype == np.float32 and np.isfinite(out).all() and 0 <= out.min() and out.max() <= 1
    assert (photo == before).all(), "the input is left alone"
    assert (out[soft_mask(mask) == 0] == photo[soft_mask(mask) == 0]).all()
    assert (enhance_windows(photo, saturation, contrast, mask, 0.0) == photo).all()
    assert np.allclose(enhance_windows(photo, 1, 1, mask), photo, atol=1e-6)


@QUICK
@given(PHOTOS, st.floats(1, 3), st.floats(1, 3), st.data())
def test_hues_stay(photo, saturation, contrast, data):
    """In the hexagon of HSV hue is (middle - least) / (greatest - least), with the channels in the same order."""
    out = enhance_windows(photo, saturation, contrast, data.draw(arrays(bool, photo.shape[:2]))).astype(np.float64)
    order = np.argsort(photo, axis=-1, kind="stable")
    (a, b, c), (x, y, z) = (np.moveaxis(np.take_along_axis(p.astype(np.float64), order, -1), -1, 0) for p in (photo, out))
    plain = (c - a > 0.02) & (z - x > 0.02)
    assert np.allclose(((b - a) / np.maximum(c - a, 1e-9))[plain], ((y - x) / np.maximum(z - x, 1e-9))[plain], atol=1e-3)


@QUICK
@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))), st.floats(0, 200))
def test_soft_masks_lie_between_none_and_all(mask, radius):
    soft = soft_mask(mask, radius)
    assert soft.shape == mask.shape and soft.dtype == np.float32 and 0 <= soft.min() and soft.max() <= 1
    assert (soft_mask(np.zeros_like(mask), radius) == 0).all() and np.allclose(soft_mask(np.ones_like(mask), radius), 1, atol=1e-5)


def test_the_edge_of_a_soft_mask_grows_with_the_photo():
    widths = []
    for long_side in (512, 1024, 4096):
        mask = np.zeros((long_side // 8, long_side), bool)
        mask[:, : long_side // 2] = True
        row = soft_mask(mask)[long_side // 16]
        widths.append(((row > 0.01) & (row < 0.99)).sum() / long_side)
        assert (row[: int(long_side * 0.48)] > 0.999).all() and (row[int(long_side * 0.52) :] < 0.001).all()
    assert max(widths) < 1.2 * min(widths), widths


def test_saturation_and_contrast_are_those_asked_for():
    rng = np.random.default_rng(0)
    photo = (0.5 + 0.1 * rng.random((60, 90, 3))).astype(np.float32)
    mask = np.ones((60, 90), bool)
    least, most = photo.min(-1), photo.max(-1)
    colour = enhance_windows(photo, 1.5, 1.0, mask)
    assert np.allclose(1 - colour.min(-1) / colour.max(-1), 1.5 * (1 - least / most), atol=1e-4) and np.allclose(colour.max(-1), most, atol=1e-6)
    steep = enhance_windows(photo, 1.0, 1.2, mask).max(-1)
    assert np.allclose(steep - most.mean(), 1.2 * (most - most.mean()), atol=1e-3)


def test_no_step_of_sixteen_bits_is_lost():
    ramp = (np.arange(0, 2**16, dtype=np.float32) / 65535).reshape(256, 256)
    out = enhance_windows(np.dstack([ramp * 0.9, ramp, ramp * 0.95]), mask=np.ones((256, 256), bool))[..., 1].ravel()
    assert len(np.unique(np.rint(np.float64(out) * 65535))) > 0.75 * 2**16, "a quantised step would leave 256"
    assert (np.diff(out) >= -1e-6).all() and np.diff(out).max() < 5 / 65535, "monotone and without jumps"


def test_contrast_bends_without_a_corner():
    part = np.linspace(0, 1, 10001, dtype=np.float64)
    for contrast in (1.2, 2.0, 5.0):
        slope = np.gradient(steeper(part, contrast), part)
        assert abs(np.diff(slope)).max() < 0.01 * contrast and slope.min() > 0 and abs(slope[1] - contrast) < 1e-3


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real photographs of ../shared/data")
def test_real_photographs_keep_most_of_their_area():
    shares = {p.name: float(find_windows(read_photo(p, long_side=1024).pixels).mean()) for folder in ("pairs/after", "photos") for p in find_photos(REAL / folder)}
    assert max(shares.values()) < 0.15 and sum(v > 0 for v in shares.values()) >= 6, shares
