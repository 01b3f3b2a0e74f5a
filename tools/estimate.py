"""What a training will cost, before it starts: memory of each GPU, operations, hours.

    python estimate.py imagenet-371m --gpus 1,8 --tflops 990 --mfu 0.4     # planned for a GPU of 990 TFLOP/s in bf16
    python estimate.py imagenet-371m transformer.batch_size=512            # for this machine, whose rate is measured
    python estimate.py imagenet-371m --check --batch 2                     # one real step beside its estimate

Without a preset the table has all that can be trained. The step that it measures is a copy of the trainers' own, without the
optimizer's arithmetic and the moving averages, run on tensors that have a shape and no contents (FakeTensorMode).
"""
import argparse
import gc
import math
import re
import time
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import drr
import train_vae
from support import runs
from support.common import HERE, add_device_arguments, autocast, load_config, matrix_rate, peak_ram, pick_device, run, synchronize
from drr import UserError

CLASSES = 1000      # of ImageNet; the estimate does not look at the data, and a class is only one more embedding


# === A training step of either stage, on real or on fake tensors ====================================================
class Vgg16Distance(nn.Module):
    """What LPIPS calculates, with random weights: images, images (B, 3, S, S) -> (B,). It only has to cost the same."""

    def __init__(self):
        super().__init__()
        widths = [[3, 64, 64], [64, 128, 128], [128, 256, 256, 256], [256, 512, 512, 512], [512, 512, 512, 512]]
        self.slices = nn.ModuleList(nn.Sequential(*(layer for a, b in zip(w, w[1:]) for layer in (
            nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True)))) for w in widths)

    def features(self, x):
        for i, layers in enumerate(self.slices):
            x = layers(F.max_pool2d(x, 2) if i else x)
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, a, b):
        features = zip(list(self.features(a)), list(self.features(b)))
        return sum((x - y).square().mean((1, 2, 3)) for x, y in features)


def build(stage, config):
    """The modules of a stage as its trainer has them: `trained` have gradients and Adam's moments, `frozen` do not."""
    vae = drr.RQVAE(config.vae)
    if stage == "vae":
        c = config.vae
        disc = train_vae.Discriminator(c.disc, c.disc_ch, c.disc_layers) if c.disc_weight else None
        # EfficientNet, the smaller alternative, is counted as if it were LPIPS.
        frozen = Vgg16Distance().requires_grad_(False) if c.perceptual_weight else None
        trained = nn.ModuleList([vae, disc] if disc else [vae])
        return SimpleNamespace(model=vae, trained=trained, disc=disc, frozen=frozen)
    c = config.transformer
    model = drr.ContextualRQTransformer(c, drr.conditions(c, range(CLASSES)), vae.side ** 2, config.vae.depth,
                                        vae.quantizer.codebook)
    model.recompute = c.recompute
    return SimpleNamespace(model=model, trained=model, disc=None, frozen=vae.requires_grad_(False))


def forward_backward(stage, config, parts, batch, device, dtype):
    """The loss of one micro-batch of random data, and its gradients; every stack is hidden, which costs the most."""
    c, model = getattr(config, stage), parts.model
    if stage == "transformer":
        codes = torch.randint(len(model.codebook), (batch, model.positions, model.depth), device=device)
        hidden = torch.ones(batch, model.positions, dtype=torch.bool, device=device)
        cond = torch.zeros(batch, model.cond_length, dtype=torch.int64, device=device)
        with autocast(device, dtype):
            loss = model(codes, hidden, cond)[0].mean()
        loss.backward()
        return loss.detach()
    x = torch.rand(batch, 3, c.resolution, c.resolution, device=device) * 2 - 1
    with autocast(device, dtype):
        recon, commitment, *_ = model(x)
    recon = recon.float()
    loss = (recon - x).square().mean() + (parts.frozen(recon, x).mean() if parts.frozen else 0)
    if parts.disc:
        parts.disc.requires_grad_(False)
        gan = -parts.disc(recon)[0].mean()
        loss = loss + train_vae.adaptive_weight(loss, gan, model.decoder.conv_out.weight) * gan
        parts.disc.requires_grad_(True)
    (loss + commitment).backward()
    if parts.disc:
        train_vae.HingeLoss(parts.disc)(x, recon.detach())[0].backward()
    return loss.detach()


# === Memory and operations of that step, without doing it ===========================================================
class Hidden(TorchFunctionMode):
    """Nobody knows how many stacks a fake mask selects: h[mask] takes the first `count` of each image (None: all)."""

    def __init__(self, count):
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            return args[0][:, :self.count].flatten(0, 1).clone()
        return function(*args, **(kwargs or {}))


