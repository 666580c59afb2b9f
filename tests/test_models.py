"""What holds for every model of the zoo: any size, any batch, half precision, gradients, files, and that it learns."""
import numpy as np
import pytest
import torch

from autohdr.models.zoo import ARCHITECTURES, create_model, load_model, save_model
from autohdr.training.loop import training_terms
from tests.zoo import SMALL, small

every_model = pytest.mark.parametrize("name", sorted(ARCHITECTURES))
# hdrnet does not pad; what the refiner pads has a test of its own
every_padding_model = pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"hdrnet", "color_refiner"}))
# what models pad to that have fewer levels in their reduced size
SMALL_MULTIPLE = {module: 2 ** len(SMALL[name]["encoder"]) for module, name in (("nafnet", "nafnet"), ("darkir", "darkir"))} | {"mamba": 8}


def test_every_model_has_a_small_configuration():
    assert set(SMALL) == set(ARCHITECTURES)


@every_model
@pytest.mark.parametrize("size", [(61, 67), (1, 1), (3, 1000), (64, 64)], ids=str)
def test_any_size(name, size):
    with torch.no_grad():
        out = small(name)(torch.rand(1, 3, *size))
    assert out.shape == (1, 3, *size) and out.isfinite().all()


def padded(x, multiple):
    """By reflection at the right and the bottom; where the photo is too small for that, by its last row or column."""
    pads = [-side % multiple for side in x.shape[2:]]
    for axis, pad in zip((2, 3), pads):
        x = np.pad(x, [(0, pad if i == axis else 0) for i in range(4)], mode="reflect" if pad < x.shape[axis] else "edge")
    return torch.from_numpy(x)


@every_padding_model
@pytest.mark.parametrize("size", [(61, 67), (1, 1), (3, 67), (61, 2)], ids=str)
def test_the_border_is_a_reflection(name, size):
    """A photo that we pad ourselves, with nothing left for the model to pad, gives the same edit: no seam, and what is cropped is what was padded."""
    multiple = SMALL_MULTIPLE.get(ARCHITECTURES[name].module, ARCHITECTURES[name].multiple)
    # a diffusion starts from noise, which nobody pads
    model, x = small(name, **{"mode": "direct"} if name == "mamba_diffusion" else {}), torch.rand(1, 3, *size)
    with torch.no_grad():
        out = model(padded(x.numpy(), multiple))[..., :size[0], :size[1]]
        assert out.isfinite().all()
        torch.testing.assert_close(model(x), out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(61, 67), (1, 1), (3, 67), (61, 2)], ids=str)
def test_the_border_of_the_refiners_branches_is_a_reflection(size, monkeypatch):
    """Its base and its summary see the photo as it is, so these are held still."""
    model, x = small("color_refiner"), torch.rand(2, 1, 3, *size)
    whole = torch.rand(1, model.summary.size)
    monkeypatch.setattr(model.summary, "forward", lambda both: whole)
    with torch.no_grad():
        out = model.refine(*(padded(v.numpy(), 4) for v in x))[..., :size[0], :size[1]]
        torch.testing.assert_close(model.refine(*x), out, atol=1e-6, rtol=1e-5)
    assert (out - x[1]).abs().max() > 1e-3, "there is an edit"


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
    assert mixed.isfinite().all() and (mixed - full).abs().mean() < 0.005


@every_model
def test_pure_bfloat16_is_close(name):
    model, x = small(name), torch.rand(1, 3, 61, 67)
    with torch.no_grad():
        full = model(x)
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all() and (half.float() - full).abs().mean() < 0.01


@every_model
def test_pure_bfloat16_has_finite_gradients(name):
    torch.manual_seed(0)
    model = small(name).train().bfloat16()
    before, after = torch.rand(2, 2, 3, 32, 48).bfloat16()
    sum(training_terms(model, before, after, torch.nn.functional.mse_loss).values()).backward()
    bad = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not bad


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
