"""RQ-Transformer (Lee et al., CVPR 2022, arXiv 2203.01941), the autoregressive predecessor, in raster order.

    python -m related.rq_transformer FOLDER --out runs/rq-imagenet-1.4b    # published weights -> a checkpoint
    python sample.py --checkpoint runs/rq-imagenet-1.4b --class 980

FOLDER holds a release of kakaobrain/rq-vae-transformer as it was packed: stage1/ and stage2/, in each of them
config.yaml and model.pt (or model.safetensors). Training: a preset with `transformer.kind: autoregressive`.

Unlike in the Contextual RQ-Transformer (drr.py), a stack sees the stacks before it, never those after it, so
that there is nothing to draft or to revise: N stacks are drawn one after the other, in N updates.
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import yaml
from torch import nn

import drr
from drr import UserError
from support import models, official
from support.common import load_config, run, sampling_values
from support.runs import refuse_replacing


# === The model: codes (B, N, D), cond (B, L) -> h (B, N, d_model) -> logits =================================
class RQTransformer(drr.ContextualRQTransformer):
    """Predicts each stack from those before it in raster order and from the condition: causal over space and
    over depth. The sequence is cond_1 .. cond_L, S_1 .. S_(N-1); S_n is predicted by the token before it."""

    def __init__(self, c, conditions, positions, depth, codebook):
        super().__init__(c, conditions, positions, depth, codebook)
        del self.mask_embed                                        # what comes later is never seen,
        self.cond_embed = nn.Embedding(conditions, c.d_model)      # and no condition was left out
        nn.init.normal_(self.cond_embed.weight, std=0.02)
        self.length = self.cond_length + positions - 1             # of the sequence

    def context(self, codes, mask, cond):
        """h (B, N, d_model) of codes (B, N, D), cond (B, L); the mask has no influence."""
        u = self.w_in(F.embedding(codes[:, :-1], self.codebook).sum(2)) + self.pos[:-1]
        x = torch.cat([self.cond_embed(cond) + self.cond_pos, u], 1)               # (B, L + N - 1, d_model)
        return self.run(self.spatial, x, causal=True)[:, self.cond_length - 1:]

    def context_step(self, stack, cond, t, cache=None):
        """Token t = 0 .. L + N - 2 alone: a condition's, or the stack (B, D) at position t - L. Returns the
        context (B, d_model) of the position after it, and the cache for the next token."""
        if t == 0:
            shape = len(self.spatial), 2, len(cond), self.heads, self.length, self.head_dim
            cache = self.pos.new_empty(shape)
        if t < self.cond_length:
            v = self.cond_embed(cond[:, t]) + self.cond_pos[t]
        else:
            v = self.w_in(F.embedding(stack, self.codebook).sum(1)) + self.pos[t - self.cond_length]
        v = v[:, None]                                                             # (B, 1, d_model)
        for block, block_cache in zip(self.spatial, cache):
            v = block(v, cache=block_cache, position=t)
        return v[:, 0], cache

    @torch.inference_mode()
    def logits(self, codes, cond):
        """Teacher-forced logits (B, N, D, K), float32, of codes (B, N, D) under cond (B, L)."""
        h = self.context(codes, None, cond)
        return self.depth_logits(h.flatten(0, 1), codes.flatten(0, 1)).float().unflatten(0, codes.shape[:2])


def hide_all(uniforms):
    """The mask of a training step, (B, N): the loss is that of all stacks, and no later one is ever seen."""
    return torch.ones_like(uniforms[:, 1:], dtype=torch.bool)


# === Decoding: noise -> codes, in raster order ==============================================================
@torch.inference_mode()
def raster(model, cond, noise, c, codes=None, region=None, update=None):
    """As drr.draft_and_revise, a State after every stack: in the region they are drawn in raster order, and
    what is outside stays. A stack sees nothing to its right in its own row, and nothing below. `update` is
    there for the common signature and has no influence."""
    uniforms = noise[1][0].to(cond.device)                                         # (B, N, D)
    B, N, D = uniforms.shape
    L = cond.shape[1]
    network = getattr(model, "transformer", model)                 # a TorchModel's, or an ExportedModel
    if region is None:
        codes = cond.new_zeros(B, N, D)
        region = torch.ones(N, dtype=torch.bool, device=cond.device)
    hidden, log_p = region.repeat(B, 1), torch.zeros(B, N, device=cond.device)
    drawn = set(region.nonzero().flatten().tolist())
    cache = None
    for n in range(1 - L, 1 + max(drawn)):                         # below 0 the condition's tokens go first
        h, cache = network.context_step(codes[:, max(n - 1, 0)], cond, n + L - 1, cache)
        if n not in drawn:
            continue
        stack, log_p_n = draw_stack(network, h, uniforms[:, n], c)
        codes, hidden, log_p = codes.clone(), hidden.clone(), log_p.clone()
        codes[:, n], hidden[:, n], log_p[:, n] = stack, False, log_p_n
        yield drr.State("draft", 0, codes, hidden, log_p)


def draw_stack(network, h, uniforms, c):
    """A stack (B, D) from contexts h (B, d_model) and uniforms (B, D), and its log-probability (B,)."""
    stack = torch.zeros(uniforms.shape, dtype=torch.int64, device=h.device)
    log_p, cache = torch.zeros(len(h), device=h.device), None
    for d in range(stack.shape[1]):
        top_k, top_p = (x[d] if isinstance(x, list) else x for x in (c.top_k, c.top_p))
        logits, cache = network.depth_step(h, stack, d, cache)
        p = drr.probabilities(logits, drr.Sampling(c.draft_temperature, 1.0, top_k, top_p))
        k = drr.inverse_cdf(p, uniforms[:, d])
        log_p += (p.gather(1, k[:, None])[:, 0] / p.sum(1)).log()
        stack[:, d] = k
    return stack, log_p


# === Export: one token at a time, as a graph ================================================================
class SpatialStep(nn.Module):
    """`RQTransformer.context_step` with `position` as a tensor, (1,), and a cache of fixed size; the token's
    new keys and values are returned, not written."""

    def __init__(self, transformer):
        super().__init__()
        self.network = transformer
        self.register_buffer("tokens", torch.arange(transformer.length), persistent=False)

    def forward(self, stack, cond, position, cache):
        t, L = self.network, self.network.cond_length
        e = F.embedding(stack, t.codebook).sum(1)                                  # (B, n_z)
        u = t.w_in(e) + t.pos[(position - L).clamp(min=0)]
        first = position.clamp(max=L - 1)
        token = t.cond_embed(cond.index_select(1, first)[:, 0]) + t.cond_pos[first]
        v = torch.where(position < L, token, u)                                    # (B, d_model)
        return models.one_token(t.spatial, v, cache, self.tokens < position)


def graph(t, kind):
    """The module that is exported as `spatial`, with its inputs and outputs as [name, shape, type]."""
    cache = [len(t.spatial), 2, "rows", t.heads, t.length, t.head_dim]
    inputs = [["stack", ["rows", t.depth], "int64"], ["cond", ["rows", t.cond_length], "int64"],
              ["position", [1], "int64"], ["cache", cache, kind]]
    outputs = [["context", ["rows", t.ln.weight.numel()], kind], ["new", cache[:4] + cache[5:], kind]]
    return SpatialStep(t), inputs, outputs


# === Published weights ======================================================================================
NAMES = {"body_transformer.blocks.": "spatial.", "head_transformer.blocks.": "depthwise.",
         ".attn.query.": ".qkv.", ".attn.proj.": ".proj.", ".mlp.0.": ".fc1.", ".mlp.2.": ".fc2.",
         "input_mlp.": "w_in.", "head_mlp.": "w_depth.", "pos_emb_hw": "pos", "pos_emb_d": "depth_pos",
         "pos_emb_cond": "cond_pos", "cond_emb.": "cond_embed.", "classifier.layer_norm.": "ln.",
         "classifier.linear.": "classifier."}


def load_official(folder):
    """(vae, transformer) of a release, float32, on the CPU, the transformer's memory mapped from the file.
    Raises UserError for a missing, damaged or other file, and for sizes that do not fit together."""
    vae_section, transformer_section, conditions, _ = read_sections(folder)
    vae = official.load_official_rqvae(model_file(folder, "stage1"), vae_section)
    path = model_file(folder, "stage2")
    state = official.read_state(path, "RQ-Transformer")
    with drr.explained(path):
        with torch.device("meta"):                   # without memory: the file's tensors take their place
            transformer = RQTransformer(transformer_section, conditions, vae.side ** 2, vae.quantizer.depth,
                                        vae.quantizer.codebook)
        qkv = {name: joined(state, name) for name in list(state) if ".attn.query." in name}
        again = official.read_state(path, "RQ-Transformer")
        state = qkv | {name: again[name] for name in state}        # what was read for qkv leaves the memory
        tensors = renamed(state, vae.quantizer.depth)
    drr.fill(transformer, tensors, path, assign=True)
    return vae, transformer.requires_grad_(False).eval()


def joined(state, name):
    """Takes a query's weight or bias, and its key's and value's, out of `state`: ours are one."""
    return torch.cat([state.pop(name.replace("query", part)) for part in ("query", "key", "value")])


