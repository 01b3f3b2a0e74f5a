"""Tar shards in WebDataset's format: images KEY.jpg with the number of their class in KEY.cls or KEY.json."""
import contextlib
import io
import json
import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from drr import UserError, ranks, replacing
from support.common import EXTENSIONS


class Member(NamedTuple):
    """An image within a tar shard, with the parts of Path's interface that reading an image needs."""
    parent: Path                                             # the shard
    name: str
    offset: int                                              # bytes
    size: int

    def __str__(self):
        return f"{self.parent}: {self.name}"

    def open(self, mode="rb"):
        """The image's bytes as a file. Each call opens the shard anew: threads and processes share none."""
        with open(self.parent, "rb", buffering=0) as f:
            f.seek(self.offset)
            return io.BytesIO(f.read(self.size))


def index_shards(paths, folder):
    """{path: `read_shard` of it}. The folder (None: nowhere) keeps what was read for the next time."""
    rank, world = ranks()
    start = rank * len(paths) // world            # each rank starts elsewhere and uses what others have kept
    order = paths[start:] + paths[:start]
    with ThreadPoolExecutor() as pool:
        new = pool.map(lambda path: shard_index(path, folder, load=False), order)
        bar = tqdm(zip(order, new), "indexing shards", len(order), unit="shard", disable=rank > 0)
        # Loaded in this thread alone: np.load uses Python's parser, which up to Python 3.11.7 sometimes fails
        # when two threads are in it (python/cpython issue 106905).
        return {path: arrays or shard_index(path, folder, load=True) for path, arrays in bar}


def shard_index(path, folder, load):
    """`read_shard`, kept until the shard's name, size or time changes; if kept and not `load`, None."""
    stat = path.stat()
    name = f"{path.parent.name}-{path.name}-{stat.st_size}-{stat.st_mtime_ns}.npz"
    kept = Path(folder or "") / name
    if folder and kept.exists():
        if not load:
            return None
        with contextlib.suppress(ValueError, EOFError, zipfile.BadZipFile), np.load(kept) as arrays:
            return dict(arrays)                              # a damaged one is read anew
    arrays = read_shard(path)
    if folder:
        with replacing(kept) as temporary, open(temporary, "wb") as f:
            np.savez(f, **arrays)
    return arrays


def read_shard(path):
    """Names, offsets, sizes and labels of a shard's F images, arrays (F,); the label of KEY.jpg (.png, ...)
    is in KEY.cls, or as "label" in KEY.json. Raises UserError for a damaged shard or a missing label."""
    # With tarfile, as the webdataset package reads shards from start to end only (1.0.2): here a batch is a
    # function of (seed, step), so a resumed run needs any image at any time.
    samples = {}                                             # (folder, key) -> its files by kind
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                suffix = suffix.lower()
                sample = samples.setdefault((folder, key), {})
                if member.isfile() and "." + suffix in EXTENSIONS and key:
                    sample["image"] = os.fsencode(name), member.offset_data, member.size
                elif member.isfile() and suffix in ("cls", "json"):
                    sample[suffix] = tar.extractfile(member).read()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise UserError(f"The shard {path} is damaged ({error}); copy it again or move it away.") from None
    rows = [(*sample["image"], label_of(sample, path)) for sample in samples.values() if "image" in sample]
    columns = zip(*rows) if rows else [[], [], [], []]
    types = {"names": bytes, "offsets": np.int64, "sizes": np.int64, "labels": np.int64}
    return {key: np.array(column, kind) for (key, kind), column in zip(types.items(), columns)}


def label_of(sample, path):
    with contextlib.suppress(KeyError, ValueError, TypeError):
        label = int(sample["cls"] if "cls" in sample else str(json.loads(sample["json"])["label"]))
        if 0 <= label < 2 ** 20:
            return label
    raise UserError(f"The shard {path} names no class for {os.fsdecode(sample['image'][0])}; expected a "
                    "whole number from 0 to 1,048,575 in a .cls file of that name, or as \"label\" in .json.")
