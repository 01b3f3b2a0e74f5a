"""Draft-and-Revise with Contextual RQ-Transformer (Lee et al., NeurIPS 2022, arXiv 2206.04452) in one file.

Read it from top to bottom; the sections follow the data:

    images -> codes         ResidualQuantizer, RQVAE: an image becomes N stacks of D codes (stage 1)
    codes  -> logits        ContextualRQTransformer: hidden stacks are predicted from the visible ones (stage 2)
    logits -> codes         partition, update, draft_and_revise: an empty map is drafted, then revised
    codes  -> images        RQVAE.decode

Symbols, everywhere in this project:

    B images of S x S pixels    N = H * W positions of the code map     D codes in a stack (`depth`)
    K codes in the codebook     n_z dimension of a code                 d_model width of the transformer
    codes (B, N, D) int64       mask (B, N) bool, True = hidden         cond (B, L) int64, the condition's tokens

"Eq." and "Alg." are those of the paper above; "RQ-VAE" is its predecessor, arXiv 2203.01941.
"""
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn


class UserError(Exception):
    """A mistake of the user's: one sentence saying what came, what was expected and how to mend it."""


# === Residual quantizer: z (..., n_z) -> codes (..., D), RQ-VAE Eq. 2-6 =============================================
class ResidualQuantizer(nn.Module):
    """Writes a vector as a sum of D codes of ONE codebook, each the nearest to what the earlier ones left over.

    D = 1 is the vector quantizer of VQ-VAE and VQGAN. The codebook learns by exponential moving averages
    (`update_codebook`), never by gradient. All arithmetic is float32, under autocast too.
    """

    def __init__(self, codebook_size, code_dim, depth, ema_decay):
        super().__init__()
        self.depth, self.ema_decay = depth, ema_decay
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))  # e(k), (K, n_z)
        # A count of 0 makes the first update restart every code from a vector of the first batch.
        self.register_buffer("cluster_size", torch.zeros(codebook_size))        # EMA of how often a code was chosen
        self.register_buffer("embed_sum", torch.zeros(codebook_size, code_dim)) # EMA of the sum of vectors it stood for

    def distances(self, residual):
        """Squared distances of residual (..., n_z) to every code, less ||residual||^2, which no comparison needs."""
        with torch.autocast(residual.device.type, enabled=False):
            codebook = self.codebook.float()
            flat = residual.float().reshape(-1, codebook.shape[1])
            d = torch.addmm(codebook.square().sum(1), flat, codebook.T, alpha=-2)   # ||e||^2 - 2 r.e, (P, K)
            return d.view(*residual.shape[:-1], -1)

    def quantize(self, z, temperature=0.0, uniforms=None):
        """Residual quantization of z (..., n_z).

        temperature 0 takes the nearest code at every depth. With a temperature > 0 the codes are drawn from
        `soft_codes` by inverting the CDF at `uniforms` (..., D) in [0, 1) ("stochastic codes", RQ-VAE section 3.2.3).
        Returns codes (..., D) int64 and the partial sums z_hat^(d) (..., D, n_z).
        """
        residual = z = z.detach().float()
        codes, partial_sums = [], []
        for d in range(self.depth):
            distances = self.distances(residual)
            # k_d = argmin_k || r_{d-1} - e(k) ||^2
            k = (distances.argmin(-1) if temperature == 0
                 else inverse_cdf(torch.softmax(-distances / temperature, -1), uniforms[..., d]))
            residual = residual - self.codebook[k]                                  # r_d = r_{d-1} - e(k_d)
            codes.append(k)
            partial_sums.append(z - residual)
        return torch.stack(codes, -1), torch.stack(partial_sums, -2)

    def soft_codes(self, z, codes, temperature):
        """softmax_k(-||r_{d-1} - e(k)||^2 / temperature) along the path of `codes` (..., D): (..., D, K)."""
        return torch.softmax(-self.distances(self.residuals(z, codes)) / temperature, -1)

    def residuals(self, z, codes):
        """What each depth had to quantize: r_0 .. r_{D-1} of z (..., n_z), as (..., D, n_z)."""
        partial_sums = self.embed(codes).cumsum(-2)
        return z.detach().float().unsqueeze(-2) - F.pad(partial_sums, (0, 0, 1, 0))[..., :-1, :]

    def embed(self, codes):
        """codes (...) -> their vectors (..., n_z)."""
        return F.embedding(codes, self.codebook)

    @torch.no_grad()
    def update_codebook(self, vectors, codes, generator=None):
        """One EMA step: `vectors` (P, n_z) were represented by `codes` (P,). All ranks must call it together.

        Codes whose average count falls under 1 restart from vectors of the batch drawn with `generator` (a CPU
        generator); None switches the restart off. Formula: van den Oord et al. 2017, appendix A.1, with Laplace
        smoothing.
        """
        # DEVIATION: the official code calls this after every depth, so that in training its z_q no longer belongs to
        # its own codes. One call a step, on the residuals of all depths together, is simpler and consistent.
        K, eps = len(self.codebook), 1e-5
        vectors = vectors.detach().float()
        count = torch.bincount(codes, minlength=K).float()
        total = torch.zeros_like(self.embed_sum).index_add_(0, codes, vectors)
        candidates = vectors
        if generator is not None:
            pick = torch.randint(len(vectors), (K,), generator=generator).to(vectors.device)
            jitter = torch.rand(K, vectors.shape[1], generator=generator).to(vectors.device)
            # A batch smaller than the codebook would restart codes as twins: move them apart a little.
            jitter *= 0.01 / math.sqrt(vectors.shape[1]) * (len(vectors) < K)
            candidates = vectors[pick] + jitter
        if dist.is_available() and dist.is_initialized():
            for tensor in (count, total):
                dist.all_reduce(tensor)
            dist.broadcast(candidates, src=0)   # every rank must restart the same codes from the same vectors
        self.cluster_size.lerp_(count, 1 - self.ema_decay)
        self.embed_sum.lerp_(total, 1 - self.ema_decay)
        if generator is not None:
            dead = self.cluster_size < 1
            self.cluster_size.masked_fill_(dead, 1)
            self.embed_sum[dead] = candidates[dead]
        n = self.cluster_size.sum()
        smoothed = n * (self.cluster_size + eps) / (n + K * eps)
        self.codebook.copy_(self.embed_sum / smoothed[:, None])


