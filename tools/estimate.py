"""What a training will cost, before it starts: memory of each GPU, operations, hours.

    python -m tools.estimate imagenet-821m --gpus 1,8 --tflops 990      # for GPUs of 990 TFLOP/s in bf16
    python -m tools.estimate imagenet-371m transformer.batch_size=512   # for this machine, measured

Without a preset the table has all of them. This is arithmetic on the configuration; nothing is trained.
All of a model is taken to learn: train_vae.py --decoder-only needs less.
"""
import argparse
import math
import re
from typing import NamedTuple

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import drr
from drr import UserError
from support import models, runs
from support.common import (HERE, add_device_arguments, load_config, matrix_rate, pick_device, precision_name,
                            run)
from support.losses import Discriminator

CLASSES = 1000      # of ImageNet; a class is only one more embedding


class Perceptual(NamedTuple):
    parameters: float
    flops: float        # of a forward pass, per pixel
    kept: float         # bytes for the backward pass, per pixel


# LPIPS counted over the layers of VGG16, in float32; EfficientNet-Lite0 is a guess, not measured.
PERCEPTUAL = {"lpips": Perceptual(14.7e6, 6.1e5, 2.4e3), "efficientnet": Perceptual(4.7e6, 1.1e4, 1.5e3)}


def modules(stage, config):
    """(what the stage trains, its frozen part) as lists of modules without values, on the device `meta`."""
    with torch.device("meta"):
        vae = drr.RQVAE(config.vae)
        if stage == "vae":
            c = config.vae
            adversary = c.disc_weight or c.feature_weight
            return [vae] + [Discriminator(c.disc, c.disc_ch, c.disc_layers)] * bool(adversary), []
        c = config.transformer
        conditions = drr.conditions(c, range(CLASSES))
        model = models.build(c, conditions, vae.side ** 2, config.vae.depth, vae.quantizer.codebook)
        return [model], [vae]


# === Memory =================================================================================================
class Memory(NamedTuple):
    parameters: int     # that the stage trains, on all devices together
    state: int          # bytes on each device: weights, gradients, Adam's moments, average, frozen modules
    activations: int    # bytes that a micro-batch adds at its peak


def memory(stage, config, world=1, dtype=torch.bfloat16, batch=None):
    """Memory of each of `world` devices for micro-batches of `batch` images (the configuration's).

    Not in it: the CUDA context (about 0.5 GB), gaps between the allocator's blocks, what cuDNN and NCCL take,
    and training data on the device.
    """
    trained, frozen = modules(stage, config)
    c = getattr(config, stage)
    parameters = sum(p.numel() for module in trained for p in module.parameters())
    state = 16 * parameters                                    # weights, gradients, two moments
    if stage == "transformer":
        state = 20 * parameters                                # and the average of all weights
        if c.shard:
            state //= world
    else:
        state += 4 * sum(p.numel() for p in trained[0].decoder.parameters())     # the decoder's average
        if c.perceptual_weight:
            state += 4 * int(PERCEPTUAL[c.perceptual].parameters)
    for module in trained + frozen:
        state += 4 * sum(buffer.numel() for buffer in module.buffers())
    state += 4 * sum(p.numel() for module in frozen for p in module.parameters())
    batch = batch or runs.micro_batch(stage, c, world)
    size = 4 if dtype == torch.float32 else 2
    if stage == "vae":
        return Memory(parameters, state, int(batch * vae_activations(trained, config.vae, size)))
    copies = 2 * parameters if size == 2 else 0                # autocast's copies of the weights
    # Pictures are drawn between the steps, with a copy of the average in the precision of decoding; where
    # weights are sharded, rank 0 first takes the whole average.
    activations = max(4 * parameters * c.shard, batch * transformer_activations(config, size))
    return Memory(parameters, state, int(copies + activations))


def depth_blocks(c):
    """How many blocks run over depth: none where a code needs no order (related/maskgit.py)."""
    return 0 if models.kind(c).head else c.n_depth


