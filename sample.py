"""Draws pictures with Draft-and-Revise.

    python sample.py --class 980                                              # 16 samples of it in one picture
    python sample.py --class volcano --strip --num 4                          # from the first draft to the last revision
    python sample.py --class 980 order=sobol draft_growing=true               # any value of config.yaml's section `sample`
    python sample.py --image IN.png --region 8,8,24,24 --class 980            # repaint a region as another class
    python sample.py --reconstruct IN.png                                     # what the RQ-VAE keeps, by depth
"""
import argparse
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support import drr
from support import fast
from support.common import (BUNDLED, PRECISIONS, add_device_arguments, check_sampling, crop, crop_box, grid, open_image,
                            pick_classes, pick_device, run, sampling_values, save_picture, to_float, to_pixels)
from drr import UserError


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--class", dest="classes", metavar="C", help="index, folder name (wnid) or name of a class; a comma-separated list "
        "of them, gone through in turn; or `none` for the null class")
    add("--num", type=int, metavar="N", help="number of pictures in all (16, or as many as classes)")
    add("--seed", type=int, default=0, help="picture i of a seed is the same in any batch (0)")
    add("--out", metavar="PNG", help="the grid of all pictures (samples/CLASS_seedSEED.png)")
    add("--out-dir", metavar="DIR", help="also one PNG a picture, 000.png, 001.png, ...")
    add("--strip", action="store_true", help="a row a picture: states of the draft, then each revision")
    group = parser.add_argument_group("decoding (defaults: the checkpoint's)")
    group.add_argument("--t-draft", type=int, metavar="T", help="updates of the draft")
    group.add_argument("--t-revise", type=int, metavar="T", help="updates of each revision")
    group.add_argument("--m", type=int, metavar="M", dest="rounds", help="revisions")
    group.add_argument("--temperature", type=float, dest="revise_temperature", metavar="X", help="of the revisions")
    group.add_argument("--guidance", type=float, dest="revise_guidance", metavar="S", help="of the revisions; 1 is none")
    group.add_argument("--draft-temperature", type=float, metavar="X")
    group.add_argument("--draft-guidance", type=float, metavar="S")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely codes; 0: all")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest codes that hold this probability")
    group = parser.add_argument_group("pictures that come in (the central square is what the model sees)")
    group.add_argument("--image", metavar="PNG", help="repaint a part of this picture")
    group.add_argument("--region", metavar="X0,Y0,X1,Y1", help="the part to repaint, in the picture's own pixels")
    group.add_argument("--mask", metavar="PNG", help="the part to repaint: white in a picture of the same size")
    group.add_argument("--paste", action="store_true", help="put the original pixels back outside the part")
    group.add_argument("--reconstruct", metavar="PNG", help="show this picture beside its decodes from depth 1 .. D")
    add("--checkpoint", metavar="DIR", help="a folder with vae.safetensors and transformer.safetensors (the bundled one)")
    add("--backend", default="torch", choices=["torch", "onnx", "trt"],
        help="onnx, trt: the graphs or engines that export.py wrote, and no PyTorch weights")
    add("--exported", metavar="DIR", default="exported", help="where export.py wrote them (exported)")
    add("overrides", nargs="*", metavar="key=value", help="sampling values in the place of the checkpoint's")
    add("--compile", action="store_true", help="torch.compile, and CUDA graphs on a GPU: slow for a minute, faster from then on")
    add_device_arguments(parser, fp8=True)
    args = parser.parse_intermixed_args()
    args.given = {key for key, value in vars(args).items() if value not in (parser.get_default(key), [])}
    return args


