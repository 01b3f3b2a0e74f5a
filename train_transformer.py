"""Stage 2: trains the Contextual RQ-Transformer on the codes of a trained RQ-VAE.

    python train_transformer.py smoke --data DIR              # after train_vae.py smoke
    python train_transformer.py tiny-imagenet-32 --data DIR   # reads runs/tiny-imagenet-32/vae.safetensors
    python sample.py --checkpoint runs/tiny-imagenet-32 --class 0
"""
import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import drr
from drr import UserError
from support import data, models, runs
from support.common import (autocast, grid, load_config, run, sampling_values, save_picture, to_float,
                            to_pixels)


# === Randomness and the loss: (seed, step) -> numbers; codes, mask -> nats ==================================
def training_noise(seed, step, batch_size, positions, depth):
    """What is random in a step besides the choice of images, for the whole batch: numbers for `random_mask`
    (B, 1 + N), one for the dropping of each condition (B,), and those of stochastic codes (B, N, D)."""
    rng = np.random.default_rng([seed, step, 2])             # another stream than that of data.Views.draw
    uniforms = torch.from_numpy(rng.random((batch_size, 2 + positions), np.float32))
    of_codes = torch.from_numpy(rng.random((batch_size, positions, depth), np.float32))
    return uniforms[:, 1:], uniforms[:, 0], of_codes


def step_operations(model, hidden):
    """Operations of a step per image, 6 per parameter and token. On average a share `hidden` of all stacks is
    hidden: those go through the depth transformer."""
    # What modulates a block (related/maskgit.py) is computed once per image, which is next to nothing.
    spatial = sum(p.numel() for name, p in model.spatial.named_parameters() if "modulation" not in name)
    depth = sum(p.numel() for part in (model.depthwise, model.classifier) for p in part.parameters())
    return 6 * model.positions * (spatial + hidden * model.depth * depth)


@torch.no_grad()
def validation_loss(transformer, random_mask, codes, cond, seed, dtype):
    """Mean cross-entropy in nats over hidden stacks of codes (B, N, D), under the masks of step 0."""
    mask = random_mask(training_noise(seed, 0, *codes.shape)[0]).to(codes.device)
    total = 0.0
    for part in zip(codes.split(128), mask.split(128), cond.split(128)):
        with autocast(codes.device, dtype):
            total += drr.masked_loss(transformer, *part)[0].mean().item() * part[1].sum().item()
    return total / mask.sum().item()


