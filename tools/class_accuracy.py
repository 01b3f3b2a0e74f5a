"""A measuring instrument, no part of the method: how often does a classifier recognise what was drawn?

    python tools/class_accuracy.py train --data DIR --net runs/net.safetensors       # a small ResNet, minutes on a CPU
    python tools/class_accuracy.py score --data DIR --net runs/net.safetensors --per-class 2 revise_guidance=2

It is trained on the classes with at least 100 images, on the same photographs as the generator, and judges the
validation images (its ceiling), their reconstructions, and samples. Chance is 1 / number of classes.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import drr
from common import HERE, add_device_arguments, load_config, pick_device, run


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False))

    def forward(self, x):
        return x + self.body(x)


def network(classes, width=64):
    """images (B, 3, 32, 32) in [-1, 1] -> logits (B, classes)."""
    layers, c = [nn.Conv2d(3, width, 3, 2, 1)], width
    for _ in range(2):
        layers += [Residual(c), nn.Conv2d(c, 2 * c, 3, 2, 1)]
        c *= 2
    return nn.Sequential(*layers, Residual(c), nn.BatchNorm2d(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(c, classes))


def rates(net, images, labels):
    """(top-1, top-5) accuracy of images (B, 3, 32, 32) in [-1, 1]."""
    with torch.no_grad():
        ranks = torch.cat([net(x.clamp(-1, 1)).topk(5).indices for x in images.split(256)])
    hit = ranks == labels[:, None]
    return hit[:, 0].float().mean().item(), hit.any(1).float().mean().item()


def train(args, device, dtype):
    config = load_config("smoke", ["data.class_views=1", "data.balance=0"])
    files, labels, classes = data.find_images(args.data)
    covered = np.flatnonzero(np.bincount(labels) >= 100)
    keep = [i for i in range(len(files)) if labels[i] in set(covered.tolist())]
    new = {int(k): i for i, k in enumerate(covered)}
    views = data.Views([files[i] for i in keep], np.array([new[int(labels[i])] for i in keep]), 32, 128, config.data)
    views.load(device)
    net = network(len(covered)).to(device)
    steps = args.epochs * len(views) // views.batch_size
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=steps)
    bar = tqdm(views.batches(0, steps), total=steps)
    for step, (images, labels, _) in enumerate(bar):
        x = data.to_float(images, device)
        dy, dx = np.random.default_rng([step, 5]).integers(-3, 4, 2)             # the whole batch shifts by a few pixels
        x = torch.roll(x, (int(dy), int(dx)), (2, 3))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(net(x), labels.to(device), label_smoothing=0.1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    drr.save_model(args.net, net.state_dict(), {"classes": [classes[k] for k in covered]})


def score(args, device, dtype):
    tensors, meta = drr.read_model(args.net)
    net = network(len(meta["classes"])).to(device)
    drr.fill(net, tensors, args.net)
    net.eval()
    vae, transformer, info = drr.load_checkpoint(args.checkpoint)
    for override in args.overrides:
        key, _, value = override.partition("=")
        if not hasattr(info.sample, key):
            raise drr.UserError(f"There is no sample.{key}; there is {', '.join(vars(info.sample))}.")
        setattr(info.sample, key, type(getattr(info.sample, key))(float(value)))
    model = drr.TorchModel(vae, transformer, device, dtype)
    if args.reference:
        images, labels = data.validation_images(args.data, vae.size, 2000, meta["classes"])
        x, labels = data.to_float(images, device), labels.to(device)
        recon = torch.cat([model.decode(model.encode(b)) for b in x.split(100)])
        for name, batch in (("validation images", x), ("their reconstructions", recon)):
            top1, top5 = rates(net, batch, labels)
            print(f"{name}: top-1 {top1:.3f} top-5 {top5:.3f} of {len(batch)}")
    index = [info.classes.index(c) for c in meta["classes"]] * args.per_class
    drawn = []
    for first in tqdm(range(0, len(index), 64), leave=False):
        part = index[first:first + 64]
        noise = drr.draw_noise(args.seed, range(first, first + len(part)), 1 + info.sample.rounds, transformer.positions,
                               transformer.depth)
        *_, last = drr.draft_and_revise(model, torch.tensor(part, device=device)[:, None], noise, info.sample)
        drawn.append(model.decode(last.codes))
    labels = torch.arange(len(meta["classes"]), device=device).repeat(args.per_class)
    top1, top5 = rates(net, torch.cat(drawn), labels)
    error = (top1 * (1 - top1) / len(labels)) ** 0.5
    print(json.dumps({k: v for k, v in vars(info.sample).items() if k != "batch_size"}))
    print(f"samples: top-1 {top1:.3f} (+-{error:.3f}) top-5 {top5:.3f} of {len(labels)}; "
          f"chance {1 / len(meta['classes']):.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "score"])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of the section sample")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--net", required=True, metavar="FILE")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--checkpoint", default=str(HERE / "checkpoints" / "tiny-imagenet-32"), metavar="DIR")
    parser.add_argument("--per-class", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", action="store_true", help="also judge validation images and reconstructions")
    add_device_arguments(parser)
    args = parser.parse_intermixed_args()
    device, dtype = pick_device(args)
    {"train": train, "score": score}[args.action](args, device, dtype)


if __name__ == "__main__":
    run(main)
