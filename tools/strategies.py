"""Other ways to decode than the paper's, written around `drr.update`, and the paper's written down plainly.

    codes = strategies.sample(model, cond, seed, images, c)             # python -m tools.evaluate order=sobol

`decode` takes the place of `drr.draft_and_revise`; docs/study.md compares the strategies, none of which wins
clearly after revision. `plain_decode` is the slow, readable version: the fast one must draw the same codes.
"""
import math
from types import SimpleNamespace

import numpy as np
import torch

import drr
from drr import Sampling, State, UserError
from support import common

# What these values do is said in `decode`; these are the paper's.
DEFAULTS = {"order": "random", "draft_growing": False, "draft_ramp": False, "draft_pool": 1.0,
            "revise_share": 1.0, "revise_better": False}
ALLOWED = {"order": "one of random, sobol, halton", "draft_pool": "from 0 to 1",
           "revise_share": "above 0 to 1"}


def sampling_values(info, overrides, positions):
    """common.sampling_values with the keys of DEFAULTS besides: the values of a checkpoint's `info` (or of a
    configuration), with `key=value` overrides on top. Raises UserError as that does."""
    ours = [text for text in overrides if text.partition("=")[0] in DEFAULTS and "=" in text]
    c = common.sampling_values(info, [text for text in overrides if text not in ours], positions)
    values = {key: getattr(info.sample, key, value) for key, value in DEFAULTS.items()}
    given = set()
    for text in ours:
        key, _, value = text.partition("=")
        if key in given:
            raise UserError(f"{key} was given twice; give it once.")
        given.add(key)
        values[key] = common.parse_value(text, value)
    for key, value in values.items():
        values[key] = common.check_value(key, value, DEFAULTS[key], ALLOWED.get(key))
    return SimpleNamespace(**vars(c), **values)


# === Decoding: as drr.draft_and_revise, with six more choices ===============================================
@torch.inference_mode()
def decode(model, cond, noise, c, codes=None, region=None, update=drr.update):
    """As drr.draft_and_revise: yields the State after every update. A key that `c` lacks is the paper's.

    order           "sobol": stacks of a set lie far apart (`sobol_order`); "halton": as in Halton-MaskGIT,
                    one order for all images, in sets that grow as theirs do (`halton_partition`)
    draft_growing   few stacks in the first sets of the draft, many in the last (`growing_partition`)
    draft_ramp      the draft's guidance rises evenly, from none in the first update to draft_guidance
    draft_pool      0 is Top-C, 0.5 is Top-C-50% (`update_likeliest`), 1 is the paper's Random
    revise_share    a round revises this share of the stacks, those drawn with the lowest probability
    revise_better   a revision keeps the old stack where it is more likely than the new one (`update_better`)
    """
    c = SimpleNamespace(**DEFAULTS | vars(c))
    unlike = c.draft_growing or c.order == "halton" or c.draft_ramp or c.draft_pool < 1
    if update is not drr.update and unlike:
        raise UserError("Compiled updates must be alike, and draft_growing, draft_ramp, draft_pool and "
                        "order=halton make each of them different; leave those out, or do not compile.")
    if c.order == "sobol":
        noise = sobol_order(noise[0]), noise[1]
    if c.order == "halton":
        noise = halton_order(noise[0]), noise[1]
    order, uniforms = (tensor.to(cond.device) for tensor in noise)
    B, N, D = uniforms.shape[1:]
    if region is None:
        codes = cond.new_zeros(B, N, D)
        region = torch.ones(N, dtype=torch.bool, device=cond.device)
    inside = [o[region[o]].view(B, -1) for o in order]             # the region, in each round's random order
    state = State("draft", 0, codes, region.expand(B, N), log_p=torch.zeros(B, N, device=cond.device))

    sampling = Sampling(c.draft_temperature, c.draft_guidance, c.top_k, c.top_p)
    if c.draft_growing:
        sets = growing_partition(inside[0], c.t_draft)
    elif c.order == "halton":
        sets = halton_partition(inside[0], c.t_draft)
    else:
        sets = drr.partition(inside[0], c.t_draft)
    for t, positions in enumerate(sets):
        if c.draft_ramp:
            ramp = t / max(1, len(sets) - 1)                                               # 0 .. 1
            sampling = sampling._replace(guidance=1 + ramp * (c.draft_guidance - 1))
        if c.draft_pool < 1:
            state = update_likeliest(model, state, inside[0], positions.shape[1], c.draft_pool,
                                     fresh(uniforms[0], t), cond, sampling, update)
        else:
            state = update(model, state, positions, uniforms[0], cond, sampling)
        yield state

    sampling = Sampling(c.revise_temperature, c.revise_guidance, c.top_k, c.top_p)
    for m in range(1, 1 + c.rounds):
        state = state._replace(phase="revise", round=m)
        positions = inside[m]
        if c.revise_share < 1:
            positions = least_likely(state, positions, c.revise_share)
        for positions in drr.partition(positions, c.t_revise):
            if c.revise_better:
                state = update_better(model, state, positions, uniforms[m], cond, sampling, update)
            else:
                state = update(model, state, positions, uniforms[m], cond, sampling)
            yield state


