"""Speed as ratios measured in one run, which mean the same on any machine: python -m tests.bench [part of a name]"""
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import torch
from skimage.color import hsv2rgb, lab2rgb, rgb2hsv, rgb2lab
from skimage.exposure import match_histograms

from autohdr.data.analysis import measure_files, measure_pair
from autohdr.data.reference import lab_histogram
from autohdr.data.samples import sample_pairs
from autohdr.inference.predict import predict
from autohdr.learn.fit import Fit, fit_head, make_bank
from autohdr.models.hdrnet import slice_grid, slice_rows
from autohdr.models.scan import Scan, naive_scan
from autohdr.models.zoo import create_model
from autohdr.photo import ADOBE_RGB, Photo, read_photo, resize, write_photo
from autohdr.postprocess.tone import boost_saturation, match_histogram
from autohdr.postprocess.windows import enhance_windows
from tests.plain.darkir import DarkIR as PlainDarkIR
from tests.plain.nafnet import NAFNet as PlainNAFNet
from tests.plain.restormer import Restormer as PlainRestormer
from tests.plain.retinexformer import RetinexFormer as PlainRetinexFormer


def fastest(f, repeat=3) -> float:
    "Seconds of the fastest of some calls, after one to warm up."
    f()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def in_turn(*calls, repeat=3) -> list:
    "Seconds of the fastest run of each call, (CPU, wall); they take turns, so that what else the machine does falls on all alike."
    times = [[] for _ in calls]
    for _ in range(repeat + 1):
        for call, seconds in zip(calls, times):
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    return [tuple(map(min, zip(*t[1:]))) for t in times]


def large_jpeg(folder) -> Path:
    "24 megapixels with the noise and detail of a photograph."
    rng = np.random.default_rng(0)
    small = rng.integers(40, 215, (50, 75, 3), dtype=np.uint8)
    picture = np.kron(small, np.ones((80, 80, 1), np.uint8)) + rng.integers(0, 12, (4000, 6000, 1), dtype=np.uint8)
    path = Path(folder) / "24mp.jpg"
    path.write_bytes(imagecodecs.jpeg8_encode(picture, 95))
    return path


def small_read(folder):
    path = large_jpeg(folder)
    full, small = fastest(lambda: read_photo(path)), fastest(lambda: read_photo(path, long_side=512))
    return f"24-megapixel JPEG: reading at 512 px is {full / small:.1f} times as fast as at full size ({small:.2f} s, {full:.2f} s)"


def photo_in_and_out(folder):
    path = large_jpeg(folder)
    data, photo = path.read_bytes(), read_photo(path)
    bare = fastest(lambda: imagecodecs.jpeg8_encode(imagecodecs.jpeg8_decode(data), 95))
    ours = fastest(lambda: read_photo(path)) + fastest(lambda: write_photo(path, photo))
    return f"24-megapixel JPEG: reading and writing takes {ours / bare:.1f} times the bare codec ({ours:.2f} s, {bare:.2f} s)"


def wide_profile(folder):
    plain = Photo(read_photo(large_jpeg(folder)).pixels)
    wide = Photo(plain.pixels, icc=ADOBE_RGB)
    paths = [write_photo(Path(folder) / f"{i}.jpg", p) for i, p in enumerate((plain, wide))]
    a, b = (fastest(lambda: write_photo(path, read_photo(path))) for path in paths)
    return f"24-megapixel JPEG: an Adobe RGB profile makes reading and writing take {b / a:.1f} times as long ({b:.2f} s, {a:.2f} s)"


def grid_lookup(folder):
    torch.manual_seed(0)
    grid, guide = torch.randn(1, 12, 8, 16, 16), torch.rand(1, 100, 6000)
    with torch.no_grad():
        by_rows, plain = (fastest(lambda: f(grid, guide, 0, 4000)) for f in (slice_rows, slice_grid))
    return f"HDRNet, 0.6 megapixels: looking the grid up by rows is {plain / by_rows:.1f} times as fast as grid_sample ({by_rows:.3f} s, {plain:.3f} s)"


