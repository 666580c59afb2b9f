"""Histogram matching and saturation: what must hold for any photo, against scikit-image, at 16 bits, and for what is no photo."""
import colorsys
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from skimage.color import hsv2rgb, lab2rgb, rgb2hsv, rgb2lab
from skimage.exposure import match_histograms

from autohdr.core import AutohdrError
from autohdr.data.reference import from_json, from_lab, lab_histogram, mean_histogram, reference_of, to_json, to_lab, values_at
from autohdr.data.samples import sample_pairs
from autohdr.photo import find_photos, read_photo, write_photo
from autohdr.postprocess import tone
from autohdr.postprocess.tone import boost_saturation, boost_share, check_pixels, match_histogram

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"
SPAN = np.array([100, 220, 220])  # of L, a, b
photos = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda size: arrays(np.float32, (*size, 3), elements=st.floats(0, 1, width=32), fill=st.sampled_from([0, 0.5, 1]))
)


def room(seed, height=120, width=160, light=1.0):
    "Smooth shades of a few colours with a little noise, no two pixels alike."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [sum(rng.normal() * np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(4)) for _ in range(4)]
    grey = waves[0][..., None] + 0.25 * np.stack(waves[1:], -1)
    grey = (grey - grey.min()) / np.ptp(grey)
    return np.clip(0.05 + 0.85 * light * grey + rng.normal(0, 0.004, grey.shape), 0, 1).astype(np.float32)


def by_sorting(pixels, look):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # colours that cannot be shown
        lab = match_histograms(rgb2lab(pixels.astype(float)), rgb2lab(look.astype(float)), channel_axis=-1)
        return lab, lab2rgb(lab)


@pytest.mark.parametrize("seed", range(4))
def test_matching_agrees_with_sorting(seed):
    pixels, look = room(seed, light=0.3 + 0.2 * seed), room(10 + seed, 90, 133)
    lab, expected = by_sorting(pixels, look)
    matched = match_histogram(pixels, lab_histogram(look))
    assert np.abs(matched - expected).max() < 1 / 255
    shown = np.abs(lab2rgb(lab) - expected).max(-1) == 0
    assert (np.abs(to_lab(matched) - rgb2lab(expected))[shown] / SPAN).max() < 1 / 255


@pytest.mark.parametrize("i, j", [(1, 20), (12, 33), (25, 6), (40, 15)])
def test_matching_agrees_with_sorting_on_samples(i, j):
    "8-bit photos with clipped windows. Isolated pixels at a jump of the reference are left out, and samples whose windows are grey by rounding alone."
    table = sample_pairs()
    pixels, look = read_photo(table.before[i]).pixels, read_photo(table.after[j]).pixels
    difference = np.abs(match_histogram(pixels, lab_histogram(look)) - by_sorting(pixels, look)[1]).max(-1)
    assert np.quantile(difference, 0.9999) < 1 / 255 and difference.mean() < 0.1 / 255


def test_matching_agrees_with_sorting_on_photographs():
    if not PAIRS.exists():
        pytest.skip("../shared/data is absent")
    befores, afters = (find_photos(PAIRS / side) for side in ("before", "after"))
    for i, j in ((0, 1), (3, 4), (6, 7), (9, 3)):
        pixels, look = read_photo(befores[i]).pixels, read_photo(afters[j]).pixels
        assert np.abs(match_histogram(pixels, lab_histogram(look)) - by_sorting(pixels, look)[1]).max() < 1 / 255, (i, j)


def test_clipped_white_stays_lightest_and_ties_stay_ties():
    pixels, look = room(1), room(2)
    pixels[:20], pixels[30:40], pixels[50:60, :, 1:] = 1, 0, pixels[50:60, :, :1]
    look[:5] = 1
    matched = match_histogram(pixels, lab_histogram(look))
    expected = match_histograms(to_lab(pixels)[..., 0], to_lab(look)[..., 0])
    assert to_lab(matched)[:20, :, 0].min() > 99
    for tie in (slice(0, 20), slice(30, 40)):
        assert np.ptp(matched[tie].reshape(-1, 3), axis=0).max() < 1e-4
        assert np.abs(to_lab(matched)[tie, :, 0] - expected[tie]).max() < 100 / 255


