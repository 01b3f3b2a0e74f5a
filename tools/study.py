"""The decoding study: which of the paper's claims hold for a checkpoint, and which other strategies help
(docs/study.md).

    python -m tools.study --data DIR --out runs/study --seeds 5    # draws what is missing; tables and plots
    python -m tools.study --data DIR --out runs/study --seeds 0    # tables of the runs that are there
    python -m tools.study --data DIR --out runs/study --infill     # only: in-filling of hidden halves

Every run is one way of decoding, with the paper's values where it does not say otherwise. All runs draw the
same images from the same random numbers, the classes of DIR/val in turn. Codes are kept after the draft and
after each revision, so that a run with five revisions also serves the rows with fewer.
"""
import argparse
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import drr
from drr import UserError, replacing
from support import data
from support.common import (BUNDLED, add_device_arguments, grid, load_config, pick_device, precision_name,
                            run, save_picture, synchronize, to_float, to_pixels)
from tools import evaluate, machine, strategies

# === The runs and the tables ================================================================================
BASE = "imagenet-821m", ["sample.t_draft=8"]         # the paper's values, with a shorter draft
RUNS = {                                             # name: what differs from BASE
    "draft 4": "t_draft=4",
    "draft 8": "rounds=5",
    "draft 16": "t_draft=16",
    "draft 32": "t_draft=32",
    "draft 64": "t_draft=64 rounds=5",
    "T_revise 1": "t_revise=1",
    "T_revise 4": "t_revise=4",
    "T_revise 8": "t_revise=8",
    "unguided": "revise_guidance=1",
    "revise 1.4": "revise_guidance=1.4",
    "revise 3": "revise_guidance=3",
    "both 1.4": "draft_guidance=1.4 revise_guidance=1.4",
    "both 1.8": "draft_guidance=1.8",
    "both 3": "draft_guidance=3 revise_guidance=3",
    "draft only 1.8": "draft_guidance=1.8 revise_guidance=1",
    "ramp 1.8": "draft_guidance=1.8 draft_ramp=true",
    "ramp 3": "draft_guidance=3 revise_guidance=3 draft_ramp=true",
    "Top-C 8": "draft_pool=0",
    "Top-C-50% 8": "draft_pool=0.5",
    "Sobol 8": "order=sobol",
    "growing 8": "draft_growing=true",
    "Sobol growing 8": "order=sobol draft_growing=true",
    "better": "revise_better=true",
    "least likely half": "revise_share=0.5",
    "least likely half, T 1": "revise_share=0.5 t_revise=1",
    "cool": "draft_temperature=0.8 revise_temperature=0.5",
    "cool, guided": "draft_temperature=0.8 revise_temperature=0.5 draft_guidance=1.5 revise_guidance=2",
    "Top-C-50% 64": "t_draft=64 draft_pool=0.5",
    "Sobol 64": "t_draft=64 order=sobol",
    "Top-C 64": "t_draft=64 draft_pool=0",
    "preset "
    "cool": "draft_temperature=0.8 revise_temperature=0.5 draft_guidance=1.5 revise_guidance=2 rounds=3",
    "preset 1.5": "t_revise=8 draft_guidance=1.5 revise_guidance=2 rounds=3",
    "preset 2": "t_revise=8 draft_guidance=2 revise_guidance=2 rounds=3",
    "preset 2.5": "t_revise=8 draft_guidance=2.5 revise_guidance=2.5 rounds=3",
    "preset 3": "t_revise=8 draft_guidance=3 revise_guidance=3 rounds=3",
    "preset 2, T 4": "t_revise=4 draft_guidance=2 revise_guidance=2 rounds=3",
    "preset 2, top-p": "t_revise=8 draft_guidance=2 revise_guidance=2 rounds=3 top_p=0.9",
    "preset 3, top-p": "t_revise=8 draft_guidance=3 revise_guidance=3 rounds=3 top_p=0.9",
    "preset "
    "mild": "t_revise=8 draft_guidance=1.5 revise_guidance=2 revise_temperature=0.6 rounds=3 top_p=0.9",
}


def draft_and_revised(runs):
    """Rows for (label, run): each without revisions, and then with two."""
    rows = [(f"{label}, draft only", name, 0) for label, name in runs]
    return rows + [(f"{label}, revised", name, 2) for label, name in runs]


