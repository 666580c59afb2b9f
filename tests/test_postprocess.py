"""Steps for a finished edit, and the guard: what they are given, what comes out, and what a studio would trip over."""
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import autohdr.enhance as en
from autohdr.cli import main
from autohdr.core import AutohdrError
from autohdr.data.reference import from_json, lab_histogram, to_json
from autohdr.data.samples import decode, encode, sample_pairs
from autohdr.enhance import edit_photo, enhance, enhance_photo, postprocess_folder
from autohdr.models.zoo import create_model, save_model
from autohdr.photo import ADOBE_RGB, Photo, find_photos, read_photo, write_photo
from autohdr.postprocess.guard import Limits, check, fix, measure
from autohdr.postprocess.pipeline import RANGES, STEPS, postprocess, read_steps, ready, step_settings
from autohdr.runs.status import read_status
from tests.toys import COMMAND

REAL = Path(__file__).parents[2] / "shared" / "data" / "pairs"
SAMPLES = sample_pairs()
PHOTOS = arrays(np.float32, st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3)), elements=st.floats(0, 1, width=32))
QUICK = settings(max_examples=12, deadline=None)
LOOK = lab_histogram(read_photo(SAMPLES.after[12]).pixels)
ALL = [dict(step="histogram", reference=LOOK), "saturation", "windows"]


class Times(torch.nn.Module):
    "A model whose effect is known: it multiplies."
    def __init__(self, factor, reference=None):
        super().__init__()
        self.factor, self.name = torch.nn.Parameter(torch.tensor(float(factor))), "times"
        self.metadata = {} if reference is None else dict(reference=to_json(reference))

    def decide(self, x): "Its presence says that the model takes a photo whole."

    def forward(self, x): return x * self.factor


def pair(i):
    "A sample's before and after."
    return tuple(read_photo(SAMPLES[side][i]).pixels for side in ("before", "after"))


def run(*args):
    "Exit code of a command in this process."
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
        raise SystemExit(0)
    return end.value.code or 0


def tinted(v, a, b):
    return cv2.cvtColor(cv2.cvtColor(v, cv2.COLOR_RGB2LAB) + np.float32([0, a, b]), cv2.COLOR_LAB2RGB).clip(0, 1)


def exposed(v, ev):
    return encode(np.clip(decode(v) * 2.0**ev, 0, 1)).astype(np.float32)


