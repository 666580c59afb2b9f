"""Controls on a finished edit keep their promises on any picture; a look stores them, enhance obeys them, and a stranger's look can only say something untrue."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file

import autohdr.enhance as en
from autohdr.cli import main
from autohdr.core import AutohdrError
from autohdr.data.reference import to_lab
from autohdr.data.samples import sample_pairs
from autohdr.enhance import enhance, enhance_photo, postprocess_folder
from autohdr.learn.card import card, with_controls
from autohdr.models import zoo
from autohdr.models.zoo import create_model, read_metadata, save_model
from autohdr.photo import Photo, read_photo, write_photo
from autohdr.postprocess.controls import NEUTRAL, RANGES, Controls, apply_controls, from_light, from_metadata, relight, to_edges, to_json, to_light, with_strength

SAMPLES = sample_pairs()
PHOTOS = arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)), elements=st.floats(0, 1, width=32))
SETTINGS = st.builds(Controls, **{k: st.floats(low, high) for k, (low, high) in RANGES.items()})
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")


class Half(torch.nn.Module):
    "A model whose effect is known: half the way to white, and a tint."
    def __init__(self, tint=(1, 1, 1), **metadata):
        super().__init__()
        self.weight, self.tint, self.metadata = torch.nn.Parameter(torch.tensor(0.5)), torch.tensor(tint).view(3, 1, 1), metadata

    def decide(self, x): "Its presence says that the model takes a photo whole."

    def forward(self, x): return (1 - (1 - x) * self.weight) * self.tint


@pytest.fixture
def base(tmp_path, monkeypatch):
    "A look in the place of the one that ships."
    monkeypatch.setattr(zoo, "BASE_LOOK", save_model(create_model("hdrnet", width=8), tmp_path / "shipped" / "base.safetensors", controls=dict(exposure=0.25)))
    return zoo.BASE_LOOK


def run(*args):
    try: main([str(a) for a in args])
    except SystemExit as end: return end.code or 0
    return 0


def scene(height=40, width=60):
    y, x = np.mgrid[0:height, 0:width] / width
    return np.stack([0.2 + 0.5 * x, 0.3 + 0.5 * y, 0.6 - 0.4 * x * y], -1).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(PHOTOS, SETTINGS, st.data())
def test_any_photo_gives_a_photo(before, controls, data):
    edit = data.draw(arrays(np.float32, before.shape, elements=st.floats(0, 1, width=32)))
    mask = data.draw(arrays(bool, before.shape[:2]))
    kept = before.copy(), edit.copy()
    out = apply_controls(before, edit, controls, mask)
    assert out.shape == edit.shape and out.dtype == np.float32 and np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    assert (before == kept[0]).all() and (edit == kept[1]).all(), "nothing is changed in place"
    assert apply_controls(before, edit, NEUTRAL) is edit and apply_controls(before, edit, Controls(strength=0)) is before


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(-2, 2), st.floats(-1, 1))
def test_a_brighter_surface_stays_brighter(colour, exposure, warmth):
    "Of one colour at rising brightness, no channel falls, whatever is turned; and what was not clipped is not clipped."
    levels = np.linspace(0.02, 1, 300) / max(*colour, 0.01)
    light = (np.float32(levels)[:, None] * np.float32(colour))[None].clip(0, 1)
    out = relight(light.copy(), exposure, warmth)
    assert np.diff(out, axis=1).min() > -2e-6 and out.max() < 1 + 1e-5
    assert (out[light < 0.995] < 1).all()


@pytest.mark.parametrize("ev", [0.5, 1, 2])
def test_darker_undoes_brighter(ev):
    pixels = scene()
    there = from_light(relight(to_light(pixels), ev, 0))
    assert there.mean() > pixels.mean() + 0.05 and np.abs(from_light(relight(to_light(there), -ev, 0)) - pixels).max() < 1e-5
    hue = [cv2.cvtColor(v, cv2.COLOR_RGB2HSV)[..., :2] for v in (to_light(pixels), to_light(there))]
    assert np.abs(hue[0] - hue[1]).max() < 0.1, "hue (in degrees) and saturation of the light stay"


def test_a_clipped_lamp_takes_no_colour():
    lamp = np.ones((4, 4, 3), np.float32)
    for controls in (Controls(warmth=1), Controls(warmth=-1), Controls(exposure=2, warmth=1), Controls(exposure=-2)):
        assert np.abs(apply_controls(lamp, lamp, controls) - 1).max() < 1e-5


def test_more_of_a_look_goes_on_without_a_jump():
    before, edit = scene(), np.sqrt(scene())
    steps = [with_strength(before, edit, s) for s in np.linspace(0, 1.5, 31)]
    moves = [np.abs(b - a).max() for a, b in zip(steps, steps[1:])]
    assert all((b >= a - 1e-6).all() for a, b in zip(steps, steps[1:])) and max(moves) < 2.5 * np.median(moves)


def test_the_pull_is_the_same_every_time_and_in_strips():
    before, after = (read_photo(SAMPLES[side][6]).pixels for side in ("before", "after"))
    controls = Controls(exposure=0.3, window_pull=0.7)
    first = apply_controls(before, after, controls)
    np.random.seed(3), cv2.setRNGSeed(99)
    assert (apply_controls(before, after, controls) == first).all()
    assert np.abs(first - apply_controls(before, after, Controls(exposure=0.3))).max() > 0.1, "and it does something"


def test_no_windows_no_pull():
    before = scene(120, 180)
    edit = np.sqrt(before)
    assert (apply_controls(before, edit, Controls(window_pull=1)) == edit).all()
    for mask in (np.zeros((120, 180), bool), np.ones((120, 180), bool), np.eye(120, 180, dtype=bool)):
        assert to_edges(mask, before).shape == mask.shape
    assert (apply_controls(before, edit, Controls(window_pull=1), np.zeros((120, 180), bool)) == edit).all()


def test_a_view_that_is_darker_already_is_left_alone():
    before, mask = scene(120, 180), np.zeros((120, 180), bool)
    mask[30:90, 40:120] = True
    edit = before * 0.6
    assert (apply_controls(before, edit, Controls(window_pull=1), mask) == edit).all()


@pytest.mark.parametrize("stored", [{"exposure": 10**400}, {"exposuer": 1}, {"\x1b[2J": 1}, [1], "bright", {"warmth": None, "strength": True}, {"strength": {}}])
def test_a_strangers_controls_are_refused_in_words(stored):
    with pytest.raises(AutohdrError, match="this look stores") as e: from_metadata(dict(controls=stored))
    assert str(e.value).isprintable() and len(str(e.value)) < 600


def test_enhance_turns_before_post_processing_and_the_guard_sees_all(tmp_path, monkeypatch):
    write_photo(tmp_path / "in" / "a.png", Photo(scene(), bit_depth=16))
    seen, after = {}, en.postprocess
    monkeypatch.setattr(en, "postprocess", lambda pixels, steps, strength: seen.update(pixels=pixels) or after(pixels, steps, strength))
    table = enhance(tmp_path / "in", tmp_path / "out", Half(controls=dict(strength=0.5)), exposure=1, steps="saturation", postprocess_strength=0.3)
    before = read_photo(tmp_path / "in" / "a.png").pixels
    assert np.abs(seen["pixels"] - apply_controls(before, 0.5 + before / 2, Controls(0.5, 1))).max() < 1e-6
    assert table.status[0] == "edited"
    edits = {s: read_photo(enhance_photo(tmp_path / "in" / "a.png", tmp_path / f"{s}.png", Half(), strength=s, guard="off")).pixels for s in (0, 0.5, 1)}
    assert (edits[0] == before).all() and np.abs(edits[0.5] - (before + edits[1]) / 2).max() < 2e-5
    assert enhance(tmp_path / "in", tmp_path / "blown", Half(), exposure=2)["flags"][0] != "", "what the controls spoil is flagged, too"


def test_a_warmth_that_was_asked_for_is_no_cast(tmp_path):
    "Neither flagged nor blended back; a cast of the look itself is, whatever was asked for."
    grey = np.repeat(np.random.default_rng(0).uniform(0.2, 0.6, (64, 96, 1)).astype(np.float32), 3, 2)
    grey[:2] *= np.float32([1, 0.7, 0.6])  # no black-and-white photo
    write_photo(tmp_path / "in" / "a.png", Photo(cv2.GaussianBlur(grey, (0, 0), 2), bit_depth=16))
    plain, warm = (enhance(tmp_path / "in", tmp_path / f"{w}", Half(), warmth=w, guard="fix").iloc[0] for w in (0, 1))
    assert plain["flags"] == warm["flags"] == "" and warm["blend"] == 1
    shift = [to_lab(read_photo(row["out"]).pixels)[..., 2].mean() for row in (plain, warm)]
    assert 9 < shift[1] - shift[0] < 15, shift
    yellow = Half(tint=(1, 1, 0.7))
    for w in (0, 1): assert "colour cast" in enhance(tmp_path / "in", tmp_path / f"yellow{w}", yellow, warmth=w)["flags"][0]


@pytest.mark.parametrize("exposure", [0, 1.5])
def test_warmth_changes_nothing_that_the_guard_says_or_does(tmp_path, exposure):
    "Near white, where warmth can't be taken back, and where the guard blends."
    photo = read_photo(SAMPLES.before[3])
    write_photo(tmp_path / "in" / "a.png", Photo(np.clip(photo.pixels * 1.4, 0, 1), bit_depth=16))
    model, before = Half(), read_photo(tmp_path / "in" / "a.png").pixels
    rows = {w: enhance(tmp_path / "in", tmp_path / f"{w}", model, warmth=w, exposure=exposure, window_pull=0.5, guard="fix").iloc[0] for w in (-1, 0, 1)}
    assert len({(row["flags"], row["blend"]) for row in rows.values()}) == 1 and (rows[0]["blend"] < 1) == (exposure > 0)
    plain, warm = (read_photo(rows[w]["out"]).pixels for w in (0, 1))
    if exposure: assert np.abs(warm - apply_controls(plain, plain, Controls(warmth=1))).max() < 1e-3, "the blend, warmed"
    else: assert np.abs(warm - apply_controls(before, 0.5 + before / 2, Controls(warmth=1, window_pull=0.5))).max() < 1e-3, "exactly what was asked for, the view as it was"


def test_a_black_and_white_photo_is_toned_by_request_alone(tmp_path):
    "Not by the tint of a look, not by the warmth that it stores, and not by post-processing."
    grey = np.repeat(cv2.cvtColor(read_photo(SAMPLES.before[3]).pixels, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
    write_photo(tmp_path / "in" / "one.jpg", Photo(grey, grey=True))
    write_photo(tmp_path / "in" / "three.png", Photo(grey))
    tints = Half(tint=(1, 0.95, 0.8), controls=dict(warmth=0.5))
    look = lambda out, **given: [read_photo(p) for p in enhance(tmp_path / "in", tmp_path / out, tints, **given)["out"]]
    for photo, channels in zip(look("plain", listing="folder"), (True, False)):
        assert photo.grey == channels and np.ptp(photo.pixels, axis=2).max() == 0 and photo.pixels.mean() > grey.mean() + 0.1
    for photo in look("toned", warmth=0.5): assert photo.pixels[..., 0].mean() > photo.pixels[..., 2].mean() + 0.02
    for photo in look("blended", guard="fix", exposure=2): assert np.ptp(photo.pixels, axis=2).max() == 0
    table = postprocess_folder(tmp_path / "in", tmp_path / "post", [dict(step="histogram", reference=SAMPLES.after[0])])
    assert all(np.ptp(read_photo(p).pixels, axis=2).max() == 0 for p in table["out"])


def test_wrong_controls_are_refused_before_any_work(tmp_path):
    write_photo(tmp_path / "in" / "a.png", scene())
    for wrong, word in ((dict(strength=2), "0 to 1.5"), (dict(window_pull=-1), "window_pull is -1"), (dict(warmht=0), "warmth")):
        with pytest.raises(AutohdrError, match=word): enhance(tmp_path / "in", tmp_path / "out", Half(), **wrong)
    with pytest.raises(AutohdrError, match="this look stores"): enhance(tmp_path / "in", tmp_path / "out", Half(controls=dict(exposure=7)))
    assert not (tmp_path / "out").exists()


def test_without_a_model_the_base_look_edits_and_says_so(tmp_path, base, capsys):
    write_photo(tmp_path / "a.png", scene())
    assert run("enhance", tmp_path / "a.png", "--out", tmp_path / "out", "--guard", "off") == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("no --model given: using the base look") and "rendered rooms only" in first and "exposure +0.25 EV" in second
    assert run("enhance", tmp_path / "a.png", "--model", base, "--out", tmp_path / "named", "--guard", "off") == 0 and "base look" not in capsys.readouterr().out
    assert run("enhance", tmp_path / "a.png", "--model", "base", "--out", tmp_path / "word", "--guard", "off", "--exposure", "0") == 0 and capsys.readouterr().out.startswith("using the base look")
    a, b, c = ((tmp_path / d / "a.png").read_bytes() for d in ("out", "named", "word"))
    assert a == b != c
    assert run("look", "base") == 0 and "exposure +0.25 EV" in capsys.readouterr().out


def test_a_missing_base_look_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "BASE_LOOK", tmp_path / "nowhere" / "base.safetensors")
    write_photo(tmp_path / "a.png", scene())
    for args in (("enhance", tmp_path / "a.png", "--out", tmp_path / "out"), ("look", "base")):
        assert run(*args) == 1
        err = capsys.readouterr().err
        assert "installed without its base look" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, code, word", [(["--strength", "2"], 2, "--strength"), (["--exposure", "nan"], 2, "--exposure"), (["--window-pull", "-1"], 2, "--window-pull"), (["--warmth", "red"], 2, "--warmth"),
                                              (["--postprocess-strength", "0.5"], 1, "--postprocess,")])
def test_wrong_options(tmp_path, base, capsys, args, code, word):
    write_photo(tmp_path / "a.png", scene())
    assert run("enhance", tmp_path / "a.png", "--out", tmp_path / "out", *args) == code and word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_look_is_changed_to_the_last_bit_as_it_was_but_for_its_defaults(tmp_path, capsys):
    "Also of half precision and of one that lies in a read-only folder."
    look = save_model(create_model("hdrnet", width=8).half(), tmp_path / "old" / "look.safetensors", reference=[[0.1] * 99], note="Küche")
    bytes_of, about = look.read_bytes(), read_metadata(look)
    assert run("look", look, "--exposure", "0.2", "--out", tmp_path / "new" / "look.safetensors") == 0 and "exposure +0.2 EV" in capsys.readouterr().out
    new = tmp_path / "new" / "look.safetensors"
    assert look.read_bytes() == bytes_of and read_metadata(new) == about | dict(controls=to_json(Controls(exposure=0.2)))
    a, b = load_file(look), load_file(new)
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    stem = lambda file: file.read_bytes()[8 + int.from_bytes(file.read_bytes()[:8], "little"):]
    assert stem(look) == stem(new) and (int.from_bytes(new.read_bytes()[:8], "little")) % 8 == 0
    assert run("look", look, "--exposure", "0.2") == 1 and "--out" in capsys.readouterr().err
    assert run("look", look, "--warmth", "0.2", "--out", new) == 1 and "there already" in capsys.readouterr().err
    assert run("look", new, "--warmth", "0.2", "--out", new) == 0 and read_metadata(new)["controls"] == to_json(Controls(exposure=0.2, warmth=0.2))
    link = tmp_path / "link.safetensors"
    link.symlink_to(look)
    with_controls(link, link, strength=0.8)
    assert look.read_bytes() == bytes_of and "strength 80%" in card(link), "a link is replaced, and what it led to stays"


def test_a_card_runs_nothing(tmp_path):
    "The card of a file with a huge model in its configuration comes at once, and without making that model."
    look = save_model(create_model("hdrnet", width=8), tmp_path / "look.safetensors")
    import autohdr.learn.card as c
    about = read_metadata(look) | dict(architecture="restormer", config=dict(dim=10**9), base="\x1b]0;owned\x07")
    c._rewrite(look, tmp_path / "huge.safetensors", about)
    told = card(tmp_path / "huge.safetensors")
    assert "restormer" in told and "\x1b" not in told and "\x07" not in told
    for bad in (tmp_path / "none.safetensors", Path(__file__)):
        with pytest.raises(AutohdrError, match=bad.name): card(bad)
