"""The decoding study: which of the paper's claims hold for a checkpoint, and which other strategies help
(docs/study.md).

    python -m tools.study --data DIR                   # draws what is missing; tables and a plot
    python -m tools.study --data DIR --tables 6,7      # of these tables only
    python -m tools.study --data DIR --infill          # instead: in-filling of hidden halves ...
    python -m tools.study --data DIR --infill --against RUN        # ... also by a second transformer
    python -m tools.study --data DIR --published RUN               # instead: RUN is of related/maskgit.py

Every row is one way of decoding, with the paper's values (with --published: the checkpoint's) where it does
not say otherwise. All draw the same images from the same random numbers, the classes of DIR/val in turn. What
the feature network sees is kept after the draft and after each revision, so that a run with five revisions
also serves the rows with fewer.
"""
import argparse
import functools
import hashlib
import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import drr
from drr import UserError, replacing
from support import data, models
from support.common import (BUNDLED, add_device_arguments, grid, load_config, pick_device, precision_name,
                            run, sampling_values, save_picture, to_float, to_pixels)
from tools import evaluate, machine, strategies

# === The tables =============================================================================================
PRESET = "imagenet-821m"                             # for the paper's sampling values
SHORT, LONG = "t_draft=8", "t_draft=64"
POOLS = {"Random": "", "Top-C": "draft_pool=0", "Top-C-50%": "draft_pool=0.5"}
COOL = "draft_temperature=0.8 revise_temperature=0.5"
COOL_GUIDED = f"{COOL} draft_guidance=1.5 revise_guidance=2"


class Table(NamedTuple):
    title: str
    base: str                    # what differs from the paper's values in all rows
    revisions: list              # M of the rows, or [LAST]: as the rows say
    rows: dict                   # label: what differs from the base


TABLES = [
    Table("Length of the draft, before and after two revisions", "", [0, 2],
          {f"T_draft {t}": f"t_draft={t}" for t in (8, 4, 16, 32, 64)}),
    Table("Number of revisions, T_draft 8", SHORT, range(6), {"T_draft 8": ""}),
    Table("Number of revisions, T_draft 64", LONG, range(6), {"T_draft 64": ""}),
    Table("Updates of a revision, T_draft 8, M = 2", SHORT, [2], {
        "T_revise 2": "",
        "T_revise 1": "t_revise=1",
        "T_revise 4": "t_revise=4",
        "T_revise 8": "t_revise=8"}),
    Table("Guidance, T_draft 8, M = 2", SHORT, [2], {
        "revise 1.8 (paper)": "",
        "none": "revise_guidance=1",
        "revise 1.4": "revise_guidance=1.4",
        "revise 3": "revise_guidance=3",
        "both 1.4": "draft_guidance=1.4 revise_guidance=1.4",
        "both 1.8": "draft_guidance=1.8",
        "both 3": "draft_guidance=3 revise_guidance=3",
        "draft 1.8 only": "draft_guidance=1.8 revise_guidance=1",
        "draft up to 1.8, revise 1.8": "draft_guidance=1.8 draft_ramp=true",
        "draft up to 3, revise 3": "draft_guidance=3 revise_guidance=3 draft_ramp=true"}),
    Table("Which stacks next, T_draft 8", SHORT, [0, 2], POOLS),
    Table("Which stacks next, T_draft 64", LONG, [0, 2], POOLS),
    Table("Spread and growing sets, T_draft 8", SHORT, [0, 2], {
        "Random": "",
        "Sobol": "order=sobol",
        "growing": "draft_growing=true",
        "Sobol, growing": "order=sobol draft_growing=true"}),
    Table("Selective revisions and temperatures, T_draft 8, M = 2", SHORT, [2], {
        "paper": "",
        "keep the more likely": "revise_better=true",
        "least likely half": "revise_share=0.5",
        "least likely half, T_revise 1": "revise_share=0.5 t_revise=1",
        "temperatures 0.8 and 0.5": COOL,
        "those, guidance 1.5 and 2": COOL_GUIDED}),
    Table("Values for the bundled checkpoint, T_draft 8, M = 3", SHORT, [3], {
        "temperatures 0.8 and 0.5, guidance 1.5 and 2, T_revise 2": COOL_GUIDED,
        "1 and 0.8, 1.5 and 2, T_revise 8": "t_revise=8 draft_guidance=1.5 revise_guidance=2",
        "1 and 0.8, 2 and 2, T_revise 4": "t_revise=4 draft_guidance=2 revise_guidance=2",
        "1 and 0.8, 2 and 2, T_revise 8": "t_revise=8 draft_guidance=2 revise_guidance=2",
        "1 and 0.8, 2.5 and 2.5, T_revise 8": "t_revise=8 draft_guidance=2.5 revise_guidance=2.5",
        "1 and 0.8, 3 and 3, T_revise 8": "t_revise=8 draft_guidance=3 revise_guidance=3"}),
]
LAST = -1
PUBLISHED = [Table("Order and revisions, 32 updates each", "", [LAST], {
    "Halton order": "order=halton t_draft=32 rounds=0",
    "most likely first (Top-C), growing": "draft_pool=0 draft_growing=true t_draft=32 rounds=0",
    "random order": "t_draft=32 rounds=0",
    "random order, growing": "draft_growing=true t_draft=32 rounds=0",
    "T_draft 24, M = 4, T_revise 2": "t_draft=24 t_revise=2 rounds=4",
    "T_draft 16, M = 8, T_revise 2": "t_draft=16 t_revise=2 rounds=8",
    "T_draft 16, M = 2, T_revise 8": "t_draft=16 t_revise=8 rounds=2"})]