@settings(max_examples=60, deadline=None)
@given(photos, photos, st.floats(0, 1))
def test_matching_any_photo_to_any_look(pixels, look, strength):
    before = pixels.copy()
    out = match_histogram(pixels, lab_histogram(look), strength)
    assert out.shape == pixels.shape and out.dtype == np.float32 and np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    assert np.array_equal(pixels, before) and not np.shares_memory(out, pixels)
    whole = match_histogram(pixels, lab_histogram(look))
    assert np.allclose(out, pixels + np.float32(strength) * (whole - pixels), atol=1e-6)
    assert np.array_equal(match_histogram(pixels, lab_histogram(look), 0), pixels)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 1.5), st.booleans(), st.integers(0, 60))
def test_matching_to_the_own_histogram_changes_nothing(seed, light, bytes_, clipped):
    pixels = room(seed, 60, 80, light)
    pixels[:clipped] = 1
    if bytes_:
        pixels = np.rint(pixels * 255).astype(np.float32) / 255
    difference = np.abs(match_histogram(pixels, lab_histogram(pixels)) - pixels)
    assert difference.mean() < 0.05 / 255 and difference.max() < 4 / 255  # most at the rarest colours, where one rank is a long way


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_matching_never_turns_an_order_round(seed, other):
    "In each channel: what was lighter, redder, yellower than something else still is, or equal."
    rng = np.random.default_rng(seed)
    lab = rng.uniform([40, -8, -8], [60, 8, 8], (30, 40, 3)).astype(np.float32)
    look = from_lab(np.random.default_rng(other).uniform([30, -15, -15], [80, 15, 15], (40, 40, 3)).astype(np.float32))
    before, after = to_lab(from_lab(lab)), to_lab(match_histogram(from_lab(lab), lab_histogram(look)))
    for c in range(3):
        assert np.diff(after[..., c].ravel()[np.argsort(before[..., c].ravel())]).min() > -5e-3


def test_matching_twice_is_matching_once():
    reference = lab_histogram(from_lab(to_lab(room(4)) * [0.5, 0.5, 0.5] + np.array([40, 0, 0])).astype(np.float32))  # far from the limits of what can be shown
    once = match_histogram(room(3), reference)
    assert np.abs(match_histogram(once, reference) - once).max() < 1e-3
    assert np.abs(np.stack([values_at(r, c, [0.1, 0.5, 0.9]) - values_at(s, c, [0.1, 0.5, 0.9]) for c, (r, s) in enumerate(zip(lab_histogram(once), reference))])).max() < 0.1


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    ramp = (np.arange(2**14, 2**15, dtype=np.float32) / 65535)[None, :, None].repeat(3, 2) * np.float32([1, 0.97, 0.9])
    out = match_histogram(ramp, lab_histogram(ramp**0.7))[0]
    assert (np.diff(out, axis=0) > 0).all() and np.abs(out - ramp[0] ** 0.7).max() < 1e-4
    levels = [len(np.unique(np.rint(x[..., 1] * 65535))) for x in (ramp**0.7, out)]
    assert levels[1] > 0.95 * levels[0]
    colour = boost_saturation(ramp * np.float32([1, 0.8, 0.5]), strength=0.7)[0]
    assert len(np.unique(np.rint(colour[:, 1] * 65535))) > 10_000
    path = write_photo(tmp_path / "ramp.png", out[None].repeat(4, 0), bit_depth=16)
    assert np.abs(read_photo(path).pixels - out[None]).max() <= 0.5001 / 65535


@pytest.mark.parametrize("value", [(0, 0, 0), (1, 1, 1), (0.2, 0.5, 0.3)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (40, 30)])
def test_one_colour_stays(value, shape):
    flat = np.full((*shape, 3), value, np.float32)
    assert np.abs(match_histogram(flat, lab_histogram(room(0))) - flat).max() < 1e-5