TABLES = {                                           # title: rows (label, run, revisions)
    "Length of the draft, before and after two revisions": [
        row for t in (8, 4, 16, 32, 64) for row in draft_and_revised([(f"T_draft {t}", f"draft {t}")])],
    "Number of revisions, T_draft 8": [(f"M = {m}", "draft 8", m) for m in (0, 1, 2, 3, 4, 5)],
    "Number of revisions, T_draft 64": [(f"M = {m}", "draft 64", m) for m in (0, 1, 2, 3, 4, 5)],
    "Updates of a revision, T_draft 8, M = 2": [
        ("T_revise 2", "draft 8", 2),
        *((f"T_revise {t}", f"T_revise {t}", 2) for t in (1, 4, 8))],
    "Guidance, T_draft 8, M = 2": [
        ("revise 1.8 (paper)", "draft 8", 2),
        ("none", "unguided", 2),
        ("revise 1.4", "revise 1.4", 2),
        ("revise 3", "revise 3", 2),
        ("both 1.4", "both 1.4", 2),
        ("both 1.8", "both 1.8", 2),
        ("both 3", "both 3", 2),
        ("draft 1.8 only", "draft only 1.8", 2),
        ("draft up to 1.8, revise 1.8", "ramp 1.8", 2),
        ("draft up to 3, revise 3", "ramp 3", 2)],
    "Which stacks next, T_draft 8": draft_and_revised([
        ("Random", "draft 8"), ("Top-C", "Top-C 8"), ("Top-C-50%", "Top-C-50% 8"), ("Sobol", "Sobol 8"),
        ("growing", "growing 8"), ("Sobol, growing", "Sobol growing 8")]),
    "Which stacks next, T_draft 64": draft_and_revised([
        ("Random", "draft 64"), ("Top-C", "Top-C 64"), ("Top-C-50%", "Top-C-50% 64"), ("Sobol", "Sobol 64")]),
    "Selective revisions and temperatures, T_draft 8, M = 2": [
        ("paper", "draft 8", 2),
        ("keep the more likely", "better", 2),
        ("least likely half", "least likely half", 2),
        ("least likely half, T_revise 1", "least likely half, T 1", 2),
        ("temperatures 0.8 and 0.5", "cool", 2),
        ("those, guidance 1.5 and 2", "cool, guided", 2)],
    "Values for the bundled checkpoint, T_draft 8": [
        ("temperatures 0.8 and 0.5, guidance 1.5 and 2, T_revise 2, M = 3", "preset cool", 3),
        ("1 and 0.8, 1.5 and 2, T_revise 8, M = 3", "preset 1.5", 3),
        ("1 and 0.8, 2 and 2, T_revise 4, M = 3", "preset 2, T 4", 3),
        ("1 and 0.8, 2 and 2, T_revise 8, M = 1", "preset 2", 1),
        ("1 and 0.8, 2 and 2, T_revise 8, M = 2", "preset 2", 2),
        ("1 and 0.8, 2 and 2, T_revise 8, M = 3", "preset 2", 3),
        ("1 and 0.8, 2.5 and 2.5, T_revise 8, M = 3", "preset 2.5", 3),
        ("1 and 0.8, 3 and 3, T_revise 8, M = 2", "preset 3", 2),
        ("1 and 0.8, 3 and 3, T_revise 8, M = 3", "preset 3", 3),
        ("1 and 0.8, 2 and 2, top-p 0.9, T_revise 8, M = 2", "preset 2, top-p", 2),
        ("1 and 0.8, 2 and 2, top-p 0.9, T_revise 8, M = 3", "preset 2, top-p", 3),
        ("1 and 0.8, 3 and 3, top-p 0.9, T_revise 8, M = 2", "preset 3, top-p", 2),
        ("1 and 0.8, 3 and 3, top-p 0.9, T_revise 8, M = 3", "preset 3, top-p", 3),
        ("1 and 0.6, 1.5 and 2, top-p 0.9, T_revise 8, M = 1", "preset mild", 1),
        ("1 and 0.6, 1.5 and 2, top-p 0.9, T_revise 8, M = 2", "preset mild", 2),
        ("1 and 0.6, 1.5 and 2, top-p 0.9, T_revise 8, M = 3", "preset mild", 3)],
}
METRICS = ("FID-like", "precision", "recall", "accuracy")


