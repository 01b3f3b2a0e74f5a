"""Stage 2: trains the Contextual RQ-Transformer on the codes of a trained RQ-VAE.

    python train_transformer.py smoke --data DIR              # after train_vae.py smoke
    python train_transformer.py tiny-imagenet-32 --data DIR   # reads runs/tiny-imagenet-32/vae.safetensors
    python sample.py --checkpoint runs/tiny-imagenet-32 --class 980
"""
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from support import data
import drr
from support import runs
from support.common import autocast, grid, load_config, run, sampling_values, save_picture, to_float, to_pixels
from drr import UserError


def training_noise(seed, step, batch_size, positions, depth):
    """What is random in a step besides the choice of images, for the whole batch: the numbers for `random_mask` (B, 1 + N),
    one for the dropping of each condition (B,), and those of stochastic codes (B, N, D)."""
    rng = np.random.default_rng([seed, step, 2])               # another stream than that of data.Views.draw
    uniforms = torch.from_numpy(rng.random((batch_size, 2 + positions), np.float32))
    return uniforms[:, 1:], uniforms[:, 0], torch.from_numpy(rng.random((batch_size, positions, depth), np.float32))


def sample_grid(vae, transformer, conditions, config, device, dtype, seed=0):
    """16 pictures of conditions spread over all of them, the same seeds every time."""
    model = drr.TorchModel(*copy.deepcopy((vae, transformer)), device, dtype)       # it converts what it is given
    cond = torch.linspace(0, conditions - 1, 16, device=device).long()[:, None].expand(-1, transformer.cond_length)
    noise = drr.draw_noise(seed, range(16), 1 + config.sample.rounds, transformer.positions, transformer.depth)
    *_, last = drr.draft_and_revise(model, cond, noise, config.sample)
    return grid(to_pixels(model.decode(last.codes)), 4, max(1, 128 // vae.size))


@torch.no_grad()
def validation_loss(transformer, codes, mask, cond, dtype):
    """Mean cross-entropy in nats over the hidden stacks of codes (B, N, D), all depths."""
    total = weight = 0.0
    for part in zip(codes.split(128), mask.split(128), cond.split(128)):
        with autocast(codes.device, dtype):
            total += drr.masked_loss(transformer, *part)[0].mean().item() * part[1].sum().item()
        weight += part[1].sum().item()
    return total / weight


def main():
    # --- set-up ------------------------------------------------------------------------------------------------------
    parser = runs.arguments(__doc__)
    parser.add_argument("--vae", metavar="FILE", help="the trained RQ-VAE (OUT/vae.safetensors)")
    args = parser.parse_intermixed_args()
    config = load_config(args.preset, args.overrides, ("data", "transformer", "sample"))
    c, out = config.transformer, Path(args.out or f"runs/{args.preset}")
    device, dtype = runs.join_ranks(args)
    rank, world = drr.ranks()
    if not args.data:
        raise UserError("Training needs --data DIR, a folder with DIR/train/<class>/*.jpg or with images.")
    if c.cond == "text":
        raise UserError("This trainer has no text data yet; use transformer.cond=class or transformer.cond=none.")
    own, count = runs.micro_batches("transformer", c)
    states = runs.States(out, "transformer", args, c.keep)
    vae, config.vae = drr.load_vae(args.vae or out / "vae.safetensors")
    beside = out / "vae.safetensors"                           # where sample.py will look for it
    if beside.exists() and drr.code_fingerprint(drr.load_vae(beside)[0]) != drr.code_fingerprint(vae):
        raise UserError(f"{beside} is another RQ-VAE than {args.vae}; choose another --out, since the two files of one training "
                        "lie together.")
    vae.to(device)
    N, D = vae.side ** 2, vae.quantizer.depth
    sampling_values(config.sample, (), N)                      # refuses what sample.py would refuse
    torch.manual_seed(config.data.seed)                        # the initial weights; nothing else draws from it

    # --- data: codes of all images, both ways round; or the images themselves ------------------------------------------
    files, labels, classes = data.find_images(args.data, index=out / "shards")
    if c.cond == "class" and classes == [""]:
        raise UserError(f"{args.data} has no class folders; add them or train with transformer.cond=none.")
    titles = data.class_titles(args.data, classes)
    views = data.Views(files, labels, classes, vae.size, c.batch_size, config.data)
    views.own = own
    settings = runs.settings_of(config, ("transformer", "data"), str(dtype), data.fingerprint(files),
                                    **{"the RQ-VAE": drr.code_fingerprint(vae)})
    states.lock()
    online = c.soft_labels or c.stochastic_codes               # these need z, which is too large to store
    if not online:
        cache = data.cached_codes(views, vae, out / "codes", device, dtype)       # (1 or 2, M, N, D)
    elif config.data.in_memory:
        views.load(device)
    val, val_labels = data.validation_images(args.data, vae.size, 1024, classes, out / "shards")
    if val is not None:
        val = torch.cat([data.encode(vae, to_float(x, device), dtype) for x in val.split(128)])

    # --- model -------------------------------------------------------------------------------------------------------
    conditions = drr.conditions(c, classes)
    transformer = drr.ContextualRQTransformer(c, conditions, N, D, vae.quantizer.codebook.cpu())
    transformer.recompute = c.recompute
    if args.init:
        drr.fill(transformer, drr.read_model(args.init)[0], args.init)
    # DEVIATION: a moving average of the weights is the result; the paper does not say that it has one.
    ema = copy.deepcopy(transformer).requires_grad_(False).eval()
    if c.shard:
        whole_ema = runs.shard(transformer, ema)
    else:
        transformer.to(device), ema.to(device)
        whole_ema = lambda: ema
    matrices = [p for p in transformer.parameters() if p.dim() > 1]
    # DEVIATION: biases and gains do not decay; the paper names one weight decay for all.
    vectors = [p for p in transformer.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                             {"params": vectors, "weight_decay": 0.0}], lr=c.lr, betas=tuple(c.betas), fused=True)
    parts = {"transformer": transformer, "ema": ema, "opt": opt}
    start = states.begin(parts, settings, sharded=transformer if c.shard else None)
    if rank == 0 and not beside.exists():
        drr.save_vae(beside, vae, config)
    forward = torch.compile(transformer) if c.compile else transformer
    forward = forward if c.shard else runs.parallel(forward, device)

    def backward(codes, mask, cond, z, weight):
        """Forward and backward of one micro-batch, which has `weight` of the step's hidden stacks: they all count the same.
        Returns its part (2, D) of the step's loss and accuracy by depth."""
        soft = vae.quantizer.soft_codes(z[mask], codes[mask], c.code_temperature) if c.soft_labels else None    # (P, D, K)
        with autocast(device, dtype):
            loss, accuracy = forward(codes, mask, cond, soft)
        (loss.mean() * weight * world).backward()              # the gradients are averaged over the ranks, hence `world`
        return torch.stack([loss.detach(), accuracy]) * weight

    def encode(images):
        with torch.no_grad(), autocast(device, dtype):
            return vae.encode_latent(images).float()           # z (B, N, n_z)

    def to_cond(labels):
        return (labels if c.cond == "class" else torch.zeros_like(labels)).to(device)[:, None]        # (B, 1)

    # --- what it will take: one micro-batch is tried -------------------------------------------------------------------
    like = torch.zeros(len(own) // count, N, D, dtype=torch.int64, device=device)
    mask = (torch.arange(N, device=device) < 2 / math.pi * N).expand(len(like), N)                     # the mean share
    grey = torch.zeros(len(like), 3, vae.size, vae.size, device=device)
    cost = runs.measure(lambda: backward(like, mask, to_cond(like[:, 0, 0]), encode(grey) if online else None, 1),
                            count, parts, device, dtype)
    runs.announce("transformer", c, cost, start, count, device, dtype)
    log = runs.Log(out, "transformer", start, args.tensorboard)
    print(f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.1f}M parameters, {len(views)} views, {len(classes)} "
          f"classes, {world} x {device} {str(dtype)[6:]}, steps {start}..{c.steps} -> {out}")

    # --- loop --------------------------------------------------------------------------------------------------------
    stop = runs.StopSignal()
    clock, seen = time.time(), 0
    images = views.batches(start, c.steps) if online else None
    bar = tqdm(range(start, c.steps), "train_transformer", c.steps, initial=start, unit="step", disable=rank > 0)
    for step in bar:
        mask_noise, drop_noise, code_noise = training_noise(config.data.seed, step, c.batch_size, N, D)
        mask = drr.random_mask(mask_noise)                     # of the whole batch, as the noise is; then this rank's part
        n_hidden, mask = mask.sum(), mask[own].to(device)
        if online:
            pictures, labels, _ = next(images)
            z = [encode(to_float(x, device)) for x in pictures.chunk(count)]
            temperature, noise = c.code_temperature if c.stochastic_codes else 0.0, code_noise[own].to(device).chunk(count)
            codes = torch.cat([vae.quantizer.quantize(part, temperature, u)[0] for part, u in zip(z, noise)])
        else:
            index, flips = (drawn[own] for drawn in views.draw(step))
            labels, z = torch.from_numpy(views.labels[index]), count * [None]
            codes = torch.from_numpy(cache[flips.astype(int), index].astype(np.int64)).to(device)      # (B', N, D)
        cond = to_cond(labels)
        cond = torch.where(drop_noise[own].to(device)[:, None] < c.cond_dropout, transformer.null, cond)
        for group in opt.param_groups:
            group["lr"] = runs.learning_rate(step, c)
        result = 0
        for i, part in enumerate(zip(codes.chunk(count), mask.chunk(count), cond.chunk(count), z)):
            runs.synchronize_gradients([forward], i == count - 1)
            result = result + backward(*part, part[1].sum() / n_hidden)
        norm = runs.full(nn.utils.clip_grad_norm_(transformer.parameters(), c.grad_clip or float("inf")))
        stopping, broken = runs.on_any_rank(stop.received, not torch.isfinite(norm + result.sum()), device=device)
        if broken:
            loss = runs.total(result)[0].tolist()
            terms = {f"the loss of depth {d + 1}": v for d, v in enumerate(loss)}
            runs.refuse_infinity(terms, step, states.last, "a lower transformer.lr")
        opt.step()
        opt.zero_grad(set_to_none=True)
        decay = min(c.weights_ema, (1 + step) / (10 + step))   # a short memory at first, so that the start is forgotten
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(transformer.parameters()), 1 - decay)

        # --- log, look, save -----------------------------------------------------------------------------------------
        done, seen, last = step + 1, seen + c.batch_size, step + 1 == c.steps
        look = done % c.picture_every == 0 or last
        save = done % c.save_every == 0 or last or stopping
        result_ema = whole_ema() if look or save else None     # on rank 0
        if look or done % c.log_every == 0:
            rate, clock, seen = seen / (time.time() - clock), time.time(), 0
            loss, accuracy = runs.total(result).tolist()
            everyones = runs.everyones(codes.flatten(0, 1))
            usage, perplexity = (v.tolist() for v in drr.codebook_usage(everyones, config.vae.codebook_size))
            by_depth = {"loss": loss, "accuracy": accuracy, "usage": usage, "perplexity": perplexity}
            row = {"step": done, "loss": sum(loss) / D, "grad_norm": norm.item(), "lr": opt.param_groups[0]["lr"],
                   "images_per_s": rate, "tokens_per_s": rate * N * D, "mfu": cost.mfu(rate / c.batch_size), "val_loss": "",
                   **{f"{name}_{d + 1}": v for name, values in by_depth.items() for d, v in enumerate(values)}}
            if look and rank == 0:
                result_ema.to(device)
                if val is not None:
                    noise = training_noise(config.data.seed, 0, len(val), N, D)[0]                     # always the same
                    val_mask = drr.random_mask(noise).to(device)
                    row["val_loss"] = validation_loss(result_ema, val, val_mask, to_cond(val_labels), dtype)
                save_picture(sample_grid(vae, result_ema, conditions, config, device, dtype), out / f"samples_{done:06d}.png")
                result_ema.to("cpu" if c.shard else device)
            log.write(row)
            bar.set_postfix_str(f"loss {row['loss']:.3f} {rate:.0f} img/s")
            tqdm.write(f"step {done} loss {row['loss']:.3f} by depth {' '.join(f'{v:.2f}' for v in loss)} "
                       f"accuracy {' '.join(f'{v:.3f}' for v in accuracy)} grad {row['grad_norm']:.2f} "
                       f"{rate:.0f} img/s {row['tokens_per_s']:,.0f} tokens/s MFU {row['mfu']:.0%}"
                       + (f" val_loss {row['val_loss']:.4f}" if row["val_loss"] != "" else ""))
        if save:
            states.save(done)
            if rank == 0 and (last or not stopping):
                drr.save_transformer(out / "transformer.safetensors", result_ema, config, classes, titles, vae)
        if look:
            log.draw()
            clock, seen = time.time(), 0                       # the speed is that of training
        if stopping and not last:
            stop.leave(done)
    if start >= c.steps:       # nothing was left to train: write the result again, with today's sampling defaults
        result_ema = whole_ema()
        if rank == 0:
            drr.save_transformer(out / "transformer.safetensors", result_ema, config, classes, titles, vae)
    print(f"wrote {out / 'transformer.safetensors'}")


if __name__ == "__main__":
    run(main)