def save_samples(transformer, decode, vae, c, cond, device, dtype, path):
    """Saves samples of the conditions cond (16, L) as a picture, with the same seeds every time."""
    # TorchModel converts what it gets: a copy, that of the weights in no more than the decode's precision.
    weights = {id(p): torch.nn.Parameter(p.to(device, dtype), False) for p in transformer.parameters()}
    model = drr.TorchModel(copy.deepcopy(vae), copy.deepcopy(transformer, weights), device, dtype)
    codes = drr.sample(model, cond.to(device), 0, range(len(cond)), c, decode=decode)      # (16, N, D)
    save_picture(grid(to_pixels(model.decode(codes)), 4, max(1, 128 // vae.size)), path)


# === Set-up: the RQ-VAE, what is trained, codes and conditions ==============================================
def build(c, conditions, vae, weights, device):
    """The transformer with these weights (a path) or random ones, its moving average, its optimizer, and what
    gives rank 0 the whole average, sharded or not; all ranks call that together."""
    codebook = vae.quantizer.codebook.cpu()
    transformer = models.build(c, conditions, vae.side ** 2, vae.quantizer.depth, codebook)
    transformer.recompute = c.recompute
    for block in (*transformer.spatial, *transformer.depthwise):
        block.dropout.p = c.dropout
    if weights:
        tensors, meta = drr.read_model(weights)
        if c.cond == "text" and meta.get("transformer", {}).get("tokenizer") != c.tokenizer:
            print(f"{weights} has other conditions: their embeddings begin anew")
            tensors |= {name: p for name, p in transformer.state_dict().items() if name.startswith("cond_")}
        with drr.explained(weights):
            known = meta["transformer"]["n_spatial"]
        for block in transformer.spatial[known:]:              # FILE is shallower: what it lacks adds nothing
            if hasattr(block, "fc2"):                          # at first; maskgit's gates see to that
                block.proj.weight.data.zero_()
                block.fc2.weight.data.zero_()
        new = tuple(f"spatial.{i}." for i in range(known, c.n_spatial))
        tensors |= {name: p for name, p in transformer.state_dict().items() if name.startswith(new)}
        drr.fill(transformer, tensors, weights)
    # DEVIATION: a moving average of the weights is the result; the paper does not say that it has one.
    average = copy.deepcopy(transformer).requires_grad_(False).eval()
    if c.shard:
        whole_average = runs.shard(transformer, average, device)
    else:
        transformer.to(device)
        average.to(device)
        whole_average = lambda: average
    return transformer, average, *optimizers(transformer, c), whole_average


def optimizers(transformer, c):
    """AdamW, and with c.muon_lr Muon for the matrices of the blocks, else None."""
    blocks = [*transformer.spatial.parameters(), *transformer.depthwise.parameters()]
    # DEVIATION: Muon (Jordan et al. 2024), whose step is the momentum's nearest orthogonal matrix, is ahead
    # of AdamW at equal time in a short training (docs/training.md). The paper's presets do without.
    by_muon = [p for p in blocks if p.dim() == 2 and c.muon_lr]
    muon = torch.optim.Muon(by_muon, lr=c.muon_lr, weight_decay=c.weight_decay,
                            adjust_lr_fn="match_rms_adamw") if by_muon else None
    # DEVIATION: biases and gains do not decay; the paper names one weight decay for all.
    rest = [p for p in transformer.parameters() if not any(p is other for other in by_muon)]
    groups = [{"params": [p for p in rest if p.dim() > 1], "weight_decay": c.weight_decay},
              {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.lr, betas=tuple(c.betas), fused=True), muon


def load_data(args, config, vae, states, out, dtype, exact, device):
    """A namespace: `views`; their `cache`d codes (1 or 2, M, N, D), or None if each step encodes its own;
    `captions`, or None; `val`, codes (B, N, D) and conditions (B, L) of up to 1,024 images of DIR/val, or
    None; `shown`, conditions (16, L) for pictures, and their `texts`; the `settings` that a resumed run must
    share; the `classes`' names and `titles`. exact: the precision of the codes."""
    c = config.transformer
    of_text = c.cond == "text"
    files, labels, classes = data.find_images(args.data, out=out, captions=of_text)
    if c.cond == "class" and classes == [""]:
        raise UserError(f"{args.data} names no classes; add folders for them or set transformer.cond=none.")
    titles = data.class_titles(args.data, classes)
    views = data.Views(files, labels, classes, vae.size, c.batch_size, config.data)
    content = data.files_fingerprint(files, labels, classes)
    settings = runs.settings_of(config, ("transformer", "data"), str(dtype), content)
    settings["the RQ-VAE"] = drr.code_fingerprint(vae)
    if exact != torch.float32:               # else the run's precision alone would not tell
        settings["the precision of the codes"] = str(exact)
    states.lock()
    cache = val = captions = None
    if of_text:
        from support import text
        captions = text.Captions(files, out, args, c)
        views.select(captions.count[views.file_of] > 0)
        settings["the captions"] = captions.digest
        c.tokenizer = captions.tokenizer                       # with the section it goes into the checkpoint
        classes = titles = [""]
    known = {"text": None, "class": classes, "none": [""]}[c.cond]
    images, labels = data.validation_images(args.data, vae.size, 1024, known)
    if not (c.soft_labels or c.stochastic_codes):              # they need z, which is too large to store
        cache = data.cached_codes(views, vae, out / "codes", device, exact)
    elif config.data.in_memory:
        settings |= views.load(device)
    shown = torch.linspace(0, len(classes) - 1, 16).long()[:, None] * (c.cond == "class")    # of all classes
    if images is not None:
        codes = [data.encode(vae, to_float(x, device), exact) for x in images.split(128)]
        cond = text.tokenize(c.tokenizer, labels) if of_text else labels[:, None] * (c.cond == "class")
        val = torch.cat(codes), cond.to(device)
    texts = None
    if of_text:
        texts = labels or [files.texts(i)[0] for i in np.flatnonzero(captions.count)[:16]]
        texts = [texts[i * len(texts) // 16] for i in range(16)]
        shown = text.tokenize(c.tokenizer, texts)
    return SimpleNamespace(views=views, cache=cache, captions=captions, val=val, shown=shown, texts=texts,
                           settings=settings, classes=classes, titles=titles)


def batches(views, cache, start, stop):
    """Yields each step's codes (B', N, D), or images (B', 3, S, S) where none are cached, and views (B',)."""
    if cache is None:
        yield from (batch[:2] for batch in views.batches(start, stop))
        return
    for step in range(start, stop):
        index, flips = (drawn[views.rows] for drawn in views.draw(step))
        codes = torch.from_numpy(cache[flips.astype(int), index].astype(np.int64))
        yield codes, index


def conditions(source, c, index, seed, step):
    """The conditions (B', L) of this rank's views `index` (B',): classes, or captions, drawn in each step."""
    views = source.views
    if not source.captions:
        return torch.from_numpy(views.labels[index])[:, None] * (c.cond == "class")
    uniforms = np.random.default_rng([seed, step, 4]).random(views.batch_size)[views.rows]
    return source.captions.draw(views.file_of[index], uniforms)


# === A step: codes or images, mask, condition -> gradients ==================================================
def gradients(forward, vae, c, batch, count, exact, dtype, device):
    """Adds up the gradients of this rank's part of a step, in `count` micro-batches. batch: codes (B', N, D)
    or images, masks (B', N), conditions (B', L), noise of stochastic codes (B', N, D); and how many stacks
    are hidden on all ranks. Returns {name: (D,)}, to be added up over the ranks, and the codes (B', N, D)."""
    *batch, n_hidden = batch
    terms, seen = {}, []
    for i, (codes, mask, cond, noise) in enumerate(zip(*(x.to(device).chunk(count) for x in batch))):
        runs.synchronize_gradients([forward], i == count - 1)
        targets = None                       # the codes
        if codes.dtype == torch.uint8:
            with torch.no_grad(), autocast(device, exact):
                z = vae.encode_latent(to_float(codes, device)).float()             # (B'', N, n_z)
            codes, _ = vae.quantizer.quantize(z, c.code_temperature if c.stochastic_codes else 0.0, noise)
            if c.soft_labels:                # (P, D, K)
                targets = vae.quantizer.soft_codes(z[mask], codes[mask], c.code_temperature)
        with autocast(device, dtype):
            loss, accuracy = forward(codes, mask, cond, targets)                   # (D,), means over P stacks
        share = mask.sum() / n_hidden        # every hidden stack of the step counts the same
        (loss.mean() * share * drr.ranks()[1]).backward()      # the ranks' gradients are averaged
        runs.add_up(terms, {"loss": loss * share, "accuracy": accuracy * share}, 1)
        seen.append(codes)
    return terms, torch.cat(seen)


def main():
    # --- set-up ---------------------------------------------------------------------------------------------
    parser = runs.arguments(__doc__)
    parser.add_argument("--vae", metavar="FILE", help="the trained RQ-VAE (OUT/vae.safetensors)")
    parser.add_argument("--tokenizer", nargs=2, metavar=("VOCAB", "MERGES"),
                        help="of texts: vocab.json and merges.txt (trained on the captions)")
    args = parser.parse_intermixed_args()
    config = load_config(args.preset, args.overrides, ("data", "transformer", "sample"))
    c = config.transformer
    kind = models.kind(c)
    out = Path(args.out or f"runs/{args.preset}")
    device, dtype = runs.join_ranks(args)
    exact = dtype if args.precision == "bf16" else torch.float32       # of codes: as in stage 1
    rank = drr.ranks()[0]
    if args.tokenizer and c.cond != "text":
        raise UserError("--tokenizer is for models of text (transformer.cond=text); leave it out.")
    if c.muon_lr and c.shard:
        raise UserError("Muon needs whole matrices; leave transformer.muon_lr or transformer.shard out.")
    if c.cond_dropout and not kind.null:
        raise UserError(f"transformer.cond_dropout teaches a null class, which {c.kind} transformers do not "
                        "have; set transformer.cond_dropout=0.")
    rows, count = runs.micro_batches("transformer", c)
    states = runs.States(out, "transformer", args, c.keep)
    beside = out / "vae.safetensors"
    weights = out / "transformer.safetensors"
    path = args.vae or beside
    vae, config.vae = drr.load_vae(path)
    if beside.exists() and drr.code_fingerprint(drr.load_vae(beside)[0]) != drr.code_fingerprint(vae):
        raise UserError(f"{beside} is another RQ-VAE than {path}; choose another --out.")
    N, D = vae.to(device).side ** 2, vae.quantizer.depth
    how = sampling_values(config, (), N)     # of the pictures; refuses what sample.py would refuse
    source = load_data(args, config, vae, states, out, dtype, exact, device)
    source.views.rows = rows

    # --- model ----------------------------------------------------------------------------------------------
    torch.manual_seed(config.data.seed)      # the initial weights
    number = drr.conditions(c, source.classes)
    transformer, ema, opt, muon, whole_ema = build(c, number, vae, args.init, device)
    parts = {"transformer": transformer, "ema": ema, "opt": opt, "muon": muon}
    start = states.begin(parts, source.settings, c.shard)
    if rank == 0 and source.texts:
        (out / "samples.txt").write_text("\n".join(source.texts) + "\n", "utf-8")
    if rank == 0 and not beside.exists():
        drr.save_vae(beside, vae, config, drr.former_fingerprints(path, vae))
    forward = runs.parallel(torch.compile(transformer) if c.compile else transformer, device, c.shard)

    # --- loop -----------------------------------------------------------------------------------------------
    operations = step_operations(transformer, kind.hidden)
    log = runs.Log(out, "transformer", transformer, c, start, count, operations, device, dtype)
    stop = runs.StopSignal()
    drawn = batches(source.views, source.cache, start, c.steps)
    for step in runs.progress("train_transformer", start, c.steps):
        rate = runs.learning_rate(step, c)
        mask_noise, drop_noise, code_noise = training_noise(config.data.seed, step, c.batch_size, N, D)
        inputs, index = next(drawn)
        mask = kind.random_mask(mask_noise)  # (B, N), m of the whole batch
        kept = drop_noise[rows, None] >= c.cond_dropout
        cond = conditions(source, c, index, config.data.seed, step).where(kept, transformer.null)  # (B', L)
        torch.manual_seed(int(np.random.default_rng([config.data.seed, step, 3, rank]).integers(2 ** 63)))
        batch = inputs, mask[rows], cond, code_noise[rows], mask.sum()
        terms, codes = gradients(forward, vae, c, batch, count, exact, dtype, device)
        terms["grad_norm"] = runs.clip(transformer.parameters(), c.grad_clip)
        stopping = runs.must_stop(stop, terms, step, states.good(step), "a lower transformer.lr")
        runs.take_step([opt], rate)
        if muon:
            runs.take_step([muon], rate * c.muon_lr / c.lr)
        runs.update_average(ema.parameters(), transformer.parameters(), c.weights_ema, step)

        # --- log, look, save --------------------------------------------------------------------------------
        done = step + 1
        last = done == c.steps
        look = done % c.picture_every == 0 or last
        save = done % c.save_every == 0 or last or stopping
        log.count(done)
        result = whole_ema() if look or save else None         # on rank 0
        if look or done % c.log_every == 0:
            by_depth = {name: runs.total(terms[name]) for name in ("loss", "accuracy")}
            by_depth |= runs.codebook_health(codes.flatten(0, 1), config.vae.codebook_size)
            val_loss = None
            if look and rank == 0:
                result.to(device)
                if source.val:
                    val_loss = validation_loss(result, kind.random_mask, *source.val, config.data.seed, dtype)
                picture = out / f"samples_{done:06d}.png"
                save_samples(result, kind.decode, vae, how, source.shown, device, dtype, picture)
                result.to("cpu" if c.shard else device)
            loss, norm = by_depth["loss"].double().mean().item(), terms["grad_norm"].item()
            log.write(done, by_depth, loss=loss, grad_norm=norm, lr=rate, val_loss=val_loss)
        if save:
            states.save(done)
            if rank == 0 and not stopping:
                drr.save_transformer(weights, result, config, source.classes, source.titles, vae)
        log.end_step(look)
        if stopping and not last:
            stop.leave(done)
    result = whole_ema()                     # also if nothing was left to train: with today's sampling values
    if rank == 0:
        drr.save_transformer(weights, result, config, source.classes, source.titles, vae)
    print(f"wrote {weights}")


if __name__ == "__main__":
    run(main)