# === Drawing: OUT/RUN-SEED.npz ==============================================================================
def draw_run(model, labels, seed, c, batch, bar):
    """Codes uint16 (images, 1 + M, N, D) after the draft and each revision, and the seconds per image up to
    there (1 + M,), without the decoding to pixels."""
    codes = []
    seconds = np.zeros(1 + c.rounds)
    for first in range(0, len(labels), batch):
        part = labels[first:first + batch]
        started = time.perf_counter()
        indices = range(first, first + len(part))
        noise = drr.draw_noise(seed, indices, 1 + c.rounds, model.positions, model.depth)
        ends = {}                                                      # of each round: codes (B, N, D)
        clock = np.zeros(1 + c.rounds)
        for state in strategies.decode(model, part[:, None], noise, c):
            synchronize(labels.device)
            ends[state.round] = state.codes
            clock[state.round] = time.perf_counter() - started
        codes.append(torch.stack(list(ends.values()), 1).cpu().numpy().astype(np.uint16))
        seconds += clock / len(labels)
        bar.update(len(part))
    return np.concatenate(codes), seconds


def draw_missing(model, args, settings, labels):
    """Draws the runs and seeds that --out does not hold yet; labels (C,): the classes' indices, on the
    device."""
    prefixes = tuple(args.runs.split(",")) if args.runs else ("",)
    chosen = [name for name in RUNS if name.startswith(prefixes)]
    if not chosen:
        raise UserError(f"--runs {args.runs} fits none of the runs: {', '.join(RUNS)}.")
    out = Path(args.out)
    every = [(seed, name) for seed in range(args.seeds) for name in chosen]
    todo = [(seed, name) for seed, name in every if not path_of(out, name, seed).exists()]
    with tqdm(total=len(todo) * args.images, desc="drawing", unit="image") as bar:
        for seed, name in todo:
            bar.set_postfix_str(f"{name}, seed {seed}")
            shown = labels[classes_of(seed, args.images, len(labels))]
            codes, seconds = draw_run(model, shown, seed, settings[name], args.batch, bar)
            with replacing(path_of(out, name, seed)) as temporary, open(temporary, "wb") as f:
                np.savez(f, codes=codes, seconds=seconds, settings=json.dumps(vars(settings[name])))


def path_of(out, name, seed):
    return out / f"{name.replace(' ', '_').replace('%', '').replace(',', '')}-{seed}.npz"


def classes_of(seed, images, count):
    """Which of `count` classes the images of a seed show: each seed goes on where the one before stopped."""
    return (seed * images + np.arange(images)) % count


def drawn_runs(out, settings):
    """{name: paths} of the runs in `out`, and the seeds that all of them have, because FID depends on the
    number of images. Raises UserError where there is none, or where a run was drawn with other values."""
    paths = {}
    for name in settings:
        found = {seed: path_of(out, name, seed) for seed in range(1000) if path_of(out, name, seed).exists()}
        if found:
            paths[name] = found
    seeds = sorted(set.intersection(*map(set, paths.values()))) if paths else []
    if not seeds:
        raise UserError(f"{out} holds no seed that all of its runs have; draw some, with --seeds 1 or more.")
    for name, found in paths.items():
        for seed in seeds:
            with np.load(found[seed]) as arrays:
                if str(arrays["settings"]) != json.dumps(vars(settings[name])):
                    raise UserError(f"{found[seed]} was drawn with other values than {name!r} has now; move "
                                    "it away or give another --out.")
    return {name: [found[seed] for seed in seeds] for name, found in paths.items()}, seeds


def run_features(path, vae, network, names, device):
    """Of a run and seed: per number of revisions, features (images, d), and which images, of the classes
    `names`, the network recognises. They are kept beside the run."""
    kept = path.with_suffix(".features.npz")
    if not kept.exists() or str(np.load(kept)["network"]) != network.name:
        with np.load(path) as arrays:
            codes = torch.from_numpy(arrays["codes"].astype(np.int64))     # (images, 1 + M, N, D)
        labels = torch.tensor([network.classes.index(name) for name in names])
        features, right = [], []
        for m in range(codes.shape[1]):
            def batches():
                for part in codes[:, m].split(50):
                    yield torch.from_numpy(to_pixels(vae.decode(part.to(device)))).permute(0, 3, 1, 2)
            pictures = evaluate.Pictures(path.stem, len(codes), vae.size, names, batches)
            found, logits = evaluate.extract_features(network, pictures, f"{path.stem}, M = {m}", device)
            features.append(found.numpy())
            right.append((logits.argmax(1) == labels).numpy())
        with replacing(kept) as temporary, open(temporary, "wb") as f:
            np.savez(f, features=np.stack(features), right=np.stack(right), network=network.name)
    with np.load(kept) as arrays:
        return arrays["features"], arrays["right"]