# === From the command line to class indices, settings and regions ===================================================
def load_model(args, device, dtype):
    """What --checkpoint, --backend and --exported name: a model as drr.TorchModel is one, the
    checkpoint's info, and the device."""
    folder = BUNDLED if args.checkpoint is None else args.checkpoint
    if args.backend == "torch":
        if "exported" in args.given:
            raise UserError("--exported is for --backend onnx or trt; name one, or leave it out.")
        vae, transformer, info = drr.load_checkpoint(folder)
        return fast.torch_model(vae, transformer, device, dtype), info, device
    if args.compile or args.precision == "fp8":
        raise UserError(f"--compile and --precision fp8 are for --backend torch; leave them out with {args.backend}.")
    from support import backends
    if device.type == "mps":
        if args.device == "mps":
            raise UserError(f"--backend {args.backend} does not run on mps; use --device cpu.")
        device = torch.device("cpu")
    model, info = backends.load(args.backend, args.exported, device)
    backends.leave_cores_free(device)
    if args.checkpoint:                                           # named beside an export, it must be what was exported
        vae, transformer, _ = drr.load_checkpoint(folder)
        if model.checkpoint != {"vae": drr.fingerprint(vae), "transformer": drr.fingerprint(transformer)}:
            raise UserError(f"{args.exported} was exported from another checkpoint than {folder}; leave --checkpoint out, or "
                            f"export it with python export.py --checkpoint {folder}.")
    if args.precision not in ("auto", model.precision):
        raise UserError(f"{args.exported} was exported in {model.precision}; leave --precision out, or export with "
                        f"--precision {args.precision}.")
    return model, info, device


def settings(args, info, positions):
    """The checkpoint's section `sample` with the command line's values in it, checked."""
    names = {"rounds": "--m", "revise_temperature": "--temperature", "revise_guidance": "--guidance",
             **{key: "--" + key.replace("_", "-") for key in ("t_draft", "t_revise", "draft_temperature", "draft_guidance", "top_k",
                                                              "top_p")}}
    given = {key: getattr(args, key) for key in names if getattr(args, key) is not None}
    twice = [key for key in given if any(text.startswith(f"{key}=") for text in args.overrides)]
    if twice:
        raise UserError(f"{names[twice[0]]} and {twice[0]}= are the same value; give one of them.")
    c = sampling_values(info.sample, args.overrides, positions)
    check_sampling(given, positions, names)
    return SimpleNamespace(**{**vars(c), **given})


def repaint_mask(args, picture, size):
    """--region or --mask -> bool (size, size) in the model's pixels, True = repaint."""
    width, height = picture.size
    if args.region:
        try:
            x0, y0, x1, y1 = (int(v) for v in args.region.split(","))
        except ValueError:
            raise UserError(f"--region is {args.region!r}; expected four whole numbers x0,y0,x1,y1.") from None
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(f"--region {args.region} is empty or reaches outside the picture, which is {width} x {height}; "
                            "expected 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height.")
        mask = np.zeros((height, width), bool)
        mask[y0:y1, x0:x1] = True
    else:
        mask_picture = open_image(args.mask, "black").convert("L")
        if mask_picture.size != picture.size:
            raise UserError(f"The mask is {mask_picture.width} x {mask_picture.height} and the picture {width} x {height}; "
                            "they must have the same size.")
        mask = np.array(mask_picture) >= 128
    left, top, side = crop_box(width, height, 0, 0)
    rows, columns = np.nonzero(mask)
    rows, columns = rows - top, columns - left                    # pixel corners, relative to the square
    seen = (rows > -1) & (rows < side) & (columns > -1) & (columns < side)
    result = np.zeros((size, size), bool)
    if side >= size:                                              # every pixel falls into one of the model's
        result[(rows[seen] * size / side).clip(0).astype(int), (columns[seen] * size / side).clip(0).astype(int)] = True
    else:                                                         # the picture is enlarged: so is its mask
        square = np.array(Image.fromarray(mask).crop((math.floor(left), math.floor(top), math.floor(left) + side,
                                                      math.floor(top) + side)))
        result = np.array(Image.fromarray(square).resize((size, size), Image.NEAREST))
    if not result.any():
        raise UserError("Nothing is left to repaint: the region is empty or outside the central square of the picture, "
                        "which is all that the model sees.")
    return torch.from_numpy(result)


