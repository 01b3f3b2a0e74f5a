"""Draws the figure of docs/method.md: a photograph as a map of code stacks, and one decode, update by update.

    python -m tools.figures                          # docs/method.png, from the bundled checkpoint
"""
import argparse
import math

import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

import drr
from support.common import BUNDLED, HERE, crop, open_image, run, sampling_values, to_float, to_pixels

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PHOTO = HERE / "tests/photos/train/n11939491/cc_c6166621198a3de4.JPEG"  # a daisy, CC BY 2.0
CHOSEN = 27                                     # the position whose stack is traced
CPU = torch.device("cpu")
ORANGE = "#ff6a00"
TEXTS = (
    (0.01, 0.965, 11, "black", "(a) An image is a map of 8 x 8 stacks of 4 codes. "
                               "Each code adds to the sum of those below it."),
    (0.01, 0.52, 11, "black", "(b) One decode of class 980, volcano. "
                              "Grey is hidden; what the update draws is outlined."),
    (0.11, 0.475, 10, ORANGE, "draft: all that is not drawn yet is hidden ($T_{draft}$ = 4)"),
    (0.70, 0.475, 10, ORANGE, "revision: only the set is hidden ($T_{revise}$ = 2)"),
    (0.01, 0.31, 10, "black", "The update\nsees"),
    (0.01, 0.12, 10, "black", "and leaves"))


def show(axes, image, title="", below=""):
    """One image (3, S, S) in [-1, 1], without ticks."""
    axes.imshow(to_pixels(image[None])[0], extent=(0, 1, 0, 1))
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10, pad=5)
    axes.set_xlabel(below, fontsize=9)


def outline(axes, positions, side, width):
    for n in positions:
        row, column = divmod(int(n), side)
        corner = (column / side, 1 - (row + 1) / side)
        cell = plt.Rectangle(corner, 1 / side, 1 / side, fill=False, edgecolor=ORANGE, linewidth=width)
        axes.add_patch(cell)


def draw_stacks(axes, codes, colours):
    """The map codes (N, D) as D layers, depth 1 at the bottom, every code in its colour (D, N, 3)."""
    N, D = codes.shape
    side = math.isqrt(N)
    for d in range(D):
        axes.text(0.4, 6.2 * d + 1.2, f"depth {d + 1}", fontsize=9, ha="right")
        for n in range(N):
            row, column = divmod(n, side)
            x = column + 0.5 * (side - row)
            y = 6.2 * d + 0.62 * (side - row)
            corners = [(x, y), (x + 1, y), (x + 0.5, y - 0.62), (x - 0.5, y - 0.62)]
            axes.add_patch(plt.Polygon(corners, facecolor=colours[d, n], edgecolor="white", linewidth=0.4))
            if n == CHOSEN:
                axes.add_patch(plt.Polygon(corners, fill=False, edgecolor=ORANGE, linewidth=1.8, zorder=9))
                axes.plot([x + 0.75, side + 4.2], [y - 0.31, y - 0.31], color=ORANGE, linewidth=1, zorder=9)
                axes.text(side + 4.4, y - 0.6, f"$k_{d + 1}$ = {codes[n, d]}", fontsize=10, color=ORANGE)
    axes.set(xlim=(-2.2, side + 7.6), ylim=(-0.6, 6.2 * D - 0.6))
    axes.axis("off")


def photograph(vae, row):
    """On 2 + D axes: the image, its map of codes, and the decodes of every stack's first 1 .. D codes."""
    image = to_float(crop(open_image(PHOTO), vae.size)[None], CPU)
    z = vae.encode_latent(image)
    codes, partial_sums = vae.quantizer.quantize(z)                         # (1, N, D), (1, N, D, n_z)
    vectors = vae.quantizer.embed(codes[0].T)                               # (D, N, n_z)
    alone = vectors.flatten(0, 1)[:, None].expand(-1, codes.shape[1], -1)   # (D N, N, n_z), maps of one code
    colours = vae.decode_latent(alone).clamp(-1, 1).mean((2, 3)).add(1).div(2).view(*vectors.shape[:2], 3)
    colours[1:] = 0.5 + 3 * (colours[1:] - colours[1:].mean((0, 1)))     # the finer codes say little: louder
    show(row[0], image[0], "image", f"{vae.size} x {vae.size} pixels")
    outline(row[0], [CHOSEN], vae.side, 1.5)
    draw_stacks(row[1], codes[0], colours.clamp(0, 1).numpy())
    for d, axes in enumerate(row[2:]):
        left_over = (z - partial_sums[:, :, d]).norm(dim=-1).mean() / z.norm(dim=-1).mean()
        title = f"$+\\,e(k_{d + 1})$" if d else "$e(k_1)$"
        show(axes, vae.decode_latent(partial_sums[:, :, d])[0], title, f"left over: {left_over:.0%}")


def decode(model, c, columns):
    """One decode on axes (2, T_draft + T_revise), one column per update: what it sees, and what it leaves."""
    steps = []

    def recorded(model, state, positions, uniforms, cond, how):
        after = drr.update(model, state, positions, uniforms, cond, how)
        steps.append((state, positions, after))
        return after

    drr.sample(model, torch.tensor([[980]]), 0, [0], c, update=recorded)
    # The decoder needs all stacks, and in a draft none is drawn twice: decode the finished one.
    draft = steps[c.t_draft - 1][2].codes
    for t, (before, positions, after) in enumerate(steps):
        columns[0, t].set_title(f"update {t % c.t_draft + 1}", fontsize=10)
        seen = before._replace(hidden=before.hidden.scatter(1, positions, True))
        for axes, state, width in ((columns[0, t], seen, 1.4), (columns[1, t], after, 0.5)):
            image = model.decode(draft if t < c.t_draft else state.codes)
            grey = F.interpolate(state.hidden.view(1, 1, model.side, model.side).float(), model.size) > 0
            show(axes, torch.where(grey, 0.2, image)[0], axes.get_title())
            outline(axes, positions[0], model.side, width)


@torch.inference_mode()
def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", metavar="PNG", default=HERE / "docs/method.png", help="(docs/method.png)")
    args = parser.parse_args()
    vae, transformer, info = drr.load_checkpoint(BUNDLED)
    model = drr.TorchModel(vae, transformer, CPU, torch.float32)
    c = sampling_values(info, ["t_draft=4", "t_revise=2", "rounds=1"], model.positions)
    figure = plt.figure(figsize=(10, 6.9), dpi=130)
    widths = [1, 2.5] + [1] * model.depth
    upper = figure.add_gridspec(1, 2 + model.depth, width_ratios=widths, left=0.01, right=0.99, top=0.94,
                                bottom=0.58, wspace=0.1)
    photograph(vae, [figure.add_subplot(cell) for cell in upper])
    lower = figure.add_gridspec(2, 7, width_ratios=[1, 1, 1, 1, 0.1, 1, 1], left=0.11, right=0.99, top=0.43,
                                bottom=0.01, wspace=0.08, hspace=0.06)
    columns = [0, 1, 2, 3, 5, 6]                # a gap between the draft and the revision
    axes = [[figure.add_subplot(lower[row, column]) for column in columns] for row in range(2)]
    decode(model, c, np.array(axes))
    for x, y, size, colour, text in TEXTS:
        figure.text(x, y, text, fontsize=size, color=colour)
    with drr.replacing(args.out) as temporary:
        figure.savefig(temporary, format="png")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
