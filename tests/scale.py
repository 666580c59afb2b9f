"""The study's data set in size: 577 pairs of 3297 x 2201, analysed and cleaned; seconds and memory. python -m tests.scale FOLDER [pairs]"""
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import psutil

from autohdr.core import each
from autohdr.data.samples import sample_pairs
from autohdr.photo import read_photo, write_photo

HEIGHT, WIDTH = 2201, 3297


def grain(seed):
    "The fine detail that a photograph has and an enlarged rendering lacks; without it the files would be small and quick to decode."
    noise = np.random.default_rng(seed).normal(0, 0.05, (HEIGHT, WIDTH)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 0.8)[..., None]


def make_pairs(folder, number):
    "Enlarged sample pairs, each in a crop and an exposure of its own, so that no two are alike."
    rows, grains = sample_pairs(faults=True).to_dict("records"), [grain(i) for i in range(4)]

    def write(i):
        rng, row = np.random.default_rng(i), rows[i % len(rows)]
        top, left, size = *rng.integers(0, 24, 2), 300
        exponent = float(np.exp(rng.normal(0, 0.03)))
        for side in ("before", "after"):
            path = Path(folder) / side / f"{i:04}.jpg"
            if path.exists(): continue
            pixels = read_photo(row[side]).pixels
            if pixels.shape[0] > pixels.shape[1]: pixels = np.ascontiguousarray(pixels.swapaxes(0, 1))
            pixels = cv2.resize(pixels[top:top + size, left:left + size * 3 // 2], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
            pixels = np.clip(np.clip(pixels, 0, 1) ** exponent + np.roll(grains[i % 4], i, axis=1), 0, 1)
            write_photo(path, pixels, quality=93, subsampling="4:2:0")

    each(write, range(number), "Making pairs")


def measured(command) -> tuple:
    "Seconds and the peak of the memory of a command and all it starts, in GiB."
    peak, start = [0], time.perf_counter()
    process = psutil.Popen(command)

    def watch():
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for p in [process, *process.children(recursive=True)]:
                try: total += p.memory_info().rss
                except psutil.Error: pass
            peak[0] = max(peak[0], total)
            time.sleep(0.2)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code: sys.exit(f"{' '.join(map(str, command))}: exit code {code}")
    return time.perf_counter() - start, peak[0] / 2**30


if __name__ == "__main__":
    folder, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 577
    make_pairs(folder / "pairs", number)
    megabytes = sum(p.stat().st_size for p in (folder / "pairs").rglob("*.jpg")) / 1e6
    print(f"{number} pairs of {WIDTH} x {HEIGHT}, {megabytes / number / 2:.1f} MB a photo", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["AUTOHDR_CACHE"] = f"{tmp}/cache"
        program, source = Path(sys.executable).parent / "autohdr", folder / "pairs"
        steps = {"analyse": [program, "analyse", source, "--out", f"{tmp}/analysis"], "clean, measured already": [program, "clean", source, "--out", f"{tmp}/clean.csv"]}
        for label, command in steps.items():
            seconds, memory = measured(command)
            print(f"{label}: {seconds:.0f} s, {memory:.2f} GiB at most", flush=True)
        subprocess.run(["rm", "-rf", f"{tmp}/cache"], check=True)
        seconds, memory = measured(steps["clean, measured already"] + ["--overwrite"])
        print(f"clean, nothing measured: {seconds:.0f} s, {memory:.2f} GiB at most", flush=True)
