"""Measures how fast decoding and training are, beside the matrix-product rate that the same machine reaches in the same run.

    python bench.py                                           # the bundled checkpoint, eager and compiled
    python bench.py --mode eager,plain,raster                 # beside a plain decode, and one position at a time
    python bench.py --preset imagenet-821m --batch 1,100 --t-draft 8,32,64 --mode eager,graphs,compiled+graphs
    python bench.py --train tiny-imagenet-32                  # a training step of both stages

Modes: eager; compiled (fast.py); on a GPU graphs and compiled+graphs (its CUDA graphs); plain (tests/plain.py: every position through
everything, no cache); raster (the same model, one position at a time in raster order, no revision). Sampling values are the
checkpoint's or the preset's; key=value changes them.
"""
import argparse
import copy
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import drr
from tools import estimate
from support import fast
from support.common import (BUNDLED, HERE, PRECISIONS, add_device_arguments, load_config, matrix_rate, peak_ram, pick_device,
                    random_checkpoint, run, sampling_values, synchronize)
from drr import UserError

PAPERS = ("order=random", "draft_pool=1", "draft_growing=false", "draft_ramp=false", "revise_share=1", "revise_better=false")
MODES = ("eager", "compiled", "graphs", "compiled+graphs", "plain", "raster")


# === Arithmetic: what one image needs ===============================================================================
# torch's counter knows the fused attention kernels of GPUs, and not yet the CPU's.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                 lambda q, k, v, *_, **named: sdpa_flop_count(q, k, v)}


def decode_flops(transformer, c):
    """Floating-point operations (2 a multiply-add) of the transformer for one image: matrix products only, as in torch's own
    counter, and only those that the algorithm needs. c: the section `sample`."""
    d, K, n_z = transformer.ln.weight.numel(), *transformer.codebook.shape
    N, D, T = transformer.positions, transformer.depth, transformer.positions + transformer.cond_length
    block = lambda tokens, keys: tokens * (24 * d * d + 4 * keys * d)      # 12 d^2 weights; q k^T, and the sum of v
    last = lambda n: T * 4 * d * d + n * (20 * d * d + 4 * T * d)          # keys and values of all, the rest of n tokens
    spatial = lambda n: 2 * N * n_z * d + (len(transformer.spatial) - 1) * block(T, T) + last(n)
    stack = sum(len(transformer.depthwise) * block(1, t + 1) + 2 * d * K + 2 * n_z * d * (t > 0) for t in range(D))
    times = lambda guidance: 2 if guidance != 1 and transformer.null > 0 else 1    # without conditions nothing is guided
    total, left = 0, N
    sizes = lambda n, steps, growing=False: [len(s[0]) for s in drr.partition(torch.zeros(1, n), steps, growing)]
    for t, n in enumerate(sizes(N, c.t_draft, c.draft_growing)):
        drawn = n if c.draft_pool == 1 else left
        total += times(1 if c.draft_ramp and t == 0 else c.draft_guidance) * (spatial(drawn) + drawn * stack)
        left -= n
    for n in sizes(math.ceil(c.revise_share * N), c.t_revise):
        total += c.rounds * times(c.revise_guidance) * (spatial(n) + n * stack * (1 + c.revise_better))
    return total


def decoder_flops(vae):
    """Floating-point operations of the RQ-VAE's decoder for one image, counted by torch."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        vae.decode(torch.zeros(1, vae.side ** 2, vae.quantizer.depth, dtype=torch.int64, device=vae.quantizer.codebook.device))
    return counter.get_total_flops()


# === Memory =========================================================================================================
def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")         # Linux: the peak of this process starts again


def peak_memory(device):
    """MiB: on a GPU what PyTorch has taken of it; on Linux the most that the process held since `reset_peak`, elsewhere since
    it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2 ** 20      # with what captured graphs keep for themselves
    return peak_ram() / 2 ** 20


# === Decoding =======================================================================================================
class Stopwatch:
    """A model that adds up the time in each of its functions. To see it, it waits for the device at each call."""

    def __init__(self, model, device):
        self.model, self.device, self.seconds = model, device, dict.fromkeys(("context", "depth_step", "decode"), 0.0)

    def __getattr__(self, name):
        function = getattr(self.model, name)
        if name not in self.seconds:
            return function

        def measured(*arguments):
            synchronize(self.device)
            start = time.perf_counter()
            result = function(*arguments)
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - start
            return result
        return measured


