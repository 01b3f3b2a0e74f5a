"""Stage 2: trains the Contextual RQ-Transformer on the codes of a trained RQ-VAE.

    python train_transformer.py smoke --data DIR              # after train_vae.py smoke; half a minute
    python train_transformer.py tiny-imagenet-32 --data DIR   # reads runs/tiny-imagenet-32/vae.safetensors
    python sample.py --checkpoint runs/tiny-imagenet-32 --class 980
"""
import copy
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import drr
from common import (CsvLog, grid, learning_rate, load_config, pick_device, run, save_picture, to_pixels,
                    training_arguments)
from drr import UserError


def training_noise(seed, step, batch_size, positions):
    """What is random in a step besides the choice of images: the numbers for `random_mask` (B, 1 + N), and one for the
    dropping of each condition (B,)."""
    rng = np.random.default_rng([seed, step, 2])
    uniforms = torch.from_numpy(rng.random((batch_size, 2 + positions), np.float32))
    return uniforms[:, 1:], uniforms[:, 0]


def sample_grid(vae, transformer, classes, config, device, dtype, seed=0):
    """16 pictures of classes spread over all, the same seeds every time."""
    model = drr.TorchModel(vae, copy.deepcopy(transformer), device, dtype)
    cond = torch.linspace(0, classes - 1, 16, device=device).long()[:, None].expand(-1, transformer.cond_length)
    noise = drr.draw_noise(seed, range(16), 1 + config.sample.rounds, transformer.positions, transformer.depth)
    *_, last = drr.draft_and_revise(model, cond, noise, config.sample)
    return grid(to_pixels(model.decode(last.codes)), 4, max(1, 128 // vae.size))


def main():
    # --- set-up ------------------------------------------------------------------------------------------------------
    parser = training_arguments(__doc__)
    parser.add_argument("--vae", metavar="FILE", help="the trained RQ-VAE (OUT/vae.safetensors)")
    args = parser.parse_intermixed_args()
    config = load_config(args.preset, args.overrides)
    c, out = config.transformer, Path(args.out or f"runs/{args.preset}")
    device, dtype = pick_device(args)
    if not args.data:
        raise UserError("Training needs --data DIR, a folder with DIR/train/<class>/*.jpg or with images.")
    if c.batch_size % c.accumulate:
        raise UserError(f"transformer.batch_size {c.batch_size} is no multiple of transformer.accumulate "
                        f"{c.accumulate}; change one of them.")
    if c.cond == "text":
        raise UserError("This trainer has no text data yet; use transformer.cond=class or transformer.cond=none.")
    vae, config.vae = drr.load_vae(args.vae or out / "vae.safetensors")
    vae.to(device)
    torch.manual_seed(config.data.seed)                        # the initial weights; nothing else draws from it

    # --- data: codes of all images, both ways round ------------------------------------------------------------------
    files, labels, classes = data.find_images(args.data)
    if c.cond == "class" and classes == [""]:
        raise UserError(f"{args.data} has no class folders; add them or train with transformer.cond=none.")
    titles = data.class_titles(args.data, classes)
    views = data.Views(files, labels, classes, vae.size, c.batch_size, config.data)
    codes = data.cached_codes(views, vae, out / "codes", device, dtype)           # (1 or 2, M, N, D)
    val, val_labels = data.validation_images(args.data, vae.size, 1024, classes)
    if val is not None:
        val = torch.cat([data.encode(vae, data.to_float(x, device), dtype) for x in val.split(128)])

    # --- model -------------------------------------------------------------------------------------------------------
    n = drr.conditions(c, classes)
    transformer = drr.ContextualRQTransformer(c, n, vae.side ** 2, vae.quantizer.depth, vae.quantizer.codebook)
    transformer.to(device)
    matrices = [p for p in transformer.parameters() if p.dim() > 1]
    vectors = [p for p in transformer.parameters() if p.dim() == 1]               # biases and gains do not decay
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                             {"params": vectors, "weight_decay": 0.0}], lr=c.lr, betas=tuple(c.betas), fused=True)
    ema = copy.deepcopy(transformer).requires_grad_(False).eval()                 # the result: a moving average
    parts = {"transformer": transformer, "ema": ema, "opt": opt}
    state_file = out / "transformer_state.pt"
    codes_of = drr.fingerprint(vae)
    start = drr.load_state(state_file, parts, c, codes_of) if args.resume else 0
    loss_function = torch.compile(drr.masked_loss) if c.compile else drr.masked_loss
    log = CsvLog(out / "transformer.csv", start)
    print(f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.1f}M parameters, {len(views)} views, {len(classes)} "
          f"classes, {device} {str(dtype)[6:]}, steps {start}..{c.steps} -> {out}")

    def to_cond(labels):
        return (labels if c.cond == "class" else torch.zeros_like(labels)).to(device)[:, None]        # (B, 1)

    # --- loop --------------------------------------------------------------------------------------------------------
    clock, seen = time.time(), 0
    bar = tqdm(range(start, c.steps), "train_transformer", c.steps, initial=start, unit="step")
    for step in bar:
        index, flips = views.draw(step)
        batch = torch.from_numpy(codes[flips.astype(int), index].astype(np.int64)).to(device)         # (B, N, D)
        mask_noise, drop_noise = training_noise(config.data.seed, step, c.batch_size, vae.side ** 2)
        mask = drr.random_mask(mask_noise).to(device)
        cond = to_cond(torch.from_numpy(views.labels[index]))
        cond = torch.where(drop_noise.to(device)[:, None] < c.cond_dropout, transformer.null, cond)
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, c)
        loss, accuracy, hidden = 0, 0, mask.sum()
        for part in zip(batch.chunk(c.accumulate), mask.chunk(c.accumulate), cond.chunk(c.accumulate)):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                part_loss, part_accuracy = loss_function(transformer, *part)                           # (D,), (D,)
            share = part[1].sum() / hidden                     # of the step's hidden stacks, which all count the same
            (part_loss.mean() * share).backward()
            loss, accuracy = loss + part_loss.detach() * share, accuracy + part_accuracy * share
        norm = nn.utils.clip_grad_norm_(transformer.parameters(), c.grad_clip or float("inf"))
        if not torch.isfinite(norm):
            saved = f"go on from {state_file} with --resume and" if start or step >= c.save_every else "start again with"
            raise UserError(f"The gradient is no longer finite at step {step + 1}; {saved} a lower transformer.lr.")
        opt.step()
        opt.zero_grad(set_to_none=True)
        decay = min(c.weights_ema, (1 + step) / (10 + step))   # a short memory at first, so that the start is forgotten
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(transformer.parameters()), 1 - decay)

        # --- log, look, save -----------------------------------------------------------------------------------------
        step, seen, last = step + 1, seen + len(batch), step + 1 == c.steps
        look = step % c.picture_every == 0 or last
        if look or step % c.log_every == 0:
            rate, clock, seen = seen / (time.time() - clock), time.time(), 0
            row = {"step": step, "loss": loss.mean().item(), "grad_norm": norm.item(), "lr": opt.param_groups[0]["lr"],
                   "images_per_s": rate, "val_loss": "", **{f"loss_{d + 1}": v for d, v in enumerate(loss.tolist())},
                   **{f"accuracy_{d + 1}": v for d, v in enumerate(accuracy.tolist())}}
            if look:
                if val is not None:
                    noise = training_noise(config.data.seed, 0, len(val), vae.side ** 2)[0]            # always the same
                    mask = drr.random_mask(noise).to(device)
                    row["val_loss"] = validation_loss(ema, val, mask, to_cond(val_labels), dtype)
                save_picture(sample_grid(vae, ema, n, config, device, dtype), out / f"samples_{step:06d}.png")
                clock = time.time()
            log.write(row)
            bar.set_postfix_str(f"loss {row['loss']:.3f} {rate:.0f} img/s")
            tqdm.write(f"step {step} loss {row['loss']:.3f} by depth {' '.join(f'{v:.2f}' for v in loss.tolist())} "
                       f"accuracy {' '.join(f'{v:.3f}' for v in accuracy.tolist())} grad {row['grad_norm']:.2f} "
                       f"{rate:.0f} img/s"
                       + (f" val_loss {row['val_loss']:.4f}" if row["val_loss"] != "" else ""))
        if step % c.save_every == 0 or last:
            drr.save_transformer(out / "transformer.safetensors", ema, config, classes, titles, vae)
            drr.save_state(state_file, parts, step, c, codes_of)
    if start >= c.steps:       # nothing was left to train: write the result again, with today's sampling defaults
        drr.save_transformer(out / "transformer.safetensors", ema, config, classes, titles, vae)
    print(f"wrote {out / 'transformer.safetensors'}")


@torch.no_grad()
def validation_loss(transformer, codes, mask, cond, dtype):
    """Mean cross-entropy in nats over the hidden stacks of codes (B, N, D), all depths."""
    total = weight = 0.0
    for part in zip(codes.split(128), mask.split(128), cond.split(128)):
        with torch.autocast(codes.device.type, dtype, enabled=dtype != torch.float32):
            total += drr.masked_loss(transformer, *part)[0].mean().item() * part[1].sum().item()
        weight += part[1].sum().item()
    return total / weight


if __name__ == "__main__":
    run(main)