@contextmanager
def like_cuda():
    """Fake tensors are the CPU's; inside, they do what a GPU does: fused attention, and normalisation in float32 under
    autocast. Patched and not a mode, because no mode holds in the backward pass, where recomputation happens."""
    float32 = lambda function: lambda x, *values, **named: function(x.float(), *values, **named)
    explicit, flash = drr.attention, torch.ops.aten._scaled_dot_product_flash_attention

    def fused(q, k, v, causal=False):
        return flash(q, k, v, 0.0, causal)[0] if q.dim() == 4 and q.shape[-2] > drr.SHORT else explicit(q, k, v, causal)

    with (mock.patch.object(drr, "attention", fused), mock.patch.object(F, "layer_norm", float32(F.layer_norm)),
          mock.patch.object(F, "group_norm", float32(F.group_norm))):
        yield


def dry_run(stage, config, batch, counter, hidden=None, device_type="cpu", dtype=torch.float32):
    """Runs forward_backward on fake tensors under `counter` (Peak or FlopCounterMode); returns the modules it ran."""
    from torch._subclasses.fake_tensor import FakeTensorMode       # takes a second, which only an estimate should cost
    device = torch.device("cpu")
    cuda = like_cuda() if device_type == "cuda" else nullcontext()
    # One thread, also on a machine with a GPU: a mode holds in the thread that it was entered in.
    with FakeTensorMode(), Hidden(hidden), cuda, torch.autograd.set_multithreading_enabled(False):
        parts = build(stage, config)
        for p in parts.trained.parameters():
            p.grad = torch.zeros_like(p)                           # as from the second micro-batch on
        with counter:
            forward_backward(stage, config, parts, batch, device, dtype)
    gc.collect()
    return parts


class Memory(NamedTuple):
    parameters: int     # that the stage trains, on all devices together
    state: int          # bytes: float32 weights, gradients, Adam's moments, stage 2's moving average; frozen modules
    activations: int    # bytes that a micro-batch adds at its peak


def memory(stage, config, world=1, device_type="cuda", dtype=torch.bfloat16, batch=None):
    """Memory of each of `world` devices. With transformer.shard each has its part of weights, optimizer and average.

    `batch` is the micro-batch (None: the configuration's). The activations are what is kept for the backward pass,
    autocast's copies of the weights and what operations hold meanwhile, all stacks being hidden. Not in it: the CUDA
    context (about 0.5 GB), gaps between the allocator's blocks, what cuDNN and NCCL take, training data on the device.
    """
    c, peak = getattr(config, stage), runs.Peak()
    parts = dry_run(stage, config, batch or runs.micro_batch(stage, c, world), peak, device_type=device_type, dtype=dtype)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    weights = size(parts.trained.parameters())
    shards = world if getattr(c, "shard", False) else 1
    copies = 5 if stage == "transformer" else 4                    # weights, gradients, two moments (, moving average)
    buffers = size(parts.trained.buffers()) * (copies - 3)         # one more in the moving average
    frozen = size([*parts.frozen.parameters(), *parts.frozen.buffers()]) if parts.frozen else 0
    state = copies * weights // shards + buffers + frozen
    return Memory(sum(p.numel() for p in parts.trained.parameters()), state, peak.peak)


def flops_per_image(stage, config):
    """Floating-point operations (2 a multiply-add) that one image costs in training: matrix products, convolutions and
    attention, forward and backward, with the adversary, the perceptual loss and recomputation where they are on."""
    N = (config.vae.resolution >> len(config.vae.ch_mult) - 1) ** 2
    hidden = round(2 / math.pi * N + 0.5)                          # the mean of ceil(cos(pi r / 2) N) (Eq. 10)
    counter = FlopCounterMode(display=False)
    dry_run(stage, config, 1, counter, hidden)
    return counter.get_total_flops()