def check_writable(picture, inputs=()):
    """Fails before the work rather than after it. `inputs` must not be replaced."""
    if picture.suffix.lower() != ".png" or picture.is_dir():
        raise UserError(f"{picture} cannot be the picture; expected the name of a file that ends in .png.")
    if picture.resolve() in (Path(path).resolve() for path in filter(None, inputs)):
        raise UserError(f"{picture} would be replaced by the result; give --out another name.")
    picture.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=picture.parent).close()


# === Pictures =======================================================================================================
def hide(images, hidden):
    """Paints the hidden stacks of images (B, 3, S, S) grey."""
    side = math.isqrt(hidden.shape[1])
    grey = hidden.view(-1, 1, side, side).float()
    return torch.where(torch.nn.functional.interpolate(grey, images.shape[-1]) > 0, 0.0, images)


def generate(model, cond, indices, seed, c, bar, codes=None, region=None, keep=()):
    """Pictures (B, 3, S, S) number `indices` of a seed for the conditions cond (B, L), in-painted where codes (B, N, D)
    and region (N,) are given; and as pictures the updates of the draft whose numbers are in `keep`, and then, if there are
    any, the end of each revision."""
    noise = drr.draw_noise(seed, indices, 1 + c.rounds, model.positions, model.depth)
    hidden, states = [], []
    ends = {}                                                # of the draft, and of each revision
    for number, state in enumerate(drr.draft_and_revise(model, cond, noise, c, codes, region)):
        bar.update()
        bar.set_postfix_str(f"{state.phase} {state.round or ''}", refresh=False)
        if number in keep and state.phase == "draft":
            hidden.append(state.hidden)
        ends[state.round] = state.codes
    images = model.decode(state.codes)
    if keep:
        draft, *revisions = ends.values()    # the decoder needs all stacks, and those drawn do not change in a draft
        states = [*(hide(model.decode(draft), h) for h in hidden), *map(model.decode, revisions)]
    return images, states


