"""The refiner on its frozen backbone: nothing but the backbone at the start, curves that climb whatever the weights, a backbone that never moves."""
import pytest
import torch
from safetensors import safe_open

from autohdr.core import AutohdrError
from autohdr.models.refiner import ColorRefiner, ToneCurves, bend
from autohdr.models.zoo import create_model, load_model, memory_per_pixel, save_model
from tests.zoo import SMALL, small

BACKBONES = ["hdrnet", "restormer_study"]
every_backbone = pytest.mark.parametrize("base", BACKBONES)


def refiner(base="hdrnet"):
    """Untrained, on a backbone that is neither the identity nor within [0,1]."""
    model = create_model("color_refiner", base=base, base_config=SMALL[base], width=8, depth=1)
    model.set_base(small(base).state_dict())
    return model


def test_trainable_parameters_are_the_study_s():
    with torch.device("meta"):
        model = ColorRefiner()
    assert abs(sum(p.numel() for p in model.parameters() if p.requires_grad) - 1_200_000) <= 50_000
    assert sum(p.numel() for p in model.base.parameters()) == 25_437_220


@every_backbone
@pytest.mark.parametrize("size", [(40, 56), (61, 67), (1, 1), (3, 200)], ids=str)
def test_untrained_it_is_its_backbone_bit_for_bit(base, size):
    model = refiner(base)
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        edit = model.base(x)
        assert torch.equal(model(x), edit) and not torch.equal(edit, x)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert torch.equal(model(x), model.base(x).float())
    assert torch.equal(model(x).detach(), edit)  # with gradients too
    overshoot = torch.rand(2, 3, *size) * torch.tensor([0.2, 1, 1.5]).view(3, 1, 1) - torch.tensor([0.3, 0, -0.5]).view(3, 1, 1)
    assert overshoot.min() < 0
    assert torch.equal(model.refine(x, overshoot).detach(), overshoot)
    model, x = model.bfloat16(), x.bfloat16()
    with torch.no_grad():
        assert torch.equal(model(x), model.base(x))


@pytest.mark.parametrize("spread", [0.1, 1, 30])
@pytest.mark.parametrize("knots", [2, 7, 32])
def test_curves_climb_from_0_to_1_whatever_the_weights(spread, knots):
    torch.manual_seed(0)
    curves = ToneCurves(16, knots)
    torch.nn.init.normal_(curves.head.weight, std=spread)
    torch.nn.init.normal_(curves.head.bias, std=spread)
    x = torch.linspace(-0.5, 1.5, 2001).view(1, 1, 1, -1).repeat(8, 3, 1, 1)
    with torch.no_grad():
        y = x + bend(x, curves(torch.randn(8, 16)))
    assert (y - x).abs().max() > 0.02, "they do something"
    assert (y.diff() >= -3e-7).all()  # the last digit of float32
    inside = (x >= 0) & (x <= 1)
    assert torch.equal(y[~inside], x[~inside]) and y[inside].min() >= -3e-7 and y[inside].max() <= 1 + 3e-7
    ends = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(8, 3, 1, 2)
    assert not bend(ends, curves(torch.randn(8, 16))).any()


def test_curves_have_right_derivatives():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    above = torch.rand(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bend, (x, above))


def test_each_channel_has_its_curve():
    above = torch.zeros(2, 3, 3)
    above[1, 2, 1] = 0.25
    added = bend(torch.full((2, 3, 1, 1), 0.5), above)
    assert added[1, 2] == 0.25 and added.count_nonzero() == 1


def test_backbone_never_moves():
    model = refiner().train()
    before = {k: v.clone() for k, v in model.base.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.rand(2, 3, 24, 24)).square().mean().backward()
        optimiser.step()
    assert not any(m.training for m in model.base.modules()) and model.hsv.training and not model.eval().hsv.training
    assert all(p.grad is None for p in model.base.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.base.state_dict().items())
    with torch.no_grad():
        x = torch.rand(1, 3, 24, 24)
        assert not torch.equal(model(x), model.base(x)), "but the refiner has"


def test_backbone_keeps_nothing_for_the_backward_pass():
    small_base, large_base = (memory_per_pixel("color_refiner", 64, base=b) for b in BACKBONES)
    assert small_base == large_base < memory_per_pixel("restormer_study", 64) / 10


@pytest.mark.parametrize("photo", ["black", "grey", "white", "red", "noise", "overshoot"])
def test_gradients_are_finite_for_every_photo(photo):
    torch.manual_seed(0)
    model = small("color_refiner")
    colour = dict(black=[0, 0, 0], grey=[0.5, 0.5, 0.5], white=[1, 1, 1], red=[1, 0, 0]).get(photo)
    x = torch.rand(1, 3, 16, 16) if colour is None else torch.tensor(colour).float().view(1, 3, 1, 1).expand(1, 3, 16, 16)
    edit = 3 * x - 1 if photo == "overshoot" else x
    out = model.refine(x, edit)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_checkpoint_holds_the_backbone_once(tmp_path):
    model = refiner("restormer_study")
    file = save_model(model, tmp_path / "refined.safetensors")
    with safe_open(file, "pt") as f:
        names = set(f.keys())
    of_base = {"base." + k for k in model.base.state_dict()}
    assert of_base < names and names == set(model.state_dict())
    assert file.stat().st_size < 4 * sum(p.numel() for p in model.parameters()) + 200_000
    again, x = load_model(file), torch.rand(1, 3, 24, 40)
    assert not any(p.requires_grad for p in again.base.parameters())
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and torch.equal(again(x), small("restormer_study")(x))


def test_set_base_is_strict():
    model, state = refiner(), small("hdrnet").state_dict()
    wrong = dict(list(state.items())[1:]), {**state, "more": torch.zeros(1)}, {k: v[..., :1] if v.ndim else v for k, v in state.items()}
    before = {k: v.clone() for k, v in model.base.state_dict().items()}
    for bad in wrong:
        with pytest.raises(AutohdrError, match="hdrnet.*tensors differ"):
            model.set_base({k: v + 1 for k, v in bad.items()})
        assert all(torch.equal(v, before[k]) for k, v in model.base.state_dict().items()), "refused, yet changed"


def test_a_misspelt_backbone_or_setting_is_an_error():
    with pytest.raises(AutohdrError, match="hdrnet"):
        create_model("color_refiner", base="hdrnte")
    with pytest.raises(AutohdrError, match="width"):
        create_model("color_refiner", base="hdrnet", base_config=dict(widht=8))
    with pytest.raises(AutohdrError, match="multiple of 8"):
        create_model("color_refiner", base="hdrnet", width=12)
