"""The command line, as a person types it: a process, its output, its exit code."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import autohdr.cli as cli
import autohdr.runs.reproduce as reproduce
from autohdr.cli import main
from autohdr.core import AutohdrError
from autohdr.photo import read_photo, read_size, write_photo
from autohdr.runs.spec import make_spec
from autohdr.runs.status import read_status
from tests.toys import COMMAND, toy

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    """Usage errors without colours, and wide enough not to be broken in the middle of a word."""
    for name, value in dict(TERM="dumb", NO_COLOR="1", COLUMNS="200").items():
        monkeypatch.setenv(name, value)


def autohdr(*args, cwd, env=None):
    """Exit code, stdout, stderr."""
    done = subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=600, env={**os.environ, **(env or {})})
    return done.returncode, done.stdout, done.stderr


def room(seed, height=60, width=90):
    """A smooth picture and its brighter edit."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    before = np.stack([0.5 * (0.5 + 0.5 * np.sin(rng.uniform(1, 6) * rows + rng.uniform(1, 6) * columns + rng.uniform(0, 6))) for _ in range(3)], -1).astype(np.float32)
    return before, before**0.6


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A studio's folder: before/ and after/ of twelve photos."""
    folder = tmp_path_factory.mktemp("studio")
    for i in range(12):
        for side, pixels in zip(("before", "after"), room(i)):
            write_photo(folder / side / f"house{i // 2}_{i}.png", pixels)
    return folder


@pytest.fixture(scope="module")
def trained(studio):
    """The folder of a real training run on the studio's photos."""
    code, out, err = autohdr("run", "hdrnet_512", "--smoke", "-p", "pairs=.", "-p", "threads=1", "--name", "first", "--root", "../runs", cwd=studio)
    assert code == 0, out + err
    return studio.parent / "runs/hdrnet_512/first"


def test_help_is_quick(tmp_path):
    code = "import sys, autohdr.cli; sys.exit(any(m in sys.modules for m in ('torch', 'pandas', 'cv2', 'papermill')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0, "nothing heavy is imported before a command needs it"
    code, out, err = autohdr("--help", cwd=tmp_path)
    assert code == 0 and all(c in out for c in ("analyse", "demo", "run", "enhance", "evaluate", "models", "pairs", "report"))


@pytest.mark.parametrize("args, exit_code, words", [
    (["enhnace"], 2, "enhnace"), (["enhance", "a.jpg"], 2, "--out"), (["enhance", "a.jpg", "--model", "m", "--out", "o", "--quality", "200"], 2, "--quality"),
    (["run", "hdrnte_512"], 1, "Did you mean 'hdrnet_512'"), (["run", "hdrnet_512", "-p", "epcohs=3"], 1, "Did you mean 'epochs'"),
    (["run", "hdrnet_512", "-p", "model=restromer"], 1, "Did you mean 'restormer'"), (["run", "hdrnet_512", "-p", "epochs=0"], 1, "epochs is 0"),
    (["report", "nowhere"], 1, "nowhere"), (["enhance", "a.jpg", "--model", "m", "--out", "o"], 1, "a.jpg"), (["pairs", "nowhere", "--out", "p.csv"], 1, "nowhere"), (["analyse", "no/where", "--out", "a"], 1, "no/where"),
    (["evaluate", "--pred", "nowhere", "--target", "nowhere"], 1, "nowhere")])