def large_photo(folder):
    model, path = create_model("hdrnet").eval(), large_jpeg(folder)
    photo = read_photo(path)
    codec = fastest(lambda: write_photo(Path(folder) / "copy.jpg", read_photo(path)), 2)
    edit = fastest(lambda: predict(model, photo.pixels), 2)
    return f"HDRNet on 24 megapixels: the edit takes {edit / codec:.1f} times as long as reading and writing the JPEG ({edit:.2f} s, {codec:.2f} s)"


def look_members(folder):
    one, five = (create_model("look", heads=n).eval() for n in (1, 5))
    pixels = read_photo(large_jpeg(folder)).pixels
    single, many = (fastest(lambda: predict(m, pixels, tta=True), 2) for m in (one, five))
    return f"LookNet on 24 megapixels: five heads and the mirror image take {many / single:.2f} times as long as one head ({many:.2f} s, {single:.2f} s)"


def look_training(folder):
    photos = [torch.rand(6, 170, 256, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    few, eyes = Fit(updates=20), create_model("look", hidden=8).eval()
    look = fastest(lambda: make_bank(photos, few, 0, eyes), 1)
    bank = make_bank(photos, few, 0, eyes)
    head = fastest(lambda: fit_head(bank, range(8), few), 2) * 15
    return f"learning from eight photos: looking at their versions, once for all trainings, takes {look / head:.2f} times as long as one training of a head ({look:.1f} s, {head:.1f} s)"


def against_plain(label, name, plain):
    torch.manual_seed(0)
    models, x = (create_model(name), plain), torch.rand(1, 3, 256, 256)

    def forward(model):
        with torch.no_grad():
            model(x)

    def step(model):
        model.zero_grad()
        model(x).square().mean().backward()

    ((ours, _), (plain, _)), ((ours_step, _), (plain_step, _)) = (in_turn(*[lambda m=m: call(m) for m in models]) for call in (forward, step))
    return (f"{label} at 256 x 256: forward {plain / ours:.2f} times as fast as the plain version ({ours:.2f} s, {plain:.2f} s of CPU time), "
            f"training step {plain_step / ours_step:.2f} times ({ours_step:.2f} s, {plain_step:.2f} s)")


def nafnet(folder):
    return against_plain("NAFNet", "nafnet", PlainNAFNet())


def darkir(folder):
    return against_plain("DarkIR", "darkir", PlainDarkIR())


def retinexformer(folder):
    return against_plain("RetinexFormer", "retinexformer", PlainRetinexFormer())


def restormer_pair():
    ours, plain = create_model("restormer"), PlainRestormer()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def restormer_forward(folder):
    models, x = restormer_pair(), torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        apart = (models[0](x) - models[1](x)).abs().max() / models[1](x).abs().max()
        (ours, ours_wall), (plain, plain_wall) = in_turn(*[lambda m=m: m(x) for m in models])
    return (f"Restormer, 256 x 256, forward: {plain / ours:.2f} times as fast as the plain version in CPU time ({ours:.2f} s, {plain:.2f} s), "
            f"{plain_wall / ours_wall:.2f} times in wall time; outputs differ by {apart:.0e}")


def restormer_training(folder):
    "As large as memory allows: the plain version takes 8 GB at 192 x 192 and would take 14 GB at 256 x 256."

    def step(model, x):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def one():
            loss = (model(x) - x**0.6).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

        return one

    lines = []
    for side in (128, 192):
        x = torch.rand(1, 3, side, side)
        (ours, ours_wall), (plain, plain_wall) = in_turn(*[step(m, x) for m in restormer_pair()], repeat=2)
        lines.append(f"at {side} x {side} {plain / ours:.2f} times as fast as the plain version in CPU time ({ours:.2f} s, {plain:.2f} s), {plain_wall / ours_wall:.2f} times in wall time")
    return f"Restormer, training step with AdamW: {'; '.join(lines)} (256 x 256 would take 14 GB)"


def selective_scan(folder):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 1024, 96), torch.rand(1, 4, 1024, 96) / 10, -torch.rand(4, 96, 16) * 16, torch.randn(1, 4, 1024, 16), torch.randn(1, 4, 1024, 16)]
    inputs = [v.requires_grad_() for v in inputs]
    ours, loop = (fastest(lambda: f(*inputs).sum().backward(), 2) for f in (Scan.apply, naive_scan))
    return f"selective scan, 1024 steps of 384 channels, forward and backward: {loop / ours:.0f} times as fast as the loop ({ours:.2f} s, {loop:.2f} s)"


