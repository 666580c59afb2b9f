"""Transfer: what is frozen keeps its bits, rates keep their ratio, a wrong pattern is found before anything runs, and the report tells what a checkpoint gave."""
import json

import pytest
import torch

from autohdr.core import AutohdrError, file_hash
from autohdr.data.pairs import save_pairs
from autohdr.models.zoo import create_model, load_model, save_model
from autohdr.runs.execute import run
from autohdr.runs.spec import make_spec
from autohdr.training import loop
from autohdr.training.loop import load_pairs, select, train
from autohdr.training.recipe import Recipe
from autohdr.training.state import new_state
from autohdr.training.transfer import freeze, start_tables
from tests.test_training import make_pairs

TINY = dict(size=64, crop=48, model_config={"width": 8}, warmup_epochs=1, lr=3e-3, threads=1, ema_decay=0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"), 8, seed=0)


@pytest.fixture(scope="module")
def start_file(tmp_path_factory):
    """Weights to start from; some are -0, whose mean with itself is 0: other bits."""
    torch.manual_seed(3)
    model = create_model("hdrnet", width=8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
        model.grid.down[0][0].weight.flatten()[:5] = -0.0
    return save_model(model, tmp_path_factory.mktemp("start") / "start.safetensors")


def bits(tensor):
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def halves(recipe, pairs, run_dir, monkeypatch):
    """Train, killed after the first epoch; then go on."""

    class Kill(Exception):
        pass

    def end_and_die(*args, real=loop.end_epoch):
        real(*args)
        raise Kill

    with monkeypatch.context() as m:
        m.setattr(loop, "end_epoch", end_and_die)
        with pytest.raises(Kill):
            train(recipe, pairs, run_dir)
    return train(recipe, pairs, run_dir)


def test_frozen_parameters_keep_their_bits_and_a_killed_run_ends_the_same(folder, start_file, tmp_path, monkeypatch):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=3, repeats=3, weight_decay=1.0, init=str(start_file), freeze=["grid.down.*", "log_gamma"], lr_factors={"grid.head.*": 0.5, "grid.*": 0.1})
    pairs, _ = load_pairs(recipe)
    train(recipe, pairs, tmp_path / "whole")
    start, state = load_model(start_file).state_dict(), torch.load(tmp_path / "whole/resume.pt", weights_only=True)
    ours = load_model(tmp_path / "whole/model.safetensors").state_dict()
    still = {k for k in start if k.startswith("grid.down.") or k == "log_gamma"}
    assert 5 < len(still) < len(start)
    for k in start:
        for now in (ours[k], state["model"][k], state["ema"][f"module.{k}"]):
            assert (bits(now) == bits(start[k])) == (k in still), k
    halves(recipe, pairs, tmp_path / "halves", monkeypatch)
    again = torch.load(tmp_path / "halves/resume.pt", weights_only=True)
    assert all(bits(state[part][k]) == bits(again[part][k]) for part in ("model", "ema") for k in state[part])


def test_rates_keep_their_ratio_and_scale_the_first_step(folder, start_file):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=4, init=str(start_file), lr_factors={"guide.*": 0.1})
    state = new_state(recipe, 8)
    before = {k: p.detach().clone() for k, p in state.model.named_parameters()}
    for step in range(8):
        full, slow = (g["lr"] for g in state.optimiser.param_groups)
        assert slow == pytest.approx(0.1 * full, rel=1e-9)
        for p in state.model.parameters():
            p.grad = torch.ones_like(p)
        state.optimiser.step()
        state.schedule.step()
        if step == 0:  # Adam's first step is the rate, whatever the gradient; weight decay comes on top, in proportion to the rate
            moved = {k: float((p.detach() - before[k] * (1 - recipe.weight_decay * (slow if k.startswith("guide") else full))).abs().mean()) for k, p in state.model.named_parameters()}
            assert all(m == pytest.approx(slow if k.startswith("guide") else full, rel=1e-2) for k, m in moved.items())


