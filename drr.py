"""Draft-and-Revise with Contextual RQ-Transformer (Lee et al., NeurIPS 2022, arXiv 2206.04452) in one file.

Read it from top to bottom; the sections follow the data:
    images -> codes      ResidualQuantizer, RQVAE: an image becomes N stacks of D codes (stage 1)
    codes  -> logits     ContextualRQTransformer: hidden stacks are predicted from the visible ones (stage 2)
    logits -> codes      partition, update, draft_and_revise: an empty map is drafted, then revised
    codes  -> images     RQVAE.decode

Symbols, everywhere in this project:
    B images of S x S pixels    N = H * W positions of the code map    D codes in a stack (`depth`)
    K codes in the codebook     n_z dimension of a code                d_model width of the transformer
    P stacks of a batch         codes (B, N, D) int64                  mask (B, N) bool, True = hidden
    cond (B, L) int64, the tokens of the condition                     c one section of the configuration

"Eq." and "Alg." are those of the paper above, "RQ-VAE" is its predecessor, arXiv 2203.01941. In equations
S_nd is code d of stack n, S\\m the stacks that the mask m leaves visible, and sg[.] stops the gradient."""
import contextlib
import hashlib
import json
import math
import os
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


# === Residual quantizer: z (..., n_z) -> codes (..., D), Eq. 2-3 ============================================
class ResidualQuantizer(nn.Module):
    """Writes a vector as a sum of D codes of ONE codebook, each the nearest to what the earlier ones left.
    The codebook learns by moving averages, never by gradient. All arithmetic is float32."""

    def __init__(self, codebook_size, code_dim, depth, ema_decay):
        super().__init__()
        self.depth, self.ema_decay = depth, ema_decay
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))     # e(k), (K, n_z)
        # Moving averages of how often a code was chosen, and of the sum of the vectors that chose it. A count
        # of 0 makes the first update restart every code from a vector of the first batch.
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed_sum", torch.zeros(codebook_size, code_dim))

    def distances(self, residual):
        """|| r - e(k) ||^2 - || r ||^2 (..., K) of r (..., n_z): enough to compare the codes."""
        with torch.autocast(residual.device.type, enabled=False):
            codebook = self.codebook.float()
            flat = residual.float().reshape(-1, codebook.shape[1])                 # (P, n_z)
            d = torch.addmm(codebook.square().sum(1), flat, codebook.T, alpha=-2)  # || e(k) ||^2 - 2 r . e(k)
            return d.view(*residual.shape[:-1], -1)

    def quantize(self, z, temperature=0.0, uniforms=None):
        """Residual quantization of z (..., n_z): codes (..., D) and partial sums z_hat^(d) (..., D, n_z).
        With a temperature codes are drawn from `soft_codes`, by uniforms (..., D) (RQ-VAE section 3.2.3)."""
        z = z.detach().float()
        residual = z                                                # r_0 = z
        codes, partial_sums = [], []
        for d in range(self.depth):
            distances = self.distances(residual)                    # (..., K)
            if temperature == 0:
                k = distances.argmin(-1)                            # k_d = argmin_k || r_{d-1} - e(k) ||^2
            else:
                k = inverse_cdf(torch.softmax(-distances / temperature, -1), uniforms[..., d])
            residual = residual - self.codebook[k]                  # r_d = r_{d-1} - e(k_d)
            codes.append(k)
            partial_sums.append(z - residual)                       # z_hat^(d) = sum_{i<=d} e(k_i) = z - r_d
        return torch.stack(codes, -1), torch.stack(partial_sums, -2)

    def soft_codes(self, z, codes, temperature):
        """softmax_k(-|| r_{d-1} - e(k) ||^2 / temperature) (..., D, K) along the path of `codes` (..., D)."""
        return torch.softmax(-self.distances(self.residuals(z, codes)) / temperature, -1)

    def residuals(self, z, codes):
        """What each depth had to quantize: r_0 .. r_{D-1} of z (..., n_z), as (..., D, n_z)."""
        partial_sums = self.embed(codes).cumsum(-2)                                # z_hat^(1) .. z_hat^(D)
        before = F.pad(partial_sums, (0, 0, 1, 0))[..., :-1, :]                    # 0 .. z_hat^(D-1)
        return z.detach().float().unsqueeze(-2) - before

    def embed(self, codes):
        """codes (...) -> their vectors e(k) (..., n_z)."""
        return F.embedding(codes, self.codebook)

    @torch.no_grad()
    def update_codebook(self, vectors, codes, generator=None, least=1.0):
        """One step of the moving averages (van den Oord et al. 2017, appendix A.1), with Laplace smoothing;
        all ranks together. vectors (P, n_z), what one depth had to quantize, chose codes (P,). Codes with an
        average count < `least` restart with it from vectors drawn by `generator`, if given (on the CPU)."""
        K, eps = len(self.codebook), 1e-5
        vectors = vectors.detach().float()
        count = torch.bincount(codes, minlength=K).float()                         # (K,)
        total = torch.zeros_like(self.embed_sum).index_add_(0, codes, vectors)     # (K, n_z)
        rank, world = ranks()
        if generator is not None:
            # A vector for each code. Rank r holds r P .. r P + P - 1 of the whole batch and gives those
            # that are drawn; the sum over the ranks has all, as one process with the whole batch draws them.
            P = len(vectors)
            source = torch.randperm(max(world * P, K), generator=generator)[:K].to(vectors.device)
            fresh = vectors[source % P] * (source // P % world == rank)[:, None]   # (K, n_z)
            if world > 1:
                dist.all_reduce(fresh)
            if world * P < K:                       # some codes get the same vector: move them apart a little
                jitter = torch.rand(fresh.shape, generator=generator).to(vectors.device)
                fresh += jitter * (0.01 / math.sqrt(vectors.shape[1]))
        if world > 1:
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.cluster_size.lerp_(count, 1 - self.ema_decay)         # n_k <- decay n_k + (1 - decay) count_k
        self.embed_sum.lerp_(total, 1 - self.ema_decay)            # s_k <- decay s_k + (1 - decay) total_k
        if generator is not None:
            dead = self.cluster_size < least
            self.cluster_size.masked_fill_(dead, least)
            self.embed_sum.copy_(torch.where(dead[:, None], least * fresh, self.embed_sum))
        n = self.cluster_size.sum()
        smoothed = n * (self.cluster_size + eps) / (n + K * eps)
        self.codebook.copy_(self.embed_sum / smoothed[:, None])    # e(k) <- s_k / n_k


def ranks():
    """(rank, world size): which of how many processes this is, under torchrun; (0, 1) without it."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def inverse_cdf(p, uniforms):
    """Draws an index (...) from probabilities p (..., K), which need not sum to 1, by inverting their CDF at
    uniforms (...) in [0, 1): the same on every device and backend, up to rounding, and never one of p = 0."""
    cdf = p.cumsum(-1)
    target = uniforms.unsqueeze(-1) * cdf[..., -1:]                                # (..., 1)
    index = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[-1] - 1)
    # Rounding (a target rounded up to the total, a parallel sum that is not monotone) may hit an entry of 0.
    drawn = p.gather(-1, index).squeeze(-1)
    return torch.where(drawn > 0, index.squeeze(-1), p.argmax(-1))


# === RQ-VAE: images (B, 3, S, S) in [-1, 1] <-> codes (B, N, D) =============================================
# Encoder and decoder are VQGAN's; the attribute names are those of the official state dict, so that it loads.
def group_norm(channels):
    if channels % 32:
        raise UserError(f"A layer of {channels} channels is not divisible by 32; change vae.ch or ch_mult.")
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, border="zeros"):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode=border)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, padding_mode=border)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


def attention(q, k, v, causal=False):
    """softmax(q k^T / sqrt(c)) v for q, k, v (..., T, c); causal: a token sees itself and earlier ones."""
    # ONNX has no operator for PyTorch's fused attention, and its backward pass is slow: on a CPU always
    # (docs/speed.md), on a GPU for the few tokens of a stack, which it pads to 128.
    slow_backward = not q.is_cuda or q.shape[-2] <= 16
    written_out = torch.compiler.is_exporting() or (torch.is_grad_enabled() and slow_backward)
    if not written_out:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                       # (..., T, T)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of x (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))      # (B, H*W, C)
        return x + self.proj_out(attention(q, k, v).transpose(1, 2).reshape(x.shape))


def named(**modules):
    """The modules one after the other, under these names."""
    return nn.Sequential(OrderedDict(modules))


def middle(channels):
    return named(block_1=ResBlock(channels, channels), attn_1=AttnBlock(channels),
                 block_2=ResBlock(channels, channels))


class Level(nn.Module):
    """The blocks of one resolution: res-blocks, each followed by attention if `attend`, then resampling."""

    def __init__(self, widths, attend, downsample=None, upsample=None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in, c_out) for c_in, c_out in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(channels) for channels in widths[1:] if attend)
        self.downsample = downsample or nn.Identity()
        self.upsample = upsample or nn.Identity()

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """images (B, 3, S, S) -> features (B, z_channels, H, W), H = S / f, f = 2^(levels - 1)."""

    def __init__(self, c):
        super().__init__()
        widths = [c.ch * factor for factor in c.ch_mult]
        self.conv_in = nn.Conv2d(3, c.ch, 3, padding=1)
        self.down = nn.Sequential()
        for i, (before, width) in enumerate(zip([c.ch] + widths, widths)):         # down[i] works at S / 2^i
            attend = c.resolution >> i in c.attn_resolutions
            resample = None
            if i < len(widths) - 1:                # H -> H / 2, padded at the right and below, as in VQGAN
                resample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))
            self.down.append(Level([before] + [width] * c.num_res_blocks, attend, downsample=resample))
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Enlarge(nn.Module):
    """features (B, c, H, H), images (B, 3, H, H) -> both at 2 H, 2 H: the images enlarged, with detail that
    vanishes when they are reduced again (as in Bahat and Michaeli 2020, Explorable Super Resolution)."""

    def __init__(self, c, H):
        super().__init__()
        self.blocks = nn.Sequential(ResBlock(c, c, "replicate"), ResBlock(c, c, "replicate"))
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1, padding_mode="replicate")
        for zero in self.conv_out.parameters():                    # no detail at first
            nn.init.zeros_(zero)
        # R (H, 2 H) reduces one side of an image, as for the encoder, and U (2 H, H) enlarges it: R U = 1.
        R = F.interpolate(torch.eye(2 * H)[None, None], (H, 2 * H), mode="bicubic", antialias=True)[0, 0]
        bicubic = F.interpolate(torch.eye(H)[None, None], (2 * H, H), mode="bicubic")[0, 0]
        self.register_buffer("R", R, persistent=False)
        # Not R's pseudo-inverse, with which detail draws lines along the borders: this U keeps constants.
        self.register_buffer("U", bicubic @ torch.linalg.inv(R @ bicubic), persistent=False)

    def forward(self, x, images):
        x = self.blocks(F.interpolate(x, scale_factor=2.0, mode="bilinear"))
        detail = self.conv_out(F.silu(self.norm_out(x)))
        # y = detail + U (images - R detail R^T) U^T, so that R y R^T = images, whatever the detail
        return x, detail + self.U @ (images - self.R @ detail @ self.R.T) @ self.U.T


class Decoder(nn.Module):
    """features (B, z_channels, H, W) -> images (B, 3, S, S), not clamped."""

    def __init__(self, c):
        super().__init__()
        widths = [c.ch * factor for factor in c.ch_mult]
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (width, before) in enumerate(zip(widths, widths[1:] + widths[-1:])):  # up[i] works at S / 2^i
            attend = c.resolution >> i in c.attn_resolutions
            resample = None
            if i > 0:                              # H -> 2 H
                resample = named(up=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(width, width, 3, padding=1))
            self.up.append(Level([before] + [width] * (c.num_res_blocks + 1), attend, upsample=resample))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        # DEVIATION: with vae.upscale the decoder draws larger than the encoder sees, as Muse's does.
        self.enlarge = nn.ModuleList(Enlarge(widths[0], c.resolution << i)
                                     for i in range(c.upscale.bit_length() - 1))

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):                            # the smallest resolution runs first
            x = level(x)
        images = self.conv_out(F.silu(self.norm_out(x)))
        for level in self.enlarge:
            x, images = level(x, images)
        return images


class RQVAE(nn.Module):
    """Residual-Quantized VAE (RQ-VAE section 3.1). c: the section `vae`."""

    def __init__(self, c):
        super().__init__()
        f = 2 ** (len(c.ch_mult) - 1)
        if c.resolution % f:
            raise UserError(f"vae.resolution {c.resolution} is no multiple of {f}, the reduction of the "
                            f"{len(c.ch_mult)} levels of vae.ch_mult; change one of them.")
        if c.upscale & (c.upscale - 1):
            raise UserError(f"vae.upscale is {c.upscale}; expected a power of two.")
        self.side, self.size = c.resolution // f, c.resolution * c.upscale         # H = W, S
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = nn.Conv2d(c.z_channels, c.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.code_dim, c.z_channels, 1)
        self.quantizer = ResidualQuantizer(c.codebook_size, c.code_dim, c.depth, c.ema_decay)

    def encode_latent(self, images):
        """images (B, 3, S, S) in [-1, 1] -> z (B, N, n_z), positions in raster order."""
        for _ in self.decoder.enlarge:                             # the encoder sees them reduced
            images = F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)
        return self.quant_conv(self.encoder(images)).flatten(2).transpose(1, 2)

    def decode_latent(self, z_hat):
        """z_hat (B, N, n_z), quantized or a partial sum -> images (B, 3, S, S), not clamped."""
        side = math.isqrt(z_hat.shape[1])
        z_hat = z_hat.transpose(1, 2).unflatten(2, (side, side))                   # (B, n_z, H, W)
        return self.decoder(self.post_quant_conv(z_hat))

    def encode(self, images):
        """images (B, 3, S, S) in [-1, 1] -> codes (B, N, D)."""
        return self.quantizer.quantize(self.encode_latent(images))[0]

    def decode(self, codes):
        """codes (B, N, D) -> images (B, 3, S, S), not clamped."""
        return self.decode_latent(self.quantizer.embed(codes).sum(-2))             # z_hat = sum_d e(k_d)

    def forward(self, images, quantized=True):
        """A training pass: reconstructions (B, 3, S, S), commitment loss (), z (B, N, n_z), codes (B, N, D).
        Without `quantized` the decoder sees z itself, as in a plain autoencoder."""
        z = self.encode_latent(images).float()
        codes, partial_sums = self.quantizer.quantize(z)                           # (B, N, D), (B, N, D, n_z)
        # L_commit = 1/D sum_d || z - sg[z_hat^(d)] ||^2 / n_z, of all partial sums (RQ-VAE Eq. 8)
        commitment = (z.unsqueeze(-2) - partial_sums).square().mean()
        # z_hat = z + sg[z_hat^(D) - z]: straight through, the gradient of z_hat goes to z
        z_hat = z + (partial_sums[..., -1, :] - z).detach()
        return self.decode_latent(z_hat if quantized else z), commitment, z, codes


# === Contextual RQ-Transformer: codes (B, N, D), mask (B, N) -> h (B, N, d_model) -> logits (P, D, K) =======
class Block(nn.Module):
    """A pre-LayerNorm transformer block, x (B, T, d_model) -> the same; 12 d^2 + 13 d parameters."""

    def __init__(self, d_model, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.ln1, self.ln2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.dropout = nn.Dropout(0.0)         # of what is added to x; the training sets its probability

    def forward(self, x, causal=False, cache=None, position=0, selected=None):
        """With `cache` (2, B, heads, D, head_dim) x is one token, at `position`: key and value go there, and
        it sees the positions up to its own. With `selected` (B, n) only these tokens, which see all of x,
        are computed: (B, n, d_model)."""
        y = self.ln1(x)
        if selected is None:
            q, k, v = self.split_heads(self.qkv(y)).chunk(3, 1)                    # (B, heads, T, head_dim)
        else:
            d, w, b = y.shape[-1], self.qkv.weight, self.qkv.bias
            q = self.split_heads(F.linear(select(y, selected), w[:d], b[:d]))      # (B, heads, n, head_dim)
            k, v = self.split_heads(F.linear(y, w[d:], b[d:])).chunk(2, 1)
            x = select(x, selected)
        if cache is not None:
            cache[0, :, :, position] = k[:, :, 0]
            cache[1, :, :, position] = v[:, :, 0]
            k, v = cache[:, :, :, :position + 1].unbind()
        a = attention(q, k, v, causal)
        x = x + self.dropout(self.proj(a.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.ln2(x)))))

    def split_heads(self, y):
        """(B, T, i d_model) -> (B, i heads, T, head_dim)."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def select(x, positions):
    """x (B, T, c) at positions (B, n) -> (B, n, c)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class ContextualRQTransformer(nn.Module):
    """Predicts hidden stacks from visible ones: bidirectional over space, causal over depth (section 3.2).
    conditions: the number of classes (text tokens; 1 for `cond: none`), not counting the null condition."""

    def __init__(self, c, conditions, positions, depth, codebook):
        super().__init__()
        if c.d_model % c.head_dim:
            raise UserError(f"transformer.d_model {c.d_model} is no multiple of transformer.head_dim "
                            f"{c.head_dim}; change one of them.")
        d = c.d_model
        K, n_z = codebook.shape
        self.positions, self.depth = positions, depth
        self.heads, self.head_dim = d // c.head_dim, c.head_dim
        self.cond_length = c.text_length if c.cond == "text" else 1                # L
        self.null = 0 if c.cond == "none" else conditions          # the null condition's id
        self.recompute = False                                     # in training: activations are not kept
        self.register_buffer("codebook", codebook.clone(), persistent=False)       # stored with stage 1 only
        self.mask_embed = nn.Parameter(torch.zeros(n_z))           # e_[MASK]
        self.w_in = nn.Linear(n_z, d)
        self.pos = nn.Parameter(torch.zeros(positions, d))         # PE_N
        self.cond_embed = nn.Embedding(self.null + 1, d)
        self.cond_pos = nn.Parameter(torch.zeros(self.cond_length, d))
        self.spatial = nn.ModuleList(Block(d, c.head_dim) for _ in range(c.n_spatial))
        self.w_depth = nn.Linear(n_z, d) if depth > 1 else None
        self.depth_pos = nn.Parameter(torch.zeros(depth, d))       # PE_D
        self.depthwise = nn.ModuleList(Block(d, c.head_dim) for _ in range(c.n_depth))
        self.ln = nn.LayerNorm(d)
        self.classifier = nn.Linear(d, K)
        for name, p in self.named_parameters():                    # as in GPT-2: weights N(0, 0.02), ...
            if p.dim() > 1 or name == "mask_embed":
                nn.init.normal_(p, std=0.02)
        for module in self.modules():                              # ... biases 0, LayerNorms the identity
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def context(self, codes, mask, cond, positions=None):
        """h (B, N, d_model) from codes (B, N, D), mask (B, N), cond (B, L); hidden codes have no influence.
        With positions (B, n) only theirs, (B, n, d_model), which saves most of the last block."""
        # Eq. 6: u_n = PE_N(n) + W_in sum_d e(S_nd) where m_n = 0, and PE_N(n) + W_in e_[MASK] where m_n = 1
        e = F.embedding(codes, self.codebook).sum(2)                               # (B, N, n_z)
        e = torch.where(mask[..., None], self.mask_embed.to(e.dtype), e)
        u = self.w_in(e) + self.pos                                                # (B, N, d_model)
        # Eq. 7: (h_1 .. h_N) = f_spatial(u_1 .. u_N), with the condition's tokens in front
        x = torch.cat([self.cond_embed(cond) + self.cond_pos, u], 1)               # (B, L + N, d_model)
        if positions is None:
            return self.run(self.spatial, x)[:, self.cond_length:]
        x = self.run(self.spatial[:-1], x)
        return self.spatial[-1](x, selected=positions + self.cond_length)

    def depth_logits(self, h, stacks):
        """Teacher-forced logits (P, D, K) of stacks (P, D) at positions with contexts h (P, d_model)."""
        v = h[:, None]                                             # Eq. 8: v_n1 = h_n + PE_D(1)
        if self.depth > 1:                                         # v_nd = W sum_{i < d} e(S_ni) + PE_D(d)
            sums = F.embedding(stacks[:, :-1], self.codebook).cumsum(1)            # (P, D - 1, n_z)
            v = torch.cat([v, self.w_depth(sums)], 1)                              # (P, D, d_model)
        # Eq. 9: p_nd = f_depth(v_n1 .. v_nd), p(S_nd = k | S_n,<d, S\m) = softmax(p_nd)_k
        v = self.run(self.depthwise, v + self.depth_pos, causal=True)
        return self.classifier(self.ln(v))

    def run(self, blocks, x, causal=False):
        for block in blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, causal, use_reentrant=False)
            else:
                x = block(x, causal)
        return x

    def depth_step(self, h, stacks, d, cache=None):
        """The logits (P, K) of depth d = 0 .. D - 1 alone from the codes before it, stacks (P, D)[:, :d], and
        the cache (n_depth, 2, P, heads, D, head_dim) for the next depth; none comes in at d = 0."""
        if d == 0:
            cache = h.new_empty(len(self.depthwise), 2, len(h), self.heads, self.depth, self.head_dim)
            v = h
        else:
            v = self.w_depth(F.embedding(stacks[:, :d], self.codebook).sum(1))
        v = (v + self.depth_pos[d])[:, None]                                       # (P, 1, d_model)
        for block, block_cache in zip(self.depthwise, cache):
            v = block(v, cache=block_cache, position=d)
        return self.classifier(self.ln(v[:, 0])), cache

    def forward(self, codes, mask, cond, targets=None):
        """A training pass, `masked_loss`: what DistributedDataParallel and FSDP wrap."""
        return masked_loss(self, codes, mask, cond, targets)


# === Masked code-stack modelling (section 3.2.3): codes (B, N, D), mask (B, N) -> loss (D,) =================
def random_mask(uniforms):
    """Training masks (B, N) from uniforms (B, 1 + N) in [0, 1): the number r, and one for each position."""
    r, N = uniforms[:, :1], uniforms.shape[1] - 1                  # Eq. 10: r ~ U[0, 1)
    count = torch.ceil(torch.cos(math.pi / 2 * r) * N)             # |m| = ceil(gamma(r) N), (B, 1), in 1 .. N
    rank = uniforms[:, 1:].argsort(1).argsort(1)                   # with gamma(r) = cos(pi r / 2)
    return rank < count                                            # Eq. 11: m ~ U{m that hide |m| positions}


def masked_loss(transformer, codes, mask, cond, targets=None):
    """Cross-entropy (D,) in nats and accuracy (D,) at each depth of the P hidden stacks, against their codes
    or `targets` (P, D, K), distributions over the codes ("soft labels", RQ-VAE section 3.2.3)."""
    h = transformer.context(codes, mask, cond)
    stacks = codes[mask]                                                           # (P, D)
    logits = transformer.depth_logits(h[mask], stacks).float()                     # (P, D, K)
    truth = stacks if targets is None else targets
    # Eq. 12: L = sum_{n: m_n = 1} sum_d -log p(S_nd | S_n,<d, S\m), here the mean over n, for each d
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(0, 1), reduction="none").view_as(stacks)
    return loss.mean(0), (logits.argmax(-1) == stacks).float().mean(0)


# === Draft-and-Revise (section 3.3): noise -> codes (B, N, D) ===============================================
class Sampling(NamedTuple):
    """How codes are drawn."""
    temperature: float      # softmax(logits / temperature)
    guidance: float         # s in logits = l_null + s (l_cond - l_null): 1 is none
    top_k: int              # only the most likely codes, 0: all
    top_p: float            # of those the fewest that hold this share of the probability


class State(NamedTuple):
    """The map of codes after an update."""
    phase: str              # "draft" or "revise"
    round: int              # 0 for the draft, 1 .. M for the revisions
    codes: torch.Tensor     # (B, N, D)
    hidden: torch.Tensor    # (B, N) bool
    log_p: torch.Tensor     # (B, N), the log-probability with which each stack was drawn, 0 where none was


def draw_noise(seed, images, rounds, positions, depth):
    """Everything random in a decode, drawn before it begins from (seed, index of the image) alone: image i of
    a seed is the same in any batch and on any backend, up to rounding. For B images and 1 + M rounds: order
    (rounds, B, N), the positions in a random order, and uniforms (rounds, B, N, D) in [0, 1)."""
    order = np.empty((rounds, len(images), positions), np.int64)
    uniforms = np.empty((rounds, len(images), positions, depth), np.float32)
    for b, i in enumerate(images):
        rng = np.random.default_rng([seed, i])
        for r in range(rounds):
            order[r, b] = rng.permutation(positions)
            uniforms[r, b] = rng.random((positions, depth), np.float32)
    return torch.from_numpy(order), torch.from_numpy(uniforms)


def partition(order, T):
    """Pi ~ p(Pi; T): T disjoint sets m^1 .. m^T (n for T > n) that cover the positions in `order` (B, n), as
    random as that, with sizes n_t that differ by at most one: a list of indices (B, n_t)."""
    return list(order.tensor_split(min(T, order.shape[1]), dim=1))


def probabilities(logits, sampling):
    """logits (P, K) -> probabilities (P, K); those that are cut off are 0, the others need not sum to 1."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k:                                             # so many, even if the next are as likely
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]))                  # (P, top_k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        ranked, index = p.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked                        # the probability of all more likely codes
        p = p.scatter(-1, index, ranked.masked_fill(before >= sampling.top_p, 0))
    return p


