"""What every loss has to keep, whichever it is, and their values against other libraries and formulas written out."""
import math

import cv2
import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import skimage.filters
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from autohdr import metrics
from autohdr.core import AutohdrError
from autohdr.data.pairs import read_pair, scan_pairs
from autohdr.losses.colour import DARK, hue, lab, saturation
from autohdr.losses.pixel import charbonnier, gradient_map, l1
from autohdr.losses.regions import highlight, highlight_mask, window, window_mask
from autohdr.losses.structure import bands, gradient, laplacian, ms_ssim, ssim
from tests.test_perceptual import perceptual

# A loss that joins this table gets all the tests that take `loss`.
LOSSES = {f.__name__: f for f in (l1, charbonnier, ssim, ms_ssim, gradient, laplacian, window, highlight, saturation, lab, hue, perceptual)}
# Losses that see every difference (others are blind: to brightness, to what is not coloured, to what is not bright).
WHOLE = ("l1", "charbonnier", "ssim", "ms_ssim", "laplacian", "window", "lab", "perceptual")
SIZES = ((1, 1), (1, 7), (9, 1), (2, 2), (3, 5), (10, 11), (11, 10), (16, 40), (45, 23), (31, 64))

each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_whole = pytest.mark.parametrize("loss", [LOSSES[k] for k in WHOLE], ids=WHOLE)
few = settings(max_examples=15, deadline=None)


def noise(seed, *shape, low=0.0, high=1.0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, shape)).to(dtype)


def palette(dtype=torch.float64):
    """1 x 3 x 5 x 9: black, white, greys and the pure and half-pure colours, each beside each other."""
    levels = (0, 0.5, 1)
    cube = torch.tensor([(r, g, b) for r in levels for g in levels for b in levels] + [(v, v, v) for v in np.linspace(0, 1, 18)], dtype=dtype)
    return cube.T.reshape(1, 3, 5, 9).contiguous()


def plain(r, g, b, dtype=torch.float64):
    return torch.tensor([r, g, b], dtype=dtype).view(1, 3, 1, 1).repeat(1, 1, 4, 6)


PHOTOS = {
    "palette": palette(), "black": plain(0, 0, 0), "white": plain(1, 1, 1), "grey": plain(0.5, 0.5, 0.5), "dark": plain(0.01, 0.01, 0.01), "red": plain(1, 0, 0),
    "yellow": plain(1, 1, 0), "blue": plain(0, 0, 1), "cyan": plain(0, 1, 1), "random": noise(3, 2, 3, 5, 6, dtype=torch.float64),
}


@pytest.fixture(scope="module")
def sample():
    """A sample pair at 64 pixels: the before with the gamma that suits it best, and the after."""
    pairs, _ = scan_pairs("samples")
    before, after = read_pair(pairs.iloc[0], size=64)[:2]
    tensor = lambda x: torch.from_numpy(x).permute(2, 0, 1)[None].contiguous()
    return tensor(metrics.apply_gamma(before, metrics.fit_gamma([before], [after]))), tensor(after)


@each_loss
@pytest.mark.parametrize("name", PHOTOS)
def test_gradient_is_right(loss, name):
    pred = PHOTOS[name]
    target = noise(1, *pred.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: loss(p, target), pred.clone().requires_grad_(), atol=1e-6, rtol=1e-4)


@each_loss
def test_gradient_is_right_at_several_scales(loss):
    pred, target = noise(5, 1, 3, 45, 50, dtype=torch.float64), noise(6, 1, 3, 45, 50, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: loss(p, target), pred.requires_grad_(), atol=1e-6, rtol=1e-4, fast_mode=True)


@each_loss
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_equal_photos_give_exactly_zero(loss, dtype):
    for photo in (*PHOTOS.values(), noise(2, 2, 3, 40, 51), noise(2, 1, 3, 190, 180, low=-0.1, high=1.1)):
        pred = photo.to(dtype).clone().requires_grad_()
        value = loss(pred, photo.to(dtype))
        value.backward()
        assert value.item() == 0 and pred.grad.isfinite().all()
        assert pred.grad.abs().max() < 1e-6, "there is nothing to gain"