def deep(long_side):
    "A smooth picture with far more grey values than a byte has."
    y, x = np.mgrid[0:long_side * 2 // 3, 0:long_side] / long_side
    return np.stack([0.15 + 0.5 * x, 0.2 + 0.6 * y, 0.5 - 0.3 * x * y], -1).astype(np.float32)


@pytest.fixture
def checkpoint(tmp_path):
    "An untrained hdrnet that knows a look, as training stores it."
    return save_model(create_model("hdrnet", width=8), tmp_path / "m.safetensors", reference=to_json(LOOK))


# The pipeline


def test_postprocess_cannot_see_a_target():
    "Neither has it an argument for one, nor has any step; and a setting of that name is refused."
    assert list(inspect.signature(postprocess).parameters) == ["pixels", "steps", "strength"]
    for name in STEPS:
        assert set(step_settings(name)) <= {*RANGES, "reference"}
        for word in ("target", "after", "gt", "edit"):
            with pytest.raises(AutohdrError, match="Unknown setting"): read_steps([{"step": name, "reference": LOOK, word: "a.jpg"} if name == "histogram" else {"step": name, word: "a.jpg"}])
    with pytest.raises(AutohdrError, match="Unknown post-processing step"): read_steps("gamma")
    assert "target" not in inspect.signature(enhance).parameters and "target" not in inspect.signature(postprocess_folder).parameters


def test_two_edits_of_one_photo_get_the_same_treatment_whatever_lies_beside_them(tmp_path):
    "A step that looked for a target would have to find it somewhere; the studio's edit lies where one would look."
    before, after = pair(3)
    for side in ("input", "output", "target", "after"): write_photo(tmp_path / side / "a.png", before if side in ("input", "output") else after)
    write_photo(tmp_path / "alone" / "a.png", before)
    steps = ready(ALL)
    for place in ("input", "alone"): postprocess_folder(tmp_path / place, tmp_path / f"{place} done", steps, guard="off")
    one, two = (read_photo(tmp_path / f"{p} done" / "a.png").pixels for p in ("input", "alone"))
    assert np.array_equal(one, two) and np.abs(one - before).max() > 0.01


@QUICK
@given(PHOTOS, st.floats(0, 1))
def test_any_photo_gives_a_photo(pixels, strength):
    kept = pixels.copy()
    out = postprocess(pixels, ALL, strength)
    assert out.shape == pixels.shape and out.dtype == np.float32 and np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    assert np.array_equal(pixels, kept) and not np.shares_memory(out, pixels)


@QUICK
@given(PHOTOS, st.lists(st.sampled_from(["saturation", "windows", ALL[0]]), min_size=1, max_size=3))
def test_strength_nought_gives_the_photo_back(pixels, steps):
    assert np.array_equal(postprocess(pixels, steps, 0), pixels)
    none = [({"step": s} if isinstance(s, str) else s) | dict(strength=0) for s in steps]
    assert np.array_equal(postprocess(pixels, none), pixels)


@QUICK
@given(PHOTOS, st.floats(0.05, 0.95))
def test_strength_of_all_blends(pixels, strength):
    whole = postprocess(pixels, ALL)
    assert np.abs(postprocess(pixels, ALL, strength) - (pixels + strength * (whole - pixels))).max() < 1e-5


def test_steps_run_in_order_and_at_full_precision():
    v = deep(300)
    by_hand = v
    for name, more in (("histogram", dict(reference=LOOK)), ("saturation", {}), ("windows", {})): by_hand = STEPS[name](by_hand, **more)
    out = postprocess(v, ALL)
    assert np.array_equal(out, by_hand) and len(np.unique(out[..., 0])) > 5000
    assert not np.array_equal(out, postprocess(v, ALL[::-1]))


@pytest.mark.parametrize("bad, word", [(np.full((4, 4, 3), np.nan, np.float32), "NaN"), (np.zeros((4, 4), np.float32), "shape"), (np.full((4, 4, 3), 2, np.float32), r"\[0,1\]"),
                                       (np.full((4, 4, 3), -1, np.float32), r"\[0,1\]"), (np.zeros((4, 4, 3), np.uint8), "uint8"), (np.zeros((0, 4, 3), np.float32), "shape")])
def test_what_is_no_photo_is_refused(bad, word):
    with pytest.raises(AutohdrError, match=word): postprocess(bad, "saturation")
    with pytest.raises(AutohdrError, match=word): check(bad, bad)
    with pytest.raises(AutohdrError, match=word): fix(bad, bad)


def test_one_pixel_and_all_black():
    for v in (np.full((1, 1, 3), 0.3, np.float32), np.zeros((30, 40, 3), np.float32), np.ones((30, 40, 3), np.float32)):
        out = postprocess(v, ["saturation", "windows"])
        assert np.abs(out - v).max() < 1e-3 and check(v, out) == [] and fix(v, out)[1] == 1
        assert np.isfinite(postprocess(v, ALL)).all()


def test_yaml_is_read_from_where_it_lies(tmp_path, monkeypatch):
    shutil.copy(SAMPLES.after[12], tmp_path / "kitchen.jpg")
    (tmp_path / "looks").mkdir()
    (tmp_path / "looks" / "warm.yaml").write_text("- {step: histogram, reference: ../kitchen.jpg, strength: 0.5}\n- step: saturation\n  factor: 1.2\n")
    monkeypatch.chdir(tmp_path)
    steps = ready(Path("looks/warm.yaml"))
    assert np.abs(steps[0]["reference"] - ready([dict(step="histogram", reference="kitchen.jpg")])[0]["reference"]).max() == 0
    assert steps[1] == dict(step="saturation", factor=1.2)
    # A default reference is the caller's, so it starts from where the caller is.
    (tmp_path / "looks" / "plain.yaml").write_text("- histogram\n")
    assert Path(read_steps("looks/plain.yaml", "kitchen.jpg")[0]["reference"]) == tmp_path / "kitchen.jpg"


def test_a_checkpoint_is_a_reference_unless_it_is_too_old(tmp_path, checkpoint):
    before, _ = pair(3)
    assert np.abs(postprocess(before, ready("histogram", checkpoint)) - postprocess(before, ALL[:1])).max() < 3 / 255
    old = save_model(create_model("hdrnet", width=8), tmp_path / "old.safetensors")
    with pytest.raises(AutohdrError, match="old.safetensors: holds no reference.*older version.*--reference PHOTO"): ready("all", old)


# The guard


def test_the_studios_own_edits_pass():
    flags = {SAMPLES.name[i]: check(*pair(i)) for i in range(0, len(SAMPLES), 3)}
    assert sum(map(bool, flags.values())) <= 1, flags


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real pairs of ../shared/data")
def test_real_edits_pass_and_their_faults_do_not():
    pairs = [tuple(read_photo(REAL / side / f.name).pixels for side in ("before", "after")) for f in find_photos(REAL / "after")]
    rate = lambda spoil: np.mean([bool(check(b, spoil(a))) for b, a in pairs])
    assert rate(lambda a: a) == 0
    assert rate(lambda a: cv2.GaussianBlur(a, (0, 0), 0.7)) == 1 and rate(lambda a: tinted(a, -8, 0)) == 1 and rate(lambda a: tinted(a, 8, 0)) == 1 and rate(lambda a: exposed(a, 1)) >= 0.9
    assert rate(lambda a: np.clip((a - 0.35) / 0.65, 0, 1)) >= 0.8


@pytest.mark.parametrize("name, spoil, severities, least", [
    ("blurred", lambda v, s: cv2.GaussianBlur(v, (0, 0), s), (0.7, 1, 2), 1), ("colour cast", lambda v, s: tinted(v, -s, 0), (6, 9, 15), 1), ("colour cast", lambda v, s: tinted(v, s, 0), (8, 10, 15), 1),
    ("lost highlights", exposed, (0.8, 1.2, 2), 0.9), ("lost shadows", lambda v, s: np.clip((v - s) / (1 - s), 0, 1), (0.4, 0.5), 0.9)])
def test_planted_faults_are_found_and_named(name, spoil, severities, least):
    found = [any(f.startswith(name) for f in check(b, spoil(a, s))) for b, a in map(pair, range(2, len(SAMPLES), 9)) for s in severities]
    assert np.mean(found) >= least


@pytest.mark.parametrize("curve", [lambda v: v**0.45, lambda v: v**1.8, lambda v: v + 0.9 * v * (1 - v) * (v - 0.5), lambda v: 0.1 + 0.8 * v], ids=["gamma 0.45", "gamma 1.8", "S-curve", "flat"])
def test_brightening_and_contrast_are_no_blur(curve):
    for i in range(0, len(SAMPLES), 8):
        before, _ = pair(i)
        assert measure(before, curve(before).astype(np.float32))["sharpness"] == pytest.approx(1, abs=0.12), i


def test_a_large_photo_is_looked_at_in_full_size():
    "A blur of 24 megapixels that no copy of 512 px shows."
    before, after = (np.tile(v, (6, 6, 1)) for v in pair(3))
    assert check(before, after) == []
    found = check(before, cv2.GaussianBlur(after, (0, 0), 0.8))
    assert len(found) == 1 and found[0].startswith("blurred at full size")
    noisy = lambda v, n: np.clip(v + n * np.random.default_rng(0).standard_normal(v.shape, np.float32), 0, 1)
    assert check(noisy(before, 0.008), after) == [], "taking a camera's noise away is no blur"


@QUICK
@given(PHOTOS, PHOTOS)
def test_what_is_fixed_passes(a, b):
    h, w = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    before, after = a[:h, :w].copy(), b[:h, :w].copy()
    kept = before.copy(), after.copy()
    out, share = fix(before, after)
    assert 0 <= share <= 1 and check(before, out) == [] and (share == 1) == (check(before, after) == [])
    assert np.abs(out - (before + share * (after - before))).max() < 1e-5 and out.min() >= 0 and out.max() <= 1
    assert np.array_equal(before, kept[0]) and np.array_equal(after, kept[1])


def test_a_worse_fault_keeps_less_and_loose_limits_keep_all():
    before, after = pair(3)
    shares = [fix(before, tinted(after, -s, 0))[1] for s in (2, 8, 16, 32)]
    assert shares[0] == 1 and all(a > b for a, b in zip(shares, shares[1:])) and shares[-1] > 0
    assert fix(before, tinted(after, -16, 0), Limits(cast=100))[1] == 1
    out, share = fix(before, np.ones_like(before))
    assert share < 0.7 and np.ptp(out) > 0.3 * np.ptp(before), "light grey without detail is no repair"


# In a folder


SPOILT = {"black": lambda a: a * 0, "white": lambda a: a * 0 + 1, "flat": lambda a: a * 0 + 0.5, "bright": lambda a: (2 * a).clip(0, 1), "crushed": lambda a: ((a - 0.35) / 0.65).clip(0, 1)}


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_fixed_passes_as_a_file_too(tmp_path, spoil):
    """Eight bits and JPEG tip nothing over the edge, and nothing nearly black or flat passes for a photo."""
    for i in (3, 12, 30):
        before, after = (read_photo(SAMPLES[c][i]).pixels for c in ("before", "after"))
        fixed, share = fix(before, SPOILT[spoil](after).astype(np.float32))
        for name in ("a.png", "a.jpg"):
            assert not check(before, read_photo(write_photo(tmp_path / name, fixed)).pixels), (i, name)
        assert share < 0.8 or spoil == "crushed"


def test_a_repair_of_a_black_edit_is_no_black_photo():
    white = np.ones((60, 80, 3), np.float32)
    assert fix(white, white * 0)[0].min() > 0.9 and fix(white / 2, white * 0)[0].min() > 0.4


def test_flags_reach_the_table_and_the_terminal(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in (3, 12):
        shutil.copy(SAMPLES.before[i], tmp_path / "in" / f"{i}.jpg")
    table = enhance(tmp_path / "in", tmp_path / "a", Times(3))
    said = capsys.readouterr().out
    assert table["flags"].str.contains("lost highlights").all() and (table["blend"] == 1).all() and said.count("FLAGGED") == 2 and "% of the photo became white" in said
    raw = read_photo(tmp_path / "a" / "3.jpg").pixels
    table = enhance(tmp_path / "in", tmp_path / "b", Times(3), guard="fix")
    assert (table["blend"] < 1).all() and "blended back" in capsys.readouterr().out
    fixed, before = read_photo(tmp_path / "b" / "3.jpg").pixels, read_photo(tmp_path / "in" / "3.jpg").pixels
    share = table.set_index("path")["blend"][str(tmp_path / "in" / "3.jpg")]
    assert np.abs(fixed - (before + share * (raw - before))).mean() < 0.01
    table = enhance(tmp_path / "in", tmp_path / "c", Times(3), guard="off")
    assert (table["flags"] == "").all() and "FLAGGED" not in capsys.readouterr().out
    assert (tmp_path / "a" / "3.jpg").read_bytes() == (tmp_path / "c" / "3.jpg").read_bytes(), "flagging changes nothing"


def test_a_good_edit_is_not_flagged(tmp_path, capsys):
    shutil.copy(SAMPLES.before[3], tmp_path / "a.jpg")
    table = enhance(tmp_path / "a.jpg", tmp_path / "out", Times(1.1))
    assert table["flags"][0] == "" and table["blend"][0] == 1 and "FLAGGED" not in capsys.readouterr().out
    enhance_photo(tmp_path / "a.jpg", tmp_path / "one.jpg", Times(3))
    assert "FLAGGED" in capsys.readouterr().out


def test_steps_run_between_the_model_and_the_guard(tmp_path, capsys):
    before = read_photo(shutil.copy(SAMPLES.before[3], tmp_path / "a.jpg")).pixels
    model = Times(1.2, LOOK)
    enhance(tmp_path / "a.jpg", tmp_path / "out", model, "png", steps="all", postprocess_strength=0.5, guard="off")
    stored = dict(step="histogram", reference=from_json(to_json(LOOK)))
    expected = postprocess(np.clip(before * np.float32(1.2), 0, 1), [stored, *ALL[1:]], 0.5)
    assert np.abs(read_photo(tmp_path / "out" / "a.png").pixels - expected).max() < 1 / 255
    tint = lambda pixels: postprocess(tinted(pixels, -9, 0), [dict(step="saturation", factor=1)])
    assert edit_photo(tmp_path / "a.jpg", tmp_path / "b.png", tint)["flags"][0].startswith("colour cast")
    with pytest.raises(AutohdrError, match="holds no reference"): enhance(tmp_path / "a.jpg", tmp_path / "none", Times(1.2), steps="all")
    assert not (tmp_path / "none").exists()


def test_sixteen_bits_and_everything_else_come_through(tmp_path):
    source = tmp_path / "in"
    write_photo(source / "deep.tif", Photo(deep(400), icc=ADOBE_RGB, bit_depth=16))
    write_photo(source / "b" / "deep.png", Photo(deep(400), bit_depth=16, alpha=np.full((266, 400), 0.5, np.float32)))
    write_photo(source / "plain.JPG", Photo(deep(90)))
    kept = {p: p.read_bytes() for p in source.rglob("*.*")}
    table = postprocess_folder(source, tmp_path / "out", ALL)
    assert list(table["status"]) == ["edited"] * 3, table
    assert [p.relative_to(tmp_path / "out") for p in find_photos(tmp_path / "out")] == [p.relative_to(source) for p in find_photos(source)]
    for name in ("deep.tif", "b/deep.png"):
        a, b = read_photo(source / name), read_photo(tmp_path / "out" / name)
        assert (b.bit_depth, b.icc, b.format, b.alpha is None) == (16, a.icc, a.format, a.alpha is None)
        assert all(len(np.unique(b.pixels[..., c])) > 1000 for c in range(3)), "more than 256 levels"
    assert kept == {p: p.read_bytes() for p in source.rglob("*.*")}
    again = postprocess_folder(source, tmp_path / "out", ALL)
    assert list(again["status"]) == ["skipped"] * 3 and list(postprocess_folder(source, tmp_path / "out", ALL, overwrite=True)["status"]) == ["edited"] * 3


def test_what_fails_is_told_and_nothing_half_done(tmp_path, capsys):
    write_photo(tmp_path / "in" / "a.jpg", deep(60))
    (tmp_path / "in" / "b.jpg").write_bytes((tmp_path / "in" / "a.jpg").read_bytes()[:300])
    table = postprocess_folder(tmp_path / "in", tmp_path / "out", "saturation")
    assert list(table["status"]) == ["edited", "failed"] and "b.jpg" in table["error"][1] and "FAILED" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.jpg"]
    for bad in (tmp_path / "in", tmp_path / "in" / "deeper"):
        with pytest.raises(AutohdrError, match="mix"): postprocess_folder(tmp_path / "in", bad, "saturation")


def test_nothing_is_opened_before_all_is_checked(tmp_path, monkeypatch):
    write_photo(tmp_path / "in" / "a.jpg", deep(60))
    monkeypatch.setattr(en, "edit_photo", lambda *a, **k: pytest.fail("a photo was opened"))
    for wrong, word in ((dict(steps="saturatoin"), "saturation"), (dict(guard="on"), "guard"), (dict(steps="saturation", postprocess_strength=-1), "strength"), (dict(qualty=3), "quality"), (dict(method="whol"), "whole")):
        with pytest.raises(AutohdrError, match=word): enhance(tmp_path / "in", tmp_path / "out", Times(1), **wrong)
    assert not (tmp_path / "out").exists()


def test_24_megapixels_through_all_steps(tmp_path):
    "Each step may take 1.5 s on two cores and 1.5 GiB over the photo. Asserted as processor time of both, with room for a busy machine; all steps together take no more memory than one."
    noise = np.random.default_rng(0).integers(0, 40, (4000, 6000, 3), dtype=np.uint8)
    ramp = np.linspace(20, 210, 6000).astype(np.uint8)[None, :, None]
    (tmp_path / "24mp.jpg").write_bytes(imagecodecs.jpeg8_encode(noise + ramp, 92))
    code = ("import resource, sys, time; from autohdr.photo import read_photo; from autohdr.postprocess.pipeline import postprocess, ready\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "steps, pixels = ready('all', sys.argv[2]), read_photo(sys.argv[1]).pixels; base, start = peak(), time.process_time()\n"
            "out = postprocess(pixels, steps, 0.8); print(time.process_time() - start, peak() - base)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "24mp.jpg"), SAMPLES.after[12]], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 14 and kilobytes < 1.5 * 2**20, done.stdout


# The commands


def test_postprocess_command(tmp_path, checkpoint, capsys):
    for i in (3, 12): write_photo(tmp_path / "in" / "rooms" / f"{i}.tif", Photo(read_photo(SAMPLES.after[i]).pixels, bit_depth=16))
    done = subprocess.run([*COMMAND, "postprocess", "in", "--out", "out", "--method", "all", "--reference", str(checkpoint), "--strength", "0.5"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out" / "rooms").iterdir()) == ["12.tif", "3.tif"] and "2 of 2 photos" in done.stdout
    deep = read_photo(tmp_path / "out" / "rooms" / "3.tif")
    assert deep.bit_depth == 16 and len(np.unique(deep.pixels[..., 1])) > 256
    (tmp_path / "look.yaml").write_text("- {step: saturation, factor: 0}\n")
    assert run("postprocess", tmp_path / "in", "--out", tmp_path / "grey", "--steps", tmp_path / "look.yaml", "--format", "jpg", "--guard", "off") == 0
    grey = read_photo(tmp_path / "grey" / "rooms" / "3.jpg").pixels
    assert np.ptp(grey, axis=-1).mean() < np.ptp(deep.pixels, axis=-1).mean()


@pytest.mark.parametrize("args, code, word", [
    (["--method", "all"], 1, "--reference"), (["--method", "histogram"], 1, "--reference"), (["--method", "vivid"], 1, "saturation"), ([], 1, "--method"), (["--steps", "no.yaml"], 1, "no.yaml"),
    (["--method", "saturation", "--strength", "2"], 2, "--strength"), (["--method", "saturation", "--reference", "a.jpg"], 1, "leave it out"), (["--method", "histogram", "--reference", "no.jpg"], 1, "no.jpg"),
    (["--method", "saturation", "--guard", "on"], 1, "flag")])
def test_mistakes_are_explained(tmp_path, monkeypatch, capsys, args, code, word):
    write_photo(tmp_path / "in" / "a.png", deep(60))
    monkeypatch.chdir(tmp_path)
    for name, value in dict(TERM="dumb", NO_COLOR="1", COLUMNS="200").items(): monkeypatch.setenv(name, value)
    assert run("postprocess", "in", "--out", "out", *args) == code
    assert word in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_enhance_command_with_a_report(tmp_path, checkpoint, capsys):
    "Flagged photos come first, with reasons; what failed is listed; a second run makes the report anew and leaves the edits alone."
    (tmp_path / "in").mkdir()
    for i in (3, 12): shutil.copy(SAMPLES.before[i], tmp_path / "in" / f"{i}.jpg")
    # A green look is wrong for all photos but the one that is as green itself.
    for place in ("green.png", "in/1_green.png"): write_photo(tmp_path / place, tinted(read_photo(SAMPLES.after[12]).pixels, -25, 0))
    (tmp_path / "in" / "cut.jpg").write_bytes((tmp_path / "in" / "3.jpg").read_bytes()[:900])
    (tmp_path / "look.yaml").write_text("- {step: histogram, reference: green.png}\n- {step: saturation, factor: 1.05}\n")
    args = ["enhance", tmp_path / "in", "--model", checkpoint, "--out", tmp_path / "out", "--postprocess", tmp_path / "look.yaml", "--guard", "fix", "--warmth", "0.02", "--report", tmp_path / "out" / "report"]
    assert run(*args) == 1, "one photo failed"
    said = capsys.readouterr()
    assert said.out.count("FLAGGED") == 2 and "colour cast" in said.out and "cut.jpg" in said.out, said
    folder = tmp_path / "out" / "report"
    table, metrics = pd.read_csv(folder / "photos.csv"), json.loads((folder / "metrics.json").read_text())
    assert read_status(folder)["state"] == "complete" and (metrics["edited"], metrics["failed"], metrics["flagged"]) == (3, 1, 2) and (table["blend"] < 1).sum() == 2
    assert metrics["controls"] == dict(strength=1, exposure=0, warmth=0.02, window_pull=0), "what the command was told arrives in the notebook"
    page = (folder / "report.html").read_text()
    assert page.rindex("Blended back with the input") < page.rindex("The others") < page.rindex("<h3>1_green.png") and "<h3>12.jpg" in page and "is truncated" in page
    assert page.count('<div class="ah-slider"') == 3 and 'src="http' not in page
    edits = {p: p.read_bytes() for p in (tmp_path / "out").glob("*.*")}
    assert run(*args) == 1 and edits == {p: p.read_bytes() for p in (tmp_path / "out").glob("*.*")}
    assert json.loads((folder / "metrics.json").read_text())["skipped"] == 3


def test_a_report_never_lies_among_photos(tmp_path, checkpoint, capsys):
    write_photo(tmp_path / "in" / "a.jpg", deep(60))
    write_photo(tmp_path / "out" / "a.jpg", deep(60))
    for place in (tmp_path / "out", tmp_path / "in", tmp_path / "in" / "report", tmp_path):
        assert run("enhance", tmp_path / "in", "--model", checkpoint, "--out", tmp_path / "out", "--report", place) == 1
        assert "among the photos" in capsys.readouterr().err
    assert (tmp_path / "out" / "a.jpg").exists() and (tmp_path / "in" / "a.jpg").exists()
    assert run("enhance", tmp_path / "in", "--model", checkpoint, "--out", tmp_path / "new", "--guard", "on", "--report", tmp_path / "r") == 1
    assert not (tmp_path / "r").exists() and not (tmp_path / "new").exists(), "a wrong setting makes no report"


def test_old_checkpoints_say_what_they_lack(tmp_path, capsys):
    old = save_model(create_model("hdrnet", width=8), tmp_path / "old.safetensors")
    write_photo(tmp_path / "a.jpg", deep(60))
    assert run("enhance", tmp_path / "a.jpg", "--model", old, "--out", tmp_path / "out", "--postprocess", "all") == 1
    assert "holds no reference" in capsys.readouterr().err
    assert run("enhance", tmp_path / "a.jpg", "--model", old, "--out", tmp_path / "out", "--postprocess", "all", "--reference", SAMPLES.after[12]) == 0
