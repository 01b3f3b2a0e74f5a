"""Folders of images -> batches: every batch of every step is a function of (seed, step) alone.

A *view* is one square crop of one file: view 0 is the central square, the others are random crops at random scales,
the same in every run. A data set is a fixed list of views, so that a picture in memory, one decoded by a worker and
one whose codes were computed last week are the same picture.
"""
import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import drr
from drr import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


# === Finding: DIR -> files, labels, classes =========================================================================
def find_images(directory, split="train"):
    """Images of DIR/split/<class>/* (of DIR/<class>/* or DIR/* when there is no DIR/train).

    Returns sorted files, their labels (int64) and the class names; without class folders one class, named "".
    Raises UserError when there are none.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"The data folder {directory} does not exist; give --data a folder of images.")
    if (root / "train").is_dir() or split != "train":
        root = root / split
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.name[0] != "." and p.is_file())
    if not files:
        raise UserError(f"{root} holds no images; expected DIR/train/<class>/*.jpg or a folder of images "
                        f"({', '.join(sorted(EXTENSIONS))}).")
    folders = [p.relative_to(root).parts[0] if len(p.relative_to(root).parts) > 1 else "" for p in files]
    classes = sorted(set(folders))
    if len(classes) > 1 and classes[0] == "":
        raise UserError(f"{files[folders.index('')]} lies beside the class folders; move it into one of them or away.")
    index = {name: i for i, name in enumerate(classes)}
    return files, np.array([index[f] for f in folders]), classes


def class_titles(directory, classes):
    """Names for people: those of DIR/classes.tsv (columns `wnid` and `name`) where it has them, else the folder's."""
    path = Path(directory) / "classes.tsv"
    titles = {}
    if path.exists():
        header, *rows = [line.split("\t") for line in path.read_text().splitlines() if line]
        if not {"wnid", "name"} <= set(header):
            raise UserError(f"{path} has the columns {header}; expected `wnid` and `name`, separated by tabs.")
        titles = {row[header.index("wnid")]: row[header.index("name")] for row in rows}
    return [titles.get(name, name) for name in classes]


# === Reading: (file, view) -> uint8 (3, S, S) =======================================================================
def crop_box(width, height, view, seed):
    """The square (left, top, side) of a view: 0 is the central one, the others are random, 0.6 to 1 times as wide."""
    short = min(width, height)
    if view == 0:
        return (width - short) / 2, (height - short) / 2, short
    scale, x, y = np.random.default_rng([seed, view]).random(3)
    side = short * (0.6 + 0.4 * scale)
    return x * (width - side), y * (height - side), side


def open_image(path, background="white"):
    """An RGB picture, where it is transparent on `background`. Raises UserError when the file is no image."""
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):                          # 16-bit grey: Pillow would clip it at 255
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"The picture {path} does not exist.") from None
    except Exception as error:                               # Pillow raises nearly anything for a damaged file
        raise UserError(f"{path} cannot be read as an image ({error}).") from None