def renamed(state, depth):
    """The published tensors by this project's names; what it does not know keeps its own."""
    if any(name.startswith("tok_emb") for name in state):
        raise ValueError("embeddings of its own (tok_emb), which only transformers without the RQ-VAE's "
                         "codebook have; no released one does")
    if state["classifier.linear.weight"].dim() != 2:
        raise ValueError("a classifier for each depth; only one that all depths share is supported")
    result = {}
    for name, tensor in state.items():
        if name.startswith("cond_classifier."):      # predicts text, for a loss that sampling does not need
            continue
        if name == "input_mlp.bias":                 # theirs is added to each of the D vectors of a stack
            tensor = tensor * depth
        if name.startswith("pos_emb"):
            tensor = tensor[0]
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        result[name] = tensor.float()
    return result


def model_file(folder, stage):
    """FOLDER/STAGE/model.pt, or model.safetensors where there is none."""
    path = Path(folder) / stage / "model.pt"
    other = path.with_suffix(".safetensors")
    return other if other.exists() and not path.exists() else path


def read_sections(folder):
    """The sections `vae` and `transformer`, the number of conditions and {temp, top_k, top_p} where they are
    given, from a release's two config.yaml."""
    base = load_config("imagenet-821m")
    found = []
    for stage, kind in (("stage1", "rq-vae"), ("stage2", "rq-transformer")):
        path = Path(folder) / stage / "config.yaml"
        try:
            document = yaml.safe_load(path.read_text())
            arch = document["arch"]
            if arch["type"] != kind:
                raise UserError(f"{path} is of a model {arch['type']!r}; expected {kind!r}.")
            found.append((vae_section if kind == "rq-vae" else transformer_section)(arch, base))
            sampling = dict(document.get("sampling") or {})
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; give the folder of a release, with stage1/ and stage2/, "
                            "in each of them config.yaml and model.pt.") from None
        except (yaml.YAMLError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{path} does not describe a released model ({type(error).__name__}: {error}); "
                            "copy it again.") from None
    (vae, code_shape), (transformer, conditions, needed) = found
    if needed != (code_shape, vae.codebook_size, vae.code_dim):
        raise UserError(f"{folder}: stage2 is for codes {needed[0]} of a codebook {needed[1:]}, stage1 has "
                        f"{code_shape} and {(vae.codebook_size, vae.code_dim)}; keep the two stages of one "
                        "release together.")
    return vae, transformer, conditions, sampling


