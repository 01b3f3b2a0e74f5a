"""The decoding study: which claims of the paper hold for a checkpoint, and which other strategies help (docs/study.md).

    python study.py --data DIR --out runs/study --seeds 5     # draws what is not there yet, then the tables and the plot
    python study.py --data DIR --out runs/study --seeds 0     # tables of what is there
    python study.py --data DIR --out runs/study --infill      # only how well hidden halves of DIR/val are filled in

Every run is one way of decoding, with the paper's values where it does not say otherwise. All runs draw the same images from the
same random numbers, the classes of DIR/val in turn. Codes are kept after the draft and after each revision, so that one run serves
all numbers of revisions up to its own.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tools import bench
from support import data
import drr
from tools import evaluate
from support.common import (BUNDLED, add_device_arguments, grid, load_config, pick_device, run, sampling_values, save_picture, synchronize, to_float,
                    to_pixels)
from drr import UserError, replacing

BASE = "imagenet-821m", ["sample.t_draft=8"]         # the paper's values, with a shorter draft
RUNS = {                                             # name: what differs from BASE
    "draft 4": "t_draft=4", "draft 8": "rounds=5", "draft 16": "t_draft=16", "draft 32": "t_draft=32",
    "draft 64": "t_draft=64 rounds=5",
    "T_revise 1": "t_revise=1", "T_revise 4": "t_revise=4", "T_revise 8": "t_revise=8",
    "unguided": "revise_guidance=1", "revise 1.4": "revise_guidance=1.4", "revise 3": "revise_guidance=3",
    "both 1.4": "draft_guidance=1.4 revise_guidance=1.4", "both 1.8": "draft_guidance=1.8",
    "both 3": "draft_guidance=3 revise_guidance=3", "draft only 1.8": "draft_guidance=1.8 revise_guidance=1",
    "ramp 1.8": "draft_guidance=1.8 draft_ramp=true", "ramp 3": "draft_guidance=3 revise_guidance=3 draft_ramp=true",
    "Top-C 8": "draft_pool=0", "Top-C-50% 8": "draft_pool=0.5", "Sobol 8": "order=sobol", "growing 8": "draft_growing=true",
    "Sobol growing 8": "order=sobol draft_growing=true",
    "better": "revise_better=true", "least likely half": "revise_share=0.5", "least likely half, T 1": "revise_share=0.5 t_revise=1",
    "cool": "draft_temperature=0.8 revise_temperature=0.5", "cool, guided": "draft_temperature=0.8 revise_temperature=0.5 "
    "draft_guidance=1.5 revise_guidance=2",
    "Top-C-50% 64": "t_draft=64 draft_pool=0.5", "Sobol 64": "t_draft=64 order=sobol", "Top-C 64": "t_draft=64 draft_pool=0",
    "preset cool": "draft_temperature=0.8 revise_temperature=0.5 draft_guidance=1.5 revise_guidance=2 rounds=3",
    "preset 1.5": "t_revise=8 draft_guidance=1.5 revise_guidance=2 rounds=3",
    "preset 2": "t_revise=8 draft_guidance=2 revise_guidance=2 rounds=3",
    "preset 2.5": "t_revise=8 draft_guidance=2.5 revise_guidance=2.5 rounds=3",
    "preset 3": "t_revise=8 draft_guidance=3 revise_guidance=3 rounds=3",
    "preset 2, T 4": "t_revise=4 draft_guidance=2 revise_guidance=2 rounds=3",
    "preset 2, top-p": "t_revise=8 draft_guidance=2 revise_guidance=2 rounds=3 top_p=0.9",
    "preset 3, top-p": "t_revise=8 draft_guidance=3 revise_guidance=3 rounds=3 top_p=0.9",
    "preset mild": "t_revise=8 draft_guidance=1.5 revise_guidance=2 revise_temperature=0.6 rounds=3 top_p=0.9",
}
TABLES = {                                           # title: rows (label, run, revisions), the first one to compare with
    "Length of the draft, before and after two revisions":
        [(f"T_draft {t}, {'revised' if m else 'draft only'}", f"draft {t}", m) for t in (8, 4, 16, 32, 64) for m in (0, 2)],
    "Number of revisions, T_draft 8": [(f"M = {m}", "draft 8", m) for m in (0, 1, 2, 3, 4, 5)],
    "Number of revisions, T_draft 64": [(f"M = {m}", "draft 64", m) for m in (0, 1, 2, 3, 4, 5)],
    "Updates of a revision, T_draft 8, M = 2": [("T_revise 2", "draft 8", 2)] + [(f"T_revise {t}", f"T_revise {t}", 2)
                                                                                 for t in (1, 4, 8)],
    "Guidance, T_draft 8, M = 2": [("revise 1.8 (paper)", "draft 8", 2), ("none", "unguided", 2), ("revise 1.4", "revise 1.4", 2),
        ("revise 3", "revise 3", 2), ("both 1.4", "both 1.4", 2), ("both 1.8", "both 1.8", 2), ("both 3", "both 3", 2),
        ("draft 1.8 only", "draft only 1.8", 2), ("draft up to 1.8, revise 1.8", "ramp 1.8", 2),
        ("draft up to 3, revise 3", "ramp 3", 2)],
    "Which stacks next, T_draft 8": [(f"{name}, {'revised' if m else 'draft only'}", r, m) for m in (0, 2) for name, r in
        (("Random", "draft 8"), ("Top-C", "Top-C 8"), ("Top-C-50%", "Top-C-50% 8"), ("Sobol", "Sobol 8"), ("growing", "growing 8"),
         ("Sobol, growing", "Sobol growing 8"))],
    "Which stacks next, T_draft 64": [(f"{name}, {'revised' if m else 'draft only'}", r, m) for m in (0, 2) for name, r in
        (("Random", "draft 64"), ("Top-C", "Top-C 64"), ("Top-C-50%", "Top-C-50% 64"), ("Sobol", "Sobol 64"))],
    "Choosy revisions and temperatures, T_draft 8, M = 2": [("paper", "draft 8", 2), ("keep the more likely", "better", 2),
        ("least likely half", "least likely half", 2), ("least likely half, T_revise 1", "least likely half, T 1", 2),
        ("temperatures 0.8 and 0.5", "cool", 2), ("those, guidance 1.5 and 2", "cool, guided", 2)],
    "Values for the bundled checkpoint, T_draft 8": [
        ("temperatures 0.8 and 0.5, guidance 1.5 and 2, T_revise 2, M = 3", "preset cool", 3),
        *((f"1 and 0.8, {guidance}, T_revise {t}, M = {m}", name, m) for guidance, t, name, m in (
            ("1.5 and 2", 8, "preset 1.5", 3), ("2 and 2", 4, "preset 2, T 4", 3), ("2 and 2", 8, "preset 2", 1),
            ("2 and 2", 8, "preset 2", 2), ("2 and 2", 8, "preset 2", 3), ("2.5 and 2.5", 8, "preset 2.5", 3),
            ("3 and 3", 8, "preset 3", 2), ("3 and 3", 8, "preset 3", 3), ("2 and 2, top-p 0.9", 8, "preset 2, top-p", 2),
            ("2 and 2, top-p 0.9", 8, "preset 2, top-p", 3), ("3 and 3, top-p 0.9", 8, "preset 3, top-p", 2),
            ("3 and 3, top-p 0.9", 8, "preset 3, top-p", 3))),
        *((f"1 and 0.6, 1.5 and 2, top-p 0.9, T_revise 8, M = {m}", "preset mild", m) for m in (1, 2, 3))],
}
METRICS = ("FID-like", "precision", "recall", "accuracy")


# === Drawing: OUT/RUN-SEED.npz ======================================================================================
def draw_run(model, labels, seed, c, batch, bar):
    """Codes uint16 (images, 1 + M, N, D) after the draft and each revision, and the seconds per image up to there (1 + M,),
    without the decoding to pixels."""
    codes, seconds = [], np.zeros(1 + c.rounds)
    for first in range(0, len(labels), batch):
        part, started = labels[first:first + batch], time.perf_counter()
        noise = drr.draw_noise(seed, range(first, first + len(part)), 1 + c.rounds, model.positions, model.depth)
        ends, clock = {}, np.zeros(1 + c.rounds)
        for state in drr.draft_and_revise(model, part[:, None], noise, c):
            synchronize(labels.device)
            ends[state.round], clock[state.round] = state.codes, time.perf_counter() - started
        codes.append(torch.stack(list(ends.values()), 1).cpu().numpy().astype(np.uint16))
        seconds += clock / len(labels)
        bar.update(len(part))
    return np.concatenate(codes), seconds


def path_of(out, name, seed):
    return out / f"{name.replace(' ', '_').replace('%', '').replace(',', '')}-{seed}.npz"


def classes_of(seed, images, count):
    """Which of `count` classes the images of a seed show: the seeds go on where the one before stopped."""
    return (seed * images + np.arange(images)) % count


def features_of(path, vae, network, names, device):
    """Of a run and seed: per number of revisions, features (images, d) and which images, of the classes `names`, the network
    recognises."""
    kept = path.with_suffix(".features.npz")
    if not kept.exists() or str(np.load(kept)["network"]) != network.name:
        codes, number = np.load(path)["codes"], {name: i for i, name in enumerate(network.classes)}
        labels, found, right = torch.tensor([number[name] for name in names]), [], []
        for m in range(codes.shape[1]):
            with torch.inference_mode():
                pictures = [to_pixels(vae.decode(torch.from_numpy(part.astype(np.int64)).to(device)))
                            for part in np.array_split(codes[:, m], math.ceil(len(codes) / 50))]
            pictures = (torch.from_numpy(part).permute(0, 3, 1, 2) for part in pictures)
            features, logits = evaluate.measure(network, pictures, len(codes), f"{path.stem}, M = {m}", device)
            found.append(features.numpy()), right.append((logits.argmax(1) == labels).numpy())
        with replacing(kept) as temporary, open(temporary, "wb") as f:
            np.savez(f, features=np.stack(found), right=np.stack(right), network=network.name)
    with np.load(kept) as arrays:
        return arrays["features"], arrays["right"]


# === Numbers with standard errors ===================================================================================
def four_metrics(real, real_stats, real_radii, features, right):
    """METRICS of features (images, d) and hits (images,)."""
    features = torch.from_numpy(features)
    return np.array([evaluate.fid(*real_stats, *evaluate.statistics(features)),
                     *evaluate.precision_recall(real, features, real_radii=real_radii), right.mean()])


APART = 3        # standard errors of a difference: with five seeds, 4% of differences of nothing look larger


def jackknife(values):
    """Standard error of a statistic from its values (S, ...) with one seed of S left out each (Efron)."""
    S = len(values)
    return np.sqrt((S - 1) / S * ((values - values.mean(0)) ** 2).sum(0))


class Measured:
    """The four metrics of (run, revisions) over all seeds, and over all but one."""

    def __init__(self, real, held):
        self.real, self.held, self.known = (real, evaluate.statistics(real), evaluate.neighbour_radii(real)), held, {}

    def __call__(self, name, m):
        if (name, m) not in self.known:
            parts = self.held[name]                          # a list of (features, right), one a seed
            leave = [[i for i in range(len(parts)) if i != k] for k in range(len(parts))] if len(parts) > 1 else []
            rows = [four_metrics(*self.real, np.concatenate([parts[i][0][m] for i in chosen]),
                                 np.concatenate([parts[i][1][m] for i in chosen])) for chosen in (range(len(parts)), *leave)]
            self.known[name, m] = rows[0], np.array(rows[1:])
        return self.known[name, m]


def table(title, rows, measured, costs):
    """A markdown table; bold where a number differs from the first row's by more than APART standard errors of the
    difference."""
    if rows[0][1] not in measured.held:
        return ""
    rows = [row for row in rows if row[1] in measured.held]
    base, base_leave = measured(*rows[0][1:])
    lines = [f"### {title}", "", f"| | {' | '.join(METRICS)} | s per image | GFLOP |", "|---" * 7 + "|"]
    for label, name, m in rows:
        value, leave = measured(name, m)
        error = jackknife(leave) if len(leave) else np.full(4, np.nan)
        apart = np.abs(value - base) > APART * jackknife(leave - base_leave) if len(leave) else np.zeros(4, bool)
        cells = [f"{v * s:.{d}f} ± {e * s:.{d}f}{u}" for v, e, s, d, u in
                 zip(value, error, (1, 100, 100, 100), (2, 1, 1, 2), ("", "%", "%", "%"))]
        cells = [f"**{cell}**" if a else cell for cell, a in zip(cells, apart)]
        lines.append(f"| {label} | {' | '.join(cells)} | {costs[name][0][m]:.3f} | {costs[name][1][m]:.1f} |")
    return "\n".join(lines) + "\n"


def plot(path, measured, costs):
    """Quality against seconds per image, and precision against recall as revisions are added."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        raise UserError("The plot needs matplotlib; pip install -r requirements-train.txt.") from None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    lines = [("Random, draft only", "tab:gray", "o--", [(f"draft {t}", 0) for t in (4, 8, 16, 32, 64)]),
             ("Random, revised", "tab:blue", "o-", [(f"draft {t}", 2) for t in (4, 8, 16, 32, 64)]),
             ("Top-C-50%, revised", "tab:orange", "s-", [(f"Top-C-50% {t}", 2) for t in (8, 64)]),
             ("Sobol, revised", "tab:green", "^-", [(f"Sobol {t}", 2) for t in (8, 64)]),
             ("Top-C, revised", "tab:red", "v-", [(f"Top-C {t}", 2) for t in (8, 64)])]
    for label, colour, style, points in lines:
        points = [(name, m) for name, m in points if name in measured.held]
        y = [measured(*p)[0][0] for p in points]
        e = [jackknife(measured(*p)[1])[0] if len(measured(*p)[1]) else 0 for p in points]
        left.errorbar([costs[name][0][m] for name, m in points], y, e, fmt=style, color=colour, label=label, capsize=2)
    left.set(xscale="log", xlabel="seconds per image", ylabel="FID-like", title="Quality against time")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.legend()
    for t, colour in ((8, "tab:purple"), (64, "tab:blue")):
        if f"draft {t}" in measured.held:
            values = np.array([measured(f"draft {t}", m)[0] for m in range(6)])
            right.plot(values[:, 2], values[:, 1], "o-", color=colour, label=f"T_draft {t}")
            for m, (_, p, r, _) in enumerate(values):
                right.annotate(f"M={m}", (r, p), textcoords="offset points", xytext=(5, 3), fontsize=8)
    right.set(xlabel="recall", ylabel="precision", title="Revisions: M = 0 to 5")
    right.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


