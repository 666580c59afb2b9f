"""NAFNet against the published one, against the plain way to write it, and with attention over local statistics."""
import pytest
import torch

from autohdr.core import AutohdrError
from autohdr.inference.predict import predict
from autohdr.models.nafnet import NAFNet, infer_config, local_mean
from autohdr.models.zoo import ARCHITECTURES, create_model, load_model, memory_per_pixel, save_model
from tests.plain.nafnet import NAFNet as Plain
from tests.zoo import difference_to_published, kept_per_pixel, published_shapes, small

SIZES = [
    dict(width=8, encoder=(1, 1, 1, 2), middle=2, decoder=(1, 1, 1, 1)),
    dict(width=8, encoder=(1, 2), middle=1, decoder=(2, 1), expansion=4, attention_last=True),
]
both_blocks = pytest.mark.parametrize("config", SIZES, ids=["published", "study"])


def shapes(model):
    return {k: list(v.shape) for k, v in model.state_dict().items()}


def ours_and_plain(config):
    torch.manual_seed(0)
    ours, plain = NAFNet(**config), Plain(**config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_names_and_shapes_are_the_published_ones():
    assert shapes(create_model("nafnet")) == published_shapes("nafnet_32_sidd")


def test_output_is_the_published_one():
    assert difference_to_published(create_model("nafnet"), "nafnet_32_sidd") < 1e-4
    assert difference_to_published(Plain(), "nafnet_32_sidd") < 1e-4, "the oracle is right"


@pytest.mark.parametrize("name, count", [("nafnet", 29_159_715), ("nafnet_64", 115_982_915), ("nafnet_study", 178_128_963)])
def test_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == count


@both_blocks
def test_output_and_gradients_are_those_of_the_plain_version(config):
    ours, plain = ours_and_plain(config)
    x = torch.rand(2, 3, 32, 48)
    a, b = ours(x), plain(x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for y in (a, b):
        y.square().mean().backward()
    of_plain = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - of_plain[name].grad).abs().max() <= 1e-4 * of_plain[name].grad.abs().max(), name


@both_blocks
def test_no_more_memory_than_the_plain_version(config):
    with torch.device("meta"):
        plain = Plain(**config)
    assert memory_per_pixel("nafnet", 64, **config) < kept_per_pixel(plain, 64)


@pytest.mark.parametrize("config, said", [
    (dict(width=9, expansion=3), "width 9 times expansion 3"),
    (dict(encoder=(1, 1), decoder=(1,)), r"encoder \(1, 1\) and decoder \(1,\)"),
    (dict(encoder=(1,), decoder=(1, 1)), "1 and 2 levels; expected as many"),
], ids=str)
def test_what_cannot_work_is_refused_when_it_is_made(config, said):
    for make in (NAFNet, lambda **config: create_model("nafnet", **config)):
        with pytest.raises(AutohdrError, match=said):
            make(**config)


def test_odd_widths_work_where_the_gates_get_an_even_number():
    model, x = NAFNet(width=5, encoder=(1,), middle=1, decoder=(1,)), torch.rand(1, 3, 7, 9)
    assert model(x).shape == x.shape


def test_photos_no_larger_than_the_window_are_seen_whole():
    model, x = ours_and_plain(SIZES[0])[0].eval(), torch.rand(1, 3, 61, 67)
    with torch.no_grad():
        whole = model(x)
        for model.tlc in (67, 80, 1000):
            assert torch.equal(model(x), whole), model.tlc
        model.tlc = 32
        assert (model(x) - whole).abs().max() > 1e-3
        assert torch.equal(model.train()(x), whole), "local statistics are for inference"


def test_local_statistics_see_no_further_than_the_window():
    """A change far away reaches a pixel through the global mean and not through a local one: two windows and the convolutions reach 70 pixels here."""
    model = small("nafnet", encoder=(1,), middle=0, decoder=(1,))
    x = torch.rand(1, 3, 64, 320)
    other = x.clone()
    other[..., 160:] = 0
    with torch.no_grad():
        assert not torch.equal(model(x)[..., :64], model(other)[..., :64])
        model.tlc = 64
        assert torch.equal(model(x)[..., :64], model(other)[..., :64])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_local_statistics_in_half_precision(dtype):
    model, x = small("nafnet", tlc=32), torch.rand(1, 3, 80, 112)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", dtype):
            mixed = model(x).float()
        pure = model.to(dtype)(x.to(dtype))
    assert pure.dtype == dtype and (mixed - full).abs().mean() < 0.02 and (pure.float() - full).abs().mean() < 0.03


def test_local_mean_keeps_its_precision_on_large_maps():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 40, 20000, generator=rng)
    x[..., :10000] += 1000
    exact = torch.nn.functional.avg_pool2d(x.double(), (40, 64), stride=1)
    ours = local_mean(x, 64)[:, :, :1, 31:31 + exact.shape[-1]]
    assert ((ours - exact).abs() / exact).max() < 1e-6


def test_the_window_can_be_set_on_a_loaded_model(tmp_path):
    model = load_model(save_model(small("nafnet"), tmp_path / "m.safetensors"))
    pixels = torch.rand(64, 200, 3).numpy()
    whole = predict(model, pixels, "whole")
    model.tlc = 48
    assert abs(predict(model, pixels, "whole") - whole).max() > 1e-5
    again = load_model(save_model(small("nafnet", tlc=48), tmp_path / "local.safetensors"))
    assert again.tlc == 48


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.module == "nafnet"])
def test_configuration_from_the_tensors(name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    assert infer_config(state) == {k: v for k, v in ARCHITECTURES[name].config.items()}
    for config in SIZES:
        assert NAFNet(**infer_config(NAFNet(**config).state_dict())).state_dict().keys() == NAFNet(**config).state_dict().keys()


def test_other_tensors_are_another_architecture():
    others = [create_model(n).state_dict() for n, a in ARCHITECTURES.items() if a.module in ("restormer", "hdrnet")]
    published = [{k: torch.empty(v, device="meta") for k, v in published_shapes(n).items()} for n in ("darkir_m", "retinexformer", "restormer")]
    odd = [{}, {"intro.weight": torch.zeros(3)}, {"intro.weight": 5}, {3: None}, {"encoders.x.y.conv1.weight": torch.zeros(2)}, {"middle_blks.0.sca.1.weight": None}]
    for state in others + published + odd:
        assert infer_config(state) is None