METRICS = ("FID-like", "precision", "recall", "accuracy")


def rows_of(table):
    """(label, way, M) of each row; a way of decoding is what differs from the paper's values."""
    several = len(table.revisions) > 1
    return [(label + several * f", M = {m}", f"{table.base} {changes}".strip(), m)
            for m in table.revisions for label, changes in table.rows.items()]


def runs_of(tables):
    """{way: the most revisions that a row of the tables asks for}."""
    rounds = {}
    for table in tables:
        for _, way, m in rows_of(table):
            rounds[way] = max(m, rounds.get(way, m))
    return rounds


def settings_of(info, way, rounds, positions):
    """The sampling values of a way of decoding with so many revisions; info: a configuration, whose values
    hold where the way does not say otherwise."""
    more = [f"rounds={rounds}"] * (rounds != LAST)
    return strategies.sampling_values(info, [*way.split(), *more], positions)


# === Drawing: OUT/WAY_rounds=M-SEED.npz =====================================================================
def draw_rounds(model, labels, seed, images, c):
    """Codes (1 + M, B, N, D) after the draft and after each revision; labels (B,), images: their indices."""
    noise = drr.draw_noise(seed, images, 1 + c.rounds, model.positions, model.depth)
    last = {state.round: state.codes for state in strategies.decode(model, labels[:, None], noise, c)}
    return torch.stack(list(last.values()))


@torch.inference_mode()
def see(model, network, codes):
    """Features (B, d) and logits (B, C) of the pictures with codes (B, N, D), on the CPU."""
    pixels = torch.from_numpy(to_pixels(model.decode(codes))).permute(0, 3, 1, 2)
    return [tensor.float().cpu() for tensor in network.extract(to_float(pixels, codes.device))]


def draw_run(model, network, conditions, targets, seed, c, batch):
    """Features (1 + M, images, d) after the draft and each revision, and right (1 + M, images): is a picture
    taken for its class? conditions, targets (images,): the class's index for the model, for the network."""
    features, right = [], []
    for first in range(0, len(conditions), batch):
        part = slice(first, first + batch)
        images = range(len(conditions))[part]
        seen = [see(model, network, codes)
                for codes in draw_rounds(model, conditions[part], seed, images, c)]
        features.append(torch.stack([f for f, _ in seen]))
        right.append(torch.stack([logits.argmax(1) == targets[part] for _, logits in seen]))
    return torch.cat(features, 1).numpy(), torch.cat(right, 1).numpy()


def draw_missing(model, network, classes, settings, args):
    """{way: (features, right)} as `draw_run` gives them, of all seeds; draws those that --out lacks.
    classes: indices (C,) for the model, and for the network, of the classes to draw; settings: {way: c}."""
    conditions, targets = classes
    held = {way: [] for way in settings}
    todo = [(seed, way) for seed in range(args.seeds) for way in settings]
    for seed, way in tqdm(todo, "drawing", unit=f" x {args.images} images"):
        path = Path(args.out) / f"{way.replace(' ', '_')}_rounds={settings[way].rounds}-{seed}.npz"
        if not path.exists():
            # The classes go on where those of the seed before stopped.
            which = (seed * args.images + torch.arange(args.images)) % len(targets)
            features, right = draw_run(model, network, conditions[which], targets[which], seed,
                                       settings[way], args.batch)
            with replacing(path) as temporary, open(temporary, "wb") as f:
                np.savez(f, features=features, right=right)
        with np.load(path) as arrays:
            held[way].append((arrays["features"], arrays["right"]))
    return {way: [np.concatenate(arrays, 1) for arrays in zip(*parts)] for way, parts in held.items()}


