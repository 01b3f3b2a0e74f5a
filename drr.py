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
import contextlib
import hashlib
import json
import math
import os
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


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
        """Residual quantization of z (..., n_z) into the nearest code at every depth.

        With a temperature > 0 (transformer.stochastic_codes) the codes are drawn from `soft_codes` instead, by inverting
        the CDF at `uniforms` (..., D) in [0, 1) ("stochastic codes", RQ-VAE section 3.2.3).
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
        count = torch.bincount(codes, minlength=K).float()                          # (K,)
        total = torch.zeros_like(self.embed_sum).index_add_(0, codes, vectors)      # (K, n_z)
        rank, world = ranks()
        if generator is not None:
            # Every rank restarts the same codes from the same vectors, those that one process with the whole batch would
            # take: rank r holds the vectors r P .. r P + P - 1, gives those of them that are picked, and the sum has all.
            P = len(vectors)
            source = torch.randint(world * P, (K,), generator=generator).to(vectors.device)
            candidates = vectors[source % P] * (source // P == rank)[:, None]       # (K, n_z)
            if world > 1:
                dist.all_reduce(candidates)
            if world * P < K:                               # more codes than vectors, so twins: move them apart a little
                jitter = torch.rand(candidates.shape, generator=generator).to(vectors.device)
                candidates += jitter * (0.01 / math.sqrt(vectors.shape[1]))
        if world > 1:
            for tensor in (count, total):
                dist.all_reduce(tensor)
        self.cluster_size.lerp_(count, 1 - self.ema_decay)
        self.embed_sum.lerp_(total, 1 - self.ema_decay)
        if generator is not None:
            dead = self.cluster_size < 1
            self.cluster_size.masked_fill_(dead, 1)
            self.embed_sum.copy_(torch.where(dead[:, None], candidates, self.embed_sum))
        n = self.cluster_size.sum()
        smoothed = n * (self.cluster_size + eps) / (n + K * eps)
        self.codebook.copy_(self.embed_sum / smoothed[:, None])


def ranks():
    """(rank, world size): which of how many processes this is, under torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def inverse_cdf(p, uniforms):
    """Draws an index from each row of probabilities p (..., K) by inverting its CDF at uniforms (...) in [0, 1).

    The same uniform number gives the same index on every device and backend, up to rounding; an entry of probability
    0 is never drawn.
    """
    cdf = p.cumsum(-1)
    index = torch.searchsorted(cdf, uniforms.unsqueeze(-1) * cdf[..., -1:], right=True).clamp(max=cdf.shape[-1] - 1)
    # Rounding (u * total up to the total, a parallel sum that is not monotone) may hit an entry that was cut off.
    drawn = p.gather(-1, index).squeeze(-1)
    return torch.where(drawn > 0, index.squeeze(-1), p.argmax(-1))


def codebook_usage(codes, codebook_size):
    """Health of the codebook per depth, for codes (..., D): usage (D,), the share of codes that occur at all, and
    perplexity (D,), exp of the entropy of their distribution (K if all are equally frequent)."""
    counts = torch.stack([torch.bincount(c, minlength=codebook_size) for c in codes.reshape(-1, codes.shape[-1]).T])
    p = counts / counts.sum(1, keepdim=True)
    return (counts > 0).float().mean(1), torch.exp(-torch.special.xlogy(p, p).sum(1))


# === RQ-VAE: images (B, 3, S, S) in [-1, 1] <-> codes (B, N, D) =====================================================
# Encoder and decoder are VQGAN's; the attribute names are those of the official state dict, so that it loads as it is.
def group_norm(channels):
    if channels % 32:
        raise UserError(f"A layer of {channels} channels has no 32 groups; vae.ch times each of vae.ch_mult must be a "
                        "multiple of 32.")
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


SHORT = 16          # tokens: attention among no more of them is written out in training, on a GPU too