def vae_section(arch, base):
    h, d = arch["hparams"], arch["ddconfig"]
    height, width, depth = h["code_shape"]
    section = {**vars(base.vae), **{key: d[key] for key in ("resolution", "ch", "ch_mult", "num_res_blocks",
                                                            "attn_resolutions", "z_channels")}}
    section |= {"code_dim": h["embed_dim"], "codebook_size": h["n_embed"], "depth": depth,
                "ema_decay": h["decay"]}
    return SimpleNamespace(**section), (height, width, depth)


def transformer_section(arch, base):
    d, conditions, length = arch["embed_dim"], arch["vocab_size_cond"], arch["block_size_cond"]
    cond = "text" if length > 1 else "class" if conditions > 1 else "none"
    heads = arch["body"]["block"]["n_head"]
    if arch["head"]["block"]["n_head"] != heads:
        raise ValueError("head.block.n_head is not body.block.n_head")
    for key in ("input_emb_vqvae", "head_emb_vqvae", "cumsum_depth_ctx", "shared_cls_emb"):
        if not arch.get(key, True):
            raise ValueError(f"{key} is false")
    section = {**vars(base.transformer), "kind": "autoregressive", "n_spatial": arch["body"]["n_layer"],
               "n_depth": arch["head"]["n_layer"], "d_model": d, "head_dim": d // heads, "cond": cond,
               "cond_dropout": 0.0, "text_length": length, "text_vocab": conditions}
    needed = tuple(arch["block_size"]), arch["vocab_size"], arch["input_embed_dim"]
    return SimpleNamespace(**section), conditions, needed


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="a release: stage1/ and stage2/")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder of the checkpoint")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--tokenizer", nargs=2, metavar=("VOCAB", "MERGES"),
                        help="of texts: the release's vocab.json and merges.txt")
    args = parser.parse_args()
    paths = [Path(args.out) / f"{name}.safetensors" for name in ("vae", "transformer")]
    for path in paths:
        refuse_replacing(path, args.force)
    config = load_config("rq-imagenet-821m")
    config.vae, config.transformer, conditions, sampling = read_sections(args.folder)
    vae, transformer = load_official(args.folder)
    names = {"temp": "draft_temperature", "top_k": "top_k", "top_p": "top_p"}
    vars(config.sample).update({names[key]: sampling[key] for key in names if sampling.get(key)})
    config.sample = sampling_values(config, [], transformer.positions)
    classes = titles = [""]
    if config.transformer.cond == "class":
        classes, titles = official.class_names(conditions)
    if args.tokenizer and config.transformer.cond != "text":
        raise UserError("--tokenizer is for releases of text; leave it out.")
    if args.tokenizer:
        from support.text import official_tokenizer
        config.transformer.tokenizer = official_tokenizer(args.tokenizer, config.transformer)
    drr.save_vae(paths[0], vae, config)
    drr.save_transformer(paths[1], transformer, config, classes, titles, vae)
    count = sum(p.numel() for p in transformer.parameters())
    print(f"{count / 1e6:.0f}M parameters, {conditions} condition(s) -> {args.out}")


KIND = models.Kind(
    RQTransformer, hide_all, 1.0, raster, null=False, by_depth=True, graph=graph, head=None,
    fixed={"t_draft": None, "t_revise": 1, "rounds": 0, "revise_temperature": 1.0, "draft_guidance": 1.0,
           "revise_guidance": 1.0},
    why="an autoregressive transformer draws every stack once, in raster order, and has no null class; it "
        "takes draft_temperature, top_k, top_p and batch_size")


if __name__ == "__main__":
    run(main)
