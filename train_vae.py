"""Stage 1: trains the RQ-VAE that turns images into stacks of codes.

    python train_vae.py smoke --data DIR                      # any folder of images; to see that it works
    python train_vae.py tiny-imagenet-32 --data DIR           # writes runs/tiny-imagenet-32/vae.safetensors
    python train_vae.py imagenet-256 --official FILE.pt       # takes over the published weights instead
"""
import copy
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import drr
from drr import UserError
from support import data, runs
from support.common import (autocast, grid, load_config, reconstructions, run, save_picture, to_float,
                            to_pixels)
from support.losses import (Discriminator, HingeLoss, adaptive_weight, adversary_share, feature_matching,
                            perceptual_distance)

TERMS = ("loss", "reconstruction", "commitment", "perceptual", "gan", "features", "disc", "logits_real",
         "logits_fake", "lambda")


# === The loss, and a look at reconstructions ================================================================
def objective(c, vae, disc, distance, dtype, x, recon, commitment, beta, share):
    """L = L_rec + w_p L_perc + beta L_commit + share (w_g lambda L_gan + w_f L_feat)   (RQ-VAE section 3.1).

    x, recon (B, 3, S, S); share: that of the adversary, None without one. Returns {name: scalar}."""
    terms = dict.fromkeys(TERMS, torch.zeros((), device=x.device))
    error = recon - x
    terms["reconstruction"] = rec = error.abs().mean() if c.loss == "l1" else error.square().mean()
    terms["commitment"] = commitment
    if distance:
        with autocast(x.device, dtype if c.perceptual == "efficientnet" else torch.float32):
            terms["perceptual"] = distance(recon, x).mean()
    rec = rec + c.perceptual_weight * terms["perceptual"]
    terms["loss"] = rec + beta * commitment
    if share is not None:
        disc.requires_grad_(False)
        with autocast(x.device, dtype):
            logits, features = disc(recon)
        terms["gan"] = gan = -logits.float().mean()            # L_gan = -mean D(x_hat)
        terms["lambda"] = torch.ones_like(gan)
        if c.disc_adaptive:                  # the two gradients become equally long where the decoder ends
            last = (vae.decoder.enlarge or [vae.decoder])[-1]
            terms["lambda"] = adaptive_weight(rec, gan, last.conv_out.weight)
        adversary = c.disc_weight * terms["lambda"] * gan
        if c.feature_weight:                 # DEVIATION: not in the paper; more to learn from than one number
            with autocast(x.device, dtype), torch.no_grad():
                wanted = disc(x)[1]
            terms["features"] = feature_matching(features, wanted)
            adversary = adversary + c.feature_weight * terms["features"]
        terms["loss"] = terms["loss"] + share * adversary
        disc.requires_grad_(True)
    return terms