def pairs_7mp(folder, number=3) -> list:
    "Enlarged sample pairs with the grain of photographs, as JPEG at the size of the study's photographs."
    rows, grain = sample_pairs()[:number].to_dict("records"), np.random.default_rng(0).normal(0, 0.05, (2201, 3297, 1)).astype(np.float32)
    for row in rows:
        for side in ("before", "after"):
            picture = cv2.resize(read_photo(row[side]).pixels, (3297, 2201), interpolation=cv2.INTER_CUBIC)
            row[side] = str(write_photo(Path(folder) / f"{row['name']}_{side}.jpg", np.clip(picture + cv2.GaussianBlur(grain, (0, 0), 0.8)[..., None], 0, 1), quality=93, subsampling="4:2:0"))
    return [row | dict(window="") for row in rows]


def measure_in_full(row):
    "The straightforward way: read all of both photos, then make them small and measure."
    return measure_pair(*(resize(read_photo(row[side]).pixels, 342, 512) for side in ("before", "after")), size=(2201, 3297))


def analysis(folder):
    rows = pairs_7mp(folder)
    (ours, ours_wall), (plain, plain_wall) = in_turn(lambda: [measure_files(r) for r in rows], lambda: [measure_in_full(r) for r in rows])
    apart = max(abs(measure_files(r)[m] - measure_in_full(r)[m]) for r in rows for m in ("brightness", "gamma", "p5", "p95", "saturation"))
    return (f"analysis of a pair at 3297 x 2201: {plain / ours:.2f} times as fast as with full decoding in CPU time ({ours / len(rows):.2f} s, {plain / len(rows):.2f} s), "
            f"{plain_wall / ours_wall:.2f} times in wall time; measures differ by {apart:.4f}")


def ssim_loss(folder):
    from torchmetrics.functional.image import structural_similarity_index_measure
    from autohdr.losses.structure import ssim
    pred, target = torch.rand(2, 3, 256, 256, requires_grad=True), torch.rand(2, 3, 256, 256)
    def step(loss): torch.autograd.grad(loss(pred, target), pred)
    ours, theirs = in_turn(lambda: step(ssim), lambda: step(lambda p, t: structural_similarity_index_measure(p, t, data_range=1.0)))
    return f"SSIM and its gradient, 2 x 256 x 256: {theirs[0] / ours[0]:.1f} times as fast as torchmetrics in processor time, {theirs[1] / ours[1]:.1f} times in all ({ours[1] * 1e3:.0f} ms, {theirs[1] * 1e3:.0f} ms)"


def histogram_matching(folder):
    "Both from RGB through LAB to RGB; ours includes the reference's histogram, as the other sorts the reference."
    pixels, look = read_photo(large_jpeg(folder)).pixels, resize(read_photo(sample_pairs().after[3]).pixels, 4000, 6000)
    results = {}

    def ours():
        results["ours"] = match_histogram(pixels, lab_histogram(look))

    def sorting():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # colours that cannot be shown
            results["sorting"] = lab2rgb(match_histograms(rgb2lab(pixels), rgb2lab(look), channel_axis=-1))

    ((cpu, wall),) = in_turn(ours, repeat=2)
    start = time.process_time(), time.perf_counter()
    sorting()
    plain_cpu, plain_wall = time.process_time() - start[0], time.perf_counter() - start[1]
    apart = np.abs(results["ours"] - results["sorting"])
    return (f"Histogram matching at 24 megapixels, with the conversion to LAB and back: {plain_cpu / cpu:.1f} times as fast as skimage.exposure.match_histograms in CPU time "
            f"({cpu:.2f} s, {plain_cpu:.2f} s), {plain_wall / wall:.1f} times in wall time ({wall:.2f} s, {plain_wall:.2f} s); "
            f"largest difference {apart.max() * 255:.2f}/255, mean {apart.mean() * 255:.4f}/255")