def inverse_cdf(probabilities, uniforms):
    """Draws an index from each row of probabilities (..., K) by inverting its CDF at uniforms (...) in [0, 1).

    The same uniform number gives the same index on every device and backend, up to rounding; an entry of probability
    0 is never drawn.
    """
    cdf = probabilities.cumsum(-1)
    index = torch.searchsorted(cdf, uniforms.unsqueeze(-1) * cdf[..., -1:], right=True).squeeze(-1)
    return torch.where(index < cdf.shape[-1], index, probabilities.argmax(-1))  # u * total may round up to the total


def codebook_usage(codes, codebook_size):
    """Health of the codebook per depth, for codes (..., D): usage (D,), the share of codes that occur at all, and
    perplexity (D,), exp of the entropy of their distribution (K if all are equally frequent)."""
    counts = torch.stack([torch.bincount(c, minlength=codebook_size) for c in codes.reshape(-1, codes.shape[-1]).T])
    p = counts / counts.sum(1, keepdim=True)
    return (counts > 0).float().mean(1), torch.exp(-torch.special.xlogy(p, p).sum(1))


# === RQ-VAE: images (B, 3, S, S) in [-1, 1] <-> codes (B, N, D) =====================================================
# Encoder and decoder are VQGAN's; the attribute names are those of the official state dict, so that it loads as it is.
def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of x (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))           # (B, H*W, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))     # one row below and one column at the right, as VQGAN does


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: res-blocks, each followed by attention if the level has it, then the resampling."""

    def __init__(self, widths, attention, resample):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(c) for c in widths[1:] if attention)
        for name, module in resample.items():        # {"downsample": ...}, {"upsample": ...} or nothing
            setattr(self, name, module)
        self.resample = tuple(resample)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in self.resample:
            x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResBlock(c, c), AttnBlock(c), ResBlock(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """images (B, 3, S, S) -> features (B, z_channels, S / f, S / f), f = 2^(levels - 1)."""

    def __init__(self, c):
        super().__init__()
        widths = [c.ch * m for m in c.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, c.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            inputs = widths[i - 1] if i else c.ch
            self.down.append(Level([inputs] + [width] * c.num_res_blocks, c.resolution >> i in c.attn_resolutions,
                                   {"downsample": Downsample(width)} if i < last else {}))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], c.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """features (B, z_channels, S / f, S / f) -> images (B, 3, S, S), not clamped."""

    def __init__(self, c):
        super().__init__()
        widths = [c.ch * m for m in c.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):           # up[i] works at resolution S / 2^i; the last level runs first
            inputs = widths[min(i + 1, last)]
            self.up.append(Level([inputs] + [width] * (c.num_res_blocks + 1), c.resolution >> i in c.attn_resolutions,
                                 {"upsample": Upsample(width)} if i else {}))
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class RQVAE(nn.Module):
    """Residual-Quantized VAE (RQ-VAE section 3.1). `c` is the section `vae` of a configuration."""

    def __init__(self, c):
        super().__init__()
        self.size = c.resolution
        self.side = c.resolution >> (len(c.ch_mult) - 1)        # H = W of the code map
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(c.z_channels, c.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.code_dim, c.z_channels, 1)
        self.quantizer = ResidualQuantizer(c.codebook_size, c.code_dim, c.depth, c.ema_decay)

    def encode_latent(self, images):
        """images (B, 3, S, S) in [-1, 1] -> z (B, N, n_z), positions in raster order."""
        return self.quant_conv(self.encoder(images)).flatten(2).transpose(1, 2)

    def decode_latent(self, z_hat):
        """z_hat (B, N, n_z), quantized or a partial sum -> images (B, 3, S, S), not clamped."""
        B, N, n_z = z_hat.shape
        side = math.isqrt(N)
        return self.decoder(self.post_quant_conv(z_hat.transpose(1, 2).reshape(B, n_z, side, side)))

    def encode(self, images):
        """images (B, 3, S, S) in [-1, 1] -> codes (B, N, D)."""
        return self.quantizer.quantize(self.encode_latent(images))[0]

    def decode(self, codes):
        """codes (B, N, D) -> images (B, 3, S, S), not clamped."""
        return self.decode_latent(self.quantizer.embed(codes).sum(-2))

    def forward(self, images):
        """A training pass: reconstructions (B, 3, S, S), commitment loss (scalar), z (B, N, n_z), codes (B, N, D)."""
        z = self.encode_latent(images).float()
        codes, partial_sums = self.quantizer.quantize(z)
        # L_commit = mean_d || z - sg[ z_hat^(d) ] ||^2, every partial sum and not only the last (RQ-VAE Eq. 8)
        commitment = (z.unsqueeze(-2) - partial_sums).square().mean()
        z_hat = z + (partial_sums[..., -1, :] - z).detach()     # straight through: the gradient of z_hat goes to z
        return self.decode_latent(z_hat), commitment, z, codes


# === Checkpoints: safetensors that carry their configuration ========================================================
def save_vae(path, vae, config):
    """Writes the RQ-VAE and the configuration's section `vae`, all or nothing."""
    save_model(path, vae.state_dict(), {"vae": vars(config.vae)})


