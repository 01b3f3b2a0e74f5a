"""Draws pictures with Draft-and-Revise.

    python sample.py --class 980                                     # 16 samples of it in one picture
    python sample.py --class volcano --strip --num 4                 # from the draft to the last revision
    python sample.py --checkpoint DIR --text "a volcano at night"    # a model that was trained on texts
    python sample.py --class 980 --m 4 top_k=100                     # any value of config.yaml's `sample`
    python sample.py --image IN.png --region 8,8,24,24 --class 980   # repaint a region as another class
    python sample.py --reconstruct IN.png                            # what the RQ-VAE keeps, by depth
"""
import itertools
import math
import re
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import drr
from drr import UserError
from support import models
from support.common import (BUNDLED, add_device_arguments, check_writable, crop, grid, open_image,
                            pick_conditions, pick_device, precision_name, reconstructions, resize_mask, run,
                            sampling_values, save_picture, to_float, to_pixels)

# A flag is another way to write key=value.
FLAGS = [("--t-draft", "t_draft", "updates of the draft"),
         ("--t-revise", "t_revise", "updates of each revision"),
         ("--m", "rounds", "revisions"),
         ("--temperature", "revise_temperature", "of the revisions"),
         ("--guidance", "revise_guidance", "of the revisions; 1 is none"),
         ("--draft-temperature", "draft_temperature", "of the draft"),
         ("--draft-guidance", "draft_guidance", "of the draft; 1 is none"),
         ("--top-k", "top_k", "draw from the K most likely codes; 0: all"),
         ("--top-p", "top_p", "draw from the fewest codes that hold this probability")]


def parse_arguments():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--class", dest="classes", metavar="C", help="index, folder name (wnid) or name of a class, or "
        "`none` for the null class; several, separated by commas, are used in turn")
    add("--text", action="append", default=[], metavar="T", help="what the picture shows; may be repeated")
    add("--text-file", metavar="FILE", help="texts, one a line")
    add("--best-of", type=int, default=1, metavar="N", help="draw each N times and keep the best, by --clip")
    add("--clip", metavar="DIR", help="the folder of a CLIP model, which compares pictures and texts")
    add("--num", type=int, metavar="N", help="number of pictures in all (16, or as many as classes or texts)")
    add("--seed", type=int, default=0, help="picture i of a seed is the same in any batch (0)")
    add("--out", metavar="PNG", help="the grid of all pictures (samples/CLASS_seedSEED.png)")
    add("--out-dir", metavar="DIR", help="also one PNG per picture: 000.png, 001.png, ...")
    add("--strip", action="store_true", help="one row per picture: states of the draft, then each revision")
    add("--checkpoint", metavar="DIR", help="vae.safetensors and transformer.safetensors (the bundled ones)")
    add("--backend", default="torch", choices=["torch", "onnx", "trt"],
        help="onnx, trt: the graphs or engines that export.py wrote, and no PyTorch weights")
    add("--exported", metavar="DIR", default="exported", help="where export.py wrote them (exported)")
    add("--compile", action="store_true", help="torch.compile, CUDA graphs on a GPU; slow at first")
    add_device_arguments(parser)
    add("overrides", nargs="*", metavar="key=value", help="sampling values that replace the checkpoint's")
    add = parser.add_argument_group("decoding, also as key=value (defaults: the checkpoint's)").add_argument
    for flag, key, text in FLAGS:
        write = (key + "={}").format
        add(flag, dest="flags", action="append", default=[], type=write, metavar=key, help=text)
    add = parser.add_argument_group("pictures that come in (the model sees the central square)").add_argument
    add("--image", metavar="PNG", help="repaint a part of this picture")
    add("--region", metavar="X0,Y0,X1,Y1", help="the part to repaint, in the picture's own pixels")
    add("--mask", metavar="PNG", help="the part to repaint: white in a picture of the same size")
    add("--paste", action="store_true", help="put the original pixels back outside the part")
    add("--reconstruct", metavar="PNG", help="show this picture beside its decodes from depth 1 .. D")
    args = parser.parse_intermixed_args()
    args.given = {key for key, value in vars(args).items() if value not in (parser.get_default(key), [])}
    return args


# === From the command line to a model, a mask and the files to write =======================================
def load_model(args, device, dtype):
    """The model (drr.TorchModel, or an exported one in its place), the checkpoint's info, and the device."""
    if args.backend == "torch":
        if "exported" in args.given:
            raise UserError("--exported is for --backend onnx or trt; name one, or leave it out.")
        folder = BUNDLED if args.checkpoint is None else args.checkpoint
        vae, transformer, info = models.load_checkpoint(folder, dtype)
        return drr.TorchModel(vae, transformer, device, dtype), info, device
    from support import backends
    if args.compile or args.device == "mps":
        raise UserError(f"--backend {args.backend} takes neither --compile nor --device mps; leave them out.")
    model, info = backends.load(args.backend, args.exported, torch.device(device.type.replace("mps", "cpu")))
    if args.checkpoint:                                      # it must be what was exported
        vae, transformer, _ = models.load_checkpoint(args.checkpoint)
        if model.checkpoint != {"vae": drr.fingerprint(vae), "transformer": drr.fingerprint(transformer)}:
            raise UserError(f"{args.exported} was exported from another checkpoint than {args.checkpoint}; "
                            f"leave --checkpoint out, or run export.py --checkpoint {args.checkpoint}.")
    if args.precision not in ("auto", model.precision):
        raise UserError(f"{args.exported} was exported in {model.precision}; leave --precision out, or "
                        f"export with --precision {args.precision}.")
    return model, info, model.device


