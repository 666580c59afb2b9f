"""MambaDiffusion at its full size, and as a diffusion model."""
import sys
import time
import types

import numpy as np
import pytest
import torch

from autohdr.core import AutohdrError
from autohdr.models import scan
from autohdr.models.mamba import MambaDiffusion
from autohdr.models.zoo import create_model, load_model, save_model
from tests.zoo import SMALL


def diffusion(**config):
    """A small model, by default of diffusion, away from the identity."""
    torch.manual_seed(0)
    model = create_model("mamba_diffusion", **{**SMALL["mamba_diffusion"], "mode": "diffusion", "steps": 4, **config}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def test_the_full_model_runs_forward_and_backward():
    """435.7 million parameters on 64 x 64 pixels: under 10 GB and about half a minute on one core."""
    model = create_model("mamba_diffusion")
    assert abs(sum(p.numel() for p in model.parameters()) - 435.7e6) < 0.1e6
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.02)
    out = model(torch.rand(1, 3, 64, 64))
    out.square().mean().backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert out.isfinite().all() and not dead


def test_both_modes_have_the_same_tensors():
    with torch.device("meta"):
        a, b = (MambaDiffusion(mode=mode).state_dict() for mode in ("direct", "diffusion"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_measuring_the_full_model_takes_a_moment():
    from autohdr.models.zoo import memory_per_pixel

    start = time.process_time()
    plain, recomputed = memory_per_pixel("mamba_diffusion"), memory_per_pixel("mamba_diffusion", checkpointing=True)
    assert recomputed < plain / 20 and time.process_time() - start < 20


@pytest.mark.parametrize("length", [1, 5, 64, 129, 1500])
def test_scan_is_the_loop(length):
    g = torch.Generator().manual_seed(length)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    inputs = [rand(2, 4, length, 6), rand(2, 4, length, 6).exp() / 10, -rand(4, 6, 4).exp(), rand(2, 4, length, 4), rand(2, 4, length, 4)]
    weight, results = rand(2, 4, length, 6), []
    for f in (scan.Scan.apply, scan.naive_scan):
        leaves = [v.clone().requires_grad_() for v in inputs]
        y = f(*leaves)
        (y * weight).sum().backward()
        results.append([y.detach(), *(v.grad for v in leaves)])
    for ours, loop in zip(*results):
        assert (ours - loop).abs().max() <= 1e-5 * loop.abs().max()


def test_the_kernel_is_found_where_it_is_installed(monkeypatch):
    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = lambda *args: "called"
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    scan.fused_kernel.cache_clear()
    try:
        assert scan.fused_kernel() is module.selective_scan_fn
    finally:
        scan.fused_kernel.cache_clear()


class OnGpu:
    """A tensor's device and type, as far as a choice looks at them."""

    def __init__(self, device, dtype):
        self.device, self.dtype = torch.device(device), dtype


def test_the_kernel_is_chosen_on_a_gpu_and_for_what_it_can_do(monkeypatch):
    kernel = lambda *args: None
    monkeypatch.setattr(scan, "fused_kernel", lambda: kernel)
    assert all(scan.choose_kernel(OnGpu("cuda", dtype)) is kernel for dtype in (torch.float32, torch.float16, torch.bfloat16))
    assert all(scan.choose_kernel(x) is None for x in (OnGpu("cuda", torch.float64), OnGpu("cpu", torch.float32), OnGpu("meta", torch.float32)))
    monkeypatch.setattr(scan, "fused_kernel", lambda: None)
    assert scan.choose_kernel(OnGpu("cuda", torch.float32)) is None


def test_the_chosen_kernel_does_the_scan(monkeypatch):
    calls = []
    def kernel(u, delta, A, B, C):
        calls.append(u.shape)
        return u * 2

    monkeypatch.setattr(scan, "choose_kernel", lambda x: kernel)
    x, B = torch.rand(2, 4, 10, 6), torch.rand(2, 4, 10, 3)
    y = scan.selective_scan(x, x, -torch.ones(4, 6, 3), B, B, torch.ones(4, 6))
    torch.testing.assert_close(y, 3 * x)
    assert calls == [(2, 24, 10)]


@pytest.mark.parametrize("mode", ["direct", "diffusion"])
def test_an_empty_batch_comes_back_empty(mode):
    with torch.no_grad():
        assert diffusion(mode=mode)(torch.rand(0, 3, 16, 24)).shape == (0, 3, 16, 24)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(steps=11, timesteps=10), "steps is 11; expected a whole number from 1 to 10"),
        (dict(timesteps=0), "timesteps is 0"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=2.5), "steps is 2.5"),
        (dict(samples=0), "samples is 0"),
        (dict(dim=7), "dim is 7; expected an even number"),
        (dict(dim=0), "dim is 0"),
        (dict(blocks=()), r"blocks is \(\)"),
        (dict(blocks=(1, -1)), r"blocks\[1\] is -1"),
        (dict(middle=-1), "middle is -1"),
        (dict(mode="diffuse"), "Did you mean 'diffusion'"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_at_once(wrong, says):
    with pytest.raises(AutohdrError, match=says):
        create_model("mamba_diffusion", **{**SMALL["mamba_diffusion"], **wrong})


@pytest.mark.parametrize("dim", [2, 22, 50, 66])
def test_any_even_width_works(dim):
    model = MambaDiffusion(dim=dim, blocks=(1,), middle=1, d_state=2)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 4, 4)).isfinite().all()


