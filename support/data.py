"""Folders or tar shards of images -> batches: every batch of every step is a function of (seed, step) alone.

A *view* is one square crop of one file: view 0 is the central square, the others are random crops at random scales,
the same in every run. A data set is a fixed list of views, so that a picture in memory, one decoded by a worker and
one whose codes were computed last week are the same picture.
"""
import contextlib
import csv
import functools
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import drr
from support import shards
from support.common import EXTENSIONS, autocast, crop, open_image, to_float
from drr import UserError

BLOCK = 256                 # files decoded together


# === Finding: DIR -> files, labels, classes =========================================================================
class Files:
    """Pictures in folders (item i is a Path) or in tar shards (item i is a Member), kept in a few arrays: a million
    Paths are 400 MB, and again in every worker process, since counting references to them writes to their pages."""

    def __init__(self, folders, counts, names, offsets=None, sizes=None):
        self.folders = folders                               # or shards; `counts` is how many pictures each holds
        self.folder = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
        self.names, self.offsets = names, offsets            # names: bytes of a fixed width; offsets: within the shards
        if sizes is not None:
            self.sizes = sizes

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        parent, name = Path(self.folders[self.folder[i]]), os.fsdecode(self.names[i])
        return parent / name if self.offsets is None else shards.Member(parent, name, int(self.offsets[i]), int(self.sizes[i]))

    @functools.cached_property
    def sizes(self):
        """Bytes of each picture; asked for when first needed, in threads, because a network disk answers slowly."""
        def ask(start):
            names = zip(self.folder[start:start + 1024], self.names[start:start + 1024])
            return [os.path.getsize(os.path.join(self.folders[folder], os.fsdecode(name))) for folder, name in names]
        with ThreadPoolExecutor() as pool:
            return np.concatenate([np.array(part, np.int64) for part in pool.map(ask, range(0, len(self), 1024))])


