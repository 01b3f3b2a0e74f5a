"""Folders of images, tar shards or Parquet files -> batches; each batch is a function of (seed, step) alone.

A *view* is one square crop of one file: view 0 is the central square, the others are random crops at random
scales, the same in every run. A data set is a fixed list of views, so that an image in memory, one decoded by
a thread and one whose codes were computed last week are the same.
"""
import collections
import csv
import functools
import hashlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from drr import UserError, code_fingerprint, ranks, replacing
from support.common import EXTENSIONS, autocast, crop, from_rank_0, open_image, to_float

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".parquet")
SPLITS = {"train": "train", "val": "validation", "test": "test"}       # our names and the Hugging Face hub's
OF_A_RUN = re.compile(r"(vae|transformer)(\.csv|\.safetensors|_state_\d+\.pt)")      # what a training writes


# === Finding: DIR -> files, labels, classes =================================================================
class Files:
    """F images; item i is a Path or, of archives, a shards.Picture. The names are kept in an array: a million
    Paths would be 400 MB."""

    def __init__(self, root, names, table=None, captions=None):
        self.root = Path(root)
        self.names = np.array([os.fsencode(name) for name in names])           # (F,) of a fixed width
        self.table = table                                   # of archives
        self.captions = captions                             # those in archives or a list, (F,)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = os.fsdecode(self.names[i])
        if self.table is None:
            return self.root / name
        from support.shards import Picture
        return Picture(self.root, name, self.table, int(i))

    def texts(self, i):
        """The captions of image i, one a line: those in an archive or a list, else of KEY.txt beside KEY.jpg.
        [] where there are none, or not in UTF-8."""
        try:
            found = self[i].with_suffix(".txt").read_bytes() if self.captions is None else self.captions[i]
            found = found if isinstance(found, list) else [found or ""]
            found = [text.decode("utf-8-sig") if isinstance(text, bytes) else text or "" for text in found]
        except (FileNotFoundError, UnicodeDecodeError):
            return []
        return [line.strip() for text in found for line in text.splitlines() if line.strip()]

    @functools.cached_property
    def content(self):
        """A short hash of names, sizes and (of up to 1,024 images) contents: the same wherever they lie."""
        def sizes(start):                                    # of an archive's images, their sum
            some = range(start, min(start + 1024, len(self)))
            return [os.path.getsize(self[i]) for i in some] if self.table is None else self.table.data.nbytes

        def sample(i):                                       # 64 KiB from the middle
            with self[i].open("rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) // 2 - 2 ** 15))
                return hashlib.sha256(f.read(2 ** 16)).hexdigest()

        with ThreadPoolExecutor() as pool:                   # because a network disk answers slowly
            found = [*pool.map(sizes, range(0, len(self), 1024)),
                     *pool.map(sample, range(0, len(self), -(-len(self) // 1024)))]
        return hashlib.sha256(json.dumps(found).encode() + self.names.tobytes()).hexdigest()[:16]


def files_fingerprint(files, labels, classes):
    """A short hash of the images, their labels and the classes' names."""
    text = json.dumps([files.content, labels.tolist(), classes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_of(directory, split):
    """(folder, its tar or Parquet files) of a split: of DIR/split; of DIR/data, where files from the Hugging
    Face hub bear the split's name; for `train` else of DIR itself. (None, []) where there is none."""
    places = [(split, "*"), ("data", f"{SPLITS[split]}-*")] + [(".", "*")] * (split == "train")
    for folder, pattern in ((Path(directory) / name, pattern) for name, pattern in places):
        archives = [p for p in folder.glob(pattern) if p.name[0] != "." and p.name.lower().endswith(ARCHIVES)]
        if archives or pattern == "*" and folder.is_dir():
            return folder, sorted(archives)
    return None, []


def caption_list(directory, split):
    """The list of images with captions: DIR/split.tsv or, as in the official code, DIR/split_list.txt."""
    names = (Path(directory) / name for name in (f"{split}.tsv", f"{split}_list.txt"))
    return next(filter(Path.is_file, names), None)


def listed_images(path):
    """The Files in a list, each line a path relative to it, a TAB and a caption; a path in several lines has
    several captions. Paths without a file are left out and counted."""
    found = collections.defaultdict(list)
    for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines():        # a byte-order mark
        name, tab, caption = line.partition(b"\t")
        if not tab and line.strip():
            raise UserError(f"{path} has a line without a TAB, {line[:60]}; expected PATH<TAB>CAPTION.")
        found[os.fsdecode(name)].append(caption)
    found.pop("", None)                                      # empty lines
    names = [name for name in found if (path.parent / name).is_file()]
    if not names:
        raise UserError(f"{path} names no image that exists; expected lines PATH<TAB>CAPTION.")
    if ranks()[0] == 0:
        print(f"{path}: {len(names)} images; {len(found) - len(names)} others do not exist", file=sys.stderr)
    return Files(path.parent, names, captions=[found[name] for name in names])


def find_images(directory, split="train", out=None, captions=False):
    """Images of DIR/split/<class>/*, or of the archives DIR/split/*.tar or *.parquet (of DIR when there is no
    DIR/train). Returns the files in a fixed order, their labels (F,) int64 and the class names (without
    classes one, ""). UserError without images, and where a training would write to `out` among them.
    A list of images with captions stands for a folder DIR/split that is not there; for a model of `captions`
    it comes first."""
    listed = caption_list(directory, split)
    if listed and (captions or not (Path(directory) / split).is_dir()):
        files = listed_images(listed)
        return files, np.zeros(len(files), np.int64), [""]
    root, archives = split_of(directory, split)
    if root is None:
        raise UserError(f"The folder {directory} does not exist; give one that holds images.")
    unused = []
    splits = {*SPLITS, *SPLITS.values()} if root == Path(directory) else ()
    names = list(pictures(root, "", unused, splits))
    if archives and names:
        raise UserError(f"{root} holds both {archives[0].name} and images ({names[0]}); leave one kind.")
    inside = {"", *(name.rpartition("/")[0] for name in names)}
    if out and os.path.realpath(out) in {os.path.realpath(root / folder) for folder in inside}:
        raise UserError(f"--out {out} holds images of --data; choose another folder, or the training "
                        "would see the pictures that it draws itself.")
    table = texts = None
    if archives:
        from support.shards import open_archives
        table, names, labels, classes, texts = open_archives(archives, [k for k, _ in class_table(directory)])
    else:
        if unused and ranks()[0] == 0:
            print(f"{root}: not used, as no images: {len(unused)} files or folders, for example "
                  f"{', '.join(unused[:3])}", file=sys.stderr)
        if not names:
            raise UserError(f"{root} holds no images; expected <class>/*.jpg in it, or just images "
                            f"({', '.join(sorted(EXTENSIONS))}), or *.tar or *.parquet.")
        class_of = [name.partition("/")[0] if "/" in name else "" for name in names]
        classes, labels = np.unique(class_of, return_inverse=True)             # sorted
        classes = classes.tolist()
        if len(classes) > 1 and classes[0] == "":
            raise UserError(f"{root / names[0]} lies beside the class folders; move it into one or away.")
    if ranks()[0] == 0:
        shown = len(classes) if len(classes) > 8 else ", ".join(classes) or "none"
        print(f"{root}: {len(names)} images; classes: {shown}", file=sys.stderr)
    return Files(root, names, table, texts), labels, classes


def pictures(root, inside, unused, splits=(), above=()):
    """Yields the images in the folder root/inside and those below it, sorted, as "inside/name", but not those
    in folders that begin with a dot, hold a training's output, or are `splits` beside the classes. What is no
    image goes to the list `unused`. `above`: the folders on the way; links back to them are ignored."""
    folder = os.path.join(root, inside)
    above = (*above, os.path.realpath(folder))
    entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda entry: entry.name)
    if not entries or any(OF_A_RUN.fullmatch(entry.name) for entry in entries):
        unused.append(folder)
        return
    for entry in entries:
        if os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
            yield inside + entry.name
        elif entry.name != "classes.tsv" and not entry.name.endswith(".txt") and not entry.is_dir():
            unused.append(entry.path)
    for entry in entries:
        if entry.name not in splits and entry.is_dir() and os.path.realpath(entry.path) not in above:
            yield from pictures(root, f"{inside}{entry.name}/", unused, (), above)


def class_table(directory):
    """[(wnid, name)] of DIR/classes.tsv, in its order; [] without that file."""
    path = Path(directory) / "classes.tsv"
    if not path.exists():
        return []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
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
    name = f"{seed}/{path.name}".encode("utf-8", "surrogateescape")          # a file's name need not be UTF-8
    return int.from_bytes(hashlib.sha256(name).digest()[:7], "big")


@functools.lru_cache(2)                                      # a batch may lie in two epochs
def epoch_order(seed, epoch, n):
    return np.random.default_rng([seed, epoch, n]).permutation(n).astype(np.int32)


class Views:
    """The M views of a data set and the probability of drawing each. Item t, for any t >= 0, is the batch of
    step t: uint8 images (B, 3, S, S), their views (B,), and how many of them stand in for a file that could
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
        """Sets `cdf` (M,), the probability of drawing each view or one before it, and `alike`."""
        # P(class) ~ class_weight * n_c^(1 - balance), shared equally by the views of the class.
        classes = len(self.class_weight)
        files = np.bincount(self.labels[self.crop_of == 0], minlength=classes)           # n_c
        views = np.bincount(self.labels, minlength=classes)
        weight = (self.class_weight * files ** (1.0 - self.c.balance) / np.maximum(views, 1))[self.labels]
        self.cdf = np.cumsum(weight / weight.sum())
        self.alike = bool((weight == weight[:1]).all())      # all views are equally probable

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
        """Holds all views on the device, uint8, and drops those that cannot be read. Returns settings that a
        resumed run must share: which views a step draws depends on how many there are."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        good = np.zeros(len(self), bool)
        starts = np.flatnonzero(self.crop_of == 0)           # the first view of each file
        for views, block, _ in self.read_all(starts, "reading images"):
            images[torch.from_numpy(views)] = block
            good[views] = True
        self.report(starts[~good[starts]])
        self.select(good)
        self.images = images[torch.from_numpy(good)].to(device)
        return {} if good.all() else {"views that can be read": len(self)}

    # --- Batches: (seed, step) -> images, labels ------------------------------------------------------------
    def draw(self, step):
        """Which views make up the batch of a step (B,), and which of them are mirrored (B,)."""
        rng = np.random.default_rng([self.c.seed, step])
        uniforms = rng.random((2, self.batch_size))
        if self.alike:                                       # in epochs, each with an order of its own
            epoch, place = np.divmod(step * self.batch_size + np.arange(self.batch_size), len(self))
            orders = [epoch_order(self.c.seed, e, len(self))[place[epoch == e]] for e in np.unique(epoch)]
            views = np.concatenate(orders)
        else:
            views = np.searchsorted(self.cdf, uniforms[0], side="right").clip(max=len(self) - 1)
        return views, (uniforms[1] < 0.5) & self.c.flip

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
        return images, views, int((views != drawn).sum())

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


def validation_images(directory, size, count, classes):
    """Up to `count` central crops of DIR/val, spread over it, uint8 (B, 3, S, S), and labels (B,), indices of
    `classes` (all 0 where those are [""]); where `classes` is None a list of captions instead. (None, None)
    without DIR/val, UserError where it has none of them."""
    if split_of(directory, "val")[0] is None and not caption_list(directory, "val"):
        return None, None
    files, labels, names = find_images(directory, "val", captions=classes is None)
    if classes is None:
        known = {i: texts[0] for i, texts in enumerate(map(files.texts, range(len(files)))) if texts}
    else:
        number = dict.fromkeys(names, 0) if classes == [""] else {name: i for i, name in enumerate(classes)}
        known = {i: number[names[k]] for i, k in enumerate(labels) if names[k] in number}
    places = list(known)
    found, damaged = [], 0                                   # (image, label or caption)
    for k in np.linspace(0, len(known) - 1, min(count, len(known))).astype(int):
        try:
            found.append((crop(open_image(files[places[k]]), size), known[places[k]]))
        except UserError:                                    # a damaged file is not fatal here either
            damaged += 1
    if not found:
        needed = f"of the training's classes ({', '.join(classes[:3])}, ...)" if classes else "with a caption"
        raise UserError(f"{directory}/val, with {', '.join(names[:3])}, holds no readable image {needed}; "
                        "repair it or move it away.")
    if len(known) < len(files) or damaged:
        why = "of classes that the training lacks" if classes else "without a caption"
        print(f"{directory}/val: left out {len(files) - len(known)} images {why} and {damaged} that cannot "
              "be read")
    images, labels = zip(*found)
    return torch.stack(images), torch.tensor(labels) if classes else list(labels)


# === Token cache: views -> codes, computed once =============================================================
TO_DO, ENCODED, UNREADABLE = range(3)                        # states of a file while the cache is written


def cached_codes(views, vae, directory, device, dtype):
    """The codes of every view and (with data.flip) its mirror image: uint16 (1 or 2, M, N, D), memory-mapped,
    in a file named by a hash of RQ-VAE, precision and views. Drops unreadable files from `views`. All ranks
    call this together and share the work in a `directory` that all of them see; after an interruption it goes
    on where it stopped, with any number of ranks. UserError for a damaged cache."""
    content = [code_fingerprint(vae), str(dtype), views.size, views.c.seed, views.c.flip, views.c.crop_scale,
               views.files.content]
    digest = hashlib.sha256(json.dumps(content).encode() + views.file_of.tobytes() + views.crop_of.tobytes())
    path = Path(directory) / f"codes-{digest.hexdigest()[:16]}.npy"
    state_path = path.with_name(f"{path.stem}-files.npy")
    if not from_rank_0(path.exists()):                       # a network disk may tell each rank another tale
        encode_views(views, vae, path, state_path, device, dtype)
    try:
        codes, state = (np.load(file, mmap_mode="r") for file in (path, state_path))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The token cache {path} with {state_path.name} is damaged ({error}); delete both, "
                        "and they will be made again.") from None
    good = state[views.file_of] == ENCODED
    views.report(np.flatnonzero(~good & (views.crop_of == 0)))
    views.select(good)
    return codes if good.all() else codes[:, good]           # in memory then: 1 GB for a million images


def encode_views(views, vae, path, state_path, device, dtype):
    """Writes the codes of all views to `path`, and to `state_path` which of the files could be read."""
    part_path = path.with_suffix(".part")
    shape = (1 + views.c.flip, len(views), vae.side ** 2, vae.quantizer.depth)
    rank, world = ranks()
    barrier = dist.barrier if world > 1 else lambda: None
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
    state.flush()
    barrier()
    missing = int((state[views.file_of[starts]] == TO_DO).sum())
    if missing:                                              # a network disk may show them late
        raise UserError(f"The codes of {missing} files did not reach {part_path}; compute the cache on one "
                        "machine first, by starting the training there, then start on all.")
    if rank == 0:
        os.replace(part_path, path)
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
