"""Colour spaces against scikit-image, there and back, and their gradients."""
import numpy as np
import pytest
import skimage.color
import torch

from autohdr.core import AutohdrError
from autohdr.models.colour import hsv_to_rgb, lab_to_rgb, linear_to_srgb, luma, rgb_to_hsv, rgb_to_lab, srgb_to_linear

BOTH_WAYS = [(rgb_to_hsv, hsv_to_rgb), (rgb_to_lab, lab_to_rgb), (srgb_to_linear, linear_to_srgb)]
ALL = [f for pair in BOTH_WAYS for f in pair] + [luma]
each = pytest.mark.parametrize("convert", ALL, ids=lambda f: f.__name__)


def colours(dtype=torch.float32):
    """Random colours, then 8-bit greys, then a cube's corners and edges."""
    torch.manual_seed(0)
    cube = torch.cartesian_prod(*[torch.linspace(0, 1, 5)] * 3).T
    greys = (torch.arange(256) / 255).expand(3, 256)
    return torch.cat([torch.rand(3, 4096), greys, cube], 1).to(dtype)[None, :, None]


def as_photo(x):
    return x[0].permute(1, 2, 0).double().numpy()


def test_hsv_is_that_of_skimage():
    apart = as_photo(rgb_to_hsv(colours())) - skimage.color.rgb2hsv(as_photo(colours()))
    apart[..., 0] -= apart[..., 0].round()
    assert np.abs(apart).max() < 1e-5
    hsv = colours()
    assert np.abs(as_photo(hsv_to_rgb(hsv)) - skimage.color.hsv2rgb(as_photo(hsv))).max() < 1e-5


def test_lab_is_that_of_skimage():
    lab = skimage.color.rgb2lab(as_photo(colours()))
    assert np.abs(as_photo(rgb_to_lab(colours())) - lab).max() < 2e-4  # of units up to 110: float32
    assert np.abs(as_photo(rgb_to_lab(colours().double())) - skimage.color.rgb2lab(as_photo(colours().double()))).max() < 1e-10
    again = lab_to_rgb(torch.from_numpy(lab).permute(2, 0, 1)[None])
    assert np.abs(as_photo(again) - skimage.color.lab2rgb(lab)).max() < 1e-10


def test_luma_is_rec_601():
    assert luma(colours()).shape == (1, 1, *colours().shape[2:])
    torch.testing.assert_close(luma(torch.eye(3).view(1, 3, 1, 3)).flatten(), torch.tensor([0.299, 0.587, 0.114]))


@pytest.mark.parametrize("there, back", BOTH_WAYS, ids=lambda f: f.__name__)
def test_there_and_back(there, back):
    outside = colours() * 1.06 - 0.03  # models leave [0,1] a little
    for x, error in ((colours(), 2e-5), (colours().double(), 1e-6), (outside[:, :, :, (outside.amax(1) > 0.05)[0, 0]], 2e-5)):
        torch.testing.assert_close(back(there(x)), x, atol=error, rtol=0)


@each
def test_derivatives_are_right(convert):
    """At regular points: no two channels alike, none at a threshold."""
    torch.manual_seed(1)
    x = torch.rand(1, 3, 4, 5, dtype=torch.float64) * 0.2 + torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64).view(3, 1, 1)
    for order in ([0, 1, 2], [1, 2, 0], [2, 1, 0]):
        y = x[:, order]
        if convert is lab_to_rgb:
            y = rgb_to_lab(y)
        assert torch.autograd.gradcheck(convert, y.detach().requires_grad_())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_finite_for_every_colour(convert, dtype):
    values = torch.tensor([-0.5, -1e-3, -1e-38, 0, 1e-42, 1e-20, 1e-6, 0.0031308, 0.04045, 0.5, 1 - 1e-7, 1, 1.001, 1.5], dtype=dtype)
    x = torch.cartesian_prod(values, values, values).T[None, :, None]
    if convert is lab_to_rgb:
        x = x * torch.tensor([100, 110, 110], dtype=dtype).view(3, 1, 1)
    for plane in range(convert(x).shape[1]):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(convert(x)[:, plane].sum(), x)
        assert gradient.isfinite().all() and convert(x).isfinite().all()


def test_grey_has_no_hue_and_no_gradient_of_one():
    x = (torch.arange(256) / 255).view(1, 1, 1, 256).repeat(1, 3, 1, 1).requires_grad_()
    hue, saturation, _ = rgb_to_hsv(x).unbind(1)
    assert not hue.any() and not saturation.any()
    assert not torch.autograd.grad(hue.sum() + saturation.sum(), x)[0].any()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_converted_in_single(convert, dtype):
    x = colours(dtype)
    out = convert(x)
    assert out.dtype == dtype and torch.equal(out, convert(x.float()).to(dtype))
    with torch.autocast("cpu", dtype):
        inside = convert(colours())
    assert inside.dtype == torch.float32 and torch.equal(inside, convert(colours()))


@each
def test_wrong_shapes_are_refused(convert):
    for shape in ((2, 4, 8, 8), (8, 8), (8, 8, 3)):
        with pytest.raises(AutohdrError, match=convert.__name__):
            convert(torch.rand(shape))


def test_meta_device_has_shapes():
    for convert in ALL:
        assert convert(torch.rand(2, 3, 4, 5, device="meta")).shape[-2:] == (4, 5)