def sample_stacks(model, h, uniforms, sampling):
    """Draws stacks (P, D) depth by depth, from contexts h (P, d_model) and uniforms (P, D). With guidance h
    is (2 P, d_model): under the condition, then under the null condition. Returns them, log p(S_n) (P,)."""
    P, D = uniforms.shape
    stacks = torch.zeros(len(h), D, dtype=torch.int64, device=h.device)
    log_p, cache = torch.zeros(P, device=h.device), None
    for d in range(D):
        logits, cache = model.depth_step(h, stacks, d, cache)
        logits = logits.float()                                                    # (P, K), guided (2 P, K)
        if sampling.guidance != 1:
            l_cond, l_null = logits.split(P)
            logits = l_null + sampling.guidance * (l_cond - l_null)
        p = probabilities(logits, sampling)                        # p(S_nd | S_n,<d, S\m)
        k = inverse_cdf(p, uniforms[:, d])                                         # (P,)
        log_p += (p.gather(1, k[:, None])[:, 0] / p.sum(1)).log()  # log p(S_n) = sum_d log p(S_nd | ...)
        stacks[:, d] = k.repeat(len(h) // P)                       # both halves go on with the same codes
    return stacks[:P], log_p


def update(model, state, positions, uniforms, cond, sampling):
    """UPDATE (Alg. 1) of one set m^t of a partition: hides its stacks and draws them anew, given all visible.
    positions (B, n): the set; uniforms (B, N, D); cond (B, L). Returns the State afterwards, in which the set
    is visible and all other stacks are as they were."""
    hidden = state.hidden.scatter(1, positions, True)              # S\m^t: without the stacks of the set
    inputs = state.codes, hidden, cond, positions
    if sampling.guidance != 1:                                     # the batch doubles here and nowhere else
        null_inputs = state.codes, hidden, torch.full_like(cond, model.null), positions
        inputs = [torch.cat(pair) for pair in zip(inputs, null_inputs)]
    h = model.context(*inputs).flatten(0, 1)                                       # (B n or 2 B n, d_model)
    # S_n ~ p(S_n | S\m^t) for all n of the set in parallel; only they go through the depth transformer
    stacks, log_p = sample_stacks(model, h, select(uniforms, positions).flatten(0, 1), sampling)
    stacks = stacks.unflatten(0, positions.shape)                                  # (B, n, D)
    return state._replace(codes=state.codes.scatter(1, positions[..., None].expand_as(stacks), stacks),
                          hidden=hidden.scatter(1, positions, False),
                          log_p=state.log_p.scatter(1, positions, log_p.view(positions.shape)))


@torch.inference_mode()
def draft_and_revise(model, cond, noise, c, codes=None, region=None, update=update):
    """Draft-and-Revise (Alg. 2): an empty map of codes is drafted in T_draft updates, then revised M times.

    model    has `context`, `depth_step` and `null`, as TorchModel does
    noise    of `draw_noise`, for at least 1 + M rounds; cond (B, L); c: the section `sample`
    codes (B, N, D) and region (N,) bool, both or neither: in-painting; stacks outside the region are kept
    update   the function above, or one that does the same (support/fast.py)
    Yields the State after every update; the codes of the last one are the result."""
    assert (codes is None) == (region is None)
    order, uniforms = (tensor.to(cond.device) for tensor in noise)
    B, N, D = uniforms.shape[1:]
    if region is None:
        codes = cond.new_zeros(B, N, D)                            # S^empty
        region = torch.ones(N, dtype=torch.bool, device=cond.device)
    inside = [o[region[o]].view(B, -1) for o in order]             # the region, in each round's random order
    state = State("draft", 0, codes, region.expand(B, N), log_p=torch.zeros(B, N, device=cond.device))

    sampling = Sampling(c.draft_temperature, c.draft_guidance, c.top_k, c.top_p)
    for positions in partition(inside[0], c.t_draft):              # S^0 = UPDATE(S^empty, Pi), Eq. 13:
        state = update(model, state, positions, uniforms[0], cond, sampling)     # later sets are still hidden
        yield state

    sampling = Sampling(c.revise_temperature, c.revise_guidance, c.top_k, c.top_p)
    for m in range(1, 1 + c.rounds):                               # S^m = UPDATE(S^(m-1), Pi), Eq. 14:
        state = state._replace(phase="revise", round=m)            # only the current set is hidden
        for positions in partition(inside[m], c.t_revise):
            state = update(model, state, positions, uniforms[m], cond, sampling)
            yield state


def sample(model, cond, seed, images, c, codes=None, region=None, update=update, decode=draft_and_revise):
    """Codes (B, N, D) of the images with these indices of a seed: `decode` to its end."""
    noise = draw_noise(seed, images, 1 + c.rounds, model.positions, model.depth)
    *_, last = decode(model, cond, noise, c, codes, region, update)
    return last.codes


class TorchModel:
    """The networks as decoding sees them; backends.ExportedModel takes its place by having the same.

    context(codes (B, N, D), mask (B, N), cond (B, L), positions (B, n) or None) -> h (B, n or N, d_model)
    depth_step(h (P, d_model), stacks (P, D), d, cache) -> logits (P, K), cache (opaque; None at d = 0)
    decode(codes (B, N, D)) -> float32 images (B, 3, S, S), not clamped
    encode(images (B, 3, S, S) in [-1, 1]) -> codes (B, N, D)
    size, side, positions, depth, null   S, H = W, N, D, and the null condition's id
    The modules that it is given are moved and converted in place."""

    def __init__(self, vae, transformer, device, dtype):
        # The RQ-VAE stays float32; on a CPU its convolutions are a fifth faster with the channels innermost.
        self.vae = vae.to(device, memory_format=torch.channels_last).eval()
        # Beside a bf16 transformer on a GPU the decoder is float16, which is more exact (docs/speed.md).
        self.half = device.type == "cuda" and dtype != torch.float32
        self.transformer = transformer.to(device, dtype).eval()
        self.size, self.side = vae.size, vae.side
        self.null, self.positions, self.depth = transformer.null, transformer.positions, transformer.depth
        methods = transformer.context, transformer.depth_step, vae.encode
        self.context, self.depth_step, self.encode = map(torch.inference_mode(), methods)

    @torch.inference_mode()
    def decode(self, codes):
        # On a CPU one image is decoded twice: alone, its convolutions may add up in another order.
        batch = codes.repeat(2, 1, 1) if len(codes) == 1 and codes.device.type == "cpu" else codes
        with torch.autocast(codes.device.type, torch.float16, enabled=self.half):
            images = self.vae.decode(batch)[:len(codes)].float()
        if not self.half or images.isfinite().all():
            return images
        self.half = False                                          # activations beyond 65504
        print("float16 is too small for this decoder: from here on it runs in float32")
        return self.decode(codes)


# === Checkpoints: safetensors that carry their configuration ================================================
class UserError(Exception):
    """A mistake of the user's: one sentence saying what came, what was expected and how to repair it."""


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path beside `path` to write to, which takes its place only once it is complete. The
    body should do nothing else: raises UserError when the disk is full or the folder cannot be written to."""
    path = Path(path)
    temporary = path.with_name(f".writing-{os.urandom(4).hex()}.part")     # short; torch.save wants a suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())                                   # on the disk before it replaces the old
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:      # RuntimeError: torch.save, on a full disk
        raise UserError(f"{path} could not be written ({error}); free space or write elsewhere.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_vae(path, vae, config, former=()):
    """Writes the RQ-VAE and its section; former: fingerprints by which older transformers know its codes."""
    save_model(path, vae.state_dict(), {"vae": vars(config.vae), "former": list(former)})


def save_transformer(path, transformer, config, classes, titles, vae):
    """Writes the transformer, its configuration, the classes' names and titles, and whose codes it knows."""
    tensors = transformer.state_dict()
    if config.transformer.half:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_model(path, tensors, {"transformer": vars(config.transformer), "sample": vars(config.sample),
                               "classes": classes, "titles": titles, "vae": code_fingerprint(vae)})


def save_model(path, tensors, meta):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"drr": json.dumps(meta)})
        temporary.chmod(0o644)                                     # safetensors' files are their owner's only