@each_loss
def test_different_photos_give_more(loss, sample):
    assert loss(*sample) > 1e-4
    assert loss(noise(0, 1, 3, 30, 30), noise(1, 1, 3, 30, 30)) > 1e-2


@each_loss
def test_typical_values_are_of_the_order_of_l1(loss, sample):
    assert 1 / 40 < loss(*sample) / l1(*sample) < 8


@each_loss
@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-14), (torch.float32, 1e-6)), ids=str)
def test_a_batch_gives_the_mean_of_its_photos(loss, dtype, tolerance):
    pred, target = noise(0, 4, 3, 26, 33, dtype=dtype), noise(1, 4, 3, 26, 33, dtype=dtype)
    pred[0], target[1], pred[2] = 0.5 + pred[0] / 100, 0.9, target[2]
    single = torch.stack([loss(p[None], t[None]) for p, t in zip(pred, target)]).mean()
    assert abs(loss(pred, target) - single) < tolerance
    whole, parts = (gradient_map(f, pred, target) for f in (loss, lambda p, t: (loss(p[:3], t[:3]) * 3 + loss(p[3:], t[3:])) / 4))
    torch.testing.assert_close(whole, parts, atol=100 * tolerance, rtol=1e-4)


@each_loss
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
def test_mixed_precision_changes_nothing(loss, half):
    pred, target = noise(0, 2, 3, 30, 35).requires_grad_(), noise(1, 2, 3, 30, 35)
    wanted = loss(pred, target)
    wanted_gradient, = torch.autograd.grad(wanted, pred)
    with torch.autocast("cpu", half):
        got = loss(pred, target)
    got_gradient, = torch.autograd.grad(got, pred)
    assert got.dtype == torch.float32 and torch.equal(got, wanted) and torch.equal(got_gradient, wanted_gradient)
    rounded = pred.detach().to(half).requires_grad_()
    with torch.autocast("cpu", half):
        value = loss(rounded, target)
    assert torch.equal(value, loss(rounded.detach().float(), target)), "a prediction in half precision is widened, not computed in"
    assert torch.autograd.grad(value, rounded)[0].dtype == half


@each_loss
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size(loss, size):
    pred, target = noise(0, 2, 3, *size).requires_grad_(), noise(1, 2, 3, *size)
    value = loss(pred, target)
    value.backward()
    assert value.shape == () and value >= 0 and value.isfinite() and pred.grad.shape == pred.shape and pred.grad.isfinite().all()
    assert loss(target, target) == 0
    assert loss(pred.detach().to("meta"), target.to("meta")).shape == ()


@each_whole
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_that_see_everything_do_so_at_any_size(loss, size):
    target = noise(1, 1, 3, *size)
    assert loss(1 - target, target) > 1e-3 and loss(target * 0.5, target) > 1e-3


@each_loss
def test_channels_last_changes_nothing(loss):
    pred, target = noise(0, 3, 3, 23, 30), noise(1, 3, 3, 23, 30)
    last = [x.to(memory_format=torch.channels_last) for x in (pred, target)]
    assert torch.equal(loss(*last), loss(pred, target))
    assert torch.equal(gradient_map(loss, *last), gradient_map(loss, pred, target))


@each_loss
@pytest.mark.parametrize("low, high", ((-0.02, 1.02), (-1, 2), (-100, 100)))
def test_predictions_outside_the_range(loss, low, high):
    pred, target = noise(0, 1, 3, 24, 25, low=low, high=high), noise(1, 1, 3, 24, 25)
    pred[0, :, :2], pred[0, :, 2:4] = low, high
    pred.requires_grad_()
    value = loss(pred, target)
    value.backward()
    assert value.isfinite() and value > 0 and pred.grad.isfinite().all() and pred.grad.any()