def transformer_activations(config, size):
    """Bytes per image at the peak, which is where the backward pass begins, with all stacks hidden.

    size: bytes of a number in matrix products, 4 or 2. The residual stream and what is normalized have 4.
    """
    c, v = config.transformer, config.vae
    N = (v.resolution >> len(v.ch_mult) - 1) ** 2
    T = N + (c.text_length if c.cond == "text" else 1)
    d = c.d_model
    stacks = N * v.depth                                       # tokens of the depth transformer
    written_out = size == 4 or T <= 16          # as in drr.attention; a fused kernel keeps no matrix

    def block(tokens, keys, matrix):
        # Inputs of both normalizations, in float32; inputs of products (qkv d, attention 3d, proj d, fc1 d,
        # fc2 4d) and of the GELU (4d); the attention matrix; the masks of dropout, a byte each on a GPU.
        masks = 2 * d * bool(c.dropout)
        return tokens * (8 * d + 14 * size * d + masks + matrix * keys * (d // c.head_dim) * size)
    spatial, depth = block(T, T, written_out), block(stacks, v.depth, True)
    # The backward pass begins with cross-entropy (log-softmax, its gradient, that of the logits) and an MLP.
    head = stacks * (12 * v.codebook_size + 4 * d + size * d)
    if c.recompute:                                            # inputs of all blocks, and all of one block
        return 4 * d * (c.n_spatial * T + depth_blocks(c) * stacks) + max(head, depth + stacks * 4 * size * d)
    return c.n_spatial * spatial + depth_blocks(c) * depth + max(head, stacks * (4 * d + 8 * size * d))


def vae_activations(trained, c, size):
    """Bytes per image that RQ-VAE, discriminator and perceptual network keep for the backward pass."""
    total, pixels = 0, (c.resolution * c.upscale) ** 2

    def keep(module, inputs, output):
        nonlocal total
        x = inputs[0] if inputs else None      # a weight's normalization, which keeps next to nothing
        if isinstance(module, torch.nn.GroupNorm):             # and its output, which SiLU keeps, in float32
            total += 4 * (x.numel() + output.numel())
        elif isinstance(module, torch.nn.BatchNorm2d):
            total += size * x.numel()
        elif isinstance(module, torch.nn.LeakyReLU):
            total += size * output.numel()
        elif isinstance(module, torch.nn.Conv2d):
            total += size * x.numel()
    hooks = [m.register_forward_hook(keep) for model in trained for m in model.modules()]
    forward(trained, c)
    for hook in hooks:
        hook.remove()
    if c.perceptual_weight:
        total += PERCEPTUAL[c.perceptual].kept * pixels
    # And the backward pass of the last layers; the enlarging ones pad copies of their inputs.
    return total + 4 * (8 if c.upscale > 1 else 4) * c.ch * pixels


# === Operations =============================================================================================
def forward(models, c):
    """Runs models of images for one image, on the device `meta`: shapes only, and without quantization."""
    size = c.resolution * c.upscale
    images = torch.empty(1, 3, size, size, device="meta")
    for model in models:
        if isinstance(model, drr.RQVAE):
            model.decode_latent(model.encode_latent(images))
        else:
            model(images)


def flops_per_image(stage, config):
    """Floating-point operations (2 per multiply-add) that an image costs in training: matrix products,
    convolutions and attention, forward and backward (twice the forward pass)."""
    c, v = config.transformer, config.vae
    if stage == "transformer":
        N = (v.resolution >> len(v.ch_mult) - 1) ** 2
        T = N + (c.text_length if c.cond == "text" else 1)
        d, D = c.d_model, v.depth
        # With 2 / pi the mean of ceil(cos(pi r / 2) N), times D.
        stacks = min(N, round(models.kind(c).hidden * N + 0.5)) * D
        blocks = c.n_spatial * T * (24 * d * d + 4 * T * d)
        blocks += depth_blocks(c) * stacks * (24 * d * d + 4 * D * d)
        total = 3 * (blocks + stacks * 2 * d * v.codebook_size + 2 * (N + stacks) * v.code_dim * d)
        if c.recompute:                                        # the blocks once more, but for fc2
            total += blocks - 8 * d * d * (c.n_spatial * T + depth_blocks(c) * stacks)
        return total
    counts = []
    for model in modules(stage, config)[0]:
        counter = FlopCounterMode(display=False)
        with counter:
            forward([model], v)
        counts.append(counter.get_total_flops())
    total = 3 * counts[0]
    if len(counts) > 1:
        # The decoder's step: a forward pass, and back to the images (again for the adaptive weight); the
        # discriminator's: forward and backward with real and reconstructed images.
        total += (2 + 6 + v.disc_adaptive + bool(v.feature_weight)) * counts[1]
    if v.perceptual_weight:
        total += 3 * PERCEPTUAL[v.perceptual].flops * (v.resolution * v.upscale) ** 2
    return total


# === The command ============================================================================================
def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("words", nargs="*", metavar="PRESET or section.key=value", help="(all presets)")
    parser.add_argument("--gpus", default="1,8", help="numbers of devices (1,8)")
    parser.add_argument("--tflops", type=float, help="plan for GPUs with this rate in bf16")
    parser.add_argument("--mfu", type=float, default=0.4, help="the share that a training reaches (0.4)")
    add_device_arguments(parser)
    args = parser.parse_intermixed_args()
    overrides = [word for word in args.words if "=" in word]
    every = yaml.safe_load((HERE / "config.yaml").read_text())["presets"]
    names = [word for word in args.words if "=" not in word] or list(every)
    configs = {name: load_config(name, overrides, ("vae", "transformer")) for name in names}
    if not re.fullmatch("[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", args.gpus):
        raise UserError(f"--gpus is {args.gpus!r}; expected numbers of devices such as 1,8.")
    if not 0 < args.mfu <= 1 or args.tflops is not None and not 0 < args.tflops < math.inf:
        raise UserError(f"--tflops is {args.tflops} and --mfu {args.mfu}; expected above 0, --mfu at most 1.")
    if args.tflops:
        if (args.device, args.precision) != ("auto", "auto"):
            raise UserError("--tflops plans for other hardware; leave --device and --precision out.")
        dtype, rate = torch.bfloat16, args.tflops * 1e12
    else:
        device, dtype = pick_device(args)
        rate = matrix_rate(device, dtype)
    print(f"{precision_name(dtype)} in both stages (train_vae.py needs --precision for bf16): "
          f"{rate / 1e12:.4g} TFLOP/s, of which {args.mfu:.0%} are reached (--mfu).")
    print("preset                    stage        GPUs  micro-batch  parameters  "
          "state GB  activations GB  GB per GPU  TFLOP per step     hours")
    for name, config in configs.items():
        for stage in ("vae", "transformer"):
            c = getattr(config, stage)
            flops = flops_per_image(stage, config) * c.batch_size
            for world in map(int, args.gpus.split(",")):
                m = memory(stage, config, world, dtype)
                hours = c.steps * flops / (rate * args.mfu * world) / 3600
                print(f"{name:24}  {stage:11}  {world:4d}  {runs.micro_batch(stage, c, world):11d}  "
                      f"{m.parameters / 1e6:9.1f}M  {m.state / 1e9:8.2f}  {m.activations / 1e9:14.2f}  "
                      f"{(m.state + m.activations) / 1e9:10.2f}  {flops / 1e12:14.4g}  {hours:8.2f}")


if __name__ == "__main__":
    run(main)