def attention(q, k, v, causal=False):
    """softmax(q k^T / sqrt(c)) v for q, k, v (..., T, c); causal: a token sees itself and earlier ones.

    Written out for ONNX, which has no fused kernel, and for training where PyTorch's is no good backward: on a CPU it is slow
    (docs/speed.md), on a GPU it pads a stack's few tokens to 128.
    """
    written_out = torch.compiler.is_exporting() or torch.is_grad_enabled() and not (q.is_cuda and q.shape[-2] > SHORT)
    if not written_out:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)                                      # (..., T, T)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of x (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))           # (B, H*W, C)
        return x + self.proj_out(attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """(B, c, H, W) -> (B, c, H / 2, W / 2)."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))     # one row below and one column at the right, as VQGAN does


class Upsample(nn.Module):
    """(B, c, H, W) -> (B, c, 2 H, 2 W)."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: res-blocks, each followed by attention if the level has it, then the resampling."""

    def __init__(self, widths, attend, downsample=None, upsample=None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(c) for c in widths[1:] if attend)
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


class Middle(nn.Module):
    """(B, c, H, W) -> (B, c, H, W)."""

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
                                   downsample=Downsample(width) if i < last else None))
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
                                 upsample=Upsample(width) if i else None))
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
        f = 2 ** (len(c.ch_mult) - 1)
        if c.resolution % f:
            raise UserError(f"vae.resolution {c.resolution} is no multiple of {f}, the reduction of vae.ch_mult's "
                            f"{len(c.ch_mult)} levels; change one of them.")
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

    def forward(self, images, quantized=True):
        """A training pass: reconstructions (B, 3, S, S), commitment loss (scalar), z (B, N, n_z), codes (B, N, D).
        Not `quantized`, the decoder sees z itself, as in a plain autoencoder."""
        z = self.encode_latent(images).float()
        codes, partial_sums = self.quantizer.quantize(z)
        # L_commit = || z - sg[ z_hat^(d) ] ||^2 / n_z, the mean over d: every partial sum and not only the last (RQ-VAE Eq. 8)
        commitment = (z.unsqueeze(-2) - partial_sums).square().mean()
        z_hat = z + (partial_sums[..., -1, :] - z).detach()     # straight through: the gradient of z_hat goes to z
        return self.decode_latent(z_hat if quantized else z), commitment, z, codes


@torch.no_grad()
def reconstructions(vae, images):
    """images (B, 3, S, S) -> (B * (1 + D), 3, S, S): each original, then its decodes from depths 1 .. D."""
    _, partial_sums = vae.quantizer.quantize(vae.encode_latent(images))             # (B, N, D, n_z)
    return torch.stack([images, *(vae.decode_latent(p) for p in partial_sums.unbind(-2))], 1).flatten(0, 1)