def test_black_and_white_stays_black_and_white():
    grey = room(0).mean(2, keepdims=True).repeat(3, 2)
    matched = match_histogram(grey, lab_histogram(room(1)))
    assert np.ptp(matched, axis=2).max() < 1e-4 and np.abs(matched - grey).max() > 0.01


def test_any_layout_of_the_pixels():
    pixels, reference = room(5), lab_histogram(room(6))
    straight = match_histogram(pixels, reference), boost_saturation(pixels)
    for turned in (np.asfortranarray(pixels), pixels[::-1].copy()[::-1], np.ascontiguousarray(pixels[..., ::-1])[..., ::-1], pixels.astype(np.float64)):
        assert np.array_equal(match_histogram(turned, reference), straight[0]) and np.array_equal(boost_saturation(turned), straight[1])


def test_strips_make_no_difference(monkeypatch):
    pixels, reference = room(7, 200, 300), lab_histogram(room(8))
    whole = match_histogram(pixels, reference), boost_saturation(pixels)
    monkeypatch.setattr(tone, "STRIP", 1000)
    monkeypatch.setattr(tone.in_strips, "__defaults__", (1000,))
    assert np.abs(match_histogram(pixels, reference) - whole[0]).max() < 1e-4 and np.array_equal(boost_saturation(pixels), whole[1])
    assert np.array_equal(lab_histogram(room(8)), reference)


@settings(max_examples=100, deadline=None)
@given(photos, st.floats(0, 4), st.floats(0, 1))
def test_saturation_keeps_hue_and_value(pixels, factor, strength):
    before = pixels.copy()
    out = boost_saturation(pixels, factor, strength)
    assert out.shape == pixels.shape and out.dtype == np.float32 and out.min() >= 0 and out.max() <= 1
    assert np.array_equal(pixels, before) and np.array_equal(out.max(2), pixels.max(2))
    assert np.array_equal(boost_saturation(pixels, factor, 0), pixels) and np.array_equal(boost_saturation(pixels, 1, strength), pixels)
    was, now = rgb2hsv(pixels.astype(float)), rgb2hsv(out.astype(float))
    assert now[..., 1].max() <= 1
    coloured = (was[..., 1] > 1e-3) & (now[..., 1] > 1e-3) & (was[..., 2] > 1e-3)
    turn = np.abs(was[..., 0] - now[..., 0])[coloured]
    assert not turn.size or np.minimum(turn, 1 - turn).max() < 1e-3
    more = was[..., 1] * (1 + strength * max(factor - 1, 0))
    assert (now[..., 1] <= np.minimum(more, 1) + 1e-4).all() and (factor < 1 or (now[..., 1] >= was[..., 1] - 1e-4).all())


def patch(*colour):
    return np.full((32, 32, 3), colour, np.float32)


def times(colour, factor=1.3):
    was, now = (colorsys.rgb_to_hsv(*map(float, p)) for p in (colour, boost_saturation(patch(*colour), factor)[16, 16]))
    return now[1] / was[1]


@pytest.mark.parametrize("colour", [(0.35, 0.55, 0.8), (0.3, 0.5, 0.2), (0.7, 0.65, 0.3), (0.5, 0.2, 0.5), (0.3, 0.6, 0.6)])
def test_plain_colours_get_the_whole_factor(colour):
    assert times(colour) == pytest.approx(1.3, rel=1e-4)
    expected = rgb2hsv(patch(*colour)) * [1, 1.3, 1]
    assert np.abs(boost_saturation(patch(*colour)) - hsv2rgb(expected)).max() < 1e-3


@pytest.mark.parametrize("colour", [(0.88, 0.67, 0.41), (0.91, 0.75, 0.67), (0.77, 0.55, 0.48), (0.55, 0.33, 0.14), (0.36, 0.24, 0.18)])
def test_skin_gets_little(colour):
    assert 1 < times(colour) < 1.13


@pytest.mark.parametrize("colour", [(0.5, 0.49, 0.48), (0.03, 0.01, 0.02), (0.9, 0.88, 0.89)])
def test_greys_and_darkness_get_nothing(colour):
    assert times(colour) == pytest.approx(1, abs=1e-4)


