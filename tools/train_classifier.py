"""Trains the small classifier whose features stand in for Inception's where that cannot be downloaded.

    python -m tools.train_classifier --data DIR --out checkpoints/classifier-32/classifier.pt2 --epochs 3

The file is a program of torch.export: images (B, 3, 32, 32) in [-1, 1] -> features (B, 64) and logits (B,
classes). It learns the classes of DIR/train that have at least 100 pictures, central squares at 32x32. Its
numbers compare models of this project with each other, and with nothing else.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from drr import UserError, replacing
from support import data
from support.common import (add_device_arguments, autocast, check_writable, load_config, pick_device, run,
                            to_float)

SIZE, WIDTHS, FEATURES = 32, (48, 96, 192), 64


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x):
        return F.relu(self.skip(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Classifier(nn.Module):
    """images (B, 3, 32, 32) in [-1, 1] -> features (B, 64), logits (B, classes)."""

    def __init__(self, classes):
        super().__init__()
        a, b, c = WIDTHS
        self.body = nn.Sequential(
            nn.Conv2d(3, a, 4, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU(),      # 16 x 16
            ResBlock(a, a, 1), ResBlock(a, b, 2), ResBlock(b, b, 1),                 # 8 x 8
            ResBlock(b, c, 2), ResBlock(c, c, 1))                                    # 4 x 4
        self.features = nn.Linear(c, FEATURES)
        self.classifier = nn.Linear(FEATURES, classes)

    def forward(self, images):
        features = self.features(self.body(images).mean((2, 3)))
        return features, self.classifier(F.relu(features))


def augment(images, rng):
    """Shifts images (B, 3, S, S) by up to 4 pixels and mirrors half of them."""
    B, size = len(images), images.shape[-1]
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    y, x = (torch.from_numpy(rng.integers(0, 9, B))[:, None] + torch.arange(size) for _ in range(2))
    x = torch.where(torch.from_numpy(rng.random(B) < 0.5)[:, None], x.flip(1), x)
    y, x = y.to(images.device), x.to(images.device)
    b = torch.arange(B, device=images.device)[:, None, None]
    return padded[b, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="DIR/train/<class>/*, DIR/val/<class>/*")
    parser.add_argument("--out", required=True, metavar="FILE", help="the program, .pt2")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    add_device_arguments(parser)
    args = parser.parse_args()
    check_writable(Path(args.out), ".pt2")
    device, dtype = pick_device(args)
    files, labels, names = data.find_images(args.data)
    many = np.bincount(labels) >= 100
    if not many.any():
        raise UserError(f"{args.data} has no class of at least 100 pictures; give a folder that has.")
    classes = [name for name, enough in zip(names, many) if enough]
    config = load_config("smoke", ["data.class_views=1"])
    views = data.Views(files, labels, names, SIZE, args.batch_size, config.data)
    views.select(many[views.labels])
    views.load("cpu")
    number = torch.full((len(names),), -1)
    number[torch.from_numpy(many)] = torch.arange(len(classes))
    images, targets = views.images, number[torch.from_numpy(views.labels)]
    val, val_labels = data.validation_images(args.data, SIZE, 100_000, classes)
    if val is None:
        raise UserError(f"{args.data} has no val/<class>/* of these classes; give a folder that has.")

    torch.manual_seed(args.seed)
    net = Classifier(len(classes)).to(device)
    if args.epochs < 1 or not 1 <= args.batch_size <= len(images):
        raise UserError(f"--epochs is {args.epochs} and --batch-size {args.batch_size}; expected from 1 on, "
                        f"and at most {len(images)}, the number of pictures.")
    steps = args.epochs * (len(images) // args.batch_size)
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps, pct_start=0.2)
    rng, started = np.random.default_rng(args.seed), time.time()
    bar = tqdm(total=steps, desc="train_classifier", unit="step")
    for epoch in range(args.epochs):
        order = torch.from_numpy(rng.permutation(len(images)))
        for index in order.split(args.batch_size)[:len(images) // args.batch_size]:
            x = augment(to_float(images[index], device), rng)
            y = targets[index].to(device)
            with autocast(device, dtype):
                loss = F.cross_entropy(net(x)[1].float(), y, label_smoothing=0.1)
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
            schedule.step()
            bar.update()
        net.eval()
        with torch.no_grad(), autocast(device, dtype):
            logits = torch.cat([net(to_float(x, device))[1].float().cpu() for x in val.split(256)])
        net.train()
        accuracy = (logits.argmax(1) == val_labels).float().mean().item()
        tqdm.write(f"epoch {epoch + 1} loss {loss.item():.3f} validation accuracy {accuracy:.2%} "
                   f"{time.time() - started:.0f} s")
    example = torch.zeros(2, 3, SIZE, SIZE)
    program = torch.export.export(net.eval().cpu(), (example,), dynamic_shapes=({0: torch.export.Dim("B")},))
    for node in program.graph.nodes:             # without the paths of this machine
        node.meta.pop("stack_trace", None)
    about = {"classes": classes, "size": SIZE, "epochs": args.epochs, "seed": args.seed,
             "validation_accuracy": accuracy}
    with replacing(args.out) as temporary, open(temporary, "wb") as f:
        torch.export.save(program, f, extra_files={"about.json": json.dumps(about)})
    print(f"{len(classes)} classes, validation accuracy {accuracy:.2%} -> {args.out}")


if __name__ == "__main__":
    run(main)
