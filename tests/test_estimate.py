"""tools/estimate.py: its formulas beside what real training steps take."""
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import drr
import train_vae
from support.common import load_config
from tools import estimate


class Peak(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations create and takes off those that are freed."""

    held = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        storages = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for address, storage in {storage._cdata: storage for storage in storages}.items():
            if address not in old:                             # views and in-place results are no new memory
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.held += size
        self.peak = max(self.peak, self.held)


def transformer_step(config, batch, hidden):
    """A function that does forward and backward, and the model; `hidden` stacks of each image."""
    vae = drr.RQVAE(config.vae)
    c = config.transformer
    model = drr.ContextualRQTransformer(c, estimate.CLASSES, vae.side ** 2, config.vae.depth,
                                        vae.quantizer.codebook)
    model.recompute = c.recompute
    N, D = model.positions, model.depth
    codes = torch.randint(len(model.codebook), (batch, N, D))
    mask = (torch.arange(N) < hidden).expand(batch, N)
    return lambda: model(codes, mask, torch.zeros(batch, 1, dtype=torch.int64))[0].mean().backward(), [model]


def vae_step(config, batch):
    """The same for stage 1: the decoder's step and the discriminator's, as the trainer does them."""
    c = config.vae
    vae = drr.RQVAE(c)
    disc = train_vae.Discriminator(c.disc, c.disc_ch, c.disc_layers)
    x = torch.rand(batch, 3, vae.size, vae.size) * 2 - 1

    def step():
        recon, commitment, *_ = vae(x)
        disc.requires_grad_(False)
        gan = -disc(recon)[0].mean()
        error = (recon - x).square().mean()
        weight = train_vae.adaptive_weight(error, gan, vae.decoder.conv_out.weight)
        (error + commitment + weight * gan).backward()
        disc.requires_grad_(True)
        train_vae.HingeLoss(disc)(x, recon.detach())[0].backward()
    return step, [vae, disc]


def counted(counter, step):
    with torch.autograd.set_multithreading_enabled(False), counter:        # a mode holds in one thread
        step()
    return counter


@pytest.mark.parametrize("more", [["transformer.n_spatial=4", "transformer.head_dim=16"],
                                  ["vae.codebook_size=1024"], ["transformer.recompute=true"]])
def test_memory_and_operations_of_a_transformer_step(more):
    config = load_config("smoke", ["transformer.d_model=128", *more])
    step, models = transformer_step(config, 8, hidden=64)
    step()                                                     # makes the gradients, which are no activations
    guess = estimate.memory("transformer", config, 1, torch.float32, batch=8)
    assert guess.activations == pytest.approx(counted(Peak(), step).peak, rel=0.1)
    assert guess.parameters == sum(p.numel() for p in models[0].parameters())
    step, _ = transformer_step(config, 1, hidden=round(64 * 2 / math.pi + 0.5))
    flops = counted(FlopCounterMode(display=False), step).get_total_flops()
    assert estimate.flops_per_image("transformer", config) == pytest.approx(flops, rel=0.03)


@pytest.mark.parametrize("more", [[], ["vae.upscale=2"], ["vae.upscale=2", "vae.disc=spectral"]])
def test_memory_and_operations_of_a_vae_step(more):
    config = load_config("smoke", ["vae.ch=32", *more])
    step, models = vae_step(config, 4)
    step()
    guess = estimate.memory("vae", config, 1, torch.float32, batch=4)
    assert guess.activations == pytest.approx(counted(Peak(), step).peak, rel=0.15)
    assert guess.parameters == sum(p.numel() for model in models for p in model.parameters())
    flops = counted(FlopCounterMode(display=False), step).get_total_flops() / 4
    assert estimate.flops_per_image("vae", config) == pytest.approx(flops, rel=0.06)


def test_state_is_sixteen_bytes_per_parameter_and_the_average_and_is_sharded():
    config = load_config("imagenet-371m", ["transformer.n_spatial=2"])
    one = estimate.memory("transformer", config, batch=64)
    config.transformer.shard = True
    eighth = estimate.memory("transformer", config, 8, batch=64)
    assert one.state - eighth.state == pytest.approx(7 / 8 * 20 * one.parameters, rel=1e-6)
    assert one.activations == eighth.activations


def test_the_script(call):
    rows = [line.split()[:4] for line in call(estimate.main, "smoke", "--tflops", 9).splitlines()[2:]]
    world = ("1", "16"), ("8", "2")                            # GPUs, and the micro-batch of each
    assert rows == [["smoke", stage, *row] for stage in ("vae", "transformer") for row in world]
