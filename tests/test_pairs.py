"Pairs: what does not fit the notebook - properties of the assignments for any table, worker processes, awkward files and names."
import shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from autohdr.core import AutohdrError
from autohdr.data.pairs import (PairDataset, assign_folds, assign_splits, fingerprint, make_loader, make_table, read_pair, read_pairs, save_pairs,
                                scan_pairs, working_size)
from autohdr.photo import resize, write_photo

SHARED = Path(__file__).resolve().parents[2]/"shared"/"data"/"pairs"

def toy(seed, height=40, width=60): return np.clip(resize(np.random.default_rng(seed).random((5, 7, 3), dtype=np.float32), height, width), 0, 1)

def write_pairs(folder, names, height=40, width=60):
    for i, name in enumerate(names):
        write_photo(folder/"before"/f"{name}.png", toy(i, height, width) * 0.5)
        write_photo(folder/"after"/f"{name}.png", toy(i, height, width))
    return folder

def table(sizes, start=0):
    "One property per number, with so many pairs."
    props = [f"p{start + i}" for i, n in enumerate(sizes) for _ in range(n)]
    return pd.DataFrame(dict(name=[f"{p}-{i}" for i, p in enumerate(props, 1000 * start)], property=props))

stages = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=12), min_size=1, max_size=4)

@settings(deadline=None, max_examples=40)
@given(stages, st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_folds_never_move_never_split_a_property_never_stay_empty(stages, k, seed, single):
    now, start = pd.DataFrame(dict(name=[], property=[])), 0
    for sizes in stages:
        if single: sizes = [1] * len(sizes)
        added = pd.concat([now, table(sizes, start)], ignore_index=True)
        start += len(sizes)
        if start < k:
            with pytest.raises(AutohdrError, match="properties"): assign_folds(added, k, seed)
            now = added
            continue
        new = assign_folds(added, k, seed)
        if "fold" in now: assert new.fold[:len(now)].tolist() == now.fold.tolist()
        assert (new.groupby("property").fold.nunique() == 1).all()
        assert set(new.fold) == set(range(k))
        counts = new.fold.value_counts()
        if single: assert counts.max() - counts.min() <= 1
        now = new

@settings(deadline=None, max_examples=40)
@given(stages, st.integers(0, 99), st.sampled_from([(.8, .1, .1), (.5, .25, .25), (.34, .33, .33), (.98, .01, .01)]))
def test_splits_never_move_never_split_a_property_never_stay_empty(stages, seed, fractions):
    now, start = pd.DataFrame(dict(name=[], property=[])), 0
    for sizes in stages:
        added = pd.concat([now, table(sizes, start)], ignore_index=True)
        start += len(sizes)
        new = assign_splits(added, fractions, seed)
        assert new.split[:len(now)].tolist() == (now.split.tolist() if "split" in now else [])
        assert (new.groupby("property").split.nunique() == 1).all()
        if start >= 3: assert set(new.split) == {"train", "val", "test"}
        now = new

@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=5, max_size=30), st.integers(0, 9), st.randoms())
def test_assignments_do_not_depend_on_the_order_of_rows(sizes, seed, random):
    first = table(sizes)
    order = list(range(len(first)))
    random.shuffle(order)
    for assign in (assign_splits, assign_folds):
        a, b = assign(first, seed=seed), assign(first.iloc[order], seed=seed)
        assert a.sort_values("name").iloc[:, 2:].values.tolist() == b.sort_values("name").iloc[:, 2:].values.tolist()

@settings(deadline=None, max_examples=40)
@given(st.integers(3, 700), st.integers(0, 20))
def test_splits_have_the_sizes_asked_for(n, seed):
    counts = assign_splits(table([1] * n), (.8, .1, .1), seed).split.value_counts()
    for split, fraction in (("train", .8), ("val", .1), ("test", .1)): assert abs(counts[split] - fraction * n) < 1.5

def test_a_seed_changes_the_assignment_and_the_same_seed_does_not():
    t = table([1] * 40)
    assert assign_folds(t, seed=1).fold.tolist() == assign_folds(t, seed=1).fold.tolist() != assign_folds(t, seed=2).fold.tolist()