def sample(model, cond, seed, images, c, codes=None, region=None, update=drr.update):
    """Codes (B, N, D), as drr.sample."""
    return drr.sample(model, cond, seed, images, c, codes, region, update, decode)


def sobol_order(order):
    """Orders (..., N) of the positions of a square map in which any run of successive ones is spread evenly:
    the Sobol sequence, moved (around the edges) so that it starts where `order` (..., N) does."""
    N = order.shape[-1]
    side = math.isqrt(N)
    points = torch.quasirandom.SobolEngine(2).draw(4 ** (2 * side).bit_length())       # visits all cells
    cells = (points * side).long().tolist()
    in_order = list(dict.fromkeys(map(tuple, cells)))                                  # by first visit
    y, x = torch.tensor(in_order, device=order.device).T                                   # (N,) each
    first = order[..., :1]
    return (y + first // side) % side * side + (x + first) % side


def halton_order(order):
    """For orders (..., N), always the same: the positions of a square map by first visit of the Halton
    sequence, base 2 for rows and 3 for columns (Besnier et al. 2025, arXiv 2503.17076)."""
    side = math.isqrt(order.shape[-1])
    index = np.arange(1, 1 + 10 * order.shape[-1])               # enough to visit every position
    cells = []
    for base in (2, 3):
        points, rest, scale = np.zeros(len(index)), index, 1.0
        while rest.any():                            # the digits, mirrored at the point
            scale /= base
            points += scale * (rest % base)
            rest = rest // base
        cells.append((points * side).astype(int))
    visits = dict.fromkeys((cells[0] * side + cells[1]).tolist())
    return torch.tensor(list(visits), device=order.device).expand_as(order)


def halton_partition(order, T):
    """As drr.partition, but after t sets n (1 - 2 / pi arccos(t / T)) positions are known, rounded down, and
    at least t: the schedule of Halton-MaskGIT's sampler, which computes in float32."""
    n = order.shape[1]
    T = min(T, n)
    share = 1 - torch.arccos(torch.arange(1, T) / T) / (math.pi * 0.5)
    ends = [max(t, int(known)) for t, known in enumerate(share * n, 1)]
    return list(order.tensor_split(ends, dim=1))


def growing_partition(order, T):
    """As drr.partition, but the t-th set leaves cos(pi t / 2 T) n positions, rounded (MaskGIT, arXiv
    2202.04200); each set has at least one position."""
    n = order.shape[1]
    T = min(T, n)
    ends = [max(t, round(n * (1 - math.cos(math.pi / 2 * t / T)))) for t in range(1, T)]
    return list(order.tensor_split(ends, dim=1))


def fresh(uniforms, t):
    """The uniforms (B, N, D) of the t-th update: those that are given for t = 0, then others.

    Top-C draws a stack that stays hidden again and again, and only because each draw is a new one do likely
    codes pile up. The noise of a decode is drawn before it begins, from an image's number alone; so that this
    stays so, the new noise of an image is seeded with some of its old.
    """
    if t == 0:
        return uniforms
    seeds = (uniforms.flatten(1)[:, :4] * 2 ** 24).long().tolist()                         # (B, 4), exact
    drawn = [np.random.default_rng([t, *seed]).random(uniforms.shape[1:], np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(drawn)).to(uniforms.device)


def update_likeliest(model, state, order, count, pool, uniforms, cond, sampling, update=drr.update):
    """Top-C and Top-C-50% (Appendix C): draws all hidden stacks and hides them again, all but `count`.

    Those that stay are the first in `order` (B, N) among the likeliest: the share `pool` of the drawn stacks,
    but at least `count`. A pool of 0 is Top-C, of 1 the paper's Random.
    """
    B = len(order)
    positions = order[state.hidden.gather(1, order)].view(B, -1)                       # (B, n), all hidden
    drawn = update(model, state, positions, uniforms, cond, sampling)
    log_p = drawn.log_p.gather(1, positions)
    rank = log_p.argsort(dim=1, descending=True, stable=True).argsort(1)                   # 0: the likeliest
    outside = rank >= max(count, math.ceil(pool * positions.shape[1]))
    first = outside.byte().argsort(dim=1, stable=True)[:, :count]                      # the pool first
    stays = torch.zeros_like(state.hidden).scatter(1, positions.gather(1, first), True)
    return merge(stays, drawn, state)


def update_better(model, state, positions, uniforms, cond, sampling, update=drr.update):
    """drr.update, but a stack that was there before stays if it is more likely than the new one."""
    drawn = update(model, state, positions, uniforms, cond, sampling)
    old = log_probability(model, state, positions, cond, sampling)                         # (B, n)
    old = torch.full_like(state.log_p, -math.inf).scatter(1, positions, old)
    stays = old > drawn.log_p
    return merge(stays, state._replace(log_p=old), drawn)


def merge(chosen, this, other):
    """The State `other` with the stacks of `this` where `chosen` (B, N)."""
    return State(other.phase, other.round, torch.where(chosen[..., None], this.codes, other.codes),
                 torch.where(chosen, this.hidden, other.hidden), torch.where(chosen, this.log_p, other.log_p))


def log_probability(model, state, positions, cond, sampling):
    """log p (B, n) of the stacks that stand at `positions` (B, n), predicted with all of them hidden."""
    hidden = state.hidden.scatter(1, positions, True)
    stacks = drr.select(state.codes, positions).flatten(0, 1)                              # (P, D), P = B n
    logits = depthwise_logits(model, state.codes, hidden, cond, positions, stacks)         # D times (P, K)
    if sampling.guidance != 1:
        null_cond = torch.full_like(cond, model.null)
        null = depthwise_logits(model, state.codes, hidden, null_cond, positions, stacks)
        logits = [l_null + sampling.guidance * (l_cond - l_null) for l_cond, l_null in zip(logits, null)]
    log_p = torch.zeros(len(stacks), device=stacks.device)
    for d, logits_d in enumerate(logits):
        p = drr.probabilities(logits_d, sampling)
        log_p += (p.gather(1, stacks[:, d:d + 1])[:, 0] / p.sum(1)).log()
    return log_p.view(positions.shape)


def depthwise_logits(model, codes, hidden, cond, positions, stacks):
    """The logits (P, K) of each depth, teacher-forced by `stacks` (P, D), at `positions` (B, n), P = B n."""
    h = model.context(codes, hidden, cond, positions).flatten(0, 1)                        # (P, d_model)
    cache, logits = None, []
    for d in range(stacks.shape[1]):
        logits_d, cache = model.depth_step(h, stacks, d, cache)
        logits.append(logits_d.float())
    return logits


def least_likely(state, positions, share):
    """Of `positions` (B, n), in their order, the share that was drawn with the lowest log-probability."""
    n = math.ceil(share * positions.shape[1])
    doubtful = state.log_p.gather(1, positions).argsort(dim=1, stable=True)[:, :n].sort(1).values
    return positions.gather(1, doubtful)


# === The paper's decoding, as one would write it down first =================================================
@torch.inference_mode()
def plain_decode(transformer, cond, noise, c):
    """Codes (B, N, D) for conditions cond (B, L) and `noise` of drr.draw_noise, in the paper's way.

    At every update all positions go through all blocks, with and without the condition, every depth starts
    from its first code again, and what is not needed is thrown away.
    """
    order, uniforms = (tensor.to(cond.device) for tensor in noise)
    B, N, D = uniforms.shape[1:]
    null_cond = torch.full_like(cond, transformer.null)
    codes = cond.new_zeros(B, N, D)
    hidden = torch.ones(B, N, dtype=torch.bool, device=cond.device)
    draft = c.t_draft, c.draft_temperature, c.draft_guidance
    revise = c.t_revise, c.revise_temperature, c.revise_guidance
    for m, (T, temperature, guidance) in enumerate([draft] + c.rounds * [revise]):
        sampling = Sampling(temperature, guidance, c.top_k, c.top_p)
        for positions in drr.partition(order[m], T):
            current = torch.zeros_like(hidden).scatter(1, positions, True)
            hidden = hidden | current
            h_cond = transformer.context(codes, hidden, cond).flatten(0, 1)                # (B N, d_model)
            h_null = transformer.context(codes, hidden, null_cond).flatten(0, 1)
            stacks = codes.flatten(0, 1).clone()                                           # (B N, D)
            for d in range(D):
                l_cond = transformer.depth_logits(h_cond, stacks)[:, d].float()
                l_null = transformer.depth_logits(h_null, stacks)[:, d].float()
                p = drr.probabilities(l_null + guidance * (l_cond - l_null), sampling)
                stacks[:, d] = drr.inverse_cdf(p, uniforms[m].flatten(0, 1)[:, d])
            codes = torch.where(current[..., None], stacks.view(B, N, D), codes)
            hidden = hidden & ~current
    return codes
