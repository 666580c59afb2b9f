"""Models against the published ones: names, shapes, outputs; and what holds for every model of the zoo."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from autohdr.models.zoo import ARCHITECTURES, create_model, load_model, save_model

REFERENCE = Path(__file__).parent / "reference"
# reduced sizes of each architecture, so that every test takes a moment
SMALL = {"hdrnet": dict(width=8), "restormer": dict(dim=8, blocks=(1, 1, 1, 1), refinement=1), "restormer_study": dict(dim=8, blocks=(1, 1, 1, 1), refinement=1)}
every_model = pytest.mark.parametrize("name", sorted(ARCHITECTURES))


def small(name):
    torch.manual_seed(0)
    model = create_model(name, **SMALL[name]).eval()
    with torch.no_grad():  # away from the initial identity
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def fill(state):
    """Deterministic weights by name, as they were put into the published implementation for its reference output."""
    for name in sorted(state):
        shape = tuple(state[name].shape)
        u = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape).astype(np.float32)
        fan_in = int(np.prod(shape[1:]))
        if len(shape) >= 2 and fan_in > 1:
            u = u * 0.1 if name.endswith(("beta", "gamma")) else u * np.sqrt(3 / fan_in) * 0.5
        else:
            u = 1 + 0.1 * u if name.endswith(("weight", "temperature")) else 0.1 * u
        state[name].copy_(torch.from_numpy(u.astype(np.float32)))


def test_restormer_is_the_published_one():
    model = create_model("restormer").eval()
    shapes = json.loads((REFERENCE / "restormer.json").read_text())["state_dict"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == shapes
    with torch.no_grad():
        fill(model.state_dict())
        x = torch.from_numpy(np.random.default_rng(7).uniform(0, 1, (1, 3, 64, 96)).astype(np.float32))
        difference = np.abs(model(x).numpy() - np.load(REFERENCE / "restormer.npz")["output"]).max()
    assert difference < 1e-4, difference


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
def test_half_precision_is_close(name):
    model, x = small(name), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x).float()
    assert mixed.isfinite().all() and (mixed - full).abs().mean() < 0.02


@every_model
def test_gradients_reach_every_parameter(name):
    model = small(name).train()
    model(torch.rand(2, 3, 32, 48)).square().mean().backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum()]
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
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = (model(before) - after).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss) < by_gamma / 3, (float(loss), by_gamma)
