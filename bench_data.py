"""Measures how fast stage 2 gets its batches from a token cache of a million images, and how much memory that takes.

    python bench_data.py                                      # one epoch; 1 GB on the disk for a minute, then removed
    python bench_data.py --images 100000 --seconds 10 --cold  # the first batches after a restart: nothing in memory yet
"""
import argparse
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
from common import run
from drr import UserError

POSITIONS, DEPTH, CODEBOOK_SIZE, CLASSES = 64, 4, 16384, 1000      # of ImageNet 256, f = 32


def memory():
    """Resident memory of this process in MB: (all, its own). What is not its own are mapped pages of files, among them
    the cache's, which the system takes back when it needs room. Zeros where there is no /proc."""
    path = Path("/proc/self/status")
    rows = dict(line.split(":", 1) for line in path.read_text().splitlines()) if path.exists() else {}
    return [int(rows.get(key, "0 kB").split()[0]) / 1000 for key in ("VmRSS", "RssAnon")]


def make_cache(path, images):
    """A cache of random codes (2, M, N, D), as `data.cached_codes` writes it: about 1 KB an image."""
    shape = (2, images, POSITIONS, DEPTH)
    rng = np.random.default_rng(0)
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "<u2", "fortran_order": False, "shape": shape})
        for i in tqdm(range(0, 2 * images, 10_000), "making a cache", unit_scale=10_000, unit="image"):
            n = min(10_000, 2 * images - i)
            rng.integers(CODEBOOK_SIZE, size=(n, POSITIONS, DEPTH), dtype=np.uint16).tofile(f)


def make_views(images, batch_size):
    """The views of as many images, one each, named like ImageNet's; there are no such files."""
    labels = np.arange(images) * CLASSES // images
    folders = [f"n{c:08d}" for c in range(CLASSES)]
    names = np.array([f"n{c:08d}_{i}.JPEG".encode() for i, c in enumerate(labels)])
    files = data.Files(folders, np.bincount(labels, minlength=CLASSES), names)
    c = SimpleNamespace(views=1, class_views=1, balance=0.0, favour_class="", favour=1.0, workers=1, seed=0, flip=True)
    return data.Views(files, labels, folders, 256, batch_size, c)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=2048, help="images a step (2048)")
    parser.add_argument("--seconds", type=float, help="stop after so long, before the epoch's end")
    parser.add_argument("--cold", action="store_true", help="drop the cache from the system's memory first (Linux)")
    parser.add_argument("--dir", metavar="DIR", help="where to put the cache (the folder for temporary files)")
    args = parser.parse_args()
    if args.images < CLASSES or args.batch < 1:
        raise UserError(f"--images starts at {CLASSES}, one for each class, and --batch at 1.")
    if args.cold and not hasattr(os, "posix_fadvise"):
        raise UserError("--cold needs Linux; leave it away.")
    print(f"resident memory in MB, all and the process's own: {memory()[0]:.0f}, {memory()[1]:.0f} after the imports")
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        path = Path(directory) / "codes.npy"
        make_cache(path, args.images)
        if args.cold:
            with open(path, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = memory()
        views = make_views(args.images, args.batch)
        codes = np.load(path, mmap_mode="r")
        print(f"{before[0]:.0f}, {before[1]:.0f} before and {memory()[0]:.0f}, {memory()[1]:.0f} after the list of "
              f"{len(views)} views was made")

        # --- the same lines as in train_transformer.py ---------------------------------------------------------------
        drawing, seen, peak, start, cpu = 0.0, 0, memory(), time.perf_counter(), time.process_time()
        for step in tqdm(range(-(-args.images // args.batch)), "drawing batches", unit="step"):
            clock = time.perf_counter()
            index, flips = views.draw(step)
            drawing += time.perf_counter() - clock
            batch = torch.from_numpy(codes[flips.astype(int), index].astype(np.int64))                # (B, N, D)
            seen += len(batch)
            if step % 10 == 0:
                peak = np.maximum(peak, memory())
            if args.seconds and time.perf_counter() - start > args.seconds:
                break
        seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, np.maximum(peak, memory())
        print(f"{seen} images in {seconds:.2f} s ({cpu:.2f} s of CPU time): {seen / seconds:.0f} images/s, "
              f"{seconds / (step + 1) * 1000:.2f} ms a step of {args.batch}, {drawing / seconds:.0%} of it for drawing")
        print(f"peak resident memory {peak[0]:.0f} MB, of which {peak[1]:.0f} MB are the process's own and the rest "
              f"mapped pages; the cache has {path.stat().st_size / 1e6:.0f} MB")
        del codes                                             # some systems do not remove a file that is mapped


if __name__ == "__main__":
    run(main)
