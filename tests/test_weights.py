"""Foreign weights: recognised, matched, refused where they are dangerous or broken; published ones fetched once and verified."""
import argparse
import hashlib
import http.server
import importlib
import os
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autohdr import core
from autohdr.core import AutohdrError
from autohdr.models import weights
from autohdr.models.weights import (PUBLISHED, Published, cached_file, create_on_base, fetch_published, identify, list_published, load_foreign,
                                    load_weights, match_lines, match_table, read_weights, resolve_weights)
from autohdr.models.zoo import ARCHITECTURES, create_model, load_model, save_model
from autohdr.training.recipe import Recipe
from tests.zoo import SMALL, small

FOREIGN = sorted(name for name, e in ARCHITECTURES.items() if hasattr(importlib.import_module(f"autohdr.models.{e.module}"), "infer_config"))


def shapes(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_every_published_architecture_can_be_recognised():
    assert {"restormer", "restormer_study", "nafnet", "nafnet_64", "nafnet_study", "darkir", "darkir_l", "retinexformer"} <= set(FOREIGN)


@pytest.mark.parametrize("name", FOREIGN)
def test_full_size_is_recognised_by_its_tensors(name):
    with torch.device("meta"):
        assert identify(create_model(name).state_dict()) == (name, {})


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_gives_the_same_model(name, tmp_path):
    """Half of it wrapped as BasicSR does, in half precision; the other half bare in a .safetensors."""
    model = small(name)
    torch.save({"params": {"module." + k: v for k, v in model.state_dict().items()}, "iter": 5}, tmp_path / "a.pth")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "b.safetensors")
    x = torch.rand(1, 3, 24, 40)
    for file in ("a.pth", "b.safetensors"):
        again, table = load_foreign(tmp_path / file)
        assert shapes(again) == shapes(model) and table.attrs["share"] == 1 and set(table.status) == {"matched"} and not again.training
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x))
        assert again.metadata["weights"] == dict(source=file, sha256=hashlib.sha256((tmp_path / file).read_bytes()).hexdigest(), matched=1.0)
    kept = load_model(save_model(again, tmp_path / "ours.safetensors"))
    assert shapes(kept) == shapes(model) and kept.metadata["weights"]["source"] == "b.safetensors"