def test_an_assignment_is_the_same_on_every_machine():
    "Written down, so that a change of the method, or of Python, cannot move a studio's test photos unnoticed."
    t = assign_folds(assign_splits(table([1] * 10)))
    assert t.split.tolist() == ['train', 'train', 'train', 'val', 'train', 'test', 'train', 'train', 'train', 'train']
    assert t.fold.tolist() == [1, 2, 1, 3, 0, 4, 4, 2, 0, 3]

cell = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=8).map(str.strip)

@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(cell, cell, st.integers(-9, 9), st.floats(allow_nan=False, allow_infinity=False), st.booleans()), min_size=1, max_size=6))
def test_a_table_survives_the_csv(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("csv")
    t = pd.DataFrame([dict(name=f"{i} {r[0]}".strip(), before=f"/a/b/{i}.png", after=f"/a/c/{i}.png", property=r[1], split="", fold=i, height=3, width=4,
                           note=f"_{r[0]}", count=r[2], value=r[3], flag=r[4]) for i, r in enumerate(rows)])
    pd.testing.assert_frame_equal(read_pairs(save_pairs(t, folder/"t.csv")), t)

def test_a_folder_can_be_moved_with_its_table(tmp_path):
    write_pairs(tmp_path/"here", ["Küche, groß", "NA", "007", "a.b"])
    pairs, problems = make_table(tmp_path/"here", tmp_path/"here"/"pairs.csv", k=2)
    assert problems.empty and sorted(pairs.name) == sorted(["Küche, groß", "NA", "007", "a.b"])
    shutil.move(tmp_path/"here", tmp_path/"there")
    moved = read_pairs(tmp_path/"there"/"pairs.csv")
    assert all(Path(p).exists() for p in [*moved.before, *moved.after])
    assert (moved.drop(columns=["before", "after"]) == pairs.drop(columns=["before", "after"])).all().all()
    assert len(scan_pairs(tmp_path/"there"/"pairs.csv")[0]) == 4

def test_the_fingerprint_is_of_contents(tmp_path):
    a, _ = scan_pairs(write_pairs(tmp_path/"a", "123"))
    b, _ = scan_pairs(shutil.copytree(tmp_path/"a", tmp_path/"b"))
    assert fingerprint(a) == fingerprint(b)
    write_photo(tmp_path/"b"/"after"/"2.png", toy(77))
    assert fingerprint(a) != fingerprint(b)

@pytest.mark.parametrize("names", [("before", "after"), ("INPUT", "Target"), ("src", "tar"), ("raw", "edited")])
def test_known_folder_names(tmp_path, names):
    write_pairs(tmp_path/"x", "12")
    for old, new in zip(("before", "after"), names): (tmp_path/"x"/old).rename(tmp_path/"x"/f"{new} tmp").rename(tmp_path/"x"/new)
    assert list(scan_pairs(tmp_path/"x")[0].name) == ["1", "2"]

def test_endings_inside_known_folders(tmp_path):
    for i in range(3):
        write_photo(tmp_path/"before"/f"{i}_src.png", toy(i) * 0.5)
        write_photo(tmp_path/"after"/f"{i}_tar.png", toy(i))
    pairs, problems = scan_pairs(tmp_path)
    assert list(pairs.name) == ["0", "1", "2"] and problems.empty

def test_a_csv_with_faults_of_every_kind(tmp_path):
    write_pairs(tmp_path, "1234")
    (tmp_path/"before"/"2.png").write_bytes(b"")
    (tmp_path/"before"/"3.png").write_bytes((tmp_path/"before"/"3.png").read_bytes()[:-40])
    (tmp_path/"t.csv").write_text("name,before,after\nok,before/1.png,after/1.png\nempty,before/2.png,after/2.png\ncut,before/3.png,after/3.png\n"
                                  "gone,before/9.png,after/4.png\nblank,,after/4.png\ntwice,before/4.png,after/4.png\ntwice,before/4.png,after/1.png\n")
    pairs, problems = scan_pairs(tmp_path/"t.csv")
    assert list(pairs.name) == ["ok"]
    assert dict(zip(problems.name, problems.reason.str.split(":").str[0])) == dict(
        empty="unreadable", cut="unreadable", gone="missing", blank="missing", twice="ambiguous")
    assert len(problems) == 6 and not problems.kept.any()

def test_the_pair_that_was_there_first_stays(tmp_path):
    write_pairs(tmp_path, "567")
    make_table(tmp_path, tmp_path/"t.csv", k=3)
    for side in ("before", "after"): shutil.copy(tmp_path/side/"6.png", tmp_path/side/"0.png")
    pairs, problems = make_table(tmp_path, tmp_path/"t.csv", k=3)
    assert list(pairs.name) == ["5", "6", "7"] and list(problems.name) == ["0"] and "duplicate" in problems.reason[0]

def test_a_new_pair_that_shares_a_photo_goes_where_its_twin_is(tmp_path):
    write_pairs(tmp_path, "123456")
    first, _ = make_table(tmp_path, tmp_path/"t.csv", k=3)
    for twin in "123":  # three new befores with the afters of old pairs
        write_photo(tmp_path/"before"/f"new{twin}.png", toy(50 + int(twin)))
        shutil.copy(tmp_path/"after"/f"{twin}.png", tmp_path/"after"/f"new{twin}.png")
    second, problems = make_table(tmp_path, tmp_path/"t.csv")
    second = second.set_index("name")
    for twin in "123": assert (second.loc[f"new{twin}", ["split", "fold", "property"]] == second.loc[twin, ["split", "fold", "property"]]).all()
    assert second.loc[first.name, "fold"].tolist() == first.fold.tolist()
    assert sorted(problems.name) == ["new1", "new2", "new3"] and problems.kept.all() and problems.reason.str.startswith("shared").all()

def test_photos_of_one_house_stay_together_when_it_grows(tmp_path):
    write_pairs(tmp_path, [f"h{h}-{i}" for h in range(6) for i in range(2)])
    first, _ = make_table(tmp_path, tmp_path/"t.csv", property_from=r"^(h\d)-", k=3)
    write_pairs(tmp_path, [f"h{h}-{i}" for h in range(8) for i in range(3)])
    second, _ = make_table(tmp_path, tmp_path/"t.csv", property_from=r"^(h\d)-")
    assert len(second) == 24 and (second.groupby("property")[["split", "fold"]].nunique() == 1).all().all()
    old = second.set_index("name").loc[first.name]
    assert old.fold.tolist() == first.fold.tolist() and old.split.tolist() == first.split.tolist() and set(second.fold) == {0, 1, 2}

@settings(deadline=None, max_examples=25)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(6, 64))
def test_items_have_the_size_that_is_foretold(tmp_path_factory, height, width, size):
    file = write_photo(tmp_path_factory.mktemp("size")/"x.jpg", toy(1, height, width))
    pairs = pd.DataFrame([dict(name="x", before=str(file), after=str(file))])
    for squash in (False, True):
        ds = PairDataset(pairs, size, squash=squash)
        assert ds[0]["before"].shape[1:] == ds.shapes()[0] == working_size(height, width, size, squash)