def prepare(model, mode, batch, c, device):
    """A function that decodes one batch in this mode and returns the images, and the mode's sampling values."""
    transformer = model.transformer
    if mode == "raster":
        c = sampling_values(c, [f"t_draft={model.positions}", "rounds=0", *PAPERS], model.positions)
    order, uniforms = drr.draw_noise(0, range(batch), 1 + c.rounds, model.positions, model.depth)
    noise = (torch.arange(model.positions).expand_as(order) if mode == "raster" else order), uniforms
    cond = torch.zeros(batch, transformer.cond_length, dtype=torch.int64, device=device)
    if mode == "plain":
        if vars(c) != vars(sampling_values(c, PAPERS, model.positions)):
            raise UserError("Mode plain knows the paper's strategy only; leave the others out, or plain. Its values are "
                            f"{' '.join(PAPERS)}.")
        sys.path.append(str(HERE / "tests"))
        from plain import plain_decode
        return lambda model=model: model.decode(plain_decode(transformer, cond, noise, c)), c
    if mode not in ("eager", "raster"):
        model = copy.copy(model)                              # the same networks
        fast.speed_up(model, c, "compiled" in mode, "graphs" in mode)

    def decode(model=model):
        *_, last = drr.draft_and_revise(model, cond, noise, c)
        return model.decode(last.codes)
    return decode, c


def timed(work, device):
    """Seconds that work() takes, and the most MiB held meanwhile."""
    reset_peak(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start, peak_memory(device)


def decode_rows(model, batch, c, modes, rates, device, repeat, bar):
    """Cells of the table for each mode, all decoding in turns, since a machine's speed moves; `rates` gets more measurements."""
    prepared = {mode: prepare(model, mode, batch, c, device) for mode in modes}
    taken = {mode: [] for mode in modes}
    for trial in range(1 + repeat):                           # the first is the warm-up
        for precision, measured in rates.items():
            measured.append(matrix_rate(device, PRECISIONS[precision], 0.3))
        for mode in modes:
            bar.set_description(f"batch {batch}, T_draft {c.t_draft}, {mode}")
            taken[mode].append(timed(prepared[mode][0], device))
            bar.update()
    for mode, (decode, values) in prepared.items():
        seconds, memory = zip(*taken[mode])
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(taken[modes[0]][1:], taken[mode][1:]))
        parts = None
        if mode in ("eager", "raster"):
            watched = Stopwatch(model, device)
            total, _ = timed(lambda: decode(watched), device)
            parts = [s / total for s in watched.seconds.values()]
        flops = decode_flops(model.transformer, values) + decoder_flops(model.vae)
        yield mode, batch, values.t_draft, statistics.median(seconds[1:]), ratio, flops, max(memory), parts, seconds[0]


def decode_table(args, name, checkpoint, device, dtype):
    vae, transformer, info = checkpoint
    c = sampling_values(info.sample, args.overrides, transformer.positions)
    if min(*args.batch, *args.t_draft) < 1 or max(args.t_draft) > transformer.positions:
        raise UserError(f"--batch and --t-draft start at 1, and --t-draft ends at {transformer.positions}.")
    precision = next(k for k, v in PRECISIONS.items() if v == dtype)
    model = fast.torch_model(vae, transformer, device, dtype)
    rates, rows = {"fp32": [], "bf16": []}, []
    total = len(args.batch) * len(args.t_draft) * len(args.mode) * (1 + args.repeat)
    with tqdm(total=total, unit="decode") as bar:
        for batch, c.t_draft in itertools.product(args.batch, args.t_draft):
            rows += decode_rows(model, batch, c, args.mode, rates, device, args.repeat, bar)
    rates = {p: statistics.median(measured) for p, measured in rates.items()}
    print(f"{name}, {precision}, guidance {c.draft_guidance} / {c.revise_guidance}, {c.rounds} revisions of {c.t_revise} updates; "
          f"{describe(device)}; " + ", ".join(f"{p} products {rate / 1e9:,.0f} GFLOP/s" for p, rate in rates.items()))
    print(f"| mode | batch | T_draft | s per image | images/s | as fast as {args.mode[0]} | GFLOP per image | GFLOP/s | of fp32 / bf16 products "
          "| peak MiB | spatial, depth, sampling, decoder | first decode, s |\n" + "|---" * 12 + "|")
    for mode, batch, t_draft, seconds, ratio, flops, memory, parts, first in rows:
        reached, split = flops * batch / seconds, "-"
        if parts:
            spatial, depth, decoder = parts
            split = ", ".join(f"{share:.0%}" for share in (spatial, depth, 1 - sum(parts), decoder))
        print(f"| {mode} | {batch} | {t_draft} | {seconds / batch:.4f} | {batch / seconds:.2f} | {ratio:.2f} | {flops / 1e9:.2f} | "
              f"{reached / 1e9:,.0f} | {reached / rates['fp32']:.0%} / {reached / rates['bf16']:.0%} | {memory:,.0f} | {split} | {first:.2f} |")


