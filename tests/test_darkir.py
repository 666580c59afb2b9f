"""DarkIR against the published one, and against the plain way to write it."""
import pytest
import torch
from torch.nn.functional import l1_loss

from autohdr.models.darkir import DarkIR, infer_config
from autohdr.models.zoo import create_model
from tests.plain.darkir import DarkIR as Plain
from tests.zoo import difference_to_published, fill, kept_per_pixel, published_shapes, small

SIZES = dict(width=8, encoder=(1, 1, 2), middle=(1, 1), decoder=(2, 1, 1))


def gradients(model, x):
    """Of all parameters, for a loss that tells the pixels apart."""
    model.zero_grad()
    (model(x) * torch.linspace(-1, 1, x.shape[-1])).square().mean().backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def pair():
    """Ours and the plain version, with the same weights."""
    ours, plain = DarkIR(**SIZES), Plain(**SIZES)
    fill(ours.state_dict())
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_names_and_shapes_are_the_published_ones():
    assert {k: list(v.shape) for k, v in create_model("darkir").state_dict().items()} == published_shapes("darkir_m")


def test_output_is_the_published_one():
    assert difference_to_published(create_model("darkir"), "darkir_m") < 1e-4


def test_published_weights_name_their_configuration():
    for name, config in (("darkir", {}), ("darkir_l", {"width": 64})):
        with torch.device("meta"):
            assert infer_config(create_model(name).state_dict()) == config
    assert infer_config({k: torch.empty(v, device="meta") for k, v in published_shapes("restormer").items()}) is None


@pytest.mark.parametrize("size", [(64, 96), (8, 8), (40, 104)], ids=str)
def test_outputs_and_gradients_are_those_of_the_plain_version(pair, size):
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        ours, plain = (model(x) for model in pair)
    assert (ours - plain).norm() < 1e-5 * plain.norm()
    ours, plain = (gradients(model, x) for model in pair)
    assert ours.keys() == plain.keys()
    worst = max(float((ours[k] - plain[k]).norm() / (plain[k].norm() + 1e-6)) for k in plain)
    assert worst < 1e-4, worst
    both = [torch.cat([grads[k].flatten() for k in sorted(grads)]) for grads in (ours, plain)]
    assert (both[0] - both[1]).norm() < 1e-5 * both[1].norm()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_flat_photos_have_sane_gradients(pair, level):
    """Almost all waves are absent: their phase is rounding error and must not steer the weights."""
    model = pair[0]
    flat, noise = (gradients(model, x) for x in (torch.full((1, 3, 48, 64), level), torch.rand(1, 3, 48, 64)))
    norm = {name: float(torch.stack([g.norm() for g in grads.values()]).norm()) for name, grads in (("flat", flat), ("noise", noise))}
    assert all(g.isfinite().all() for g in flat.values()) and norm["flat"] < 10 * norm["noise"], norm


def test_side_output_learns_only_where_it_has_a_weight():
    before, after = torch.rand(2, 2, 3, 20, 36)
    model = small("darkir")
    terms = model.training_terms(before, after, l1_loss)
    assert list(terms) == ["loss", "side"] and torch.equal(terms["loss"], l1_loss(model(before), after))
    sum(terms.values()).backward()
    assert model.side_out.weight.grad.abs().sum() > 0
    model = small("darkir", side_weight=0)
    sum(model.training_terms(before, after, l1_loss).values()).backward()
    assert model.side_out.weight.grad is None


def test_training_keeps_no_more_than_the_plain_version():
    with torch.device("meta"):
        ours, plain = DarkIR(), Plain()
    assert kept_per_pixel(ours) <= kept_per_pixel(plain)