def fingerprint(module, prefixes=("",)):
    """SHA-256 over a module's weights whose names begin with one of `prefixes`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_fingerprint(vae):
    """SHA-256 over what makes codes: RQ-VAEs that have it in common have their codes in common."""
    return fingerprint(vae, ("encoder.", "quant_conv.", "quantizer.codebook"))


def former_fingerprints(path, vae):
    """The fingerprints by which transformers older than `code_fingerprint` know the codes of `vae`, read from
    `path`: that of all weights, and those that the file lists because its decoder has changed since."""
    return [fingerprint(vae), *read_model(path)[1].get("former", [])]


def load_vae(path):
    """The RQ-VAE in `path` (float32, on the CPU) and its section `vae`. UserError where it holds none."""
    tensors, meta = read_model(path)
    with explained(path):
        c = SimpleNamespace(**{"upscale": 1} | meta["vae"])        # a key that older files lack
        vae = RQVAE(c)
    fill(vae, tensors, path)
    return vae.requires_grad_(False).eval(), c


def load_checkpoint(directory, build=ContextualRQTransformer, dtype=torch.float32):
    """The model in a folder: vae.safetensors and transformer.safetensors, as the two trainers write them.
    Returns vae (float32), transformer (`dtype`), on the CPU, and info: the sections `vae`, `transformer` and
    `sample`, and the lists `classes` and `titles`. Raises UserError as `load_vae` does, and if the two do not
    match. build: makes the transformer from ContextualRQTransformer's arguments."""
    vae_path, path = (Path(directory) / f"{name}.safetensors" for name in ("vae", "transformer"))
    vae, vae_section = load_vae(vae_path)
    tensors, meta = read_model(path, dtype)
    known = meta.get("vae")
    if known != code_fingerprint(vae) and known not in former_fingerprints(vae_path, vae):
        raise UserError(f"{path} was trained on the codes of another RQ-VAE than {vae_path}; "
                        "keep the two files of one training together.")
    with explained(path):
        info = SimpleNamespace(vae=vae_section, transformer=SimpleNamespace(**meta["transformer"]),
                               sample=SimpleNamespace(**meta["sample"]), classes=meta["classes"],
                               titles=meta["titles"])
        if set(map(type, info.classes + info.titles)) != {str} or len(info.classes) != len(info.titles):
            raise ValueError("each class needs a name and a title")
        c, book = info.transformer, vae.quantizer.codebook
        with torch.device("meta"):                               # empty: the file's tensors take their place
            transformer = build(c, conditions(c, info.classes), vae.side ** 2, info.vae.depth, book)
    fill(transformer, tensors, path, assign=True)
    return vae, transformer.requires_grad_(False).eval(), info