# === In-filling: half of the stacks of validation images ============================================================
def infill(model, images, labels, c, device, batch=50):
    """A markdown table: how many hidden codes of validation images are found, by depth, with the right half or a random half of
    the stacks hidden; and pictures (rows of original, masked, filled with the mean colour, filled by the model)."""
    N, D, side = model.positions, model.depth, model.side
    right_half = (torch.arange(N) % side >= side // 2).to(device)
    random_half = (torch.from_numpy(np.random.default_rng(0).permutation(N)) < N // 2).to(device)
    lines, pictures = ["| hidden | codes from | " + " | ".join(f"depth {d + 1}" for d in range(D)) + " | all of a stack | PSNR there |",
                       "|---" * (4 + D) + "|"], []
    for title, region in (("right half", right_half), ("random half", random_half)):
        hits, errors, total = {}, {}, 0
        pixel = region.view(1, 1, side, side).repeat_interleave(model.size // side, 2).repeat_interleave(model.size // side, 3)
        for first in tqdm(range(0, len(images), batch), f"in-filling, {title}", unit=f" x {batch} images"):
            x = to_float(images[first:first + batch], device)
            codes = model.encode(x)
            mean = (x * ~pixel).sum((2, 3), keepdim=True) / (~pixel).sum()
            noise = drr.draw_noise(0, range(first, first + len(x)), 1 + c.rounds, N, D)
            *_, last = drr.draft_and_revise(model, labels[first:first + len(x), None].to(device), noise, c, codes, region)
            ways = {"Draft-and-Revise": last.codes, "the mean colour": model.encode(torch.where(pixel, mean, x)),
                    "another image": codes.roll(len(x) // 2, 0)}
            original = model.decode(codes)
            for way, filled in ways.items():
                same = (filled == codes)[:, region]                                     # (B, n, D)
                hits[way] = hits.get(way, 0) + np.array([*same.sum((0, 1)).tolist(), same.all(-1).sum().item()])
                decoded = model.decode(torch.where(region[:, None], filled, codes))
                errors[way] = errors.get(way, 0) + ((decoded - original).clamp(-2, 2).square() * pixel).sum().item()
            total += len(x) * int(region.sum())
            if first == 0:
                pictures.append(torch.stack([x[:5], torch.where(pixel, 0, x)[:5], torch.where(pixel, mean, x)[:5],
                                             model.decode(last.codes)[:5]]))
        for way in ways:
            psnr = 10 * math.log10(4 * len(images) * 3 * int(pixel.sum()) / max(errors[way], 1e-12))
            lines.append(f"| {title} | {way} | " + " | ".join(f"{h / total:.1%}" for h in hits[way]) + f" | {psnr:.1f} dB |")
    lines.append("| | chance | " + " | ".join([f"{1 / model.vae.quantizer.codebook.shape[0]:.1%}"] * D) + " | 0.0% | |")
    return "\n".join(lines) + "\n", torch.cat(pictures, 1)          # (4, 10, 3, S, S)


def infill_to(out, model, directory, info, device):
    """`infill` of up to 400 images of DIR/val: writes OUT/infill.png and returns the section of tables.md."""
    images, labels = data.validation_images(directory, model.size, 400, info.classes)
    if images is None:
        raise UserError(f"{directory} has no val/<class>/*; give a folder that has.")
    lines, pictures = infill(model, images, labels, sampling_values(info.sample, ["t_draft=16"], model.positions), device)
    save_picture(grid(to_pixels(pictures.flatten(0, 1)), pictures.shape[1], max(1, 96 // model.size)), out / "infill.png")
    return ("### In-filling of half of the stacks\n\n"
            f"{len(images)} images of {directory}/val, the checkpoint's sampling values, T_draft 16.\n\n{lines}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="DIR/val/<class>/*: reference and classes")
    add("--out", default="runs/study", metavar="DIR", help="codes, features, tables.md, study.png, infill.png (runs/study)")
    add("--checkpoint", default=str(BUNDLED), metavar="DIR")
    add("--features", default="classifier", metavar="F", help="as in evaluate.py; with class logits (classifier)")
    add("--seeds", type=int, default=5, help="how often (5)")
    add("--images", type=int, default=80, metavar="N", help="images of a seed (80)")
    add("--batch", type=int, default=40, help="images decoded at a time (40)")
    add("--runs", metavar="NAME,...", help="draw only runs whose names begin so")
    add("--infill", action="store_true", help="in-filling only")
    add_device_arguments(parser)
    args = parser.parse_args()
    if args.seeds < 0 or args.batch < 1 or args.images < 4:
        raise UserError(f"--seeds is {args.seeds}, --batch {args.batch} and --images {args.images}; expected from 0, 1 and 4 on.")
    device, dtype = pick_device(args)
    out = Path(args.out)
    vae, transformer, info = drr.load_checkpoint(args.checkpoint)
    model = drr.TorchModel(vae, transformer, device, dtype)
    if args.infill:
        return print(infill_to(out, model, args.data, info, device))
    network = evaluate.load_features(args.features, device)
    reference = evaluate.in_folder(Path(args.data) / "val", vae.size)
    names = sorted(set(reference.labels or ()) & set(info.classes) & set(network.classes or ()))
    if len(names) < 4 or reference.count < 4:                # precision and recall look at the third neighbour
        raise UserError(f"{args.data}/val has {len(names)} class folders that both the checkpoint and {network.name} know; expected "
                        "at least 4.")
    labels = torch.tensor([info.classes.index(name) for name in names], device=device)
    prefixes = tuple(args.runs.split(",")) if args.runs else ("",)
    settings = {name: sampling_values(load_config(*BASE).sample, changes.split(), transformer.positions)
                for name, changes in RUNS.items()}
    if not any(name.startswith(prefixes) for name in RUNS):
        raise UserError(f"--runs {args.runs} fits none of the runs: {', '.join(RUNS)}.")
    evaluate.claim(out, [drr.fingerprint(vae), drr.fingerprint(transformer), names, str(dtype), args.images])

    todo = [(seed, name) for seed in range(args.seeds) for name in settings
            if name.startswith(prefixes) and not path_of(out, name, seed).exists()]
    with tqdm(total=len(todo) * args.images, desc="drawing", unit="image") as bar:
        for seed, name in todo:
            bar.set_postfix_str(f"{name}, seed {seed}")
            shown = labels[classes_of(seed, args.images, len(names))]
            codes, seconds = draw_run(model, shown, seed, settings[name], args.batch, bar)
            with replacing(path_of(out, name, seed)) as temporary, open(temporary, "wb") as f:
                np.savez(f, codes=codes, seconds=seconds, settings=json.dumps(vars(settings[name])))

    # Of the runs that are there, the seeds that all of them have: FID depends on the number of images.
    paths = {name: {seed: path_of(out, name, seed) for seed in range(1000) if path_of(out, name, seed).exists()} for name in settings}
    paths = {name: found for name, found in paths.items() if found}
    seeds = sorted(set.intersection(*map(set, paths.values()))) if paths else []
    if not seeds:
        raise UserError(f"{out} holds no seed that all of its runs have; draw some, with --seeds 1 or more.")
    paths = {name: [found[seed] for seed in seeds] for name, found in paths.items()}
    for name, found in paths.items():
        for path in found:
            if str(np.load(path)["settings"]) != json.dumps(vars(settings[name])):
                raise UserError(f"{path} was drawn with other values than {name!r} has today; move it away or give another --out.")
    real, _ = evaluate.measure(network, reference.batches(), reference.count, "reference", device)
    of_seed = lambda path: [names[i] for i in classes_of(int(path.stem.rpartition("-")[2]), args.images, len(names))]
    held = {name: [features_of(p, vae, network, of_seed(p), device) for p in found] for name, found in paths.items() if found}
    measured, costs = Measured(real, held), {}
    for name in held:
        seconds, c = np.median([np.load(p)["seconds"] for p in paths[name]], 0), settings[name]
        flops = []
        for m in range(len(seconds)):
            c.rounds = m
            flops.append(bench.decode_flops(transformer, c) / 1e9)
        c.rounds, costs[name] = len(seconds) - 1, (seconds, flops)
    text = [f"{network.name}; reference {reference.name}; {len(names)} classes in turn, "
            f"{len(seeds)} seeds of {args.images} images; {vae.size}x{vae.size}; {str(dtype)[6:]}, {device}; commit {evaluate.commit()}; "
            f"± standard error (jackknife over seeds, whose classes differ, too); bold: more than {APART} standard errors of the "
            "difference from the first row.\n"]
    text += [table(title, rows, measured, costs) for title, rows in TABLES.items()]
    plot(out / "study.png", measured, costs)
    text.append(infill_to(out, model, args.data, info, device))
    with replacing(out / "tables.md") as temporary:
        temporary.write_text("\n".join(text))
    print("\n".join(text))
    print(f"-> {out / 'tables.md'}, {out / 'study.png'}, {out / 'infill.png'}")


if __name__ == "__main__":
    run(main)
