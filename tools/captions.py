"""Captions for pictures that only have classes, of their titles and colours; and whether samples obey.

    python -m tools.captions --data DIR                 # KEY.txt beside each picture of DIR/train and DIR/val
    python -m tools.captions --obeyed CHECKPOINT        # colours of samples whose text names a colour

A picture gets several captions, one a line: its class, in two wordings; its family ("a terrier"); and its
class with the colours of most of its pixels. So texts become a real condition without a data set of captions,
but these know 1,000 nouns, ten colours and few kinds of sentences: no more can be learned from them.
"""
import collections
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import drr
from drr import UserError
from support import data, models, text
from support.common import (add_device_arguments, crop, open_image, pick_device, run, sampling_values,
                            to_pixels)

COLOURS = "black white grey red orange brown yellow green blue purple".split()
MOSTLY, ALSO = 0.4, 0.2          # the share of all pixels of a colour that is named alone, and beside another
WORDINGS = "a photo of", "a picture of", "an image of"


def colour_shares(pixels):
    """The share of the pixels (H, W, 3), uint8, that has each of the COLOURS, as an array."""
    h, s, v = np.moveaxis(np.asarray(Image.fromarray(pixels).convert("HSV"), np.float32), -1, 0)
    h, s, v = h * 360 / 255, s / 255, v / 255
    around = [COLOURS.index(name) for name in "red orange yellow green blue purple red".split()]
    named = np.array(around)[np.searchsorted([15, 45, 70, 170, 260, 340], h, side="right")]
    named = np.where((named == COLOURS.index("orange")) & (v < 0.65), COLOURS.index("brown"), named)
    named = np.where(s < 0.18, COLOURS.index("grey"), named)
    named = np.where((s < 0.18) & (v > 0.8), COLOURS.index("white"), named)
    named = np.where(v < 0.2, COLOURS.index("black"), named)
    return np.bincount(named.ravel(), minlength=len(COLOURS)) / named.size


def colour_words(pixels):
    """"mostly blue", "blue and green", or None where no colour stands out."""
    shares = colour_shares(pixels)
    first, second = shares.argsort()[::-1][:2]
    if shares[first] >= MOSTLY:
        return f"mostly {COLOURS[first]}"
    return f"{COLOURS[first]} and {COLOURS[second]}" if shares[second] >= ALSO else None


def families(titles):
    """{title: what it is}: the last word that at least three titles share, such as "terrier", and that is no
    title itself (a sea lion is no lion)."""
    heads = {title: title.rpartition(" ")[2] for title in titles if " " in title}
    count = collections.Counter(heads.values())
    return {title: head for title, head in heads.items() if count[head] >= 3 and head not in titles}


def with_article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def captions(title, family, colours, number):
    """The captions of picture `number`: its class, in two wordings, its family's, and with its colours."""
    wording = WORDINGS[number % len(WORDINGS)]
    lines = [title, f"{wording} {with_article(title)}"]
    if family:
        lines.append(f"{wording} {with_article(family)}")
    if colours:
        lines.append(f"{with_article(colours)} picture of {with_article(title)}")
    return lines


def write_captions(directory, split, force):
    """KEY.txt beside each picture of a split; how many. UserError, before any is written, if one exists."""
    files, labels, classes = data.find_images(directory, split)
    if classes == [""] or files.table is not None:
        raise UserError(f"{directory} holds no folders of classes; captions are made of their names.")
    titles = [title.replace("_", " ").lower() for title in data.class_titles(directory, classes)]
    family = families(titles)
    there = (path for path in (files[i].with_suffix(".txt") for i in range(len(files))) if path.exists())
    if not force and (path := next(there, None)):
        raise UserError(f"{path} is there already; add --force to replace it and all the others.")

    def write(i):
        try:
            colours = colour_words(crop(open_image(files[i]), 32).permute(1, 2, 0).numpy())
        except UserError:
            return                                           # of no use for training either
        title = titles[labels[i]]
        lines = captions(title, family.get(title), colours, i)
        files[i].with_suffix(".txt").write_text("\n".join(lines) + "\n", "utf-8")

    with ThreadPoolExecutor() as pool:
        collections.deque(tqdm(pool.map(write, range(len(files))), split, len(files), unit="image"), maxlen=0)
    return len(files)


def obeyed(args):
    """Prints, for each colour, the share of the samples of "a mostly COLOUR picture of a TITLE" in which more
    pixels are of that colour than of any other, and that of the samples of "a photo of a TITLE"."""
    device, dtype = pick_device(args)
    vae, transformer, info = models.load_checkpoint(args.obeyed, dtype)
    model = drr.TorchModel(vae, transformer, device, dtype)
    c = sampling_values(info, args.overrides, model.positions)
    titles = [title.strip() for title in args.titles.split(",")]
    if not all(titles) or args.number < 1:
        raise UserError(f"--titles is {args.titles!r}, --number {args.number}; expected names with a comma "
                        "between them, and 1 or more.")
    print(f"{args.number} samples a colour of {args.obeyed}, seed 0, titles {', '.join(titles)}")

    def largest(texts, what):
        found = []
        cond = text.prompts(info, texts).to(device)
        for i in tqdm(range(0, len(texts), c.batch_size), what, unit="batch"):
            rows = cond[i:i + c.batch_size]
            codes = drr.sample(model, rows, 0, range(i, i + len(rows)), c,
                               decode=models.kind(info.transformer).decode)
            found += [colour_shares(pixels).argmax() for pixels in to_pixels(model.decode(codes))]
        return np.array(found)

    chosen = [titles[i % len(titles)] for i in range(args.number)]
    plain = largest([f"a photo of {with_article(title)}" for title in chosen], "no colour")
    print(f"{'colour':10}{'named':>8}{'not named':>12}")
    for k, colour in enumerate(COLOURS):
        named = largest([f"a mostly {colour} picture of {with_article(title)}" for title in chosen], colour)
        print(f"{colour:10}{(named == k).mean():8.2f}{(plain == k).mean():12.2f}")


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="DIR", help="folders of classes in DIR/train and DIR/val")
    add("--force", action="store_true", help="replace KEY.txt that are there")
    add("--obeyed", metavar="CHECKPOINT", help="measure a model of texts instead")
    add("--titles", default="goldfish,volcano,tabby,school bus,lemon", metavar="A,B", help="whose pictures")
    add("--number", type=int, default=60, metavar="N", help="samples a colour (60)")
    add("overrides", nargs="*", metavar="key=value", help="sampling values")
    add_device_arguments(parser)
    args = parser.parse_intermixed_args()
    if bool(args.data) == bool(args.obeyed):
        raise UserError("Give the folder of pictures to be captioned, or --obeyed CHECKPOINT.")
    if args.obeyed:
        return obeyed(args)
    for split in ("train", "val"):
        if data.split_of(args.data, split)[0] is not None:
            print(f"{write_captions(args.data, split, args.force)} pictures of {split}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
