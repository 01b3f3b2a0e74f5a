"""Draws the curves of a training from its logs.

    python -m tools.plots runs/imagenet-371m          # vae.csv, transformer.csv -> plots.png
"""
import argparse
import csv
import math
from pathlib import Path

from drr import UserError, replacing
from support.common import run

# A panel: title, label of the y axis, logarithmic or not, columns. NAME_* stands for one curve per depth, and
# |NAME has an axis of its own on the right. Columns that a log does not have are left out.
PANELS = {
    "vae": [
        ("Reconstruction", "error on [-1, 1]", True, ["reconstruction", "|val_psnr"]),
        ("Commitment and perceptual loss", "loss", True, ["commitment", "perceptual"]),
        ("Perplexity of the codes", "codes", False, ["perplexity_*"]),
        ("Codes in use", "share of the codebook", False, ["usage_*"]),
        ("Adversary", "hinge loss, logits", False, ["disc", "logits_real", "logits_fake", "|lambda"]),
        ("Gradient norm and learning rate", "norm", True, ["grad_norm", "|lr"]),
        ("Speed", "images/s", False, ["images_per_s"])],
    "transformer": [
        ("Loss by depth", "cross-entropy in nats", False, ["loss_*", "loss", "val_loss"]),
        ("Accuracy by depth", "share of hidden codes", False, ["accuracy_*"]),
        ("Gradient norm and learning rate", "norm", True, ["grad_norm", "|lr"]),
        ("Speed", "images/s", False, ["images_per_s"])]}
FROM_0 = "share of the codebook", "images/s", "share of hidden codes", "codes"     # their axes begin at 0
STAGES = {"vae": "Stage 1: RQ-VAE", "transformer": "Stage 2: Contextual RQ-Transformer"}
STYLES = {                                           # label and colour; others are blue, under their name
    "loss": ("mean", "black"), "val_loss": ("validation", "crimson"),
    "val_psnr": ("validation PSNR, dB", "crimson"), "perceptual": ("perceptual", "darkorange"),
    "disc": ("hinge loss", "tab:blue"), "lambda": ("adaptive weight", "darkorange"),
    "logits_real": ("logits, real", "seagreen"), "logits_fake": ("logits, fake", "crimson"),
    "grad_norm": ("gradient norm", "tab:blue"), "lr": ("learning rate", "darkorange")}


def read_log(path):
    """The known columns of a log, name -> floats, NaN in empty cells. Raises UserError for a damaged log."""
    known = {name.strip("|*") for panels in PANELS.values() for panel in panels for name in panel[3]}
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f, strict=True))
        if not rows or "step" not in rows[0] or any(None in row for row in rows):
            raise ValueError("it has no rows with a step, or a row that is longer than its header")
        names = [name for name in rows[0] if name == "step" or name.rstrip("0123456789") in known]
        return {name: [float(row[name] or "nan") for row in rows] for name in names}
    except (ValueError, csv.Error) as error:                       # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is damaged or no training log ({error}); move it away.") from None


def points(log, name, positive):
    """(steps, values) of a column, only its `positive` values if asked; None if it is 0 throughout, as is the
    loss of what is switched off."""
    pairs = zip(log["step"], log.get(name, []))
    pairs = [(x, y) for x, y in pairs if math.isfinite(y) and (y > 0 or not positive)]
    return list(zip(*pairs)) if any(y for _, y in pairs) else None


def curves(panel, log):
    """The curves of a panel that the log has: [(name, depth or None, on the right, (steps, values))]."""
    result = []
    for name in panel[3]:
        right = name.startswith("|")
        name = name.lstrip("|")
        columns = [(name, None)]
        if name.endswith("*"):
            columns = [(f"{name[:-1]}{d}", d) for d in range(1, 100)]
        for column, depth in columns:
            xy = points(log, column, panel[2] and not right)
            if xy:
                result.append((column, depth, right, xy))
    return result


def draw_panel(ax, panel, log):
    """Draws the curves of a panel on the matplotlib axes `ax`."""
    from matplotlib import colormaps
    title, unit, logarithmic, _ = panel
    found = curves(panel, log)
    axes = [ax]                                                    # and its twin, for a curve on the right
    deepest = max([depth for _, depth, *_ in found if depth], default=1)
    for name, depth, right, (x, y) in found:
        label, colour = STYLES.get(name, (name, "tab:blue"))
        if depth:
            label = f"depth {depth}"
            colour = colormaps["viridis"](0.9 * (depth - 1) / max(1, deepest - 1))
        if right:
            axes.append(ax.twinx())
            axes[-1].set_ylabel(label, color=colour)
        line = "--" if name.startswith("val_") else "-"
        marker = "o" if len(x) <= 50 else None                     # a line of one point would not be seen
        axes[-1 if right else 0].plot(x, y, line, color=colour, label=label, marker=marker, markersize=3)
    if len(found) > 1:
        axes[-1].legend(handles=[line for a in axes for line in a.get_lines()], fontsize=8, framealpha=0.8)
    ax.set(title=title, xlabel="step", ylabel=unit, yscale="log" if logarithmic else "linear")
    if unit in FROM_0:
        ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3, which="both", linewidth=0.5)


def draw(directory, out=None):
    """Draws the logs in `directory` to `out` (directory/plots.png) and returns that path. Raises UserError
    without a log, with a damaged one, and without matplotlib."""
    paths = {stage: Path(directory) / f"{stage}.csv" for stage in PANELS}
    logs = {stage: read_log(path) for stage, path in paths.items() if path.is_file()}
    if not logs:
        raise UserError(f"{directory} has neither vae.csv nor transformer.csv; expected a training's folder.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure             # pyplot would keep state and look for a display
    except ImportError:
        raise UserError("Drawing needs matplotlib; pip install -r requirements-tools.txt.") from None
    panels = {stage: [panel for panel in PANELS[stage] if curves(panel, log)] for stage, log in logs.items()}
    rows = [max(1, math.ceil(len(found) / 4)) for found in panels.values()]
    figure = Figure(figsize=(18, 0.6 + 3.4 * sum(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for stage, part, count in zip(panels, parts, rows):
        part.suptitle(STAGES[stage], fontsize=14, fontweight="bold", x=0.01, ha="left")
        axes = list(part.subplots(count, 4, squeeze=False).flat)
        for panel in panels[stage]:
            draw_panel(axes.pop(0), panel, logs[stage])
        for ax in axes:
            ax.set_axis_off()
    out = Path(out or Path(directory) / "plots.png")
    with replacing(out) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=100)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="RUN_DIR", help="the folder that a training wrote to")
    parser.add_argument("--out", metavar="FILE", help="the picture to write (RUN_DIR/plots.png)")
    print("wrote", draw(**vars(parser.parse_args())))


if __name__ == "__main__":
    run(main)
