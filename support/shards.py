"""Tar shards in the format of WebDataset: pictures KEY.jpg with the number of their class in KEY.cls or KEY.json."""
import contextlib
import io
import json
import os
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import drr
from drr import UserError
from support.common import EXTENSIONS


class Member(NamedTuple):
    """A picture within a tar shard; with what `Path` offers of a picture in a folder."""
    parent: Path                                             # the shard
    name: str
    offset: int
    size: int

    def __str__(self):
        return f"{self.parent}: {self.name}"

    def open(self, mode="rb"):
        """The picture's bytes as a file. Each call opens the shard anew: nothing is shared by threads and processes."""
        with open(self.parent, "rb", buffering=0) as f:
            f.seek(self.offset)
            return io.BytesIO(f.read(self.size))


# numpy reads a file's header with Python's parser, which up to Python 3.11.7 fails now and then when two threads are in it
# (python/cpython issue 106905).
ONE_AT_A_TIME = threading.Lock()


def shard_index(path, folder):
    """`read_shard`, kept in `folder` (None: nowhere) for as long as the shard has its name, size and time."""
    stat = path.stat()
    kept = Path(folder or "") / f"{path.parent.name}-{path.name}-{stat.st_size}-{stat.st_mtime_ns}.npz"
    if folder and kept.exists():
        with contextlib.suppress(ValueError, EOFError, zipfile.BadZipFile), ONE_AT_A_TIME, np.load(kept) as arrays:
            return dict(arrays)                              # a damaged one is made anew
    arrays = read_shard(path)
    if folder:
        with drr.replacing(kept) as temporary, open(temporary, "wb") as f:
            np.savez(f, **arrays)
    return arrays


def read_shard(path):
    """Names, offsets, sizes and labels of a tar shard's pictures KEY.jpg (.png, .webp, ...); the label is the number in
    KEY.cls, or "label" in KEY.json. Raises UserError for a damaged shard or a missing label."""
    # Python's own tarfile and not the webdataset package: that reads shards only from the start to the end (1.0.2), and
    # where a batch is a function of (seed, step), a resumed run needs any picture at any time.
    samples, rows = {}, []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                sample, suffix = samples.setdefault((folder, key), {}), suffix.lower()
                if member.isfile() and "." + suffix in EXTENSIONS and key:
                    sample["picture"] = os.fsencode(name), member.offset_data, member.size
                elif member.isfile() and suffix in ("cls", "json"):
                    sample[suffix] = tar.extractfile(member).read()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):        # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise UserError(f"The shard {path} is damaged ({error}); copy it again or move it away.") from None
    for sample in samples.values():
        if "picture" in sample:
            try:
                label = int(sample["cls"]) if "cls" in sample else int(str(json.loads(sample["json"])["label"]))
                if not 0 <= label < 2 ** 20:
                    raise ValueError
            except (KeyError, ValueError, TypeError):
                raise UserError(f"The shard {path} names no class for {os.fsdecode(sample['picture'][0])}; expected a "
                                "whole number from 0 to 1,048,575 in a .cls file of that name, or as \"label\" in "
                                ".json.") from None
            rows.append((*sample["picture"], label))
    names, offsets, sizes, labels = zip(*rows) if rows else ([], [], [], [])
    return {"names": np.array(names, bytes), "offsets": np.array(offsets, np.int64), "sizes": np.array(sizes, np.int64),
            "labels": np.array(labels, np.int64)}