def run_costs(transformer, paths, settings):
    """{name: (seconds per image, GFLOP per image)}, lists by the number of revisions; the median over the
    seeds."""
    costs = {}
    for name, found in paths.items():
        seconds = np.median([np.load(path)["seconds"] for path in found], 0)
        gflops = []
        for m in range(len(seconds)):
            c = SimpleNamespace(**{**vars(settings[name]), "rounds": m})
            gflops.append(machine.decode_flops(transformer, c) / 1e9)
        costs[name] = seconds, gflops
    return costs


# === Numbers with standard errors ===========================================================================
APART = 3        # standard errors of a difference: with five seeds, 4% of those between equals are larger


def jackknife(values):
    """Standard error of a statistic from its values (S, ...) with one seed of S left out each (Efron)."""
    S = len(values)
    return np.sqrt((S - 1) / S * ((values - values.mean(0)) ** 2).sum(0))


class RunMetrics:
    """The four METRICS of (run, revisions): over all seeds (4,), and over all but one of S, (S, 4) or (0, 4).

    real (N, d): features of the reference; held: {run: [(features, right)], one pair for each seed}.
    """

    def __init__(self, real, held):
        self.real, self.held = real, held
        self.statistics = evaluate.statistics(real)
        self.radii = evaluate.neighbour_radii(real)
        self.known = {}

    def __call__(self, name, m):
        if (name, m) not in self.known:
            features = [features[m] for features, _ in self.held[name]]
            right = [right[m] for _, right in self.held[name]]
            S = len(features)
            every = self.metrics(features, right)
            leave_one = np.zeros((0, 4))
            if S > 1:
                leave_one = np.array([self.metrics(features[:k] + features[k + 1:], right[:k] + right[k + 1:])
                                      for k in range(S)])
            self.known[name, m] = every, leave_one
        return self.known[name, m]

    def metrics(self, features, right):
        features = torch.from_numpy(np.concatenate(features))
        fid = evaluate.fid(*self.statistics, *evaluate.statistics(features))
        precision, recall = evaluate.precision_recall(self.real, features, self.radii)
        return np.array([fid, precision, recall, np.concatenate(right).mean()])


def table(title, rows, metrics, costs):
    """A markdown table of the runs that are there; bold where a number differs from the first row's by more
    than APART standard errors of the difference. Empty without the first row."""
    if rows[0][1] not in metrics.held:
        return ""
    base, base_leave_one = metrics(*rows[0][1:])
    lines = [f"### {title}", "", f"| | {' | '.join(METRICS)} | s per image | GFLOP |", "|---" * 7 + "|"]
    for label, name, m in rows:
        if name not in metrics.held:
            continue
        value, leave_one = metrics(name, m)
        error = np.full(4, np.nan)
        apart = np.zeros(4, bool)
        if len(leave_one):
            error = jackknife(leave_one)
            apart = np.abs(value - base) > APART * jackknife(leave_one - base_leave_one)
        cells = [f"{value[0]:.2f} ± {error[0]:.2f}",
                 *(f"{100 * value[i]:.1f} ± {100 * error[i]:.1f}%" for i in (1, 2)),
                 f"{100 * value[3]:.2f} ± {100 * error[3]:.2f}%"]
        cells = [f"**{cell}**" if different else cell for cell, different in zip(cells, apart)]
        seconds, gflops = costs[name]
        lines.append(f"| {label} | {' | '.join(cells)} | {seconds[m]:.3f} | {gflops[m]:.1f} |")
    return "\n".join(lines) + "\n"