def repaint_mask(args, picture):
    """--region or --mask -> bool (H, W) in the picture's own pixels, True = repaint."""
    width, height = picture.size
    if args.mask:
        mask = open_image(args.mask, "black").convert("L")
        if mask.size != picture.size:
            raise UserError(f"The mask is {mask.width} x {mask.height} and the picture {width} x {height}; "
                            "they must have the same size.")
        return np.array(mask) >= 128
    try:
        x0, y0, x1, y1 = (int(v) for v in args.region.split(","))
    except ValueError:
        raise UserError(f"--region is {args.region!r}; expected four whole numbers x0,y0,x1,y1.") from None
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(f"--region {args.region} is empty or leaves the picture of {width} x {height}; "
                        "expected 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height.")
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def output_paths(args, num):
    """The grid's path and those of the single pictures. Fails before the work rather than after it."""
    name = re.sub(r"[^\w-]+", "_", (args.classes or " ".join(args.text) or "sample").replace(",", "-"))[:40]
    out = Path(args.out or f"samples/{name}_seed{args.seed}.png")
    digits = max(3, len(str(num - 1)))
    single = [Path(args.out_dir) / f"{i:0{digits}d}.png" for i in range(num)] if args.out_dir else []
    taken = {Path(path).resolve() for path in (args.image, args.mask, args.reconstruct) if path}
    for path in (*single, out):
        if path.resolve() in taken:
            raise UserError(f"{path} would be replaced; give --out or --out-dir another name.")
        taken.add(path.resolve())
    for path in (out, *single[:1]):
        check_writable(path)
    return out, single


# === Pictures: noise -> codes -> pixels =====================================================================
def hide(images, hidden):
    """Paints the hidden stacks of images (B, 3, S, S) grey."""
    side = math.isqrt(hidden.shape[1])
    grey = hidden.view(-1, 1, side, side).float()
    return torch.where(torch.nn.functional.interpolate(grey, images.shape[-1]) > 0, 0.0, images)


def generate(model, decode, cond, images, seed, c, update, bar, codes=None, region=None, keep=()):
    """The pictures number `images` of a seed, for the conditions cond (B, L): (B, 3, S, S).

    codes (B, N, D) and region (N,): in-painting. keep: the updates of the draft to show; then the second
    result is a list of pictures (B, 3, S, S): the draft after each of them, and the end of each revision."""
    noise = drr.draw_noise(seed, images, 1 + c.rounds, model.positions, model.depth)
    hidden = []
    ends = {}                                                # round: codes at its end; 0 is the draft
    for number, state in enumerate(decode(model, cond, noise, c, codes, region, update)):
        bar.update()
        bar.set_postfix_str(f"{state.phase} {state.round or ''}", refresh=False)
        if number in keep and state.phase == "draft":
            hidden.append(state.hidden)
        ends[state.round] = state.codes
    if not keep:
        return model.decode(state.codes), []
    # A draft does not change what it has drawn: its end, with the hidden part grey, is any earlier state.
    draft, *revisions = (model.decode(codes) for codes in ends.values())
    return (revisions or [draft])[-1], [*(hide(draft, h) for h in hidden), *revisions]


