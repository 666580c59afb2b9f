"""RetinexFormer against the published one, and against the plain way to write it."""
import pytest
import torch

from autohdr.models.retinexformer import IlluminationAttention, RetinexFormer, infer_config
from autohdr.models.zoo import create_model, memory_per_pixel
from tests.plain.retinexformer import Attention as PlainAttention
from tests.plain.retinexformer import RetinexFormer as Plain
from tests.zoo import difference_to_published, fill, kept_per_pixel, published_shapes

SIZES = dict(n_feat=8, stage=2, num_blocks=(1, 1, 2))


def gradients(model, x):
    """Of all parameters, for a loss that tells the pixels apart."""
    model.zero_grad()
    (model(x) * torch.linspace(-1, 1, x.shape[-1])).square().mean().backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def test_names_and_shapes_are_the_published_ones():
    assert {k: list(v.shape) for k, v in create_model("retinexformer").state_dict().items()} == published_shapes("retinexformer")


def test_output_is_the_published_one():
    assert difference_to_published(create_model("retinexformer"), "retinexformer") < 1e-4


def test_published_weights_name_their_configuration():
    published = {k: torch.empty(v, device="meta") for k, v in published_shapes("retinexformer").items()}
    assert infer_config(published) == {} and infer_config({k: v for k, v in published.items() if "estimator" not in k}) is None


@pytest.mark.parametrize("size", [(64, 96), (4, 4), (40, 108)], ids=str)
def test_outputs_and_gradients_are_those_of_the_plain_version(size):
    ours, plain = RetinexFormer(**SIZES), Plain(**SIZES)
    fill(ours.state_dict())
    plain.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        a, b = ours(x), plain(x)
    assert (a - b).norm() < 1e-5 * b.norm()
    a, b = gradients(ours, x), gradients(plain, x)
    assert a.keys() == b.keys()
    worst = max(float((a[k] - b[k]).norm() / (b[k].norm() + 1e-6)) for k in b)
    assert worst < 1e-4, worst
    both = [torch.cat([grads[k].flatten() for k in sorted(grads)]) for grads in (a, b)]
    assert (both[0] - both[1]).norm() < 1e-5 * both[1].norm()


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_flat_photos_have_finite_gradients(level):
    grads = gradients(RetinexFormer(**SIZES), torch.full((1, 3, 32, 48), level))
    assert all(g.isfinite().all() for g in grads.values())


def test_training_keeps_no_more_than_the_plain_version():
    with torch.device("meta"):
        plain = Plain()
    assert memory_per_pixel("retinexformer") <= kept_per_pixel(plain)


def ours_and_plain_attention(offset):
    """Our attention and the plain one, and their input: queries and keys of `offset` and some noise, everywhere."""
    torch.manual_seed(0)
    ours, plain = IlluminationAttention(16, heads=2), PlainAttention(16, heads=2)
    x, light = torch.randn(1, 256, 256, 16), torch.rand(1, 256, 256, 16)
    with torch.no_grad():
        x[..., 0] = offset
        for linear in (ours.to_q, ours.to_k):
            linear.weight[:, 0] = 1
    plain.load_state_dict(ours.state_dict())
    return ours, plain, x, light


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 17.0, 200.0])
def test_an_offset_of_queries_and_keys_stays_in_range(offset, dtype):
    """Their products sum to 256 x 256 x offset x offset, which float16 cannot hold; normalised first, as commonly written, they sum to one."""
    ours, plain, x, light = ours_and_plain_attention(offset)
    with torch.no_grad():
        exact = plain(x, light)
        with torch.autocast("cpu", dtype):
            error, of_plain = ((f(x, light).float() - exact).abs().mean() for f in (ours, plain))
    assert error.isfinite() and error < 1.5 * of_plain + 1e-6, (error, of_plain)
    assert (ours(x, light) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_an_offset_has_finite_gradients_in_float16():
    ours, plain, x, light = ours_and_plain_attention(17.0)
    with torch.autocast("cpu", torch.float16):
        out = ours(x, light)
    (out.float().square().mean() * 1024).backward()  # scaled, as in training: a mean over so many values has tiny gradients
    (plain(x, light).square().mean() * 1024).backward()
    expected = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        assert p.grad.isfinite().all(), name
    for name in ("proj.weight", "to_v.weight"):
        g, e = dict(ours.named_parameters())[name].grad, expected[name].grad
        assert (g - e).norm() < 0.02 * e.norm(), name