@each_loss
def test_tiny_numbers_give_no_huge_gradient(loss):
    """Formulas with a root or a division go wrong a little beside black or grey, not on it."""
    tiny = torch.tensor([0, 1e-38, 1e-30, 1e-20, 1e-12, 1e-8, 1e-6, 1e-4])
    for base in (0.0, 0.5, 1 - 1e-4):
        pred = base + torch.cartesian_prod(tiny, tiny, tiny).T.reshape(1, 3, 16, 32)
        for target in (noise(1, *pred.shape), pred.flip(1), pred.flip(3), torch.zeros_like(pred)):
            value, per_pixel = loss(pred, target), gradient_map(loss, pred, target)
            assert value.isfinite() and per_pixel.isfinite().all() and per_pixel.max() < 200, (base, per_pixel.max())


@each_loss
def test_a_value_that_is_not_finite_is_seen(loss):
    """Training stops at a loss that is not a number, so no clamp may hide one."""
    pred, target = noise(0, 1, 3, 24, 25), noise(1, 1, 3, 24, 25).fill_(0.9)
    pred[0, :, 5, 5] = math.nan
    assert not loss(pred, target).isfinite()


@each_loss
def test_what_cannot_be_compared(loss):
    x = noise(0, 2, 3, 12, 13)
    for pred, target, word in (
        (x, x[:1], "(1, 3, 12, 13)"), (x[..., :-1], x, "(2, 3, 12, 12)"), (x[0], x[0], "N x 3 x H x W"), (x[:, :1], x[:, :1], "N x 3 x H x W"),
        (x.permute(0, 2, 3, 1), x, "(2, 12, 13, 3)"), (x[:0], x[:0], "none of them 0"), (x, (255 * x).byte(), "uint8"), (x, x.to("meta"), "meta"),
    ):
        with pytest.raises(AutohdrError) as error:
            loss(pred, target)
        assert word in str(error.value)


@each_loss
def test_inputs_are_left_alone(loss):
    pred, target = noise(0, 1, 3, 30, 31), noise(1, 1, 3, 30, 31)
    copies = pred.clone(), target.clone()
    loss(pred.requires_grad_(), target).backward()
    assert torch.equal(pred.detach(), copies[0]) and torch.equal(target, copies[1]) and not target.requires_grad


@each_loss
@few
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.sampled_from((1, 8, 256, 65536)))
def test_any_photos(loss, height, width, seed, levels):
    """Few levels make many pixels equal, black and clipped."""
    pred, target = (((noise(seed + i, 2, 3, height, width) * levels).round() / levels).requires_grad_(i == 0) for i in (0, 1))
    value = loss(pred, target)
    value.backward()
    assert 0 <= value < 3 and pred.grad.isfinite().all()
    assert torch.equal(loss(pred, target), value), "and the same again"
    mirrored = loss(pred.detach().flip(0), target.flip(0))
    assert abs(mirrored - value) < 1e-6, "the order of the photos is nothing to it"


@pytest.mark.parametrize("loss", (l1, gradient, laplacian, window, highlight), ids=lambda f: f.__name__)
@few
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.floats(0, 2))
def test_losses_that_are_norms_of_the_error(loss, height, width, seed, share):
    pred, target = noise(seed, 1, 3, height, width, dtype=torch.float64), noise(seed + 1, 1, 3, height, width, dtype=torch.float64)
    assert abs(loss(target + share * (pred - target), target) - share * loss(pred, target)) < 1e-12


@pytest.mark.parametrize("loss", (l1, charbonnier, ssim, gradient, window, highlight, saturation, lab, hue), ids=lambda f: f.__name__)
@few
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_mirrored_photos_are_as_far_apart(loss, height, width, seed):
    pred, target = noise(seed, 1, 3, height, width, dtype=torch.float64), noise(seed + 1, 1, 3, height, width, dtype=torch.float64)
    for axes in ((2,), (3,)):
        assert abs(loss(pred.flip(axes), target.flip(axes)) - loss(pred, target)) < 1e-12