def test_mistakes_are_explained(tmp_path, monkeypatch, capsys, args, exit_code, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == exit_code and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "and nothing was written"


def test_run_trains(trained, studio):
    status = read_status(trained)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert status["state"] == "complete" and status["overrides"]["pairs"] == str(studio), "relative to where the command was given"
    assert {"model.safetensors", "history.csv", "report.html", "run.ipynb", "params.yaml", "log.txt"} <= {f.name for f in trained.iterdir()}
    assert {"identity", "gamma", "polynomial"} <= set(metrics["baselines"]) and metrics["ours"]["l1"] > 0
    assert "epoch 2/2" in (trained / "log.txt").read_text() and len(pd.read_csv(trained / "history.csv")) == 2
    assert "beat" in (trained / "report.html").read_text()


def test_enhance(trained, tmp_path):
    for name in ("a.png", "upstairs/b.jpg"):
        write_photo(tmp_path / "in" / name, room(50, 211, 333)[0])
    (tmp_path / "in/broken.jpg").write_bytes(b"\xff\xd8\xff not a photo")
    code, out, err = autohdr("enhance", "in", "--model", trained / "model.safetensors", "--out", "out", cwd=tmp_path)
    assert code == 1 and "broken.jpg" in out + err and "Traceback" not in err, "one fails, the rest are edited"
    assert {f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*.*")} == {"a.png", "upstairs/b.jpg"}
    assert read_size(tmp_path / "out/upstairs/b.jpg") == (211, 333)
    assert np.abs(read_photo(tmp_path / "out/a.png").pixels - read_photo(tmp_path / "in/a.png").pixels).max() > 0.002, "it was edited"
    (tmp_path / "in/broken.jpg").unlink()
    assert autohdr("enhance", "in", "--model", trained / "model.safetensors", "--out", "out", "--overwrite", "--quality", "80", cwd=tmp_path)[0] == 0


def test_enhance_with_listing_and_report(trained, tmp_path, monkeypatch, capsys):
    """Together, and never in the place of something else."""
    for name in "ab": write_photo(tmp_path / f"in/{name}.png", room(50, 211, 333)[0])
    monkeypatch.chdir(tmp_path)
    given = ["enhance", "in", "--model", str(trained / "model.safetensors"), "--out", "out", "--listing", "folder", "--report"]
    for place, said in ((trained, "hdrnet_512/first"), (trained / "params.yaml", "can't be written to"), (tmp_path / "in/a.png/x", "among the photos")):
        with pytest.raises(SystemExit) as end: main([*given, str(place)])
        err = capsys.readouterr().err
        assert end.value.code == 1 and said in err, err
    assert (trained / "model.safetensors").exists() and read_status(trained)["state"] == "complete" and not list(tmp_path.glob("out/*"))
    with pytest.raises(SystemExit) as end: main([*given, "report"])
    table = pd.read_csv(tmp_path / "report/photos.csv")
    assert end.value.code == 0 and "Report:" in capsys.readouterr().out and list(table.listing) == ["in"] * 2 and list(table.status) == ["edited"] * 2


def test_what_was_left_unfinished_is_gone_on_with_where_that_is_sound(tmp_path, monkeypatch):
    """A run that failed after its first fold."""
    monkeypatch.setattr(reproduce, "moved", lambda status: {})  # somebody may be working on the code beside this test
    fold = "from pathlib import Path\nkept = Path(run_dir, 'fold_0').exists()\nPath(run_dir, 'fold_0').mkdir(exist_ok=True)\nPath(run_dir, 'kept').write_text(str(kept))\n"
    recipe = toy(tmp_path, "folds", fold + "assert Path(flag).exists(), 'killed'")
    flag, place = tmp_path / "flag", tmp_path / "look"
    (tmp_path / "weights").touch()
    given = lambda steps: [f"flag={flag}", f"steps={steps}", f"init={tmp_path / 'weights'}"]
    go = lambda steps, overwrite=False: cli._execute_into(str(recipe), given(steps), place, "look", overwrite, True)
    kept = lambda: (place / "kept").read_text() == "True"
    for steps, expected in ((1, False), (1, True), (2, False)):
        with pytest.raises(AutohdrError, match="killed"): go(steps)
        assert kept() == expected, "with the same parameters only"
    sound = lambda spec: cli._may_go_on(place, spec, read_status(place), yaml.safe_load((place / "params.yaml").read_text())["parameters"])
    assert sound(make_spec(str(recipe), given(2))) and not sound(make_spec(str(recipe), given(3)))
    (tmp_path / "weights").write_text("others")
    assert not sound(make_spec(str(recipe), given(2))), "other files are read"
    (tmp_path / "weights").write_text("")
    with monkeypatch.context() as m:
        m.setattr(reproduce, "moved", lambda status: {"commit": ("a", "b")})
        assert not sound(make_spec(str(recipe), given(2))), "other code may give other results"
    with pytest.raises(AutohdrError, match="killed"): go(2, overwrite=True)
    assert not kept(), "whoever says --overwrite wants it from the start"
    flag.touch()
    assert read_status(go(2))["attempt"] == 2 and kept()
    with pytest.raises(AutohdrError, match="earlier report"): go(2)


def test_evaluate_lists_a_photo_without_partner(studio, tmp_path):
    shutil.copytree(studio / "before", tmp_path / "pred")
    victim = next(p for p in sorted((tmp_path / "pred").rglob("*")) if p.is_file())
    victim.unlink()
    code, out, err = autohdr("evaluate", "--pred", "pred", "--target", studio / "after", cwd=tmp_path)
    assert code == 1 and victim.stem in err and "no prediction" in err


def test_evaluate(studio, tmp_path):
    code, out, err = autohdr("evaluate", "--pred", studio / "before", "--target", studio / "after", "--json", "scores.json", cwd=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    before, after = (read_photo(studio / side / "house0_0.png").pixels for side in ("before", "after"))
    assert code == 0 and scores["summary"]["n"] == 12 == len(scores["photos"])
    assert np.isclose(scores["photos"][0]["l1"], np.abs(before - after).mean(), atol=1e-6)
    assert f"{scores['summary']['l1']:.4f}" in out


def test_models(tmp_path):
    code, out, _ = autohdr("models", cwd=tmp_path)
    assert code == 0 and "hdrnet" in out and "26126644" in out.replace(",", "")


def test_pairs_keeps_assignments(studio, tmp_path):
    assert autohdr("pairs", studio, "--out", "pairs.csv", cwd=tmp_path)[0] == 0
    table = pd.read_csv(tmp_path / "pairs.csv")
    assert len(table) == 12 and set(table.split) <= {"train", "val", "test"} and table.fold.between(0, 4).all()
    table.loc[0, "split"] = "test" if table.split[0] == "train" else "train"
    table.to_csv(tmp_path / "pairs.csv", index=False)
    assert autohdr("pairs", studio, "--out", "pairs.csv", cwd=tmp_path)[0] == 0
    assert pd.read_csv(tmp_path / "pairs.csv").split[0] == table.split[0], "what was changed by hand stays"


def test_demo_says_how_it_did(tmp_path):
    code, out, err = autohdr("demo", "--smoke", cwd=tmp_path)
    metrics = json.loads(next((tmp_path / "demo_output/runs/demo").glob("*/metrics.json")).read_text())
    won = all(metrics["ours"]["l1"] < b["l1"] for b in metrics["baselines"].values())
    assert code == (0 if won else 1) and ("does not beat" in err) == (not won), "exit code and scores agree"
    assert f"hdrnet {metrics['ours']['l1']:.4f}" in out and "identity" in out and "report.html" in out
    assert len(list((tmp_path / "demo_output/edited").iterdir())) == metrics["ours"]["n"]


def test_installed_from_a_wheel_it_runs(tmp_path):
    """A wheel made from the source distribution, unpacked far from the checkout: recipes, run notebooks and sample pairs are in it."""
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    code, out, err = autohdr("run", "demo", "--smoke", "--root", "runs", "--name", "wheel", cwd=tmp_path, env=dict(PYTHONPATH=str(tmp_path / "site")))
    status = json.loads((tmp_path / "runs/demo/wheel/status.json").read_text())
    assert code == 0 and status["state"] == "complete", err
    assert status["notebook"] == str(tmp_path / "site/autohdr/resources/experiments/train.ipynb")
    assert (tmp_path / "runs/demo/wheel/report.html").exists()
    assert (tmp_path / "site/autohdr/resources/studies/cleaning.yaml").exists()


def test_foreign_weights_become_a_checkpoint_that_edits(studio, tmp_path):
    """A published .pth is recognised, converted, and used like a model of our own."""
    import torch

    from autohdr.models.zoo import create_model

    torch.manual_seed(0)
    state = create_model("restormer", dim=8, blocks=(1, 1, 1, 1), refinement=1).state_dict()
    torch.save({"params": {"module." + k: v for k, v in state.items()}}, tmp_path / "foreign.pth")
    code, out, err = autohdr("weights", "foreign.pth", "--out", "ours.safetensors", cwd=tmp_path)
    assert code == 0 and "restormer" in out and "100.0% of the model's parameters matched" in out, out + err
    photo = studio / "before/house0_0.png"
    code, out, err = autohdr("enhance", photo, "--model", "ours.safetensors", "--out", "edited", "--device", "cpu", cwd=tmp_path)
    assert code == 0 and read_size(tmp_path / "edited/house0_0.png") == read_size(photo), out + err


def test_weights_that_cannot_be_used_end_in_one_line(tmp_path):
    (tmp_path / "page.pth").write_text("<!doctype html>" * 100)
    for args, said in ((["page.pth"], "page.pth"), (["nowhere.pth"], "nowhere.pth"), (["page.pth", "--out", "x.pth"], ".safetensors")):
        code, out, err = autohdr("weights", *args, cwd=tmp_path)
        assert code == 1 and said in err and err.count("\n") == 1 and "Traceback" not in err, err
    code, out, err = autohdr("weights", "restormer_deraining", cwd=tmp_path, env=dict(AUTOHDR_CACHE=str(tmp_path / "cache"), HTTPS_PROXY="http://127.0.0.1:9"))
    assert code == 1 and "releases/download/v1.0/deraining.pth" in err and str(tmp_path / "cache") in err and err.count("\n") == 1, err


def test_published_weights_are_listed(tmp_path):
    code, out, err = autohdr("weights", cwd=tmp_path)
    assert code == 0 and "https://huggingface.co/Cidaut/DarkIR" in out and "licence: MIT" in out and "104.7 MB" in out, err
