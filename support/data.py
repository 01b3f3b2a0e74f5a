"""Folders or tar shards of images -> batches; each batch is a function of (seed, step) alone.

A *view* is one square crop of one file: view 0 is the central square, the others are random crops at random
scales, the same in every run. A data set is a fixed list of views, so that an image in memory, one decoded by
a thread and one whose codes were computed last week are the same.
"""
import collections
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

from drr import UserError, code_fingerprint, ranks, replacing
from support.common import EXTENSIONS, autocast, crop, open_image, to_float


# === Finding: DIR -> files, labels, classes =================================================================
class Files:
    """F images; item i is a Path or, in a tar shard, a shards.Member. Kept in a few arrays: a million Paths
    would be 400 MB."""

    def __init__(self, folders, counts, names, offsets=None, sizes=None):
        self.folders = folders                               # or shards; `counts`: how many images each holds
        self.folder_of = np.repeat(np.arange(len(folders), dtype=np.int32), counts)       # (F,)
        self.names = names                                   # (F,) bytes of a fixed width
        self.offsets = offsets                               # (F,) where in its shard an image begins
        if sizes is not None:                                # of shards; else they are asked for below
            self.sizes = sizes

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        folder = Path(self.folders[self.folder_of[i]])
        name = os.fsdecode(self.names[i])
        if self.offsets is None:
            return folder / name
        from support.shards import Member
        return Member(folder, name, int(self.offsets[i]), int(self.sizes[i]))

    @functools.cached_property
    def sizes(self):
        """Bytes of each image (F,), asked for in threads because a network disk answers slowly."""
        def sizes_from(start):
            return [os.path.getsize(self[i]) for i in range(start, min(start + 1024, len(self)))]
        with ThreadPoolExecutor() as pool:
            return np.concatenate(list(pool.map(sizes_from, range(0, len(self), 1024)))).astype(np.int64)


def files_fingerprint(files):
    """A short hash of the images' names, sizes and folders' names: the same wherever the data set lies."""
    digest = hashlib.sha256(json.dumps([Path(folder).name for folder in files.folders]).encode())
    for array in (files.folder_of, files.names, files.sizes):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def find_images(directory, split="train", index=None):
    """Images of DIR/split/<class>/* or of the tar shards DIR/split/*.tar (of DIR when there is no DIR/train).
    Returns the files in a fixed order, their labels (F,) int64 and the class names (without class folders one
    class, ""). index: a folder to keep the shards' indices in. UserError without images."""
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"The folder {directory} does not exist; give one that holds images.")
    if (root / "train").is_dir() or split != "train":
        root = root / split
    tars = sorted(root.glob("*.tar"))
    folders = list(picture_folders(root)) if root.is_dir() else []
    if tars and folders:
        raise UserError(f"{root} holds both tar shards and images ({folders[0][0]}); leave one kind only.")
    if tars:
        return open_shards(tars, directory, index)
    if not folders:
        raise UserError(f"{root} holds no images; expected <class>/*.jpg in it, or just images "
                        f"({', '.join(sorted(EXTENSIONS))}), or tar shards *.tar.")
    paths, names = zip(*folders)
    class_of = [(*Path(path).relative_to(root).parts, "")[0] for path in paths]             # of each folder
    classes, numbers = np.unique(class_of, return_inverse=True)                             # sorted
    classes = classes.tolist()
    if len(classes) > 1 and classes[0] == "":
        raise UserError(f"{os.path.join(paths[0], os.fsdecode(names[0][0]))} lies beside the class folders; "
                        "move it into one of them or away.")
    empty = sorted({p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "."} - {*classes})
    if empty and classes != [""] and ranks()[0] == 0:
        print(f"{root}: {len(empty)} folder(s) without images: {', '.join(empty[:8])}", file=sys.stderr)
    counts = [len(inside) for inside in names]
    return Files(paths, counts, np.concatenate(names)), np.repeat(numbers, counts), classes


def picture_folders(folder, above=()):
    """Yields (path, names of its images as an array of bytes) for the folder and those below it, sorted, but
    not those that begin with a dot. `above`: the folders on the way; links back to them are ignored."""
    above = (*above, os.path.realpath(folder))
    entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda entry: entry.name)
    names = [os.fsencode(entry.name) for entry in entries
             if os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file()]
    if names:
        yield os.fspath(folder), np.array(names)
    for entry in entries:
        if entry.is_dir() and os.path.realpath(entry.path) not in above:
            yield from picture_folders(entry.path, above)