def test_shares_are_smooth():
    "No edge in a gradient: along hue, saturation and value a small step changes the share a little."
    for axis in range(3):
        hsv = np.tile([0.4, 0.4, 0.7], (1, 4001, 1))
        hsv[0, :, axis] = np.linspace(0, 1, 4001)
        share = boost_share(*np.moveaxis(hsv2rgb(hsv).astype(np.float32), 2, 0))
        assert np.abs(np.diff(share)).max() < 0.01 and np.ptp(share) > 0.5


def test_colour_noise_is_not_boosted():
    noisy = np.clip(np.float32([0.3, 0.29, 0.28]) + np.random.default_rng(0).normal(0, 0.03, (300, 900, 3)), 0, 1).astype(np.float32)
    assert boost_saturation(noisy)[50:-50, 50:-50].std(axis=(0, 1)).max() < 1.05 * noisy[50:-50, 50:-50].std(axis=(0, 1)).max()


WRONG = {
    "NaN": (np.full((2, 2, 3), np.nan, np.float32), "not finite"),
    "infinite": (np.full((2, 2, 3), np.inf, np.float32), "not finite"),
    "two-dimensional": (np.zeros((4, 4), np.float32), "shape"),
    "four channels": (np.zeros((4, 4, 4), np.float32), "shape"),
    "empty": (np.zeros((0, 4, 3), np.float32), "shape"),
    "bytes": (np.zeros((4, 4, 3), np.uint8), "uint8"),
    "linear light above 1": (np.full((2, 2, 3), 1.2, np.float32), "1.2"),
    "negative": (np.full((2, 2, 3), -0.1, np.float32), "-0.1"),
}


@pytest.mark.parametrize("step", [check_pixels, boost_saturation, lambda x: match_histogram(x, lab_histogram(room(0)))], ids=["check", "saturation", "histogram"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_photo_is_refused(step, wrong):
    pixels, says = WRONG[wrong]
    with pytest.raises(AutohdrError, match=says):
        step(pixels)


def test_a_hair_outside_is_clipped():
    pixels = np.float32([[[1.0005, -0.0005, 0.5]]])
    assert np.array_equal(check_pixels(pixels), np.float32([[[1, 0, 0.5]]]))


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan"), "half", None])
def test_strength_is_checked(strength):
    for step in (lambda: boost_saturation(room(0), 1.3, strength), lambda: match_histogram(room(0), lab_histogram(room(0)), strength)):
        with pytest.raises(AutohdrError, match="strength"):
            step()


@pytest.mark.parametrize("reference", [None, "look.jpg", np.ones(9), np.zeros((3, 9)), -np.ones((3, 9)), np.full((3, 9), np.nan), [[1], [1, 2], [3]]])
def test_reference_is_checked(reference):
    with pytest.raises(AutohdrError, match="lab_histogram"):
        match_histogram(room(0), reference)


def test_the_look_of_many_edits_survives_a_checkpoint():
    reference = mean_histogram(sample_pairs().after)
    text = json.dumps(to_json(reference))
    stored = from_json(json.loads(text))
    assert len(text) < 20_000 and np.allclose(stored.sum(1), 1)
    shares = np.linspace(0, 1, 1001)
    assert max(np.abs(values_at(stored[c], c, shares) - values_at(reference[c], c, shares)).max() for c in range(3)) < 0.15
    pixels = read_photo(sample_pairs().before[5]).pixels
    difference = np.abs(match_histogram(pixels, stored) - match_histogram(pixels, reference))
    assert np.quantile(difference, 0.9999) < 0.5 / 255 and difference.max() < 4 / 255


def test_a_reference_is_the_same_from_pixels_and_from_a_file():
    path = sample_pairs().after[2]
    assert np.array_equal(reference_of(path), lab_histogram(read_photo(path).pixels))
    white = lab_histogram(np.ones((5, 5, 3), np.float32))
    assert np.allclose(from_json(to_json(white)).argmax(1), white.argmax(1), atol=2), "a single value survives, too"