def saturation(folder):
    pixels = read_photo(large_jpeg(folder)).pixels

    def plain():
        hsv = rgb2hsv(pixels)
        hsv[..., 1] = np.minimum(1.3 * hsv[..., 1], 1)
        return hsv2rgb(hsv)

    (cpu, wall), (plain_cpu, plain_wall) = in_turn(lambda: boost_saturation(pixels), plain, repeat=1)
    return (f"Saturation at 24 megapixels: with skin, greys and noise protected {plain_cpu / cpu:.1f} times as fast as skimage's HSV and back without, in CPU time "
            f"({cpu:.2f} s, {plain_cpu:.2f} s), {plain_wall / wall:.1f} times in wall time ({wall:.2f} s, {plain_wall:.2f} s)")


def windows_step(folder):
    "Detection and enhancement; the peak is that of a fresh process, over the photo and what was loaded before."
    path = large_jpeg(folder)
    after = cv2.resize(read_photo(sample_pairs().after[1]).pixels, (6000, 4000), interpolation=cv2.INTER_LINEAR)
    codec, step = fastest(lambda: write_photo(Path(folder) / "copy.jpg", read_photo(path)), 2), fastest(lambda: enhance_windows(after), 2)
    code = ("import cv2; from autohdr.data.samples import sample_pairs; from autohdr.photo import read_photo; from autohdr.postprocess.windows import enhance_windows\n"
            "after = read_photo(sample_pairs().after[1]).pixels; enhance_windows(after); after = cv2.resize(after, (6000, 4000), interpolation=cv2.INTER_LINEAR)\n"
            "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])  # in kB; ru_maxrss is inherited from the parent\n"
            "before = peak(); enhance_windows(after); print((peak() - before) / 2**20)")
    over = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    return f"windows of 24 megapixels: finding and enhancing takes {step / codec:.1f} times as long as reading and writing the JPEG ({step:.2f} s, {codec:.2f} s), and {over:.2f} GiB over the photo"


def controls(folder):
    "All of a photographer's settings at once; the peak is that of a fresh process, over photo and edit and what was loaded before."
    code = ("import cv2, time; from autohdr.data.samples import sample_pairs; from autohdr.photo import read_photo; from autohdr.postprocess.controls import Controls, apply_controls\n"
            "small = [read_photo(sample_pairs()[side][6]).pixels for side in ('before', 'after')]; apply_controls(*small, Controls(1.2, .3, .2, .5))\n"
            "pair = [cv2.resize(v, (6000, 4000), interpolation=cv2.INTER_LINEAR) for v in small]\n"
            "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            "before, cpu, wall = peak(), time.process_time(), time.perf_counter(); apply_controls(*pair, Controls(1.2, .3, .2, .5))\n"
            "print(time.process_time() - cpu, time.perf_counter() - wall, (peak() - before) / 2**20)")
    cpu, wall, over = map(float, subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
    return f"strength, exposure, warmth and window pull at 24 megapixels: {cpu:.2f} s of CPU time, {wall:.2f} s wall, {over:.2f} GiB over photo and edit"


BENCHES = [ssim_loss, small_read, photo_in_and_out, wide_profile, analysis, histogram_matching, saturation, windows_step, controls, grid_lookup, large_photo, look_members, look_training, nafnet, darkir, retinexformer, restormer_forward, restormer_training, selective_scan]

if __name__ == "__main__":
    for bench in BENCHES:
        if len(sys.argv) > 1 and sys.argv[1] not in bench.__name__: continue
        with tempfile.TemporaryDirectory() as folder: print(f"{bench.__name__}: {bench(folder)}", flush=True)
