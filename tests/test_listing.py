"""Photos of a listing brought into agreement: the bundled houses, with exposures and white balances that somebody got wrong."""
import numpy as np
import pytest

from autohdr.core import AutohdrError
from autohdr.data.reference import to_lab
from autohdr.data.samples import decode, encode, sample_pairs
from autohdr.data.scenes import make_house, rgb
from autohdr.photo import fit, read_photo
from autohdr.postprocess.grouping import group_photos
from autohdr.postprocess.listing import BRIGHTER, DARKER, MOST_COLOUR, Correction, agree, apply_correction, gains, neutral_spread

HOUSES = ("house02", "house05", "house07", "house12", "house13", "house21")


def views(house):
    table = sample_pairs()
    return [fit(read_photo(f).pixels, 256) for f in table.after[table.property == house]]


def walls(edits, house):
    """Where the true edit has the tint of the house's paint: known without the faults."""
    paint = to_lab(encode(rgb(make_house(int(house[5:]))["wall"])).astype(np.float32).reshape(1, 1, 3))[0, 0]
    labs = [to_lab(v) for v in edits]
    return [(np.hypot(*(lab[..., 1:] - paint[1:]).transpose(2, 0, 1)) < 5) & (lab[..., 0] > 55) & (lab[..., 0] < 97) for lab in labs]


def faulty(pixels, ev, a, b):
    return encode(np.clip(decode(pixels)*gains(a, b, ev), 0, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def houses():
    found = {}
    for name in HOUSES:
        rng, edits = np.random.default_rng(int(name[5:])), views(name)
        faults = np.c_[rng.normal(0, .2, len(edits)), rng.normal(0, 4/2**.5, (len(edits), 2))]
        found[name] = edits, [faulty(v, *f) for v, f in zip(edits, faults)], walls(edits, name)
    return found


def corrected(photos):
    return [apply_correction(v, c) for v, c in zip(photos, agree(photos))]


def test_walls_agree_better_afterwards(houses):
    was, now, error_was, error_now = np.array([
        (neutral_spread(spoilt, masks)["colour"], neutral_spread(new, masks)["colour"], *(np.mean([abs(v - e).mean() for v, e in zip(vs, edits)]) for vs in (spoilt, new)))
        for edits, spoilt, masks in houses.values() for new in [corrected(spoilt)]]).T
    assert now.mean() < .65*was.mean(), (was, now)
    assert (now > was + .2).sum() <= 1, (was, now)
    assert error_now.mean() < error_was.mean(), (error_was, error_now)


def test_photos_that_agree_are_nearly_left_alone(houses):
    exposures = []
    for name, (edits, _, _) in houses.items():
        for c in agree(edits):
            assert np.hypot(c.a, c.b) < 3 and abs(c.exposure) < .35, (name, c)
            exposures.append(abs(c.exposure))
    assert np.mean(exposures) < .1, exposures # rooms are not equally bright, and a hall that is dim gets some light
    same = [houses["house13"][0][0]]*3
    assert all(not (c.exposure or c.a or c.b) for c in agree(same))


def test_one_photo_that_is_off_is_brought_to_the_others(houses):
    edits = houses["house13"][0]
    cs = agree([faulty(edits[0], 0, 2, 6), *edits[1:]])
    assert cs[0].b < -3 and all(abs(c.b) < 2 for c in cs[1:]), cs


def test_houses_with_other_paint_in_one_listing_keep_it(houses):
    beige, blue = houses["house13"][0], houses["house21"][0]
    for c in agree([*beige, *blue]):
        assert np.hypot(c.a, c.b) < 3, c


def test_what_has_nothing_in_common_is_left_alone(houses):
    rng = np.random.default_rng(0)
    garden = np.float32(rng.uniform(.1, .6, (170, 256, 3)))*np.float32([.5, 1, .3]) # grass is no even surface
    lawn = np.full((170, 256, 3), (.25, .5, .1), np.float32) # even, but of no tint that a room has
    black, white = np.zeros((170, 256, 3), np.float32), np.ones((170, 256, 3), np.float32)
    for odd in (garden, lawn, black, white, black[:2, :2]):
        c = agree([*houses["house13"][1], odd])[-1]
        assert (c.exposure, c.a, c.b) == (0, 0, 0), c


def test_black_and_white_photos_stay_so_and_have_no_vote(houses):
    for edits, spoilt, _ in houses.values():
        grey = [np.float32(np.repeat(v.mean(-1, keepdims=True), 3, 2)) for v in spoilt[:2]]
        alone, together = agree(spoilt), agree([*spoilt, *grey])
        assert [(c.a, c.b) for c in together] == [(c.a, c.b) for c in alone] + [(0, 0)]*2
        assert all(c.a == c.b == 0 for c in agree(grey)), "nothing but black-and-white"
        assert np.ptp(apply_correction(grey[0], together[-2]), axis=-1).max() < 1e-4


def test_what_is_bright_is_not_brightened(houses):
    for edits, _, _ in houses.values():
        assert agree([faulty(edits[0], 1, 0, 0), *edits[1:]])[0].exposure <= 0


def test_limits_and_strength(houses):
    edits = houses["house13"][0]
    far = [faulty(edits[0], 1.5, 6, 14), *edits[1:]]
    for c in agree(far):
        assert -DARKER <= c.exposure <= BRIGHTER and np.hypot(c.a, c.b) <= MOST_COLOUR + 1e-6
    whole, half = agree(houses["house13"][1]), agree(houses["house13"][1], .5)
    assert np.allclose([c.b for c in half], [c.b/2 for c in whole], atol=.002)
    with pytest.raises(AutohdrError, match="strength is 2"):
        agree(edits, 2)


def test_nothing_new_is_clipped(houses):
    photo = np.random.default_rng(1).random((60, 80, 3), np.float32)
    photo[:5], photo[5:10] = 1, 0
    for c in (Correction(.5, 3, 7), Correction(-.5, -3, -7), Correction(.5, -5, 6)):
        out = apply_correction(photo, c)
        assert ((out >= 1) <= (photo >= 1)).all() and ((out <= 0) <= (photo <= 0)).all() and out.dtype == np.float32
        for k in range(3): # brighter stays brighter
            order = np.argsort(photo[..., k].ravel())
            assert (np.diff(out[..., k].ravel()[order]) >= 0).all()
    assert apply_correction(photo, Correction()) is photo


def test_the_order_of_photos_matters_little(houses):
    spoilt = houses["house12"][1]
    forwards, backwards = agree(spoilt), agree(spoilt[::-1])[::-1]
    assert np.allclose([(c.a, c.b) for c in forwards], [(c.a, c.b) for c in backwards], atol=2)


def test_listings_of_many_photos_are_quick(houses):
    import time
    many = [v for _, spoilt, _ in houses.values() for v in spoilt]*3
    start = time.process_time()
    assert len(agree(many)) == len(many)
    assert time.process_time() - start < .25*len(many)


def test_photos_are_grouped_by_folder(tmp_path):
    files = [tmp_path/"a"/"1.jpg", tmp_path/"b"/"1.jpg", tmp_path/"a"/"2.jpg"]
    groups = group_photos(files)
    assert groups[files[0]] == groups[files[2]] != groups[files[1]]
    assert set(group_photos(files, "auto").values()) == set(groups.values()) # none can be read, so no times
