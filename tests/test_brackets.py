"""Rendered rooms at several exposures are told apart and merged: the right frames together, laid on each other, nothing doubled, the view kept."""
import fcntl
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from autohdr.cli import main
from autohdr.data import scenes
from autohdr.data.alignment import Motion, distance, luma
from autohdr.data.brackets import find_motions, fuse, merge, merge_files, merge_frames, photograph, radiance, sample_light, tone_curve, write_sample_frames
from autohdr.data.exposures import group_frames, read_frames
from autohdr.data.pairs import scan_pairs
from autohdr.data.samples import GREY, encode, sample_pairs, solve
from autohdr.photo import Photo, find_photos, read_photo, write_photo

HOUSE = Path(__file__).parent.parent.parent / "shared/data/brackets/house"
cv2.setNumThreads(1)


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    "Ten views in linear light, rendered once for all processes that test."
    if not scenes.has_mitsuba():
        assert not os.environ.get("CI"), "CI renders: install the extra 'scenes'"
        pytest.skip("the extra 'scenes' (Mitsuba) is not installed")
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "rooms.pickle"
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            shots = [scenes.render_room(seed, view, 144, spp=4) for seed, view in [(1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (4, 0), (5, 2), (6, 0), (7, 1), (9, 0)]]
            file.write_bytes(pickle.dumps(shots))
    return pickle.loads(file.read_bytes())


@pytest.fixture(scope="session")
def fifty():
    "The light of 50 of the rendered rooms that come with the package, several views of each property among them; the panes three stops brighter than in the edit."
    pairs = sample_pairs(faults=True)
    return [sample_light(r, 144)[0] for r in pairs[pairs.fault.isin(["", "inverse_gamma", "blur"])].itertuples()][:50]


def metered(hdr):
    "The exposure that a camera would choose, in stops."
    return np.log2(solve(lambda k: (encode(np.clip(hdr * k, 0, 1)) @ GREY).mean(), 0.42, 1e-4, 1e3))


def shoot(lights, rng, degrees, reach=3.0):
    "(number of the view, stops, frame) of a bracket of 3 to 7 frames per view, up to `reach` stops either way, each shifted by up to four pixels."
    for i, light in enumerate(lights):
        for stops in np.linspace(-reach, reach, int(rng.integers(3, 8))):
            yield i, stops, photograph(light, metered(light) + stops, *rng.uniform(-4, 4, 2), rng.uniform(-degrees, degrees), seed=int(rng.integers(1e6)))


def exif(seconds, stops):
    "EXIF data of a frame taken so many seconds after noon."
    out = Image.Exif()
    out[272] = "Test 1"
    whole = int(seconds)
    time = f"2024:05:01 {12 + whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
    out.get_ifd(0x8769).update({36867: time, 37521: f"{seconds % 1:.2f}"[2:], 33434: 2.0 ** (stops - 6), 33437: 8.0, 34855: 100})
    return out.tobytes().removeprefix(b"Exif\0\0")


def assert_grouped(folder, truth):
    "The groups of a folder are those of `truth`, {file name: number of the view}."
    table = group_frames(read_frames(folder))
    found = table.groupby("group").name.agg(frozenset)
    expected = pd.Series(truth).groupby(truth).agg(lambda names: frozenset(names.index))
    assert set(found) == set(expected), f"{len(set(found) - set(expected))} groups of {len(expected)} are wrong"
    return table


def shuffle(frames, rng, folder):
    "Write frames under names that say nothing; {file name: number of the view}."
    truth = {}
    for name, j in enumerate(rng.permutation(len(frames))):
        i, _, frame = frames[j]
        write_photo(folder / f"{name:04}.jpg", frame / np.float32(255))
        truth[f"{name:04}.jpg"] = i
    return truth


@pytest.mark.parametrize("degrees", [0.3, 2.0], ids=["tripod", "hand-held"])
def test_fifty_shuffled_scenes_without_exif(fifty, tmp_path, degrees):
    rng = np.random.default_rng(int(degrees * 10))
    assert len(fifty) == 50
    table = assert_grouped(tmp_path, shuffle(list(shoot(fifty, rng, degrees)), rng, tmp_path))
    assert (table.ev_from == "pixels").all() and not table.problem.any()


def test_frames_that_are_all_white_are_left_out_rather_than_mixed_up(fifty, tmp_path):
    "Four stops over, 98% of a room is white. Such a frame may be lost, and no group may hold another view's."
    rng = np.random.default_rng(7)
    truth = shuffle(list(shoot(fifty, rng, 1.0, reach=4.0)), rng, tmp_path)
    table = group_frames(read_frames(tmp_path))
    table["view"] = table.name.map(truth)
    assert table[table.group != ""].groupby("group").view.nunique().max() == 1
    single = table[table.group == ""]
    lost = [g for g, problem in zip(single.grey, single.problem) if not problem.startswith("pair")]
    assert len(single) <= 8 and all(not 0.06 < g.mean() < 0.9 for g in lost), "and, of three frames, the two that are left"


@pytest.mark.parametrize("of", ["samples", "rendered"])
def test_scenes_with_exif(request, of, tmp_path):
    lights = request.getfixturevalue("fifty") if of == "samples" else [shot.hdr for shot in request.getfixturevalue("rooms")]
    rng, truth = np.random.default_rng(1), {}
    frames, clock, last = list(shoot(lights, rng, 1.0, 4.0)), 0.0, 0
    for number, j in zip(rng.permutation(len(frames)), range(len(frames))):
        i, stops, frame = frames[j]
        clock, last = clock + (12 if i != last else 0.7), i  # the next room is twelve seconds away, no pause that would tell
        write_photo(tmp_path / f"{number:04}.jpg", Photo(frame / np.float32(255), exif=exif(clock, stops)))
        truth[f"{number:04}.jpg"] = i
    table = assert_grouped(tmp_path, truth)
    assert (table.ev_from == "exif").all() and not table.problem.any()


def test_rendered_rooms_without_exif(rooms, tmp_path):
    rng = np.random.default_rng(3)
    assert_grouped(tmp_path, shuffle(list(shoot([shot.hdr for shot in rooms], rng, 2.0)), rng, tmp_path))


def test_two_brackets_of_one_view_and_a_turned_camera(rooms, tmp_path):
    hdr, truth = rooms[0].hdr, {}
    for b, (dx, degrees) in enumerate([(0, 0), (3, 0.5), (-4, 3.0)]):
        for k, stops in enumerate((-2, 0, 2)):
            number, seconds = 3 * b + k, 3 * b + k + 0.5
            frame = photograph(hdr, metered(hdr) + stops, dx, 1, degrees + 0.5 * k, seed=number) / np.float32(255)
            write_photo(tmp_path / "with" / f"IMG_{number + 8}.jpg", Photo(frame, exif=exif(seconds, stops)))
            write_photo(tmp_path / "without" / f"IMG_{number + 8}.jpg", frame)  # IMG_8, IMG_9, IMG_10: names sort as numbers
            truth[f"IMG_{number + 8}.jpg"] = b
    for folder in ("with", "without"):
        assert_grouped(tmp_path / folder, truth)


def test_singles_and_pairs_stay_single(rooms, tmp_path):
    for i, (shot, evs) in enumerate(zip(rooms[3:6], [(0,), (-1, 1), (-2, 0, 2)])):
        for ev in evs:
            write_photo(tmp_path / f"{i}_{ev}.jpg", photograph(shot.hdr, metered(shot.hdr) + ev) / np.float32(255))
    table = group_frames(read_frames(tmp_path)).set_index("name")
    assert set(table.index[table.group != ""]) == {"2_-2.jpg", "2_0.jpg", "2_2.jpg"}
    assert table.problem["0_0.jpg"] == "" and table.problem["1_1.jpg"].startswith("pair: only 2 exposures")


@pytest.fixture(scope="session")
def views(rooms):
    "Rooms with a large window, as they come."
    return [shot for shot in rooms if (shot.window > 0.9).mean() > 0.02][:5]


def bracket(shot, stops=(-4, -2, 0, 2), moves=None, size=480):
    "Frames of a scene, enlarged so that there is room for motions."
    hdr = cv2.resize(shot.hdr, (size, size * 2 // 3), interpolation=cv2.INTER_LINEAR)
    moves = moves or [(0, 0, 0)] * len(stops)
    return [photograph(hdr, metered(shot.hdr) + ev, *m, seed=i) for i, (ev, m) in enumerate(zip(stops, moves))]


def test_known_motions_are_found(views):
    rng, errors = np.random.default_rng(5), []
    for shot in views:
        moves = [(*rng.uniform(-10, 10, 2), rng.uniform(-2, 2)) if k != 2 else (0, 0, 0) for k in range(4)]
        frames = bracket(shot, moves=moves)
        for found, (dx, dy, degrees) in zip(find_motions(frames, 2), moves):
            errors.append(distance(found, Motion(dx, dy, degrees, 1.0, 1.0, *frames[0].shape[:2])))
    assert np.median(errors) < 0.3 and max(errors) < 1.5, f"error at the corners, px: {np.round(errors, 2)}"


def test_a_tripod_shot_keeps_every_pixel(views):
    frames = bracket(views[0])
    kept = [f.copy() for f in frames]
    merge_frames(frames, 2)
    assert all(np.array_equal(a, b) for a, b in zip(frames, kept))


def detail(pixels, where):
    grey = luma(pixels)
    gradient = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return gradient[where].mean() / grey[where].mean()


@pytest.mark.parametrize("method", ["fusion", "radiance"])
def test_the_view_is_kept_and_the_room_is_bright(views, method):
    kept, alike = [], []
    for shot in views:
        frames = [f / np.float32(255) for f in bracket(shot, (-6, -4, -2, 0, 2))]
        window = cv2.erode((cv2.resize(shot.window, frames[0].shape[1::-1]) > 0.95).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        room = cv2.resize(shot.window, frames[0].shape[1::-1]) < 0.05
        out = merge_frames([np.rint(f * 255).astype(np.uint8) for f in frames], 3, method=method).pixels
        whole = [f for f in frames if (f.max(-1)[window] > 0.98).mean() < 0.02]
        best = min(whole, key=lambda f: abs(f[window].mean() - 0.5))
        kept.append(detail(out, window) / detail(best, window))
        alike.append(np.corrcoef(luma(out)[window], luma(best)[window])[0, 1])
        assert (out.min(-1)[window] > 0.98).mean() < 0.02, "the view is clipped"
        assert 0.3 < luma(out)[window].mean() < 0.9 and luma(out)[room].mean() > 0.4
    print(method, "detail in the view:", np.round(kept, 2), "correlation:", np.round(alike, 3))
    assert min(alike) > 0.65 and np.median(alike) > 0.8 and min(kept) > 0.3, f"of the best frame's detail {np.round(kept, 2)}, correlation {np.round(alike, 2)}"


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_what_moved_is_flagged_and_not_doubled(views, at):
    frames = bracket(views[1], moves=[(2, -1, 0.3), (1, 2, -0.2), (0, 0, 0), (-2, 1, 0.4)])
    clean = merge_frames([f.copy() for f in frames], 2)
    assert not clean.ghosts.any() and not clean.regions, "nothing moved"
    h, w = frames[0].shape[:2]
    box = (slice(h // 2, h // 2 + 70), slice(w // 4, w // 4 + 40))
    grey = luma(frames[at] / np.float32(255))[box].mean()
    frames[at][box] = (225, 215, 205) if grey < 0.35 else (25, 20, 40)
    merged = merge_frames([f.copy() for f in frames], 2)
    inside = merged.ghosts[box].mean()
    assert inside > 0.9 and merged.ghosts.mean() < 0.1 and len(merged.regions) == 1
    source = merged.regions[0][0]
    if source != at:
        around = (slice(box[0].start - 12, box[0].stop + 12), slice(box[1].start - 12, box[1].stop + 12))
        apart = np.abs(merged.pixels - clean.pixels)[around].mean(-1)
        assert apart.mean() < 0.06 and np.percentile(apart, 99) < 0.15, "the figure, or its outline, shows through"


@pytest.mark.parametrize("method", ["fusion", "radiance"])
def test_sixteen_bits_are_used(views, method):
    frames = bracket(views[0])
    eight = merge_frames([f.copy() for f in frames], 2, method=method, brightness=0).pixels
    sixteen = merge_frames([f.astype(np.uint16) * 257 for f in frames], 2, method=method, brightness=0).pixels
    assert np.abs(eight - sixteen).mean() < 2e-3
    fine = np.round(np.linspace(20000, 22000, 320 * 240)).reshape(240, 320, 1).repeat(3, 2).astype(np.uint16)
    levels = fuse([fine, fine, fine])[..., 0]
    assert len(np.unique(np.rint(levels * 65535))) > 1000, "more than 8 bits can hold"


def test_radiance_is_the_light(views):
    shot = views[2]
    frames = bracket(shot, (-6, -4, -2, 0, 2), size=240)
    level, _ = radiance(frames, [-6, -4, -2, 0, 2], tone_curve(frames, [-6, -4, -2, 0, 2]))
    truth = np.log2(np.maximum(cv2.resize(shot.hdr, level.shape[::-1], interpolation=cv2.INTER_LINEAR) @ GREY, 1e-5))
    seen = (truth > np.percentile(truth, 3)) & (truth < np.percentile(truth, 99))
    off = (level - truth)[seen]
    assert np.corrcoef(level[seen], truth[seen])[0, 1] > 0.97 and np.std(off) < 0.5


def test_formats_and_metadata(views, tmp_path):
    frames = bracket(views[0])
    for i, f in enumerate(frames):
        write_photo(tmp_path / f"in/{i}.tif", Photo(f / np.float32(255), exif=exif(i, 2 * i), bit_depth=16))
    merge_files(sorted((tmp_path / "in").iterdir()), 2, tmp_path / "2.tif")
    out, reference = read_photo(tmp_path / "2.tif"), read_photo(tmp_path / "in/2.tif")
    assert out.bit_depth == 16 and out.exif == reference.exif and out.pixels.shape == reference.pixels.shape


def test_folder_with_all_that_can_go_wrong(tmp_path):
    source, out = tmp_path / "frames", tmp_path / "out"
    write_sample_frames(source / "a")
    write_sample_frames(source / "b", 1)
    for p in sorted((source / "b").iterdir())[1:]:
        pixels = read_photo(p).pixels[:, ::-1]
        write_photo(p, pixels if p.stem != "IMG_0003" else cv2.resize(pixels, None, fx=0.5, fy=0.5))
    (source / "b/IMG_0000.jpg").write_bytes((source / "b/IMG_0000.jpg").read_bytes()[:999])
    table, _ = merge(source, out)
    merged = sorted(p.relative_to(out).as_posix() for p in find_photos(out))
    assert merged == sorted(table[table.status == "merged"].drop_duplicates("group").out.map(lambda p: Path(p).relative_to(out).as_posix())) and len(merged) == 2
    assert (table.status == "failed").any() and table.problem[table.name == "b/IMG_0000.jpg"].iloc[0]
    mixed = table[table.problem.str.startswith("mixed sizes")]
    assert len(mixed) == 3 and all(text in mixed.problem.iloc[0] for text in ("b/IMG_0003.jpg is ", "b/IMG_0002.jpg is "))
    assert table.ghosts[table.group == table.group[table.name == "a/IMG_0001.jpg"].iloc[0]].max() > 0, "the figure that walks through"


def test_command(tmp_path):
    source, out, csv = tmp_path / "frames", tmp_path / "out", tmp_path / "pairs.csv"
    write_sample_frames(source)
    main_ok(["merge", str(source), "--out", str(out), "--pairs", str(csv)])
    assert len(find_photos(out)) == 2 and (out / "report/report.html").exists() and len(pd.read_csv(out / "report/brackets.csv")) == 8
    pairs, problems = scan_pairs(csv)
    assert len(pairs) == 2 and not len(problems)
    assert all(Path(b).name == Path(a).name for b, a in zip(pairs.before, pairs.after))
    before = {p: p.read_bytes() for p in find_photos(out)}
    main_ok(["merge", str(source), "--out", str(out), "--strict"])  # as after a kill: what is there, made of the same frames in the same way, stays
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(source), "--out", str(out), "--strict", "--method", "radiance"])
    assert stop.value.code == 1 and pd.read_csv(out / "report/problems.csv").problem.str.contains("not made of these frames in this way").sum() == 2
    assert before == {p: p.read_bytes() for p in find_photos(out)}, "nothing is replaced unasked"
    for photo in before:
        write_photo(tmp_path / "edits" / photo.name, read_photo(photo).pixels ** 0.8)
    (tmp_path / "edits").joinpath(next(iter(before)).name).unlink()
    (source / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(source), "--out", str(out), "--pairs", str(csv), "--role", "before", "--edits", str(tmp_path / "edits"), "--overwrite", "--strict"])
    assert stop.value.code == 1
    problems = pd.read_csv(out / "report/problems.csv").problem
    assert problems.str.contains("no edit of the name").sum() == 1 and problems.str.contains("broken.jpg").sum() == 1
    assert len(scan_pairs(csv)[0]) == 1


def main_ok(args):
    try:
        main(args)
    except SystemExit as stop:
        assert not stop.code, args


def test_the_house(tmp_path):
    if not HOUSE.is_dir():
        pytest.skip("../shared/data, photographs that may not be redistributed, is not here")
    for method in ("fusion", "radiance"):
        table, details = merge(HOUSE, tmp_path / method, method)
        assert list(table.group) == ["C"] * 4 and list(table.status) == ["merged"] * 4 and list(table.position) == [0, 1, 2, 3]
        assert not details["C"].regions and table["shift"].max() < 1, "a tripod, and nothing that moved"
        out = read_photo(tmp_path / method / "C.jpg").pixels
        garden, shelf = out[150:280, 500:580], out[60:440, 20:230]
        assert (garden.min(-1) > 0.98).mean() < 0.05 and luma(garden).std() > 0.08 and 0.5 < luma(out).mean() < 0.62 and luma(shelf).mean() > 0.35


def test_nothing_of_the_user_s_is_overwritten(tmp_path):
    source, out, edits = tmp_path / "frames", tmp_path / "out", tmp_path / "edits"
    write_sample_frames(source)
    for p in find_photos(source):
        write_photo(edits / p.name, read_photo(p).pixels)
    photo = find_photos(source)[0]
    before = {p: p.read_bytes() for p in [*find_photos(source), *find_photos(edits)]}
    for more in (["--out", out, "--pairs", photo], ["--out", out, "--pairs", source / "t.csv"], ["--out", edits, "--edits", edits, "--role", "before"], ["--out", source / "merged"]):
        with pytest.raises(SystemExit) as stop:
            main(["merge", str(source), "--overwrite", *map(str, more)])
        assert stop.value.code == 1, more
    assert before == {p: p.read_bytes() for p in [*find_photos(source), *find_photos(edits)]} and not out.exists()


def test_two_files_of_a_shot_and_two_brackets_of_one_name(fifty, tmp_path):
    views = [[photograph(light, metered(light) + stops, seed=i) / np.float32(255) for stops in (-2, 0, 2)] for i, light in enumerate(fifty[:2])]
    for i, frames in enumerate(zip(*views)):
        write_photo(tmp_path / f"both/{i}.jpg", frames[0])
        write_photo(tmp_path / f"both/{i}.tif", frames[0])
        write_photo(tmp_path / f"names/{i}.jpg", frames[0])
        write_photo(tmp_path / f"names/{i}.png", frames[1])
    table = group_frames(read_frames(tmp_path / "both"))
    assert table[table.group != ""].name.tolist() == ["0.tif", "1.tif", "2.tif"] and (table.role == "twin").sum() == 3 and (table.problem == "").all()
    table = group_frames(read_frames(tmp_path / "names"))
    assert set(table.groupby("group").name.agg(frozenset)) == {frozenset(f"{i}{s}" for i in range(3)) for s in (".jpg", ".png")}


def test_exif_that_is_wrong(fifty, tmp_path):
    "Copied from one frame to all, or the wrong way round: the pixels know better."
    for place, stops_in_exif in (("equal", (0, 0, 0)), ("reversed", (2, 0, -2))):
        for i, (stops, told) in enumerate(zip((-2, 0, 2), stops_in_exif)):
            frame = photograph(fifty[0], metered(fifty[0]) + stops, seed=i)
            write_photo(tmp_path / place / f"{i}.jpg", Photo(frame / np.float32(255), exif=exif(i, told)))
        table = group_frames(read_frames(tmp_path / place))
        assert table.group.nunique() == 1 and (table.ev_from == "pixels").all() and table.sort_values("position").name.tolist() == ["0.jpg", "1.jpg", "2.jpg"], table


def test_a_frame_without_its_time_is_missed(fifty, tmp_path):
    for i, stops in enumerate((-3, -1, 1, 3)):
        frame = photograph(fifty[0], metered(fifty[0]) + stops, seed=i)
        write_photo(tmp_path / f"{i}.jpg", Photo(frame / np.float32(255), exif=exif(i, stops) if i != 2 else b""))
    table = group_frames(read_frames(tmp_path)).set_index("name")
    assert table.group["2.jpg"] == "" and table.problem["2.jpg"].startswith("left over: shows the view of") and (table.group.drop("2.jpg") != "").all()


def test_somebody_walks_through_a_timed_bracket(fifty, tmp_path):
    light = fifty[0]
    for i, stops in enumerate((-3, -1, 1, 3)):
        frame = photograph(light, metered(light) + stops, seed=i)
        frame = frame / np.float32(255)
        frame[20:90, 10 + 30 * i:24 + 30 * i] = 0.1 + 0.1 * i
        write_photo(tmp_path / f"{i}.jpg", Photo(frame, exif=exif(i, stops)))
    assert group_frames(read_frames(tmp_path)).group.nunique() == 1