NESTS = {
    "bare": lambda s: s,
    "params": lambda s: {"params": s},
    "ema wins": lambda s: {"params": {k: v + 1 for k, v in s.items()}, "params_ema": s},
    "state_dict of params": lambda s: {"state_dict": {"params": s}, "epoch": 3},
    "module twice": lambda s: {"module.module." + k: v for k, v in s.items()},
    "compiled, on several GPUs": lambda s: {"model": {"module._orig_mod." + k: v for k, v in s.items()}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "averaged": lambda s: {"n_averaged": torch.tensor(4), **{"module." + k: v for k, v in s.items()}},
    "parameters, not tensors": lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    "a score and a command line beside": lambda s: {"params": s, "psnr": np.float64(31.2), "best": np.float32(1), "step": np.int64(7), "opt": argparse.Namespace(lr=1e-4)},
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=list(NESTS))
def test_however_it_is_nested(nest, tmp_path):
    state = {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(2), "b.module.weight": torch.rand(1)}
    torch.save(nest(state), tmp_path / "x.pth")
    read = read_weights(tmp_path / "x.pth")
    assert list(read) == list(state) and all(torch.equal(read[k], state[k]) and not read[k].requires_grad for k in state)


def test_the_training_state_of_a_run_is_read_too(tmp_path):
    model = small("hdrnet")
    torch.save({"model": model.state_dict(), "ema": {"n_averaged": torch.tensor(1)}, "optimiser": {"state": {}}}, tmp_path / "resume.pt")
    assert list(read_weights(tmp_path / "resume.pt")) == list(model.state_dict())


def test_numpy_numbers_under_their_old_name(tmp_path):
    """Files written with NumPy 1 name the module differently."""
    torch.save({"params": {"a": torch.ones(2)}, "psnr": np.float64(31.2)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for item in new.namelist():
            data = new.read(item)
            old.writestr(item, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if item.endswith("data.pkl") else data)
    assert b"numpy.core.multiarray" in (tmp_path / "old.pth").read_bytes()
    assert list(read_weights(tmp_path / "old.pth")) == ["a"]


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, exec, eval, print, importlib.import_module], ids=lambda f: f.__name__)
def test_code_is_refused_by_name_and_never_run(function, tmp_path):
    marker = tmp_path / "ran"
    argument = {"mkdir": str(marker), "import_module": "this"}.get(function.__name__, f"__import__('pathlib').Path({str(marker)!r}).touch()")
    for data in ({"params": {"a": torch.ones(1)}, "x": Evil(function, argument)}, Evil(function, argument)):
        for new in (True, False):
            torch.save(data, tmp_path / "evil.pth", _use_new_zipfile_serialization=new)
            with pytest.raises(AutohdrError, match=rf"evil.pth: refused.*{function.__name__}.*state_dict"):
                read_weights(tmp_path / "evil.pth")
    assert not marker.exists()


def broken_files(folder):
    endless = {}
    endless["params"] = endless
    torch.save({"params": small("hdrnet").state_dict()}, folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "nothing.pth").write_bytes(b"")
    (folder / "page.pth").write_bytes(b"<!doctype html><title>Sign in</title>" * 30)
    (folder / "page.safetensors").write_bytes(b"<!doctype html><title>Sign in</title>" * 30)
    (folder / "header.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    (folder / "shape.safetensors").write_bytes((n := b'{"a":{"dtype":"F32","shape":[1000000000,1000],"data_offsets":[0,4]}}') and len(n).to_bytes(8, "little") + n + bytes(4))
    with zipfile.ZipFile(folder / "photos.pth", "w") as z:
        z.writestr("holiday/1.jpg", b"x" * 1000)
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data/0", bytes(50_000_000))
    for name, data in dict(empty={}, numbers={"params": {"a": 1.5, "b": [1, 2]}}, listed=[torch.ones(2)], numbered={0: torch.ones(2)},
                           claim={"params": {"a": torch.zeros(1).expand(10**9, 64)}}, sparse={"a": torch.eye(3).to_sparse()},
                           void={"a": torch.zeros(0, 30000, 1, 1)}, elsewhere={"a": torch.ones(2, device="meta")}, endless=endless).items():
        torch.save(data, folder / f"{name}.pth")
    return sorted(p for p in folder.iterdir() if p.name != "whole.pth")


def test_broken_files_are_refused_in_one_line(tmp_path):
    files = broken_files(tmp_path)
    assert len(files) == 17
    for file in files:
        with pytest.raises(AutohdrError) as e:
            read_weights(file)
        assert str(e.value).startswith(str(file)) and "\n" not in str(e.value), file
        assert "weights_only" not in str(e.value), "PyTorch's advice to read it unsafely must not be passed on"


def test_names_that_ask_for_a_giant_are_not_recognised():
    state = small("restormer").state_dict() | {"latent.999999999.norm1.body.weight": torch.zeros(64)}
    with pytest.raises(AutohdrError, match="no architecture"):
        identify(state)


@pytest.mark.parametrize("state", [{}, {"a": torch.ones(1)}, {"patch_embed.proj.weight": torch.ones(1)}, {"intro.weight": torch.ones(()), "encoders.x": torch.ones(1)}], ids=str)
def test_what_is_no_architecture_is_said_to_be_none(state):
    with pytest.raises(AutohdrError, match=f"these {len(state)} tensors"):
        identify(state)


def test_a_giant_of_little_tensors_is_found_out_before_memory_is_taken(tmp_path, monkeypatch):
    """The few tensors that the configuration is read off ask for 30000 channels; nothing else is there."""
    state = {k: v[:1].expand(1, *v.shape[1:]).clone() for k, v in small("restormer", dim=8).state_dict().items()}
    levels = enumerate(("encoder_level1", "encoder_level2", "encoder_level3", "latent"))
    state |= {f"{level}.0.attn.qkv.weight": torch.zeros(1, 30000 * 2**i, 1, 1) for i, level in levels}
    torch.save(state | {"patch_embed.proj.weight": torch.zeros(30000, 3, 1, 1)}, tmp_path / "giant.pth")
    made = []
    monkeypatch.setattr(weights, "create_model", lambda name, **c: made.append(torch.get_default_device().type) or create_model(name, **c))
    for load in (load_foreign, lambda file: create_on_base("color_refiner", file)):
        with pytest.raises(AutohdrError, match="giant.pth"):
            load(tmp_path / "giant.pth")
    assert made == ["meta", "meta"], "recognised, and made without memory alone"


SETTINGS = [
    ("restormer", {}, "restormer", dict(norm_bias=False), "norm_bias"),
    ("restormer", dict(norm_bias=False), "restormer", {}, "norm_bias"),
    ("restormer", dict(norm_bias=False), "restormer_study", {}, "norm_bias"),
    ("restormer", dict(heads=(2, 2, 4, 8)), "restormer", {}, "heads"),
    ("nafnet", dict(expansion=4), "nafnet", dict(expansion=4, attention_last=True), "attention_last"),
    ("darkir", dict(dilations=(1, 2, 3)), "darkir", {}, "dilations"),
    ("controlnet_restormer", dict(base_config=dict(norm_bias=True, **SMALL["restormer"])), "controlnet_restormer", {}, "norm_bias"),
]


@pytest.mark.parametrize("name, there, target, here, setting", SETTINGS, ids=[f"{s[0]}-{s[2]}-{s[4]}-{i}" for i, s in enumerate(SETTINGS)])
def test_weights_that_would_mean_something_else_are_refused(name, there, target, here, setting, tmp_path):
    """Nearly every shape fits; the file's own words are heeded, and where it has none, its tensors."""
    source, model = small(name, **there), small(target, **here)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    files = [save_model(source, tmp_path / "ours.safetensors")]
    if setting != "dilations" and name in FOREIGN:  # no tensor shows the dilations
        torch.save({"params": source.state_dict()}, tmp_path / "foreign.pth")
        files.append(tmp_path / "foreign.pth")
    for file in files:
        with pytest.raises(AutohdrError, match=rf"{file.name}: made for {setting} = .*, and {target} has {setting} = "):
            load_weights(model, file)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert load_weights(small(name, **there), file).attrs["share"] == 1


def test_what_does_not_change_the_meaning_may_differ(tmp_path):
    for name, config in dict(restormer=dict(checkpointing=True), darkir=dict(side_weight=0), nafnet=dict(tlc=64), hdrnet=dict(small=64)).items():
        file = save_model(small(name), tmp_path / f"{name}.safetensors")
        assert load_weights(small(name, **config), file).attrs["share"] == 1
    assert 0.4 < load_weights(small("restormer_study"), tmp_path / "restormer.safetensors").attrs["share"] < 1


def test_a_named_model_takes_the_settings_that_our_file_states(tmp_path):
    source = small("darkir", dilations=(1, 2, 3))
    model, _ = load_foreign(save_model(source, tmp_path / "ours.safetensors"), "darkir")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


ODD_NUMBERS = {
    "eight bits": lambda v: v.to(torch.float8_e4m3fn),
    "complex": lambda v: v.to(torch.complex64),
    "integers": lambda v: v.to(torch.int32),
    "true or false": lambda v: v > 0,
    "quantised": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # of PyTorch, on quantised tensors
@pytest.mark.parametrize("change", ODD_NUMBERS.values(), ids=list(ODD_NUMBERS))
def test_only_plain_numbers_are_taken(change, tmp_path):
    model = small("restormer")
    torch.save({k: change(v) for k, v in model.state_dict().items()}, tmp_path / "odd.pth")
    for load in (lambda file: load_weights(model, file), load_foreign, lambda file: create_on_base("color_refiner", file)):
        with pytest.raises(AutohdrError, match="odd.pth"):
            load(tmp_path / "odd.pth")


def test_numbers_too_large_for_the_models_type_are_refused(tmp_path):
    model = small("hdrnet")
    torch.save({k: v * 0 + 1e6 for k, v in model.state_dict().items()}, tmp_path / "large.pth")
    load_weights(small("hdrnet"), tmp_path / "large.pth")
    with pytest.raises(AutohdrError, match="infinities or NaN in torch.float16"):
        load_weights(model.half(), tmp_path / "large.pth")


@pytest.mark.parametrize("about", ["{", "[]", "7", "{}", '{"architecture": "hdrnet"}', '{"architecture": 7, "config": {}}', '{"architecture": "hdrnet", "config": 7}'])
def test_metadata_that_makes_no_sense(about, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "odd.safetensors", {"autohdr": about})
    for load in (load_model, load_foreign):
        with pytest.raises(AutohdrError, match="odd.safetensors"):
            load(tmp_path / "odd.safetensors")


def test_infinities_are_refused(tmp_path):
    model = small("hdrnet")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save({k: v / 0 for k, v in before.items()}, tmp_path / "x.pth")
    with pytest.raises(AutohdrError, match="infinities or NaN"):
        load_weights(model, tmp_path / "x.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_studys_model_against_the_published_file():
    """It says exactly which tensors differ: 413 of 495 match (the study: 82%), which is 99% of the parameters."""
    with torch.device("meta"):
        own, published = (create_model(n).state_dict() for n in ("restormer_study", "restormer"))
    table = match_table(own, published)
    assert dict(table.status.value_counts()) == {"matched": 413, "wrong shape": 81, "missing": 1}
    assert 0.98 < table.attrs["share"] < 0.995
    row = table.set_index("name").loc["output.weight"]
    assert (row["status"], row["shape"], row["given"]) == ("wrong shape", "3 x 48 x 3 x 3", "3 x 96 x 3 x 3")
    lines = match_lines(table, most=100)
    assert "missing: reduce_chan_level1.weight" in lines and "refinement.*.attn.qkv.weight (4 of them): 144 x 48 x 1 x 1 in the model, 288 x 96 x 1 x 1 in the file" in lines


def test_half_precision_takes_the_models_type(tmp_path):
    model = small("restormer")
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "half.pth")
    again, _ = load_foreign(tmp_path / "half.pth")
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_a_part_is_taken_only_when_the_model_is_named(tmp_path):
    model = small("restormer")
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith("decoder_level2")}, tmp_path / "part.pth")
    with pytest.raises(AutohdrError, match="missing: decoder_level2"):
        load_foreign(tmp_path / "part.pth")
    again, table = load_foreign(tmp_path / "part.pth", "restormer", **SMALL["restormer"])
    assert again.metadata["weights"]["matched"] == table.attrs["share"] < 1
    torch.save({"output.weight": model.state_dict()["output.weight"]}, tmp_path / "little.pth")
    with pytest.raises(AutohdrError, match="Too little"):
        load_foreign(tmp_path / "little.pth", "restormer", **SMALL["restormer"])


def test_named_models_keep_what_their_name_says(tmp_path):
    torch.save(small("restormer").state_dict(), tmp_path / "x.pth")
    again, table = load_foreign(tmp_path / "x.pth", "restormer_study")
    assert again.name == "restormer_study" and again.output.in_channels == 8 and "wrong shape" in set(table.status)


def test_a_base_of_any_origin(tmp_path):
    """The frozen base takes the sizes of the file that it comes from."""
    base = small("restormer", norm_bias=False)
    torch.save({"params": base.state_dict()}, tmp_path / "published.pth")
    for source in (tmp_path / "published.pth", save_model(base, tmp_path / "ours.safetensors")):
        model = create_on_base("controlnet_restormer", source)
        assert shapes(model.base) == shapes(base) and torch.equal(model.base.output.weight, base.output.weight)
        assert model.metadata["base"]["source"] == source.name
    with pytest.raises(AutohdrError, match="stands on no other model"):
        create_on_base("hdrnet", tmp_path / "published.pth")


def test_a_base_that_does_not_fit_is_named_with_its_file(tmp_path):
    base = small("restormer")
    torch.save({k: v * float("nan") for k, v in base.state_dict().items()}, tmp_path / "nan.pth")
    torch.save({k: v for k, v in base.state_dict().items() if not k.startswith("output")}, tmp_path / "part.pth")
    save_model(small("hdrnet"), tmp_path / "other.safetensors")
    for file, said in (("nan.pth", "NaN"), ("part.pth", "missing: output.weight"), ("other.safetensors", "hdrnet")):
        with pytest.raises(AutohdrError, match=rf"(?s){file}: .*{said}"):
            create_on_base("controlnet_restormer", tmp_path / file)


# Published checkpoints, with a server of our own


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves what its server holds; a name that begins with cut- ends half-way."""

    def do_GET(self):
        data = self.server.files.get(self.path.strip("/"))
        self.server.asked.append(self.path)
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if data:
            self.wfile.write(data[: len(data) // 2] if "cut-" in self.path else data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOHDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.url = {}, [], f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def publish(server, tmp_path, monkeypatch):
    """Publish a small Restormer under a name; the entry can be changed."""
    torch.save({"params": small("restormer").state_dict()}, tmp_path / "served.pth")
    data = (tmp_path / "served.pth").read_bytes()

    def publish(name, **change):
        server.files[name + ".pth"] = data
        entry = dict(model="restormer", task="a test", url=server.url + name + ".pth", size=len(data), sha256=hashlib.sha256(data).hexdigest(), licence="CC0")
        monkeypatch.setitem(PUBLISHED, name, Published(**{**entry, **change}))
        return name

    return publish


def test_fetched_once_verified_and_used(publish, server, capsys, monkeypatch):
    source = "published:" + publish("look")
    model, table = load_foreign(source)
    said = capsys.readouterr().out
    assert all(word in said for word in (PUBLISHED["look"].url, PUBLISHED["look"].sha256, "CC0", " MB")), "what comes from where, before it comes"
    assert table.attrs["share"] == 1 and shapes(model) == shapes(small("restormer"))
    assert model.metadata["weights"]["source"] == source and model.metadata["weights"]["licence"] == "CC0"
    monkeypatch.setattr(weights, "_download", None)
    assert resolve_weights(source) == cached_file("look") and server.asked == ["/look.pth"], "the second time from the cache, without a network"
    assert list_published().loc["look", "cached"] and not capsys.readouterr().out


def test_other_bytes_are_refused_and_nothing_stays(publish, server, tmp_path):
    for name, change, said in (("swapped", dict(sha256="0" * 64), "not what was published"), ("cut-short", {}, "can't be fetched"), ("gone", {}, "404")):
        publish(name, **change)
        if name == "gone":
            server.files.clear()
        with pytest.raises(AutohdrError, match=said):
            fetch_published(name)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_wrong_size_without_a_digest_is_refused_and_nothing_stays(publish, tmp_path):
    with pytest.raises(AutohdrError, match="bytes"):
        fetch_published(publish("short", sha256="", size=17))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_an_unknown_digest_is_recorded_and_then_kept_to(publish, capsys):
    file = fetch_published(publish("new", sha256="", size=0))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest in capsys.readouterr().out and file.with_name(file.name + ".sha256").read_text().strip() == digest
    file.write_bytes(b"changed")
    with pytest.raises(AutohdrError, match=r"SHA-256.*new\.pth\.sha256"):
        fetch_published("new")
    file.unlink()
    assert fetch_published("new") == file, "fetched again, and the same"


def test_a_web_page_saved_instead_is_not_recorded(publish, tmp_path):
    file = cached_file(publish("page", sha256="", size=0, by_hand=True))
    file.parent.mkdir(parents=True)
    file.write_text("<!doctype html><title>Sign in</title>")
    with pytest.raises(AutohdrError, match="So it is not page: delete it"):
        fetch_published("page")
    file.write_bytes((tmp_path / "served.pth").read_bytes())
    assert fetch_published("page") == file


def test_a_cache_folder_that_can_not_be_written(publish, server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("AUTOHDR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AutohdrError, match=r"cache folder can't be written.*AUTOHDR_CACHE"):
        fetch_published(publish("look"))


def test_a_damaged_file_in_the_cache_is_never_used(publish):
    file = fetch_published(publish("look"))
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(AutohdrError, match="delete the file"):
        resolve_weights("published:look")


def test_offline_says_where_a_file_may_be_put(publish, server, tmp_path):
    """And a file that was put there by hand is verified and used."""
    publish("offline", url="http://127.0.0.1:9/offline.pth")
    with pytest.raises(AutohdrError) as e:
        fetch_published("offline")
    assert "http://127.0.0.1:9/offline.pth" in str(e.value) and str(cached_file("offline")) in str(e.value) and "\n" not in str(e.value)
    cached_file("offline").parent.mkdir(parents=True, exist_ok=True)
    cached_file("offline").write_bytes((tmp_path / "served.pth").read_bytes())
    assert fetch_published("offline") == cached_file("offline")


def test_what_only_browsers_get_is_explained(publish):
    publish("drive", url="https://drive.google.com/file/d/1/view", by_hand=True)
    with pytest.raises(AutohdrError, match=r"(?s)drive.google.com.*cache.drive\.pth"):
        fetch_published("drive")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOHDR_CACHE", str(tmp_path / "own"))
    assert core.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("AUTOHDR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert core.cache_folder() == tmp_path / "autohdr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert core.cache_folder() == tmp_path / ".cache/autohdr"


def test_a_recipe_names_a_published_checkpoint():
    from autohdr.runs.spec import make_spec

    given = "published:restormer_deraining"
    spec = make_spec("hdrnet_512", [f"init={given}"])
    assert spec.parameters["init"] == given == Recipe(init=given).init
    for field in ("init", "base"):
        with pytest.raises(AutohdrError, match="Did you mean 'restormer_deraining'"):
            Recipe(model="controlnet_restormer", **{field: "published:restormer_deranin"})