def test_an_upright_photo_is_upright_everywhere(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    for name, seed in (("b", 1), ("a", 2)): Image.fromarray((toy(seed) * 255).astype(np.uint8)).save(tmp_path/f"{name}.jpg", exif=exif)
    pairs, _ = scan_pairs(pd.DataFrame([dict(before=str(tmp_path/"b.jpg"), after=str(tmp_path/"a.jpg"))]))
    assert (pairs.height[0], pairs.width[0]) == (60, 40)
    assert PairDataset(pairs, 30)[0]["before"].shape == (3, 30, 20) == (3, *PairDataset(pairs, 30).shapes()[0])

def batches(pairs, workers, epochs, **options):
    ds = PairDataset(pairs, 48, crop=24, crop_scale=(.5, 1), flip=True, gamma_jitter=.2, gain_jitter=.1, seed=3, **options)
    loader, out = make_loader(ds, batch_size=4, shuffle=True, workers=workers), {}
    for epoch in epochs:
        ds.set_epoch(epoch)
        out[epoch] = list(loader)
    return out

def test_workers_and_resuming_give_bitwise_the_same_batches(tmp_path):
    pairs, _ = scan_pairs(write_pairs(tmp_path, [str(i) for i in range(10)]))
    alone = batches(pairs, 0, [0, 1, 2])
    others = [batches(pairs, 2, [0, 1, 2]), batches(pairs, 2, [2]), batches(pairs, 0, [1, 2]), batches(pairs, 1, [2], cache=False)]
    for other in others:
        for epoch in other:
            assert len(other[epoch]) == 3
            for a, b in zip(alone[epoch], other[epoch]):
                assert a["name"] == b["name"] and torch.equal(a["before"], b["before"]) and torch.equal(a["after"], b["after"])
    assert not torch.equal(alone[0][0]["before"], alone[1][0]["before"])

def test_loading_leaves_the_global_random_numbers_alone(tmp_path):
    pairs, _ = scan_pairs(write_pairs(tmp_path, "1234"))
    for workers in (0, 1):
        torch.manual_seed(0)
        np.random.seed(0)
        batches(pairs, workers, [0])
        assert torch.equal(torch.rand(2), torch.manual_seed(0) and torch.rand(2)) and np.random.rand() == np.random.RandomState(0).rand()

def test_flips_and_jitter_do_not_move_the_crops(tmp_path):
    pairs, _ = scan_pairs(write_pairs(tmp_path, "1234"))
    plain = PairDataset(pairs, 48, crop=16)
    rich = PairDataset(pairs, 48, crop=16, gamma_jitter=.3, gain_jitter=.3)
    for i in range(4): assert torch.equal(plain[i]["after"], rich[i]["after"]) and not torch.equal(plain[i]["before"], rich[i]["before"])

def test_jitter_has_the_spread_asked_for(tmp_path):
    write_photo(tmp_path/"b.png", np.full((8, 8, 3), .5, np.float32))
    ds = PairDataset(pd.DataFrame([dict(name="x", before=str(tmp_path/"b.png"), after=str(tmp_path/"b.png"))]), 8, gain_jitter=.1)
    gains = []
    for epoch in range(400):
        ds.set_epoch(epoch)
        gains.append(np.log(ds[0]["before"][:, 0, 0].numpy() / ds[0]["after"][:, 0, 0].numpy()))
    assert abs(np.mean(gains)) < .01 and .09 < np.std(gains) < .11

def test_scores_are_taken_on_what_the_validation_sees(tmp_path):
    pairs, _ = scan_pairs(write_pairs(tmp_path, "12", 90, 120))
    for size, squash in ((None, False), (50, False), (64, True)):
        before, after, _ = read_pair(pairs.iloc[1], size, squash)
        item = PairDataset(pairs, size, squash=squash)[1]
        assert (item["before"].permute(1, 2, 0).numpy() == before).all() and (item["after"].permute(1, 2, 0).numpy() == after).all()

def test_the_memory_limit_is_kept(tmp_path):
    pairs, _ = scan_pairs(write_pairs(tmp_path, "1234", 400, 600))  # 2 x 720 kB at full size
    ds = PairDataset(pairs, None, cache_mb=3).preload()
    assert len(ds.kept) == 2
    for i in range(4): assert ds[i]["before"].shape == (3, 400, 600)
    assert len(ds.kept) == 2

def test_windows_come_with_the_pairs(tmp_path):
    write_pairs(tmp_path, "12")
    mask = np.zeros((20, 30, 3), np.float32)
    mask[:, :10] = 1  # smaller than the photo
    write_photo(tmp_path/"windows"/"2.png", mask)
    pairs, problems = scan_pairs(tmp_path)
    assert problems.empty and [bool(w) for w in pairs.window] == [False, True]
    ds = PairDataset(pairs, 60, windows=True)
    assert ds[0]["window"].shape == (1, 40, 60) and ds[0]["window"].sum() == 0 and abs(ds[1]["window"].mean() - 1/3) < .03
    assert read_pair(pairs.iloc[0])[2] is None and read_pair(pairs.iloc[1])[2][:, :18].all() and not read_pair(pairs.iloc[1])[2][:, 22:].any()

@pytest.mark.skipif(not SHARED.is_dir(), reason="the real photographs in ../shared/data are not here")
def test_real_pairs():
    pairs, problems = scan_pairs(SHARED)
    assert len(pairs) == 10 and problems.empty and (pairs[["height", "width"]] == 512).all().all()
    assert assign_folds(pairs).fold.value_counts().tolist() == [2] * 5
