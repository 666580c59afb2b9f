"""How far the same wall differs between the photos of a house, before and after `autohdr.postprocess.listing` has brought them into agreement.

python -m tests.listing_rooms [--houses 14] [--cache FOLDER] [--model CHECKPOINT]

Renders houses from four cameras each (needs the extra `scenes`; about ten seconds per view, kept in the cache), so that it is known which pixels show the same
paint. Edits: the studio's own, one hand per house; the same with faults (0.2 EV, 4 LAB units); a gamma and a cubic polynomial fitted on the bundled samples, applied to
what a camera with its own exposure and white balance for each view made of it; and a model's, where one is named. Two neighbouring houses in one listing show what
happens where the paint differs.
"""
import argparse
import itertools
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from autohdr.data import samples
from autohdr.data.rooms import room_plan
from autohdr.data.scenes import make_house, render_room, rgb
from autohdr.metrics import apply_gamma, apply_polynomial, fit_gamma, fit_polynomial, l1
from autohdr.photo import fit, read_photo
from autohdr.postprocess.listing import agree, apply_correction, gains, neutral_spread


def view_of(room, cache):
    """(house, before, true edit, mask): the mask says 1 for the house's wall paint and 2 for white paint and ceilings."""
    file = cache/f"{room.name}.npz"
    if not file.exists():
        shot = render_room(room.seed, room.view, 384, room.portrait, 12)
        np.savez_compressed(file, hdr=shot.hdr.astype(np.float16), window=shot.window.astype(np.float16), albedo=shot.albedo.astype(np.float16))
    hdr, window, albedo = (np.load(file)[k].astype(np.float32) for k in ("hdr", "window", "albedo"))
    after = samples.editor(hdr, window, albedo, np.random.default_rng([room.seed, room.view, 21]), samples.taste(np.random.default_rng([room.seed, 77])))
    before = samples.camera(hdr, np.random.default_rng([room.seed, room.view, 20]))
    of = lambda paint: cv2.erode(np.uint8((abs(albedo - paint).max(-1) < .04) & (window < .01)), np.ones((5, 5), np.uint8))
    mask = np.where(of(rgb("f3f2ee")), 2, 0)
    return room.seed, before, after, np.where(of(rgb(make_house(room.seed)["wall"])), 1, mask)


def with_fault(pixels, fault):
    """Another exposure (EV) and white balance (LAB units)."""
    light = samples.decode(pixels)*gains(fault[1], fault[2], fault[0])
    return samples.encode(np.clip(light, 0, 1)).astype(np.float32)


def fitted():
    """Gamma and polynomial of the bundled training pairs, as functions."""
    table = samples.sample_pairs()
    befores, afters = ([fit(read_photo(f).pixels, 192) for f in table[side][table.split == "train"]] for side in ("before", "after"))
    gamma, cubic = fit_gamma(befores, afters), fit_polynomial(befores, afters)
    return {"gamma": lambda v: apply_gamma(v, gamma), "polynomial": lambda v: np.clip(apply_polynomial(v, cubic), 0, 1).astype(np.float32)}


def rows_of(edits, trues, masks):
    """One house: spreads and errors as they are and corrected."""
    corrected = [apply_correction(v, c) for v, c in zip(edits, agree(edits))]
    was, now = neutral_spread(edits, masks), neutral_spread(corrected, masks)
    error = lambda vs: float(np.mean([l1(v, t) for v, t in zip(vs, trues)]))
    return dict(colour=was["colour"], colour_after=now["colour"], distance=was["distance"], distance_after=now["distance"], L=was["L"], L_after=now["L"], l1=error(edits), l1_after=error(corrected))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--houses", type=int, default=14)
    parser.add_argument("--cache", type=Path, default=Path("listing_rooms"))
    parser.add_argument("--model", action="append", default=[])
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    views = [view_of(room, args.cache) for room in itertools.islice(room_plan(7), 4*args.houses)]
    houses = {seed: [v[1:] for v in views if v[0] == seed] for seed in dict.fromkeys(v[0] for v in views)}
    makers = fitted()
    for file in args.model:
        from autohdr.inference.predict import predict
        from autohdr.models.zoo import load_model
        makers[Path(file).name] = lambda v, model=load_model(file): predict(model, v)
    rows = []
    for seed, shots in houses.items():
        befores, trues, masks = zip(*shots)
        rng = np.random.default_rng(seed)
        kinds = {"the studio's": trues} | {name: [make(v) for v in befores] for name, make in makers.items()}
        for i in range(3):
            kinds[f"with faults {i}"] = [with_fault(v, (rng.normal(0, .2), *rng.normal(0, 4/2**.5, 2))) for v in trues]
        rows += [dict(edits=kind.rstrip(" 012"), house=seed) | rows_of(edits, trues, masks) for kind, edits in kinds.items()]
    for (_, one), (_, two) in itertools.pairwise(houses.items()):
        befores, trues, masks = zip(*one, *two)
        masks = [m + 2*(m > 0)*(i >= len(one)) for i, m in enumerate(masks)] # the other house has its own paint
        for kind, edits in {"the studio's": trues, "with faults": [with_fault(v, (rng.normal(0, .2), *rng.normal(0, 4/2**.5, 2))) for v in trues]}.items():
            rows.append(dict(edits=f"{kind}, two houses") | rows_of(edits, trues, masks))
    table = pd.DataFrame(rows)
    table["worse"] = table.colour_after > table.colour + .1
    print(table.groupby("edits", sort=False).agg({k: "mean" for k in table.columns[2:-1]} | dict(worse="sum", house="size")).rename(columns=dict(house="listings")).round(4).to_string())


if __name__ == "__main__":
    main()