# === Contextual RQ-Transformer: codes (B, N, D), mask (B, N) -> context (B, N, d_model) -> logits (P, D, K) ==========
class Block(nn.Module):
    """A pre-LayerNorm transformer block, x (B, T, d_model) -> the same; 12 d^2 + 13 d parameters."""

    def __init__(self, d_model, head_dim):
        super().__init__()
        self.heads = d_model // head_dim
        self.ln1, self.ln2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x, causal=False, cache=None, position=0, wanted=None):
        """With `cache` (2, B, heads, D, head_dim), x (B, 1, d_model) is the token at `position`: its key and value are
        written there and it sees the positions up to its own. With `wanted` (B, n) only these tokens come out,
        (B, n, d_model): they look at all of x, but what nobody asks for is not computed."""
        d = x.shape[-1]
        split = lambda y: y.unflatten(-1, (-1, d // self.heads)).transpose(1, 2)     # (B, T, c d) -> (B, c heads, T, head_dim)
        y = self.ln1(x)
        if wanted is None:
            q, k, v = split(self.qkv(y)).chunk(3, 1)
        else:
            (w_q, w_kv), (b_q, b_kv) = (t.split([d, 2 * d]) for t in (self.qkv.weight, self.qkv.bias))
            q = split(F.linear(select(y, wanted), w_q, b_q))
            k, v = split(F.linear(y, w_kv, b_kv)).chunk(2, 1)
            x = select(x, wanted)
        if cache is not None:
            cache[0, :, :, position], cache[1, :, :, position] = k[:, :, 0], v[:, :, 0]
            k, v = cache[:, :, :, :position + 1].unbind()
        a = attention(q, k, v, causal)
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


def select(x, positions):
    """x (B, T, c), positions (B, n) -> x at these positions, (B, n, c)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class ContextualRQTransformer(nn.Module):
    """Predicts hidden code stacks from the visible ones: bidirectional over space, causal over depth (section 3.2).

    c            the section `transformer` of a configuration
    conditions   number of classes (of text tokens); one more embedding is the null condition. 1 for `cond: none`,
                 whose one token is always 0
    positions, codebook (K, n_z), depth   N, the frozen codebook of the RQ-VAE, and D
    """

    def __init__(self, c, conditions, positions, depth, codebook):
        super().__init__()
        if c.d_model % c.head_dim:
            raise UserError(f"transformer.d_model {c.d_model} is no multiple of transformer.head_dim {c.head_dim}; change one of "
                            "them.")
        d, (K, n_z) = c.d_model, codebook.shape
        self.depth, self.positions, self.heads, self.head_dim = depth, positions, d // c.head_dim, c.head_dim
        self.cond_length = c.text_length if c.cond == "text" else 1
        self.recompute = False                  # in training: activations are computed again instead of kept
        self.null = 0 if c.cond == "none" else conditions                   # the null condition's id
        self.register_buffer("codebook", codebook.clone(), persistent=False)   # stage 1's; stored only there
        self.mask_embed = nn.Parameter(torch.zeros(n_z))                    # e_[MASK]
        self.w_in = nn.Linear(n_z, d)
        self.pos = nn.Parameter(torch.zeros(positions, d))                  # PE_N
        self.cond_embed = nn.Embedding(self.null + 1, d)
        self.cond_pos = nn.Parameter(torch.zeros(self.cond_length, d))
        self.spatial = nn.ModuleList(Block(d, c.head_dim) for _ in range(c.n_spatial))
        self.w_depth = nn.Linear(n_z, d) if depth > 1 else None
        self.depth_pos = nn.Parameter(torch.zeros(depth, d))                # PE_D
        self.depthwise = nn.ModuleList(Block(d, c.head_dim) for _ in range(c.n_depth))
        self.ln, self.classifier = nn.LayerNorm(d), nn.Linear(d, K)
        for name, p in self.named_parameters():                             # N(0, 0.02), as GPT-2 begins
            if p.dim() == 1 and name != "mask_embed":
                continue                                                    # LayerNorm keeps 1 and 0 ...
            nn.init.normal_(p, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)                                      # ... and biases start at 0

    def context(self, codes, mask, cond, positions=None):
        """h (B, N, d_model) from codes (B, N, D), mask (B, N) (True = hidden: those codes have no influence) and
        cond (B, L) (Eq. 6-7). With positions (B, n) only theirs, (B, n, d_model): the last block's queries and MLP, 10 of
        its 12 d^2 multiplications a token, are left out for all others."""
        e = F.embedding(codes, self.codebook).sum(2)                        # (B, N, n_z): one vector a stack
        u = torch.where(mask[..., None], self.mask_embed.to(e.dtype), e)
        x = torch.cat([self.cond_embed(cond) + self.cond_pos, self.w_in(u) + self.pos], 1)     # (B, L + N, d)
        if positions is None:
            return self.through(self.spatial, x)[:, self.cond_length:]
        return self.spatial[-1](self.through(self.spatial[:-1], x), wanted=positions + self.cond_length)

    def depth_logits(self, h, stacks):
        """Teacher-forced logits (P, D, K) of stacks (P, D) at positions with contexts h (P, d_model) (Eq. 8-9)."""
        v = h[:, None]                                                      # v_1 = h + PE_D(1)
        if self.depth > 1:                                                  # v_d = W sum_{d' < d} e(S_d') + PE_D(d)
            sums = F.embedding(stacks[:, :-1], self.codebook).cumsum(1)
            v = torch.cat([v, self.w_depth(sums)], 1)
        v = self.through(self.depthwise, v + self.depth_pos, causal=True)
        return self.classifier(self.ln(v))

    def through(self, blocks, x, causal=False):
        for block in blocks:
            x = checkpoint(block, x, causal, use_reentrant=False) if self.recompute and self.training else block(x, causal)
        return x

    def depth_step(self, h, stacks, d, cache=None):
        """Logits (P, K) of depth d alone, given the d codes chosen so far, stacks[:, :d]; what `depth_logits` says, one
        depth at a time. cache (n_depth, 2, P, heads, D, head_dim) is None at d = 0. Returns logits, cache."""
        if d == 0:
            cache = h.new_empty(len(self.depthwise), 2, len(h), self.heads, self.depth, self.head_dim)
        v = h if d == 0 else self.w_depth(F.embedding(stacks[:, :d], self.codebook).sum(1))
        v = (v + self.depth_pos[d])[:, None]                                # (P, 1, d_model)
        for block, block_cache in zip(self.depthwise, cache):
            v = block(v, cache=block_cache, position=d)
        return self.classifier(self.ln(v[:, 0])), cache

    def forward(self, codes, mask, cond, targets=None):
        """A training pass, `masked_loss`: what DistributedDataParallel and FSDP wrap."""
        return masked_loss(self, codes, mask, cond, targets)


# === Masked code-stack modelling (section 3.3) ======================================================================
def random_mask(uniforms):
    """Training masks (B, N) from uniforms (B, 1 + N) in [0, 1): r is the first number, |m| = ceil(cos(pi r / 2) N)
    positions are hidden, those where the other numbers are smallest (Eq. 10-11)."""
    N = uniforms.shape[1] - 1
    hidden = torch.ceil(torch.cos(math.pi / 2 * uniforms[:, :1]) * N)                       # (B, 1), 1 .. N
    return uniforms[:, 1:].argsort(1).argsort(1) < hidden


def masked_loss(transformer, codes, mask, cond, targets=None):
    """Cross-entropy (D,) in nats and accuracy (D,) per depth, over the hidden stacks only (Eq. 12): against the codes, or
    against `targets` (P, D, K), distributions for the P hidden stacks ("soft labels", RQ-VAE section 3.2.3)."""
    h = transformer.context(codes, mask, cond)
    stacks = codes[mask]                                                    # (P, D)
    logits = transformer.depth_logits(h[mask], stacks).float()              # (P, D, K)
    wanted = stacks if targets is None else targets
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1), reduction="none").view_as(stacks).mean(0)
    return loss, (logits.argmax(-1) == stacks).float().mean(0)


# === Draft-and-Revise (section 3.3): noise -> codes (B, N, D) ===============================================
class Sampling(NamedTuple):
    """How a code is drawn from its logits: softmax(logits / temperature), of that the `top_k` most likely codes
    (0: all), of those the fewest that hold `top_p` of the probability (1: all). `guidance` 1 is none."""
    temperature: float
    guidance: float
    top_k: int
    top_p: float


class State(NamedTuple):
    """The map after an update."""
    phase: str              # "draft" or "revise"
    round: int              # 0 in the draft, 1 .. M in the revisions
    codes: torch.Tensor     # (B, N, D)
    hidden: torch.Tensor    # (B, N) bool
    log_p: torch.Tensor     # (B, N): the log-probability with which each stack was drawn, 0 where none was


def draw_noise(seed, images, rounds, positions, depth):
    """Everything random in a decode, drawn before it begins from (seed, index of the image) alone: image i of a seed
    is the same in any batch and on any backend, up to rounding.

    images: the B indices; rounds: 1 + M. Returns order (rounds, B, N), a random order of the positions for each
    round, and uniforms (rounds, B, N, D) in [0, 1), one number for each code and round.
    """
    order = np.empty((rounds, len(images), positions), np.int64)
    uniforms = np.empty((rounds, len(images), positions, depth), np.float32)
    for b, i in enumerate(images):
        rng = np.random.default_rng([seed, i])
        for r in range(rounds):
            order[r, b] = rng.permutation(positions)
            uniforms[r, b] = rng.random((positions, depth), np.float32)
    return torch.from_numpy(order), torch.from_numpy(uniforms)


def partition(order, T):
    """p(Pi; T): T disjoint sets m^1 .. m^T that cover the positions in `order` (B, n), as random as the order is.

    Returns indices (B, n_t) for t = 1 .. T. Sizes differ by at most one; at most n sets, so that none is empty.
    """
    n = order.shape[1]
    return list(order.tensor_split(min(T, n), dim=1))


def probabilities(logits, sampling):
    """logits (P, K) -> probabilities (P, K); what top_k and top_p cut off is 0, and the rest need not sum to 1."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]             # (P, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        ranked, index = p.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked               # the probability of all codes that are more likely
        p = p.scatter(-1, index, ranked.masked_fill(before >= sampling.top_p, 0))
    return p


def guided_context(model, codes, hidden, cond, positions, guidance):
    """Contexts of the stacks at `positions` (B, n), from codes (B, N, D), hidden (B, N) and cond (B, L).

    Returns (B n, d_model); with guidance (2 B n, d_model), under the condition and then under the null condition:
    the batch doubles here and nowhere else.
    """
    inputs = codes, hidden, cond, positions
    if guidance != 1:
        null_inputs = codes, hidden, torch.full_like(cond, model.null), positions
        inputs = [torch.cat(pair) for pair in zip(inputs, null_inputs)]
    return model.context(*inputs).flatten(0, 1)


def code_probabilities(model, h, stacks, d, cache, sampling):
    """p(S_nd | S_n,<d, S\\m) (P, K), up to a factor, for contexts h from `guided_context` and the stacks' codes
    before depth d, stacks (len(h), D)[:, :d]. Returns it and the cache of `depth_step`."""
    logits, cache = model.depth_step(h, stacks, d, cache)
    logits = logits.float()
    if sampling.guidance != 1:                              # l = l_null + s (l_cond - l_null)
        conditional, null = logits.chunk(2)                                                 # (P, K) each
        logits = null + sampling.guidance * (conditional - null)
    return probabilities(logits, sampling), cache


def sample_stacks(model, h, uniforms, sampling):
    """Draws P stacks depth by depth, for contexts h from `guided_context` and uniforms (P, D).

    Returns the stacks (P, D) and their log-probabilities (P,): log p(S_n) = sum_d log p(S_nd | S_n,<d).
    """
    P, D = uniforms.shape
    stacks = torch.zeros(len(h), D, dtype=torch.int64, device=h.device)    # with guidance both halves are equal
    log_p = torch.zeros(P, device=h.device)
    cache = None
    for d in range(D):
        p, cache = code_probabilities(model, h, stacks, d, cache, sampling)                 # (P, K)
        k = inverse_cdf(p, uniforms[:, d])
        log_p += (p.gather(1, k[:, None])[:, 0] / p.sum(1)).log()
        stacks[:, d] = k.repeat(len(h) // P)
    return stacks[:P], log_p


def update(model, state, positions, uniforms, cond, sampling):
    """UPDATE (Alg. 1) for one set m^t of a partition: hides its stacks and draws them anew, given all visible ones.

    positions (B, n): the set; uniforms (B, N, D); cond (B, L). Returns the State afterwards, in which the set is
    visible; all other stacks stay as they were. One pass of the spatial transformer, D of the depth transformer.
    """
    B, n = positions.shape
    hidden = state.hidden.scatter(1, positions, True)                      # S\m: without the stacks in m^t
    h = guided_context(model, state.codes, hidden, cond, positions, sampling.guidance)
    stacks, log_p = sample_stacks(model, h, select(uniforms, positions).flatten(0, 1), sampling)
    stacks = stacks.view(B, n, -1)                                         # S_n ~ p(S_n | S\m), n in m^t, in parallel
    codes = state.codes.scatter(1, positions[..., None].expand_as(stacks), stacks)
    hidden = hidden.scatter(1, positions, False)
    log_p = state.log_p.scatter(1, positions, log_p.view(B, n))
    return state._replace(codes=codes, hidden=hidden, log_p=log_p)


def first_state(cond, noise, codes=None, region=None):
    """What is there before the first update: the State with all stacks of the region hidden (without a region all
    stacks, S^empty), the region's positions in the random order of each round (B, n), and the uniforms."""
    assert (codes is None) == (region is None)
    order, uniforms = (tensor.to(cond.device) for tensor in noise)
    B, N, D = uniforms.shape[1:]
    if region is None:
        codes = cond.new_zeros(B, N, D)
        region = torch.ones(N, dtype=torch.bool, device=cond.device)
    orders = [o[region[o]].view(B, -1) for o in order]
    log_p = torch.zeros(B, N, device=cond.device)
    return State("draft", 0, codes, region.expand(B, N), log_p), orders, uniforms


@torch.inference_mode()
def draft_and_revise(model, cond, noise, c, codes=None, region=None, update=update):
    """Draft-and-Revise decoding (Alg. 2): drafts an empty map in T_draft updates, then revises all of it M times.

    model    has `context`, `depth_step` and `null`, as TorchModel does
    cond     (B, L) int64
    noise    what `draw_noise` returns, for at least 1 + M rounds
    c        the section `sample` of a configuration
    codes (B, N, D) and region (N,) bool, both or neither: in-painting; only the stacks of the region are drawn
    update   the function above, or one that does the same faster (support/fast.py)
    Yields the State after every update; the codes of the last one are the result.
    """
    state, orders, uniforms = first_state(cond, noise, codes, region)

    sampling = Sampling(c.draft_temperature, c.draft_guidance, c.top_k, c.top_p)
    for positions in partition(orders[0], c.t_draft):             # S^0 = UPDATE(S^empty, Pi), Eq. 13: the sets to
        state = update(model, state, positions, uniforms[0], cond, sampling)          # come are still hidden
        yield state

    sampling = Sampling(c.revise_temperature, c.revise_guidance, c.top_k, c.top_p)
    for m in range(1, 1 + c.rounds):                              # S^m = UPDATE(S^m-1, Pi), Eq. 14: only the current
        state = state._replace(phase="revise", round=m)           # set is hidden, the others are all drawn by now
        for positions in partition(orders[m], c.t_revise):
            state = update(model, state, positions, uniforms[m], cond, sampling)
            yield state


def sample(model, cond, seed, images, c, codes=None, region=None, update=update):
    """Codes (B, N, D) of the images number `images` of a seed: draws the noise, runs the loop and keeps the last."""
    noise = draw_noise(seed, images, 1 + c.rounds, model.positions, model.depth)
    *_, last = draft_and_revise(model, cond, noise, c, codes, region, update)
    return last.codes


class TorchModel:
    """The networks as the decoding loop sees them; backends.ExportedModel takes its place by having the same.

    context(codes (B, N, D), mask (B, N), cond (B, L), positions (B, n) or None) -> h (B, n or N, d_model)
    depth_step(h (P, d_model), stacks (P, D), d, cache) -> logits (P, K), cache (opaque; None comes in at d = 0)
    decode(codes (B, N, D)) -> float32 images (B, 3, S, S), not clamped
    encode(images (B, 3, S, S) in [-1, 1]) -> codes (B, N, D)
    size, side, positions, depth, null   S, H = W, N, D, and the null condition's id

    Moves and converts, in place, the modules that it is given.
    """

    def __init__(self, vae, transformer, device, dtype):
        # The RQ-VAE's weights stay float32; on a CPU its convolutions are a fifth faster with the channels innermost.
        self.vae = vae.to(device, memory_format=torch.channels_last).eval()
        self.half = device.type == "cuda" and dtype != torch.float32
        self.transformer = transformer.to(device, dtype).eval()
        self.size, self.side = vae.size, vae.side
        self.null, self.positions, self.depth = transformer.null, transformer.positions, transformer.depth

    @torch.inference_mode()
    def context(self, codes, mask, cond, positions=None):
        return self.transformer.context(codes, mask, cond, positions)

    @torch.inference_mode()
    def depth_step(self, h, stacks, d, cache):
        return self.transformer.depth_step(h, stacks, d, cache)

    @torch.inference_mode()
    def decode(self, codes):
        # Where the transformer may be bf16 on a GPU, the decoder runs in float16: nearer than bf16 (docs/speed.md).
        with torch.autocast(codes.device.type, torch.float16, enabled=self.half):
            # One picture is decoded beside itself: alone, a convolution may add up in another order than among others.
            images = self.vae.decode(codes.repeat(2, 1, 1) if len(codes) == 1 else codes)
        return images[:len(codes)].float()

    @torch.inference_mode()
    def encode(self, images):
        return self.vae.encode(images)


# === Checkpoints: safetensors that carry their configuration ========================================================
@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path beside `path` to write to, and moves it there only when all of it has been written. The body
    should do nothing else: raises UserError when the disk is full or the place cannot be written to; what was there before stays."""
    path = Path(path)
    temporary = path.with_name(f".writing-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())                     # on the disk before it takes the place of the old one
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:      # torch.save turns a full disk into a RuntimeError
        raise UserError(f"{path} could not be written ({error}); free some space or choose another place.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_vae(path, vae, config, former=()):
    """Writes the RQ-VAE and the configuration's section `vae`, all or nothing. `former`: fingerprints under which older
    transformers may know these codes."""
    save_model(path, vae.state_dict(), {"vae": vars(config.vae), "former": list(former)})


def save_transformer(path, transformer, config, classes, titles, vae):
    """Writes the transformer, its configuration, the classes' folder names and titles, and whose codes it speaks."""
    tensors = {k: v.half() if config.transformer.half else v for k, v in transformer.state_dict().items()}
    save_model(path, tensors, {"transformer": vars(config.transformer), "sample": vars(config.sample),
                               "classes": classes, "titles": titles, "vae": code_fingerprint(vae)})


def fingerprint(module, prefixes=("",)):
    """SHA-256 over a module's weights whose names begin with one of `prefixes`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_fingerprint(vae):
    """SHA-256 over what makes codes: two RQ-VAEs with the same one speak the same codes, whatever their decoders."""
    return fingerprint(vae, ("encoder.", "quant_conv.", "quantizer.codebook"))


def former_fingerprints(path, vae):
    """The fingerprints under which a transformer may know the codes of `vae`, which was read from `path`, if it is older than
    `code_fingerprint`: of all weights, and those that the file lists because its decoder has changed since."""
    return [fingerprint(vae), *read_model(path)[1].get("former", [])]


def load_vae(path):
    """The RQ-VAE in `path` (float32, on the CPU), and its section `vae`. Raises UserError for a file that is missing,
    damaged, or not an RQ-VAE of this project."""
    tensors, meta = read_model(path)
    c = section(meta, "vae", path)
    vae = build(path, RQVAE, c)
    fill(vae, tensors, path)
    return vae.requires_grad_(False).eval(), c


def load_checkpoint(directory):
    """The model in `directory`: vae.safetensors and transformer.safetensors, as train_vae.py and train_transformer.py
    write them. Returns vae, transformer (float32, on the CPU) and info: the configuration's sections `vae`,
    `transformer`, `sample`, and `classes` and `titles` in the order of their indices. Raises UserError as `load_vae`
    does, and when the two belong to different trainings."""
    if not Path(directory).is_dir():
        raise UserError(f"The checkpoint folder {directory} does not exist; give --checkpoint a folder with "
                        "vae.safetensors and transformer.safetensors, for example runs/PRESET.")
    vae, vae_section = load_vae(Path(directory) / "vae.safetensors")
    path = Path(directory) / "transformer.safetensors"
    tensors, meta = read_model(path)
    info = SimpleNamespace(vae=vae_section, transformer=section(meta, "transformer", path),
                           sample=section(meta, "sample", path), classes=meta.get("classes"), titles=meta.get("titles"))
    names = [len(n) for n in (info.classes, info.titles) if isinstance(n, list) and all(isinstance(text, str) for text in n)]
    if len(names) != 2 or names[0] != names[1]:
        raise UserError(f"{path} carries no names of its classes, each with a title; copy or train it again.")
    vae_path = path.with_name("vae.safetensors")
    if meta.get("vae") not in (code_fingerprint(vae), *former_fingerprints(vae_path, vae)):
        raise UserError(f"{path} was trained on the codes of another RQ-VAE than {vae_path}; "
                        "keep the two files of one training together.")
    transformer = build(path, lambda c: ContextualRQTransformer(c, conditions(c, info.classes), vae.side ** 2,
                                                                info.vae.depth, vae.quantizer.codebook), info.transformer)
    fill(transformer, tensors, path)
    return vae, transformer.requires_grad_(False).eval(), info


def section(meta, name, path):
    if not isinstance(meta.get(name), dict):
        raise UserError(f"{path} carries no configuration of a {name}; is it another file under that name?")
    return SimpleNamespace(**meta[name])


def build(path, constructor, c):
    try:
        return constructor(c)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"The configuration that {path} carries is not one of this version ({error}).") from None


def conditions(c, classes):
    """How many conditions a transformer with section `c` knows, the null condition not counted."""
    return {"class": len(classes), "text": c.text_vocab, "none": 1}[c.cond]


def save_model(path, tensors, meta):
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"drr": json.dumps(meta)})
        temporary.chmod(0o644)                       # safetensors writes files that only their owner can read


def read_model(path):
    """(tensors, meta) of a file that `save_model` wrote. Raises UserError for anything else; executes nothing."""
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {})["drr"])
        if not isinstance(meta, dict):
            raise ValueError("its description is no table")
        tensors = load_file(path)
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
        if broken:
            raise ValueError(f"{broken[0]} holds numbers that are not finite")
        return tensors, meta
    except FileNotFoundError:
        raise UserError(f"The checkpoint {path} does not exist; train it or name a folder that has it.") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint of this project, or a damaged one ({type(error).__name__}: {error}); "
                        "copy or train it again.") from None


def fill(module, tensors, path):
    """load_state_dict, strict, with one sentence for an error."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"The weights in {path} belong to another architecture than expected: {first}") from None