def main():
    args = parse_arguments()
    device, dtype = pick_device(args)
    if args.reconstruct:
        if args.given - {"reconstruct", "out", "checkpoint", "device"}:
            raise UserError("--reconstruct goes with --out, --checkpoint and --device only; leave the other options out.")
        vae, _ = drr.load_vae(Path(BUNDLED if args.checkpoint is None else args.checkpoint) / "vae.safetensors")
        original = to_float(crop(open_image(args.reconstruct), vae.size)[None], device)
        out = Path(args.out or "samples/reconstruction.png")
        check_writable(out, [args.reconstruct])
        images = drr.reconstructions(vae.to(device), original)
        save_picture(grid(to_pixels(images), len(images), max(1, 256 // vae.size)), out)
        return print(f"original, then depths 1 to {len(images) - 1} -> {out}")

    if bool(args.image) != bool(args.region or args.mask) or args.region and args.mask or args.paste and not args.image:
        raise UserError("Repainting needs --image with either --region or --mask; --paste goes with them.")
    model, info, device = load_model(args, device, dtype)
    classes = pick_classes(args.classes, info)
    c = settings(args, info, model.positions)
    if args.compile:
        fast.speed_up(model, c)
    if args.backend != "torch":                                   # the largest power of two that the graphs take
        c.batch_size = min(c.batch_size, 2 ** int(math.log2(model.max_batch)))
    num = args.num if args.num is not None else max(16, len(classes))
    if not len(classes) <= num <= 100_000:
        raise UserError(f"--num is {num}; expected a number from {len(classes)} (one for each class) to 100000.")
    if not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed is {args.seed}; expected a number from 0 to {2 ** 63 - 1}.")
    original = mask = None
    if args.image:
        picture = open_image(args.image)
        mask = repaint_mask(args, picture, model.size)
        original = to_float(crop(picture, model.size)[None], device)
    name = (args.classes or "sample").replace(",", "-").replace(" ", "_").replace("/", "_")[:40]
    out = Path(args.out or f"samples/{name}_seed{args.seed}.png")
    single = [Path(args.out_dir) / f"{i:03d}.png" for i in range(num)] if args.out_dir is not None else []
    check_writable(out, [args.image, args.mask, *single])
    for path in single[:1]:
        check_writable(path)
    if {path.resolve() for path in single} & {Path(path).resolve() for path in (args.image, args.mask) if path}:
        raise UserError(f"A picture in --out-dir {args.out_dir} would replace --image or --mask; give it another folder.")

    # --- codes, in batches; then pixels ------------------------------------------------------------------------------
    codes = region = None
    if args.image:                                            # a stack is drawn anew if any of its pixels is
        f = model.size // model.side
        region = mask.view(model.side, f, model.side, f).any(3).any(1).flatten().to(device)
        codes = model.encode(original)
        c.t_draft, c.t_revise = min(c.t_draft, int(region.sum())), min(c.t_revise, int(region.sum()))
    labels = [model.null if k is None else k for k in (classes[i % len(classes)] for i in range(num))]
    keep = sorted({round(t) for t in np.linspace(0, c.t_draft - 1, 6)}) if args.strip else ()
    columns = len(keep) + c.rounds                            # of a strip
    pixels, states, started = [], [], time.time()
    doubtful = math.ceil(c.revise_share * (model.positions if region is None else int(region.sum())))
    updates = (c.t_draft + c.rounds * min(c.t_revise, doubtful)) * math.ceil(num / c.batch_size)
    with tqdm(total=updates, desc="sampling", unit="update") as bar:
        for first in range(0, num, c.batch_size):
            part = range(first, min(first + c.batch_size, num))
            # Batches are powers of two, the last one with spare pictures that are thrown away: at these sizes a CPU's products
            # gave the same bits for a picture in any batch, at 3 bf16's did not. Other backends may differ. What is compiled
            # is compiled for one size.
            size = min(num, c.batch_size) if args.compile else len(part)
            padded = range(first, first + 2 ** math.ceil(math.log2(size)))
            cond = torch.tensor([[labels[i % num]] for i in padded], device=device)
            known = None if codes is None else codes.expand(len(padded), -1, -1)
            images, batch_states = generate(model, cond, padded, args.seed, c, bar, known, region, keep)
            if args.paste:
                images, *batch_states = (torch.where(mask.to(device), x, original) for x in (images, *batch_states))
            pixels.extend(to_pixels(images[:len(part)]))
            states.extend(to_pixels(torch.cat(batch_states)).reshape(columns, len(padded), model.size, model.size, 3)
                          .swapaxes(0, 1)[:len(part)] if keep else ())
            for i in part if single else ():
                save_picture(Image.fromarray(pixels[i]), single[i])
    seconds = time.time() - started
    precision = model.precision if args.backend != "torch" else next(k for k, v in PRECISIONS.items() if v == dtype)

    # --- the grid ----------------------------------------------------------------------------------------------------
    scale, shown = max(1, 128 // model.size), min(num, 400)
    if args.strip:
        picture = grid(np.concatenate(states[:shown]), columns, scale)
    elif args.image:
        first = to_pixels(torch.cat([original, torch.where(mask.to(device), 0.0, original)]))
        picture = grid([*first, *pixels[:shown]], min(shown + 2, 6), scale)
    else:
        picture = grid(pixels[:shown], len(classes) if 1 < len(classes) <= 16 else math.ceil(math.sqrt(shown)), scale)
    save_picture(picture, out)
    named = ", ".join("no class" if k is None else f"{info.titles[k]} ({k})" for k in classes[:8])
    print(f"{named}{', ...' if len(classes) > 8 else ''}: {num} images in {seconds:.1f} s, {seconds / num:.2f} s per image "
          f"({args.backend}, {device}, {precision}) -> {out}"
          + (f" (the first {shown})" if shown < num else "") + (f" and {args.out_dir}/" if args.out_dir else ""))


if __name__ == "__main__":
    run(main)