# === Numbers with standard errors ===========================================================================
GROUPS = 10      # of the images, for the errors: neighbours, since classes differ, too
APART = 3        # standard errors of a difference: 1.5% of those between equals are larger


def jackknife(values):
    """Standard error of a statistic from its values (S, ...) with one group of S left out each (Efron)."""
    S = len(values)
    return np.sqrt((S - 1) / S * ((values - values.mean(0)) ** 2).sum(0))


def run_metrics(real, held):
    """A function (way, M) -> the METRICS over all images (4,), and over all but one of S groups (S, 4).

    real (N, d): features of the reference; held: as `draw_missing` gives it.
    """
    reference, radii = evaluate.statistics(real), evaluate.neighbour_radii(real)

    def of(features, right):
        fid = evaluate.fid(*reference, *evaluate.statistics(features))
        return np.array([fid, *evaluate.precision_recall(real, features, radii), right.mean()])

    @functools.cache
    def metrics(way, m):
        features, right = (torch.from_numpy(array[m]) for array in held[way])
        right = right.double()
        numbers = torch.arange(len(right))
        kept = [~torch.isin(numbers, group) for group in numbers.tensor_split(min(GROUPS, len(right)))]
        return of(features, right), np.array([of(features[some], right[some]) for some in kept])
    return metrics


def markdown(number, table, metrics, cost, unit="GFLOP"):
    """A table in markdown. Bold: a number that differs by more than APART standard errors of the difference
    from that of the first row with the same M, or, where no two have the same M, of the first row.
    cost(way, M): of one image, in that unit."""
    lines = [f"### {number}. {table.title}", "", f"| | {' | '.join(METRICS)} | {unit} |", "|---" * 6 + "|"]
    rows = rows_of(table)
    for label, way, m in rows:
        value, leave_one = metrics(way, m)
        base, base_leave_one = metrics(rows[0][1], m if len(table.rows) > 1 else rows[0][2])
        error = jackknife(leave_one)
        apart = np.abs(value - base) > APART * jackknife(leave_one - base_leave_one)
        cells = [f"{value[0]:.2f} ± {error[0]:.2f}",
                 *(f"{100 * value[i]:.1f} ± {100 * error[i]:.1f}%" for i in (1, 2)),
                 f"{100 * value[3]:.2f} ± {100 * error[3]:.2f}%"]
        cells = [f"**{cell}**" if different else cell for cell, different in zip(cells, apart)]
        lines.append(f"| {label} | {' | '.join(cells)} | {cost(way, m):.1f} |")
    return "\n".join(lines) + "\n"


