"""Halton-MaskGIT (Besnier et al., ICLR 2025, arXiv 2503.17076): published masked transformers, D = 1.

    python -m related.maskgit ImageNet_384_large.pth vq_ds16_c2i.pt --out runs/halton-384
    python sample.py --checkpoint runs/halton-384 --class 980

The files are those of llvictorll/Halton-MaskGIT and FoundationVision/LlamaGen (its VQGAN, f = 16). Whatever
fills in hidden codes can be decoded by Draft-and-Revise, unchanged (drr.py). To train one: the preset
smoke-maskgit, or transformer.kind=maskgit.
"""
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import drr
from drr import UserError
from support import models, official
from support.common import load_config, run
from support.runs import refuse_replacing

# Of the published widths: heads, which a state dict does not tell, and guidance, 1 + theirs.
HEADS = {384: 6, 512: 6, 768: 12, 1024: 16}
GUIDANCE = {384: 2.5, 512: 2.0, 768: 1.7, 1024: 1.5}


# === The model: codes (B, N, 1), mask (B, N), cond (B, 1) -> h (B, N, d_model) -> logits (P, 1, K) ==========
def rms(x):
    """x / sqrt(mean x^2) over the last dimension, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


class Block(nn.Module):
    """A pre-norm block whose norms are shifted and scaled, and whose results are weighted, by the condition:
    x (B, T, d_model), c (B, d_model) -> the same as x."""

    def __init__(self, d, head_dim):
        super().__init__()
        self.head_dim = head_dim
        inner = d // head_dim * head_dim                           # 510 of 512 in the published "small"
        hidden = math.ceil(d * 8 // 3 / 256) * 256
        self.modulation = nn.Linear(d, 6 * d)
        self.ln1, self.ln2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.qkv = nn.Linear(d, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, d, bias=False)
        self.w1, self.w3 = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)
        self.dropout = nn.Dropout(0.0)                             # the training sets its probability

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        q, k, v = self.qkv(rms(x) * self.ln1 * (1 + scale1) + shift1).chunk(3, -1)
        # Queries and keys are normalized over all heads together.
        q, k, v = (self.split_heads(y) for y in (rms(q), rms(k), v))               # (B, heads, T, head_dim)
        a = drr.attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.dropout(self.proj(a))
        y = rms(x) * self.ln2 * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.w2(F.silu(self.w1(y)) * self.w3(y)))      # SwiGLU

    def split_heads(self, y):
        """(B, T, inner) -> (B, heads, T, head_dim)."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MaskGIT(nn.Module):
    """Predicts hidden codes from visible ones, bidirectional, with adaptive norms for the class. It offers
    what drr.ContextualRQTransformer does, for stacks of one code."""

    def __init__(self, c, conditions, positions, depth, codebook):
        super().__init__()
        if depth != 1 or c.cond != "class":
            raise UserError("A maskgit transformer needs classes and stacks of one code, and this RQ-VAE has "
                            f"depth {depth}, transformer.cond is {c.cond}; train stage 1 with vae.depth=1.")
        d, self.K = c.d_model, len(codebook)
        self.positions, self.depth, self.cond_length, self.null = positions, 1, 1, conditions
        self.heads, self.head_dim, self.recompute = d // c.head_dim, c.head_dim, False
        self.register_buffer("codebook", codebook.clone(), persistent=False)       # stored with stage 1 only
        self.cond_embed = nn.Embedding(conditions + 1, d)          # the last is the null class
        self.pos = nn.Parameter(torch.zeros(positions, d))
        self.register = nn.Parameter(torch.zeros(1, d))            # one more token, without a position
        self.spatial = nn.ModuleList(Block(d, c.head_dim) for _ in range(c.n_spatial))
        self.depthwise = nn.ModuleList()                           # none: one code needs no order
        self.last_modulation = nn.Linear(d, 2 * d)
        self.ln_weight, self.ln_bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.classifier = nn.Linear(d, self.K + 1)                 # its rows embed the codes, too; K: [MASK]
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # At first a block changes nothing (DiT's adaLN-Zero).
        for modulation in (self.last_modulation, *(block.modulation for block in self.spatial)):
            nn.init.zeros_(modulation.weight)

    def context(self, codes, mask, cond, positions=None):
        """As drr.ContextualRQTransformer.context, codes (B, N, 1)."""
        c = F.silu(self.cond_embed(cond[:, 0]))                                    # (B, d_model)
        tokens = torch.where(mask, self.K, codes[..., 0])                          # (B, N)
        x = F.embedding(tokens, self.classifier.weight) + self.pos
        x = torch.cat([x, self.register.expand(x.shape[0], -1, -1)], 1)                # (B, N + 1, d_model)
        for block in self.spatial:
            if self.recompute and self.training:
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        x = x[:, :-1] if positions is None else drr.select(x, positions)
        shift, scale = self.last_modulation(c)[:, None].chunk(2, -1)
        return (rms(x) * self.ln_weight + self.ln_bias) * (1 + scale) + shift

    def depth_logits(self, h, stacks):
        """Logits (P, 1, K) at positions with contexts h (P, d_model); not [MASK]'s, which is no code."""
        return self.classifier(h)[:, None, :self.K]

    def depth_step(self, h, stacks, d, cache=None):
        return self.classifier(h)[:, :self.K], cache

    @torch.inference_mode()
    def logits(self, codes, mask, cond):
        """Logits (B, N, K), float32, of codes (B, N, 1) with mask (B, N) under cond (B, 1)."""
        return self.classifier(self.context(codes, mask, cond))[..., :self.K].float()

    def forward(self, codes, mask, cond, targets=None):
        # DEVIATION: the loss is of hidden codes only, as for the paper's transformer (Eq. 12), so that one
        # trainer serves both; the official one is of all positions.
        return drr.masked_loss(self, codes, mask, cond, targets)