def open_shards(paths, directory, index):
    """`find_images` of tar shards; the classes are the wnids of DIR/classes.tsv or else "0", "1", ..."""
    from support.shards import index_shards
    found = index_shards(paths, index)
    columns = {key: np.concatenate([found[path][key] for path in paths]) for key in found[paths[0]]}
    labels = columns.pop("labels")
    if not len(labels):
        raise UserError(f"The {len(paths)} tar shards of {paths[0].parent} hold no images.")
    classes = [wnid for wnid, _ in class_table(directory)] or [str(i) for i in range(labels.max() + 1)]
    if labels.max() >= len(classes):
        raise UserError(f"The shards of {paths[0].parent} name class {labels.max()}, but {directory} has a "
                        f"classes.tsv of {len(classes)} lines, for 0 to {len(classes) - 1}; add the others.")
    return Files([str(p) for p in paths], [len(found[p]["names"]) for p in paths], **columns), labels, classes


def class_table(directory):
    """[(wnid, name)] of DIR/classes.tsv, in its order; [] without that file."""
    path = Path(directory) / "classes.tsv"
    if not path.exists():
        return []
    try:
        rows = csv.DictReader(path.read_text("utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        table = [(row["wnid"], row["name"]) for row in rows]
    except (UnicodeDecodeError, KeyError):
        table = []
    if not table or None in (text for row in table for text in row):
        raise UserError(f"{path} is not a table of classes; expected UTF-8 text, columns separated by tabs, "
                        "first a line of their names, `wnid` and `name` among them, then one line per class.")
    return table


def class_titles(directory, classes):
    """The classes' names for people: from DIR/classes.tsv where it has the class, else the folder's name."""
    titles = dict(class_table(directory))
    return [titles.get(name, name) for name in classes]


# === Views: (file, number of the crop) -> uint8 (3, S, S) ===================================================
def file_seed(path, seed):
    """The seed of a file's random crops: files of the same name, in whatever folder, have the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path.name}".encode()).digest()[:7], "big")


class Views(torch.utils.data.Dataset):
    """The M views of a data set and the probability of drawing each. Item t, for any t >= 0, is the batch of
    step t: uint8 images (B, 3, S, S), labels (B,), and how many of the images stand in for a file that could
    not be read. `rows` are those of the batch that this process makes: all, unless a caller sets others."""
    BLOCK = 256                                              # files decoded together

    def __init__(self, files, labels, classes, size, batch_size, c):
        if (c.favour != 1 or c.favour_class) and c.favour_class not in classes:
            raise UserError(f"data.favour_class is {c.favour_class!r}; the data has no class of that name, "
                            f"but for example {', '.join(classes[:3])}.")
        self.c = c                                           # the section `data`
        self.files = files
        self.size = size
        self.batch_size = batch_size
        self.rows = np.arange(batch_size)
        self.images = None                                   # uint8 (M, 3, S, S) after `load`
        self.class_weight = np.array([c.favour if name == c.favour_class else 1.0 for name in classes])
        per_class = np.maximum(np.bincount(labels), 1)       # files of each class
        per_file = np.maximum(c.views, np.ceil(c.class_views / per_class)).astype(int)[labels]
        # For each view (M,): which of the files, in ascending order; its class; the number of the crop.
        self.file_of = np.repeat(np.arange(len(files), dtype=np.int32), per_file)
        self.labels = np.repeat(labels, per_file)
        first = np.cumsum(per_file) - per_file               # (F,) the first view of each file
        self.crop_of = (np.arange(len(self.file_of)) - first[self.file_of]).astype(np.int32)
        self.set_probabilities()

    def set_probabilities(self):
        """Sets `cdf` (M,): the probability of drawing each view or one before it."""
        # P(class) ~ class_weight * n_c^(1 - balance), shared equally by the views of the class.
        classes = len(self.class_weight)
        files = np.bincount(self.labels[self.crop_of == 0], minlength=classes)           # n_c
        views = np.bincount(self.labels, minlength=classes)
        weight = (self.class_weight * files ** (1.0 - self.c.balance) / np.maximum(views, 1))[self.labels]
        self.cdf = np.cumsum(weight / weight.sum())

    def select(self, chosen):
        """Drops all views but those marked in `chosen` (M,) bool; `files` stays as it is."""
        self.file_of = self.file_of[chosen]
        self.labels = self.labels[chosen]
        self.crop_of = self.crop_of[chosen]
        self.set_probabilities()

    def __len__(self):
        return len(self.file_of)

    def read(self, i, picture=None):
        """View i, uint8 (3, S, S), of its file or of the file's picture if that is open already."""
        path = self.files[self.file_of[i]]
        picture = picture or open_image(path)
        return crop(picture, self.size, self.crop_of[i], file_seed(path, self.c.seed), self.c.crop_scale)

    def read_all(self, starts, doing):
        """Decodes files, given by their first views, in threads: the next block while the caller is busy with
        this one. Yields views (m,), their images uint8 (m, 3, S, S), and first views of unreadable files."""
        def read_file(start):
            views = np.arange(start, np.searchsorted(self.file_of, self.file_of[start], side="right"))
            try:
                picture = open_image(self.files[self.file_of[start]])
                return views, torch.stack([self.read(i, picture) for i in views]), []
            except UserError:
                return views[:0], torch.empty(0, 3, self.size, self.size, dtype=torch.uint8), [start]

        bar = tqdm(total=len(starts), desc=doing, unit="file", disable=ranks()[0] > 0)
        with ThreadPoolExecutor(max(1, self.c.workers)) as pool, bar:
            ahead = pool.map(read_file, starts[:self.BLOCK])
            for i in range(0, len(starts), self.BLOCK):
                views, images, bad = zip(*ahead)
                ahead = pool.map(read_file, starts[i + self.BLOCK:i + 2 * self.BLOCK])
                yield np.concatenate(views), torch.cat(images), np.array(sum(bad, []), int)
                bar.update(len(views))

    def report(self, bad):
        """Says how many files cannot be read, given their first views. Raises UserError when no file can."""
        if not len(bad):
            return
        first = self.files[self.file_of[bad[0]]]
        n = (self.crop_of == 0).sum()
        if len(bad) == n:
            raise UserError(f"None of the {n} files can be read as an image; the first: {first}")
        if ranks()[0] == 0:
            print(f"skipped {len(bad)} of {n} files, which cannot be read as images; the first: {first}")

    def load(self, device):
        """Holds all views on the device, uint8, and drops those that cannot be read."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        good = np.zeros(len(self), bool)
        starts = np.flatnonzero(self.crop_of == 0)           # the first view of each file
        for views, block, _ in self.read_all(starts, "reading images"):
            images[torch.from_numpy(views)] = block
            good[views] = True
        self.report(starts[~good[starts]])
        self.select(good)
        self.images = images[torch.from_numpy(good)].to(device)

    # --- Batches: (seed, step) -> images, labels ------------------------------------------------------------
    def draw(self, step):
        """Which views make up the batch of a step (B,), and which of them are mirrored (B,)."""
        rng = np.random.default_rng([self.c.seed, step])
        views = np.searchsorted(self.cdf, rng.random(self.batch_size), side="right").clip(max=len(self) - 1)
        return views, (rng.random(self.batch_size) < 0.5) & self.c.flip

    def readable(self, i):
        """(index, image) of view i or, if its file cannot be read, of the next readable file's first view."""
        for _ in range(100):
            try:
                return i, self.read(i)
            except UserError as error:
                reason = error
            i = np.searchsorted(self.file_of, self.file_of[i], side="right") % len(self)
        raise UserError(f"100 files in a row cannot be read as images; the last: {reason}")

    def __getitem__(self, step):
        drawn, flips = (values[self.rows] for values in self.draw(step))
        views = drawn
        if self.images is not None:
            images = self.images[torch.from_numpy(drawn)]
        else:
            views, images = zip(*map(self.readable, drawn))
            views = np.array(views)
            images = torch.stack(images)
        flips = torch.from_numpy(flips).to(images.device)
        images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        return images, torch.from_numpy(self.labels[views]), int((views != drawn).sum())

    def batches(self, start, stop):
        """Yields the batches of steps start .. stop - 1, decoded ahead in threads unless in memory."""
        if self.images is not None or not self.c.workers:
            yield from (self[step] for step in range(start, stop))
            return
        with ThreadPoolExecutor(self.c.workers) as pool:     # Pillow decodes and resizes beside each other
            ahead = collections.deque()
            for step in range(start, stop):
                ahead.append(pool.submit(self.__getitem__, step))
                if len(ahead) > 2 * self.c.workers:
                    yield ahead.popleft().result()
            yield from (batch.result() for batch in ahead)


def validation_images(directory, size, count, classes, index=None):
    """Up to `count` central crops of DIR/val, spread over it, uint8 (B, 3, S, S), and labels, indices of
    `classes` (all 0 where those are [""]); (None, None) without DIR/val, UserError where it has none of them.
    index: as in `find_images`."""
    if not (Path(directory) / "val").is_dir():
        return None, None
    files, labels, names = find_images(directory, "val", index)
    number = dict.fromkeys(names, 0) if classes == [""] else {name: i for i, name in enumerate(classes)}
    known = [i for i in range(len(files)) if names[labels[i]] in number]
    found = []                                               # (image, label)
    for k in np.linspace(0, len(known) - 1, min(count, len(known))).astype(int):
        with contextlib.suppress(UserError):                 # a damaged file is not fatal here either
            image = crop(open_image(files[known[k]]), size)
            found.append((image, number[names[labels[known[k]]]]))
    if not found:
        raise UserError(f"{directory}/val, with {', '.join(names[:3])}, holds no readable image of the "
                        f"training's classes ({', '.join(classes[:3])}, ...); repair it or move it away.")
    images, labels = zip(*found)
    return torch.stack(images), torch.tensor(labels)


# === Token cache: views -> codes, computed once =============================================================
TO_DO, ENCODED, UNREADABLE = range(3)                        # states of a file while the cache is written


def cached_codes(views, vae, directory, device, dtype):
    """The codes of every view and (with data.flip) its mirror image: uint16 (1 or 2, M, N, D), memory-mapped,
    in a file named by a hash of RQ-VAE, precision and views. Drops unreadable files from `views`. All ranks
    call this together and share the work in a `directory` that all of them see; after an interruption it goes
    on where it stopped, with any number of ranks. UserError for a damaged cache."""
    content = [code_fingerprint(vae), str(dtype), views.size, views.c.seed, views.c.flip, views.c.crop_scale,
               files_fingerprint(views.files)]
    digest = hashlib.sha256(json.dumps(content).encode() + views.file_of.tobytes() + views.crop_of.tobytes())
    path = Path(directory) / f"codes-{digest.hexdigest()[:16]}.npy"
    index_path = path.with_name(f"{path.stem}-views.npy")
    if not path.exists():                                    # no rank can finish before all have looked
        encode_views(views, vae, path, index_path, device, dtype)
    try:
        index = np.load(index_path)
        codes = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The token cache {path} with {index_path.name} is damaged ({error}); delete both, "
                        "and they will be made again.") from None
    views.select(np.isin(np.arange(len(views)), index))      # without the unreadable ones
    return codes


def encode_views(views, vae, path, index_path, device, dtype):
    """Writes the codes of the readable views to `path` and the indices of these views to `index_path`."""
    part_path = path.with_suffix(".part")
    state_path = path.with_suffix(".state")
    shape = (1 + views.c.flip, len(views), vae.side ** 2, vae.quantizer.depth)
    rank, world = ranks()

    def barrier():
        if world > 1:
            dist.barrier()

    if rank == 0 and not (part_path.exists() and state_path.exists()):
        with replacing(state_path) as temporary:             # first: an old state would vouch for zeros
            allocate(temporary, np.uint8, (len(views.files),))
        with replacing(part_path) as temporary:
            allocate(temporary, np.uint16, shape)
    barrier()
    codes, state = (np.load(file, mmap_mode="r+") for file in (part_path, state_path))
    starts = np.flatnonzero(views.crop_of == 0)              # the first view of each file
    todo = starts[state[views.file_of[starts]] == TO_DO]
    barrier()                                                # no rank changes `state` before all have read it
    for index, images, bad in views.read_all(np.array_split(todo, world)[rank], "encoding images"):
        for i in range(0, len(index), 128):
            x = to_float(images[i:i + 128], device)
            for flip in range(shape[0]):
                codes[flip, index[i:i + 128]] = encode(vae, x.flip(-1) if flip else x, dtype).cpu().numpy()
        codes.flush()                                        # the codes first, then the note that they exist
        state[views.file_of[index]] = ENCODED
        state[views.file_of[bad]] = UNREADABLE
    barrier()
    missing = int((state[views.file_of[starts]] == TO_DO).sum())
    if missing:                                              # a network disk may show them late
        raise UserError(f"The codes of {missing} files did not reach {part_path}; compute the cache on one "
                        "machine first, by starting the training there, then start on all.")
    views.report(starts[state[views.file_of[starts]] == UNREADABLE])
    if rank == 0:
        good = np.flatnonzero(state[views.file_of] == ENCODED)
        with replacing(index_path) as temporary, open(temporary, "wb") as f:
            np.save(f, good)
        if len(good) == len(views):
            os.replace(part_path, path)
        else:                                                # close the gaps, by blocks to save memory
            with replacing(path) as temporary:
                dense = allocate(temporary, np.uint16, (shape[0], len(good), *shape[2:]))
                for i in range(0, len(good), 8192):
                    dense[:, i:i + 8192] = codes[:, good[i:i + 8192]]
                dense.flush()
            part_path.unlink()
        state_path.unlink()
    barrier()


def allocate(path, dtype, shape):
    """A memory-mapped file of zeros. Raises OSError when the disk has no room for it."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):                       # else a full disk kills the process (SIGBUS)
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return array


@torch.inference_mode()
def encode(vae, images, dtype):
    """Codes (B, N, D) of images in [-1, 1], the convolutions in `dtype`, the training's: bf16 gives some
    other codes than float32 (TF32 on a GPU), in which sampling encodes."""
    with autocast(images.device, dtype):
        return vae.encode(images)