def save_model(path, tensors, meta):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary,
                  {"drr": json.dumps(meta)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_model(path):
    """(tensors, meta) of a file that `save_model` wrote. Raises UserError for anything else; executes nothing."""
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
        return load_file(path), json.loads(meta["drr"])
    except FileNotFoundError:
        raise UserError(f"The checkpoint {path} does not exist; train one or give --checkpoint a folder that has it.") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint of this project, or a damaged one ({type(error).__name__}: {error}); "
                        "copy or train it again.") from None


def fill(module, tensors, path, **options):
    """Strict load_state_dict with one sentence for an error."""
    try:
        module.load_state_dict(tensors, **options)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"The weights in {path} belong to another architecture than its configuration: {first}") from None


def save_state(path, parts, step, section):
    """Everything a resumed run needs: the state of each part (module, optimizer or None), the step, the configuration."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        torch.save({"step": step, "config": vars(section), **states}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path, parts, section):
    """Restores `parts` from `save_state` and returns the step. Raises UserError when the file or the fit is missing."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is nothing to resume: {path} does not exist; start without --resume.") from None
    except Exception as error:                       # truncated, no torch file, or a pickle with code in it
        raise UserError(f"{path} is damaged or no training state ({type(error).__name__}); start without --resume.") from None
    changed = [k for k, v in vars(section).items() if state["config"].get(k) != v]
    if changed:
        print(f"resuming with other values than before: {', '.join(changed)}")
    for name, part in parts.items():
        if part is not None and name in state:
            fill(part, state[name], path) if isinstance(part, nn.Module) else part.load_state_dict(state[name])
    return state["step"]