@each_loss
def test_descent_leads_to_the_target(loss, sample):
    start, target = sample
    pred, least = start.clone().requires_grad_(), loss(*sample).item()
    optimiser = torch.optim.Adam([pred], lr=0.01)
    for step in range(150):
        optimiser.param_groups[0]["lr"] = 0.01 * (1 - step / 150)
        value = loss(pred, target)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert loss(pred, target) < 0.3 * least
    if loss.__name__ in WHOLE:
        assert l1(pred, target) < 0.8 * l1(start, target)


# Values

def hwc(x):
    return x[0].permute(1, 2, 0).numpy()


@few
@given(st.integers(11, 60), st.integers(11, 60), st.integers(0, 10**6))
def test_ssim_is_that_of_skimage_and_of_our_metric(height, width, seed):
    target = noise(seed, 1, 3, height, width, dtype=torch.float64)
    pred = (target + noise(seed + 1, 1, 3, height, width, low=-0.3, high=0.3)).clamp(0, 1)
    wanted = structural_similarity(hwc(pred), hwc(target), channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
    assert abs(1 - ssim(pred, target).item() - wanted) < 1e-6 and abs(1 - ssim(pred, target).item() - metrics.ssim(hwc(pred), hwc(target))) < 1e-6
    assert abs(ssim(pred.float(), target.float()) - ssim(pred, target)) < 1e-6, "single precision does"


def test_ssim_of_nearly_equal_photos_keeps_its_digits():
    target = noise(0, 1, 3, 60, 60, low=0.9)
    pred = target + 1e-3 * noise(1, 1, 3, 60, 60)
    wanted = ssim(pred.double(), target.double()).item()
    assert abs(ssim(pred, target).item() / wanted - 1) < 1e-3 and wanted < 1e-3


def test_ssim_of_small_photos_by_the_formula():
    """The window of a photo of 4 x 7 is 3 x 7."""
    pred, target = noise(0, 1, 3, 4, 7, dtype=torch.float64).numpy(), noise(1, 1, 3, 4, 7, dtype=torch.float64).numpy()
    def weights(n):
        w = np.exp(-0.5 * (np.arange(n) - n // 2) ** 2 / 1.5**2)
        return w / w.sum()
    w, found = np.outer(weights(3), weights(7)), []
    for c in range(3):
        for top in range(2):
            a, b = pred[0, c, top : top + 3], target[0, c, top : top + 3]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / (ma**2 + mb**2 + 1e-4) / (va + vb + 9e-4))
    assert abs(1 - ssim(torch.from_numpy(pred), torch.from_numpy(target)).item() - np.mean(found)) < 1e-12


def test_ms_ssim_is_that_of_torchmetrics():
    """Its last scale counts windows over the edge as well: it is put right with skimage's number."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure, structural_similarity_index_measure

    target = torch.nn.functional.interpolate(noise(0, 1, 3, 30, 35, dtype=torch.float64), (190, 221), mode="bicubic").clamp(0, 1)
    pred = (target**0.7 + 0.05 * noise(1, 1, 3, 190, 221)).clamp(0, 1)
    ours, theirs = 1 - ms_ssim(pred, target).item(), multiscale_structural_similarity_index_measure(pred, target, data_range=1.0).item()
    assert abs(ours - theirs) < 5e-3
    small = [torch.nn.functional.avg_pool2d(x, 16) for x in (pred, target)]
    whole = structural_similarity(*map(hwc, small), channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
    over_the_edge = structural_similarity_index_measure(*small, data_range=1.0).item()
    assert abs(ours - theirs * (whole / over_the_edge) ** 0.1333) < 1e-7


def test_ms_ssim_of_a_negative():
    """Contrast of the wrong sign: torchmetrics gives 0 and a gradient of 0 or NaN; ours leads out of it."""
    target = torch.nn.functional.interpolate(noise(0, 1, 3, 12, 12), (96, 96), mode="bicubic").clamp(0, 1)
    pred = (1 - target).requires_grad_()
    value = ms_ssim(pred, target)
    value.backward()
    assert 0.9 < value < 1 and pred.grad.isfinite().all()
    assert ms_ssim(pred.detach() - 0.1 * pred.grad / pred.grad.abs().max(), target) < value


@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_gradient_is_sobel(height, width, seed):
    pred, target = noise(seed, 1, 3, height, width, dtype=torch.float64), noise(seed + 1, 1, 3, height, width, dtype=torch.float64)
    apart = [np.abs(np.subtract(*(scipy.ndimage.sobel(x[0, c].numpy(), axis, mode="nearest") / 4 for x in (pred, target)))) for c in range(3) for axis in (0, 1)]
    assert abs(gradient(pred, target).item() - np.mean(apart)) < 1e-12
    direct = [np.abs(np.subtract(*(skimage.filters.sobel(x[0, c].numpy(), axis=axis) for x in (pred, target)))) for c in range(3) for axis in (0, 1)]
    assert abs(gradient(pred, target).item() - np.mean(direct)) < 1e-12


@few
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 10**6))
def test_laplacian_pyramid_by_opencv_and_by_the_formula(height, width, seed):
    photo = noise(seed, 1, 3, height, width, dtype=torch.float64)
    kernel, rest = np.array([1, 4, 6, 4, 1]) / 16, hwc(photo)
    levels = min(5, int(math.log2(min(height, width))))
    found = bands(photo)
    assert len(found) == levels + 1
    for band in found[:-1]:
        small = cv2.pyrDown(rest, borderType=cv2.BORDER_REPLICATE).reshape((rest.shape[0] + 1) // 2, -1, 3)
        large = np.pad(small, ((1, 1), (1, 1), (0, 0)), "edge")
        for axis in (0, 1):
            spread = np.zeros([2 * n if i == axis else n for i, n in enumerate(large.shape)])
            spread[(slice(None),) * axis + (slice(None, None, 2),)] = large
            large = 2 * scipy.ndimage.correlate1d(spread, kernel, axis, mode="constant")
        assert np.abs(hwc(band) - (rest - large[2 : 2 + rest.shape[0], 2 : 2 + rest.shape[1]])).max() < 1e-12
        rest = small
    assert np.abs(hwc(found[-1]) - rest).max() < 1e-12
    assert abs(laplacian(photo, torch.zeros_like(photo)).item() - np.mean([band.abs().mean() for band in found])) < 1e-12


@few
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6))
def test_lab_and_saturation_are_those_of_skimage(height, width, seed):
    pred, target = noise(seed, 1, 3, height, width, dtype=torch.float64), noise(seed + 1, 1, 3, height, width, dtype=torch.float64)
    apart = skimage.color.deltaE_cie76(skimage.color.rgb2lab(hwc(pred)), skimage.color.rgb2lab(hwc(target)))
    assert abs(lab(pred, target, eps=1e-9).item() - apart.mean() / 100) < 1e-7 and abs(lab(pred, target).item() - apart.mean() / 100) < 1e-3
    pred, target = (x.clamp(min=DARK) for x in (pred, target))
    found = np.abs(skimage.color.rgb2hsv(hwc(pred))[..., 1] - skimage.color.rgb2hsv(hwc(target))[..., 1]).mean()
    assert abs(saturation(pred, target).item() - found) < 1e-12


@given(st.floats(0, 360), st.floats(0, 360), st.floats(0.3, 1), st.floats(0.3, 1))
def test_hue_is_an_angle(first, second, strong, other):
    """Colours made from their angle: grey plus cosines a third of a turn apart."""
    def colour(degrees, chroma):
        return 0.5 + chroma / 3 * torch.tensor([math.cos(math.radians(degrees - shift)) for shift in (0, 120, 240)], dtype=torch.float64).view(1, 3, 1, 1)
    pred, target = colour(first, strong), colour(second, other)
    wanted = other / 2 * (1 - math.cos(math.radians(first - second)))
    assert abs(hue(pred, target).item() - wanted) < 0.15 * wanted + 0.02
    assert abs(hue(colour(first + 40, strong), colour(second + 40, other)) - hue(pred, target)) < 1e-12, "no hue is special, red at 0 least of all"


def test_hue_does_not_count_grey_and_finds_the_way_from_it():
    grey, red = plain(0.5, 0.5, 0.5), plain(0.8, 0.2, 0.2)
    assert hue(red, grey) == 0 and hue(grey, red) > 0.1
    pred = grey.clone().requires_grad_()
    hue(pred, red).backward()
    assert (pred.grad[:, 0] < 0).all() and (pred.grad[:, 1:] > 0).all()


# Regions

@pytest.mark.parametrize("mask", (window_mask, highlight_mask))
def test_masks_are_of_the_target_alone(mask, sample):
    target = sample[1].clone().requires_grad_()
    found = mask(target)
    assert not found.requires_grad and found.shape == (1, 1, *target.shape[-2:]) and 0 <= found.min() <= found.max() <= 1
    assert torch.equal(mask(torch.cat([target, 1 - target]))[:1], found), "what else is in the batch does not matter"
    for size in SIZES:
        assert mask(noise(0, 1, 3, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize("loss, mask", ((lambda p, t: window(p, t) - l1(p, t), window_mask), (highlight, highlight_mask)), ids=("window", "highlight"))
def test_an_error_counts_where_the_mask_is(loss, mask, sample):
    target = sample[1]
    where = mask(target)[0, 0]
    row, column = np.unravel_index(int(where.argmax()), where.shape)
    pred = target.clone()
    pred[0, :, row, column] += 0.3
    assert where.max() > 0.5 and abs(loss(pred, target) - 0.3 * where.max() / where.numel()) < 1e-6
    outside = (where == 0).expand_as(target)
    assert outside.any() and loss(torch.where(outside, 1 - target, target), target).abs() < 1e-6


def test_window_mask_tells_windows_from_walls():
    """On a photo drawn for it: a bright window with bars and leaves, a white wall, a red picture."""
    photo = np.full((120, 180, 3), 0.85, np.float32)
    photo[60:] = (0.45, 0.35, 0.3)
    leaves = np.random.default_rng(0).random((36, 50, 1)) < 0.25
    photo[10:46, 30:80] = np.where(leaves, (0.5, 0.6, 0.5), (0.9, 0.93, 0.97))
    photo[10:46, 120:165] = np.where(np.random.default_rng(1).random((36, 45, 1)) < 0.5, (0.9, 0.2, 0.1), (0.7, 0.1, 0.1))
    mask = window_mask(torch.from_numpy(photo).permute(2, 0, 1)[None])[0, 0].numpy()
    assert mask[18:38, 40:70].min() > 0.9, "the window"
    assert mask[18:38, 128:158].max() < 0.05, "a red picture, however lively"
    assert mask[70:].max() < 0.05 and mask[10:46, 95:108].max() < 0.05, "the floor, the wall"


def test_window_weight():
    pred, target = noise(0, 1, 3, 40, 40), noise(1, 1, 3, 40, 40, low=0.5)
    assert window_mask(target).any() and window(pred, target, weight=1) == l1(pred, target)
    low, high = (window(pred, target, weight=w) for w in (2, 3))
    assert abs((high - l1(pred, target)) - 2 * (low - l1(pred, target))) < 1e-6
    with pytest.raises(AutohdrError, match="weight is -0.5"):
        window(pred, target, weight=-0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_loss
def test_the_same_on_a_gpu(loss):
    pred, target = noise(0, 2, 3, 100, 150), noise(1, 2, 3, 100, 150)
    here, there = loss(pred, target), loss(pred.cuda(), target.cuda())
    assert abs(here - there.cpu()) < 1e-5
    torch.testing.assert_close(gradient_map(loss, pred, target), gradient_map(loss, pred.cuda(), target.cuda()).cpu(), atol=1e-2, rtol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(loss(pred.cuda(), target.cuda()), there)