def independent_mask(uniforms):
    """Training masks (B, N) from uniforms (B, 1 + N): each code is hidden with probability 2 / pi arccos(r),
    and at least one of each image."""
    share = 2 / math.pi * torch.arccos(uniforms[:, :1])
    uniforms = uniforms[:, 1:]
    return (uniforms < share) | (uniforms == uniforms.amin(1, keepdim=True))


class Head(nn.Module):
    """The graph `depth`: contexts (P, d_model) -> logits (P, K). What it does not need goes through it."""

    def __init__(self, transformer):
        super().__init__()
        self.network = transformer

    def forward(self, h, stacks, position, cache):
        return self.network.depth_logits(h, stacks)[:, 0].float(), cache[..., 0, :]


# === Published weights ======================================================================================
# Parts of a name -> ours, one after the other.
TRANSFORMER = {"_orig_mod.": "", "module.": "", "last_norm.norm_final.": "ln_",
               "last_norm.mlp.1.": "last_modulation.", "transformer.layers.": "spatial.",
               ".mlp.1.": ".modulation.", ".ff.w": ".w", ".ln1.weight": ".ln1", ".ln2.weight": ".ln2",
               ".attn.wo.": ".proj.", "cls_emb.": "cond_embed.", "pos_emb.weight": "pos",
               "reg_tokens.weight": "register", "tok_emb.weight": "classifier.weight",
               "head.bias": "classifier.bias"}
VQ = {".res.": ".block.", ".mid.0.": ".mid.block_1.", ".mid.1.": ".mid.attn_1.", ".mid.2.": ".mid.block_2.",
      "encoder.conv_blocks.": "encoder.down."}


def rename(name, table):
    for theirs, ours in table.items():
        name = name.replace(theirs, ours)
    return name


def load_published(transformer_path, vq_path, heads=None):
    """(vae, transformer) of two published files (.pth, .pt or .safetensors), float32, on the CPU. heads: how
    many the transformer has; None: as the published one of its width. Raises UserError for a missing, damaged
    or other file, and for a transformer of other codes than the VQ's."""
    vae, transformer, _ = load(transformer_path, vq_path, heads)
    return vae, transformer