def test_a_sample_is_the_same_every_time_and_in_any_batch(tmp_path):
    model, x = diffusion(samples=2), torch.rand(4, 3, 21, 30)
    y = model(x)
    assert y.shape == x.shape and torch.equal(y, model(x))
    torch.testing.assert_close(y[2:3], model(x[2:3]), atol=2e-5, rtol=1e-4)
    assert torch.equal(load_model(save_model(model, tmp_path / "m.safetensors"))(x), y)
    assert not torch.equal(diffusion(samples=2, seed=1)(x), y)


def test_an_ensemble_is_its_samples():
    model, x = diffusion(), torch.rand(2, 3, 16, 24)
    drawn = model.draw(x, 3)
    mean, spread = model.ensemble(x, 3)
    assert drawn.shape == (3, 2, 3, 16, 24) and not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(mean, drawn.mean(0))
    torch.testing.assert_close(spread, drawn.std(0, correction=0))
    assert not model.ensemble(x, 1)[1].any()


@pytest.mark.parametrize("size", [(61, 67), (1, 1), (3, 1000)], ids=str)
def test_diffusion_takes_any_size_in_half_precision_too(size):
    model, x = diffusion(), torch.rand(1, 3, *size)
    full = model(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert (model(x).float() - full).abs().mean() < 0.03
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.shape == x.shape and (half.float() - full).abs().mean() < 0.03


def test_training_terms_reach_every_parameter_and_follow_the_seed():
    model, x = diffusion().train(), torch.rand(2, 3, 16, 24)
    assert list(model.training_terms(x, x, torch.nn.functional.l1_loss)) == ["loss"]
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(sum(model.training_terms(x, x**0.6, torch.nn.functional.l1_loss).values()))
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_diffusion_overfits_two_pairs():
    torch.manual_seed(0)
    model = create_model("mamba_diffusion", **SMALL["mamba_diffusion"], mode="diffusion")
    before = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6), (32, 32), mode="bilinear")
    tint = torch.linspace(-0.2, 0.2, 32).view(1, 1, 1, 32) * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    after = (before**0.6 + tint).clamp(0, 1)
    by_gamma = min(float((before**g - after).abs().mean()) for g in np.linspace(0.3, 1.2, 91))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimiser.zero_grad()
        sum(model.training_terms(before, after, torch.nn.functional.l1_loss).values()).backward()
        optimiser.step()
    assert (model(before) - after).abs().mean() < by_gamma / 2