def fingerprint(files):
    """A short hash of the names of the pictures, the names of their folders or shards, and their sizes: the same files
    in another place have the same one, other files have another."""
    digest = hashlib.sha256(json.dumps([Path(folder).name for folder in files.folders]).encode())
    for array in (files.folder, files.names, files.sizes):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def find_images(directory, split="train", index=None):
    """Images of DIR/split/<class>/* or of the tar shards DIR/split/*.tar (of DIR when there is no DIR/train).

    Returns the files in a fixed order, their labels (int64) and the class names; without class folders one class, "".
    `index` is a folder to note what the shards hold for the next time. Raises UserError when there are no images.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"The folder {directory} does not exist; give one that holds images.")
    if (root / "train").is_dir() or split != "train":
        root = root / split
    tars, folders = sorted(root.glob("*.tar")), list(picture_folders(root))
    if tars and folders:
        raise UserError(f"{root} holds both tar shards and images ({folders[0][0]}); leave only one kind there.")
    if tars:
        return open_shards(tars, directory, index)
    if not folders:
        raise UserError(f"{root} holds no images; expected <class>/*.jpg in it, or just images ({', '.join(sorted(EXTENSIONS))}), or "
                        "tar shards *.tar.")
    paths, names = zip(*folders)
    class_of = [Path(path).relative_to(root).parts[:1] for path in paths]
    class_of = [parts[0] if parts else "" for parts in class_of]
    classes = sorted(set(class_of))
    if len(classes) > 1 and classes[0] == "":
        raise UserError(f"{os.path.join(paths[0], os.fsdecode(names[0][0]))} lies beside the class folders; "
                        "move it into one of them or away.")
    if classes != [""] and drr.ranks()[0] == 0:
        empty = sorted({path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."} - {*classes})
        if empty:
            print(f"{root}: no images in {', '.join(empty[:8])}{', ...' * (len(empty) > 8)}, which thus are no classes",
                  file=sys.stderr)
    number, counts = {name: i for i, name in enumerate(classes)}, [len(n) for n in names]
    labels = np.repeat([number[name] for name in class_of], counts)
    return Files(paths, counts, np.concatenate(names)), labels, classes


def picture_folders(folder, above=()):
    """(path, names of its images as an array of bytes) of the folder and those below it, each sorted; what begins with a dot is
    left out. above: the folders on the way, so that a link to one of them does not lead round in circles."""
    above = (*above, os.path.realpath(folder))
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if os.path.isdir(folder) else []
    names = [os.fsencode(entry.name) for entry in entries if entry.name[0] != "."
             and os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file()]
    if names:
        yield os.fspath(folder), np.array(names)
    for entry in entries:
        if entry.is_dir() and entry.name[0] != "." and os.path.realpath(entry.path) not in above:
            yield from picture_folders(entry.path, above)


def open_shards(paths, directory, index):
    """Files, labels and classes of tar shards in the format of WebDataset. The classes' names are the wnids
    of classes.tsv in their order, or else "0", "1", ..."""
    # Each rank starts elsewhere, and takes over what the others have already written to `index`.
    rank, world = drr.ranks()
    start = rank * len(paths) // world
    order = paths[start:] + paths[:start]
    with ThreadPoolExecutor() as pool:
        held = pool.map(lambda shard: shards.shard_index(shard, index), order)
        held = dict(zip(order, tqdm(held, "indexing shards", len(order), unit="shard", disable=rank > 0)))
    columns = {key: np.concatenate([held[shard][key] for shard in paths]) for key in held[paths[0]]}
    labels = columns.pop("labels")
    if not len(labels):
        raise UserError(f"The {len(paths)} tar shards of {paths[0].parent} hold no images.")
    classes = [wnid for wnid, _ in class_table(directory)] or [str(i) for i in range(labels.max() + 1)]
    if labels.max() >= len(classes):
        raise UserError(f"The shards of {paths[0].parent} name class {labels.max()}, but {directory}/classes.tsv has "
                        f"{len(classes)} lines, for the classes 0 to {len(classes) - 1}; add the others.")
    return Files([str(shard) for shard in paths], [len(held[s]["names"]) for s in paths], **columns), labels, classes


def class_table(directory):
    """[(wnid, name)] of DIR/classes.tsv, in its order; [] without that file."""
    path = Path(directory) / "classes.tsv"
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        table = [(row["wnid"], row["name"]) for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    except (UnicodeDecodeError, KeyError):
        table = []
    if not table or None in (text for row in table for text in row):
        raise UserError(f"{path} is no table of classes; expected UTF-8 text, its first line the names of the columns, `wnid` and "
                        "`name` among them, and a line a class with as many columns, separated by tabs.")
    return table


def class_titles(directory, classes):
    """Names for people: those of DIR/classes.tsv (columns `wnid` and `name`) where it has them, else the folder's."""
    titles = dict(class_table(directory))
    return [titles.get(name, name) for name in classes]