@torch.no_grad()
def look_at(vae, images, path):
    """Saves eight images (B, 3, S, S) with their decodes from depths 1 .. D as a picture; returns the peak
    signal-to-noise ratio of all reconstructions in dB, the mean over the images."""
    pixels = to_pixels(reconstructions(vae, images[:8]))
    save_picture(grid(pixels, 1 + vae.quantizer.depth, max(1, 64 // vae.size)), path)
    errors = [(vae.decode(vae.encode(x)).clamp(-1, 1) - x) / 2 for x in images.split(64)]
    return -10 * torch.cat([e.square().mean((1, 2, 3)) for e in errors]).log10().mean().item()


# === Set-up: the configuration, a file -> what is trained ===================================================
def check(c, size, device):                  # what cannot be trained
    if c.compile and device.type == "cpu":
        raise UserError("vae.compile is for a GPU: a CPU's gradients were wrong (torch 2.13); leave it out.")
    if (c.disc_weight or c.feature_weight) and size >> max(1, c.disc_layers) + (c.disc == "unshuffled") < 3:
        raise UserError(f"vae.disc_layers {c.disc_layers} leaves nothing of {size} pixels; lower it.")


def given_codes(args, c, out):
    """(fingerprint of --decoder-only's codes, fingerprints under which older transformers know them). Raises
    UserError for another architecture than the preset's, and where OUT has a transformer of other codes."""
    path, beside = args.decoder_only, out / "transformer.safetensors"
    if args.init or c.quantize_start:
        raise UserError("--decoder-only has its own weights and codes, used from the first step on; leave "
                        "--init out, and set vae.quantize_start=0.")
    vae, found = drr.load_vae(path)
    for key in ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels", "code_dim",
                "codebook_size", "depth"):
        if getattr(found, key) != getattr(c, key):
            raise UserError(f"{path} has another architecture: its vae.{key} is {getattr(found, key)}, the "
                            f"preset's {getattr(c, key)}; choose the preset that made it.")
    codes, former = drr.code_fingerprint(vae), drr.former_fingerprints(path, vae)
    if beside.exists() and drr.read_model(beside)[1].get("vae") not in (codes, *former):
        raise UserError(f"{beside} was trained on other codes than those of {path}; choose another --out.")
    return codes, former


def build(c, weights, frozen, device):
    """{name: module or optimizer or None}: all that learns, with these weights (a path) or random ones."""
    vae, learning = drr.RQVAE(c).to(device), ("",)             # all
    if frozen:                               # the decoder, or of one that enlarges the levels that do so
        learning = ("decoder.enlarge.",) if c.upscale > 1 else ("decoder.", "post_quant_conv.")
    if weights:
        tensors, meta = drr.read_model(weights)
        if frozen:                           # FILE may lack the last enlarging levels
            levels = range(meta["vae"].get("upscale", 1).bit_length() - 1, len(vae.decoder.enlarge))
            new = tuple(f"decoder.enlarge.{i}." for i in levels)
            tensors |= {name: p for name, p in vae.state_dict().items() if name.startswith(new)}
        drr.fill(vae, tensors, weights)
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith(learning))
    # DEVIATION: the result has an averaged decoder, without the noise of an adversary's last steps.
    average = copy.deepcopy(vae)
    average.encoder, average.quant_conv, average.quantizer = vae.encoder, vae.quant_conv, vae.quantizer
    opt = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr=c.lr, betas=tuple(c.betas))
    disc = disc_opt = None
    if c.disc_weight or c.feature_weight:
        disc = Discriminator(c.disc, c.disc_ch, c.disc_layers).to(device)
        disc_opt = torch.optim.Adam(disc.parameters(), lr=c.lr, betas=tuple(c.betas))
    return {"vae": vae, "average": average, "opt": opt, "disc": disc, "disc_opt": disc_opt}


def step_operations(vae, image):
    """Operations of a step per image, image (1, 3, S, S), without the loss networks."""
    vae = copy.deepcopy(vae).to("meta")      # counts, and computes nothing
    with FlopCounterMode(display=False) as counter:
        vae.decode_latent(vae.encode_latent(image.to("meta"))).sum().backward()
    return counter.get_total_flops()


def load_data(args, config, size, out, dtype, device):
    """The Views, the settings that a resumed run must share, and the images (B, 3, S, S) to look at."""
    files, labels, classes = data.find_images(args.data, out=out)
    views = data.Views(files, labels, classes, size, config.vae.batch_size, config.data)
    content = data.files_fingerprint(files, labels, classes)
    settings = runs.settings_of(config, ("vae", "data"), str(dtype), content)
    val, _ = data.validation_images(args.data, size, 512, [""])             # of any class
    if config.data.in_memory:
        settings |= views.load(device)
    if val is None:
        val = views[0][0]
        print(f"{args.data} has no val: val_psnr is that of {len(val)} pictures of the training")
    return views, settings, to_float(val, device)


