"""Draws the curves of a training from its logs.

    python plots.py runs/imagenet-371m                        # vae.csv, transformer.csv -> plots.png beside them
    python plots.py runs/imagenet-371m --out curves.png
"""
import argparse
import csv
import math
from pathlib import Path

from support.common import run
from drr import UserError, replacing

# A panel: title, label of the y axis, logarithmic or not, and the columns it shows. A name that ends in _* stands for
# one curve a depth, a name after | has an axis of its own on the right. What a log does not have is left out.
PANELS = {
    "vae": [
        ("Reconstruction", "error on [-1, 1]", True, ["reconstruction", "|val_psnr"]),
        ("Commitment and perceptual loss", "loss", True, ["commitment", "perceptual"]),
        ("Perplexity of the codes", "codes", False, ["perplexity_*"]),
        ("Codes in use", "share of the codebook", False, ["usage_*"]),
        ("Adversary", "hinge loss, logits", False, ["disc", "logits_real", "logits_fake", "|lambda"]),
        ("Gradient norm", "norm", True, ["grad_norm"]),
        ("Learning rate", "learning rate", False, ["lr"]),
        ("Speed", "images/s", False, ["images_per_s"])],
    "transformer": [
        ("Loss by depth", "cross-entropy in nats", False, ["loss_*", "loss", "val_loss"]),
        ("Accuracy by depth", "share of hidden codes", False, ["accuracy_*"]),
        ("Gradient norm and learning rate", "norm", True, ["grad_norm", "|lr"]),
        ("Speed", "images/s", False, ["images_per_s"])]}
FROM_0 = "share of the codebook", "images/s", "share of hidden codes", "codes"     # their axes begin at 0
STAGES = {"vae": "Stage 1: RQ-VAE", "transformer": "Stage 2: Contextual RQ-Transformer"}
LABELS = {"loss": "mean", "val_loss": "validation", "val_psnr": "validation PSNR, dB", "lambda": "adaptive weight",
          "lr": "learning rate", "grad_norm": "gradient norm", "disc": "hinge loss",
          "logits_real": "logits, real", "logits_fake": "logits, fake"}
COLOURS = {"loss": "black", "val_loss": "crimson", "val_psnr": "crimson", "lambda": "darkorange", "lr": "darkorange",
           "perceptual": "darkorange", "logits_real": "seagreen", "logits_fake": "crimson"}


def read_log(path):
    """The known columns of a log, name -> floats, NaN where a cell is empty. Raises UserError for a damaged log."""
    known = {name.strip("|*") for panels in PANELS.values() for panel in panels for name in panel[3]}
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f, strict=True))
        if not rows or "step" not in rows[0]:
            raise ValueError("it has no rows with a step")
        if any(None in row for row in rows):
            raise ValueError("it has a row longer than its header")
        return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]
                if name == "step" or name.rstrip("0123456789") in known}
    except (ValueError, csv.Error) as error:                       # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is damaged or no training log ({error}); expected the CSV that a training writes, "
                        "so move it away.") from None


def points(log, name, positive):
    """(steps, values) of a column where it has some; None if it is 0 throughout, such as a loss that is not in use."""
    pairs = [(x, y) for x, y in zip(log["step"], log.get(name, [])) if math.isfinite(y) and (y > 0 or not positive)]
    return list(zip(*pairs)) if any(y for _, y in pairs) else None


def curves(panel, log):
    """The curves of a panel that the log has: [(name, depth or None, on the right, (steps, values))]."""
    result = []
    for name in panel[3]:
        right, name = name.startswith("|"), name.lstrip("|")
        columns = [(name, None)]
        if name.endswith("*"):
            stem = name[:-1]
            columns = [(f"{stem}{d}", d) for d in range(1, 100) if f"{stem}{d}" in log]
        result += [(n, d, right, xy) for n, d in columns if (xy := points(log, n, panel[2] and not right))]
    return result


def draw_panel(ax, panel, log):
    from matplotlib import colormaps
    from matplotlib.ticker import LogFormatter
    title, unit, logarithmic, _ = panel
    found, twin = curves(panel, log), None
    deepest = max([depth for _, depth, *_ in found if depth], default=1)
    for name, depth, right, (x, y) in found:
        colour = COLOURS.get(name, "tab:blue")
        if depth:
            colour = colormaps["viridis"](0.9 * (depth - 1) / max(1, deepest - 1))
        if right and twin is None:
            twin = ax.twinx()
            twin.set_ylabel(LABELS.get(name, name), color=colour)
        (twin if right else ax).plot(x, y, color=colour, linewidth=1 if right else 1.5, zorder=3, markersize=3,
                                     marker="o" if len(x) <= 50 else None,
                                     linestyle="--" if name.startswith("val_") else "-",
                                     label=f"depth {depth}" if depth else LABELS.get(name, name))
    handles = [line for a in (ax, twin) if a for line in a.get_lines()]
    if len(handles) > 1:
        (twin or ax).legend(handles=handles, fontsize=8, framealpha=0.8)
    ax.set(title=title, xlabel="step", ylabel=unit, yscale="log" if logarithmic else "linear")
    if logarithmic:                                                # 0.2 and not 2 x 10^-1
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    if unit in FROM_0:
        ax.set_ylim(bottom=0)
    for a in filter(None, (ax, twin)):
        if a.get_yscale() == "linear":
            a.ticklabel_format(axis="y", scilimits=(-3, 5))
        a.spines["top"].set_visible(False)
        a.spines["right"].set_visible(twin is not None)
    ax.grid(alpha=0.3, which="both", linewidth=0.5)


def draw(directory, out=None):
    """Draws the logs in `directory` to `out` (directory/plots.png) and returns that path. Raises UserError where there
    is no log, a damaged one, or no matplotlib."""
    logs = {stage: Path(directory) / f"{stage}.csv" for stage in PANELS}
    logs = {stage: read_log(path) for stage, path in logs.items() if path.is_file()}
    if not logs:
        raise UserError(f"{directory} has neither vae.csv nor transformer.csv; name the folder that a training wrote.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure             # without pyplot, which keeps state and looks for a display
    except ImportError:
        raise UserError("Drawing needs matplotlib; pip install -r requirements-train.txt.") from None
    panels = {stage: [p for p in PANELS[stage] if curves(p, log)] for stage, log in logs.items()}
    rows = {stage: math.ceil(len(p) / 4) for stage, p in panels.items()}
    figure = Figure(figsize=(18, 0.6 + 3.4 * sum(rows.values())), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=[max(1, n) for n in rows.values()])[:, 0]
    for stage, part in zip(panels, parts):
        part.suptitle(STAGES[stage], fontsize=14, fontweight="bold", x=0.01, ha="left")
        axes = list(part.subplots(max(1, rows[stage]), 4, squeeze=False).flat)
        for panel, ax in zip(panels[stage], axes):
            draw_panel(ax, panel, logs[stage])
        for ax in axes[len(panels[stage]):]:
            ax.set_axis_off()
    out = Path(out or Path(directory) / "plots.png")
    with replacing(out) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=100)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="RUN_DIR", help="the folder that a training wrote to, runs/PRESET")
    parser.add_argument("--out", metavar="FILE", help="the picture to write (RUN_DIR/plots.png)")
    args = parser.parse_args()
    print(f"wrote {draw(args.directory, args.out)}")


if __name__ == "__main__":
    run(main)