def plot(path, metrics, costs):
    """Quality against seconds per image, and precision against recall as revisions are added."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        raise UserError("The plot needs matplotlib; pip install -r requirements-tools.txt.") from None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = (4, 8, 16, 32, 64)
    lines = [("Random, draft only", "tab:gray", "o--", [(f"draft {t}", 0) for t in lengths]),
             ("Random, revised", "tab:blue", "o-", [(f"draft {t}", 2) for t in lengths]),
             ("Top-C-50%, revised", "tab:orange", "s-", [(f"Top-C-50% {t}", 2) for t in (8, 64)]),
             ("Sobol, revised", "tab:green", "^-", [(f"Sobol {t}", 2) for t in (8, 64)]),
             ("Top-C, revised", "tab:red", "v-", [(f"Top-C {t}", 2) for t in (8, 64)])]
    for label, colour, style, points in lines:
        x, y, error = [], [], []
        for name, m in points:
            if name in metrics.held:
                value, leave_one = metrics(name, m)
                x.append(costs[name][0][m])
                y.append(value[0])
                error.append(jackknife(leave_one)[0] if len(leave_one) else 0)
        left.errorbar(x, y, error, fmt=style, color=colour, label=label, capsize=2)
    left.set(xscale="log", xlabel="seconds per image", ylabel="FID-like", title="Quality against time")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.legend()
    for t, colour in ((8, "tab:purple"), (64, "tab:blue")):
        if f"draft {t}" in metrics.held:
            values = np.array([metrics(f"draft {t}", m)[0] for m in range(6)])
            right.plot(values[:, 2], values[:, 1], "o-", color=colour, label=f"T_draft {t}")
            for m, (_, precision, recall, _) in enumerate(values):
                right.annotate(f"M={m}", (recall, precision), textcoords="offset "
                                                                         "points", xytext=(5, 3), fontsize=8)
    right.set(xlabel="recall", ylabel="precision", title="Revisions: M = 0 to 5")
    right.legend()
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110)


# === In-filling: half of the stacks of validation images ====================================================
def infill(model, images, labels, c, device, batch=50):
    """How many hidden codes of validation images are found, with the right half or a random half of the
    stacks hidden.

    images uint8 (M, 3, S, S), labels (M,). Returns a markdown table, a column for each depth, and pictures
    (4, 10, 3, S, S): the original, masked, filled with the mean colour, filled by the model.
    """
    N, D, side = model.positions, model.depth, model.side
    regions = {"right half": torch.arange(N) % side >= side // 2,
               "random half": torch.from_numpy(np.random.default_rng(0).permutation(N)) < N // 2}
    depths = " | ".join(f"depth {d + 1}" for d in range(D))
    lines = [f"| hidden | codes from | {depths} | all of a stack | PSNR there |", "|---" * (4 + D) + "|"]
    pictures = []
    for title, region in regions.items():
        region = region.to(device)                                                  # (N,)
        scale = model.size // side
        pixel = region.view(1, 1, side, side).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        hits, errors = {}, {}
        for first in tqdm(range(0, len(images), batch), f"in-filling, {title}", unit=f" x {batch} images"):
            x = to_float(images[first:first + batch], device)
            cond = labels[first:first + len(x), None].to(device)
            codes = model.encode(x)                                                 # (B, N, D)
            mean = (x * ~pixel).sum((2, 3), keepdim=True) / (~pixel).sum()
            drawn = strategies.sample(model, cond, 0, range(first, first + len(x)), c, codes, region)
            ways = {"Draft-and-Revise": drawn, "the mean colour": model.encode(torch.where(pixel, mean, x)),
                    "another image": codes.roll(len(x) // 2, 0)}
            original = model.decode(codes)
            for way, filled in ways.items():
                same = (filled == codes)[:, region]                                 # (B, n, D)
                found = [*same.sum((0, 1)).tolist(), same.all(-1).sum().item()]
                hits[way] = hits.get(way, 0) + np.array(found)
                difference = model.decode(torch.where(region[:, None], filled, codes)) - original
                errors[way] = errors.get(way, 0) + (difference.clamp(-2, 2).square() * pixel).sum().item()
            if first == 0:
                rows = x, torch.where(pixel, 0, x), torch.where(pixel, mean, x), model.decode(drawn)
                pictures.append(torch.stack([row[:5] for row in rows]))
        total = len(images) * int(region.sum())
        for way in ways:
            mse = max(errors[way], 1e-12) / (len(images) * 3 * int(pixel.sum()))
            shares = " | ".join(f"{h / total:.1%}" for h in hits[way])
            lines.append(f"| {title} | {way} | {shares} | {10 * math.log10(4 / mse):.1f} dB |")
    chance = f"{1 / len(model.vae.quantizer.codebook):.1%}"
    lines.append("| | chance | " + " | ".join([chance] * D) + " | 0.0% | |")
    return "\n".join(lines) + "\n", torch.cat(pictures, 1)


def infill_to(out, model, directory, info, device):
    """`infill` of up to 400 images of DIR/val: writes OUT/infill.png and returns the section of tables.md."""
    images, labels = data.validation_images(directory, model.size, 400, info.classes)
    if images is None:
        raise UserError(f"{directory} has no val/<class>/*; give a folder that has.")
    c = strategies.sampling_values(info, ["t_draft=16"], model.positions)
    lines, pictures = infill(model, images, labels, c, device)
    pixels = to_pixels(pictures.flatten(0, 1))
    save_picture(grid(pixels, pictures.shape[1], max(1, 96 // model.size)), out / "infill.png")
    return (f"### In-filling of half of the stacks\n\n{len(images)} images of {directory}/val, the "
            f"checkpoint's sampling values, T_draft 16.\n\n{lines}")


# === The command ============================================================================================
def parse_arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="DIR/val/<class>/*: reference and classes")
    add("--out", default="runs/study", metavar="DIR", help="codes, features, tables and pictures "
                                                           "(runs/study)")
    add("--checkpoint", default=str(BUNDLED), metavar="DIR")
    add("--features", default="classifier", metavar="F", help="as in tools.evaluate, with class logits "
                                                              "(classifier)")
    add("--seeds", type=int, default=5, help="how often (5)")
    add("--images", type=int, default=80, metavar="N", help="images of a seed (80)")
    add("--batch", type=int, default=40, help="images decoded at a time (40)")
    add("--runs", metavar="NAME,...", help="draw only the runs whose names begin like this")
    add("--infill", action="store_true", help="in-filling only")
    add_device_arguments(parser)
    args = parser.parse_args()
    if args.seeds < 0 or args.batch < 1 or args.images < 4:
        raise UserError(f"--seeds is {args.seeds}, --batch {args.batch} and --images {args.images}; expected "
                        "at least 0, 1 and 4.")
    return args


def main():
    # --- set-up ---------------------------------------------------------------------------------------------
    args = parse_arguments()
    device, dtype = pick_device(args)
    out = Path(args.out)
    vae, transformer, info = drr.load_checkpoint(args.checkpoint)
    model = drr.TorchModel(vae, transformer, device, dtype)
    if args.infill:
        print(infill_to(out, model, args.data, info, device))
        return
    network = evaluate.load_features(args.features, device)
    reference = evaluate.in_folder(Path(args.data) / "val", vae.size)
    names = sorted(set(reference.labels or ()) & set(info.classes) & set(network.classes or ()))
    if min(len(names), reference.count) <= evaluate.NEIGHBOURS:
        raise UserError(f"{args.data}/val has {len(names)} class folders that both the checkpoint and "
                        f"{network.name} know; expected at least 4.")
    base = load_config(*BASE)
    settings = {name: strategies.sampling_values(base, changes.split(), transformer.positions)
                for name, changes in RUNS.items()}
    content = [drr.fingerprint(vae), drr.fingerprint(transformer), names, str(dtype), args.images]
    evaluate.claim_folder(out, content)

    # --- drawing --------------------------------------------------------------------------------------------
    labels = torch.tensor([info.classes.index(name) for name in names], device=device)
    draw_missing(model, args, settings, labels)
    paths, seeds = drawn_runs(out, settings)

    # --- numbers --------------------------------------------------------------------------------------------
    real, _ = evaluate.extract_features(network, reference, "reference", device)
    held = {}
    for name, found in paths.items():
        held[name] = []
        for seed, path in zip(seeds, found):
            shown = [names[i] for i in classes_of(seed, args.images, len(names))]
            held[name].append(run_features(path, vae, network, shown, device))
    metrics = RunMetrics(real, held)
    costs = run_costs(transformer, paths, settings)
    text = [f"{network.name}; reference {reference.name}; {len(names)} classes in turn, {len(seeds)} seeds "
            f"of {args.images} images; {vae.size}x{vae.size}; {precision_name(dtype)}, {device}; commit "
            f"{evaluate.commit()}; ± standard error (jackknife over seeds, which differ in their classes, "
            f"too); bold: more than {APART} standard errors of the difference from the first row.\n"]
    text += [table(title, rows, metrics, costs) for title, rows in TABLES.items()]
    plot(out / "study.png", metrics, costs)
    text.append(infill_to(out, model, args.data, info, device))
    with replacing(out / "tables.md") as temporary:
        temporary.write_text("\n".join(text))
    print("\n".join(text))
    print(f"-> {out / 'tables.md'}, {out / 'study.png'}, {out / 'infill.png'}")


if __name__ == "__main__":
    run(main)