def main():
    # --- set-up ---------------------------------------------------------------------------------------------
    parser = runs.arguments(__doc__)
    parser.add_argument("--official", metavar="FILE", help="convert the published weights; no training")
    parser.add_argument("--decoder-only", metavar="FILE", help="train this file's decoder; its codes stay")
    args = parser.parse_intermixed_args()
    config = load_config(args.preset, args.overrides, ("data", "vae"))
    c = config.vae
    out = Path(args.out or f"runs/{args.preset}")
    if args.precision == "auto":             # as published: bf16 only on request
        args.precision = "fp32"
    device, dtype = runs.join_ranks(args)
    if args.official:
        from support.official import convert
        return convert(args, config, out / "vae.safetensors")
    size = c.resolution * c.upscale          # S
    check(c, size, device)
    rows, count = runs.micro_batches("vae", c)
    states = runs.States(out, "vae", args, c.keep)
    given, former = given_codes(args, c, out) if args.decoder_only else (None, ())
    distance = perceptual_distance(c.perceptual, device) if c.perceptual_weight else None

    views, settings, val = load_data(args, config, size, out, dtype, device)
    views.rows = rows
    if given:
        settings["the codes of --decoder-only"] = given

    # --- model ----------------------------------------------------------------------------------------------
    torch.manual_seed(config.data.seed)      # the initial weights; nothing else draws from it
    parts = build(c, args.init or args.decoder_only, given, device)
    vae, average, opt, disc, disc_opt = parts.values()
    trained = opt.param_groups[0]["params"]
    averaged, weights = ([*m.post_quant_conv.parameters(), *m.decoder.parameters()] for m in (average, vae))
    states.lock()
    start = states.begin(parts, settings)
    if given and drr.code_fingerprint(vae) != given:           # a state that --force let pass
        raise UserError(f"{states.saved[-1]} has other codes than {args.decoder_only}; give the old file.")
    torch._functorch.config.donated_buffer = False             # adaptive_weight goes through the graph twice
    forward = runs.parallel(torch.compile(vae) if c.compile else vae, device)
    hinge = runs.parallel(HingeLoss(disc), device) if disc else None

    # --- loop -----------------------------------------------------------------------------------------------
    operations = step_operations(vae, val[:1])
    log = runs.Log(out, "vae", vae, c, start, count, operations, device, dtype)
    stop = runs.StopSignal()
    batches = views.batches(start, c.steps)
    for step in runs.progress("train_vae", start, c.steps):
        rate = runs.learning_rate(step, c, c.decay)
        batch, _, unreadable = next(batches)
        # DEVIATION: the first steps train a plain autoencoder, whose codebook learns but is not used yet. A
        # decoder that sees only codes from the start is slow to find what directions of z have no code yet.
        quantized = step >= c.quantize_start
        beta = c.commitment_weight if quantized and not given else 0.0
        adversarial = disc is not None and step >= c.disc_start
        share = adversary_share(step, c) if adversarial else None
        terms, vectors, chosen = {}, [], []  # for the codebook: what was quantized, and into what
        for i, images in enumerate(batch.chunk(count)):
            runs.synchronize_gradients((forward, hinge), i == count - 1)
            x = to_float(images, device)                                           # (B', 3, S, S)
            with autocast(device, dtype):
                recon, commitment, z, codes = forward(x, quantized)
            recon = recon.float()
            part = objective(c, vae, disc, distance, dtype, x, recon, commitment, beta, share)
            (part["loss"] / count).backward()
            if adversarial:                  # the discriminator's own loss, of the same images
                with autocast(device, dtype):
                    part["disc"], part["logits_real"], part["logits_fake"] = hinge(x, recon.detach())
                (part["disc"] / count).backward()
            runs.add_up(terms, part, count)
            vectors.append(vae.quantizer.residuals(z, codes).flatten(0, 1))        # (P, D, n_z)
            chosen.append(codes.flatten(0, 1))                                     # (P, D)
        terms["grad_norm"] = runs.clip(trained, c.grad_clip)
        terms["disc_grad_norm"] = runs.clip(disc.parameters(), 0) if adversarial else terms["disc"]    # or 0
        stopping = runs.must_stop(stop, terms, step, states.good(step), "a lower vae.lr")
        runs.take_step([opt, disc_opt] if adversarial else [opt], rate)
        vectors, codes = torch.cat(vectors), torch.cat(chosen)
        # DEVIATION: the official code updates the codebook between the depths, so that in training its z_hat
        # no longer belongs to its codes. Here the same updates follow one another after the step.
        noise = torch.Generator().manual_seed(config.data.seed * 1_000_003 + step)
        for d in range(0 if given else c.depth):
            vae.quantizer.update_codebook(vectors[:, d], codes[:, d], noise, c.restart_below)
        runs.update_average(averaged, weights, c.weights_ema, step)

        # --- log, look, save --------------------------------------------------------------------------------
        done = step + 1
        last = done == c.steps
        look = done % c.picture_every == 0 or last
        log.count(done, unreadable)
        if look or done % c.log_every == 0:
            quality = None
            if look and drr.ranks()[0] == 0:
                quality = look_at(average, val, out / f"vae_{done:06d}.png")
            health = runs.codebook_health(codes, c.codebook_size)
            log.write(done, health, **runs.means(terms), lr=rate, val_psnr=quality)
        if done % c.save_every == 0 or last or stopping:
            states.save(done)
            if drr.ranks()[0] == 0 and not stopping:
                drr.save_vae(out / "vae.safetensors", average, config, former)
        log.end_step(look)
        if stopping and not last:
            stop.leave(done)
    if drr.ranks()[0] == 0:
        drr.save_vae(out / "vae.safetensors", average, config, former)
    print(f"wrote {out / 'vae.safetensors'}")


if __name__ == "__main__":
    run(main)
