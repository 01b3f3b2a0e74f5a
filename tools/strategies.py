"""Draft-and-Revise as one would write it down first: at every update all positions go through all blocks, with and without the
condition, every depth starts from its first code again, and what is not wanted is thrown away. `drr.draft_and_revise` must draw the
same codes; bench.py measures how much faster it is."""
import torch

import drr


@torch.inference_mode()
def plain_decode(transformer, cond, noise, c):
    """Codes (B, N, D) for conditions cond (B, L), `noise` of drr.draw_noise and the paper's strategies: Random, no ramp."""
    order, uniforms = (t.to(cond.device) for t in noise)
    B, N, D = uniforms.shape[1:]
    codes, hidden = cond.new_zeros(B, N, D), torch.ones(B, N, dtype=torch.bool, device=cond.device)
    phases = [(c.t_draft, c.draft_temperature, c.draft_guidance)] + c.rounds * [(c.t_revise, c.revise_temperature, c.revise_guidance)]
    for m, (steps, temperature, guidance) in enumerate(phases):
        for positions in drr.partition(order[m], steps):
            chosen = torch.zeros_like(hidden).scatter(1, positions, True)
            hidden = hidden | chosen
            conditional = transformer.context(codes, hidden, cond)
            null = transformer.context(codes, hidden, torch.full_like(cond, transformer.null))
            drawn = codes.flatten(0, 1).clone()                                              # (B N, D), of all positions
            for d in range(D):
                l_cond, l_null = (transformer.depth_logits(h.flatten(0, 1), drawn)[:, d].float() for h in (conditional, null))
                logits = l_null + guidance * (l_cond - l_null)
                p = drr.probabilities(logits, drr.Sampling(temperature, guidance, c.top_k, c.top_p))
                drawn[:, d] = drr.inverse_cdf(p, uniforms[m].flatten(0, 1)[:, d])
            codes = torch.where(chosen[..., None], drawn.view(B, N, D), codes)
            hidden = hidden & ~chosen
    return codes
