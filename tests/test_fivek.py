"""MIT-Adobe FiveK in the forms in which people have it, each a few photos small, read as any other table of pairs."""
from importlib.util import find_spec

import numpy as np
import pytest

from autohdr.core import AutohdrError
from autohdr.data.fivek import match_fivek
from autohdr.data.pairs import scan_pairs
from autohdr.photo import write_photo
from autohdr.training.loop import load_pairs, select
from autohdr.training.recipe import Recipe

RNG = np.random.default_rng(0)
NUMBERS = (1, 7, 30, 4500, 4501, 5000)


def photo(path, size=(12, 16), bit_depth=8):
    write_photo(path, RNG.random((*size, 3), dtype=np.float32), bit_depth=bit_depth)


def test_folders_of_input_and_experts(tmp_path):
    for n in NUMBERS:
        for side in ("input", "expert_a", "expert_c"):
            photo(tmp_path / side / f"a{n:04}-jmac_DSC{n}.jpg")
    with pytest.raises(AutohdrError, match=r"several experts, A, C.*expert_a.*expert_c"):
        scan_pairs(tmp_path)
    with pytest.raises(AutohdrError, match=r"no edits of expert D.*those of A, C"):
        scan_pairs(tmp_path / "expert_d")
    pairs, problems = scan_pairs(tmp_path / "expert_c")
    assert len(pairs) == len(NUMBERS) and not len(problems) and pairs.after.str.contains("expert_c").all()
    assert set(pairs[pairs.split == "test"]["name"]) == {"a4501-jmac_DSC4501", "a5000-jmac_DSC5000"}
    parts = select(load_pairs(Recipe(pairs=str(tmp_path / "expert_c")))[0], Recipe())
    assert len(parts["test"]) == 2, "a recipe keeps the usual test photos, and puts none of the others among them"


def test_lists_win_over_numbers(tmp_path):
    for n in NUMBERS:
        for side in ("input", "expertC"):
            photo(tmp_path / side / "JPG" / "480p" / f"a{n:04}.jpg")
    (tmp_path / "train_input.txt").write_text("a0001\na4501\n")
    (tmp_path / "train_label.txt").write_text("a0030\n")
    (tmp_path / "test.txt").write_text("a0007\na4500")
    pairs, problems = scan_pairs(tmp_path)
    assert set(pairs[pairs.split == "test"]["name"]) == {"a0007", "a4500"} and len(pairs) == 5
    assert list(problems["name"]) == ["a5000"] and problems.reason[0].startswith("unlisted")
    (tmp_path / "val.txt").write_text("input/a0007.jpg\n")
    with pytest.raises(AutohdrError, match="a0007 is both in .*test.txt and in .*val.txt"):
        scan_pairs(tmp_path)


def test_folders_per_split(tmp_path):
    for n, split in ((1, "train"), (2, "train"), (3, "test")):
        for side in ("input", "target"):
            photo(tmp_path / f"{split}_{side}" / f"a{n:04}.png")
    pairs, _ = scan_pairs(tmp_path)
    assert dict(zip(pairs["name"], pairs["split"]))["a0003"] == "test" and len(pairs) == 3


def test_copies_that_are_no_photos_and_several_sizes(tmp_path):
    for n in (1, 4600):
        for folder, size in (("JPG/480p", (12, 16)), ("JPG/original", (24, 32))):
            for side in ("input", "expertC"):
                photo(tmp_path / side / folder / f"a{n:04}.jpg", size)
        photo(tmp_path / "input/PNG/480p_16bits_XYZ_WB" / f"a{n:04}.png", bit_depth=16)
    with pytest.raises(AutohdrError, match="more than once, in JPG/480p, JPG/original"):
        scan_pairs(tmp_path / "expertC")
    pairs, problems = scan_pairs(tmp_path / "expertC/JPG/original")
    assert list(pairs.width) == [32, 32] and not len(problems)


@pytest.mark.skipif(not find_spec("rawpy"), reason="needs the extra autohdr[raw]")
def test_the_original_release(tmp_path):
    from tests.test_enhance import dng

    for n, batch in ((1, "HQa1to700"), (701, "HQa701to1400"), (4990, "HQa4201to5000")):
        dng(tmp_path / "raw_photos" / batch / "photos" / f"a{n:04}-kme_{n}.dng")
        for expert in "abc":
            photo(tmp_path / f"tiff16_{expert}" / f"a{n:04}-kme_{n}.tif", (64, 96) if (n, expert) != (701, "c") else (60, 90), 16)
    pairs, problems = scan_pairs(tmp_path / "tiff16_c")
    assert list(pairs["name"]) == ["a0001-kme_1", "a4990-kme_4990"] and list(pairs["split"])[1] == "test"
    assert list(problems.reason[~problems.kept]) == ["shape: before is 96 x 64 pixels, after 90 x 60"]  # the toy raw files look alike
    assert len(scan_pairs(tmp_path / "tiff16_a")[0]) == 3


def test_other_folders_are_none_of_it(tmp_path):
    for side in ("before", "after"):
        photo(tmp_path / "a" / side / "kitchen.jpg")
    for side in ("input", "target"):
        photo(tmp_path / "b" / side / "kitchen.jpg")
    for source in (tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "b/target", tmp_path / "none.csv"):
        assert match_fivek(source) is None
