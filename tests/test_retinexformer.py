"""RetinexFormer against the published one, and against the plain way to write it."""
import pytest
import torch

from autohdr.models.retinexformer import RetinexFormer, infer_config
from autohdr.models.zoo import create_model
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
        ours, plain = RetinexFormer(), Plain()
    assert kept_per_pixel(ours) <= kept_per_pixel(plain)