def crop(picture, size, view=0, seed=0):
    """A view of a PIL picture, resized with antialiasing: uint8 (3, size, size)."""
    left, top, side = crop_box(*picture.size, view, seed)
    picture = picture.resize((size, size), Image.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def file_seed(path, seed):
    """Two files with the same name have the same crops; two files with different names do not."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path.name}".encode()).digest()[:7], "big")


# === Batches: (seed, step) -> uint8 images, labels ==================================================================
class Views(torch.utils.data.Dataset):
    """The views of a data set and the probability with which each is drawn. `c` is the section `data`.

    Item t is the batch of step t: uint8 images (B, 3, S, S), labels (B,), and how many files could not be read.
    """

    def __init__(self, files, labels, classes, size, batch_size, c):
        self.size, self.batch_size = size, batch_size
        self.favour = np.ones(labels.max() + 1)                               # of each class
        if c.favour != 1 and not c.favour_class:
            raise UserError(f"data.favour is {c.favour}, but of which class? Give data.favour_class its folder.")
        if c.favour_class:
            if c.favour_class not in classes:
                raise UserError(f"data.favour_class is {c.favour_class!r}; the data has no class folder of that name.")
            self.favour[classes.index(c.favour_class)] = c.favour
        self.seed, self.balance, self.flip, self.workers = c.seed, c.balance, c.flip, c.workers
        per_class = np.bincount(labels)                                       # n_c, files of each class
        count = np.maximum(c.views, np.ceil(c.class_views / np.maximum(per_class, 1))).astype(int)[labels]
        self.images = None
        self.keep(np.repeat(np.array(files, object), count), np.repeat(labels, count),
                  np.concatenate([np.arange(n) for n in count]))

    def keep(self, files, labels, view):
        """Sets the list of views, one entry each: file, label, number of the crop."""
        self.files, self.labels, self.view = files, labels, view
        # P(class) ~ favour * n_c^(1 - balance), shared equally by the views of the class
        n = len(self.favour)
        n_files, n_views = np.bincount(labels[view == 0], minlength=n), np.bincount(labels, minlength=n)
        weight = (self.favour * n_files ** (1.0 - self.balance) / np.maximum(n_views, 1))[labels]
        self.cdf = np.cumsum(weight / weight.sum())

    def __len__(self):
        return len(self.files)

    def crop(self, i, picture=None):
        """View i, uint8 (3, S, S), of its file or of the file's picture if that is at hand."""
        path = self.files[i]
        return crop(picture or open_image(path), self.size, self.view[i], file_seed(path, self.seed))

    def read_all(self, doing):
        """Decodes every file once, in threads, a block of files at a time: yields (views, images uint8 (m, 3, S, S)),
        where `views` are the m indices that could be read. What cannot be read is left out, counted and reported."""
        starts = np.flatnonzero(self.view == 0)
        errors = []

        def read(start, stop):
            try:
                picture = open_image(self.files[start])
                return torch.stack([self.crop(i, picture) for i in range(start, stop)]), np.arange(start, stop)
            except UserError as error:
                errors.append(error)

        jobs = list(zip(starts, [*starts[1:], len(self)]))
        with ThreadPoolExecutor(max(1, self.workers)) as pool, tqdm(total=len(jobs), desc=doing, unit="file") as bar:
            for i in range(0, len(jobs), 256):
                block = [r for r in pool.map(lambda job: read(*job), jobs[i:i + 256]) if r]
                bar.update(len(jobs[i:i + 256]))
                if block:
                    yield np.concatenate([views for _, views in block]), torch.cat([images for images, _ in block])
        if errors:
            print(f"skipped {len(errors)} of {len(jobs)} files; the first: {errors[0]}")
        if len(errors) == len(jobs):
            raise UserError(f"None of the {len(jobs)} files can be read as an image; the first: {errors[0]}")

    def load(self, device):
        """Holds all views on the device, uint8."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        good = np.zeros(len(self), bool)
        for views, block in self.read_all("reading images"):
            images[torch.from_numpy(views)], good[views] = block, True
        self.keep(self.files[good], self.labels[good], self.view[good])
        self.images = images[torch.from_numpy(good)].to(device)

    def draw(self, step):
        """Which views make up the batch of a step (B,), and which of them are mirrored (B,)."""
        rng = np.random.default_rng([self.seed, step])
        views = np.searchsorted(self.cdf, rng.random(self.batch_size), side="right").clip(max=len(self) - 1)
        return views, (rng.random(self.batch_size) < 0.5) & self.flip

    def __getitem__(self, step):
        views, flips = self.draw(step)
        bad = 0
        if self.images is not None:
            images = self.images[torch.from_numpy(views)]
        else:
            pictures = []
            while len(pictures) < len(views):
                try:
                    pictures.append(self.crop(views[len(pictures)]))
                except UserError:                     # the next file takes the place of one that cannot be read
                    bad += 1
                    if bad > 100 + len(views):
                        raise UserError(f"Over {bad - 1} files in one batch cannot be read as images.") from None
                    views[len(pictures)] = (views[len(pictures)] + 1) % len(self)
            images = torch.stack(pictures)
        flips = torch.from_numpy(flips).to(images.device)
        images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        return images, torch.from_numpy(self.labels[views]), bad

    def batches(self, start, stop):
        """The batches of steps start .. stop - 1, decoded ahead in worker processes unless they are in memory."""
        steps = range(start, stop)
        if self.images is not None:
            return (self[step] for step in steps)
        return iter(torch.utils.data.DataLoader(self, batch_size=None, sampler=steps, num_workers=self.workers))


def to_float(images, device):
    """uint8 (B, 3, S, S) -> float32 in [-1, 1] on the device."""
    return images.to(device).float().div_(127.5).sub_(1)


def validation_images(directory, size, count, classes):
    """Up to `count` central crops of DIR/val, spread over it, and their labels; (None, None) without DIR/val."""
    if not (Path(directory) / "val").is_dir():
        return None, None
    files, labels, names = find_images(directory, "val")
    known = [i for i in range(len(files)) if names[labels[i]] in classes]
    pick = [known[i] for i in np.linspace(0, len(known) - 1, min(count, len(known))).astype(int)] if known else []
    pictures, found = [], []
    for i in pick:
        with contextlib.suppress(UserError):                  # a damaged file is not fatal here either
            pictures.append(crop(open_image(files[i]), size))
            found.append(classes.index(names[labels[i]]))
    return (torch.stack(pictures), torch.tensor(found)) if pictures else (None, None)


# === Token cache: views -> codes, computed once =====================================================================
def cached_codes(views, vae, directory, device, dtype):
    """The codes of every view and (with data.flip) of its mirror image: a memory-mapped uint16 array (1 or 2, M, N, D).

    The file's name is a hash of the RQ-VAE's weights, the precision and the views (folder and name of each file, its
    size, its crops): another model or other files make another cache. Files that cannot be read are dropped from `views`.
    """
    files = [[f"{p.parent.name}/{p.name}", os.path.getsize(p)] for p in views.files[views.view == 0]]
    content = json.dumps([drr.fingerprint(vae), str(dtype), views.size, views.seed, views.flip, views.view.tolist(), files])
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    path, index_path = Path(directory) / f"codes-{name}.npy", Path(directory) / f"codes-{name}-views.npy"
    if not path.exists():
        shape = (1 + views.flip, len(views), vae.side ** 2, vae.quantizer.depth)
        with drr.replacing(path) as temporary:
            codes = np.lib.format.open_memmap(temporary, "w+", np.uint16, shape)
            good = []
            for index, images in views.read_all("encoding images"):
                for part, block in zip(np.array_split(index, -(-len(index) // 128)),
                                       images.tensor_split(-(-len(index) // 128))):
                    for flip, x in enumerate((block, block.flip(-1))[:1 + views.flip]):
                        codes[flip, part] = encode(vae, to_float(x, device), dtype).cpu().numpy()
                good.append(index)
            codes.flush()
            with drr.replacing(index_path) as temporary_index, open(temporary_index, "wb") as f:
                np.save(f, np.concatenate(good))
    index = np.load(index_path)
    codes = np.load(path, mmap_mode="r")
    if len(index) < len(views):
        codes = codes[:, index]
        views.keep(views.files[index], views.labels[index], views.view[index])
    return codes


@torch.inference_mode()
def encode(vae, images, dtype):
    """Codes (B, N, D) of images in [-1, 1], the convolutions in `dtype`."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return vae.encode(images)
