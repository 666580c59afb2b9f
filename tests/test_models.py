"""What holds for every model of the zoo: any size, any batch, half precision, gradients, files, and that it learns."""
import numpy as np
import pytest
import torch

from autohdr.models.zoo import ARCHITECTURES, create_model, load_model, save_model
from autohdr.training.loop import training_terms
from tests.zoo import SMALL, small

every_model = pytest.mark.parametrize("name", sorted(ARCHITECTURES))


def test_every_model_has_a_small_configuration():
    assert set(SMALL) == set(ARCHITECTURES)


@every_model
@pytest.mark.parametrize("size", [(61, 67), (1, 1), (3, 1000), (64, 64)], ids=str)
def test_any_size(name, size):
    with torch.no_grad():
        out = small(name)(torch.rand(1, 3, *size))
    assert out.shape == (1, 3, *size) and out.isfinite().all()


@every_model
def test_a_photo_in_a_batch_is_the_photo_alone(name):
    model, x = small(name), torch.rand(4, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]), atol=2e-5, rtol=1e-4)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_close(name, dtype):
    model, x = small(name), torch.rand(1, 3, 61, 67)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", dtype):
            mixed = model(x).float()
    assert mixed.isfinite().all() and (mixed - full).abs().mean() < 0.02


@every_model
def test_pure_bfloat16_is_close(name):
    model, x = small(name), torch.rand(1, 3, 61, 67)
    with torch.no_grad():
        full = model(x)
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all() and (half.float() - full).abs().mean() < 0.03


@every_model
def test_gradients_reach_every_parameter(name):
    model = small(name).train()
    terms = training_terms(model, torch.rand(2, 3, 32, 48), torch.zeros(2, 3, 32, 48), torch.nn.functional.mse_loss)
    sum(terms.values()).backward()
    dead = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum())]
    assert not dead


@every_model
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model, x = small(name), torch.rand(1, 3, 32, 48)
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


@every_model
def test_it_overfits_two_pairs(name):
    """Well under what one gamma can do: the edit warms the left and cools the right."""
    torch.manual_seed(0)
    model = create_model(name, **SMALL[name])
    before = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6), (48, 48), mode="bilinear")
    tint = torch.linspace(-0.2, 0.2, 48).view(1, 1, 1, 48) * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    after = (before**0.6 + tint).clamp(0, 1)
    by_gamma = min(float((before**g - after).abs().mean()) for g in np.linspace(0.3, 1.2, 91))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(200):
        terms = training_terms(model, before, after, torch.nn.functional.l1_loss)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        optimiser.step()
    loss = float(next(iter(terms.values())))
    assert loss < by_gamma / 3, (loss, by_gamma)