def plot(path, metrics, gflop, held):
    """Quality against the computation for an image, of those ways that are held."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("The plot needs matplotlib; pip install -r requirements-tools.txt.") from None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (label, pool), colour in zip(POOLS.items(), ("tab:blue", "tab:red", "tab:orange")):
        ways = [f"t_draft={t} {pool}".strip() for t in (4, 8, 16, 32, 64)]
        for m, style in ((0, "o--"), (2, "o-")):
            points = [(gflop(way, m), *metrics(way, m)) for way in ways if way in held]
            if points:
                axes.errorbar([x for x, _, _ in points], [value[0] for _, value, _ in points],
                              [jackknife(leave_one)[0] for _, _, leave_one in points],
                              fmt=style, color=colour, label=f"{label}, M = {m}", capsize=2)
    axes.set(xscale="log", xlabel="GFLOP per image", ylabel="FID-like", title="Quality against computation")
    axes.legend()
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110)


# === In-filling: half of the stacks of validation images ====================================================
def infill(fillers, images, labels, device, batch=50):
    """How many hidden codes of validation images are found, with a half of the stacks hidden: the right, the
    left, the upper, or a random one.

    fillers {name: (model, how its codes are drawn)} of one RQ-VAE; images uint8 (M, 3, S, S), labels (M,).
    Returns a markdown table, a column for each depth, and pictures (3 + fillers, 16, 3, S, S): the original,
    masked, filled with the mean colour, filled by each of them.
    """
    model = next(iter(fillers.values()))[0]
    N, D, side = model.positions, model.depth, model.side
    regions = {"right half": torch.arange(N) % side >= side // 2,
               "left half": torch.arange(N) % side < side // 2,
               "top half": torch.arange(N) < N // 2,
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
            drawn = {name: draw(other, cond, 0, range(first, first + len(x)), codes=codes, region=region)
                     for name, (other, draw) in fillers.items()}
            ways = drawn | {"the mean colour": model.encode(torch.where(pixel, mean, x)),
                            "another image": codes.roll(len(x) // 2, 0)}
            original = model.decode(codes)
            for way, filled in ways.items():
                same = (filled == codes)[:, region]                                 # (B, n, D)
                found = [*same.sum((0, 1)).tolist(), same.all(-1).sum().item()]
                hits[way] = hits.get(way, 0) + np.array(found)
                difference = model.decode(torch.where(region[:, None], filled, codes)) - original
                errors[way] = errors.get(way, 0) + (difference.clamp(-2, 2).square() * pixel).sum().item()
            if first == 0:
                rows = [x, torch.where(pixel, 0, x), torch.where(pixel, mean, x)]
                rows += [model.decode(filled[:4]) for filled in drawn.values()]
                pictures.append(torch.stack([row[:4] for row in rows]))
        total = len(images) * int(region.sum())
        for way in ways:
            mse = max(errors[way], 1e-12) / (len(images) * 3 * int(pixel.sum()))
            shares = " | ".join(f"{h / total:.1%}" for h in hits[way])
            lines.append(f"| {title} | {way} | {shares} | {10 * math.log10(4 / mse):.1f} dB |")
    chance = f"{1 / len(model.vae.quantizer.codebook):.1%}"
    lines.append("| | chance | " + " | ".join([chance] * D) + " | 0.0% | |")
    return "\n".join(lines) + "\n", torch.cat(pictures, 1)


def infill_to(out, checkpoints, directory, device, dtype):
    """`infill` of up to 400 images of DIR/val, T_draft 16: prints the table, writes OUT/infill.png.
    checkpoints: [(folder, what models.load_checkpoint returns)]."""
    fillers, about = {}, []
    for folder, (vae, transformer, info) in checkpoints:
        if info.transformer.cond == "text":
            raise UserError(f"{folder} knows texts; only models of classes are compared here.")
        about.append((drr.code_fingerprint(vae), info.classes))
        if about[-1] != about[0]:
            raise UserError(f"{folder} has another RQ-VAE or other classes than {checkpoints[0][0]}; only "
                            "transformers of the same codes and classes can be compared.")
        kind = models.kind(info.transformer)
        draft = [] if "t_draft" in kind.fixed else ["t_draft=16"]
        c = sampling_values(info, draft, transformer.positions)
        model = drr.TorchModel(vae, transformer, device, dtype)
        fillers[str(folder)] = model, functools.partial(drr.sample, c=c, decode=kind.decode)
    images, labels = data.validation_images(directory, model.size, 400, info.classes)
    if images is None:
        raise UserError(f"{directory} has no val/<class>/*; give a folder that has.")
    lines, pictures = infill(fillers, images, labels, device)
    pixels = to_pixels(pictures.flatten(0, 1))
    save_picture(grid(pixels, pictures.shape[1], max(1, 96 // model.size)), out / "infill.png")
    print(f"{lines}\n{len(images)} images of {directory}/val -> {out / 'infill.png'}")


# === The command ============================================================================================
def parse_arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="DIR/val/<class>/*: reference and classes")
    add("--out", default="runs/study", metavar="DIR", help="features, tables and pictures (runs/study)")
    add("--checkpoint", metavar="DIR", help="(the bundled one)")
    add("--features", default="classifier", metavar="F",
        help="as in tools.evaluate, with class logits (classifier)")
    add("--seeds", type=int, default=5, help="how often (5)")
    add("--images", type=int, default=80, metavar="N", help="images of a seed (80)")
    add("--batch", type=int, default=40, help="images decoded at a time (40)")
    add("--tables", metavar="N,...", help="only these tables, by number")
    add("--infill", action="store_true", help="in-filling only")
    add("--against", metavar="DIR", help="with --infill: a second transformer of the same codes, of any kind")
    add("--published", metavar="DIR", help="a checkpoint of related.maskgit: its orders at equal updates")
    add_device_arguments(parser)
    args = parser.parse_args()
    if min(args.seeds, args.batch) < 1 or args.images < 5:
        raise UserError(f"--seeds is {args.seeds}, --batch {args.batch} and --images {args.images}; expected "
                        "at least 1, 1 and 5.")
    if args.against and not args.infill:
        raise UserError("--against goes with --infill; leave it out, or add --infill.")
    if args.published and (args.infill or args.tables or args.checkpoint):
        raise UserError("--published is a table of its own; leave --infill, --tables and --checkpoint out.")
    args.checkpoint = args.checkpoint or str(BUNDLED)
    every = [str(number) for number in range(1, 1 + len(TABLES))]
    args.tables = args.tables.split(",") if args.tables else every
    if not set(args.tables) <= set(every):
        raise UserError(f"--tables is {','.join(args.tables)}; expected numbers from 1 to {len(TABLES)}, "
                        "as in 1,6,7.")
    return args


def main():
    args = parse_arguments()
    device, dtype = pick_device(args)
    out = Path(args.out)
    if args.infill:
        folders = [args.checkpoint, args.against] if args.against else [args.checkpoint]
        checkpoints = [(folder, models.load_checkpoint(folder)) for folder in folders]
        return infill_to(out, checkpoints, args.data, device, dtype)
    vae, transformer, info = models.load_checkpoint(args.published or args.checkpoint)
    kind = models.kind(info.transformer)
    if kind.decode is not drr.draft_and_revise or not args.published and kind is not models.CONTEXTUAL:
        raise UserError("The study is of Draft-and-Revise by a contextual transformer; give such a "
                        "checkpoint, or with --published one of related.maskgit.")
    model = drr.TorchModel(vae, transformer, device, dtype)
    network = evaluate.load_features(args.features, device)
    reference = evaluate.in_folder(Path(args.data) / "val", vae.size)
    names = sorted(set(reference.labels or ()) & set(info.classes) & set(network.classes or ()))
    if min(len(names), reference.count) <= evaluate.NEIGHBOURS:
        raise UserError(f"{args.data}/val has {len(names)} class folders that both the checkpoint and "
                        f"{network.name} know; expected at least 4.")
    tables, base = TABLES, load_config(PRESET)
    if args.published:
        tables, base = PUBLISHED, info
        args.tables = ["1"]
    # All that decides what is drawn, the code included: other code may draw other pictures.
    sources = drr, inspect.getmodule(type(transformer)), strategies, draw_rounds, see, draw_run
    code = "".join(inspect.getsource(part) for part in sources)
    evaluate.claim_folder(out, [drr.fingerprint(vae), drr.fingerprint(transformer), names, str(dtype),
                                device.type, args.images, network.name, vars(base.sample),
                                hashlib.sha256(code.encode()).hexdigest()])

    chosen = {int(number): tables[int(number) - 1] for number in args.tables}
    ways = runs_of(chosen.values())
    rounds = runs_of(tables)                         # of all tables: a run serves them all
    settings = {way: settings_of(base, way, rounds[way], model.positions) for way in ways}
    classes = (torch.tensor([info.classes.index(name) for name in names], device=device),
               torch.tensor([network.classes.index(name) for name in names]))
    held = draw_missing(model, network, classes, settings, args)

    real, _ = evaluate.extract_features(network, reference, "reference", device)
    metrics = run_metrics(real, held)

    def gflop(way, m):
        c = SimpleNamespace(**vars(settings[way]) | {"rounds": m})
        return machine.decode_flops(transformer, c) / 1e9

    def updates(way, m):
        c = settings[way]
        return c.t_draft + c.rounds * c.t_revise
    text = [f"{network.name}; reference {reference.name}; {len(names)} classes in turn, {args.seeds} x "
            f"{args.images} images; {vae.size}x{vae.size}; {precision_name(dtype)}, {device}; commit "
            f"{evaluate.commit()}; ± standard error (jackknife over {GROUPS} groups of images, which differ "
            f"in their classes, too); bold: more than {APART} standard errors of the difference from the "
            "first row of the same M.\n"]
    cost = (updates, "updates") if args.published else (gflop, "GFLOP")
    text += [markdown(number, table, metrics, *cost) for number, table in chosen.items()]
    with replacing(out / "tables.md") as temporary:
        temporary.write_text("\n".join(text))
    if not args.published:
        plot(out / "study.png", metrics, gflop, held)
    print("\n".join(text))
    print(f"-> {out}/")


if __name__ == "__main__":
    run(main)