# === One real step, to see whether all that is true =================================================================
def used_memory(device):
    """The most bytes that this process has held so far: on the GPU, or in RAM."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_ram()


def check(stage, config, batch, device, dtype):
    """Trains two steps of `batch` random images and prints what was estimated beside what was measured."""
    before = used_memory(device)
    parts = build(stage, config)
    trained = list(parts.trained.to(device).parameters())
    if parts.frozen:
        parts.frozen.to(device)
    opt = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ema = [p.detach().clone() for p in trained] if stage == "transformer" else None
    for step in range(2):                                          # the first one makes the optimizer's moments
        synchronize(device)
        start = time.perf_counter()
        loss = forward_backward(stage, config, parts, batch, device, dtype).item()
        opt.step()
        opt.zero_grad(set_to_none=False)                           # kept, as they are from micro-batch to micro-batch
        if ema:
            torch._foreach_lerp_(ema, trained, 1e-4)
        synchronize(device)
        seconds = time.perf_counter() - start
        print(f"step {step + 1}: loss {loss:.3f}, {seconds:.2f} s", flush=True)
    measured, m = used_memory(device) - before, memory(stage, config, 1, device.type, dtype, batch)
    counter = FlopCounterMode(display=False)
    dry_run(stage, config, batch, counter)
    flops, rate = counter.get_total_flops(), matrix_rate(device, dtype)        # its matrices are not to count as memory
    print(f"memory: {(m.state + m.activations) / 1e9:.2f} GB estimated ({m.state / 1e9:.2f} state, "
          f"{m.activations / 1e9:.2f} activations), {measured / 1e9:.2f} GB measured\n"
          f"speed: {flops / 1e12:.3f} TFLOP in {seconds:.2f} s, "
          f"{flops / seconds / rate:.0%} of the {rate / 1e12:.3f} TFLOP/s of matrix products")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="PRESET or section.key=value", help="all presets, as they are")
    parser.add_argument("--gpus", default="1,8", help="numbers of devices (1,8)")
    parser.add_argument("--tflops", type=float, help="plan for GPUs with this rate in bf16, not for this machine")
    parser.add_argument("--mfu", type=float, default=0.4, help="the share of that rate that a training reaches (0.4)")
    parser.add_argument("--check", nargs="?", const="transformer", choices=("vae", "transformer"),
                        help="train two real steps of this stage (transformer) on this machine instead")
    parser.add_argument("--batch", type=int, help="images of those steps (2)")
    add_device_arguments(parser)
    args = parser.parse_intermixed_args()
    overrides = [word for word in args.words if "=" in word]
    every = yaml.safe_load((HERE / "config.yaml").read_text())["presets"]
    names = [word for word in args.words if "=" not in word] or list(every)
    configs = {name: load_config(name, overrides, ("vae", "transformer")) for name in names}
    if not re.fullmatch("[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", args.gpus):
        raise UserError(f"--gpus is {args.gpus!r}; expected numbers of devices like 1,8.")
    if args.batch is not None and not args.check:
        raise UserError("--batch is for --check; leave it out.")
    args.batch = 2 if args.batch is None else args.batch
    if not 0 < args.mfu <= 1 or args.tflops is not None and not 0 < args.tflops < math.inf or args.batch < 1:
        raise UserError("--tflops and --mfu are more than 0, --mfu at most 1, and --batch starts at 1.")
    device, dtype = (torch.device("cuda"), torch.bfloat16) if args.tflops else pick_device(args)
    if args.tflops and (args.device, args.precision) != ("auto", "auto"):
        raise UserError("--tflops plans for other hardware than this; leave --device and --precision out.")
    if args.check:
        if len(names) != 1 or args.tflops:
            raise UserError("--check trains one preset on this machine; name one, and leave --tflops out.")
        return check(args.check, configs[names[0]], args.batch, device, dtype)
    rate = args.tflops * 1e12 if args.tflops else matrix_rate(device, dtype)
    print(f"{device.type}, {str(dtype)[6:]}: {rate / 1e12:.4g} TFLOP/s {'given' if args.tflops else 'measured'}, of "
          f"which a training reaches {args.mfu:.0%} (--mfu).")
    print("preset            stage        GPUs  micro-batch  parameters  "
          "state GB  activations GB  GB a GPU  TFLOP a step     hours")
    known = {}                                                     # several presets share a stage 1
    for name, config in configs.items():
        for stage in ("vae", "transformer"):
            c = getattr(config, stage)
            if config.transformer.cond == "text":                  # no data to train on; stage 1 is imagenet-256's
                continue
            for world in map(int, args.gpus.split(",")):
                sections = str((stage, config.vae, stage == "transformer" and config.transformer))
                if sections not in known:
                    known[sections] = flops_per_image(stage, config)
                if (sections, world) not in known:
                    known[sections, world] = memory(stage, config, world, device.type, dtype)
                flops, m = known[sections] * c.batch_size, known[sections, world]
                print(f"{name:16}  {stage:11}  {world:4d}  {runs.micro_batch(stage, c, world):11d}  {m.parameters / 1e6:9.1f}M  "
                      f"{m.state / 1e9:8.2f}  {m.activations / 1e9:14.2f}  {(m.state + m.activations) / 1e9:8.2f}  "
                      f"{flops / 1e12:12.4g}  {c.steps * flops / (rate * args.mfu * world) / 3600:8.2f}", flush=True)


if __name__ == "__main__":
    run(main)