# === Training =======================================================================================================
def train_row(stage, config, device, dtype, repeat, progress):
    """(micro-batch, median seconds of a step of it, FLOP of it, MiB): forward, backward and AdamW on random images or codes."""
    c = getattr(config, stage)
    batch = estimate.micro_batch(stage, c, 1)
    parts = estimate.build(stage, config)
    for module in (parts.trained, parts.frozen):
        if module:
            module.to(device)
    optimizer = torch.optim.AdamW(parts.trained.parameters(), lr=1e-4, fused=True)
    reset_peak(device)
    times = []
    for step in range(1 + repeat):
        start = time.perf_counter()
        estimate.forward_backward(stage, config, parts, batch, device, dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        synchronize(device)
        times.append(time.perf_counter() - start)
        progress.update()
    counter = FlopCounterMode(display=False)
    estimate.dry_run(stage, config, batch, counter)
    return batch, statistics.median(times[1:]), counter.get_total_flops(), peak_memory(device)


def train_table(args, device, dtype):
    config = load_config(args.train, args.overrides, ("vae", "transformer"))
    precision = next(k for k, v in PRECISIONS.items() if v == dtype)
    rate = matrix_rate(device, dtype)
    with tqdm(total=2 * (1 + args.repeat), unit="step") as bar:
        rows = [(stage, *train_row(stage, config, device, dtype, args.repeat, bar)) for stage in ("vae", "transformer")]
    print(f"{args.train}, eager; {describe(device)}; {precision} products {rate / 1e9:,.0f} GFLOP/s")
    print("| stage | precision | images at a time | s per step | images/s | GFLOP per image | share of the products | peak MiB |\n"
          + "|---" * 8 + "|")
    for stage, batch, seconds, flops, memory in rows:
        print(f"| {stage} | {precision} | {batch} | {seconds:.3f} | {batch / seconds:.1f} | {flops / batch / 1e9:.1f} | "
              f"{flops / seconds / rate:.0%} | {memory:,.0f} |")


def whole_numbers(text):
    return [int(v) for v in text.split(",")]


def describe(device):
    named = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return f"{named}, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="a trained model (the bundled one)")
    add("--preset", help="a preset of config.yaml with random weights instead")
    add("--train", metavar="PRESET", help="training steps of a preset instead of decoding")
    add("--batch", type=whole_numbers, help="batch sizes (1,16)")
    add("--t-draft", type=whole_numbers, help="draft lengths (8,64)")
    add("--mode", help=f"some of {','.join(MODES)} (eager,compiled; on a GPU eager,graphs,compiled+graphs)")
    add("--repeat", type=int, default=3, help="decodes or steps per row after the first; the median counts (3)")
    add("overrides", nargs="*", metavar="key=value", help="sampling values; with --train section.key=value")
    add_device_arguments(parser, fp8=True)
    args = parser.parse_intermixed_args()
    idle = [f"--{name.replace('_', '-')}" for name in ("batch", "t_draft", "mode") if args.train and getattr(args, name)]
    idle += [text for text in args.overrides if text.startswith(("t_draft=", "batch_size=")) and not args.train]
    if idle:
        instead = "leave it out with --train" if args.train else "use --t-draft and --batch"
        raise UserError(f"{idle[0]} does not apply here; {instead}.")
    if args.repeat < 1:
        raise UserError(f"--repeat is {args.repeat}; expected a number from 1.")
    args.batch, args.t_draft = args.batch or [1, 16], args.t_draft or [8, 64]
    device, dtype = pick_device(args)
    args.mode = (args.mode or ("eager,graphs,compiled+graphs" if device.type == "cuda" else "eager,compiled")).split(",")
    for mode in args.mode:
        if mode not in MODES or "graphs" in mode and device.type != "cuda":
            raise UserError(f"--mode {mode} does not exist on {device.type}; expected some of "
                            f"{', '.join(m for m in MODES if device.type == 'cuda' or 'graphs' not in m)}.")
    if args.checkpoint and args.preset or args.train and (args.checkpoint or args.preset):
        raise UserError("--checkpoint, --preset and --train exclude each other; give one of them.")
    if args.train:
        if dtype == torch.float8_e4m3fn:
            raise UserError("Training knows no fp8; use --precision bf16 or fp32 with --train.")
        return train_table(args, device, dtype)
    checkpoint = random_checkpoint(args.preset) if args.preset else drr.load_checkpoint(args.checkpoint or BUNDLED)
    name = f"{args.preset}, random weights" if args.preset else Path(args.checkpoint or BUNDLED).name
    decode_table(args, name, checkpoint, device, dtype)


if __name__ == "__main__":
    run(main)