def test_statistics_of_a_frozen_norm_and_its_dropout_stay_put():
    """No network of the zoo has a batch norm; one of somebody else's may."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
    net = freeze(torch.nn.Sequential(body, torch.nn.Conv2d(4, 3, 1)), ["0.*"])
    kept = {k: v.clone() for k, v in net[0].state_dict().items()}
    net.train()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(net[0](x), net[0](x)) and net[1].training
    assert all(torch.equal(v, kept[k]) for k, v in net[0].state_dict().items())


@pytest.mark.parametrize("field, value, words", [
    ("freeze", "[gird.down.*]", "grid.down.*"), ("freeze", "[grid.down]", "grid.down"), ("freeze", "['*']", "nothing"), ("freeze", "[3]", "patterns"), ("freeze", "[a, a]", "twice"),
    ("lr_factors", "{guide.*: 0}", "belongs into freeze"), ("lr_factors", "{guide.*: -1}", "over 0"), ("lr_factors", "{guide.*: fast}", "over 0"), ("lr_factors", "{giude.*: 0.1}", "guide"),
    ("lr_factors", "{'*': 0.5, guide.*: 0.1}", "changes nothing"), ("freeze", "grid.*", "list"), ("lr_factors", "[0.1]", "dict"),
])
def test_a_wrong_pattern_is_found_before_anything_runs(field, value, words):
    with pytest.raises(AutohdrError, match=words):
        make_spec("hdrnet_512", [f"{field}={value}"])


def test_what_is_frozen_cannot_learn_slowly():
    with pytest.raises(AutohdrError, match="frozen"):
        Recipe(freeze=["guide.*"], lr_factors={"guide.point.*": 0.1})


def test_names_of_a_model_on_a_base_are_checked_when_its_file_is_read(start_file):
    recipe = dict(model="color_refiner", model_config={"width": 8, "depth": 1}, base=str(start_file))
    state = new_state(Recipe(**recipe, freeze=["summary.*"]), 8)
    learn = {k for k, p in state.model.named_parameters() if p.requires_grad}
    assert learn and not any(k.startswith(("summary.", "base.")) for k in learn)
    with pytest.raises(AutohdrError, match="summary"):
        new_state(Recipe(**recipe, freeze=["sumary.*"]), 8)


def test_everything_learns_in_pretraining(folder, tmp_path):
    recipe = Recipe(**TINY, pairs=str(folder), epochs=1, freeze=["grid.down.*"], pretrain_pairs=str(make_pairs(tmp_path / "others", 5, seed=5)), pretrain_epochs=1)
    train(recipe, load_pairs(recipe)[0], tmp_path / "run")
    torch.manual_seed(recipe.seed)
    fresh, first, second = create_model("hdrnet", width=8), load_model(tmp_path / "run/pretrain/model.safetensors"), load_model(tmp_path / "run/model.safetensors")
    name = "grid.down.0.0.weight"
    assert not torch.equal(fresh.get_parameter(name), first.get_parameter(name)) and bits(first.get_parameter(name)) == bits(second.get_parameter(name))
    assert not torch.equal(first.get_parameter("log_gamma"), second.get_parameter("log_gamma")) and "transfer" not in second.metadata


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_the_match_report_survives_a_kill_and_the_loss_of_the_file(folder, tmp_path, monkeypatch, kind):
    """Weights of another depth: the head has another shape, the rest fits; a name too many, a name too few."""
    torch.manual_seed(1)
    other = create_model("hdrnet", width=8, depth=4)
    file = tmp_path / f"other{kind}"
    if kind == ".pth":
        weights = {f"module.{k}": v for k, v in other.state_dict().items() if k != "log_gamma"} | {"module.extra": torch.zeros(3)}
        torch.save({"state_dict": weights}, file)
    else:
        save_model(other, file, recipe=dict(pairs="elsewhere"), trained_on=dict(photos=["0" * 16], properties=["old house"], unknown=[]))
    recipe = Recipe(**TINY, pairs=str(folder), epochs=2, init=str(file))

    class Kill(Exception):
        pass

    def end_and_die(*args, real=loop.end_epoch):
        real(*args)
        raise Kill

    pairs, _ = load_pairs(recipe)
    monkeypatch.setattr(loop, "end_epoch", end_and_die)
    for _ in range(2):  # the second time it goes on, without the file
        with pytest.raises(Kill):
            train(recipe, pairs, tmp_path / "run")
        file.unlink(missing_ok=True)
    about = load_model(tmp_path / "run/model.safetensors").metadata
    record, seen = about["transfer"], about["trained_on"]
    assert record["init"] == str(file) and len(record["sha256"]) == 64 and record["tensors"]["wrong shape"] == 2 and 0.8 < record["share"] < 1
    assert ("missing" in record["tensors"], "unexpected" in record["tensors"]) == ((True, True) if kind == ".pth" else (False, False))
    tables = start_tables(load_model(tmp_path / "run/model.safetensors"), [], {}, recipe.lr)
    assert len(tables) == 3 and {"grid.head.weight", "grid.head.bias"} <= set(list(tables.values())[1]["name"])
    # what other people's weights have seen is none of these photos; what ours have seen counts
    assert ("old house" in seen["properties"]) == (kind == ".safetensors") and {file_hash(f)[:16] for f in select(pairs, recipe)["train"].before} == set(seen["photos"]) - {"0" * 16}


def test_a_run_reports_what_it_took_and_what_learns(folder, start_file, tmp_path):
    other = save_model(create_model("hdrnet", width=8, depth=4), tmp_path / "other.safetensors")
    run_dir = run(make_spec("hdrnet_512", [f"pairs={folder}", "size=64", "crop=48", "epochs=1", "warmup_epochs=0", "model_config={width: 8}", f"init={other}", "freeze=[grid.down.*]",
                                           "lr_factors={grid.*: 0.1}"], smoke=True), tmp_path / "runs", echo=False)
    report, metrics, transfer = ((run_dir / name).read_text() for name in ("report.html", "metrics.json", "transfer.json"))
    assert "other shape in the file" in report and "grid.head.weight" in report and "What learns" in report
    short, whole = json.loads(metrics)["transfer"], json.loads(transfer)
    assert short["share"] == whole["share"] < 1 and {o["name"] for o in whole["odd"]} == {"grid.head.weight", "grid.head.bias"} and short["tensors"]["wrong shape"] == 2
    assert "grid.down.*" in (run_dir / "log.txt").read_text(), "the table is in the log as well"


def test_a_published_checkpoint_says_its_licence(tmp_path, monkeypatch):
    """The name stands for a file in the cache; nothing is fetched here."""
    from autohdr.models import weights
    from autohdr.training import state, transfer

    model = create_model("restormer", dim=8, blocks=(1, 1, 1, 1), refinement=1)
    file = tmp_path / "deraining.pth"
    torch.save({"params": model.state_dict()}, file)
    for module in (weights, transfer):
        monkeypatch.setattr(module, "resolve_weights", lambda source, real=weights.resolve_weights: file if str(source).startswith("published:") else real(source))
    recipe = Recipe(model="restormer", model_config=model.config, init="published:restormer_deraining", freeze=["encoder*"])
    about = state.starting_model(recipe).metadata["transfer"]
    assert about["share"] == 1 and about["init"] == "published:restormer_deraining" and "MIT" in about["licence"]


def test_judges_that_trained_the_start_are_named_whatever_their_table_is_called(folder, tmp_path, capsys):
    """The same photos, once as a folder and once as a table with other splits."""
    recipe = Recipe(**TINY, pairs=str(folder), epochs=1)
    pairs, _ = load_pairs(recipe)
    train(recipe, pairs, tmp_path / "first")
    trained, fresh = select(pairs, recipe)["train"]["name"].iloc[0], select(pairs, recipe)["test"]["name"].iloc[0]
    for judge, words in ((trained, f"1 of the 1 photos that judge this run, such as '{trained}'"), (fresh, None)):
        table = pairs.assign(split=["test" if n == judge else "train" for n in pairs["name"]])
        file = save_pairs(table, tmp_path / f"{judge}.csv")
        later = Recipe(**TINY, pairs=str(file), epochs=1, init=str(tmp_path / "first/model.safetensors"))
        capsys.readouterr()
        train(later, load_pairs(later)[0], tmp_path / f"on_{judge}")
        out = capsys.readouterr().out
        assert (words in out) if words else "careful" not in out
