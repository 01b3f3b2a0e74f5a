"""What the programs that measure share: peak memory, models with random weights, arithmetic of a decode."""
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import drr
from drr import UserError
from support import models
from support.common import load_config
from tools import strategies


# === Memory =================================================================================================
def reset_peak(device):
    """Starts a new peak for `peak_memory` on a GPU and on Linux; elsewhere a process has but one peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """The most bytes held since `reset_peak`: on a GPU by PyTorch, including what captured graphs keep;
    elsewhere by this process in RAM. Raises UserError on Windows, which does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    # Linux, whose getrusage includes the memory of the parent process.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        raise UserError("Memory is measured on a GPU, or on Linux and macOS; use --device cuda.") from None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# === Models whose speed counts, not their pictures ==========================================================
def random_checkpoint(preset):
    """What drr.load_checkpoint returns, for a preset's model with random weights and 1,000 classes."""
    config = load_config(preset)
    classes = [str(i) for i in range(1000)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = drr.RQVAE(config.vae)
        conditions = drr.conditions(config.transformer, classes)
        transformer = models.build(config.transformer, conditions, vae.side ** 2, vae.quantizer.depth,
                                   vae.quantizer.codebook)
    info = SimpleNamespace(**vars(config), classes=classes, titles=classes)
    return vae.requires_grad_(False).eval(), transformer.requires_grad_(False).eval(), info


# === Arithmetic: what one image needs =======================================================================
def count_attention(q, k, v, *arguments, **named):
    return sdpa_flop_count(q, k, v)


# torch's counter knows the fused attention kernels of GPUs, and not yet the CPU's.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention}


def decode_flops(transformer, c):
    """Floating-point operations of the transformer for one image (2 per multiply-add): matrix products only,
    as in torch's own counter, and only those that the algorithm needs.

    c   sampling values: the section `sample`, with or without the keys of tools/strategies.py
    """
    c = SimpleNamespace(**{**strategies.DEFAULTS, **vars(c)})
    d = transformer.ln.weight.numel()
    K, n_z = transformer.codebook.shape
    N, D = transformer.positions, transformer.depth
    T = N + transformer.cond_length

    def block(tokens, keys):
        return tokens * (24 * d * d + 4 * keys * d)    # 12 d^2 weights; q k^T, and the sum of v

    def spatial(n):
        """One pass through all blocks; of the last one, all but keys and values is computed for n tokens."""
        last = T * 4 * d * d + n * (20 * d * d + 4 * T * d)
        return 2 * N * n_z * d + (len(transformer.spatial) - 1) * block(T, T) + last

    stack = 0                                          # one position, all depths
    for depth in range(D):
        stack += len(transformer.depthwise) * block(1, depth + 1) + 2 * d * K
        if depth > 0:
            stack += 2 * n_z * d                       # the embedding of the codes so far

    def update(drawn, guidance, passes=1):
        """An update that draws n stacks: guidance needs all of it under the null condition as well."""
        return (1 + (guidance != 1)) * (spatial(drawn) + passes * drawn * stack)

    total, left = 0, N
    positions = torch.arange(N)[None]                  # (1, N)
    if c.draft_growing:
        sets = strategies.growing_partition(positions, c.t_draft)
    else:
        sets = drr.partition(positions, c.t_draft)
    for t, n in enumerate(s.shape[1] for s in sets):
        guidance = 1 if c.draft_ramp and t == 0 else c.draft_guidance
        drawn = n if c.draft_pool == 1 else left       # a pool: all hidden stacks are drawn, n of them stay
        total += update(drawn, guidance)
        left -= n
    for s in drr.partition(positions[:, :math.ceil(c.revise_share * N)], c.t_revise):
        # A revision that keeps the better of two stacks scores the old one, too, from the same contexts
        # (tools/strategies.py computes those a second time, which is not needed and not counted).
        total += c.rounds * update(s.shape[1], c.revise_guidance, passes=1 + c.revise_better)
    return total


def decoder_flops(vae):
    """Floating-point operations of the RQ-VAE's decoder for one image, counted by torch."""
    device = vae.quantizer.codebook.device
    codes = torch.zeros(1, vae.side ** 2, vae.quantizer.depth, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        vae.decode(codes)
    return counter.get_total_flops()