def reconstruct(args, device):
    """--reconstruct: a picture beside its decodes from depth 1 .. D, for which no transformer is needed."""
    if args.given - {"reconstruct", "out", "checkpoint", "device"}:
        raise UserError("--reconstruct takes --out, --checkpoint and --device only; leave other options out.")
    vae, _ = drr.load_vae(Path(BUNDLED if args.checkpoint is None else args.checkpoint) / "vae.safetensors")
    original = to_float(crop(open_image(args.reconstruct), vae.size)[None], device)
    args.out = args.out or "samples/reconstruction.png"
    out, _ = output_paths(args, 1)
    images = reconstructions(vae.to(device), original)
    save_picture(grid(to_pixels(images), len(images), max(1, 256 // vae.size)), out)
    print(f"original, then depths 1 to {len(images) - 1} -> {out}")


def main():
    args = parse_arguments()
    device, dtype = pick_device(args)
    if args.reconstruct:
        return reconstruct(args, device)

    # --- what to draw, checked before any of it is drawn ----------------------------------------------------
    parts = bool(args.region) + bool(args.mask)
    if parts != bool(args.image) or args.paste and not args.image:
        raise UserError("Repainting needs --image with either --region or --mask; --paste goes with them.")
    model, info, device = load_model(args, device, dtype)
    if args.text_file:
        from support.text import text_lines
        args.text += text_lines(args.text_file)
    conditions, names = pick_conditions(args.classes, args.text, info, model.null)             # (C, L)
    c = sampling_values(info, args.flags + args.overrides, model.positions)
    decode = models.kind(info.transformer).decode
    if args.compile and decode is not drr.draft_and_revise:
        raise UserError("--compile is for the updates of Draft-and-Revise; leave it out here.")
    if (conditions == model.null).all():                     # null against null: guidance changes nothing
        c.draft_guidance = c.revise_guidance = 1.0
    if args.backend != "torch":                              # the largest power of two that the graphs take
        c.batch_size = min(c.batch_size, 2 ** int(math.log2(model.max_batch)))
    num = args.num if args.num is not None else max(16, len(names))
    if not len(names) <= num <= 100_000:
        raise UserError(f"--num is {num}; expected {len(names)} (one for each class or text) to 100000.")
    if not 1 <= args.best_of <= 1000 or (args.best_of > 1) != bool(args.clip) or args.clip and not args.text:
        raise UserError("--best-of N, from 2 to 1000, and --clip DIR go together, with --text; give both or "
                        "neither.")
    if not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed is {args.seed}; expected a number from 0 to {2 ** 63 - 1}.")
    original = mask = codes = region = None
    if args.image:
        picture = open_image(args.image)
        mask = resize_mask(repaint_mask(args, picture), model.size).to(device)
        original = to_float(crop(picture, model.size)[None], device)
        codes = model.encode(original)                                             # (1, N, D)
        f = model.size // model.side
        region = mask.view(model.side, f, model.side, f).any(3).any(1).flatten()   # (N,): of any pixel
        c.t_draft = min(c.t_draft, int(region.sum()))
        c.t_revise = min(c.t_revise, int(region.sum()))
    out, single = output_paths(args, num)
    update = drr.update
    if args.compile:
        from support import fast
        update = fast.compiled_update(model)
    clip = None
    if args.clip:
        from support.clip import Clip
        clip = Clip(args.clip, device)

    # --- codes, in batches; then pixels ---------------------------------------------------------------------
    keep = sorted({round(t) for t in np.linspace(0, c.t_draft - 1, 6)}) if args.strip else ()
    shown = min(num, 400)                    # in the grid; no more of them are kept
    tiles, strips, best = shown * [None], shown * [None], np.full(num, -np.inf)
    started = time.time()
    updates = (c.t_draft + c.rounds * c.t_revise) * math.ceil(num / c.batch_size) * args.best_of
    with tqdm(total=updates, desc="sampling", unit="update") as bar:
        for first, attempt in itertools.product(range(0, num, c.batch_size), range(args.best_of)):
            count = min(c.batch_size, num - first)
            # Batches are powers of two, the last with spare pictures that are thrown away: at these sizes a
            # CPU's products gave the same bits for a picture in any batch, at 3 those of bf16 did not. Other
            # backends may differ. What is compiled is compiled for one size.
            size = min(num, c.batch_size) if args.compile else count
            places = range(first, first + 2 ** math.ceil(math.log2(size)))
            cond = conditions[[i % num % len(names) for i in places]].to(device)                   # (B, L)
            known = None if codes is None else codes.expand(len(places), -1, -1)                   # (B, N, D)
            images = [100_000 * attempt + i for i in places]
            drawn, states = generate(model, decode, cond, images, args.seed, c, update, bar, known, region,
                                     keep)
            if args.paste:
                drawn, *states = (torch.where(mask, x, original) for x in (drawn, *states))
            scores = np.zeros(count)
            if clip:
                texts = [args.text[i % len(names)] for i in places[:count]]
                scores = clip.score(drawn[:count], texts).numpy()
            made, rows = to_pixels(drawn), [to_pixels(state) for state in states]
            for k in np.flatnonzero(scores > best[first:first + count]):
                best[first + k] = scores[k]
                if first + k < shown:
                    tiles[first + k] = made[k].copy()          # no view, which would keep its whole batch
                    strips[first + k] = [row[k].copy() for row in rows]
                if single:
                    save_picture(Image.fromarray(made[k]), single[first + k])
    seconds = time.time() - started

    # --- the grid -------------------------------------------------------------------------------------------
    columns = len(names) if 1 < len(names) <= 16 else math.ceil(math.sqrt(shown))
    if args.strip:
        columns = len(keep) + c.rounds
        tiles = list(itertools.chain(*strips))
    elif args.image:
        columns = min(shown + 2, 6)
        tiles = [*to_pixels(torch.cat([original, torch.where(mask, 0.0, original)])), *tiles]
    save_picture(grid(tiles, columns, max(1, 128 // model.size)), out)
    named = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
    precision = precision_name(dtype) if args.backend == "torch" else model.precision
    print(f"{named}: {num} images in {seconds:.1f} s, {seconds / num:.2f} s per image ({args.backend}, "
          f"{device}, {precision}) -> {out}" + f" (the first {shown})" * (shown < num))
    if clip:
        print(f"the best of {args.best_of} each, by {clip.name}: mean score {best.mean():.4f}")


if __name__ == "__main__":
    run(main)