def load(transformer_path, vq_path, heads):
    """As `load_published`, and the configuration."""
    base = load_config("imagenet-821m")
    state = official.read_state(transformer_path, "Halton-MaskGIT", "model_state_dict")
    with drr.explained(transformer_path):
        if any("in_proj.weight" in name for name in state):
            raise UserError(f"{transformer_path} predicts 2 x 2 codes at a time (proj 2), which is not "
                            "supported; give a published file, none of which does.")
        tensors = transformer_tensors({rename(name, TRANSFORMER): x for name, x in state.items()})
        d, blocks = tensors["pos"].shape[1], max(int(n.split(".")[1]) for n in tensors if "qkv" in n) + 1
        if heads is None and d not in HEADS:
            raise UserError(f"{transformer_path} has width {d}, which no published one has; give --heads.")
        if heads is None:
            heads = HEADS[d]
        if not 1 <= heads <= d:
            raise UserError(f"--heads is {heads}; expected a number from 1 to {d}, the transformer's width.")
        inner = len(tensors["spatial.0.qkv.weight"]) // 3
        if d // heads * heads != inner:
            raise UserError(f"{transformer_path} has queries of width {inner}, which {heads} heads cannot "
                            "share; give --heads the number that it was trained with.")
        conditions, positions = len(tensors["cond_embed.weight"]) - 1, len(tensors["pos"])
        c = SimpleNamespace(**vars(base.transformer) | {
            "kind": "maskgit", "n_spatial": blocks, "d_model": d, "head_dim": d // heads, "cond": "class"})
    vae, base.vae = load_vq(vq_path, math.isqrt(positions), base.vae)
    if len(vae.quantizer.codebook) != len(tensors["classifier.weight"]) - 1:
        raise UserError(f"{transformer_path} knows {len(tensors['classifier.weight']) - 1} codes, {vq_path} "
                        f"has {len(vae.quantizer.codebook)}; keep the files of one release together.")
    with torch.device("meta"):                       # without memory: the file's tensors take their place
        transformer = MaskGIT(c, conditions, positions, 1, vae.quantizer.codebook)
    drr.fill(transformer, tensors, transformer_path, assign=True)
    base.transformer = c
    return vae, transformer.requires_grad_(False).eval(), base


def transformer_tensors(state):
    """Renamed tensors -> ours: the same, but for query, key and value, which are one matrix here."""
    result = {}
    for name, tensor in state.items():
        if name == "head.weight":                    # tok_emb.weight once more
            continue
        if ".attn.wq." in name:
            tensor = torch.cat([state[name.replace("wq", part)] for part in ("wq", "wk", "wv")])
            name = name.replace(".attn.wq.", ".qkv.")
        if ".attn.wk." not in name and ".attn.wv." not in name:
            result[name] = tensor.float().clone()    # files may let tensors share memory, ours may not
    return result


def load_vq(path, side, base):
    """LlamaGen's VQGAN as a drr.RQVAE of depth 1, for maps of side x side codes, and its section `vae`."""
    state = official.read_state(path, "LlamaGen VQ", "model")
    with drr.explained(path):
        state.pop("quantize.codebook_used", None)
        # Codes and latents are compared as directions: of unit vectors the nearest has the largest product.
        book = F.normalize(state.pop("quantize.embedding.weight").float(), dim=-1)         # (K, n_z)
        levels = max(int(name.split(".")[2]) for name in state if "encoder.conv_blocks." in name) + 1
        ch = len(state["encoder.conv_in.weight"])
        widths = [len(state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"]) for i in range(levels)]
        blocks = sum(f"encoder.conv_blocks.0.res.{j}.conv1.weight" in state for j in range(16))
        c = SimpleNamespace(**vars(base) | {
            "resolution": side << levels - 1, "ch": ch, "ch_mult": [w // ch for w in widths],
            "num_res_blocks": blocks, "attn_resolutions": [side], "code_dim": book.shape[1],
            "z_channels": len(state["encoder.conv_out.weight"]), "codebook_size": len(book), "depth": 1})
        # Their decoder counts its levels from the smallest on.
        table = VQ | {f"decoder.conv_blocks.{i}.": f"decoder.up.{levels - 1 - i}." for i in range(levels)}
        tensors = {rename(name, table): tensor.float().clone() for name, tensor in state.items()}
        tensors |= {"quantizer.codebook": book, "quantizer.embed_sum": book.clone(),
                    "quantizer.cluster_size": torch.ones(len(book))}
        vae = drr.RQVAE(c)
    drr.fill(vae, tensors, path)
    return vae.requires_grad_(False).eval(), c


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("transformer", metavar="TRANSFORMER", help="for example ImageNet_384_large.pth")
    add("vq", metavar="VQ", help="vq_ds16_c2i.pt")
    add("--out", metavar="DIR", required=True, help="the folder of the checkpoint")
    add("--heads", type=int, help="of attention, for a width that none of the published ones has")
    add("--half", action="store_true", help="store the transformer in float16")
    add("--hub", metavar="REPO", help="download TRANSFORMER from this repository of the Hugging Face Hub, "
        "and VQ from FoundationVision/LlamaGen (needs huggingface_hub)")
    add("--force", action="store_true", help="replace a checkpoint that is there")
    args = parser.parse_args()
    vae_path, path = (Path(args.out) / f"{name}.safetensors" for name in ("vae", "transformer"))
    refuse_replacing(vae_path, args.force)
    refuse_replacing(path, args.force)
    if args.hub:
        args.transformer = download(args.hub, args.transformer)
        args.vq = download("FoundationVision/LlamaGen", args.vq)
    vae, transformer, config = load(args.transformer, args.vq, args.heads)
    config.transformer.half = args.half
    # Values to start from; the real files could not be tried. A revision in two sets hides a half at a time:
    # less was hidden in only 29% of the training.
    guidance = GUIDANCE.get(config.transformer.d_model, 1.5)
    vars(config.sample).update(t_draft=32, t_revise=2, rounds=1, draft_guidance=guidance,
                               revise_guidance=guidance)
    classes, titles = official.class_names(transformer.null)
    drr.save_vae(vae_path, vae, config)
    drr.save_transformer(path, transformer, config, classes, titles, vae)
    count = sum(p.numel() for p in transformer.parameters())
    print(f"{count / 1e6:.0f}M parameters, {transformer.null} classes, {vae.size}x{vae.size} -> {args.out}")


def download(repository, name):
    """The local path of a file of the Hugging Face Hub."""
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(repository, name)
    except Exception as error:                       # not installed, no network, no such file
        raise UserError(f"{name} could not be had from {repository} ({type(error).__name__}); pip install "
                        "huggingface_hub, or download the file and leave --hub out.") from None


KIND = models.Kind(MaskGIT, independent_mask, 2 / math.pi, drr.draft_and_revise, fixed={}, why="", null=True,
                   by_depth=False, graph=None, head=Head)


if __name__ == "__main__":
    run(main)