# === Reading: (file, view) -> uint8 (3, S, S) =======================================================================
def file_seed(path, seed):
    """Two files with the same name have the same crops; two files with different names do not."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path.name}".encode()).digest()[:7], "big")


# === Batches: (seed, step) -> uint8 images, labels ==================================================================
class Views(torch.utils.data.Dataset):
    """The views of a data set and the probability with which each is drawn. `c` is the section `data`.

    len() counts the views; item t, for any t >= 0, is the batch of step t: uint8 images (B, 3, S, S), labels (B,), and how
    many of them stand in for a file that could not be read. A process that is one of several has only the positions `own`
    of the batch, all by default.
    """

    def __init__(self, files, labels, classes, size, batch_size, c):
        self.files, self.size, self.batch_size, self.own = files, size, batch_size, np.arange(batch_size)
        self.favours = np.ones(len(classes))                                  # of each class
        if c.favour != 1 and not c.favour_class:
            raise UserError(f"data.favour is {c.favour}, but of which class? Give data.favour_class its folder.")
        if c.favour_class:
            if c.favour_class not in classes:
                raise UserError(f"data.favour_class is {c.favour_class!r}; the data has no class folder of that name, but for "
                                f"example {', '.join(classes[:3])}.")
            self.favours[classes.index(c.favour_class)] = c.favour
        self.seed, self.balance, self.flip, self.workers = c.seed, c.balance, c.flip, c.workers
        per_class = np.bincount(labels)                                       # n_c, files of each class
        count = np.maximum(c.views, np.ceil(c.class_views / np.maximum(per_class, 1))).astype(int)[labels]
        self.images = None
        # One entry per view: which of the files, in ascending order, the class, and the number of the crop.
        self.file_of = np.repeat(np.arange(len(files), dtype=np.int32), count)
        self.labels = np.repeat(labels, count)
        self.crop_of = (np.arange(len(self.file_of)) - np.repeat(np.cumsum(count) - count, count)).astype(np.int32)
        self.weigh()

    def keep(self, good):
        """Goes on with the views that are marked in `good` (M,) bool; `files` stays as it is."""
        self.file_of, self.labels, self.crop_of = self.file_of[good], self.labels[good], self.crop_of[good]
        self.weigh()

    def weigh(self):
        """Sets `cdf` (M,), the probability of each view and of all before it."""
        # P(class) ~ favour * n_c^(1 - balance), shared equally by the views of the class
        n = len(self.favours)
        n_files, n_views = np.bincount(self.labels[self.crop_of == 0], minlength=n), np.bincount(self.labels, minlength=n)
        weight = (self.favours * n_files ** (1.0 - self.balance) / np.maximum(n_views, 1))[self.labels]
        self.cdf = np.cumsum(weight / weight.sum())

    def __len__(self):
        return len(self.file_of)

    def crop(self, i, picture=None):
        """View i, uint8 (3, S, S), of its file or of the file's picture if that is at hand."""
        path = self.files[self.file_of[i]]
        return crop(picture or open_image(path), self.size, self.crop_of[i], file_seed(path, self.seed))

    def read_all(self, starts, doing):
        """Decodes files once each, in threads, a block at a time, and the next while the caller is busy with this one.
        `starts` are the files' first views. Yields (views, images uint8 (m, 3, S, S), bad): the m views that could be
        read, and the first views of the files that could not."""
        def read(start):
            views = np.arange(start, np.searchsorted(self.file_of, self.file_of[start], side="right"))
            try:
                picture = open_image(self.files[self.file_of[start]])
                return views, torch.stack([self.crop(i, picture) for i in views]), []
            except UserError:
                return views[:0], torch.empty(0, 3, self.size, self.size, dtype=torch.uint8), [start]

        bar = tqdm(total=len(starts), desc=doing, unit="file", disable=drr.ranks()[0] > 0)
        with ThreadPoolExecutor(max(1, self.workers)) as pool, bar:
            ahead = pool.map(read, starts[:BLOCK])
            for i in range(0, len(starts), BLOCK):
                block, ahead = list(ahead), pool.map(read, starts[i + BLOCK:i + 2 * BLOCK])
                views, images, bad = zip(*block)
                yield np.concatenate(views), torch.cat(images), np.array(sum(bad, []), int)
                bar.update(len(block))

    def report(self, bad):
        """Says how many files could not be read; `bad` are their first views. Raises UserError when no file could."""
        if len(bad):
            first, n = self.files[self.file_of[bad[0]]], (self.crop_of == 0).sum()
            if len(bad) == n:
                raise UserError(f"None of the {n} files can be read as an image; the first: {first}")
            if drr.ranks()[0] == 0:
                print(f"skipped {len(bad)} of {n} files, which cannot be read as images; the first: {first}")

    def load(self, device):
        """Holds all views on the device, uint8."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        good, unreadable = np.zeros(len(self), bool), []
        for views, block, bad in self.read_all(np.flatnonzero(self.crop_of == 0), "reading images"):
            images[torch.from_numpy(views)], good[views] = block, True
            unreadable.extend(bad)
        self.report(unreadable)
        self.keep(good)
        self.images = images[torch.from_numpy(good)].to(device)

    def draw(self, step):
        """Which views make up the batch of a step (B,), and which of them are mirrored (B,)."""
        rng = np.random.default_rng([self.seed, step])
        views = np.searchsorted(self.cdf, rng.random(self.batch_size), side="right").clip(max=len(self) - 1)
        return views, (rng.random(self.batch_size) < 0.5) & self.flip

    def readable(self, i):
        """(index, picture) of view i or, if its file cannot be read, of the first view of the next file that can."""
        for _ in range(100):
            try:
                return i, self.crop(i)
            except UserError as error:
                reason = error
            i = np.searchsorted(self.file_of, self.file_of[i], side="right") % len(self)
        raise UserError(f"100 files in a row cannot be read as images; the last: {reason}")

    def __getitem__(self, step):
        views, flips = (drawn[self.own] for drawn in self.draw(step))
        bad = 0
        if self.images is not None:
            images = self.images[torch.from_numpy(views)]
        else:
            drawn, (views, pictures) = views, zip(*map(self.readable, views))
            views, images = np.array(views), torch.stack(pictures)
            bad = int((views != drawn).sum())
        flips = torch.from_numpy(flips).to(images.device)
        images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        return images, torch.from_numpy(self.labels[views]), bad

    def batches(self, start, stop):
        """The batches of steps start .. stop - 1, decoded ahead in worker processes unless they are in memory."""
        steps = range(start, stop)
        if self.images is not None:
            return (self[step] for step in steps)
        return iter(torch.utils.data.DataLoader(self, batch_size=None, sampler=steps, num_workers=self.workers))


def validation_images(directory, size, count, classes, index=None):
    """Up to `count` central crops of DIR/val, spread over it, and their labels among `classes` (all 0 where those are [""]);
    (None, None) without DIR/val. `index` is that of `find_images`. Raises UserError when DIR/val has none of the classes,
    or no picture of them that can be read."""
    if not (Path(directory) / "val").is_dir():
        return None, None
    files, labels, names = find_images(directory, "val", index)
    number = {name: 0 if classes == [""] else classes.index(name) for name in names if name in classes or classes == [""]}
    known = [i for i in range(len(files)) if names[labels[i]] in number]
    if not known:
        raise UserError(f"{directory}/val has none of the training's classes ({', '.join(classes[:3])}, ...) but "
                        f"{', '.join(names[:3])}; rename its folders or move it away.")
    pictures, found = [], []
    for i in (known[i] for i in np.linspace(0, len(known) - 1, min(count, len(known))).astype(int)):
        with contextlib.suppress(UserError):                  # a damaged file is not fatal here either
            pictures.append(crop(open_image(files[i]), size))
            found.append(number[names[labels[i]]])
    if not pictures:
        raise UserError(f"None of the images in {directory}/val can be read; mend them or move the folder away.")
    return torch.stack(pictures), torch.tensor(found)


# === Token cache: views -> codes, computed once =====================================================================
TO_DO, ENCODED, UNREADABLE = range(3)                        # the state of a file while the cache is being written


def cached_codes(views, vae, directory, device, dtype):
    """The codes of every view and (with data.flip) of its mirror image: a memory-mapped uint16 array (1 or 2, M, N, D).

    The file's name is a hash of the RQ-VAE's weights, the precision and the views (folder and name of each file, its
    size, its crops): another model or other files make another cache. Files that cannot be read are dropped from
    `views`. All ranks call this together, with a `directory` that all of them see, and share the work; interrupted, it
    goes on where it stopped, with any number of ranks. Raises UserError when the codes of other ranks do not arrive, or when the
    cache is damaged.
    """
    content = [drr.code_fingerprint(vae), str(dtype), views.size, views.seed, views.flip, fingerprint(views.files)]
    digest = hashlib.sha256(json.dumps(content).encode() + views.file_of.tobytes() + views.crop_of.tobytes())
    name = digest.hexdigest()[:16]
    path, index_path = Path(directory) / f"codes-{name}.npy", Path(directory) / f"codes-{name}-views.npy"
    if not path.exists():                                    # no rank can finish it before the others have looked
        encode_views(views, vae, path, index_path, device, dtype)
    try:
        index, codes = np.load(index_path), np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The token cache {path} with {index_path.name} is damaged ({error}); delete both, and they will be made "
                        "again.") from None
    if len(index) < len(views):
        views.keep(np.isin(np.arange(len(views)), index))
    return codes


def encode_views(views, vae, path, index_path, device, dtype):
    """Writes the codes of the views that can be read to `path` and their indices to `index_path`."""
    part, state_path = path.with_suffix(".part"), path.with_suffix(".state")
    shape = (1 + views.flip, len(views), vae.side ** 2, vae.quantizer.depth)
    rank, world = drr.ranks()
    barrier = dist.barrier if world > 1 else lambda: None
    if rank == 0 and not (part.exists() and state_path.exists()):
        with drr.replacing(state_path) as temporary:         # first, since an old one would vouch for codes of zeros
            allocate(temporary, np.uint8, (len(views.files),))
        with drr.replacing(part) as temporary:
            allocate(temporary, np.uint16, shape)
    barrier()
    codes, state = (np.load(p, mmap_mode="r+") for p in (part, state_path))
    starts = np.flatnonzero(views.crop_of == 0)
    todo = starts[state[views.file_of[starts]] == TO_DO]
    barrier()                                                # nobody writes before all know what is to do
    for index, images, bad in views.read_all(np.array_split(todo, world)[rank], "encoding images"):
        for i in range(0, len(index), 128):
            x = to_float(images[i:i + 128], device)
            for flip in range(shape[0]):
                codes[flip, index[i:i + 128]] = encode(vae, x.flip(-1) if flip else x, dtype).cpu().numpy()
        codes.flush()                                        # first the codes, then the note that they are there
        state[views.file_of[index]], state[views.file_of[bad]] = ENCODED, UNREADABLE
    barrier()
    left = int((state[views.file_of[starts]] == TO_DO).sum())
    if left:                                                 # a network disk need not show one machine what another wrote
        raise UserError(f"The codes of {left} files did not reach {part}; compute the cache on one machine first, by "
                        "starting the training there, then start on all.")
    views.report(starts[state[views.file_of[starts]] == UNREADABLE])
    if rank == 0:
        good = np.flatnonzero(state[views.file_of] == ENCODED)
        with drr.replacing(index_path) as temporary, open(temporary, "wb") as f:
            np.save(f, good)
        if len(good) == len(views):
            os.replace(part, path)
        else:                                                # closes the gaps, a block at a time to save memory
            with drr.replacing(path) as temporary:
                dense = allocate(temporary, np.uint16, (shape[0], len(good), *shape[2:]))
                for i in range(0, len(good), 8192):
                    dense[:, i:i + 8192] = codes[:, good[i:i + 8192]]
                dense.flush()
            part.unlink()
        state_path.unlink()
    barrier()


def allocate(path, dtype, shape):
    """A memory-mapped file of zeros. Raises OSError when the disk has no room for it."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):                       # else a disk that fills up kills the process, by SIGBUS
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return array


@torch.inference_mode()
def encode(vae, images, dtype):
    """Codes (B, N, D) of images in [-1, 1], the convolutions in `dtype`: the training's, so that bf16 gives some other codes than
    float32 (on a GPU TF32), in which sampling encodes."""
    with autocast(images.device, dtype):
        return vae.encode(images)
