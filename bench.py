"""Measures how fast the decode is, beside the matrix-product rate that the same machine reaches in the same minute.

    python bench.py                                           # the bundled checkpoint
    python bench.py --checkpoint DIR --batch 1,16 --t-draft 8,64
"""
import argparse
import math
import statistics
import time

import torch

import drr
from common import BUNDLED, add_device_arguments, pick_device, run, sampling_values
from estimate import matrix_rate, synchronize


def decode_flops(transformer, c):
    """Floating-point operations (2 a multiply-add) of the transformer for one image: all positions through the spatial
    blocks at each update, only those to be drawn through the depth blocks, twice where guidance is on. c: the section
    `sample`. LayerNorm, GELU and softmax are not counted, as in torch's own counter."""
    d, K, n_z = transformer.ln.weight.numel(), *transformer.codebook.shape
    N, D, T = transformer.positions, transformer.depth, transformer.positions + transformer.cond_length
    block = lambda tokens, keys: tokens * (24 * d * d + 4 * keys * d)          # 12 d^2 weights; q k^T, and the sum of v
    spatial = len(transformer.spatial) * block(T, T) + 2 * N * n_z * d
    stack = sum(len(transformer.depthwise) * block(1, t + 1) + 2 * d * K + 2 * n_z * d * (t > 0) for t in range(D))
    times = lambda guidance: 2 if guidance != 1 and transformer.null > 0 else 1    # without conditions nothing is guided
    total, hidden = 0, N
    for t, positions in enumerate(drr.partition(torch.zeros(1, N), c.t_draft, c.draft_growing)):
        n = positions.shape[1]
        guidance = 1 if c.draft_ramp and t == 0 else c.draft_guidance
        total += times(guidance) * (spatial + (n if c.draft_pool == 1 else hidden) * stack)
        hidden -= n
    n = math.ceil(c.revise_share * N)
    revision = min(c.t_revise, n) * spatial + n * stack * (1 + c.revise_better)
    return total + c.rounds * times(c.revise_guidance) * revision


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="DIR", default=str(BUNDLED))
    numbers = lambda text: [int(v) for v in text.split(",")]
    parser.add_argument("--batch", type=numbers, default=[1, 16], help="batch sizes (1,16)")
    parser.add_argument("--t-draft", type=numbers, default=[8, 64], help="draft lengths (8,64)")
    parser.add_argument("--repeat", type=int, default=3, help="decodes per row; the median counts (3)")
    add_device_arguments(parser)
    args = parser.parse_args()
    device, dtype = pick_device(args)
    vae, transformer, info = drr.load_checkpoint(args.checkpoint)
    if min(*args.batch, *args.t_draft, args.repeat) < 1 or max(args.t_draft) > transformer.positions:
        raise drr.UserError(f"--batch, --t-draft and --repeat start at 1, and --t-draft ends at {transformer.positions}.")
    model, c = drr.TorchModel(vae, transformer, device, dtype), sampling_values(info.sample, (), transformer.positions)
    print(f"{device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("batch  T_draft  s per image  images per s  GFLOP per image   GFLOP/s  matrix products  share")
    for batch in args.batch:
        for c.t_draft in args.t_draft:
            noise = drr.draw_noise(0, range(batch), 1 + c.rounds, transformer.positions, transformer.depth)
            cond = torch.zeros(batch, transformer.cond_length, dtype=torch.int64, device=device)
            times, rates = [], []
            for trial in range(1 + args.repeat):                        # the first is the warm-up
                rates.append(matrix_rate(device, dtype, 0.5))
                start = time.perf_counter()
                *_, last = drr.draft_and_revise(model, cond, noise, c)
                model.decode(last.codes)
                synchronize(device)
                times.append(time.perf_counter() - start)
            seconds, rate = statistics.median(times[1:]), statistics.median(rates)
            flops = decode_flops(transformer, c)
            reached = flops * batch / seconds
            print(f"{batch:5d}  {c.t_draft:7d}  {seconds / batch:11.4f}  {batch / seconds:12.2f}  {flops / 1e9:15.1f}  "
                  f"{reached / 1e9:8.0f}  {rate / 1e9:8.0f} GFLOP/s  {reached / rate:5.0%}", flush=True)


if __name__ == "__main__":
    run(main)
