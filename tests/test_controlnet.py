"""ControlNet-Restormer: bit for bit its base at first, a base that nothing moves, one file that holds both."""
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from torch.optim.swa_utils import AveragedModel

from autohdr.core import AutohdrError
from autohdr.models.weights import create_on_base
from autohdr.models.zoo import create_model, load_model, memory_per_pixel, save_model
from tests.zoo import SMALL, small

both_ways = pytest.mark.parametrize("levels", [False, True], ids=["output", "levels"])


def on_base(tmp_path, levels, name="restormer", **config):
    """A trained base (in a file), and a model that stands on it."""
    base = small(name)
    checkpoint = save_model(base, tmp_path / "base.safetensors")
    return base, create_on_base("controlnet_restormer", checkpoint, levels=levels, **config)


def bits(x):
    """The bits of a float tensor, so that -0.0 and NaN are told apart from their like."""
    return x.contiguous().view(torch.int32)


def step(model, x, optimiser):
    optimiser.zero_grad()
    (model(x) - x**0.6).abs().mean().backward()
    optimiser.step()


def test_counts_are_exact():
    with torch.device("meta"):
        whole, levels = create_model("controlnet_restormer"), create_model("controlnet_restormer", levels=True)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(whole) == 52_223_348 and count(whole.base) == count(whole.copy) == 26_111_668
    assert count(levels.zero) == 48 * 49 + 96 * 97 + 192 * 193 + 384 * 385 and count(levels) == 44_458_176
    assert not any(p.requires_grad for m in (whole, levels) for p in m.base.parameters())


@both_ways
@pytest.mark.parametrize("name", ["restormer", "restormer_study"])
def test_at_first_it_is_its_base_bit_for_bit(tmp_path, levels, name):
    base, model = on_base(tmp_path, levels, name)
    for x in (torch.rand(1, 3, 300, 400), torch.rand(2, 3, 61, 67)):
        with torch.no_grad():
            assert torch.equal(bits(model(x)), bits(base(x)))
    # with a graph, Restormer adds up some sums in another order than without
    torch.testing.assert_close(model.train()(x), base(x), atol=1e-6, rtol=1e-6)
    own = base.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in model.copy.state_dict().items()), "the copy starts from the base"


@both_ways
def test_at_first_it_is_its_base_in_half_precision_too(tmp_path, levels):
    base, model = on_base(tmp_path, levels)
    x = torch.rand(1, 3, 24, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), base(x))


@both_ways
def test_nothing_moves_the_base(tmp_path, levels):
    """Neither weight decay nor averaging, in training mode and after many steps; no gradient reaches it."""
    base, model = on_base(tmp_path, levels)
    ema, x = AveragedModel(model), torch.rand(2, 3, 24, 32)
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(4):
        step(model, x, optimiser)
        ema.update_parameters(model)
    assert not model.base.training and model.copy.training
    assert all(p.grad is None for p in model.base.parameters())
    for k, v in base.state_dict().items():
        assert torch.equal(model.base.state_dict()[k], v) and torch.equal(ema.module.base.state_dict()[k], v), k


@both_ways
def test_first_the_zero_convolutions_move_then_the_copy(tmp_path, levels):
    _, model = on_base(tmp_path, levels)
    optimiser, x = torch.optim.AdamW(model.train().parameters(), lr=1e-3, weight_decay=0), torch.rand(2, 3, 24, 32)
    before = deepcopy(model.state_dict())
    moved = lambda: {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    step(model, x, optimiser)
    assert moved() == {k for k in before if k.startswith("zero.")}, "every zero convolution, and nothing else"
    step(model, x, optimiser)
    assert {k for k in before if k.startswith("copy.")} <= moved()


@both_ways
def test_saved_once_and_loaded_without_another_file(tmp_path, levels):
    base, model = on_base(tmp_path, levels)
    step(model, torch.rand(1, 3, 24, 32), torch.optim.AdamW(model.parameters(), lr=1e-2))
    path = save_model(model.eval(), tmp_path / "control.safetensors")
    (tmp_path / "base.safetensors").unlink()
    with safe_open(path, "pt") as f:
        names = set(f.keys())
    assert {k for k in names if k.startswith("base.")} == {"base." + k for k in base.state_dict()}
    assert {k.split(".")[0] for k in names} == {"base", "copy", "zero"}
    numbers = sum(4 * v.numel() for v in model.state_dict().values())
    assert numbers < path.stat().st_size < numbers + 150 * len(names) + 4000, "nothing is stored twice"
    again, x = load_model(path), torch.rand(1, 3, 61, 67)
    with torch.no_grad():
        assert torch.equal(model(x), again(x)) and not again.training
    assert again.metadata["base"]["source"] == "base.safetensors" and not any(p.requires_grad for p in again.base.parameters())


@both_ways
def test_checkpointing_changes_no_gradient(tmp_path, levels):
    x, gradients = torch.rand(1, 3, 24, 32), []
    for checkpointing in (False, True):
        model = small("controlnet_restormer", levels=levels, checkpointing=checkpointing).train()
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


@both_ways
def test_the_base_keeps_nothing_for_the_backward_pass(levels):
    """What autograd keeps is one Restormer's, not two."""
    one = memory_per_pixel("restormer", 64, **SMALL["restormer"], norm_bias=False)
    assert memory_per_pixel("controlnet_restormer", 64, **SMALL["controlnet_restormer"], levels=levels) < 1.15 * one


@both_ways
def test_the_base_has_its_share_in_the_gradient_of_the_photo(tmp_path, levels):
    """As it starts, the model is its base, so their gradients are the same; the base's parameters get none."""
    base, model = on_base(tmp_path, levels)
    photos = [torch.rand(1, 3, 29, 35).requires_grad_()]
    photos.append(photos[0].detach().clone().requires_grad_())
    for m, x in zip((base, model), photos):
        m(x).square().sum().backward()
    torch.testing.assert_close(photos[1].grad, photos[0].grad, atol=1e-5, rtol=1e-4)
    assert (photos[0].grad - 2 * base(photos[0]).detach()).abs().max() > 0.01, "more than that of the photo alone, which is added at the end"
    assert all(p.grad is None for p in model.base.parameters()) and all(z.weight.grad is not None for z in model.zero)
    with torch.no_grad():
        assert not model(photos[1]).requires_grad


def test_another_models_weights_are_refused_and_change_nothing():
    model = small("controlnet_restormer")
    before = deepcopy(model.state_dict())
    with pytest.raises(AutohdrError, match="are not those of the base restormer"):
        model.set_base(create_model("restormer_study", **SMALL["restormer_study"]).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_base_that_is_no_restormer_is_refused(tmp_path):
    checkpoint = save_model(small("hdrnet"), tmp_path / "hdrnet.safetensors")
    with pytest.raises(AutohdrError, match="restormer"):
        create_on_base("controlnet_restormer", checkpoint)