def conditions(c, classes):
    """How many conditions a transformer with the section c knows, the null condition not counted."""
    return {"class": len(classes), "text": c.text_vocab, "none": 1}[c.cond]


def read_model(path, dtype=torch.float32):
    """(tensors, meta) of a file by `save_model`, its floating-point numbers in `dtype`. Raises UserError for
    anything else; executes nothing."""
    with explained(path):
        with safe_open(path, "pt") as f:
            meta, names = dict(json.loads(f.metadata()["drr"])), f.keys()
        tensors = {}
        for name in names:
            with safe_open(path, "pt") as f:                       # anew: its map ends with each tensor
                tensor = f.get_tensor(name)
            if not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensors, meta


def fill(module, tensors, path, **options):
    """load_state_dict, strict. Raises UserError where the weights of the file `path` do not fit."""
    with explained(path):
        module.load_state_dict(tensors, **options)


@contextlib.contextmanager
def explained(path):
    """Turns whatever goes wrong while the checkpoint `path` is read into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"The checkpoint {path} does not exist; train it or name another folder.") from None
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split("\n")[:2]).replace("\t", "")          # the first of all
        raise UserError(f"{path} is damaged, or of another kind, version or architecture than expected "
                        f"({type(error).__name__}: {problem}); copy it again or give another file.") from None
